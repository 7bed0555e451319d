"""pacd-fast labelflip: certificates against flips of training labels."""

from __future__ import annotations

import argparse
import dataclasses
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
    write_flips,
)


def add_commands(add: Any) -> None:
    sub: argparse.ArgumentParser = add("labelflip", run, "certify predictions against flips of training labels")
    sub.add_argument(
        "--data",
        default="mnist17",
        help=f"mnist17, {', '.join(NAMES)}, or an .npz with X_train, y_train, X_test, y_test",
    )
    sub.add_argument("--data-dir", help="folder of mnist and cifar10 in torchvision's layout")
    sub.add_argument("--download", action="store_true", help="fetch the data into --data-dir where it is missing")
    sub.add_argument("--features", choices=FEATURES, help="by default network for mnist17, ica for other images")
    sub.add_argument(
        "--dim", type=whole_number, help="number of features, by default 50 for mnist17, 30 for other images"
    )
    sub.add_argument("--q", type=number, nargs="+", default=[0.1], help="label noise of the smoothing")
    sub.add_argument("--l2", default="auto", help="auto (reads no label), paper (conditional), or a number")
    sub.add_argument("--certificate", nargs="+", choices=CERTIFICATES, default=["exact"])
    sub.add_argument("--no-intercept", action="store_true", help="the paper's classifier: no constant feature")
    sub.add_argument(
        "--attack",
        type=whole_number,
        default=0,
        help="also attack so many test points: the smoothed classifier, and undefended logistic regression",
    )
    sub.add_argument("--max", type=whole_number, help="only the first so many test points")
    sub.add_argument("--memory", type=whole_number, default=256, help="MiB for the influences worked on at once")
    sub.add_argument("--seed", type=whole_number, default=0, help="of the features and of the attack's choice")
    add_device(sub, "cpu")
    sub.add_argument("--out", required=True, help="certificates to write (.tsv); summary and plot read them")


def run(options: argparse.Namespace) -> None:
    l2: str | float = options.l2
    if l2 not in ("auto", "paper"):
        try:
            l2 = float(options.l2)
        except ValueError:
            raise ValueError(f"--l2 must be auto, paper or a number, not {options.l2!r}") from None
    if options.max is not None:
        at_least("--max", options.max, 1)
    at_least("--attack", options.attack, 0)
    at_least("--memory", options.memory, 1)
    device = device_of(options.device)
    writable(options.out)
    data = load_features(
        options.data,
        options.features,
        options.dim,
        data_dir=options.data_dir,
        download=options.download,
        seed=options.seed,
    )
    if options.max is not None:
        data = dataclasses.replace(data, x_test=data.x_test[: options.max], y_test=data.y_test[: options.max])
    rows = certify_data(
        data,
        options.q,
        options.certificate,
        l2=l2,
        intercept=not options.no_intercept,
        attack=options.attack,
        seed=options.seed,
        memory_budget=options.memory * 2**20,
        device=str(device),
        progress=True,
    )
    write_flips(rows, options.out)
    print(flips_table(read_flips([options.out])))
    if l2 == "paper":
        print("conditional: l2 was chosen by the paper's rule, which reads the labels that an attacker may change")
