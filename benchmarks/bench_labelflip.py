"""Label-flip certificates: the bound against NumPy and mpmath, whole test sets, torch's exponentials beside it.

Synthetic features of the sizes of MNIST 1/7 (13 007 labels, 2 163 test points) and MNIST (60 000 and 10 000).
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import mpmath
import numpy as np
import torch

from benchmarks.report import medians, record
from pacd_fast import _C, LabelFlipCertifier, ops

Q = 0.1


def problem(n: int, m: int, k: int, classes: int, spread: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gaussian classes: features [n, k], labels [n], test features [m, k]."""
    generator = torch.Generator().manual_seed(0)
    centres = spread * torch.randn(classes, k, generator=generator, dtype=torch.float64)
    y = torch.randint(0, classes, (n,), generator=generator)
    truth = torch.randint(0, classes, (m,), generator=generator)
    noise = torch.randn(n + m, k, generator=generator, dtype=torch.float64)
    return centres[y] + noise[:n], y, centres[truth] + noise[n:]


def numpy_newton(alpha: np.ndarray, y: np.ndarray, q: float) -> float:
    """The bound of one test point, by Newton's method from mean / variance, without safeguards.

    Sums, not BLAS dot products, whose threads cost more than they save on one row.
    """
    one, zero = np.where(y == 1, 1 - q, q), np.where(y == 1, q, 1 - q)
    squares = alpha * alpha
    t, move = ((alpha * one).sum() - 0.5) / (q * (1 - q) * squares.sum()), np.inf
    while abs(move) > 1e-5 * abs(t):
        e = one * np.exp(-t * alpha)
        w = e / (zero + e)
        move = (0.5 - (alpha * w).sum()) / (squares * (w * (1 - w))).sum()
        t -= move
    return t / 2 + float(np.log(zero + one * np.exp(-t * alpha)).sum())


def exponentials(alpha: np.ndarray, y: np.ndarray, q: float) -> int:
    """Exponentials a label in the operator's solver: one a Halley step (csrc/kernels/chernoff.h), one for the bound."""
    one = np.where(y == 1, 1 - q, q)

    def move(slope: float, bend: float, third: float) -> float:
        plain = -slope / bend
        halley = plain / (1 - 0.5 * plain * third / bend)
        return halley if halley * plain > 0 and abs(halley) < 2 * abs(plain) else plain

    t, steps = 0.0, 0
    while True:
        e = one * np.exp(-t * alpha)
        w = e / (1 - one + e)
        v = w * (1 - w)
        slope, bend, third = (alpha * w).sum() - 0.5, (alpha**2 * v).sum(), (alpha**3 * v * (1 - 2 * w)).sum()
        step = move(-slope, bend, third)
        t += step
        steps += 1  # the first, from t = 0, needs no exponential
        if steps > 1 and abs(step) <= 4e-3 * abs(t):
            return steps


def mpmath_newton(alpha: np.ndarray, y: np.ndarray, q: float, digits: int = 30) -> float:
    with mpmath.workdps(digits):
        a = [mpmath.mpf(float(v)) for v in alpha]
        one = [mpmath.mpf(1 - q) if label else mpmath.mpf(q) for label in y]
        t = (sum(v * p for v, p in zip(a, one, strict=True)) - 0.5) / (q * (1 - q) * sum(v * v for v in a))
        for _ in range(50):
            slope, bend = mpmath.mpf("-0.5"), mpmath.mpf(0)
            for v, p in zip(a, one, strict=True):
                e = p * mpmath.exp(-t * v)
                w = e / (1 - p + e)
                slope += v * w
                bend += v * v * w * (1 - w)
            move = -slope / bend
            t -= move
            if abs(move) <= 1e-5 * abs(t):
                break
        return float(t / 2 + sum(mpmath.log(1 - p + p * mpmath.exp(-t * v)) for v, p in zip(a, one, strict=True)))


