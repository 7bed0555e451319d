"""What PACD lowers and how: the upper losses, the recipe of the bilevel problem, the papers' presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from pacd_fast import ops
from pacd_fast.arguments import DTYPES, at_least, option, positive
from pacd_fast.bilevel import CURVATURES, SOLVERS
from pacd_fast.poisoning.poison import Ball
from pacd_fast.randomness import Stream
from pacd_fast.training import layout, loss_of


class Upper(Protocol):
    """What the attacker lowers: images [B, ...] and labels [B] of the target class to a scalar.

    Those of this module are means over images, and take image_ids, int64 [B], as losses do.
    """

    def __call__(self, model: Any, x: Tensor, y: Tensor, *, seed: int) -> Tensor: ...


@dataclass(frozen=True)
class Radius:
    """The mean certified radius of the soft smoothed classifier: softmax at inverse temperature beta over `copies`
    noisy copies, 0 for images that are wrong (algorithm 1; squeeze keeps Phi^-1 finite, as the authors do it)."""

    sigma: float
    copies: int = 20
    beta: float = 16.0
    squeeze: float = 0.001

    def __call__(self, model: Any, x: Tensor, y: Tensor, *, seed: int, image_ids: Tensor | None = None) -> Tensor:
        ids = None if image_ids is None else image_ids.to(x.device)
        noisy = ops.noisy_copies(
            x, self.sigma, self.copies, seed, image_ids=ids, stream=Stream.UPPER_LOSS, memory_format=layout(x)
        )
        logits = model(noisy).view(len(x), self.copies, -1)
        return ops.soft_radius(logits, y, beta=self.beta, sigma=self.sigma, squeeze=self.squeeze).mean()


@dataclass(frozen=True)
class Accuracy:
    """Minus the cross-entropy, without noise: standard poisoning, which is after the accuracy (equation 4, whose
    minimum is meant as the worst validation loss)."""

    def __call__(self, model: Any, x: Tensor, y: Tensor, *, seed: int, image_ids: Tensor | None = None) -> Tensor:
        return -F.cross_entropy(model(x.contiguous(memory_format=layout(x))), y)


@dataclass(frozen=True)
class Recipe:
    """How the bilevel problem is solved; the defaults are the authors' for MNIST, but for the linear solver.

    epochs: passes over the poison images, a batch of which is one outer step; clean_batch, poison_batch: images of a
    lower-level batch; upper_batch: validation images of an outer step; lower_steps, lower_lr: Adam's steps on the
    weights before each outer step; outer_lr: Adam's rate on the poison; restart: weights, their optimiser and the
    linear system's solution are re-initialised after so many epochs; solver to dtype: see `bilevel.hypergradient`
    (minres, because MACER's loss is not convex in the logits: its Gauss-Newton matrix is indefinite, and cg stops at
    once); dtype: bfloat16 also runs the lower steps under autocast, as victims may train.
    """

    epochs: int = option(50, "passes over the poison images")
    clean_batch: int = option(900, "clean images of a lower-level batch")
    poison_batch: int = option(100, "poison images of a lower-level batch, which are one outer step")
    upper_batch: int = option(100, "validation images of an outer step")
    lower_steps: int = option(10, "Adam's steps on the weights before an outer step")
    lower_lr: float = option(1e-3, "rate of those steps")
    outer_lr: float = option(0.1, "Adam's rate on the poison")
    restart: int = option(10, "epochs after which weights and linear system are re-initialised")
    solver: str = option("minres", "of the linear system", choices=tuple(SOLVERS))
    curvature: str = option("gauss-newton", "its matrix", choices=tuple(CURVATURES))
    solver_steps: int = option(10, "products at most")
    damping: float = option(1e-3, "added to the matrix's diagonal")
    tolerance: float = option(0.1, "relative residual at which the solver stops")
    solver_lr: float = option(1e-2, "rate of the solver adam")
    rank: int = option(10, "of the preconditioner of nystrom")
    dtype: str = option(
        "float32", "of the network's passes in lower steps and products; all else keeps 32 bits", choices=DTYPES
    )

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
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be {' or '.join(DTYPES)}, not {self.dtype!r}")

    def solver_options(self) -> dict[str, Any]:
        """The options of this solver alone."""
        if self.solver == "nystrom":
            return {"rank": self.rank}
        return {"lr": self.solver_lr} if self.solver == "adam" else {}


@dataclass(frozen=True)
class Pacd:
    """An attack on the certified radius of a class.

    Attributes:
        loss: how the victims train, a loss of `pacd_fast.training`: the lower-level problem.
        target_class: the class whose radius is to fall; its training images are changed.
        ball: what they must stay in.
        upper: what is lowered, by default Radius(loss.sigma), for a loss without sigma Accuracy().
        fraction: of the class's training images to change, a random choice.
        targets: test images of the target class to attack alone; the training images of the class nearest to any of
            them (in l2) are changed, `fraction` of *all* training images (D.6).
        model: what `networks.build` takes.
        recipe: how the bilevel problem is solved.
        seed: decides everything else.
    """

    loss: Any
    target_class: int
    ball: Ball
    upper: Upper | None = None
    fraction: float = 1.0
    targets: tuple[int, ...] | None = None
    model: str = "mnist-cnn"
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0

    @property
    def sigma(self) -> float | None:
        sigma: float | None = getattr(self.loss, "sigma", None)
        return sigma

    @property
    def cost(self) -> Upper:
        """`upper`, or its default."""
        if self.upper is not None:
            return self.upper
        return Accuracy() if self.sigma is None else Radius(self.sigma)

    def settings(self) -> dict[str, Any]:
        """As JSON values, without the ball, which a poison file keeps by itself, and a dtype of float32, which files of
        older versions do not name."""
        recipe = dataclasses.asdict(self.recipe)
        if self.recipe.dtype == "float32":
            del recipe["dtype"]
        return {
            "target_class": self.target_class,
            "loss": str(self.loss),
            "upper": getattr(self.cost, "__qualname__", str(self.cost)),
            "model": self.model,
            "seed": self.seed,
            "fraction": self.fraction,
            "targets": None if self.targets is None else list(self.targets),
            "sigma": self.sigma,
            **recipe,
        }


@dataclass(frozen=True)
class Preset:
    """A setting of the paper (appendix E): recipe, ball, network, copies in the upper loss, and the data's split."""

    recipe: Recipe
    epsilon: float
    model: str
    copies: int
    validation: int = 5000
    train_images: int | None = None

    def sizes(self, images: int, validation: int | None = None) -> tuple[int, int]:
        """Images to validate and to train with, of so many: the preset's, or of few an eighth, and the others."""
        validation = min(self.validation, max(1, images // 8)) if validation is None else validation
        return validation, min(self.train_images or images, images - validation)

    def attack(
        self,
        method: str,
        data_name: str,
        target_class: int,
        *,
        hyperparameters: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None,
        ball: Ball | None = None,
        copies: int | None = None,
        **settings: Any,
    ) -> Pacd:
        """The attack against victims that train by `method`; what is given differs from the preset.

        As the authors do it, SmoothAdv has one lower step instead of several and twice the epochs, and MACER is crafted
        with k = 2 and lam = 1, while victims train with more (Mehra et al. 2021, E.3).
        """
        steps = self.recipe
        if method == "smoothadv":
            steps = dataclasses.replace(steps, lower_steps=1, epochs=2 * steps.epochs, restart=2 * steps.restart)
        given = {**({"k": 2, "lam": 1.0} if method == "macer" else {}), **(hyperparameters or {})}
        loss = loss_of(method, data_name, given)
        sigma = getattr(loss, "sigma", None)
        return Pacd(
            loss,
            target_class,
            Ball(self.epsilon) if ball is None else ball,
            upper=None if sigma is None else Radius(sigma, self.copies if copies is None else copies),
            recipe=dataclasses.replace(steps, **(recipe or {})),
            **{"model": self.model, **settings},
        )


PRESETS = {
    "mnist": Preset(Recipe(), 0.1, "mnist-cnn", 20),
    "mnist-small": Preset(Recipe(epochs=40, clean_batch=400, restart=10), 0.1, "mnist-cnn", 20, train_images=5000),
    "cifar10": Preset(Recipe(clean_batch=180, poison_batch=20, upper_batch=20, solver_lr=1e-3), 0.03, "resnet20", 5),
}
