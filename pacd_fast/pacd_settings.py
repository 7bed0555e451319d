"""What PACD lowers and how: the upper losses, the recipe of the bilevel problem, the papers' presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from pacd_fast import ops
from pacd_fast.bilevel import CURVATURES, SOLVERS
from pacd_fast.losses import at_least, layout, positive

__all__ = ["PRESETS", "Accuracy", "Preset", "Radius", "Recipe", "Upper"]

UPPER_STREAM = 4  # the noise of the upper loss; training's is 2, evaluation's 3


class Upper(Protocol):
    """What the attacker lowers: images [B, ...] and labels [B] of the target class to a scalar."""

    def __call__(self, model: Any, x: Tensor, y: Tensor, *, seed: int) -> Tensor: ...


@dataclass(frozen=True)
class Radius:
    """The mean certified radius of the soft smoothed classifier: softmax at inverse temperature beta over `copies`
    noisy copies, 0 for images that are wrong (algorithm 1; squeeze keeps Phi^-1 finite, as the authors do it)."""

    sigma: float
    copies: int = 20
    beta: float = 16.0
    squeeze: float = 0.001

    def __call__(self, model: Any, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
        noisy = ops.noisy_copies(x, self.sigma, self.copies, seed, stream=UPPER_STREAM, memory_format=layout(x))
        logits = model(noisy).view(len(x), self.copies, -1)
        return ops.soft_radius(logits, y, beta=self.beta, sigma=self.sigma, squeeze=self.squeeze).mean()


@dataclass(frozen=True)
class Accuracy:
    """Minus the cross-entropy, without noise: standard poisoning, which is after the accuracy (equation 4, whose
    minimum is meant as the worst validation loss)."""

    def __call__(self, model: Any, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
        return -F.cross_entropy(model(x.contiguous(memory_format=layout(x))), y)


@dataclass(frozen=True)
class Recipe:
    """How the bilevel problem is solved; the defaults are the authors' for MNIST, but for the linear solver.

    epochs: passes over the poison images, a batch of which is one outer step; clean_batch, poison_batch: images of a
    lower-level batch; upper_batch: validation images of an outer step; lower_steps, lower_lr: Adam's steps on the
    weights before each outer step; outer_lr: Adam's rate on the poison; restart: weights, their optimiser and the
    linear system's solution start anew after so many epochs; solver to rank: see `bilevel.hypergradient` (minres,
    because MACER's loss is not convex in the logits: its Gauss-Newton matrix is indefinite, and cg stops at once).
    """

    epochs: int = 50
    clean_batch: int = 900
    poison_batch: int = 100
    upper_batch: int = 100
    lower_steps: int = 10
    lower_lr: float = 1e-3
    outer_lr: float = 0.1
    restart: int = 10
    solver: str = "minres"
    curvature: str = "gauss-newton"
    solver_steps: int = 10
    damping: float = 1e-3
    tolerance: float = 0.1
    solver_lr: float = 1e-2
    rank: int = 10

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "clean_batch",
            "poison_batch",
            "upper_batch",
            "lower_steps",
            "restart",
            "solver_steps",
            "rank",
        ):
            at_least(name, getattr(self, name), 1)
        for name in ("lower_lr", "outer_lr", "solver_lr"):
            positive(name, getattr(self, name))
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), not {self.tolerance}")
        if self.solver not in SOLVERS:
            raise ValueError(f"unknown solver {self.solver!r}: give {', '.join(SOLVERS)}")
        if self.curvature not in CURVATURES:
            raise ValueError(f"unknown curvature {self.curvature!r}: give {' or '.join(CURVATURES)}")

    def solver_options(self) -> dict[str, Any]:
        """The options of this solver alone."""
        if self.solver == "nystrom":
            return {"rank": self.rank}
        return {"lr": self.solver_lr} if self.solver == "adam" else {}


@dataclass(frozen=True)
class Preset:
    """A setting of the paper (appendix E): recipe, ball, network, copies in the upper loss, and the data's split."""

    recipe: Recipe
    epsilon: float
    model: str
    copies: int
    validation: int = 5000
    train_images: int | None = None


PRESETS = {
    "mnist": Preset(Recipe(), 0.1, "mnist-cnn", 20),
    "mnist-small": Preset(Recipe(epochs=40, clean_batch=400, restart=10), 0.1, "mnist-cnn", 20, train_images=5000),
    "cifar10": Preset(Recipe(clean_batch=180, poison_batch=20, upper_batch=20, solver_lr=1e-3), 0.03, "resnet20", 5),
}
