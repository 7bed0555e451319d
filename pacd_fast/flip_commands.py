"""The command labelflip, and what summary and plot do with its files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pacd_fast import datasets
from pacd_fast.arguments import at_least
from pacd_fast.flip_figures import draw
from pacd_fast.labelflips.certifier import CERTIFICATES
from pacd_fast.labelflips.curves import FLIPS, read, summary, table
from pacd_fast.labelflips.problems import FEATURES, certify_data, load_features, scan
from pacd_fast.presets import device_of
from pacd_fast.tables import columns


def add_commands(command: Any) -> None:
    """The command `labelflip`; command(name, run, text) gives a parser."""
    sub: argparse.ArgumentParser = command(
        "labelflip", run_labelflip, "certify predictions against flips of training labels; run again, it resumes"
    )
    sub.add_argument(
        "--data",
        default="mnist17",
        help=f"mnist17, {', '.join(datasets.NAMES)}, or an .npz of images or of X_train, y_train, X_test, y_test",
    )
    sub.add_argument("--data-dir", help="folder of mnist and cifar10 in torchvision's layout")
    sub.add_argument("--download", action="store_true", help="fetch the data into --data-dir where it is missing")
    sub.add_argument(
        "--features",
        choices=FEATURES,
        help="by default network for mnist17, ica for other images; kmeans tells most apart, simclr wants a GPU",
    )
    sub.add_argument("--dim", type=int, help="number of features; by default 50 (network), 30, 3200 (kmeans)")
    sub.add_argument("--epochs", type=int, help="of network (by default 4) and simclr (200)")
    sub.add_argument("--save-features", metavar="FILE", help="keep the features as an .npz, for --data")
    sub.add_argument("--q", type=float, nargs="+", default=[0.1], help="label noise of the smoothing")
    sub.add_argument("--l2", default="auto", help="auto (reads no label), paper (conditional), or a number")
    sub.add_argument(
        "--freedom", type=float, help="effective degrees of freedom that auto leaves; fewer: more flips, less accuracy"
    )
    sub.add_argument("--certificate", nargs="+", choices=CERTIFICATES, default=["exact"])
    sub.add_argument("--no-intercept", action="store_true", help="the paper's classifier: no constant feature")
    sub.add_argument(
        "--attack",
        type=int,
        default=0,
        help="also attack so many test points: the smoothed classifier, and undefended logistic regression",
    )
    sub.add_argument("--max", type=int, help="only the first so many test points; --scan takes 1000 by default")
    sub.add_argument("--memory", type=int, default=256, help="MiB for the influences that are worked on at once")
    sub.add_argument("--seed", type=int, default=0, help="of the features and of the attack's choice")
    sub.add_argument("--device", default="cpu")
    sub.add_argument(
        "--scan", action="store_true", help="print flips and accuracy over degrees of freedom, and write nothing"
    )
    sub.add_argument("--out", help="certificates to write (.tsv); summary and plot read them")


def run_labelflip(options: argparse.Namespace) -> None:
    l2: str | float = options.l2
    if l2 not in ("auto", "paper"):
        try:
            l2 = float(options.l2)
        except ValueError:
            raise ValueError(f"--l2 must be auto, paper or a number, not {options.l2!r}") from None
    for name, least in (("max", 1), ("attack", 0), ("memory", 1), ("dim", 1), ("epochs", 1), ("seed", 0)):
        if getattr(options, name) is not None:
            at_least(f"--{name}", getattr(options, name), least)
    if options.out is None and not options.scan:
        raise ValueError("say where to write the certificates: --out FILE.tsv (or --scan)")
    for path in filter(None, (options.out, options.save_features)):
        if not Path(path).parent.is_dir():
            raise FileNotFoundError(f"{path}: the folder {Path(path).parent} does not exist; create it first")
    if options.save_features is not None and Path(options.save_features).exists():
        raise ValueError(f"{options.save_features} exists already; give it to --data, or another name here")
    device = device_of(options.device)
    data = load_features(
        options.data,
        options.features,
        options.dim,
        data_dir=options.data_dir,
        download=options.download,
        seed=options.seed,
        epochs=options.epochs,
        device=device,
        progress=True,
    )
    if options.save_features is not None:
        data.save(options.save_features)
    intercept, memory = not options.no_intercept, options.memory * 2**20
    if options.scan:
        if l2 != "auto" or options.freedom is not None or len(options.q) + len(options.certificate) != 2:
            raise ValueError("--scan goes over degrees of freedom, for one --q and one --certificate")
        rows = scan(
            data,
            options.q[0],
            options.certificate[0],
            points=options.max or 1000,
            intercept=intercept,
            memory_budget=memory,
            device=device,
            progress=True,
        )
        print(columns(rows))
        print(
            "accuracy is measured with the labels: certificates for a freedom that was chosen by this table are "
            "conditional on the choice, unless the table was made with other data"
        )
        return
    there = certify_data(
        data,
        options.out,
        options.q,
        options.certificate,
        l2=l2,
        freedom=options.freedom,
        intercept=intercept,
        points=options.max,
        attack=options.attack,
        seed=options.seed,
        memory_budget=memory,
        device=device,
        progress=True,
    )
    curves = read([options.out])
    print(table(curves, form=columns))
    print(f"{options.out}: {sum(len(c.flips) for c in curves)} rows, {there} of them from before")


def summarize(paths: Sequence[str | Path], flips: Sequence[int] | None, as_json: bool) -> None:
    """Prints the table of files of certificates, or the same as JSON."""
    for count in flips or ():
        at_least("--flips", count, 0)
    if as_json:
        print(json.dumps(summary(paths, flips), indent=2))
    else:
        print(table(read(paths), flips or FLIPS, columns))


def plot(paths: Sequence[str | Path], out: str | Path, title: str | None) -> None:
    """The picture of files of certificates."""
    draw(read(paths), out, title)
