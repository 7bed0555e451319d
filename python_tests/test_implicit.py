"""The minimiser as an autograd node: gradcheck, modules, nests of tensors, fixed points, solvers, warm starts."""

from __future__ import annotations

import doctest
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pacd_fast import bilevel
from pacd_fast.bilevel import Composite, FixedPoint, Root, SolverWarning, WarmStart, hypergradient, implicit

DRAW = torch.Generator().manual_seed(7)
X, X_VAL = (torch.randn(n, 4, generator=DRAW, dtype=torch.float64) for n in (12, 9))
Y = torch.randn(12, generator=DRAW, dtype=torch.float64)


def ridge(y: Tensor, log_l2: Tensor) -> Tensor:
    return torch.linalg.solve(X.T @ X / 12 + log_l2.exp() * torch.eye(4, dtype=y.dtype), X.T @ y / 12)


def lower(outer: tuple[Tensor, Tensor], w: Tensor) -> Tensor:
    return (X @ w - outer[0]).square().mean() + outer[1].exp() * w.square().sum()


COMPOSITE = Composite(
    lambda u, w: (X @ w, w), lambda u, z: (z[0] - u[0]).square().mean() + u[1].exp() * z[1].square().sum()
)
LOG_L2 = torch.tensor(-1.0, dtype=torch.float64)


@pytest.mark.parametrize("problem", [lower, COMPOSITE], ids=["loss", "composite"])
def test_gradcheck_against_refitting(problem):
    """Finite differences fit again at every point; autograd goes through the node."""

    def loss(y: Tensor, log_l2: Tensor) -> Tensor:
        w = implicit(problem, (y, log_l2), ridge(y.detach(), log_l2.detach()), tolerance=1e-13)
        return (X_VAL @ w).tanh().sum() + log_l2 * w.square().sum() + y.square().sum()

    assert torch.autograd.gradcheck(loss, (Y.clone().requires_grad_(), LOG_L2.clone().requires_grad_()), atol=1e-7)


def test_it_is_the_hypergradient():
    w = ridge(Y, LOG_L2)
    y, log_l2 = Y.clone().requires_grad_(), LOG_L2.clone().requires_grad_()
    answer = implicit(lower, (y, log_l2), w)
    assert torch.equal(answer, w) and answer.requires_grad
    ((X_VAL @ answer).square().mean() + y.sum()).backward()
    found = hypergradient(lambda u, w: (X_VAL @ w).square().mean() + u[0].sum(), lower, (Y, LOG_L2), w)
    torch.testing.assert_close((y.grad, log_l2.grad), found, rtol=1e-12, atol=1e-14)
    answer = implicit(lower, (Y, log_l2), w)  # a tensor that does not require grad has none
    (slope,) = torch.autograd.grad((X_VAL @ answer).square().mean(), log_l2)
    torch.testing.assert_close(slope, found[1], rtol=1e-12, atol=1e-14)
    assert not implicit(lower, (Y, LOG_L2), w).requires_grad


def test_several_losses_and_what_autograd_forbids():
    w = ridge(Y, LOG_L2)
    log_l2 = LOG_L2.clone().requires_grad_()
    answer = implicit(lower, (Y, log_l2), w)
    losses = [(X_VAL @ answer).square().mean(), answer.norm()]
    parts = [torch.autograd.grad(each, log_l2, retain_graph=True)[0] for each in losses]
    torch.testing.assert_close(torch.autograd.grad(sum(losses), log_l2)[0], sum(parts))
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(implicit(lower, (Y, log_l2), w).sum(), log_l2, create_graph=True)
    answer = implicit(lower, (Y, log_l2), w)
    w.add_(1)  # the node would solve at other weights
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        answer.sum().backward()


class Pair(NamedTuple):
    first: Tensor
    second: list[Tensor]


