"""Hypergradients of several ranks: two processes with half of the data each find what one with all of it finds."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pacd_fast.bilevel import Composite, WarmStart, hypergradient, implicit

DRAW = torch.Generator().manual_seed(9)
X, X_VAL = (torch.randn(n, 6, generator=DRAW, dtype=torch.float64) for n in (24, 12))
Y, Y_VAL = (torch.randn(n, generator=DRAW, dtype=torch.float64) for n in (24, 12))
LOG_L2 = torch.linspace(-2, 0, 6, dtype=torch.float64)  # a weight for every coefficient


def part(group, rank: int = 0, ranks: int = 1) -> dict[str, object]:
    """Everything that is compared, of a rank's part of the data."""
    here, there = (
        slice(rank * 24 // ranks, (rank + 1) * 24 // ranks),
        slice(rank * 12 // ranks, (rank + 1) * 12 // ranks),
    )
    x, y, x_val, y_val = X[here], Y[here], X_VAL[there], Y_VAL[there]
    w = torch.linalg.solve(X.T @ X / 24 + LOG_L2.exp().diag(), X.T @ Y / 24)
    lower = Composite(
        lambda u, w: (x @ (w * (1 + 0.1 * u)) - y, w),
        lambda u, z: z[0].square().mean() + (u.exp() * z[1].square()).sum(),
    )

    def upper(u: Tensor, w: Tensor) -> Tensor:
        return (x_val @ w - y_val).square().mean() + 0.1 * u.sum()

    result: dict[str, object] = {}
    for curvature in ("hessian", "gauss-newton"):
        gradient, solved, cost, training = hypergradient(
            upper, lower, LOG_L2, w, curvature=curvature, tolerance=1e-12, group=group, with_solution=True
        )
        result[curvature] = (gradient, solved.q, cost, training)
    log_l2, memory = LOG_L2.clone().requires_grad_(), WarmStart()
    answer = implicit(lower, log_l2, w, tolerance=1e-12, group=group, warm_start=memory)
    (x_val @ answer - y_val).square().mean().backward()
    assert memory.solved is not None
    result["implicit"] = (log_l2.grad, memory.solved.q)
    return result


GLOO = torch.distributed.is_available() and torch.distributed.is_gloo_available()


@pytest.mark.skipif(not GLOO, reason="this torch has no gloo")
def test_two_ranks_find_what_one_process_finds(tmp_path):
    alone = part(None)
    command, threads = [sys.executable, __file__, str(tmp_path)], torch.get_num_threads()
    torch.set_num_threads(1)
    other = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        first = rank_of_two(tmp_path, 0)
    finally:
        torch.set_num_threads(threads)
        said = other.communicate(timeout=120)[1]
    assert other.returncode == 0, said
    ranks = [first, torch.load(tmp_path / "1.pt")]
    for name, expected in alone.items():
        for first, second, whole in zip(ranks[0][name], ranks[1][name], expected, strict=True):
            assert torch.equal(first, second), name  # bit for bit: no rank may stop before another
            torch.testing.assert_close(first, whole, rtol=1e-9, atol=1e-12, msg=name)
    half = part(None, 0, 2)  # and the data matters
    assert not torch.allclose(half["hessian"][0], alone["hessian"][0], rtol=0.01)


def rank_of_two(folder: Path, rank: int) -> dict[str, object]:
    """`part` by one of two processes, which meet at a file of the folder; none waits longer than a minute."""
    minute = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=minute
    )
    try:
        return part(torch.distributed.group.WORLD, rank, 2)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(rank_of_two(Path(sys.argv[1]), 1), Path(sys.argv[1]) / "1.pt")
