"""Hypergradients against closed forms, dense Hessians and retraining; what the defaults promise; what is refused."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pacd_fast import ops
from pacd_fast.bilevel import Composite, FixedPoint, Root, SolverWarning, hypergradient, unrolled
from pacd_fast.bilevel.conditions import linearised
from pacd_fast.bilevel.trees import Arguments

CONVERGING = {"cg": 60, "gmres": 60, "minres": 60, "neumann": 2500, "nystrom": 60}
"""Steps.  Adam's have one length: it comes near, and is not among them."""


# Ridge regression has its answer on paper, and the gradient of the answer is autograd's through that: outer are the
# targets, the logarithm of the regulariser's weight, and weights of the examples.
class Ridge:
    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(2)
        self.x, self.x_val = (torch.randn(n, 8, generator=draw, dtype=torch.float64) for n in (25, 15))
        self.y_val = torch.randn(15, generator=draw, dtype=torch.float64)
        self.outer = {
            "y": torch.randn(25, generator=draw, dtype=torch.float64),
            "log_l2": torch.tensor(-1.0, dtype=torch.float64),
            "examples": torch.rand(25, generator=draw, dtype=torch.float64) + 0.5,
        }
        self.composite = Composite(lambda u, w: (self.x @ w, w), self.loss)

    def loss(self, u: dict[str, Tensor], outputs: tuple[Tensor, Tensor]) -> Tensor:
        prediction, w = outputs
        return (u["examples"] * (prediction - u["y"]).square()).mean() + u["log_l2"].exp() * w.square().sum()

    def plain(self, u: dict[str, Tensor], w: Tensor) -> Tensor:
        return self.loss(u, (self.x @ w, w))

    def upper(self, u: dict[str, Tensor], w: Tensor) -> Tensor:
        return (self.x_val @ w - self.y_val).square().mean() + 0.1 * u["y"].square().sum()

    def fitted(self, u: dict[str, Tensor]) -> Tensor:
        weighted = self.x.T * u["examples"] / 25
        hessian = weighted @ self.x + u["log_l2"].exp() * torch.eye(8, dtype=torch.float64)
        return torch.linalg.solve(hessian, weighted @ u["y"])

    def exact(self) -> dict[str, Tensor]:
        u = {name: each.clone().requires_grad_() for name, each in self.outer.items()}
        found = torch.autograd.grad(self.upper(u, self.fitted(u)), list(u.values()))
        return dict(zip(u, found, strict=True))


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("solver", CONVERGING)
def test_ridge_regression_against_its_closed_form(solver, curvature):
    ridge = Ridge()
    found = hypergradient(
        ridge.upper, ridge.composite, ridge.outer, ridge.fitted(ridge.outer), solver=solver, curvature=curvature,
        steps=CONVERGING[solver], tolerance=1e-11, **({"rank": 4} if solver == "nystrom" else {}),
    )  # fmt: skip
    for name, exact in ridge.exact().items():
        assert float((found[name] - exact).abs().max()) <= 1e-8, name