def test_nests_of_tensors():
    w = ridge(Y, LOG_L2)

    def nested(u, v):
        return lower((torch.cat([u["a"][0], u["a"][1]]), u["b"]), torch.cat([v.first, v.second[0].view(-1)]))

    outer = {"a": (Y[:5].clone().requires_grad_(), Y[5:].clone().requires_grad_()), "b": LOG_L2.clone()}
    outer["b"].requires_grad_()
    answer = implicit(nested, outer, Pair(w[:1], [w[1:].view(3, 1)]))
    assert isinstance(answer, Pair) and answer.second[0].shape == (3, 1)
    (answer.first.sum() + answer.second[0].square().sum()).backward()
    found = hypergradient(lambda u, w: w[0] + w[1:].square().sum(), lower, (Y, LOG_L2), w)
    torch.testing.assert_close(torch.cat([outer["a"][0].grad, outer["a"][1].grad]), found[0])
    torch.testing.assert_close(outer["b"].grad, found[1])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)).double()


def trained(net: nn.Module, loss) -> nn.Module:
    """At a minimum to all digits: L-BFGS, and Newton's method with a dense Hessian at its end."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(parameters, max_iter=1000, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(net)
        value.backward()
        return value

    optimizer.step(closure)
    for _ in range(4):
        slopes = torch.autograd.grad(loss(net), parameters, create_graph=True)
        slope = torch.cat([g.reshape(-1) for g in slopes])
        rows = [torch.autograd.grad(each, parameters, retain_graph=True) for each in slope]
        hessian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
        move = torch.linalg.solve(hessian, slope.detach()).split([p.numel() for p in parameters])
        with torch.no_grad():
            for parameter, step in zip(parameters, move, strict=True):
                parameter -= step.view_as(parameter)
    assert float(slope.detach().norm()) < 1e-11
    return net


NET_L2 = torch.tensor(-3.5, dtype=torch.float64)


def penalised(log_l2: Tensor, net: nn.Module) -> Tensor:
    """A loss as one writes it for a module: its own call, its own parameters."""
    return F.mse_loss(net(X).squeeze(1), Y) + log_l2.exp() * sum(p.square().sum() for p in net.parameters())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_modules_own_parameters_against_retraining(frozen):
    net = network()
    if frozen:
        net[0].requires_grad_(False)
    trained(net, lambda net: penalised(NET_L2, net))
    log_l2, before = NET_L2.clone().requires_grad_(), {k: v.clone() for k, v in net.state_dict().items()}
    weights = implicit(penalised, log_l2, net, tolerance=1e-10)
    assert list(weights) == [name for name, p in net.named_parameters() if p.requires_grad]
    net.eval().requires_grad_(False)  # what is done with the module afterwards is another thing
    torch.func.functional_call(net, weights, (X_VAL,)).square().mean().backward()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # running statistics too
    assert not any(part.training for part in net.modules())
    moved = []
    for sign in (1, -1):
        again = network()
        again.load_state_dict(before)
        if frozen:
            again[0].requires_grad_(False)
        trained(again.train(), lambda net, sign=sign: penalised(NET_L2 + sign * 1e-4, net))
        for name, buffer in again.named_buffers():
            buffer.copy_(before[name])  # they do not follow the optimum: they are no parameters
        moved.append(float(again.eval()(X_VAL).square().mean().detach()))
    assert float(log_l2.grad) == pytest.approx((moved[0] - moved[1]) / 2e-4, rel=1e-5)


def test_a_module_as_outer_variable():
    """Features are learnt through a ridge regression on them; the module's parameters get the gradient."""
    features = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()

    def head(net: nn.Module) -> Tensor:
        z = net(X)
        return torch.linalg.solve(z.T @ z / 12 + 0.3 * torch.eye(3, dtype=z.dtype), z.T @ Y / 12)

    def on_features(net: nn.Module, w: Tensor) -> Tensor:
        return (net(X) @ w - Y).square().mean() + 0.3 * w.square().sum()

    loss = (features(X_VAL) @ head(features)).square().mean()
    exact = torch.autograd.grad(loss, list(features.parameters()))
    w = implicit(on_features, features, head(features).detach(), tolerance=1e-13)
    (features(X_VAL) @ w).square().mean().backward()
    for parameter, slope in zip(features.parameters(), exact, strict=True):
        torch.testing.assert_close(parameter.grad, slope, rtol=1e-9, atol=1e-12)
    found = hypergradient(
        lambda net, w: (net(X_VAL) @ w).square().mean(), on_features, features, head(features).detach(), tolerance=1e-13
    )
    for (name, slope), expected in zip(found.items(), exact, strict=True):
        torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-12, msg=name)
    with pytest.raises(ValueError, match="one module stands in two places"):
        implicit(lambda u, v: v(X).sum(), features, features)


