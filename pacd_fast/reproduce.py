"""Rows of the papers' tables as presets: each a chain of pacd-fast commands, resumable at every step, and its figures.

A preset is an entry of PRESETS: it adds its flags to a parser and, run, prints its row beside the paper's and writes it
into a results file (JSON).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from pacd_fast import flip_experiments, results, victims
from pacd_fast.losses import METHODS
from pacd_fast.results import mean_and_deviation

__all__ = ["PRESETS", "Preset", "add_commands", "add_row", "chain", "machine", "run"]

Main = Callable[[Sequence[str]], int]
"""The command line as a function, `pacd_fast.__main__.main`."""


@dataclass(frozen=True)
class Preset:
    """What it does in a line, its flags, and its run; run(options, main) returns an exit status."""

    text: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Main], int]


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Every preset as a subcommand of `reproduce`."""
    presets = parser.add_subparsers(dest="preset", required=True, metavar="preset")
    for name, preset in PRESETS.items():
        form = argparse.ArgumentDefaultsHelpFormatter
        sub = presets.add_parser(name, help=preset.text, description=preset.text, formatter_class=form)
        preset.add_arguments(sub)
        sub.add_argument(
            "--work", default="reproduced", help="folder for checkpoints and results files; made if missing"
        )
        sub.add_argument("--results", default="benchmarks/results.json", help="file that gets the row")


def run(options: argparse.Namespace, main: Main) -> int:
    """Runs the preset of a parsed command line."""
    where = Path(options.results)
    if not where.parent.is_dir():
        raise FileNotFoundError(f"{where}: the folder {where.parent} does not exist; create it or give --results")
    Path(options.work).mkdir(parents=True, exist_ok=True)
    return PRESETS[options.preset].run(options, main)


