"""Hypergradients by unrolling: how a loss after a few optimiser steps depends on what those steps were trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from pacd_fast.arguments import at_least, not_negative, positive

__all__ = ["Tensors", "Unrolled", "unrolled"]

Tensors: TypeAlias = Tensor | tuple[Tensor, ...]
"""One tensor or several; a function of Tensors is called with what was given."""

Function: TypeAlias = Callable[..., Tensor]
"""(outer, inner) -> scalar; a pure function, because it may be evaluated twice: draw random numbers by a fixed seed."""


@dataclass(frozen=True)
class Unrolled:
    """What `unrolled` found; nothing here carries a graph.

    gradient: of upper(outer, inner_T) with respect to outer, shaped like outer; before, after: upper(outer, inner_0)
    and upper(outer, inner_T), scalars; inner, velocity: inner_T and its momentum, to go on from, shaped like inner.
    """

    gradient: Tensors
    before: Tensor
    after: Tensor
    inner: Tensors
    velocity: Tensors


def unrolled(
    upper: Function,
    lower: Function | Sequence[Function],
    outer: Tensors,
    inner: Tensors,
    *,
    steps: int,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    velocity: Tensors | None = None,
    checkpoint: bool = False,
) -> Unrolled:
    """The gradient of upper(outer, inner_T) with respect to outer, through T steps of SGD on lower(outer, inner).

    In plain torch, with create_graph so that all of it can be differentiated::

        for t in range(steps):
            g = torch.autograd.grad(lower(outer, inner), inner, create_graph=True)
            v = momentum * v + g
            inner = inner - lr * (g + momentum * v if nesterov else v)
        gradient = torch.autograd.grad(upper(outer, inner), outer)

    The steps are torch.optim.SGD's.  The chain rule is applied a step at a time, from the last to the first, so that no
    graph spans two steps; the first step's part is with respect to outer alone.  With one surrogate after another,
    memory does not grow with their number.

    Args:
        upper, lower: (outer, inner) -> scalar; lower may be a sequence of `steps` functions, one a step (batches).
            A module runs at given weights through torch.func.functional_call.
        outer, inner: floating tensors or tuples of them; any dtype and device; their graphs are left alone.
        velocity: the momentum buffers to start with, shaped like inner; by default 0.
        checkpoint: keep no graph of the steps, only their weights, and evaluate `lower` again on the way back: memory
            flat in the number of steps, for one more first-order gradient a step.  The same result.

    Raises:
        ValueError: for steps below 1, lr, momentum out of range, a velocity or sequence that does not fit.
    """
    at_least("steps", steps, 1)
    positive("lr", lr)
    not_negative("momentum", momentum)
    if nesterov and momentum == 0:
        raise ValueError("nesterov needs a momentum above 0")
    lowers = list(lower) if isinstance(lower, Sequence) else [lower] * steps
    if len(lowers) != steps:
        raise ValueError(f"there are {len(lowers)} lower losses and {steps} steps: give one, or one a step")
    u, weights = _leaves(outer), _leaves(inner)
    velocities = [torch.zeros_like(w) for w in weights] if velocity is None else _leaves(velocity)
    if [v.shape for v in velocities] != [w.shape for w in weights]:
        raise ValueError("the velocity must have the shapes of inner")

    def slope(t: int, at: list[Tensor]) -> tuple[Tensor, ...]:
        """The gradient of the lower loss of step t, itself differentiable."""
        value = lowers[t](_like(outer, u), _like(inner, at))
        return torch.autograd.grad(value, at, create_graph=True, allow_unused=True, materialize_grads=True)

    with torch.no_grad():
        before = upper(_like(outer, u), _like(inner, weights))
    with torch.enable_grad():
        u = [each.requires_grad_() for each in u]
        path: list[tuple[list[Tensor], tuple[Tensor, ...] | None]] = []  # of every step: its weights and its slope
        for t in range(steps):
            at = [w.detach().requires_grad_() for w in weights]
            g = slope(t, at)
            path.append((at, None if checkpoint else g))
            with torch.no_grad():
                velocities = [momentum * v + d.detach() for v, d in zip(velocities, g, strict=True)]
                moves = velocities
                if nesterov:
                    moves = [d.detach() + momentum * v for v, d in zip(velocities, g, strict=True)]
                weights = [w - lr * move for w, move in zip(at, moves, strict=True)]

        last = [w.requires_grad_() for w in weights]
        after = upper(_like(outer, u), _like(inner, last))
        total, of_weights = _split(_grad(after, [*u, *last], None), len(u))
        of_velocity = [torch.zeros_like(w) for w in last]
        for t in reversed(range(steps)):
            at, kept = path.pop()
            # Backwards through inner' = inner - lr * move, move = v' or g + momentum * v', and v' = momentum * v + g.
            share = momentum if nesterov else 1.0
            of_velocity = [v - lr * share * w for v, w in zip(of_velocity, of_weights, strict=True)]
            along = [v - lr * w if nesterov else v for v, w in zip(of_velocity, of_weights, strict=True)]
            of_velocity = [momentum * v for v in of_velocity]
            g = slope(t, at) if kept is None else kept
            wanted = [*u, *(at if t > 0 else [])]
            of_u, through = _split(_grad(g, wanted, along), len(u))
            total = [a + b for a, b in zip(total, of_u, strict=True)]
            if t > 0:
                of_weights = [a + b for a, b in zip(of_weights, through, strict=True)]
    return Unrolled(
        gradient=_like(outer, total),
        before=before.detach(),
        after=after.detach(),
        inner=_like(inner, [w.detach() for w in last]),
        velocity=_like(inner, velocities),
    )


def _leaves(given: Tensors) -> list[Tensor]:
    return [each.detach() for each in ((given,) if isinstance(given, Tensor) else given)]


def _like(given: Tensors, values: list[Tensor]) -> Tensors:
    return values[0] if isinstance(given, Tensor) else tuple(values)


def _split(values: list[Tensor], at: int) -> tuple[list[Tensor], list[Tensor]]:
    return values[:at], values[at:]


def _grad(value: Tensor | tuple[Tensor, ...], wanted: list[Tensor], along: list[Tensor] | None) -> list[Tensor]:
    """Of <value, along> with respect to what is wanted; 0 where it does not depend on it, or on nothing at all."""
    values = [value] if isinstance(value, Tensor) else list(value)
    directions = [torch.ones_like(v) for v in values] if along is None else along
    pairs = [(v, d) for v, d in zip(values, directions, strict=True) if v.requires_grad]
    if not pairs:
        return [torch.zeros_like(w) for w in wanted]
    found = torch.autograd.grad(
        [v for v, _ in pairs], wanted, [d for _, d in pairs], allow_unused=True, materialize_grads=True
    )
    return list(found)