MAP = 0.4 * torch.linalg.qr(torch.randn(4, 4, generator=DRAW, dtype=torch.float64)).Q


def equilibrium(c: Tensor) -> Tensor:
    z = torch.zeros(4, dtype=torch.float64)
    for _ in range(80):
        z = torch.tanh(MAP @ z + c)
    return z


@pytest.mark.parametrize("solver", ["gmres", "neumann", None])
@pytest.mark.parametrize("kind", ["fixed point", "root"])
def test_gradcheck_of_conditions_that_are_no_losses(kind, solver):
    """An equilibrium, whose Jacobian is not symmetric; gradcheck iterates again at every point."""
    if kind == "fixed point":
        problem = FixedPoint(lambda c, z: torch.tanh(MAP @ z + c))
    else:
        problem = Root(lambda c, z: z - torch.tanh(MAP @ z + c))
    options = {"lr": 0.8} if (kind, solver) == ("root", "neumann") else {}

    def loss(c: Tensor) -> Tensor:
        z = implicit(problem, c, equilibrium(c.detach()), solver=solver, steps=200, tolerance=1e-13, **options)
        return (z * torch.arange(4)).sum() + z.square().sum()

    assert torch.autograd.gradcheck(loss, (torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_(),), atol=1e-7)


def test_a_quadratics_root_is_its_minimum():
    w = ridge(Y, LOG_L2)
    root = Root(lambda u, w: 2 * X.T @ (X @ w - u[0]) / 12 + 2 * u[1].exp() * w)
    ours = hypergradient(lambda u, w: w.norm(), root, (Y, LOG_L2), w, tolerance=1e-13)
    theirs = hypergradient(lambda u, w: w.norm(), lower, (Y, LOG_L2), w, tolerance=1e-13)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_users_solver_and_preconditioner():
    w = ridge(Y, LOG_L2)
    hessian = torch.func.hessian(lambda w: lower((Y, LOG_L2), w))(w)
    exact = hypergradient(lambda u, w: w.norm(), lower, (Y, LOG_L2), w, tolerance=1e-13)
    memory = WarmStart()
    for how in (
        {"solver": lambda product, b: torch.linalg.solve(hessian, b)},
        {"preconditioner": lambda r: torch.linalg.solve(hessian, r), "steps": 1},
        {"preconditioner": lambda r: torch.linalg.solve(hessian, r), "solver": "cg", "steps": 1},
    ):
        y, log_l2 = Y.clone().requires_grad_(), LOG_L2.clone().requires_grad_()
        memory.solved = None
        implicit(lower, (y, log_l2), w, warm_start=memory, **how).norm().backward()
        torch.testing.assert_close((y.grad, log_l2.grad), exact, rtol=1e-9, atol=1e-12)
        assert memory.solved is not None and memory.solved.residual < 1e-12


def test_minibatches_that_begin_anew_in_every_backward():
    """A list of two losses of half of the data, over and over: as many products, the same gradient."""
    halves = [lambda u, w, here=here: lower_of(here, u, w) for here in (slice(0, 6), slice(6, 12))]
    memory, w, found = WarmStart(), ridge(Y, LOG_L2), []
    for _ in range(2):
        log_l2 = LOG_L2.clone().requires_grad_()
        memory.solved = None
        answer = implicit(halves * 100, (Y, log_l2), w, steps=40, lr=0.1, tolerance=0.0, warm_start=memory)
        answer.sum().backward()
        assert memory.solved is not None and memory.solved.products == 41
        found.append(log_l2.grad)
    assert torch.equal(*found)
    exact = hypergradient(lambda u, w: w.sum(), lower, (Y, LOG_L2), w)[1]
    assert 1e-6 < float((found[0] - exact).abs()) < 0.3 * float(exact.abs())


