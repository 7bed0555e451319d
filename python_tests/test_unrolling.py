"""Gradients through unrolled optimiser steps against autograd through the loop written out, in float64."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pacd_fast.bilevel import SGD, Adam, AdamW, unrolled


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).double().train()


class Problem:
    """Perturbations of a batch (outer), the weights of a network (inner), and a target that the upper loss looks at."""

    def __init__(self) -> None:
        self.model = network()
        self.names = [name for name, _ in self.model.named_parameters()]
        self.weights = tuple(w.detach() for w in self.model.parameters())
        generator = torch.Generator().manual_seed(1)
        self.x = torch.rand(5, 1, 4, 4, generator=generator, dtype=torch.float64)
        self.u = 0.1 * torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
        self.target = torch.rand(2, 1, 4, 4, generator=generator, dtype=torch.float64)

    def logits(self, inner, x):
        weights = dict(zip(self.names, inner, strict=True))
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        return torch.func.functional_call(self.model, (weights, buffers), (x,))

    def lower(self, shift):
        labels = (torch.arange(5) + shift) % 3

        def loss(u, inner):
            return F.cross_entropy(self.logits(inner, torch.cat([self.x[:2] + u, self.x[2:]])), labels)

        return loss

    def upper(self, u, inner):  # it depends on u directly as well
        return F.cross_entropy(self.logits(inner, self.target), torch.tensor([2, 0])) + 0.1 * u.square().sum()


def sgd(w, g, lr, slots, momentum=0.0, nesterov=False, weight_decay=0.0):
    g = g + weight_decay * w
    buffer = momentum * slots.get("momentum_buffer", 0.0) + g
    return w - lr * (g + momentum * buffer if nesterov else buffer), {"momentum_buffer": buffer}


def adam(w, g, lr, slots, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False):
    if decoupled:
        w = w * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * w
    t = slots.get("step", 0) + 1
    m = betas[0] * slots.get("exp_avg", 0.0) + (1 - betas[0]) * g
    v = betas[1] * slots.get("exp_avg_sq", 0.0) + (1 - betas[1]) * g * g
    root = (v / (1 - betas[1] ** t)).sqrt()
    return w - lr * (m / (1 - betas[0] ** t)) / (root + eps), {"step": t, "exp_avg": m, "exp_avg_sq": v}


class RMSprop:
    """As the docstring of Rule has it, but for the eps, which torch adds to the root."""

    def step(self, weight, gradient, lr, slots):
        square = 0.01 * gradient.square() + (0.99 * slots["square_avg"] if slots else 0.0)
        return weight - lr * gradient / square.sqrt(), {"square_avg": square}


def rmsprop(w, g, lr, slots, eps):
    square = 0.99 * slots.get("square_avg", 0.0) + 0.01 * g * g
    return w - lr * g / (square.sqrt() + eps), {"square_avg": square}


RULES = {
    "sgd": (SGD(), sgd, torch.optim.SGD, {}),
    "momentum": (SGD(momentum=0.9), sgd, torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (SGD(0.7, nesterov=True), sgd, torch.optim.SGD, {"momentum": 0.7, "nesterov": True}),
    "decay": (SGD(0.9, weight_decay=0.1), sgd, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "adam": (Adam(), adam, torch.optim.Adam, {}),
    "adam decay": (Adam((0.8, 0.99), 1e-3, 0.1), adam, torch.optim.Adam,
                   {"betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1}),
    "adamw": (AdamW(weight_decay=0.1), adam, torch.optim.AdamW, {"weight_decay": 0.1, "decoupled": True}),
    "a user's": (RMSprop(), rmsprop, torch.optim.RMSprop, {"eps": 0.0}),
}  # fmt: skip


def written_out(upper, lowers, outer, inner, rates, step, settings):
    """(gradients of outer, inner_0, rates, value, weights after): every step with create_graph, one backward pass."""
    outer = outer.detach().clone().requires_grad_()
    start = [w.detach().clone().requires_grad_() for w in inner]
    rates = [rate.clone().requires_grad_() for rate in rates]
    now, slots = start, [{} for _ in start]
    for t, lower in enumerate(lowers):
        slopes = torch.autograd.grad(lower(outer, tuple(now)), now, create_graph=True)
        moved = [step(w, g, rates[t], s, **settings) for w, g, s in zip(now, slopes, slots, strict=True)]
        now, slots = [w for w, _ in moved], [s for _, s in moved]
    value = upper(outer, tuple(now))
    found = torch.autograd.grad(value, [outer, *start, *rates], allow_unused=True, materialize_grads=True)
    return found[0], found[1 : 1 + len(start)], found[1 + len(start) :], value.detach(), [w.detach() for w in now]


@pytest.mark.parametrize("checkpoint", [False, True, 3])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_against_the_loop_written_out(rule, checkpoint):
    problem = Problem()
    ours, step, _, settings = RULES[rule]
    lowers = [problem.lower(t) for t in range(5)]  # another batch every step
    rates = torch.linspace(0.05, 0.03, 5, dtype=torch.float64)
    found = unrolled(
        problem.upper, lowers, problem.u, problem.weights, steps=5, lr=rates, rule=ours, initial=True,
        checkpoint=checkpoint,
    )  # fmt: skip
    exact, initial, of_rates, after, weights = written_out(
        problem.upper, lowers, problem.u, problem.weights, list(rates), step, settings
    )
    assert found.gradient.shape == problem.u.shape and bool((exact - 0.2 * problem.u).abs().max() > 1e-6)
    torch.testing.assert_close(found.gradient, exact, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(found.initial_gradient, initial, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(found.lr_gradient, torch.stack(of_rates), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(found.after, after, rtol=1e-12, atol=0)
    torch.testing.assert_close(list(found.inner), weights, rtol=1e-11, atol=1e-14)
    assert float(found.before) == float(problem.upper(problem.u, problem.weights))
    assert not found.gradient.requires_grad and not found.inner[0].requires_grad
    without = unrolled(
        problem.upper, lowers[:1], problem.u, problem.weights, steps=1, lr=0.05, rule=ours, checkpoint=checkpoint
    )
    alone = written_out(problem.upper, lowers[:1], problem.u, problem.weights, [rates[0]], step, settings)
    torch.testing.assert_close(without.gradient, alone[0], rtol=1e-9, atol=1e-13)
    assert without.lr_gradient is None and without.initial_gradient is None


@pytest.mark.parametrize("rule", RULES)
def test_the_steps_are_those_of_torch_and_go_on_from_its_state(rule):
    problem = Problem()
    ours, _, kind, settings = RULES[rule]
    settings = {name: each for name, each in settings.items() if name != "decoupled"}
    model = network()
    optimizer = kind(model.parameters(), lr=0.03, **settings)
    states = []
    for _ in range(4):
        optimizer.zero_grad()
        x = torch.cat([problem.x[:2] + problem.u, problem.x[2:]])
        F.cross_entropy(model(x), torch.arange(5) % 3).backward()
        optimizer.step()
        states.append(
            (
                tuple(p.detach().clone() for p in model.parameters()),
                copy.deepcopy([optimizer.state[p] for p in model.parameters()]),
            )
        )
    arguments = {"lr": 0.03, "rule": ours}
    whole = unrolled(problem.upper, problem.lower(0), problem.u, problem.weights, steps=4, **arguments)
    torch.testing.assert_close(whole.inner, states[3][0], rtol=1e-11, atol=1e-14)
    for name in whole.state[0]:
        for mine, theirs in zip(whole.state, states[3][1], strict=True):
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-11, atol=1e-14)
    weights, state = states[1]  # from torch's own state after two steps
    rest = unrolled(problem.upper, problem.lower(0), problem.u, weights, steps=2, state=state, **arguments)
    torch.testing.assert_close(rest.inner, states[3][0], rtol=1e-11, atol=1e-14)


def test_going_on_from_a_state_differentiates_through_it_as_a_constant():
    """Two steps after a pause: the buffers of the first two are known numbers."""
    problem = Problem()
    first = unrolled(problem.upper, problem.lower(0), problem.u, problem.weights, steps=2, lr=0.1, rule=SGD(0.9, True))
    rest = unrolled(
        problem.upper, problem.lower(0), problem.u, first.inner, steps=2, lr=0.1, rule=SGD(0.9, True), state=first.state
    )
    start = [slots["momentum_buffer"] for slots in first.state]
    u = problem.u.clone().requires_grad_()
    inner, buffers = [w.clone().requires_grad_() for w in first.inner], start
    for _ in range(2):
        slopes = torch.autograd.grad(problem.lower(0)(u, tuple(inner)), inner, create_graph=True)
        buffers = [0.9 * b + g for b, g in zip(buffers, slopes, strict=True)]
        inner = [w - 0.1 * (g + 0.9 * b) for w, g, b in zip(inner, slopes, buffers, strict=True)]
    exact = torch.autograd.grad(problem.upper(u, tuple(inner)), u)[0]
    torch.testing.assert_close(rest.gradient, exact, rtol=1e-10, atol=1e-14)


def test_adam_where_a_gradient_is_always_zero():
    """Plain autograd gives NaN there: the square root's derivative at 0."""
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)  # the second weight is never used
    y, w = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)

    def loss(y: Tensor, w: Tensor) -> Tensor:
        return (x @ w - y).square().mean()

    def upper(y: Tensor, w: Tensor) -> Tensor:
        return w.square().sum()

    found = unrolled(upper, loss, y, w, steps=3, lr=0.1, rule=Adam(), initial=True)
    cut = unrolled(
        upper, lambda y, w: (x[:, :1] @ w - y).square().mean(), y, w[:1], steps=3, lr=0.1, rule=Adam(), initial=True
    )
    torch.testing.assert_close(found.gradient, cut.gradient)
    torch.testing.assert_close(found.initial_gradient, torch.cat([cut.initial_gradient, 2 * w[1:]]))


