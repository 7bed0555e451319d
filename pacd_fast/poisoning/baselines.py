"""What an attack is compared with: uniform noise and watermarks, on the images of a class or on those of a poison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pacd_fast.data import Dataset, as_float
from pacd_fast.poisoning.pacd_crafting import choose
from pacd_fast.poisoning.poison import Ball, Poison
from pacd_fast.randomness import Purpose, mix


def random(data: Dataset, *, target_class: int, ball: Ball, fraction: float = 1.0, seed: int = 0) -> Poison:
    """The control: noise that is uniform in the ball, on a share of the training images of a class."""
    chosen = choose(data, target_class, fraction, None, seed)
    settings = {"target_class": target_class, "fraction": fraction, "seed": seed}
    return _noise(data, chosen, ball, seed, settings)


def watermark(
    data: Dataset, *, target_class: int, ball: Ball, fraction: float = 1.0, opacity: float = 0.1, seed: int = 0
) -> Poison:
    """A random image of another class over every image of a class, brought into the ball.

    Shafahi et al. 2018; Mehra et al. 2021, E.3.

    opacity: u = opacity * other + (1 - opacity) * base, in (0, 1).  Raises ValueError for numbers out of range, a class
    that is not there, or no image of another class.
    """
    if not 0 < opacity < 1:
        raise ValueError(f"opacity must be in (0, 1), not {opacity}")
    chosen = choose(data, target_class, fraction, None, seed)
    others = (data.y_train != target_class).nonzero().flatten()
    if len(others) == 0:
        raise ValueError(f"{data.name} has no image of another class than {target_class} to lay over")
    draw = torch.randint(len(others), (len(chosen),), generator=torch.Generator().manual_seed(seed))
    settings = {"target_class": target_class, "fraction": fraction, "seed": seed, "opacity": opacity}
    return _overlay(data, chosen, as_float(data.x_train[others[draw]]), opacity, ball, settings)


def noise_beside(poison: Poison, data: Dataset, seed: int = 0) -> Poison:
    """Uniform noise in a poison's ball on the same images."""
    return _noise(data, poison.index, poison.ball, mix(seed, Purpose.BASELINE_NOISE), poison.settings)


def watermark_beside(poison: Poison, data: Dataset, opacity: float = 0.1) -> Poison:
    """A targeted poison's targets laid over the same images, in turn, then brought into its ball."""
    targets = as_float(data.x_test[list(poison.targets_aim().target_index)])
    other = targets[torch.arange(len(poison.index)) % len(targets)]
    return _overlay(data, poison.index, other, opacity, poison.ball, poison.settings)


def _noise(data: Dataset, index: Tensor, ball: Ball, seed: int, settings: Mapping[str, Any]) -> Poison:
    u = ball.fill(as_float(data.x_train[index]), torch.Generator().manual_seed(seed))
    return Poison.craft("random", data, index, u, ball, settings)


def _overlay(
    data: Dataset, index: Tensor, other: Tensor, opacity: float, ball: Ball, settings: Mapping[str, Any]
) -> Poison:
    base = as_float(data.x_train[index])
    u = ball.project(opacity * other + (1 - opacity) * base, base)
    return Poison.craft("watermark", data, index, u, ball, settings)