def lower_of(here: slice, outer: tuple[Tensor, Tensor], w: Tensor) -> Tensor:
    return (X[here] @ w - outer[0][here]).square().mean() + outer[1].exp() * w.square().sum()


def test_warm_starts_and_residuals_across_calls():
    memory, products = WarmStart(), []
    for log_l2 in (-1.0, -0.999, -0.998):
        log = torch.tensor(log_l2, dtype=torch.float64, requires_grad=True)
        answer = implicit(lower, (Y, log), ridge(Y, log.detach()), warm_start=memory, tolerance=1e-3)
        (X_VAL @ answer).square().mean().backward()
        assert memory.solved is not None and memory.solved.residual <= 1e-3
        products.append(memory.solved.products)
    assert max(products[1:]) < products[0]


def test_an_unsolved_system_warns_in_backward():
    log_l2 = LOG_L2.clone().requires_grad_()
    answer = implicit(lower, (Y, log_l2), ridge(Y, LOG_L2), steps=1)
    with pytest.warns(SolverWarning, match="minres did not solve the linear system: residual 0"):
        answer.sum().backward()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": LOG_L2.exp()}, "damping is a number, not a tensor"),
        ({"solver": "lu"}, "unknown solver 'lu'"),
        ({"curvature": "fisher"}, "unknown curvature 'fisher'"),
        ({"solver": "adam", "preconditioner": lambda r: r}, "adam takes no preconditioner"),
    ],
)
def test_bad_arguments_are_refused_before_backward(settings, message):
    with pytest.raises(ValueError, match=message):
        implicit(lower, (Y, LOG_L2), ridge(Y, LOG_L2), **settings)


def test_a_regulariser_left_to_damping_is_refused_in_backward():
    log_l2 = LOG_L2.clone().requires_grad_()
    without = lambda u, w: (X @ w - u[0]).square().mean()  # noqa: E731
    answer = implicit(without, (Y, log_l2), ridge(Y, LOG_L2), damping=2 * float(LOG_L2.exp()))
    with pytest.raises(ValueError, match="lower does not depend on outer"):
        answer.sum().backward()
    y = Y.clone().requires_grad_()
    answer = implicit(without, (y, log_l2), ridge(Y, LOG_L2), damping=2 * float(LOG_L2.exp()))
    with pytest.raises(ValueError, match="tensor 1 of outer has no part in lower, and damping"):
        answer.sum().backward()
    answer = implicit(without, (y, LOG_L2), ridge(Y, LOG_L2), damping=2 * float(LOG_L2.exp()))
    answer.sum().backward()  # a tensor that wants no gradient may be elsewhere
    assert bool(y.grad.isfinite().all())


def test_the_residual_of_bfloat16_products_is_of_full_precision():
    x = torch.randn(512, 8, generator=DRAW)
    memory, y = WarmStart(), torch.randn(512, generator=DRAW).requires_grad_()
    on_y = lambda y, w: (F.linear(x, w).squeeze(1) - y).square().mean()  # noqa: E731
    w = torch.linalg.lstsq(x, y.detach().unsqueeze(1)).solution.T
    implicit(on_y, y, w, dtype=torch.bfloat16, tolerance=1e-2, warm_start=memory).sum().backward()
    assert memory.solved is not None
    left = 2 * x.T @ (x @ memory.solved.q) / 512 - 1
    assert memory.solved.residual == pytest.approx(float(left.norm() / 8**0.5), rel=1e-3)


def test_the_examples_of_the_docstrings():
    import pacd_fast.bilevel.hypergradients as module

    found = doctest.testmod(module, raise_on_error=True)
    assert found.attempted > 8
    assert set(bilevel.__all__) <= set(dir(bilevel))
