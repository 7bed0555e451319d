"""Hypergradients by unrolling: how a loss after a few optimiser steps depends on what those steps were made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from pacd_fast.arguments import at_least, positive
from pacd_fast.bilevel.conditions import along, filled, gradients
from pacd_fast.bilevel.rules import SGD, Rule, Slots
from pacd_fast.bilevel.trees import Arguments, Tree, leaves, rebuilt

__all__ = ["Unrolled", "unrolled"]

Function: TypeAlias = Callable[..., Tensor]
"""(outer, inner) -> scalar; a pure function, because it may be evaluated twice: draw random numbers by a fixed seed."""


@dataclass(frozen=True)
class Unrolled:
    """What `unrolled` found; nothing here carries a graph.

    gradient: of upper(outer, inner_T) with respect to outer; before, after: upper(outer, inner_0) and
    upper(outer, inner_T), scalars; inner: inner_T; state: what the rule remembers, a dict for each tensor of inner, to
    go on from; lr_gradient: with respect to lr where it was given as tensors; initial_gradient: with respect to inner_0
    where it was asked for.  Gradients have the form of what they belong to, with a dict of parameters in the place of a
    module.
    """

    gradient: Tree
    before: Tensor
    after: Tensor
    inner: Tree
    state: list[Slots]
    lr_gradient: Tree | None = None
    initial_gradient: Tree | None = None


@dataclass
class _Step:
    """Where a step began, and the gradient that it took, with its graph."""

    weights: list[Tensor]
    slots: list[Slots]
    slopes: list[Tensor]


def unrolled(
    upper: Function,
    lower: Function | Sequence[Function],
    outer: Tree,
    inner: Tree,
    *,
    steps: int,
    lr: float | Tree,
    rule: Rule | None = None,
    state: Sequence[Slots] | None = None,
    initial: bool = False,
    checkpoint: bool | int = False,
) -> Unrolled:
    """d upper(outer, inner_T) / d outer through T steps of an optimiser on lower(outer, inner).

    In plain torch, with create_graph so that all of it can be differentiated::

        for t in range(steps):
            g = torch.autograd.grad(lower(outer, inner), inner, create_graph=True)
            inner, slots = rule.step(inner, g, lr, slots)
        gradient = torch.autograd.grad(upper(outer, inner), outer)

    The chain rule is applied a step at a time, from the last to the first, so that no graph spans two steps; the first
    step's part is with respect to outer alone.  With one surrogate after another, memory does not grow with their
    number.

    Args:
        upper, lower: (outer, inner) -> scalar; lower may be a sequence of `steps` functions, one a step (batches).
        outer, inner: a floating-point tensor; a tuple, list or dict of such; or a module, which stands for its
            parameters that require grad and is handed on to the losses with the values in place.  Nothing is changed in
            them.
        lr: a number; a tensor, [] or [steps]; or a tree like inner, of tensors that broadcast to inner's.  Tensors have
            a gradient.
        rule: `SGD(momentum, nesterov, weight_decay)` (the default, without momentum), `Adam`, `AdamW`, or any `Rule`.
        state: what the rule remembers, a dict for each tensor of inner; torch's own will do:
            [optimizer.state[p] for p in module.parameters()].
        initial: also the gradient with respect to inner_0: the first step is then differentiated twice, like the
            others.
        checkpoint: True keeps the weights of every sqrt(T)-th step and the graphs of sqrt(T) steps, which are evaluated
            again on the way back, for one more first-order gradient a step; a number keeps the graphs of so many steps.
            The result is the same.

    Raises:
        ValueError: for steps below 1, an lr out of range, a state or sequence that does not fit.
    """
    at_least("steps", steps, 1)
    rule = SGD() if rule is None else rule
    lowers = list(lower) if isinstance(lower, Sequence) else [lower] * steps
    if len(lowers) != steps:
        raise ValueError(f"there are {len(lowers)} lower losses and {steps} steps: give one, or one a step")
    u, weights = _detached(outer, "outer"), _detached(inner, "inner")
    slots = [{} for _ in weights] if state is None else _checked(state, weights)
    rates = _Rates(lr, steps, weights)
    chunk = steps if checkpoint is False else math.isqrt(steps) if checkpoint is True else checkpoint
    at_least("checkpoint", chunk, 1)
    arguments = Arguments(outer, inner)

    def taken(t: int, weights: list[Tensor], slots: list[Slots]) -> tuple[_Step, list[Tensor], list[Slots]]:
        """Step t, with a graph of its own, and where it leads."""
        at = [w.detach().requires_grad_() for w in weights]
        g = gradients(arguments.call(lowers[t], u, at), at, create_graph=True)
        with torch.no_grad():
            moved = [
                rule.step(w.detach(), d.detach(), rates.at(t, i, rates.tensors), s)
                for i, (w, d, s) in enumerate(zip(at, g, slots, strict=True))
            ]
        return _Step(at, slots, g), [w for w, _ in moved], [s for _, s in moved]

    with torch.no_grad():
        before = arguments.call(upper, u, weights)
    with torch.enable_grad():
        u = [each.requires_grad_() for each in u]
        starts: list[tuple[list[Tensor], list[Slots]]] = []
        kept: list[_Step] = []  # of the last chunk
        for t in range(steps):
            if t % chunk == 0:
                starts.append((weights, slots))
            step, weights, slots = taken(t, weights, slots)
            if t >= (steps - 1) // chunk * chunk:
                kept.append(step)
        last = [w.requires_grad_() for w in weights]
        after = arguments.call(upper, u, last)
        total, of_weights = _split(_along([after], [*u, *last], [torch.ones_like(after)]), len(u))
        of_slots: list[dict[str, Tensor]] = [{} for _ in last]
        of_rates = [torch.zeros_like(rate) for rate in rates.tensors]
        for t in reversed(range(steps)):
            if not kept:
                at, remembered = starts[t // chunk]
                for again in range(t // chunk * chunk, t + 1):
                    step, at, remembered = taken(again, at, remembered)
                    kept.append(step)
            step = kept.pop()
            of_weights, of_slopes, of_slots, found = _back(rule, rates, t, step, of_weights, of_slots)
            of_rates = [a + b for a, b in zip(of_rates, found, strict=True)]
            wanted = [*u, *(step.weights if t > 0 or initial else [])]
            of_u, through = _split(_along(step.slopes, wanted, of_slopes), len(u))
            total = [a + b for a, b in zip(total, of_u, strict=True)]
            if t > 0 or initial:
                of_weights = [a + b for a, b in zip(of_weights, through, strict=True)]
    return Unrolled(
        gradient=rebuilt(outer, total),
        before=before.detach(),
        after=after.detach(),
        inner=rebuilt(inner, [w.detach() for w in last]),
        state=[{name: slot.detach() for name, slot in each.items()} for each in slots],
        lr_gradient=rebuilt(lr, of_rates) if rates.tensors else None,
        initial_gradient=rebuilt(inner, of_weights) if initial else None,
    )


def _back(
    rule: Rule,
    rates: _Rates,
    t: int,
    step: _Step,
    of_weights: list[Tensor],
    of_slots: list[dict[str, Tensor]],
) -> tuple[list[Tensor], list[Tensor], list[dict[str, Tensor]], list[Tensor]]:
    """Back through the rule alone: gradients of a step's results to those of its weights, slopes, slots, and of lr."""
    weights = [w.detach().requires_grad_() for w in step.weights]
    slopes = [g.detach().requires_grad_() for g in step.slopes]
    lrs = [rate.detach().requires_grad_() for rate in rates.tensors]
    slots: list[dict[str, Tensor]] = [
        {name: slot if name == "step" else slot.detach().requires_grad_() for name, slot in each.items()}
        for each in step.slots
    ]
    places = [(i, name) for i, each in enumerate(slots) for name in each if name != "step"]
    results, along = [], []
    for i, (w, g, s) in enumerate(zip(weights, slopes, slots, strict=True)):
        moved, remembered = rule.step(w, g, rates.at(t, i, lrs), s)
        names = [name for name in of_slots[i] if remembered[name].requires_grad]
        results += [moved, *(remembered[name] for name in names)]
        along += [of_weights[i], *(of_slots[i][name] for name in names)]
    inputs = [*weights, *slopes, *lrs, *(slots[i][name] for i, name in places)]
    found = _along(results, inputs, along)
    n, end = len(weights), 2 * len(weights) + len(lrs)
    earlier: list[dict[str, Tensor]] = [{} for _ in slots]
    for (i, name), gradient in zip(places, found[end:], strict=True):
        earlier[i][name] = gradient
    return found[:n], found[n : 2 * n], earlier, found[2 * n : end]


