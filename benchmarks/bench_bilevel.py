"""Hypergradients beside other libraries': the poisoned network, ridge regression, unrolled steps, memory, bfloat16.

Each contender runs in processes of its own, with one thread, in turn; seconds are the processor's, the least
of all calls.  Memory is the peak of a call on the network above what the process had (VmHWM, cleared before).
Residuals are of all contenders' solutions under one product, the Hessian's or the Gauss-Newton matrix's.

torchopt, higher and hypergrad come with the extra `bench`.  betty-ml 0.1.1, the newest for Python 3.11, has metadata
that pip refuses from 24.1 on: an older pip installs it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bilevel_contenders as contenders
from benchmarks.bilevel_contenders import Problem
from benchmarks.report import record
from pacd_fast import bilevel
from pacd_fast.data import as_float, load_dataset
from pacd_fast.networks import build
from pacd_fast.training import Gaussian, fit

CLEAN, POISON, VALIDATION, SIGMA, TARGET = 400, 100, 100, 0.5, 8
PRODUCTS, RIDGE_PRODUCTS, STEPS = 10, 25, (2, 16)


def network_problem(weights: Path) -> Problem:
    """Clean images and poison with fixed noise below, clean validation images of the poisoned class above."""
    data = load_dataset("mnist5k", validation=1000)
    network = build("mnist-cnn", num_classes=10, in_channels=1, image_size=(28, 28))
    network = network.to(memory_format=torch.channels_last)
    network.load_state_dict(torch.load(weights))
    names = [name for name, _ in network.named_parameters()]
    of_class = data.y_train == TARGET
    clean, poison = as_float(data.x_train[~of_class][:CLEAN]), as_float(data.x_train[of_class][:POISON])
    y = torch.cat([data.y_train[~of_class][:CLEAN], torch.full((POISON,), TARGET)])
    x_val = as_float(data.x_val[data.y_val == TARGET][:VALIDATION])
    draw = torch.Generator().manual_seed(1)
    noise = SIGMA * torch.randn(CLEAN + POISON, 1, 28, 28, generator=draw)
    y_val = torch.full((len(x_val),), TARGET)

    def logits(inner: tuple[Tensor, ...], x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        result: Tensor = torch.func.functional_call(network, dict(zip(names, inner, strict=True)), (x,))
        return result

    def outputs(u: Tensor, inner: tuple[Tensor, ...]) -> Tensor:
        return logits(inner, torch.cat([clean, u]) + noise)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, y)

    return Problem(
        upper=lambda u, inner: F.cross_entropy(logits(inner, x_val), y_val),
        lower=lambda u, inner: loss(outputs(u, inner)),
        composite=bilevel.Composite(outputs, loss),
        outer=poison,
        inner=tuple(p.detach() for p in network.parameters()),
    )


def ridge_problem() -> tuple[Problem, Tensor]:
    """50 unknowns, a regulariser's weight each, float64; and the exact gradient, autograd's through the closed form."""
    draw = torch.Generator().manual_seed(0)
    x, x_val = (torch.randn(n, 50, generator=draw, dtype=torch.float64) for n in (200, 100))
    y, y_val = (torch.randn(n, generator=draw, dtype=torch.float64) for n in (200, 100))

    def loss(u: Tensor, z: tuple[Tensor, Tensor]) -> Tensor:
        return (z[0] - y).square().mean() + (u.exp() * z[1].square()).sum()

    def outputs(u: Tensor, inner: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return x @ inner[0], inner[0]

    def upper(u: Tensor, inner: tuple[Tensor, ...]) -> Tensor:
        return (x_val @ inner[0] - y_val).square().mean()

    outer = torch.full((50,), -1.0, dtype=torch.float64, requires_grad=True)
    w = torch.linalg.solve(x.T @ x / 200 + outer.exp().diag(), x.T @ y / 200)
    (exact,) = torch.autograd.grad(upper(outer, (w,)), outer)
    lower = bilevel.Composite(outputs, loss)
    return Problem(upper, lambda u, v: lower(u, v), lower, outer.detach(), (w.detach(),)), exact


def memory(name: str) -> float:
    """VmHWM or VmRSS of this process, MiB."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def peak(function: Callable[[], object]) -> float:
    """MiB above what the process had before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = memory("VmRSS")
    function()
    return memory("VmHWM") - before


def seconds(function: Callable[[], object], calls: int) -> float:
    took = []
    for _ in range(calls):
        start = time.process_time()
        function()
        took.append(time.process_time() - start)
    return min(took)


def residual(p: Problem, q: Tensor, curvature: str) -> float:
    """||C q - b|| / ||b||, by one step of Adam that stops at its start."""
    _, found, *_ = bilevel.hypergradient(
        p.upper, p.composite, p.outer, p.inner, solver="adam", curvature=curvature, steps=1, tolerance=1e9,
        warm_start=q, with_solution=True,
    )  # fmt: skip
    return found.residual


def measured(kind: str, name: str, amount: int, weights: Path) -> dict[str, float]:
    """In a process of its own: one contender on one problem."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    group = contenders.UNROLLING if kind == "unrolling" else contenders.IMPLICIT
    contender: Any = group[name]
    contenders.version(name)  # ImportError where it is not installed
    p, exact = ridge_problem()
    contender(p, 1)  # what libraries load at their first call is not counted
    if kind == "ridge":
        error = float((contender(p, amount).detach() - exact).norm() / exact.norm())
        return {"error": error, "seconds": seconds(lambda: contender(p, amount), 200)}
    p = network_problem(weights)
    if kind == "memory":
        contender(p, 2)  # the pages of code, and what stays
        return {"MiB": peak(lambda: contender(p, amount))}
    result = {} if kind == "network" else {"MiB": peak(lambda: contender(p, amount))}
    result["seconds"] = seconds(lambda: contender(p, amount), 2)
    if kind == "network":
        q = contenders.solution(contender, p, amount)
        result |= {each: residual(p, q, each) for each in bilevel.CURVATURES}
    return result


