"""Gradients through unrolled training steps against autograd through the loop written out, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pacd_fast.bilevel import unrolled


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)]
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


def written_out(upper, lowers, outer, inner, lr, momentum, nesterov, velocity):
    """(gradient, weights after): every step with create_graph, and one backward pass through all of them."""
    outer = outer.detach().clone().requires_grad_()
    inner = [w.detach().clone().requires_grad_() for w in inner]
    velocity = [torch.zeros_like(w) for w in inner] if velocity is None else list(velocity)
    for lower in lowers:
        slopes = torch.autograd.grad(lower(outer, tuple(inner)), inner, create_graph=True)
        velocity = [momentum * v + g for v, g in zip(velocity, slopes, strict=True)]
        moves = [g + momentum * v for v, g in zip(velocity, slopes, strict=True)] if nesterov else velocity
        inner = [w - lr * move for w, move in zip(inner, moves, strict=True)]
    value = upper(outer, tuple(inner))
    return torch.autograd.grad(value, outer)[0], value.detach(), [w.detach() for w in inner]


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(
    ("steps", "momentum", "nesterov", "started"),
    [(1, 0.0, False, False), (2, 0.0, False, False), (4, 0.9, False, True), (3, 0.7, True, True), (1, 0.9, True, True)],
)
def test_the_gradient_is_autograds_through_the_loop(steps, momentum, nesterov, started, checkpoint):
    problem = Problem()
    lowers = [problem.lower(t) for t in range(steps)]  # another batch every step
    velocity = tuple(0.3 * torch.ones_like(w) for w in problem.weights) if started else None
    arguments = {"lr": 0.5, "momentum": momentum, "nesterov": nesterov, "velocity": velocity}
    found = unrolled(problem.upper, lowers, problem.u, problem.weights, steps=steps, checkpoint=checkpoint, **arguments)
    gradient, after, weights = written_out(problem.upper, lowers, problem.u, problem.weights, **arguments)
    assert found.gradient.shape == problem.u.shape and bool((gradient - 0.2 * problem.u).abs().max() > 1e-6)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(found.after, after, rtol=1e-13, atol=0)
    torch.testing.assert_close(list(found.inner), weights, rtol=1e-12, atol=1e-15)
    assert float(found.before) == float(problem.upper(problem.u, problem.weights))
    assert not found.gradient.requires_grad and not found.inner[0].requires_grad


def test_the_steps_are_those_of_torch():
    problem = Problem()
    for momentum, nesterov in ((0.0, False), (0.9, False), (0.9, True)):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=momentum, nesterov=nesterov)
        for _ in range(3):
            optimizer.zero_grad()
            x = torch.cat([problem.x[:2] + problem.u, problem.x[2:]])
            F.cross_entropy(model(x), torch.arange(5) % 3).backward()
            optimizer.step()
        found = unrolled(
            problem.upper, problem.lower(0), problem.u, problem.weights,
            steps=3, lr=0.3, momentum=momentum, nesterov=nesterov,
        )  # fmt: skip
        for mine, theirs in zip(found.inner, model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs.detach(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_tuples_and_bare_tensors(checkpoint):
    """A quadratic with a known answer: lower = (w - a)^2 / 2 + b w, so that w' = w - lr (w - a + b)."""
    a, b, w = torch.tensor(2.0), torch.tensor([0.5]), torch.tensor(1.0)
    found = unrolled(
        lambda outer, inner: inner.square(), lambda outer, inner: (inner - outer[0]) ** 2 / 2 + outer[1].sum() * inner,
        (a, b), w, steps=2, lr=0.1, checkpoint=checkpoint,
    )  # fmt: skip
    final = 0.81 * 1.0 + 0.19 * 1.5
    assert isinstance(found.gradient, tuple)
    torch.testing.assert_close(found.gradient[0], torch.tensor(2 * final * 0.19))
    torch.testing.assert_close(found.gradient[1], torch.tensor([-2 * final * 0.19]))
    torch.testing.assert_close(found.inner, torch.tensor(final))
    constant = unrolled(lambda outer, inner: inner * 0 + 3.0, lambda outer, inner: inner, a, w, steps=1, lr=1.0)
    assert float(constant.gradient) == 0 and float(constant.after) == 3


def test_nothing_is_left_on_what_was_given():
    problem = Problem()
    u, weights = problem.u.clone(), tuple(w.clone() for w in problem.weights)
    unrolled(problem.upper, problem.lower(0), u, weights, steps=2, lr=0.1)
    assert not u.requires_grad and u.grad is None and torch.equal(u, problem.u)
    assert all(not w.requires_grad and torch.equal(w, v) for w, v in zip(weights, problem.weights, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"momentum": -1.0}, "momentum must be finite and not negative"),
        ({"nesterov": True}, "nesterov needs"),
        ({"velocity": torch.zeros(3)}, "the velocity must have the shapes"),
        ({"lower": []}, "0 lower losses and 2 steps"),
    ],
)
def test_bad_input(changes, message):
    arguments = {"lower": lambda u, w: (u * w).sum(), "steps": 2, "lr": 0.1} | changes
    with pytest.raises(ValueError, match=message):
        unrolled(lambda u, w: w.sum(), outer=torch.ones(2), inner=torch.ones(2), **arguments)
