"""pacd-fast train: victims from scratch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pacd_fast.arguments import at_least, number, whole_number
from pacd_fast.cli.flags import add_data, add_device, add_fields, add_out, device_of, given, load_data
from pacd_fast.files import claimed
from pacd_fast.poisoning import Poison
from pacd_fast.ranks import Ranks
from pacd_fast.tables import mean_and_deviation
from pacd_fast.training import Training, correct, hyperparameters, numbered, train


def add_hyperparameters(sub: argparse.ArgumentParser, sigma: str) -> None:
    """A flag for every hyperparameter of every method; sigma: what it is by default, in words."""
    for name, (kind, where) in hyperparameters().items():
        default = f"; by default {sigma}" if name == "sigma" else ""
        kind_of = whole_number if kind is int else number
        sub.add_argument(f"--{name}", type=kind_of, help=f"hyperparameter of {where}{default}")


def hyperparameters_given(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in hyperparameters() if (value := getattr(options, name)) is not None}


def add_commands(add: Any) -> None:
    sub = add("train", run, "train a base classifier")
    add_data(sub)
    sub.add_argument("--poison", help="poison file to put into the training images")
    add_fields(sub, Training, skip=("hyperparameters",))
    add_hyperparameters(sub, sigma="0.5")
    sub.add_argument("--seed", type=whole_number, default=0, help="of initial weights, order and noise")
    sub.add_argument(
        "--seeds", type=whole_number, default=1,
        help="victims to train, seeds from --seed on; files are numbered; torchrun's processes share them, or of fewer "
        "than processes their batches",
    )  # fmt: skip
    add_device(sub)
    sub.add_argument("--resume", action="store_true", help="go on from the last epoch of an interrupted run")
    sub.add_argument("--metrics", help="write a JSON line per epoch to this file")
    add_out(sub, "checkpoint to write (.safetensors)")


def run(options: argparse.Namespace) -> None:
    at_least("--seeds", options.seeds, 1)
    seeds = range(options.seed, options.seed + options.seeds)
    outs = [options.out if len(seeds) == 1 else numbered(options.out, seed) for seed in seeds]
    ranks = Ranks.of_torchrun()
    resume = ranks.restarted() or options.resume
    with ExitStack() as held:  # all of them before any training; what --resume finds whole is looked at then
        for out in outs if ranks.rank == 0 else ():
            held.enter_context(claimed(out, force=options.force or resume, resume=resume))
        ranks.everyones("rank 0 has claimed them")
        _train(options, dict(zip(seeds, outs, strict=True)), resume, ranks)


def _train(options: argparse.Namespace, outs: Mapping[int, str | Path], resume: bool, ranks: Ranks) -> None:
    device, data = device_of(options.device), load_data(options)
    if options.poison is not None:
        data = Poison.load(options.poison).apply(data)
    settings = Training(hyperparameters=hyperparameters_given(options), **given(Training, options))
    right: dict[str, int] = {}
    tests = len(data.y_test)
    team, chosen = ranks.teams(len(outs))
    for seed, out in map(list(outs.items()).__getitem__, chosen):
        metrics = options.metrics
        if metrics is not None and len(outs) > 1:
            metrics = numbered(metrics, seed)
        network = train(
            out, data, settings, seed=seed, device=device, resume=resume, metrics=metrics, progress=ranks.rank == 0,
            group=team.group(),
        )  # fmt: skip
        if team.rank:
            continue
        right[str(out)] = int(correct(network, *data.split("test")).sum())
        if ranks.size == 1:
            print(f"{out}: accuracy without noise on {tests} test images {right[str(out)] / tests:.2%}")
    said = ranks.to_first(right)
    if ranks.size > 1 and said:
        right = {path: count for each in said for path, count in each.items()}
        for out in map(str, outs.values()):
            print(f"{out}: accuracy without noise on {tests} test images {right[out] / tests:.2%}")
    if options.seeds > 1 and said:
        shares = [right[str(out)] / tests for out in outs.values()]
        print(f"over {options.seeds} seeds: {mean_and_deviation(shares, '.2%')}")
