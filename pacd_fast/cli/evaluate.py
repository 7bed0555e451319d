"""pacd-fast evaluate: accuracy, accuracy under noise, and how far an attack has to go."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pacd_fast.arguments import at_least, number, whole_number
from pacd_fast.cli.certify import add_checkpoint, checkpoint_for
from pacd_fast.cli.flags import add_choice, add_data, add_device, device_of, load_data
from pacd_fast.data import Dataset, random_subset
from pacd_fast.training import Evaluation, evaluate, evaluation_dict, evaluation_table


def add_commands(add: Any) -> None:
    sub = add("evaluate", run, "accuracy; where asked, accuracy under noise and how far an attack has to go")
    add_checkpoint(sub, nargs="+", help="one, or one per seed: mean and deviation")
    add_data(sub)
    sub.add_argument("--split", choices=["test", "train", "val"], default="test")
    sub.add_argument("--target-class", help="only images of this class, its name or number")
    sub.add_argument(
        "--noise-copies", type=whole_number, default=0, metavar="N",
        help="also the accuracy under noise, of so many noisy copies an image (100, say); 0 for none",
    )  # fmt: skip
    sub.add_argument(
        "--attack", type=whole_number, default=0, metavar="N",
        help="also the l2 distortion that PGD needs, of so many images (200, say), a random choice; 0 for none",
    )  # fmt: skip
    sub.add_argument("--sigma", type=number, help="noise of both; by default what the checkpoint was trained with")
    add_choice(sub, "seed of --attack's choice")
    sub.add_argument(
        "--copies", type=whole_number, help="noisy copies in the attack; by default 10 for cifar10, else 20"
    )
    sub.add_argument("--iterations", type=whole_number, default=100, help="steps of the attack at every radius")
    sub.add_argument("--seed", type=whole_number, default=0, help="of the noise")
    add_device(sub)
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> None:
    device, data = device_of(options.device), load_data(options)
    measured: list[Evaluation] = []
    try:
        for evaluation in _evaluations(options, device, data):
            measured.append(evaluation)
    finally:  # after Ctrl-C, what there is
        if measured:
            if len(measured) < len(options.checkpoint):
                done = " ".join(options.checkpoint[: len(measured)])
                print(f"\nstopped early: the figures are those of {done}", file=sys.stderr)
            if options.json:
                print(json.dumps(evaluation_dict(measured, data.class_names), indent=2))
            else:
                print(evaluation_table(measured, data.class_names))


def _evaluations(options: argparse.Namespace, device: torch.device, data: Dataset) -> Iterator[Evaluation]:
    """The figures of one checkpoint after the other; the accuracy is printed as soon as it is known."""
    at_least("--noise-copies", options.noise_copies, 0)
    at_least("--attack", options.attack, 0)
    images, labels = data.split(options.split)
    of_class = ""
    if options.target_class is not None:
        target = data.class_index(options.target_class)
        images, labels = images[labels == target], labels[labels == target]
        of_class = f" of class {data.class_names[target]}"
    attacked = None
    if options.attack:
        attacked = random_subset(labels, None, min(options.attack, len(labels)), options.choice)
    copies = (10 if data.name == "cifar10" else 20) if options.copies is None else options.copies
    for path in options.checkpoint:
        checkpoint = checkpoint_for(path, options, data)
        sigma = options.sigma if options.sigma is not None else checkpoint.sigma or None  # 0: trained without noise
        if sigma is None and (options.noise_copies or options.attack):
            raise ValueError(f"{path} does not say what noise it was trained with: give --sigma")

        def say(right: Tensor, path: str = path) -> None:
            count = f"{len(right)} {options.split} images{of_class}"
            print(
                f"{path}: accuracy {float(right.double().mean()):.2%} on {count}",
                file=sys.stderr if options.json else sys.stdout, flush=True,
            )  # fmt: skip

        yield evaluate(
            checkpoint.model.to(device),
            images,
            labels,
            sigma=sigma,
            noise_copies=options.noise_copies,
            attacked=attacked,
            copies=copies,
            iterations=options.iterations,
            seed=options.seed,
            progress=True,
            after_clean=say,
        )
