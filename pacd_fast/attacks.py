"""Attacks through the training data, one function each: all return `poison.Poison`."""

from __future__ import annotations

import torch

from pacd_fast.datasets import Dataset, as_float
from pacd_fast.losses import Standard
from pacd_fast.metapoison import MetaPoison, metapoison
from pacd_fast.pacd import Accuracy, Radius, Recipe, choose, pacd
from pacd_fast.poison import Ball, Poison

__all__ = ["Accuracy", "MetaPoison", "Radius", "Recipe", "metapoison", "pacd", "random", "standard", "watermark"]


def standard(data: Dataset, **arguments: object) -> Poison:
    """Poison that lowers the accuracy of victims without noise (equation 4); arguments as for `pacd`, but loss."""
    return pacd(data, Standard(), **arguments)  # type: ignore[arg-type]


def random(
    data: Dataset, *, target_class: int, epsilon: float, norm: str = "linf", fraction: float = 1.0, seed: int = 0
) -> Poison:
    """The control: noise that is uniform in the ball.  Arguments as for `pacd`."""
    chosen, ball = choose(data, target_class, fraction, None, seed), Ball(epsilon, norm)
    u = ball.fill(as_float(data.x_train[chosen]), torch.Generator().manual_seed(seed))
    return Poison.craft("random", data, chosen, u, ball, _settings(target_class, fraction, seed))


def watermark(
    data: Dataset,
    *,
    target_class: int,
    epsilon: float,
    norm: str = "linf",
    fraction: float = 1.0,
    opacity: float = 0.1,
    seed: int = 0,
) -> Poison:
    """A random image of another class over every image, brought into the ball (Shafahi et al. 2018; PACD, E.3).

    opacity: u = opacity * other + (1 - opacity) * base.  Other arguments as for `pacd`.

    Raises:
        ValueError: as `pacd`; opacity outside (0, 1); no image of another class.
    """
    if not 0 < opacity < 1:
        raise ValueError(f"opacity must be in (0, 1), not {opacity}")
    chosen, ball = choose(data, target_class, fraction, None, seed), Ball(epsilon, norm)
    others = (data.y_train != target_class).nonzero().flatten()
    if len(others) == 0:
        raise ValueError(f"{data.name} has no image of another class than {target_class} to lay over")
    draw = torch.randint(len(others), (len(chosen),), generator=torch.Generator().manual_seed(seed))
    base, other = as_float(data.x_train[chosen]), as_float(data.x_train[others[draw]])
    u = ball.project(opacity * other + (1 - opacity) * base, base)
    return Poison.craft(
        "watermark", data, chosen, u, ball, {**_settings(target_class, fraction, seed), "opacity": opacity}
    )


def _settings(target_class: int, fraction: float, seed: int) -> dict[str, object]:
    return {"target_class": target_class, "fraction": fraction, "seed": seed}
