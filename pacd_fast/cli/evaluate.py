"""pacd-fast evaluate: accuracy, accuracy under noise, and how far an attack has to go."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from pacd_fast.arguments import number, whole_number
from pacd_fast.cli.certify import add_checkpoint, checkpoint_for
from pacd_fast.cli.flags import add_data, add_device, device_of, load_data
from pacd_fast.data import Dataset, as_float, random_subset
from pacd_fast.training import Evaluation, evaluate, evaluation_dict, evaluation_table


def add_commands(add: Any) -> None:
    sub = add("evaluate", run, "accuracy, accuracy under noise, and how far an attack has to go")
    add_checkpoint(sub, nargs="+", help="one, or one per seed: mean and deviation")
    add_data(sub)
    sub.add_argument("--split", choices=["test", "train", "val"], default="test")
    sub.add_argument("--sigma", type=number, help="noise level; by default what the checkpoint was trained with")
    sub.add_argument("--target-class", help="only images of this class, its name or number")
    sub.add_argument(
        "--count", type=whole_number, default=200, help="images for the attack, a random choice; 0 for none"
    )
    sub.add_argument("--choice", type=whole_number, default=0, help="seed of --count's choice")
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
    """The figures of one checkpoint after the other."""
    images, labels = data.split(options.split)
    if options.target_class is not None:
        chosen = labels == data.class_index(options.target_class)
        images, labels = images[chosen], labels[chosen]
    attacked = None
    if options.count:
        attacked = random_subset(labels, None, min(options.count, len(labels)), options.choice)
    copies = (10 if data.name == "cifar10" else 20) if options.copies is None else options.copies
    for path in options.checkpoint:
        checkpoint = checkpoint_for(path, options.model, data)
        sigma = options.sigma if options.sigma is not None else checkpoint.sigma or None  # 0: trained without noise
        if sigma is None:
            raise ValueError(f"{path} does not say what noise it was trained with: give --sigma")
        yield evaluate(
            checkpoint.model.to(device),
            as_float(images),
            labels,
            sigma=sigma,
            attacked=attacked,
            copies=copies,
            iterations=options.iterations,
            seed=options.seed,
            progress=True,
        )
