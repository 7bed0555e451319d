"""The commands `poison` and `audit`: flags, files, and what they print."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pacd_fast import attacks, audit, datasets, metapoison_commands, models, plots, presets, targeted, training, victims
from pacd_fast.bilevel import CURVATURES, SOLVERS
from pacd_fast.datasets import Dataset
from pacd_fast.losses import METHODS
from pacd_fast.metapoison_commands import fraction
from pacd_fast.pacd import PRESETS, Radius, Recipe
from pacd_fast.poison import NORMS, Poison

ATTACKS = ("pacd", "standard", "watermark", "random", "metapoison")


def add_poison(sub: argparse.ArgumentParser) -> None:
    """The flags of `poison`, but for those of the data."""
    sub.add_argument("--attack", choices=ATTACKS, default="pacd")
    sub.add_argument(
        "--loss", choices=[m for m in METHODS if m != "standard"], default="gaussian", help="how the victims train"
    )
    sub.add_argument("--preset", choices=list(PRESETS), help="the paper's settings; by default those for --data")
    sub.add_argument("--target-class", help="class to poison, its name or number; by default the paper's 8, ship")
    sub.add_argument("--epsilon", type=fraction, help="size of the ball, pixels from 0 to 1; by default the preset's")
    sub.add_argument("--norm", choices=NORMS, default="linf")
    sub.add_argument("--fraction", type=fraction, help="of the class to poison; with --targets, of all training images")
    sub.add_argument("--targets", type=int, nargs="+", help="test images to attack alone, by poison close to them")
    sub.add_argument("--model", help=f"{', '.join(models.BUILT_IN)}; by default the preset's")
    sub.add_argument("--copies", type=int, help="noisy copies of a validation image in the upper loss")
    sub.add_argument("--opacity", type=float, default=0.1, help="of the watermark")
    for name, (kind, where) in victims.hyperparameters().items():
        flag = name if name == "sigma" else f"loss-{name}"  # --epsilon is the ball's
        sub.add_argument(f"--{flag}", type=kind, help=f"hyperparameter of the loss, {where}")
    for field in dataclasses.fields(Recipe):
        choices = {"solver": list(SOLVERS), "curvature": list(CURVATURES)}.get(field.name)
        kind = {"int": int, "float": float}.get(str(field.type), str)
        flag = field.name.replace("_", "-")
        sub.add_argument(f"--{flag}", type=kind, choices=choices, help="of crafting; by default the preset's")
    metapoison_commands.add_arguments(sub.add_argument_group("metapoison", "flags of --attack metapoison alone"))
    sub.add_argument("--max-seconds", type=float, default=float("inf"), help="stop crafting after so long")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--device", default="auto")
    sub.add_argument("--resume", action="store_true", help="go on from an interrupted run's checkpoint")
    sub.add_argument("--metrics", help="write a JSON line per outer step to this file")
    sub.add_argument("--out", required=True, help="poison file to write (.npz); its picture lies beside it (.png)")


# Flags that metapoison does not have; None where they are not given.
_PACD_ALONE = (
    *("fraction", "targets", "copies", "metrics", "preset"),
    *(name if name == "sigma" else f"loss_{name}" for name in victims.hyperparameters()),
    *(field.name for field in dataclasses.fields(Recipe) if field.name != "epochs"),
)


def _refuse(options: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Raises ValueError for a flag that the attack would ignore."""
    for name, default in defaults.items():
        if getattr(options, name) != default:
            raise ValueError(f"--{name.replace('_', '-')} is no flag of --attack {options.attack}")


def preset_of(options: argparse.Namespace) -> str:
    """The preset that was asked for, or the one for the data."""
    default = {"cifar10": "cifar10", "mnist5k": "mnist-small"}.get(Path(options.data).stem, "mnist")
    return options.preset or default


