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
    for line in engine_lines():
        print(line)


def engine_lines() -> list[str]:
    """What `certify` will use here."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    from pacd_fast.certification.classifier import CHOICES, machine

    chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        compiler = f"where it pays, by {get_cpp_compiler()}" if chosen.type == "cpu" else "where it pays, by Triton"
    except Exception:  # whatever the search stumbles over
        compiler = "never: no C++ compiler was found"
    rows = ", ".join(map(str, CHOICES[chosen.type]))
    graph = "; noise, model and votes are one CUDA graph" if chosen.type == "cuda" else ""
    bfloat16 = "bfloat16 instructions" if _has_bfloat16(chosen) else "no bfloat16 instructions: --dtype float32"
    return [
        f"certify uses  {machine(chosen)}; {bfloat16}",
        f"              batches of {rows} rows, whichever is fastest{graph}; compiled {compiler}",
    ]


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


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
