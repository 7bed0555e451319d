"""Hypergradients against closed forms and the implicit function theorem; linear solvers against a dense solve."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from pacd_fast import ops
from pacd_fast.bilevel import SOLVERS, Composite, SolverWarning, hypergradient, solve, unrolled


def matrix(n: int, eigenvalues: Tensor) -> Tensor:
    basis = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    return basis @ torch.diag(eigenvalues) @ basis.T


POSITIVE = matrix(12, torch.linspace(0.5, 3, 12, dtype=torch.float64))
INDEFINITE = matrix(12, torch.cat([torch.linspace(-2, -0.4, 5), torch.linspace(0.5, 3, 7)]).double())
B = torch.linspace(-1, 1, 12, dtype=torch.float64)
ENOUGH = {"adam": 4000, "cg": 30, "minres": 30, "neumann": 400, "nystrom": 30}


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
    assert found.products >= 2


@pytest.mark.parametrize("steps", [1, 3, 7, 12])
def test_minres_has_the_least_residual_of_the_krylov_space(steps):
    found = solve(lambda v: INDEFINITE @ v, B, solver="minres", steps=steps, tolerance=0.0)
    krylov = torch.stack([torch.linalg.matrix_power(INDEFINITE, k) @ B for k in range(steps)], dim=1)
    krylov = torch.linalg.qr(krylov).Q
    least = torch.linalg.lstsq(INDEFINITE @ krylov, B.unsqueeze(1)).solution
    best = float((INDEFINITE @ krylov @ least - B.unsqueeze(1)).norm() / B.norm())
    assert found.residual == pytest.approx(best, rel=1e-6, abs=1e-9)
    assert float((INDEFINITE @ found.q - B).norm() / B.norm()) == pytest.approx(best, rel=1e-6, abs=1e-9)


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


def test_the_preconditioner_of_a_matrix_without_full_rank_or_positive_curvature():
    low = matrix(12, torch.cat([torch.zeros(8), torch.tensor([1.0, 5.0, 20.0, 80.0])]).double())
    b = low @ B
    found = solve(lambda v: low @ v, b, solver="nystrom", rank=6, steps=30)
    assert found.residual < 1e-3
    torch.testing.assert_close(low @ found.q, b, rtol=1e-2, atol=1e-2)
    assert solve(lambda v: -(POSITIVE @ v), B, solver="nystrom", rank=4, steps=5).diverged


def test_a_parameter_that_is_not_used_has_no_part():
    x, y = torch.randn(8, 2, dtype=torch.float64), torch.randint(2, (8,))
    lower = Composite(lambda u, v: (x + u) @ v[0], lambda logits: torch.nn.functional.cross_entropy(logits, y))
    u, v = torch.zeros(2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    unused = torch.ones(3, dtype=torch.float64)
    with_it = hypergradient(lambda u, v: v[0].sum(), lower, u, (v, unused), damping=0.1, steps=30)
    without = hypergradient(lambda u, v: v[0].sum(), lower, u, (v,), damping=0.1, steps=30)
    torch.testing.assert_close(with_it, without)
    assert unrolled(lambda u, v: v[0].sum(), lower, u, (v, unused), steps=2, lr=0.1).gradient.shape == u.shape


def test_the_preconditioner_saves_steps():
    steep = matrix(12, torch.cat([torch.full((9,), 0.01), torch.tensor([5.0, 20.0, 80.0])]).double())
    plain = solve(lambda v: steep @ v, B, solver="cg", steps=2, tolerance=0.0, damping=0.01)
    better = solve(lambda v: steep @ v, B, solver="nystrom", steps=2, tolerance=0.0, damping=0.01, rank=4)
    assert better.residual < 0.02 * plain.residual and better.products == plain.products + 4


def test_a_right_hand_side_of_zero_costs_nothing():
    found = solve(lambda v: v, torch.zeros(3))
    assert torch.equal(found.q, torch.zeros(3)) and found.products == 0 and found.residual == 0


# A quadratic lower loss, 1/2 v'Av - v'Cu, has the minimiser A^-1 C u; with the upper loss 1/2 |v - t|^2 + w.u the
# hypergradient is w + C' A^-1 (v - t).
C = torch.randn(12, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
T = torch.linspace(0, 2, 12, dtype=torch.float64)
W = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
U = torch.tensor([0.3, -0.1, 0.7, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("solver", ["cg", "minres", "nystrom", "neumann"])
def test_exact_on_a_quadratic(solver):
    v = torch.linalg.solve(POSITIVE, C @ U)
    found = hypergradient(
        lambda u, v: 0.5 * (v - T).square().sum() + W.dot(u),
        lambda u, v: 0.5 * v.dot(POSITIVE @ v) - v.dot(C @ u),
        U,
        v,
        solver=solver,
        curvature="hessian",
        damping=0.0,
        steps=ENOUGH[solver],
        tolerance=1e-12,
    )
    exact = W + C.T @ torch.linalg.solve(POSITIVE, v - T)
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-9)


def test_tuples_of_tensors_and_a_dependence_that_is_not_there():
    v = torch.linalg.solve(POSITIVE, C @ U)
    (first, second), found, upper, lower = hypergradient(
        lambda u, v: 0.5 * (torch.cat([v[0], v[1].view(-1)]) - T).square().sum(),
        lambda u, v: (
            0.5 * (x := torch.cat([v[0], v[1].view(-1)])).dot(POSITIVE @ x) - x.dot(C @ torch.cat([u[0], U[2:]]))
        ),
        (U[:2].clone(), torch.ones(3, dtype=torch.float64)),
        (v[:6], v[6:].view(2, 3)),
        curvature="hessian",
        damping=0.0,
        steps=30,
        tolerance=1e-12,
        with_solution=True,
    )
    torch.testing.assert_close(first, (C.T @ torch.linalg.solve(POSITIVE, v - T))[:2], rtol=1e-8, atol=1e-9)
    assert torch.equal(second, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(upper, 0.5 * (v - T).square().sum())
    torch.testing.assert_close(lower, 0.5 * v.dot(POSITIVE @ v) - v.dot(C @ U))
    assert found.residual < 1e-11


def logistic() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    y = (x[:, 0] + 0.5 * torch.randn(30, generator=generator, dtype=torch.float64) > 0).double()
    val = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    return x, y, val, (val[:, 0] > 0).double(), torch.zeros(3, dtype=torch.float64)


def logistic_loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y) + 0.05 * w.square().sum()


def fitted(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    for _ in range(30):  # Newton
        g = torch.func.grad(logistic_loss, 1)(x, w, y)
        w = w - torch.linalg.solve(torch.func.hessian(logistic_loss, 1)(x, w, y), g)
    return w


@pytest.mark.parametrize("solver", ["cg", "minres", "adam", "nystrom"])
def test_logistic_regression_against_a_dense_hessian_and_retraining(solver):
    x, y, val, y_val, w = logistic()
    w = fitted(x, y, w)
    options = {"rank": 3} if solver == "nystrom" else {}
    found = hypergradient(
        lambda u, w: logistic_loss(val, w, y_val),
        lambda u, w: logistic_loss(u, w, y),
        x,
        w,
        solver=solver,
        curvature="hessian",
        damping=0.0,
        steps=ENOUGH[solver],
        tolerance=1e-10,
        **options,
    )
    hessian = torch.func.hessian(logistic_loss, 1)(x, w, y)
    q = torch.linalg.solve(hessian, torch.func.grad(logistic_loss, 1)(val, w, y_val))
    mixed = torch.func.jacrev(torch.func.grad(logistic_loss, 1), 0)(x, w, y)  # [3, 30, 3]
    atol = 1e-6 if solver == "adam" else 1e-9
    torch.testing.assert_close(found, -torch.einsum("k,knd->nd", q, mixed), rtol=1e-6, atol=atol)
    for place in ((0, 0), (7, 2)):  # and what retraining on moved data does
        moved = []
        for sign in (1, -1):
            there = x.clone()
            there[place] += sign * 1e-4
            moved.append(logistic_loss(val, fitted(there, y, w), y_val))
        assert float(found[place]) == pytest.approx(float(moved[0] - moved[1]) / 2e-4, rel=1e-4, abs=1e-8)


def test_gauss_newton_is_the_hessian_where_the_outputs_are_linear_and_psd_where_not():
    x, y, val, y_val, w = logistic()
    linear = Composite(
        lambda u, w: torch.cat([u @ w, w]),
        lambda z: torch.nn.functional.binary_cross_entropy_with_logits(z[:30], y) + 0.05 * z[30:].square().sum(),
    )
    both = [
        hypergradient(
            lambda u, w: logistic_loss(val, w, y_val),
            linear,
            x,
            w + 0.3,
            curvature=curvature,
            steps=20,
            tolerance=1e-12,
        )
        for curvature in ("hessian", "gauss-newton")
    ]
    torch.testing.assert_close(both[0], both[1], rtol=1e-8, atol=1e-10)
    # tanh bends downwards here: the Hessian has negative eigenvalues, the Gauss-Newton matrix none
    bent = Composite(lambda u, v: torch.tanh(u * v), lambda z: (z - 0.9).square().sum())
    u, v = torch.tensor([1.0, 1.0], dtype=torch.float64), torch.tensor([2.0, 3.0], dtype=torch.float64)
    assert bool((torch.func.hessian(lambda v: bent(u, v))(v).diagonal() < 0).any())
    slope = 1 - torch.tanh(u * v) ** 2
    found = hypergradient(lambda u, v: v.sum(), bent, u, v, damping=0.0, steps=5, tolerance=1e-12)
    mixed = torch.func.jacrev(torch.func.grad(lambda v, u: bent(u, v)), 1)(v, u)
    torch.testing.assert_close(found, -((1 / (2 * slope**2)) @ mixed), rtol=1e-8, atol=1e-9)


def test_every_product_sees_the_noise_of_the_seed():
    seen = []

    def lower(u, v, *, seed):
        seen.append(seed)
        noise = ops.noisy_copies(torch.zeros(1, 4), 1.0, 1, seed).view(4).double()
        return 0.5 * (v - u).square().sum() + v.dot(noise)

    def upper(u, v, *, seed):
        seen.append(seed)
        return v.square().sum()

    u, v = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    found = hypergradient(upper, lower, u, v, seed=7, curvature="hessian", damping=0.0)
    assert set(seen) == {7}
    torch.testing.assert_close(found, 2 * v)


def test_an_unsolved_system_warns():
    with pytest.warns(SolverWarning, match="did not solve the linear system: residual"):
        hypergradient(
            lambda u, v: v.sum(),
            lambda u, v: 50 * (v - u).square().sum(),
            torch.zeros(3),
            torch.ones(3),
            solver="neumann",
            curvature="hessian",
            lr=1.0,
            steps=8,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hypergradient(
            lambda u, v: v.sum(),
            lambda u, v: (v - u).square().sum(),
            torch.zeros(3),
            torch.ones(3),
            curvature="hessian",
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "lu"}, "unknown solver 'lu'"),
        ({"curvature": "fisher"}, "unknown curvature 'fisher'"),
        ({"curvature": "gauss-newton"}, "needs a lower loss that is a bilevel.Composite"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"damping": -1.0}, "damping must be finite"),
    ],
)
def test_bad_arguments(settings, message):
    arguments = {"curvature": "hessian", **settings}
    with pytest.raises(ValueError, match=message):
        hypergradient(
            lambda u, v: v.sum(), lambda u, v: (v - u).square().sum(), torch.zeros(3), torch.ones(3), **arguments
        )