def test_a_learning_rate_for_every_tensor():
    problem = Problem()
    rates = tuple(torch.full_like(w, 0.05) for w in problem.weights)
    found = unrolled(problem.upper, problem.lower(0), problem.u, problem.weights, steps=3, lr=rates, rule=SGD(0.9))
    one = unrolled(
        problem.upper, problem.lower(0), problem.u, problem.weights, steps=3, lr=torch.tensor(0.05), rule=SGD(0.9)
    )
    torch.testing.assert_close(found.gradient, one.gradient)
    assert [g.shape for g in found.lr_gradient] == [w.shape for w in problem.weights]
    total = sum(float(g.sum()) for g in found.lr_gradient)
    assert total == pytest.approx(float(one.lr_gradient), rel=1e-6)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_an_unmodified_module(checkpoint):
    problem = Problem()
    before = {name: each.clone() for name, each in problem.model.state_dict().items()}
    labels = torch.arange(5) % 3

    def lower(u, model):
        return F.cross_entropy(model(torch.cat([problem.x[:2] + u, problem.x[2:]])), labels)

    def upper(u, model):
        return F.cross_entropy(model(problem.target), torch.tensor([2, 0])) + 0.1 * u.square().sum()

    arguments = {"steps": 4, "lr": 0.05, "rule": AdamW(), "initial": True, "checkpoint": checkpoint}
    found = unrolled(upper, lower, problem.u, problem.model, **arguments)
    exact = unrolled(problem.upper, problem.lower(0), problem.u, problem.weights, **arguments)
    torch.testing.assert_close(found.gradient, exact.gradient, rtol=1e-12, atol=1e-15)
    assert list(found.inner) == list(found.initial_gradient) == problem.names
    torch.testing.assert_close(tuple(found.inner.values()), exact.inner, rtol=1e-12, atol=1e-15)
    assert all(torch.equal(each, before[name]) for name, each in problem.model.state_dict().items())


