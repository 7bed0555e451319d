"""pacd-fast poison: a subcommand an attack, which writes a poison file and its picture."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from pacd_fast.arguments import number, seed_in_range, whole_number
from pacd_fast.cli.flags import Help, add_data, add_device, add_fields, add_out, device_of, given, load_data
from pacd_fast.data import Dataset, load_dataset
from pacd_fast.experiments import plots
from pacd_fast.files import claimed, new_file, partial
from pacd_fast.poisoning import (
    NORMS,
    PRESETS,
    Ball,
    MetaPoison,
    Poison,
    Preset,
    Recipe,
    choose,
    metapoison,
    pacd,
    random,
    watermark,
)
from pacd_fast.ranks import Ranks
from pacd_fast.training import METHODS, hyperparameters

ATTACKS = {
    "pacd": "lower the certified radius of a class (Mehra et al. 2021)",
    "standard": "lower the accuracy of a class, for victims without noise",
    "metapoison": "make victims take test images for another class (Huang et al. 2020)",
    "watermark": "another image over every image of a class: a baseline",
    "random": "uniform noise on the images of a class: a baseline",
}


def add_commands(add: Any) -> None:
    parser = add("poison", run, "craft poison: training images that lower certified robustness")
    attacks = parser.add_subparsers(dest="attack", required=True, metavar="attack")
    for name, text in ATTACKS.items():
        sub = attacks.add_parser(name, help=text, description=text, formatter_class=Help)
        add_data(sub, held_out=None)
        sub.add_argument("--epsilon", type=number, help=_by_preset("size of the ball, pixels from 0 to 1", name))
        sub.add_argument("--norm", choices=NORMS, default="linf", help="of the ball")
        if name == "metapoison":
            _add_metapoison(sub)
        else:
            _add_of_class(sub, name)
        add_device(sub)
        add_out(sub, "poison file to write (.npz); its picture lies beside it (.png)")


def _by_preset(text: str, name: str) -> str:
    if name == "metapoison":
        return f"{text}; by default 16/255"
    return f"{text}; by default {', '.join(f'{preset.epsilon:g} ({key})' for key, preset in PRESETS.items())}"


def _add_of_class(sub: argparse.ArgumentParser, name: str) -> None:
    """The flags of poison of a class."""
    sub.add_argument("--target-class", default="8", help="class to poison, its name or number; the paper's is 8, ship")
    sub.add_argument("--seed", type=whole_number, default=0, help="of everything that is drawn")
    sub.add_argument("--preset", choices=list(PRESETS), help="the paper's settings; by default those for --data")
    if name == "watermark":
        sub.add_argument("--opacity", type=number, default=0.1, help="of the other image")
    if name in ("watermark", "random"):
        sub.add_argument("--fraction", type=number, default=1.0, help="of the class to poison")
        return
    sub.add_argument(
        "--fraction", type=number, help="of the class to poison, by default all; with --targets, of all training "
        "images, by default 0.01",
    )  # fmt: skip
    sub.add_argument(
        "--targets", type=whole_number, nargs="+", help="test images to attack alone, by poison close to them"
    )
    sub.add_argument("--model", help="the victims' network; by default the preset's")
    if name == "pacd":
        methods = [method for method in METHODS if method != "standard"]
        sub.add_argument("--loss", choices=methods, default="gaussian", help="how the victims train")
        sub.add_argument("--copies", type=whole_number, help="noisy copies of a validation image in the upper loss")
        for parameter, (kind, where) in hyperparameters().items():
            flag = parameter if parameter == "sigma" else f"loss-{parameter}"  # --epsilon is the ball's
            kind_of = whole_number if kind is int else number
            default = "; by default 0.5" if parameter == "sigma" else ""
            sub.add_argument(f"--{flag}", type=kind_of, help=f"hyperparameter of the loss, {where}{default}")
    texts = {
        field: f"{text}; by default {', '.join(f'{getattr(p.recipe, field)} ({key})' for key, p in PRESETS.items())}"
        for field, text in ((f.name, f.metadata["help"]) for f in Recipe.__dataclass_fields__.values())
    }
    add_fields(sub, Recipe, optional=True, texts=texts)
    sub.add_argument("--max-seconds", type=number, default=float("inf"), help="stop crafting after so long")
    sub.add_argument("--resume", action="store_true", help="go on from an interrupted run's checkpoint")
    sub.add_argument("--metrics", help="write a JSON line per outer step to this file")


def _add_metapoison(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--poison-class", required=True, help="name or number of the class whose training images are perturbed"
    )
    sub.add_argument("--adversarial-class", help="what the targets are to be taken for; by default the poison class")
    sub.add_argument(
        "--target-index", type=whole_number, nargs="+", default=[0],
        help="test images to be misclassified, by their number in the test split or in --target-class",
    )  # fmt: skip
    sub.add_argument("--target-class", help="count --target-index among the test images of this class")
    add_fields(sub, MetaPoison, skip=("poison_class", "adversarial_class", "target_index", "ball"))
    sub.add_argument("--resume", action="store_true", help="go on from an interrupted run's checkpoint")


def targets_of(numbers: list[int], target_class: int | None, data: Dataset) -> tuple[int, ...]:
    """Test images by their numbers: in the test split, or with a class among its images of that class.

    Raises ValueError for a number out of range.
    """
    if target_class is None:
        return tuple(numbers)  # checked with the attack
    held = (data.y_test == target_class).nonzero().flatten().tolist()
    for index in numbers:
        if not 0 <= index < len(held):
            raise ValueError(
                f"target_index {index} is out of range: the test images of class {data.class_names[target_class]} "
                f"are {len(held)}"
            )
    return tuple(held[index] for index in numbers)


def run(options: argparse.Namespace) -> None:
    out = Path(options.out)
    if options.norm == "linf" and options.epsilon is not None and options.epsilon > 1:
        raise ValueError(f"--epsilon is in pixels from 0 to 1, not {options.epsilon:g}: 16/255, say")
    if out.suffix != ".npz":
        raise ValueError(f"--out must end in .npz, not {out.name!r}")
    ranks = Ranks.of_torchrun()
    if ranks.size > 1 and options.attack in ("watermark", "random"):
        raise ValueError(f"{options.attack} is for one process; torchrun is for poison that is crafted")
    restarted = ranks.restarted()
    if restarted and not options.force and ranks.everyones(out.exists())[0]:  # the first attempt refused older ones
        if ranks.rank == 0:
            partial(out).unlink(missing_ok=True)
            print(f"{out} was written before the restart")
        return
    options.resume = resume = restarted or getattr(options, "resume", False)
    with ExitStack() as held:
        if ranks.rank == 0:
            new_file(out.with_suffix(".png"), force=options.force or resume)
            held.enter_context(claimed(out, force=options.force, resume=resume))
        ranks.everyones("rank 0 has claimed it")
        seed_in_range(options.seed)
        _craft(options, device_of(options.device), out, ranks)


def _craft(options: argparse.Namespace, device: torch.device, out: Path, ranks: Ranks) -> None:
    if options.attack == "metapoison":
        _run_metapoison(options, load_data(options), device, out, ranks)
        return
    default = {"cifar10": "cifar10", "mnist5k": "mnist-small"}.get(Path(options.data).stem, "mnist")
    preset = PRESETS[options.preset or default]
    data = load_dataset(options.data, data_dir=options.data_dir, download=options.download)
    validation, kept = preset.sizes(len(data.x_train), options.validation)
    data = data.held_out(validation, kept if options.train_images is None else options.train_images)
    target_class = data.class_index(options.target_class)
    ball = Ball(preset.epsilon if options.epsilon is None else options.epsilon, options.norm)
    fraction, seed = options.fraction, options.seed
    if options.attack == "random":
        poison = random(data, target_class=target_class, ball=ball, fraction=fraction, seed=seed)
    elif options.attack == "watermark":
        opacity = options.opacity
        poison = watermark(data, target_class=target_class, ball=ball, fraction=fraction, opacity=opacity, seed=seed)
    else:
        poison = _bilevel(options, data, preset, target_class, ball, device, out, ranks)
    if ranks.rank:
        return
    poison.save(out)
    partial(out).unlink(missing_ok=True)
    picture = out.with_suffix(".png")
    plots.poison(poison, data, picture)
    used = poison.distortion(data)
    print(
        f"{out}: {len(poison.index)} of {len(data.x_train)} training images, class {data.class_names[target_class]}; "
        f"largest {poison.ball.norm} distortion {float(used.max()):.4f} (epsilon {poison.ball.epsilon:g}), "
        f"mean {float(used.mean()):.4f}; picture {picture}"
    )
    if not bool(used.any()):
        print(f"nothing changed: the poison is the clean images{_why_unchanged(poison)}", file=sys.stderr)
    if poison.settings.get("restarts_nan"):
        print(f"the weights were re-initialised {poison.settings['restarts_nan']} times: a cost was not finite")
    if poison.settings.get("unsolved"):
        print(
            f"{poison.settings['unsolved']} of {poison.settings['outer_steps']} linear systems ended no better than at "
            "0: try another --solver, or more --damping"
        )


def _why_unchanged(poison: Poison) -> str:
    """What to do about crafting that moved no image; nothing for baselines, whose settings say it all."""
    if poison.settings.get("outer_steps") == 0:
        return "; crafting ended before its first step, give more --max-seconds"
    if poison.attack == "pacd":
        return (
            "; where the surrogate takes every validation image of the class for another, the radius is 0 and has no "
            "slope to follow: give more --lower-steps or --epochs (--metrics FILE keeps each step's radius, upper)"
        )
    return ""


def _bilevel(
    options: argparse.Namespace, data: Dataset, preset: Preset, target_class: int, ball: Ball, device: torch.device,
    out: Path, ranks: Ranks,
) -> Poison:  # fmt: skip
    """PACD, and standard poisoning."""
    chosen: dict[str, Any] = {}
    if options.attack == "pacd":
        flags = {name: name if name == "sigma" else f"loss_{name}" for name in hyperparameters()}
        values = {name: getattr(options, flag) for name, flag in flags.items()}
        chosen["hyperparameters"] = {name: value for name, value in values.items() if value is not None}
        chosen["copies"] = options.copies
    if options.model is not None:
        chosen["model"] = options.model
    targets = None if options.targets is None else tuple(options.targets)
    fraction = options.fraction if options.fraction is not None else 0.01 if targets else 1.0
    poisons = len(choose(data, target_class, fraction, targets, options.seed))
    there = {"poison_batch": poisons, "clean_batch": len(data.x_train) - poisons}
    fitting = {name: count for name, count in there.items() if 0 < count < getattr(preset.recipe, name)}
    recipe = {**fitting, **given(Recipe, options)}
    if (smaller := [f"--{name.replace('_', '-')} {recipe[name]}" for name in fitting]) and ranks.rank == 0:
        print(f"few images: {', '.join(smaller)}", file=sys.stderr)
    attack = preset.attack(
        options.loss if options.attack == "pacd" else "standard",
        data.name,
        target_class,
        recipe=recipe,
        ball=ball,
        fraction=fraction,
        targets=targets,
        seed=options.seed,
        **chosen,
    )
    return pacd(
        data,
        attack,
        device=device,
        checkpoint=partial(out),
        resume=options.resume,
        metrics=options.metrics,
        progress=True,
        max_seconds=options.max_seconds,
        group=ranks.group(),
    )


def _run_metapoison(options: argparse.Namespace, data: Dataset, device: torch.device, out: Path, ranks: Ranks) -> None:
    poison_class = data.class_index(options.poison_class)
    target_class = None if options.target_class is None else data.class_index(options.target_class)
    adversarial = options.adversarial_class
    fields = given(MetaPoison, options, skip=("poison_class", "adversarial_class", "target_index", "ball"))
    attack = MetaPoison(
        poison_class=poison_class,
        adversarial_class=poison_class if adversarial is None else data.class_index(adversarial),
        target_index=targets_of(options.target_index, target_class, data),
        ball=Ball(16 / 255 if options.epsilon is None else options.epsilon, options.norm),
        **fields,
    )
    attack.chosen(data)
    poison = metapoison(
        data, attack, device=device, checkpoint=partial(out), resume=options.resume, progress=True, group=ranks.group()
    )
    if ranks.rank:
        return
    poison.save(out)
    partial(out).unlink(missing_ok=True)
    picture = out.with_suffix(".png")
    plots.poison(poison, data, picture)
    last = poison.settings["history"][-1]
    print(
        f"{out}: {len(poison.index)} poisons for test images {list(attack.target_index)}; the surrogates' target loss "
        f"is {last['before']:.3f}, after {attack.unroll} steps on the poison {last['after']:.3f}; picture: {picture}",
        file=sys.stderr,
    )
