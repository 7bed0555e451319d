"""All benchmarks in turn: python -m benchmarks [name ...]; bench_solvers, bench_bilevel (half an hour) by name only."""

from __future__ import annotations

import importlib
import sys

NAMES = (
    "bench_ops",
    "bench_lattice",
    "bench_certify",
    "bench_labelflip",
    "bench_training",
    "bench_pacd",
    "bench_metapoison",
    "bench_sequential",
)

if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        importlib.import_module(f"benchmarks.{name.removesuffix('.py')}").main()
