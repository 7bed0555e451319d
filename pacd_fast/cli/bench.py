"""pacd-fast bench: how fast certification is with one's own checkpoint on one's own machine."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from pacd_fast.arguments import DTYPES, number, whole_number
from pacd_fast.certification import certification_times, sigma_of
from pacd_fast.cli.certify import add_checkpoint, checkpoint_for
from pacd_fast.cli.flags import add_data, add_device, device_of, load_data
from pacd_fast.tables import markdown


def add_commands(add: Any) -> None:
    sub = add("bench", run, "certification's speed with your checkpoint, beside the published loop")
    add_checkpoint(sub)
    add_data(sub)
    sub.add_argument("--sigma", type=number, help="noise level; by default what the checkpoint was trained with")
    sub.add_argument("--n", type=whole_number, default=20_000, help="samples of each timing")
    sub.add_argument("--rounds", type=whole_number, default=3, help="all contenders in turn, so often")
    sub.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of ours")
    add_device(sub)


def run(options: argparse.Namespace) -> None:
    device, data = device_of(options.device), load_data(options)
    checkpoint = checkpoint_for(options.checkpoint, options, data)
    rows = certification_times(
        checkpoint.model.to(device), data.x_test, num_classes=checkpoint.num_classes,
        sigma=sigma_of(options.sigma, checkpoint), n=options.n, dtype=getattr(torch, options.dtype),
        rounds=options.rounds,
    )  # fmt: skip
    print(markdown(rows))