def chain(main: Main, command: Sequence[object], echo: bool = True) -> str:
    """Runs one pacd-fast command, after printing it as one would type it; stops the preset where it fails.

    Returns what the command printed; with echo it is printed too.
    """
    arguments = [str(part) for part in command]
    print(f"+ pacd-fast {shlex.join(arguments)}", file=sys.stderr, flush=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(arguments)
    if echo:
        print(printed.getvalue(), end="", flush=True)
    if status != 0:
        raise ValueError(f"the step `pacd-fast {arguments[0]}` did not finish; run the same command again to go on")
    return printed.getvalue()


def machine(device: str = "cpu") -> str:
    """The device in words: model, cores, threads in use."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    model, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def add_row(path: str | Path, table: str, key: Sequence[str], row: dict[str, Any], device: str = "cpu") -> None:
    """Puts a row into one table of a results file, in the place of the row with the same values under `key`.

    The file is that of benchmarks/: {table: {machine, torch, date, rows}}.  Raises ValueError where it is not.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        rows = content.get(table, {}).get("rows", [])
        rows = [other for other in rows if any(other.get(name) != row[name] for name in key)]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a results file of benchmarks ({error}); give another --results") from error
    rows = sorted([*rows, row], key=lambda each: [str(each.get(name)) for name in key])
    content[table] = {
        "machine": machine(device),
        "torch": torch.__version__,
        "date": str(date.today()),
        "rows": rows,
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# PACD, tables 2 to 4, clean data: (ACR, its deviation, ACA in per cent, its deviation) by method and sigma.
_CLEAN_MNIST = {
    ("gaussian", 0.25): (0.896, 0.01, 98.92, 0.32),
    ("gaussian", 0.5): (1.481, 0.02, 99.16, 0.34),
    ("gaussian", 0.75): (1.549, 0.11, 98.48, 0.35),
    ("macer", 0.25): (0.915, 0.01, 99.64, 0.21),
    ("macer", 0.5): (1.484, 0.11, 98.56, 0.41),
    ("macer", 0.75): (1.353, 0.13, 93.81, 2.08),
    ("smoothadv", 0.25): (0.896, 0.01, 99.16, 0.45),
    ("smoothadv", 0.5): (1.408, 0.05, 99.21, 0.25),
    ("smoothadv", 0.75): (1.262, 0.05, 95.68, 0.47),
}
_CLEAN_CIFAR10 = {
    ("gaussian", 0.25): (0.521, 0.05, 85.76, 3.31),
    ("gaussian", 0.5): (0.634, 0.04, 75.04, 1.65),
}


def _clean(data: str, target_class: int, name: str, paper: Mapping[tuple[str, float], tuple[float, ...]]) -> Preset:
    """Victims on clean data, certified on 500 test images of the target class (PACD, tables 2 to 4)."""

    def add_arguments(sub: argparse.ArgumentParser) -> None:
        methods = [method for method in METHODS if method != "standard"]
        sub.add_argument("--method", choices=methods, default="gaussian")
        sub.add_argument("--sigma", type=float, default=0.5)
        sub.add_argument("--seeds", type=int, default=3, help="victims, seeds 0 and up")
        sub.add_argument("--data", default=data, help=f"{data}, or the path of an .npz file")
        sub.add_argument("--data-dir", help="where the data lie, in torchvision's layout")
        sub.add_argument("--epochs", type=int, default=100)
        sub.add_argument("--n", type=int, default=100_000, help="estimation samples per image")
        sub.add_argument("--count", type=int, default=500, help="test images to certify")
        sub.add_argument("--train-dtype", choices=["float32", "bfloat16"], default="float32")
        sub.add_argument(
            "--dtype",
            choices=["float32", "bfloat16"],
            default="float32",
            help="the certificates are for the model in it",
        )
        sub.add_argument("--device", default="auto")

    def run_clean(options: argparse.Namespace, main: Main) -> int:
        if options.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, not {options.seeds}")
        if Path(options.data).stem != data:  # a file of another name would silently get other settings
            raise ValueError(f"--data must be {data}, or an .npz file that is called {data}.npz, not {options.data}")
        table = f"clean {name}"
        work, prefix = Path(options.work), f"{Path(options.data).stem}-{options.method}-{options.sigma:g}"
        source = ["--data", options.data, "--validation", 5000, "--device", options.device]
        source += ["--data-dir", options.data_dir] if options.data_dir else []
        files = []
        for seed in range(options.seeds):
            victim = victims.numbered(work / f"{prefix}.safetensors", seed)
            files.append(victim.with_suffix(".tsv"))
            recipe = ["--method", options.method, "--sigma", options.sigma, "--epochs", options.epochs, "--seed", seed]
            recipe += ["--dtype", options.train_dtype, "--resume", "--metrics", victim.with_suffix(".jsonl")]
            chain(main, ["train", *source, *recipe, "--out", victim])
            images = ["--target-class", target_class, "--count", options.count, "--choice", 0]
            smoothed = ["--n", options.n, "--dtype", options.dtype]
            chain(main, ["certify", *source, "--checkpoint", victim, *images, *smoothed, "--out", files[-1]])
        each = [results.summarize(results.read(file), [0.0], target_class) for file in files]
        radii, accuracies = [one.acr for one in each], [100 * one.aca for one in each]
        row = {
            "method": options.method,
            "sigma": options.sigma,
            "seeds": options.seeds,
            "ACR": mean_and_deviation(radii, ".3f"),
            "ACR, paper": "-",
            "ACA, %": mean_and_deviation(accuracies, ".2f"),
            "ACA, %, paper": "-",
            "as good": "-",
            "epochs": options.epochs,
            "trained in": options.train_dtype,
            "certified in": options.dtype,
            "images": options.count,
            "n": options.n,
            "machine": machine(),
            "date": str(date.today()),
        }
        if (theirs := paper.get((options.method, options.sigma))) is not None:
            acr, acr_deviation, aca, aca_deviation = theirs
            good = (
                statistics.fmean(radii) >= acr - acr_deviation and statistics.fmean(accuracies) >= aca - aca_deviation
            )
            row |= {
                "ACR, paper": f"{acr:.3f}±{acr_deviation:.2f}",
                "ACA, %, paper": f"{aca:.2f}±{aca_deviation:.2f}",
                "as good": "yes" if good else "no",
            }
        add_row(options.results, table, ["method", "sigma", "epochs", "n", "images"], row)
        print("\n".join(f"{key:14} {value}" for key, value in row.items()))
        return 0

    text = f"{name}, class {target_class}, no poison: train by one method, certify 500 test images (PACD, tables 2-4)"
    return Preset(text, add_arguments, run_clean)


def _flips(name: str, experiment: flip_experiments.Experiment) -> Preset:
    """Label-flip certificates (Rosenfeld et al. 2020, figures 1 to 4): a table, and a picture per certificate."""

    def add_arguments(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--data-dir", help="where the data lie, in torchvision's layout")
        sub.add_argument("--download", action="store_true", help="fetch the data into --data-dir where it is missing")
        sub.add_argument("--seed", type=int, default=0, help="of the features and of the attack's choice")

    def run_flips(options: argparse.Namespace, main: Main) -> int:
        where = {"data_dir": options.data_dir, "download": options.download}
        print(flip_experiments.reproduce(name, options.work, seed=options.seed, **where))
        return 0

    return Preset(f"label-flip certificates: {experiment.title}", add_arguments, run_flips)


PRESETS = {
    "clean-mnist": _clean("mnist", 8, "MNIST", _CLEAN_MNIST),
    "clean-cifar10": _clean("cifar10", 8, "CIFAR-10", _CLEAN_CIFAR10),
    **{name: _flips(name, experiment) for name, experiment in flip_experiments.EXPERIMENTS.items()},
}
