"""Hypergradients of several ranks: two processes with half of the data each find what one with all of it finds."""

from __future__ import annotations

import datetime

import pytest
import torch
from torch import Tensor
from torchrun_agent import GLOO, Agent

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


@pytest.mark.skipif(not GLOO, reason="this torch has no gloo")
def test_two_ranks_find_what_one_process_finds(tmp_path):
    def function(rank: int) -> int:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
        torch.save(part(torch.distributed.group.WORLD, rank, 2), tmp_path / f"{rank}.pt")
        torch.distributed.destroy_process_group()
        return 0

    alone, agent = part(None), Agent(tmp_path, 2)
    agent.start(function)
    assert agent.ended() == [0, 0], agent.said()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, expected in alone.items():
        for first, second, whole in zip(ranks[0][name], ranks[1][name], expected, strict=True):
            assert torch.equal(first, second), name  # bit for bit: no rank may stop before another
            torch.testing.assert_close(first, whole, rtol=1e-9, atol=1e-12, msg=name)
    half = part(None, 0, 2)  # and the data matters
    assert not torch.allclose(half["hessian"][0], alone["hessian"][0], rtol=0.01)
