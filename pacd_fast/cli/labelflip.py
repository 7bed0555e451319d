"""pacd-fast labelflip: certificates against flips of training labels."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pacd_fast.arguments import at_least, number, whole_number, writable
from pacd_fast.cli.flags import add_device, device_of
from pacd_fast.data import NAMES
from pacd_fast.labelflips import (
    CERTIFICATES,
    FEATURES,
    certify_data,
    flips_table,
    load_features,
    read_flips,
    scan,
)
from pacd_fast.tables import columns


def add_commands(add: Any) -> None:
    sub: argparse.ArgumentParser = add(
        "labelflip", run, "certify predictions against flips of training labels; run again, it resumes"
    )
    sub.add_argument(
        "--data",
        default="mnist17",
        help=f"mnist17, {', '.join(NAMES)}, or an .npz of images or of X_train, y_train, X_test, y_test",
    )
    sub.add_argument("--data-dir", help="folder of mnist and cifar10 in torchvision's layout")
    sub.add_argument("--download", action="store_true", help="fetch the data into --data-dir where it is missing")
    sub.add_argument(
        "--features",
        choices=FEATURES,
        help="by default network for mnist17, ica for other images; kmeans tells most apart, simclr wants a GPU",
    )
    sub.add_argument("--dim", type=whole_number, help="number of features; by default 50 (network), 30, 3200 (kmeans)")
    sub.add_argument("--epochs", type=whole_number, help="of network (by default 4) and simclr (200)")
    sub.add_argument("--save-features", metavar="FILE", help="keep the features as an .npz, for --data")
    sub.add_argument("--q", type=number, nargs="+", default=[0.1], help="label noise of the smoothing")
    sub.add_argument(
        "--l2",
        default="auto",
        help="ridge parameter: auto (reads no label; with many features try --freedom 5, or --scan), paper (computed "
        "from the labels, so conditional: holds against an attacker who leaves l2 as it is), or a number",
    )
    sub.add_argument(
        "--freedom", type=number, help="effective degrees of freedom that auto leaves; fewer: more flips, less accuracy"
    )
    sub.add_argument("--certificate", nargs="+", choices=CERTIFICATES, default=["exact"])
    sub.add_argument("--no-intercept", action="store_true", help="the paper's classifier: no constant feature")
    sub.add_argument(
        "--attack",
        type=whole_number,
        default=0,
        help="also attack so many test points: the smoothed classifier, and undefended logistic regression",
    )
    sub.add_argument("--max", type=whole_number, help="only the first so many test points; of --scan 1000 by default")
    sub.add_argument("--memory", type=whole_number, default=256, help="MiB for the influences worked on at once")
    sub.add_argument("--seed", type=whole_number, default=0, help="of the features and of the attack's choice")
    add_device(sub, "cpu")
    sub.add_argument(
        "--scan", action="store_true", help="print flips and accuracy over degrees of freedom, and write nothing"
    )
    sub.add_argument("--out", help="certificates to write (.tsv); summary and plot read them")


def run(options: argparse.Namespace) -> None:
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
        writable(path)
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
    curves = read_flips([options.out])
    print(flips_table(curves, form=columns))
    print(f"{options.out}: {sum(len(c.flips) for c in curves)} rows, {there} of them from before")