def contest(kind: str, names: list[str], amount: int, weights: Path, rounds: int = 2) -> dict[str, dict[str, Any]]:
    """Every contender in every round; the least of its seconds and memory, or why it did not run."""
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    # for memory alone, which it slows down: freed blocks go back at once, and are not counted
    freed = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = {**os.environ, **(freed if kind == "memory" else {})}
    for _ in range(rounds):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.bench_bilevel", "--one", kind, name, str(amount), str(weights)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
            if done.returncode:
                found[name] = {"why": done.stderr.strip().splitlines()[-1]}
                continue
            now = json.loads(done.stdout.splitlines()[-1])
            found[name] = {key: min(value, found[name].get(key, value)) for key, value in now.items()}
            print(f"{kind}, {name}: {found[name]}", flush=True)
    return found


def row(head: str, name: str, values: dict[str, Any], missing: str | None) -> dict[str, Any]:
    """A line of a table: a contender, its version, and the values, or why there are none."""
    group: dict[str, Callable[..., Any]] = {**contenders.IMPLICIT, **contenders.UNROLLING}
    told = "does not install: " + contenders.NOT_INSTALLED[name] if name in contenders.NOT_INSTALLED else missing
    return {
        head: name,
        "version": told or contenders.version(name),
        **{key: "-" if told else value for key, value in values.items()},
        "lines": contenders.lines(group[name]) if name in group else "-",
    }


def hypergradients(weights: Path) -> None:
    names = list(contenders.IMPLICIT)
    ridge = contest("ridge", names, RIDGE_PRODUCTS, weights, rounds=1)
    large = contest("network", names, PRODUCTS, weights, rounds=1)
    peaks = contest("memory", names, PRODUCTS, weights)
    rows = []
    for name in (*names, *contenders.NOT_INSTALLED):
        small, big = ridge.get(name, {}), large.get(name, {})
        values = {
            f"ridge, {RIDGE_PRODUCTS} products: error": small.get("error"),
            "ridge: ms": 1e3 * small.get("seconds", 0),
            f"network, {PRODUCTS} products: s": big.get("seconds"),
            "network: MiB": peaks.get(name, {}).get("MiB"),
            "residual, Hessian": big.get("hessian"),
            "residual, Gauss-Newton": big.get("gauss-newton"),
        }
        rows.append(row("hypergradients", name, values, small.get("why") or big.get("why")))
    record("bilevel hypergradients", rows)


def unrolled_steps(weights: Path) -> None:
    found = {steps: contest("unrolling", list(contenders.UNROLLING), steps, weights) for steps in STEPS}
    rows, whole = [], found[STEPS[-1]]
    for name in contenders.UNROLLING:
        values = {f"{steps} steps: s": each[name].get("seconds") for steps, each in found.items()}
        values[f"{STEPS[-1]} steps: MiB"] = whole[name].get("MiB")
        for unit in ("seconds", "MiB"):
            values[f"{unit} / plain torch's"] = whole[name].get(unit, 0) / whole["plain torch"][unit]
        rows.append(row("unrolled SGD", name, values, whole[name].get("why")))
    record("bilevel unrolled steps", rows)


TABLES = {"hypergradients": hypergradients, "unrolled": unrolled_steps}


def main(tables: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "network.pt"
        torch.manual_seed(0)
        network = build("mnist-cnn", num_classes=10, in_channels=1, image_size=(28, 28))
        data = load_dataset("mnist5k", validation=1000)
        torch.save(fit(network, data, Gaussian(SIGMA), epochs=4).state_dict(), weights)
        for table in tables:
            TABLES[table](weights)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=4, metavar=("KIND", "NAME", "AMOUNT", "WEIGHTS"), help="of the processes")
    parser.add_argument("tables", nargs="*", default=list(TABLES), help=f"of {', '.join(TABLES)}")
    options = parser.parse_args()
    if options.one:
        kind, name, amount, weights = options.one
        print(json.dumps(measured(kind, name, int(amount), Path(weights))))
    else:
        main(options.tables)
