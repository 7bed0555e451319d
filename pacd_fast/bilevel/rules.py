"""Optimisers' steps as functions of weight, gradient, learning rate and state that can be differentiated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from pacd_fast.arguments import not_negative, positive

__all__ = ["SGD", "Adam", "AdamW", "Rule", "Slots"]

Slots: TypeAlias = Mapping[str, Tensor]
"""What an optimiser remembers of one tensor, by torch.optim's names (momentum_buffer, exp_avg, step); {} at the
start."""


class Rule(Protocol):
    """An optimiser's step on one tensor: torch operators alone, nothing in place, differentiable where it is to be.

    torch's own optimisers with `differentiable=True` are no such thing: SGD's momentum begins without its graph there,
    and Adam's is NaN where a gradient has always been 0.  RMSprop would be::

        class RMSprop:
            def step(self, weight, gradient, lr, slots):
                square = 0.01 * gradient.square() + (0.99 * slots["square_avg"] if slots else 0.0)
                return weight - lr * gradient / (square + 1e-8).sqrt(), {"square_avg": square}
    """

    def step(self, weight: Tensor, gradient: Tensor, lr: float | Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        """The next weight, shaped like the weight, and what is remembered next."""


@dataclass(frozen=True)
class SGD:
    """torch.optim.SGD's steps."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        not_negative("momentum", self.momentum)
        not_negative("weight_decay", self.weight_decay)
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")

    def step(self, weight: Tensor, gradient: Tensor, lr: float | Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        if self.weight_decay:
            gradient = gradient + self.weight_decay * weight
        if not self.momentum:
            return weight - lr * gradient, {}
        buffer = slots.get("momentum_buffer")
        buffer = gradient if buffer is None else self.momentum * buffer + gradient
        move = gradient + self.momentum * buffer if self.nesterov else buffer
        return weight - lr * move, {"momentum_buffer": buffer}


@dataclass(frozen=True)
class Adam:
    """torch.optim.Adam's steps, weight decay as a part of the gradient.

    Where a gradient has always been 0 the second moment's square root has no derivative, and plain autograd gives NaN:
    it counts as 0 here.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), not {self.betas}")
        positive("eps", self.eps)
        not_negative("weight_decay", self.weight_decay)

    def step(self, weight: Tensor, gradient: Tensor, lr: float | Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        if self.weight_decay:
            gradient = gradient + self.weight_decay * weight
        return self._moved(weight, gradient, lr, slots)

    def _moved(self, weight: Tensor, gradient: Tensor, lr: float | Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        (beta1, beta2), done = self.betas, slots.get("step")
        step = torch.ones(()) if done is None else done + 1
        first, second = (1 - beta1) * gradient, (1 - beta2) * gradient.square()
        if done is not None:
            first, second = beta1 * slots["exp_avg"] + first, beta2 * slots["exp_avg_sq"] + second
        zero, t = second == 0, int(step)
        root = second.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
        move = (first / (1 - beta1**t)) / (root / (1 - beta2**t) ** 0.5 + self.eps)
        return weight - lr * move, {"step": step, "exp_avg": first, "exp_avg_sq": second}


@dataclass(frozen=True)
class AdamW(Adam):
    """torch.optim.AdamW's steps: the weights decay by themselves (Loshchilov and Hutter 2019)."""

    weight_decay: float = 1e-2

    def step(self, weight: Tensor, gradient: Tensor, lr: float | Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        return self._moved(weight - lr * self.weight_decay * weight, gradient, lr, slots)