class _Rates:
    """The learning rate of every step and tensor; tensors: those that lr was given as."""

    def __init__(self, lr: float | Tree, steps: int, weights: list[Tensor]) -> None:
        self.number, self.each_step, self.tensors = lr, False, []
        if isinstance(lr, Tensor):
            if lr.shape not in ((), (steps,)):
                raise ValueError(f"lr must be a number, or a tensor of shape [] or [{steps}], not {tuple(lr.shape)}")
            self.each_step = lr.dim() == 1
        if isinstance(lr, (Tensor, tuple, list, dict)):
            self.tensors = _detached(lr, "lr")
            if not isinstance(lr, Tensor) and len(self.tensors) != len(weights):
                raise ValueError(f"lr holds {len(self.tensors)} tensors and inner {len(weights)}: give one for each")
            for rate in self.tensors:
                positive("lr", float(rate.min()))
        else:
            positive("lr", lr)

    def at(self, step: int, i: int, tensors: list[Tensor]) -> float | Tensor:
        """That of a step and a tensor, tensors: those of lr, or leaves of their values."""
        if not tensors:
            return self.number
        rate = tensors[i if len(tensors) > 1 else 0]
        return rate[step] if self.each_step else rate


def _checked(state: Sequence[Slots], weights: list[Tensor]) -> list[Slots]:
    if len(state) != len(weights):
        raise ValueError(f"state holds {len(state)} dicts and inner {len(weights)} tensors: give one for each")
    for slots, w in zip(state, weights, strict=True):
        for name, slot in slots.items():
            if slot is not None and slot.numel() not in (1, w.numel()):
                raise ValueError(f"state's {name} must have the shape of its tensor, {tuple(w.shape)}")
    return [{name: slot.detach() for name, slot in each.items() if slot is not None} for each in state]


def _detached(tree: Tree, name: str) -> list[Tensor]:
    return [t.detach() for t in leaves(tree, name)]


def _split(values: list[Tensor], at: int) -> tuple[list[Tensor], list[Tensor]]:
    return values[:at], values[at:]


def _along(values: Sequence[Tensor], wanted: list[Tensor], directions: Sequence[Tensor]) -> list[Tensor]:
    """d <values, directions> / d wanted; 0 where nothing depends on it."""
    return filled(along(values, wanted, directions, keep=False), wanted)