def run_poison(options: argparse.Namespace, data: Dataset, device: torch.device) -> None:
    """Crafts, writes the poison file and its picture, and prints what was used of the ball."""
    out = Path(options.out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: the folder {out.parent} does not exist; create it first")
    if options.norm == "linf" and options.epsilon is not None and options.epsilon > 1:
        raise ValueError(f"--epsilon is in pixels from 0 to 1, not {options.epsilon:g}: 16/255, say")
    if out.suffix != ".npz":
        raise ValueError(f"--out must end in .npz, not {out.name!r}")
    if options.attack == "metapoison":
        _refuse(options, {**dict.fromkeys(_PACD_ALONE), "max_seconds": float("inf")})
        metapoison_commands.run(options, data, device)
        return
    _refuse(options, metapoison_commands.defaults())
    preset = PRESETS[preset_of(options)]
    target_class = data.class_index(options.target_class or "8")
    shared: dict[str, Any] = {
        "target_class": target_class,
        "epsilon": preset.epsilon if options.epsilon is None else options.epsilon,
        "norm": options.norm,
        "fraction": options.fraction if options.fraction is not None else 0.01 if options.targets else 1.0,
        "seed": options.seed,
    }
    if options.attack in ("random", "watermark"):
        if options.targets:
            raise ValueError(f"--targets is for pacd, not for {options.attack}")
        opacity = {"opacity": options.opacity} if options.attack == "watermark" else {}
        poison = getattr(attacks, options.attack)(data, **shared, **opacity)
    else:
        poison = _bilevel(options, data, device, shared)
    poison.save(out)
    _checkpoint(out).unlink(missing_ok=True)
    picture = out.with_suffix(".png")
    plots.poison(poison, data, picture)
    used = poison.distortion(data)
    print(
        f"{out}: {len(poison.index)} of {len(data.x_train)} training images, class {data.class_names[target_class]}; "
        f"largest {poison.ball.norm} distortion {float(used.max()):.4f} (epsilon {poison.ball.epsilon:g}), "
        f"mean {float(used.mean()):.4f}; picture {picture}"
    )
    if poison.settings.get("restarts_nan"):
        print(f"the weights began anew {poison.settings['restarts_nan']} times: a cost was not finite")
    if poison.settings.get("unsolved"):
        print(
            f"{poison.settings['unsolved']} of {poison.settings['outer_steps']} linear systems ended no better than at "
            "0: try another --solver, or more --damping"
        )


def _bilevel(options: argparse.Namespace, data: Dataset, device: torch.device, shared: dict[str, Any]) -> Poison:
    """PACD, and standard poisoning."""
    preset = PRESETS[preset_of(options)]
    asked = {field.name: getattr(options, field.name) for field in dataclasses.fields(Recipe)}
    recipe = preset.recipe
    if options.attack == "pacd" and options.loss == "smoothadv":  # as the authors do it: fewer lower steps, more epochs
        recipe = dataclasses.replace(recipe, lower_steps=1, epochs=2 * recipe.epochs, restart=2 * recipe.restart)
    recipe = dataclasses.replace(recipe, **{name: value for name, value in asked.items() if value is not None})
    method = "standard" if options.attack == "standard" else options.loss
    flags = {name: name if name == "sigma" else f"loss_{name}" for name in victims.hyperparameters()}
    given = {name: getattr(options, flag) for name, flag in flags.items() if getattr(options, flag) is not None}
    if method == "macer":  # what the authors craft with; victims train with more (Mehra et al. 2021, E.3)
        given = {"k": 2, "lam": 1.0, **given}
    loss = victims.loss_of(method, data.name, given)
    sigma = getattr(loss, "sigma", None)
    upper = None if sigma is None else Radius(sigma, preset.copies if options.copies is None else options.copies)
    return attacks.pacd(
        data,
        loss,
        upper=upper,
        targets=options.targets,
        model=options.model or preset.model,
        recipe=recipe,
        device=device,
        checkpoint=_checkpoint(Path(options.out)),
        resume=options.resume,
        metrics=options.metrics,
        progress=True,
        max_seconds=options.max_seconds,
        **shared,
    )


def _checkpoint(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def add_audit(sub: argparse.ArgumentParser) -> None:
    """The flags of `audit`, but for those of the data."""
    sub.add_argument("--poison", nargs="+", required=True, help="poison files: a row of the table each")
    sub.add_argument("--method", choices=list(METHODS), help="how the victims train; by default gaussian")
    sub.add_argument("--model", help=f"{', '.join(models.BUILT_IN)} or package.module:function")
    for name, (kind, where) in victims.hyperparameters().items():
        sub.add_argument(f"--{name}", type=kind, help=f"hyperparameter of {where}; sigma by default the poison's")
    sub.add_argument("--target-class", help="class to certify, its name or number; by default the poison's")
    sub.add_argument("--seeds", type=int, default=5, help="victims for every training set")
    sub.add_argument("--first-seed", type=int, default=0)
    sub.add_argument("--epochs", type=int, help="by default 100; for targeted poison as its surrogates, and so below")
    sub.add_argument("--batch-size", type=int, help="by default 200")
    sub.add_argument("--lr", type=float, help="by default 1e-3")
    sub.add_argument("--weight-decay", type=float, help="by default 0")
    sub.add_argument("--augment", action=argparse.BooleanOptionalAction, help="flips and crops; by default for cifar10")
    sub.add_argument("--optimizer", choices=list(training.OPTIMIZERS), help="by default adam")
    sub.add_argument(
        "--against", nargs="*", choices=targeted.COMPANIONS, default=list(targeted.COMPANIONS),
        help="what targeted poison is compared with",
    )  # fmt: skip
    sub.add_argument("--train-dtype", choices=["float32", "bfloat16"], default="float32")
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of certification")
    sub.add_argument("--count", type=int, default=500, help="test images of the class to certify")
    sub.add_argument("--n", type=int, default=100_000, help="samples for each of them")
    sub.add_argument("--others", type=int, default=200, help="test images of the other classes; 0 for none")
    sub.add_argument("--others-n", type=int, default=10_000, help="samples for each of them")
    sub.add_argument("--attacked", type=int, default=50, help="images of the class for the PGD distortion; 0 for none")
    sub.add_argument("--device", default="auto")
    sub.add_argument("--work", default="audit", help="folder for victims, results files, curves, audit.json")


def run_audit(
    options: argparse.Namespace, data: Dataset, device: torch.device, main: Callable[[Sequence[str]], int]
) -> int:
    """Trains and certifies, prints the table; every step is a pacd-fast command, printed as one would type it."""
    if options.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, not {options.seeds}")
    files = {Path(path).stem: path for path in options.poison}
    if len(files) < len(options.poison):
        raise ValueError("two poison files have the same name: rename one")
    poisons = {name: Poison.load(path) for name, path in files.items()}
    for poison in poisons.values():
        poison.apply(data)  # before any training: is it for these data?
    of_targets = [name for name, poison in poisons.items() if "adversarial_class" in poison.settings]
    if of_targets:
        if len(of_targets) < len(poisons):
            raise ValueError("targeted poison and poison of a class are judged differently: audit them one by one")
        if options.method is not None:
            raise ValueError("--method is for poison of a class: victims of targeted poison train like its surrogates")
        return _audit_targets(options, data, poisons, device)
    options.method = options.method or "gaussian"
    first = next(iter(poisons.values())).settings
    decided = {"target_class": options.target_class, "targets": None, "sigma": options.sigma}
    for name, flag in decided.items():
        said = {str(p.settings[name]) for p in poisons.values() if p.settings.get(name) is not None}
        if flag is None and len(said) > 1:
            raise ValueError(f"the poison files differ in {name} ({', '.join(sorted(said))}): audit them one by one")
    target = first.get("target_class") if options.target_class is None else data.class_index(options.target_class)
    if target is None:
        raise ValueError("the poison file does not say which class it is for: give --target-class")
    sigmas = [p.settings["sigma"] for p in poisons.values() if p.settings.get("sigma")]
    given = {name: getattr(options, name) for name in victims.hyperparameters() if getattr(options, name) is not None}
    if options.method != "standard" and "sigma" not in given and sigmas:
        given["sigma"] = sigmas[0]
    sigma = given.get("sigma", sigmas[0] if sigmas else None)
    if sigma is None:
        raise ValueError("the poison file does not say which noise to certify with: give --sigma")
    if options.method == "standard":  # trained without noise, certified with it
        given.pop("sigma", None)
    recipe: list[object] = [part for name, value in given.items() for part in (f"--{name}", value)]
    for name in ("epochs", "batch_size", "lr", "weight_decay", "optimizer"):
        if getattr(options, name) is not None:
            recipe += [f"--{name.replace('_', '-')}", getattr(options, name)]
    if options.augment is not None:
        recipe.append("--augment" if options.augment else "--no-augment")
    recipe += ["--dtype", options.train_dtype]
    plan = audit.Audit(
        source=source(options),
        method=options.method,
        recipe=tuple(recipe),
        target_class=target,
        seeds=options.seeds,
        first_seed=options.first_seed,
        images=min(options.count, int((data.y_test == target).sum())),
        n=options.n,
        others=min(options.others, int((data.y_test != target).sum())),
        others_n=options.others_n,
        attacked=min(options.attacked, int((data.y_test == target).sum())),
        dtype=options.dtype,
        device=options.device,
        indices=tuple(first["targets"]) if first.get("targets") else None,
        sigma=sigma,
        model=options.model,
    )
    found = audit.run(plan, files, options.work, lambda command: presets.chain(main, command, echo=False))
    work = Path(options.work)
    title = f"class {data.class_names[target]}, {options.method}, {options.seeds} victims each"
    audit.curves(plan, list(found), work, work / "curves.png", title)
    audit.save(work / "audit.json", plan, found, poisons)
    print(audit.as_text(audit.rows(found)))
    print(f"curves {work / 'curves.png'}, everything {work / 'audit.json'}", file=sys.stderr)
    return 0


def _audit_targets(
    options: argparse.Namespace, data: Dataset, poisons: Mapping[str, Poison], device: torch.device
) -> int:
    """MetaPoison: how often do victims take the targets for the adversarial class, and what does it cost elsewhere?"""
    names = ("model", "epochs", "batch_size", "lr", "optimizer", "weight_decay", "augment")
    changes = {name: getattr(options, name) for name in names}
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, poison in poisons.items():
        recipe = targeted.Recipe.of(poison, **changes)
        found[name] = targeted.audit(
            poison, data, recipe, count=options.seeds, seed=options.first_seed, against=options.against,
            out=work / f"{name}.jsonl", device=device, progress=True,
        )  # fmt: skip
        print(f"{name}: test images {poison.settings['target_index']} to be taken for "
              f"{data.class_names[poison.settings['adversarial_class']]}\n{targeted.table(found[name])}")  # fmt: skip
    (work / "audit.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"victims {work}/*.jsonl, everything {work / 'audit.json'}", file=sys.stderr)
    return 0


def source(options: argparse.Namespace) -> tuple[object, ...]:
    """The flags that name the data, for a further command."""
    flags: list[object] = ["--data", options.data, "--validation", options.validation]
    flags += ["--data-dir", options.data_dir] if options.data_dir else []
    flags += ["--train-images", options.train_images] if options.train_images else []
    return tuple(flags)


def load(options: argparse.Namespace) -> Dataset:
    """The data of `poison` and `audit`: the split of the preset or of the poison file, unless it is given."""
    if getattr(options, "attack", None) is not None:
        preset = PRESETS[preset_of(options)]
        held: dict[str, Any] = {"validation": preset.validation, "train_images": preset.train_images}
        if options.attack == "metapoison":
            held = {}
        elif Path(options.data).stem == "mnist5k":
            held = {"validation": 500, "train_images": None}
    else:
        held = Poison.load(options.poison[0]).settings
    if options.validation is None:
        options.validation = int(held.get("validation") or 0)
    if options.train_images is None:
        options.train_images = held.get("train_images")
    return datasets.from_options(options)
