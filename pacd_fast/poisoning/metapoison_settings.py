"""The settings of MetaPoison, and what crafting makes small."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pacd_fast.arguments import at_least, not_negative, option, positive, seed_in_range
from pacd_fast.data import Dataset
from pacd_fast.poisoning.poison import Ball

OBJECTIVES = ("cross-entropy", "carlini-wagner")


def margin(logits: Tensor, adversarial_class: int) -> Tensor:
    """The Carlini-Wagner margin: the largest other logit minus that of the adversarial class, [B, K] -> [B].

    Negative where the attack has what it wants (Carlini and Wagner 2017, f6).
    """
    others = logits.clone()
    others[:, adversarial_class] = -math.inf
    return others.amax(1) - logits[:, adversarial_class]


def adversarial_loss(logits: Tensor, adversarial_class: int, objective: str, confidence: float = 0.0) -> Tensor:
    """What crafting makes small, averaged over the targets [B, K] -> scalar.

    cross-entropy to the adversarial class, or the margin, which stops to count once it is below -confidence.
    """
    if objective == "cross-entropy":
        return F.cross_entropy(logits, torch.full_like(logits[:, 0], adversarial_class, dtype=torch.int64))
    return margin(logits, adversarial_class).clamp(min=-confidence).mean()


@dataclass(frozen=True)
class MetaPoison:
    """The settings of an attack; by default the authors'.

    target_index: test images that are to be taken for adversarial_class, which none of them is of; poison_class: the
    class whose first budget * N training images are perturbed, within ball; a poison_class other than
    adversarial_class is the third-party attack, several targets the multi-target attack (sections 3.6).

    model: see `networks.build`; epochs: T, after which a surrogate starts again; surrogates: M, the m-th (from 0)
    begins pretrained to floor(m T / M) epochs; batch_size, lr, momentum: of the surrogates' SGD, whose rate falls to a
    tenth at the shares `drops` of T; unroll: SGD steps to look ahead, at the same rate, without momentum.

    steps, craft_lr: of Adam on the perturbation, the rate in units of epsilon, a tenth of it from 60 % and a hundredth
    from 80 % of the steps on; objective, confidence: see `adversarial_loss`; recompute: see `unrolled`'s checkpoint
    (not for networks with dropout, whose second evaluation would differ).

    Raises ValueError for settings out of range.
    """

    poison_class: int
    adversarial_class: int
    target_index: tuple[int, ...] = (0,)
    budget: float = option(0.1, "share of the training images that is perturbed")
    ball: Ball = field(default_factory=lambda: Ball(16 / 255))
    model: str = option("resnet20", "the surrogates' network")
    surrogates: int = option(24, "networks that are trained side by side")
    unroll: int = option(2, "SGD steps to look ahead")
    steps: int = option(60, "crafting steps, an epoch of every surrogate each")
    craft_lr: float = option(0.25, "Adam's first rate on the perturbation, in units of epsilon")
    objective: str = option("cross-entropy", "what is made small on the targets", choices=OBJECTIVES)
    confidence: float = option(0.0, "margin after which carlini-wagner stops")
    epochs: int = option(100, "of a surrogate, which then starts again")
    batch_size: int = option(125, "of the surrogates")
    lr: float = option(0.1, "of the surrogates")
    momentum: float = option(0.9, "of the surrogates' SGD")
    drops: tuple[float, ...] = option(
        (0.4, 0.6, 0.8),
        "shares of the epochs after which the surrogates' rate is a tenth of what it was",
        metavar="SHARE",
    )
    recompute: bool = option(False, "save memory: evaluate unrolled steps twice")
    seed: int = option(0, "of everything that is drawn")

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_index", tuple(int(i) for i in self.target_index))
        object.__setattr__(self, "drops", tuple(float(share) for share in self.drops))
        if not self.target_index or len(set(self.target_index)) < len(self.target_index):
            raise ValueError(f"target_index must name one or more different test images, not {self.target_index}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget must be in (0, 1], the share of the training images, not {self.budget}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {self.objective!r}: give {' or '.join(OBJECTIVES)}")
        if not all(0 < share < 1 for share in self.drops):
            raise ValueError(f"drops must be shares of the epochs in (0, 1), not {self.drops}")
        for name in ("surrogates", "unroll", "steps", "epochs", "batch_size"):
            at_least(name, getattr(self, name), 1)
        for name in ("craft_lr", "lr"):
            positive(name, getattr(self, name))
        not_negative("confidence", self.confidence)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), not {self.momentum}")
        seed_in_range(self.seed)

    def chosen(self, data: Dataset) -> tuple[Tensor, list[int]]:
        """The training images to perturb, int64 [P], ascending, and the labels of the targets.

        Raises ValueError, one line that says what to do, where data and settings do not fit.
        """
        for name in ("poison_class", "adversarial_class"):
            if not 0 <= getattr(self, name) < data.num_classes:
                raise ValueError(f"{name} {getattr(self, name)} is not among the {data.num_classes} classes")
        for i in self.target_index:
            if not 0 <= i < len(data.x_test):
                raise ValueError(f"target_index {i} is out of range: there are {len(data.x_test)} test images")
        labels = data.y_test[list(self.target_index)].tolist()
        for i, label in zip(self.target_index, labels, strict=True):
            name = data.class_names[label]
            if label == self.adversarial_class:
                raise ValueError(
                    f"target {i} is of the adversarial class {name} already: choose another class or image"
                )
            if label == self.poison_class:
                raise ValueError(f"target {i} is of the poison class {name}: choose another poison class or image")
        count = math.floor(self.budget * len(data.x_train) + 1e-9)
        held = (data.y_train == self.poison_class).nonzero().flatten()
        if not 1 <= count <= len(held):
            raise ValueError(
                f"budget {self.budget:g} is {count} of {len(data.x_train)} training images, and class "
                f"{data.class_names[self.poison_class]} has {len(held)}: give a budget from "
                f"{1 / len(data.x_train):.2g} to {len(held) / len(data.x_train):.2g}"
            )
        return held[:count], labels

    def rate(self, epoch: int) -> float:
        """The surrogates' learning rate in an epoch, counted from 0."""
        return self.lr * 0.1 ** sum(epoch >= share * self.epochs for share in self.drops)

    def craft_rate(self, step: int) -> float:
        """Adam's rate on the perturbation in a crafting step, counted from 0, in pixels of [0, 1]."""
        return self.craft_lr * self.ball.epsilon * 0.1 ** sum(step >= share * self.steps for share in (0.6, 0.8))

    def start(self, number: int) -> int:
        """The epochs that a surrogate is trained for before crafting."""
        return number * self.epochs // self.surrogates

    def settings(self) -> dict[str, Any]:
        """As JSON values, without the ball, which a poison file keeps by itself."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items() if k != "ball"}