def bound(device: str) -> list[dict[str, Any]]:
    x, y, test = problem(13_007, 2163, 50, 2, 0.35)
    alpha = LabelFlipCertifier(Q).fit(x, y).influences(test)
    rows, labels = alpha.numpy(), y.numpy()
    here, there = alpha.to(device), y.to(device)
    threads = torch.get_num_threads()
    together = medians({"ours": lambda: ops.chernoff_newton(here, there, Q)}, rounds=7)["ours"] / len(rows)
    torch.set_num_threads(1)  # as the peers
    few = rows[:20]
    times = medians(
        {
            "ours": lambda: ops.chernoff_newton(here, there, Q),
            "numpy": lambda: [numpy_newton(r, labels, Q) for r in few],
        },
        rounds=7,
    )
    start = time.perf_counter()
    mpmath_newton(rows[0], labels, Q)
    slow = time.perf_counter() - start
    passes = float(np.mean([exponentials(r, labels, Q) for r in few]))
    block = -torch.rand(4096, dtype=torch.float64, device=device)
    out = torch.empty_like(block)
    one_exp = medians({"exp": lambda: [torch.exp(block, out=out) for _ in range(100)]}, rounds=9)["exp"] / 100 / 4096
    torch.set_num_threads(threads)
    ours = times["ours"] / len(rows)
    exponential = 13_007 * passes * one_exp
    points = [
        (f"pacd_fast, {threads} threads" if device == "cpu" else "pacd_fast", together),
        ("NumPy Newton, vectorised", times["numpy"] / 20),
        ("mpmath Newton, 30 digits", slow),
    ]
    if device == "cpu":
        points.insert(1, ("pacd_fast, one thread", ours))
        points.append((f"torch.exp alone, {passes:.1f} times a label ({one_exp * 1e9:.2f} ns each)", exponential))
    return [
        {
            "one test point, 13 007 labels": name,
            "us": 1e6 * s,
            "ns a label": 1e9 * s / 13_007,
            "times ours": s / together,
        }
        for name, s in points
    ]


def test_sets(device: str) -> list[dict[str, Any]]:
    found = []
    x, y, test = problem(13_007, 2163, 50, 2, 0.35)
    certifier = LabelFlipCertifier(Q).fit(x.to(device), y.to(device))
    there = test.to(device)
    for what, names in (("exact", ("exact",)), ("all four certificates", ("kl", "exact", "whitebox", "ridge"))):
        seconds = medians({what: lambda names=names: certifier.certify_all(there, names)}, rounds=5)[what]
        found.append({"a whole test set": f"2 163 x 13 007, 2 classes: {what}", "s": seconds, "peak GiB": "-"})
    child = [sys.executable, "-m", "benchmarks.bench_labelflip", "ten", device]
    ten = json.loads(subprocess.run(child, capture_output=True, text=True, check=True).stdout)
    found.append(
        {"a whole test set": "10 000 x 60 000, 10 classes, 9 pairs each: exact", "s": ten[0], "peak GiB": ten[1]}
    )
    for classes in (2, 10):
        seconds = medians({"table": lambda classes=classes: _C.flip_table(Q, classes, 60_000)}, rounds=3)["table"]
        found.append(
            {"a whole test set": f"flip table, {classes} classes, r = 0..60 000", "s": seconds, "peak GiB": "-"}
        )
    return found


def ten_classes(device: str) -> tuple[float, float]:
    """Seconds and peak resident GiB of fit and certify, in a process of its own."""
    x, y, test = problem(60_000, 10_000, 30, 10, 0.5)
    start = time.perf_counter()
    LabelFlipCertifier(Q).fit(x.to(device), y.to(device)).certify(test.to(device))
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    for device in ("cpu", "cuda") if torch.cuda.is_available() and ops.cuda_library == "loaded" else ("cpu",):
        record("label flips", bound(device), device)
        record("label flips, test sets", test_sets(device), device)


if __name__ == "__main__":
    if sys.argv[1:2] == ["ten"]:
        print(json.dumps(ten_classes(sys.argv[2])))
    else:
        main()
