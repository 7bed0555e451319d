"""Lattice noise beside noise in floats and beside thresholds: one thread, CPU time, in turn on the same inputs."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.report import record
from pacd_fast import ops
from pacd_fast.ops import reference

ROUNDS = 61
PEER = 20_000  # elements for the peers, which are slow


def in_turn(functions: dict[str, Callable[[int], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """CPU seconds of each function, round by round; a function gets the number of its round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(-2, rounds):
        for name, function in functions.items():
            start = time.process_time()
            function(max(i, 0))
            if i >= 0:
                times[name].append(time.process_time() - start)
    return times


def noise() -> list[dict[str, Any]]:
    rows = []
    for shape, copies, layout in (
        ((1, 28, 28), 1000, torch.contiguous_format),
        ((3, 32, 32), 256, torch.contiguous_format),
        ((3, 32, 32), 256, torch.channels_last),
    ):
        x = torch.randint(0, 256, (1, *shape)).div(255)
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(copies, *shape, dtype=dtype).contiguous(memory_format=layout)
            for sigma in (0.12, 0.25, 0.5, 1.0):
                times = in_turn(
                    {
                        "floats": lambda i, x=x, sigma=sigma, out=out, copies=copies: ops.noisy_copies(
                            x, sigma, copies, 1, first=i * copies, out=out
                        ),
                        "lattice": lambda i, x=x, sigma=sigma, out=out, copies=copies: ops.lattice_copies(
                            x, sigma, copies, 1, step=1 / 255, first=i * copies, out=out
                        ),
                    }
                )
                ratios = [ours / floats for floats, ours in zip(times["floats"], times["lattice"], strict=True)]
                name = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
                rows.append(
                    {
                        "images": f"{name} channels_last" if layout == torch.channels_last else name,
                        "sigma": sigma,
                        "floats, ns": min(times["floats"]) * 1e9 / out.numel(),
                        "lattice, ns": min(times["lattice"]) * 1e9 / out.numel(),
                        "lattice / floats": median(ratios),
                    }
                )
    return rows


def thresholds() -> list[dict[str, Any]]:
    """Voracek and Hein's sampler, as published (a comparison with every threshold) and with a binary search."""
    x = torch.randint(0, 256, (1, 784)).div(255)
    rows = []
    for sigma in (0.12, 0.25, 0.5, 1.0):
        table, copies = reference.threshold_table(sigma), PEER // 784 + 1
        times = in_turn(
            {
                "lattice": lambda i, sigma=sigma: ops.lattice_copies(x, sigma, 1000, 1, step=1 / 255, first=1000 * i),
                "search": lambda i, table=table, copies=copies: reference.threshold_copies(x, table, copies),
                "published": lambda i, table=table, copies=copies: reference.threshold_copies(
                    x, table, copies, one_by_one=True
                ),
            },
            rounds=5,
        )
        ours = median(times["lattice"]) * 1e9 / 784_000
        search, published = (median(times[name]) * 1e9 / (784 * copies) for name in ("search", "published"))
        rows.append(
            {
                "sigma": sigma,
                "thresholds": len(table),
                "lattice, ns": ours,
                "binary search, ns": search,
                "as published, ns": published,
                "times faster than the search": search / ours,
                "than as published": published / ours,
            }
        )
    return rows


def main() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    record("lattice noise", noise())
    record("lattice noise and thresholds", thresholds())
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