@pytest.mark.parametrize("checkpoint", [False, True])
def test_tuples_and_bare_tensors(checkpoint):
    """A quadratic with a known answer: lower = (w - a)^2 / 2 + b w, so that w' = w - lr (w - a + b)."""
    a, b, w = torch.tensor(2.0), torch.tensor([0.5]), torch.tensor(1.0)
    found = unrolled(
        lambda outer, inner: inner.square(), lambda outer, inner: (inner - outer[0]) ** 2 / 2 + outer[1].sum() * inner,
        (a, b), w, steps=2, lr=0.1, checkpoint=checkpoint, initial=True,
    )  # fmt: skip
    final = 0.81 * 1.0 + 0.19 * 1.5
    assert isinstance(found.gradient, tuple)
    torch.testing.assert_close(found.gradient[0], torch.tensor(2 * final * 0.19))
    torch.testing.assert_close(found.gradient[1], torch.tensor([-2 * final * 0.19]))
    torch.testing.assert_close(found.inner, torch.tensor(final))
    torch.testing.assert_close(found.initial_gradient, torch.tensor(2 * final * 0.81))
    constant = unrolled(lambda outer, inner: inner * 0 + 3.0, lambda outer, inner: inner, a, w, steps=1, lr=1.0)
    assert float(constant.gradient) == 0 and float(constant.after) == 3


