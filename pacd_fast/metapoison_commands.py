"""The flags of MetaPoison on the command line, and its run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from pacd_fast import plots
from pacd_fast.datasets import Dataset
from pacd_fast.metapoison import OBJECTIVES, MetaPoison, metapoison
from pacd_fast.poison import Ball, Poison

__all__ = ["add_arguments", "attack_of", "fraction", "run", "targets_of"]


def fraction(text: str) -> float:
    """A number, or a quotient such as 16/255; for argparse, which names the flag where it is neither."""
    above, slash, below = text.partition("/")
    try:
        return float(above) / (float(below) if slash else 1.0)
    except ZeroDivisionError as error:
        raise ValueError(f"{text!r} is no number and no quotient such as 16/255") from error


def targets_of(numbers: list[int], target_class: int | None, data: Dataset) -> tuple[int, ...]:
    """Test images by their numbers: in the test split, or with a class among its images of that class.

    Raises ValueError for a number out of range.
    """
    if target_class is None:
        return tuple(numbers)  # checked with the attack
    held = (data.y_test == target_class).nonzero().flatten().tolist()
    for number in numbers:
        if not 0 <= number < len(held):
            raise ValueError(
                f"target_index {number} is out of range: the test images of class {data.class_names[target_class]} "
                f"are {len(held)}"
            )
    return tuple(held[number] for number in numbers)


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """The flags that this attack has alone; by default the authors' settings.  The rest are those of `poison`."""
    parser.add_argument("--target-index", type=int, nargs="+", default=[0], help="test images to be misclassified")
    parser.add_argument("--poison-class", help="name or number of the class whose training images are perturbed")
    parser.add_argument("--adversarial-class", help="what the targets are to be taken for; default: the poison class")
    parser.add_argument("--budget", type=float, default=0.1, help="share of the training images that is perturbed")
    parser.add_argument("--surrogates", type=int, default=24)
    parser.add_argument("--unroll", type=int, default=2, help="SGD steps to look ahead")
    parser.add_argument("--craft-steps", type=int, default=60)
    parser.add_argument(
        "--craft-lr", type=float, default=0.25, help="Adam's first rate on the perturbation, of epsilon"
    )
    parser.add_argument("--objective", choices=OBJECTIVES, default="cross-entropy")
    parser.add_argument("--confidence", type=float, default=0.0, help="margin after which carlini-wagner stops")
    parser.add_argument("--batch-size", type=int, default=125)
    parser.add_argument("--lr", type=float, default=0.1, help="of the surrogates")
    parser.add_argument("--optimizer", choices=["momentum", "sgd"], default="momentum", help="of the surrogates")
    parser.add_argument("--recompute", action="store_true", help="save memory: evaluate unrolled steps twice")


def defaults() -> dict[str, Any]:
    """The flags that this attack has alone, where they are not given."""
    parser = argparse.ArgumentParser()
    add_arguments(parser.add_argument_group())
    return vars(parser.parse_args([]))


def attack_of(options: argparse.Namespace, data: Dataset) -> MetaPoison:
    """The settings on a command line.  Raises ValueError, one line that says what to do."""
    if options.poison_class is None:
        raise ValueError("metapoison needs a --poison-class: the class whose training images it may perturb")
    poison_class = data.class_index(options.poison_class)
    target_class = None if options.target_class is None else data.class_index(options.target_class)
    given = options.adversarial_class
    return MetaPoison(
        poison_class=poison_class,
        adversarial_class=poison_class if given is None else data.class_index(given),
        target_index=targets_of(options.target_index, target_class, data),
        budget=options.budget,
        ball=Ball(16 / 255 if options.epsilon is None else options.epsilon, options.norm),
        model=options.model or "resnet20",
        surrogates=options.surrogates,
        unroll=options.unroll,
        steps=options.craft_steps,
        craft_lr=options.craft_lr,
        objective=options.objective,
        confidence=options.confidence,
        epochs=100 if options.epochs is None else options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        momentum=0.9 if options.optimizer == "momentum" else 0.0,
        recompute=options.recompute,
        seed=options.seed,
    )


def run(options: argparse.Namespace, data: Dataset, device: torch.device | str = "cpu") -> Poison:
    """Crafts the poison of a command line into --out (--resume: from `out`.partial), and draws it beside it (.png)."""
    attack, out = attack_of(options, data), Path(options.out)
    attack.chosen(data)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: the folder {out.parent} does not exist; create it first")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the name of a file")
    partial = out.with_name(out.name + ".partial")
    poison = metapoison(data, attack, device=device, checkpoint=partial, resume=options.resume, progress=True)
    poison.save(out)
    partial.unlink(missing_ok=True)
    picture = out.with_suffix(".png")
    plots.poison(poison, data, picture)
    last = poison.settings["history"][-1]
    print(
        f"{out}: {len(poison.index)} poisons for test images {list(attack.target_index)}; the surrogates' target loss "
        f"is {last['before']:.3f}, after {attack.unroll} steps on the poison {last['after']:.3f}; picture: {picture}",
        file=sys.stderr,
    )
    return poison