@pytest.mark.parametrize("lower", ["plain", "composite"])
def test_the_defaults_do_not_bias(lower):
    ridge = Ridge()
    arguments = (ridge.upper, getattr(ridge, lower), ridge.outer, ridge.fitted(ridge.outer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, solved, *_ = hypergradient(*arguments, with_solution=True)
    assert solved.residual <= 1.5e-8
    for name, exact in ridge.exact().items():
        assert float((found[name] - exact).norm() / exact.norm()) <= 1e-6, name
    with pytest.warns(SolverWarning, match=r"minres did not solve .*: residual 0\.\d+, not 1.49e-08, after 2 products"):
        _, early, *_ = hypergradient(*arguments, steps=2, with_solution=True)
    hessian = torch.func.hessian(ridge.plain, 1)(ridge.outer, arguments[3])
    b = torch.func.grad(ridge.upper, 1)(ridge.outer, arguments[3])
    assert early.residual == pytest.approx(float((hessian @ early.q - b).norm() / b.norm()), rel=1e-9)
    with warnings.catch_warnings():  # who asks for all the steps, or for so much, gets what was asked for
        warnings.simplefilter("error")
        hypergradient(*arguments, steps=2, tolerance=0.0)
        hypergradient(*arguments, steps=2, tolerance=early.residual * 1.01)


def test_the_default_curvature_of_a_composite_is_gauss_newton():
    bent = Composite(lambda u, v: torch.tanh(u * v), lambda z: (z - 0.9).square().sum())
    u, v = torch.tensor([1.0, 1.0], dtype=torch.float64), torch.tensor([2.0, 3.0], dtype=torch.float64)
    both = {c: hypergradient(lambda u, v: v.sum(), bent, u, v, curvature=c) for c in (None, "hessian", "gauss-newton")}
    torch.testing.assert_close(both[None], both["gauss-newton"], rtol=0, atol=0)
    assert not torch.allclose(both[None], both["hessian"], rtol=0.1)


def test_a_regulariser_left_to_damping_is_refused():
    ridge = Ridge()
    w = ridge.fitted(ridge.outer)
    l2 = float(ridge.outer["log_l2"].exp())
    for lower in (
        lambda u, w: (ridge.x @ w - u["y"]).square().mean(),
        Composite(lambda u, w: ridge.x @ w, lambda u, z: (z - u["y"]).square().mean()),
        Composite(lambda u, w: ridge.x @ w - u["y"], lambda z: z.square().mean()),
    ):
        with pytest.raises(ValueError, match="tensor 1 of outer has no part in lower, and damping .* write the regul"):
            hypergradient(ridge.upper, lower, {k: ridge.outer[k] for k in ("y", "log_l2")}, w, damping=2 * l2)
    with pytest.raises(ValueError, match="damping is a number, not a tensor"):
        hypergradient(ridge.upper, ridge.plain, ridge.outer, w, damping=ridge.outer["log_l2"].exp())
    with pytest.raises(
        ValueError, match="lower does not depend on outer: it must use the outer that it is called with"
    ):
        hypergradient(lambda u, w: w.sum(), lambda u, w: ridge.plain(ridge.outer, w), ridge.outer["y"], w)


def logistic() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    y = (x[:, 0] + 0.5 * torch.randn(30, generator=generator, dtype=torch.float64) > 0).double()
    val = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    return x, y, val, (val[:, 0] > 0).double(), torch.zeros(3, dtype=torch.float64)


def logistic_loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x @ w, y) + 0.05 * w.square().sum()


def fitted(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    for _ in range(30):  # Newton
        g = torch.func.grad(logistic_loss, 1)(x, w, y)
        w = w - torch.linalg.solve(torch.func.hessian(logistic_loss, 1)(x, w, y), g)
    return w


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("solver", [*CONVERGING, "adam"])
def test_logistic_regression_against_a_dense_hessian_and_retraining(solver, curvature):
    x, y, val, y_val, w = logistic()
    w = fitted(x, y, w)
    lower = Composite(
        lambda u, w: {"logits": u @ w, "w": w},
        lambda z: F.binary_cross_entropy_with_logits(z["logits"], y) + 0.05 * z["w"].square().sum(),
    )
    found = hypergradient(
        lambda u, w: logistic_loss(val, w, y_val), lower, x, w, solver=solver, curvature=curvature,
        steps=4000 if solver == "adam" else CONVERGING[solver], tolerance=1e-10,
        **({"rank": 3} if solver == "nystrom" else {}),
    )  # fmt: skip
    hessian = torch.func.hessian(logistic_loss, 1)(x, w, y)
    q = torch.linalg.solve(hessian, torch.func.grad(logistic_loss, 1)(val, w, y_val))
    mixed = torch.func.jacrev(torch.func.grad(logistic_loss, 1), 0)(x, w, y)  # [3, 30, 3]
    exact = -torch.einsum("k,knd->nd", q, mixed)
    assert float((found - exact).abs().max()) <= (1e-6 if solver == "adam" else 1e-8)
    for place in ((0, 0), (7, 2)):  # and what retraining on moved data does
        moved = []
        for sign in (1, -1):
            there = x.clone()
            there[place] += sign * 1e-4
            moved.append(logistic_loss(val, fitted(there, y, w), y_val))
        assert float(found[place]) == pytest.approx(float(moved[0] - moved[1]) / 2e-4, rel=1e-4, abs=1e-8)


def test_gauss_newton_where_one_output_is_made_of_another():
    """Linear outputs, so that both curvatures are one matrix; each output counts once."""
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def outputs(u: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        z = x @ w + u
        return w, z, z.cumsum(0)

    lower = Composite(outputs, lambda o: (o[0] ** 4).sum() + o[1].exp().sum() + o[1].dot(o[2] ** 2))
    u, w = x[:, 0] * 0.1, torch.tensor([0.3, -0.2, 0.4], dtype=torch.float64)
    both = [hypergradient(lambda u, w: w.sum(), lower, u, w, curvature=c) for c in ("hessian", "gauss-newton")]
    torch.testing.assert_close(*both, rtol=1e-6, atol=1e-9)


def test_gauss_newton_leaves_out_the_outputs_curvature():
    """tanh bends downwards here: the Hessian has negative eigenvalues, the Gauss-Newton matrix none."""
    bent = Composite(lambda u, v: torch.tanh(u * v), lambda z: (z - 0.9).square().sum())
    u, v = torch.tensor([1.0, 1.0], dtype=torch.float64), torch.tensor([2.0, 3.0], dtype=torch.float64)
    assert bool((torch.func.hessian(lambda v: bent(u, v))(v).diagonal() < 0).any())
    slope = 1 - torch.tanh(u * v) ** 2
    found = hypergradient(lambda u, v: v.sum(), bent, u, v, steps=5, tolerance=1e-12)
    mixed = torch.func.jacrev(torch.func.grad(lambda v, u: bent(u, v)), 1)(v, u)
    torch.testing.assert_close(found, -((1 / (2 * slope**2)) @ mixed), rtol=1e-8, atol=1e-9)


NORMS = {
    "batch": nn.BatchNorm1d(4),
    "layer": nn.LayerNorm(4),
    "instance": nn.Sequential(nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2), nn.Flatten()),
    "group": nn.GroupNorm(2, 4),
}


@pytest.mark.parametrize("norm", NORMS)
def test_the_mixed_derivative_through_a_norm(norm):
    """It has nothing to do with the curvature; torch's derivative of the tangent of such a norm is wrong."""
    draw = torch.Generator().manual_seed(4)
    layers = [nn.Linear(5, 4), NORMS[norm], nn.Tanh(), nn.Linear(4, 3)]
    network, u = nn.Sequential(*layers).double().train(), torch.randn(6, 5, generator=draw, dtype=torch.float64)
    lower = Composite(lambda u, network: network(u), lambda z: F.cross_entropy(z, torch.arange(6) % 3))
    v = [p.detach().requires_grad_() for p in network.parameters()]
    q = torch.randn(sum(p.numel() for p in v), generator=draw, dtype=torch.float64)
    found, expected = (
        linearised(lower, Arguments(u, network), [u.clone().requires_grad_()], v, curvature).mixed(q)[0]
        for curvature in ("gauss-newton", "hessian")
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_tuples_of_tensors_and_a_dependence_that_is_not_there():
    ridge = Ridge()
    w = ridge.fitted(ridge.outer)
    (first, second), found, upper, lower = hypergradient(
        lambda u, v: ridge.upper({"y": u[0]}, torch.cat([v[0], v[1].view(-1)])),
        lambda u, v: ridge.plain({**ridge.outer, "y": u[0]}, torch.cat([v[0], v[1].view(-1)])),
        (ridge.outer["y"], torch.ones(3, dtype=torch.float64)),
        [w[:2], w[2:].view(2, 3)],
        tolerance=1e-12,
        with_solution=True,
    )
    torch.testing.assert_close(first, ridge.exact()["y"], rtol=1e-8, atol=1e-9)
    assert torch.equal(second, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(upper, ridge.upper(ridge.outer, w))
    torch.testing.assert_close(lower, ridge.plain(ridge.outer, w))
    assert found.residual < 1e-11


def test_a_parameter_that_is_not_used_has_no_part():
    x, y = torch.randn(8, 2, dtype=torch.float64), torch.randint(2, (8,))
    lower = Composite(lambda u, v: (x + u) @ v[0], lambda logits: F.cross_entropy(logits, y))
    u, v = torch.zeros(2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    unused = torch.ones(3, dtype=torch.float64)
    with_it = hypergradient(lambda u, v: v[0].sum(), lower, u, (v, unused), damping=0.1, steps=30)
    without = hypergradient(lambda u, v: v[0].sum(), lower, u, (v,), damping=0.1, steps=30)
    torch.testing.assert_close(with_it, without)
    assert unrolled(lambda u, v: v[0].sum(), lower, u, (v, unused), steps=2, lr=0.1).gradient.shape == u.shape


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
    found = hypergradient(upper, lower, u, v, seed=7)
    assert set(seen) == {7}
    torch.testing.assert_close(found, 2 * v)


def minibatches(ridge: Ridge, batch: int) -> Any:
    """Lower losses on random parts of the data, without end."""
    draw = torch.Generator().manual_seed(4)
    while True:
        here = torch.randint(25, (batch,), generator=draw)

        def loss(u, w, here=here):
            error = u["examples"][here] * (ridge.x[here] @ w - u["y"][here]).square()
            return error.mean() + u["log_l2"].exp() * w.square().sum()

        yield loss


def test_a_fresh_minibatch_for_every_product():
    ridge = Ridge()
    w, exact = ridge.fitted(ridge.outer), ridge.exact()["y"]
    seen = []

    def counted():
        for each in minibatches(ridge, 25):
            seen.append(each)
            yield each

    def mean_of(runs: int) -> Tensor:
        parts = []
        for _ in range(runs):
            parts.append(hypergradient(ridge.upper, stream, ridge.outer, w, steps=60, lr=0.2, tolerance=0.0)["y"])
        return torch.stack(parts).mean(0)

    stream = counted()
    one = mean_of(1)
    assert len(seen) == 60 + 1 + 1  # products, the last one for the residual, the mixed derivative
    error = float((one - exact).norm() / exact.norm())
    assert error > 0.05  # it is noise,
    assert float((mean_of(60) - exact).norm() / exact.norm()) < 0.35 * error  # and has the right mean
    whole = hypergradient(
        ridge.upper, itertools.repeat(ridge.plain), ridge.outer, w, steps=2500, tolerance=1e-10, lr=0.2
    )
    torch.testing.assert_close(whole["y"], exact, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="minres needs the same matrix at every product"):
        hypergradient(ridge.upper, minibatches(ridge, 5), ridge.outer, w, solver="minres")
    with pytest.raises(ValueError, match="lower ran out of losses after 3: each product takes one"):
        hypergradient(ridge.upper, [ridge.plain] * 3, ridge.outer, w, lr=0.2)


def test_an_unsolved_system_warns():
    with pytest.warns(SolverWarning, match="neumann did not solve the linear system: residual"):
        hypergradient(
            lambda u, v: v.sum(),
            lambda u, v: 50 * (v - u).square().sum(),
            torch.zeros(3),
            torch.ones(3),
            solver="neumann",
            lr=1.0,
            steps=8,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hypergradient(lambda u, v: v.sum(), lambda u, v: (v - u).square().sum(), torch.zeros(3), torch.ones(3))


def test_bfloat16_products_accumulate_in_float32():
    """A mean over 4096 examples, whose sum bfloat16 could not hold to 1 %: the answer is as good as one product's
    dtype, the residual is of full precision, and the vectors stay float32."""
    draw = torch.Generator().manual_seed(6)
    x, y = torch.randn(4096, 20, generator=draw), torch.randn(4096, generator=draw)
    w = torch.linalg.solve(x.T @ x / 4096 + 0.1 * torch.eye(20), x.T @ y / 4096)

    def loss(y: Tensor, z: tuple[Tensor, Tensor]) -> Tensor:
        assert z[0].dtype == torch.float32  # the network's part alone is in low precision
        return (z[0] - y).square().mean() + 0.1 * z[1].square().sum()

    lower = Composite(lambda y, w: (F.linear(x, w.unsqueeze(0)).squeeze(1), w), loss)
    plain = Composite(lower.outputs, lambda y, z: loss(y, (z[0].float(), z[1])))
    for curvature, problem in (("hessian", plain), ("gauss-newton", lower)):
        answers = {}
        for dtype in (None, torch.bfloat16):
            answers[dtype] = hypergradient(
                lambda y, w: w.sum(), problem, y, w, curvature=curvature, dtype=dtype, tolerance=1e-2, steps=30,
                with_solution=True,
            )[:2]  # fmt: skip
        full, low = answers[None][1], answers[torch.bfloat16][1]
        assert low.q.dtype == torch.float32 and not torch.equal(low.q, full.q)
        assert low.residual < 2e-2 and low.products == full.products + 1
        b = torch.ones(20)
        hessian = 2 * (x.T @ x / 4096 + 0.1 * torch.eye(20))
        assert low.residual == pytest.approx(float((hessian @ low.q - b).norm() / b.norm()), rel=1e-3)
        gradients = answers[torch.bfloat16][0], answers[None][0]
        assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 2e-2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "lu"}, "unknown solver 'lu'"),
        ({"curvature": "fisher"}, "unknown curvature 'fisher'"),
        ({"curvature": "gauss-newton"}, "needs a lower loss that is a bilevel.Composite"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"damping": -1.0}, "damping must be finite"),
        ({"lower": 3}, "lower must be a loss"),
        ({"lower": lambda u, v: v - u}, r"a loss must return a scalar, not a tensor of shape \(3,\)"),
        ({"lower": Root(lambda u, v: v.sum())}, "Root must return tensors in the shapes of inner"),
        ({"lower": Root(lambda u, v: v - u), "solver": "cg"}, "cg needs a symmetric system"),
        ({"lower": FixedPoint(lambda u, v: u), "curvature": "hessian"}, "a FixedPoint has none"),
        ({"outer": torch.zeros(3, dtype=torch.int64)}, "outer holds a tensor of torch.int64"),
        ({"inner": [1.0, 2.0]}, "inner holds a float: give tensors"),
        ({"inner": ()}, "inner holds no tensor"),
    ],
)
def test_bad_arguments(settings, message):
    arguments = {"lower": lambda u, v: (v - u).square().sum(), "outer": torch.zeros(3), "inner": torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        hypergradient(lambda u, v: v.sum(), **(arguments | settings))