def test_nothing_is_left_on_what_was_given():
    problem = Problem()
    u, weights, lr = problem.u.clone(), tuple(w.clone() for w in problem.weights), torch.tensor(0.1)
    unrolled(problem.upper, problem.lower(0), u, weights, steps=2, lr=lr, rule=Adam())
    assert not u.requires_grad and u.grad is None and torch.equal(u, problem.u) and not lr.requires_grad
    assert all(not w.requires_grad and torch.equal(w, v) for w, v in zip(weights, problem.weights, strict=True))


MEMORY = """
import re, torch
from pacd_fast.bilevel import unrolled
torch.set_num_threads(1)
x, w, u = torch.rand(2000, 200), 0.1 * torch.rand(200, 200), torch.zeros(200)
lower = lambda u, w: torch.tanh(torch.tanh((x + u) @ w) @ w).square().mean()
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
for steps, checkpoint in (1, False), (9, True), (36, True), (36, False):
    unrolled(lambda u, w: (w * w).sum(), lower, u, w, steps=steps, lr=0.1, checkpoint=checkpoint)
    print(peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts the peak there")
def test_memory_grows_with_the_square_root_of_the_steps():
    """MiB beyond one step's, in a process of its own, the largest last: a process's peak does not fall."""
    command = [sys.executable, "-c", MEMORY]
    one, *peaks = map(float, subprocess.run(command, capture_output=True, check=True, timeout=300).stdout.split())
    few, many, plain = (peak - one for peak in peaks)
    assert many < 0.35 * plain  # 6 graphs and 6 sets of weights of 36
    assert 0 < few < many < 3.2 * few  # twice as much where the steps are four times as many, and something


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": torch.tensor(-1.0)}, "lr must be positive"),
        ({"lr": torch.ones(3)}, r"lr must be a number, or a tensor of shape \[\] or \[2\], not \(3,\)"),
        ({"lr": [torch.ones(2), torch.ones(2)]}, "lr holds 2 tensors and inner 1"),
        ({"checkpoint": 0}, "checkpoint must be at least 1"),
        ({"state": [{"momentum_buffer": torch.zeros(3)}]}, "state's momentum_buffer must have the shape of its tensor"),
        ({"state": []}, "state holds 0 dicts and inner 1 tensors"),
        ({"lower": []}, "0 lower losses and 2 steps"),
        ({"lower": lambda u, w: u * w}, "a loss must return a scalar"),
    ],
)
def test_bad_input(changes, message):
    arguments = {"lower": lambda u, w: (u * w).sum(), "steps": 2, "lr": 0.1, "rule": SGD(0.9)} | changes
    with pytest.raises(ValueError, match=message):
        unrolled(lambda u, w: w.sum(), outer=torch.ones(2), inner=torch.ones(2), **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(momentum=-1.0), "momentum must be finite and not negative"),
        (lambda: SGD(nesterov=True), "nesterov needs a momentum above 0"),
        (lambda: Adam(betas=(0.9, 1.0)), r"betas must be in \[0, 1\)"),
        (lambda: AdamW(eps=0.0), "eps must be positive"),
    ],
)
def test_bad_rules(make, message):
    with pytest.raises(ValueError, match=message):
        make()
