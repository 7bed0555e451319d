"""Rows of the papers' tables as presets: each a chain of pacd-fast commands, resumable at every step, and its figures.

A preset is an entry of PRESETS: it adds its flags to a parser and, run, prints its row beside the paper's and writes it
into a results file (JSON).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path

from pacd_fast import flip_figures, metapoison_experiments, pacd_experiments, results, victims
from pacd_fast.labelflips.curves import cells
from pacd_fast.labelflips.curves import table as flips_table
from pacd_fast.losses import METHODS
from pacd_fast.presets import Help, Main, Preset, add_row, chain, device_of, machine
from pacd_fast.summary import mean_and_deviation, summarize

__all__ = ["PRESETS", "Preset", "add_commands", "add_row", "chain", "machine", "run"]


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Every preset as a subcommand of `reproduce`."""
    presets = parser.add_subparsers(dest="preset", required=True, metavar="preset")
    for name, preset in PRESETS.items():
        text = preset.text.replace("%", "%%")  # argparse's own sign
        sub = presets.add_parser(name, help=text, description=text, formatter_class=Help)
        preset.add_arguments(sub)
        sub.add_argument(
            "--work", default="reproduced", help="folder for checkpoints and results files; made if missing"
        )
        sub.add_argument(
            "--results",
            default=None,
            help="file that gets the rows, by default results.json in --work",
        )


def run(options: argparse.Namespace, main: Main) -> int:
    """Runs the preset of a parsed command line."""
    Path(options.work).mkdir(parents=True, exist_ok=True)
    options.results = options.results or Path(options.work) / "results.json"
    where = Path(options.results)
    if not where.parent.is_dir():
        raise FileNotFoundError(f"{where}: the folder {where.parent} does not exist; create it or give --results")
    if hasattr(options, "device"):
        options.device = str(device_of(options.device))
    return PRESETS[options.preset].run(options, main)


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
    ("macer", 0.25): (0.593, 0.05, 83.84, 2.26),
    ("macer", 0.5): (0.759, 0.11, 72.92, 5.06),
    ("smoothadv", 0.25): (0.504, 0.02, 78.76, 0.81),
    ("smoothadv", 0.5): (0.479, 0.07, 65.84, 4.81),
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
        tenth = "as in train; by default for the last tenth of the epochs; without numbers: never, as in the paper"
        sub.add_argument("--drops", type=int, nargs="*", default=None, help=tenth)
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
        if options.drops is None:
            options.drops = [options.epochs * 9 // 10] if options.epochs >= 10 else []
        table = f"clean {name}"
        work, prefix = Path(options.work), f"{Path(options.data).stem}-{options.method}-{options.sigma:g}"
        source = ["--data", options.data, "--validation", 5000, "--device", options.device]
        source += ["--data-dir", options.data_dir] if options.data_dir else []
        files = []
        for seed in range(options.seeds):
            victim = victims.numbered(work / f"{prefix}.safetensors", seed)
            files.append(victim.with_suffix(".tsv"))
            recipe = ["--method", options.method, "--sigma", options.sigma, "--epochs", options.epochs, "--seed", seed]
            recipe += ["--drops", *options.drops] if options.drops else []
            recipe += ["--dtype", options.train_dtype, "--resume", "--metrics", victim.with_suffix(".jsonl")]
            chain(main, ["train", *source, *recipe, "--out", victim])
            images = ["--target-class", target_class, "--count", options.count, "--choice", 0]
            smoothed = ["--n", options.n, "--dtype", options.dtype]
            chain(main, ["certify", *source, "--checkpoint", victim, *images, *smoothed, "--out", files[-1]])
        each = [summarize(results.exactly(file, options.count), [0.0], target_class) for file in files]
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
            "rate drops at": " ".join(map(str, options.drops)) or "-",
            "trained in": options.train_dtype,
            "certified in": options.dtype,
            "images": options.count,
            "n": options.n,
            "machine": machine(options.device),
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
        key = ["method", "sigma", "epochs", "rate drops at", "trained in", "certified in", "n", "images"]
        print("\n".join(f"{key:14} {value}" for key, value in row.items()))
        if not add_row(options.results, table, key, row, options.device, most="seeds"):
            print(f"{options.results} keeps its row, which has more victims", file=sys.stderr)
        return 0

    text = f"{name}, class {target_class}, no poison: train by one method, certify 500 test images (PACD, tables 2-4)"
    return Preset(text, add_arguments, run_clean)


def _flips(name: str, experiment: flip_figures.Experiment) -> Preset:
    """Label-flip certificates (Rosenfeld et al. 2020, figures 1 to 4): a table, and a picture per certificate."""

    def add_arguments(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--data-dir", help="where the data lie, in torchvision's layout")
        sub.add_argument("--download", action="store_true", help="fetch the data into --data-dir where it is missing")
        sub.add_argument("--data", help="or an .npz of the same images: x_train, y_train, x_test, y_test")
        sub.add_argument("--seed", type=int, default=0, help="of the features and of the attack's choice")

    def run_flips(options: argparse.Namespace, main: Main) -> int:
        where = {"data": options.data, "data_dir": options.data_dir, "download": options.download}
        curves = flip_figures.reproduce(name, options.work, seed=options.seed, progress=True, **where)
        print(flips_table(curves))
        here = {"seed": options.seed, "machine": machine(), "date": str(date.today())}
        for row in map(cells, curves):
            add_row(options.results, "label flips, figures", ["data", "certificate", "q", "seed"], {**row, **here})
        return 0

    return Preset(f"label-flip certificates: {experiment.title}", add_arguments, run_flips)


def _metapoison(name: str, experiment: metapoison_experiments.Experiment) -> Preset:
    """A figure of MetaPoison (Huang et al. 2020): a table and a picture."""

    def run_metapoison(options: argparse.Namespace, main: Main) -> int:
        report = metapoison_experiments.run(name, options)
        for row in report.rows:
            add_row(options.results, report.table, report.key, row, options.device)
        print(report.text)
        return 0

    return Preset(f"MetaPoison: {experiment.title}", metapoison_experiments.add_arguments, run_metapoison)


PRESETS = {
    "clean-mnist": _clean("mnist", 8, "MNIST", _CLEAN_MNIST),
    "clean-cifar10": _clean("cifar10", 8, "CIFAR-10", _CLEAN_CIFAR10),
    **pacd_experiments.PRESETS,
    **{name: _flips(name, experiment) for name, experiment in flip_figures.EXPERIMENTS.items()},
    **{name: _metapoison(name, experiment) for name, experiment in metapoison_experiments.EXPERIMENTS.items()},
}
