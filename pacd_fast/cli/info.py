"""pacd-fast info, selftest: what runs here, and whether it runs right."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import platform
import sys
from typing import Any

import torch

import pacd_fast
from pacd_fast._C import build_info
from pacd_fast.arguments import whole_number


def add_commands(add: Any) -> None:
    add("info", run_info, "versions, SIMD level, threads, CUDA")
    sub = add("selftest", run_selftest, "test the noise and the bounds on this machine")
    sub.add_argument("--draws", type=whole_number, default=20_000_000, help="normal numbers to draw")
    sub.add_argument("--stream", action="store_true", help="write the random bits to stdout, for a test battery")


def run_info(options: argparse.Namespace) -> None:
    built = build_info()
    print(f"pacd_fast     {pacd_fast.__version__}, built by {built['compiler']} with torch {built['built_with_torch']}")
    print(f"python        {platform.python_version()}, torch {torch.__version__}, {platform.platform()}")
    print(f"SIMD          {built['simd']}")
    print(f"threads       {torch.get_num_threads()}")
    compiled = f"compiled by {built['cuda_compiler']} for {built['cuda_architectures']}"
    print(f"CUDA library  {pacd_fast.ops.cuda_library} ({compiled})")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    print(f"CUDA device   {device}")


def run_selftest(options: argparse.Namespace) -> int:
    from pacd_fast.certification import selftest  # it needs scipy

    if options.stream:
        with contextlib.suppress(BrokenPipeError):
            selftest.write_bits(sys.stdout.buffer)
        return 0
    failed = 0
    for check in selftest.checks(options.draws):
        print("  ".join(str(value) for value in dataclasses.astuple(check)))
        failed += check.verdict != "ok"
    print(f"{'all is well' if not failed else f'{failed} checks failed'}")
    return 1 if failed else 0
