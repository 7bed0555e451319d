"""Linear solvers against dense solutions: singular and indefinite matrices, preconditioners, warm starts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pacd_fast.bilevel import SOLVERS, SolverWarning, WarmStart, hypergradient, solve


def matrix(n: int, eigenvalues: Tensor) -> Tensor:
    basis = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    return basis @ torch.diag(eigenvalues) @ basis.T


POSITIVE = matrix(12, torch.linspace(0.5, 3, 12, dtype=torch.float64))
INDEFINITE = matrix(12, torch.cat([torch.linspace(-2, -0.4, 5), torch.linspace(0.5, 3, 7)]).double())
GENERAL = POSITIVE + 0.8 * torch.triu(POSITIVE, 1)  # not symmetric
B = torch.linspace(-1, 1, 12, dtype=torch.float64)
TARGET = torch.arange(4, dtype=torch.float64)
ENOUGH = {"adam": 4000, "cg": 30, "gmres": 30, "minres": 30, "neumann": 400, "nystrom": 30}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("warm", [False, True])
def test_solvers_find_the_dense_solution(solver, warm):
    start = torch.full((12,), 0.3, dtype=torch.float64) if warm else None
    found = solve(
        lambda v: POSITIVE @ v, B, solver=solver, steps=ENOUGH[solver], tolerance=1e-11, damping=0.2, warm_start=start
    )
    exact = torch.linalg.solve(POSITIVE + 0.2 * torch.eye(12, dtype=torch.float64), B)
    torch.testing.assert_close(found.q, exact, rtol=0, atol=1e-4 if solver == "adam" else 1e-9)
    left = float(((POSITIVE + 0.2 * torch.eye(12, dtype=torch.float64)) @ found.q - B).norm() / B.norm())
    assert found.residual == pytest.approx(left, rel=1e-3, abs=1e-10) and not found.diverged
    assert found.converged or solver == "adam"  # whose steps have one length
    assert found.products >= 2


@pytest.mark.parametrize("solver", ["minres", "gmres"])
@pytest.mark.parametrize("steps", [1, 3, 7, 12])
def test_the_least_residual_of_the_krylov_space(solver, steps):
    a = GENERAL if solver == "gmres" else INDEFINITE
    found = solve(lambda v: a @ v, B, solver=solver, steps=steps, tolerance=0.0)
    krylov = torch.stack([torch.linalg.matrix_power(a, k) @ B for k in range(steps)], dim=1)
    krylov = torch.linalg.qr(krylov).Q
    least = torch.linalg.lstsq(a @ krylov, B.unsqueeze(1)).solution
    best = float((a @ krylov @ least - B.unsqueeze(1)).norm() / B.norm())
    assert found.residual == pytest.approx(best, rel=1e-6, abs=1e-9)
    assert float((a @ found.q - B).norm() / B.norm()) == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_conjugate_gradients_stop_at_negative_curvature_and_say_so():
    found = solve(lambda v: -(POSITIVE @ v), B, solver="cg", steps=5)
    assert torch.equal(found.q, torch.zeros_like(B)) and found.residual == 1.0 and found.products == 1
    assert found.diverged  # 0 is no answer
    broken = solve(lambda v: v * float("nan"), B, solver="cg", steps=5)
    assert broken.diverged and broken.residual == math.inf
    with pytest.warns(SolverWarning, match="did not solve"):
        hypergradient(lambda u, v: v.sum(), lambda u, v: -(v * v).sum() + (u * v).sum(), torch.ones(3, dtype=B.dtype),
                      torch.ones(3, dtype=B.dtype), solver="cg", curvature="hessian")  # fmt: skip
    wild = solve(lambda v: INDEFINITE @ v, B, solver="neumann", steps=60, lr=0.5)
    assert wild.diverged and wild.residual > 1


@pytest.mark.parametrize("solver", ["minres", "gmres"])
def test_products_that_are_not_finite(solver):
    found = solve(lambda v: v * float("nan"), B, solver=solver, steps=5)
    assert found.diverged and not found.converged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [4, 11])
def test_of_a_singular_system_minres_finds_the_pseudoinverse(dtype, rank):
    eigenvalues = torch.zeros(12, dtype=torch.float64)
    eigenvalues[:rank] = torch.linspace(-3, 2, rank, dtype=torch.float64)
    low = matrix(12, eigenvalues).to(dtype)
    accuracy = 1e-8 if dtype == torch.float64 else 1e-3
    inside = low @ B.to(dtype)  # there is a solution: the one of least norm, without a warning
    found = solve(lambda v: low @ v, inside)
    assert found.converged and not found.singular
    pseudo = torch.linalg.pinv(low, hermitian=True, rtol=1e-5)
    torch.testing.assert_close(found.q, pseudo @ inside, rtol=0, atol=accuracy)
    found = solve(lambda v: low @ v, B.to(dtype))  # there is none
    assert found.singular and not found.converged
    torch.testing.assert_close(found.q, pseudo @ B.to(dtype), rtol=0, atol=accuracy)
    assert found.residual == pytest.approx(float((low @ found.q - B.to(dtype)).norm() / B.norm()), rel=1e-3)


def test_a_singular_system_does_not_bias_the_hypergradient_and_is_warned_of():
    """Two equal features and no regulariser: the answer is not unique, the prediction is."""
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    doubled, y = torch.cat([x, x[:, :1]], dim=1), x.sum(1) + 0.1
    w = torch.linalg.lstsq(doubled, y.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    with pytest.warns(SolverWarning, match="singular to rounding, without a solution"):
        found = hypergradient(
            lambda y, w: (w - TARGET).square().sum(), lambda y, w: (doubled @ w - y).square().mean(), y, w
        )
    exact = torch.linalg.pinv(doubled).T @ (2 * (w - TARGET))
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


def test_the_residual_counts_rounding():
    """In float32 the recursion goes on below what the answer has."""
    steep = matrix(12, torch.logspace(-4, 0, 12, dtype=torch.float64)).float()
    for solver in ("cg", "minres", "gmres"):
        found = solve(lambda v: steep @ v, B.float(), solver=solver, steps=200, tolerance=1e-7)
        true = float((steep.double() @ found.q.double() - B).norm() / B.norm())
        assert found.residual > 0.1 * true > 1e-7, solver


def test_the_preconditioner_of_a_matrix_without_full_rank_or_positive_curvature():
    low = matrix(12, torch.cat([torch.zeros(8), torch.tensor([1.0, 5.0, 20.0, 80.0])]).double())
    b = low @ B
    found = solve(lambda v: low @ v, b, solver="nystrom", rank=6, steps=30)
    assert found.residual < 1e-3
    torch.testing.assert_close(low @ found.q, b, rtol=1e-2, atol=1e-2)
    assert solve(lambda v: -(POSITIVE @ v), B, solver="nystrom", rank=4, steps=5).diverged


def test_the_nystrom_preconditioner_saves_steps():
    steep = matrix(12, torch.cat([torch.full((9,), 0.01), torch.tensor([5.0, 20.0, 80.0])]).double())
    plain = solve(lambda v: steep @ v, B, solver="cg", steps=2, tolerance=0.0, damping=0.01)
    better = solve(lambda v: steep @ v, B, solver="nystrom", steps=2, tolerance=0.0, damping=0.01, rank=4)
    assert better.residual < 0.02 * plain.residual and better.products == plain.products + 4


@pytest.mark.parametrize("solver", ["minres", "cg", "gmres", "neumann"])
def test_a_users_preconditioner(solver):
    scales = torch.logspace(-3, 3, 12, dtype=torch.float64)
    a = scales.sqrt().diag() @ POSITIVE @ scales.sqrt().diag()
    exact = torch.linalg.solve(a, B)
    options = {"steps": 14 if solver != "neumann" else 400, "tolerance": 1e-11}
    plain = solve(lambda v: a @ v, B, solver=solver, **options)
    found = solve(lambda v: a @ v, B, solver=solver, preconditioner=lambda r: r / scales, **options)
    assert found.converged and not plain.converged
    torch.testing.assert_close(found.q, exact, rtol=1e-7, atol=1e-9)
    true = float((a @ found.q - B).norm() / B.norm())
    assert found.residual < 1e-11 and true < 1e-10


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_residual_of_preconditioned_minres_is_the_true_one(steps):
    scales = torch.logspace(-1, 1, 12, dtype=torch.float64)
    found = solve(lambda v: INDEFINITE @ v, B, steps=steps, tolerance=0.0, preconditioner=lambda r: r / scales)
    assert found.residual == pytest.approx(float((INDEFINITE @ found.q - B).norm() / B.norm()), rel=1e-9)


def test_a_users_solver():
    def dense(product, b):
        return torch.linalg.solve(torch.stack([product(e) for e in torch.eye(12, dtype=b.dtype)], dim=1), b)

    found = solve(lambda v: GENERAL @ v, B, solver=dense)
    torch.testing.assert_close(found.q, torch.linalg.solve(GENERAL, B))
    assert found.residual < 1e-14 and found.products == 12
    lazy = solve(lambda v: GENERAL @ v, B, solver=lambda product, b: 0.1 * b)  # what it leaves is measured
    assert lazy.residual == pytest.approx(float((GENERAL @ (0.1 * B) - B).norm() / B.norm()))


def test_warm_starts_save_products():
    memory = WarmStart()
    first = solve(lambda v: POSITIVE @ v, B, warm_start=memory, tolerance=1e-9)
    assert memory.solved is first
    again = solve(lambda v: POSITIVE @ v, 1.001 * B, warm_start=memory, tolerance=1e-4)
    cold = solve(lambda v: POSITIVE @ v, 1.001 * B, tolerance=1e-4)
    assert again.products < cold.products and again.converged
    with pytest.raises(ValueError, match=r"warm_start must have shape \(3,\), not \(12,\)"):
        solve(lambda v: v, torch.ones(3, dtype=B.dtype), warm_start=memory)
    memory.solved = None
    solve(lambda v: v * float("nan"), B, warm_start=memory)
    assert memory.solved is not None and memory.solved.diverged
    mended = solve(lambda v: POSITIVE @ v, B, warm_start=memory)  # it does not begin at what is not finite
    assert mended.converged


def test_a_right_hand_side_of_zero_costs_nothing():
    found = solve(lambda v: v, torch.zeros(3))
    assert torch.equal(found.q, torch.zeros(3)) and found.products == 0 and found.residual == 0 and found.converged


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "adam"])
@pytest.mark.parametrize("exponent", [-130, -90, 100])
def test_a_right_hand_side_whose_squares_vanish_or_overflow_is_solved(solver, exponent):
    """In float32; by a power of two, so the answer is the same but for its size."""
    a, b = POSITIVE.float(), B.float()
    usual = solve(lambda v: a @ v, b, solver=solver, steps=ENOUGH[solver])
    found = solve(lambda v: a @ v, b * 2.0**exponent, solver=solver, steps=ENOUGH[solver])
    torch.testing.assert_close(found.q.double() * 2.0**-exponent, usual.q.double(), rtol=1e-3, atol=1e-3)
    assert usual.converged and found.converged and found.residual == pytest.approx(usual.residual, abs=1e-3)


@pytest.mark.parametrize("solver", ["cg", "gmres", "minres"])
def test_a_start_that_is_far_worse_than_nothing_is_dropped(solver):
    """As the last answer is where the right-hand side has nearly vanished since."""
    cold = solve(lambda v: POSITIVE @ v, B, solver=solver, steps=2, tolerance=0.0)
    for start in (torch.full_like(B, 1e6), torch.full_like(B, math.inf)):
        found = solve(lambda v: POSITIVE @ v, B, solver=solver, steps=2, tolerance=0.0, warm_start=start)
        assert torch.equal(found.q, cold.q) and found.residual == cold.residual < 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "lu"}, "unknown solver 'lu': give adam, cg, gmres"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"damping": -1.0}, "damping must be finite"),
        ({"damping": torch.tensor(0.1)}, "damping is a number, not a tensor"),
        ({"tolerance": -1.0}, "tolerance must not be negative"),
        ({"solver": "adam", "preconditioner": lambda r: r}, "adam takes no preconditioner: give cg"),
        ({"preconditioner": lambda r: -r}, "preconditioner is not positive definite"),
        ({"rank": 3}, "minres: .*unexpected keyword argument 'rank'"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        solve(lambda v: POSITIVE @ v, B, **settings)
