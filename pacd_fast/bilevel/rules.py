"""Optimisers' steps as functions of weight, gradient, learning rate and state that can be differentiated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from pacd_fast.arguments import not_negative, positive

__all__ = ["SGD", "Adam", "AdamW", "Rule", "Slots", "TorchRule"]

Slots: TypeAlias = Mapping[str, Tensor]
"""What an optimiser remembers of one tensor, by torch.optim's names (momentum_buffer, exp_avg, step); {} at the
start."""


class Rule(Protocol):
    """An optimiser's step on one tensor; torch operators alone, nothing in place."""

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


class TorchRule:
    """The steps of any torch.optim optimiser that has `differentiable=True`, by that option: RMSprop, Adagrad, NAdam,
    ...

    Its gradient is NaN where plain autograd's is: at the square root of a second moment that is 0.
    """

    def __init__(self, optimizer: type[torch.optim.Optimizer], **settings: Any) -> None:
        """optimizer: the class; settings: its arguments but lr."""
        self.optimizer, self.settings = optimizer, settings

    def step(self, weight: Tensor, gradient: Tensor, lr: float | Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        moved = weight.clone()
        moved.grad = gradient
        one: Any = self.optimizer([moved], lr=lr, differentiable=True, foreach=False, **self.settings)
        one.state[moved].update({name: slot.clone() for name, slot in slots.items()})
        one.step()
        return moved, {name: slot for name, slot in one.state[moved].items() if isinstance(slot, Tensor)}
