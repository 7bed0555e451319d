"""Poisoned training images: the ball they must stay in, the file that carries them, and putting them into data."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pacd_fast.arguments import positive, writable
from pacd_fast.data import UNREADABLE, Dataset, as_float, open_npz
from pacd_fast.files import reason, replaced

NORMS = ("linf", "l2")


@dataclass(frozen=True)
class Ball:
    """The perturbations that are allowed: ||u - base|| <= epsilon an image, in the norm linf or l2, and u in [0, 1].

    Pixels count from 0 to 1.  Raises ValueError where epsilon is not positive and finite or the norm is unknown.
    """

    epsilon: float
    norm: str = "linf"

    def __post_init__(self) -> None:
        positive("epsilon", self.epsilon)
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}: give linf or l2")

    def project(self, u: Tensor, base: Tensor) -> Tensor:
        """The nearest allowed images: u, base [B, ...] in float; base in [0, 1].

        For l2 the ball first and then the box, which never leads out of the ball again.
        """
        if self.norm == "linf":
            return torch.maximum(torch.minimum(u, base + self.epsilon), base - self.epsilon).clamp(0, 1)
        delta = u - base
        norm = delta.flatten(1).norm(dim=1).clamp(min=1e-30).view(-1, *[1] * (u.dim() - 1))
        return (base + delta * (self.epsilon / norm).clamp(max=1.0)).clamp(0, 1)

    def fill(self, base: Tensor, generator: torch.Generator) -> Tensor:
        """Images uniform in the ball around base [B, ...], then clipped to [0, 1]; noise drawn on the CPU."""
        if self.norm == "linf":
            noise = (2 * torch.rand(base.shape, generator=generator) - 1) * self.epsilon
        else:
            noise = torch.randn(base.shape, generator=generator)
            length = torch.rand(len(base), generator=generator).pow(1 / base[0].numel()) * self.epsilon
            noise *= (length / noise.flatten(1).norm(dim=1)).view(-1, *[1] * (base.dim() - 1))
        return (base + noise.to(base)).clamp(0, 1)

    def distortion(self, images: Tensor, base: Tensor) -> Tensor:
        """||images - base|| an image: float64 [B].  uint8 images are taken as k / 255, exactly."""
        if images.dtype != base.dtype:
            raise ValueError(f"images and base differ in dtype: {images.dtype} and {base.dtype}")
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        delta = (images.double() - base.double()).flatten(1)
        return delta.abs().amax(1) / scale if self.norm == "linf" else delta.norm(dim=1) / scale

    def check(self, data: Dataset) -> None:
        """Raises ValueError where no image of the data can move."""
        if data.x_train.dtype == torch.uint8 and self.epsilon < 1 / 255:
            raise ValueError(f"epsilon {self.epsilon:g} is below 1/255, the step of 8-bit images: give more")

    def rounded(self, u: Tensor, base: Tensor) -> Tensor:
        """u [B, ...] in the dtype of the base images, within the ball as `distortion` measures it.

        For uint8, linf: the nearest of the levels in the ball; l2: levels rounded towards the base.  For float images
        the projection, shrunk by what rounding may have added.
        """
        if base.dtype == torch.uint8:
            delta = 255.0 * (u.double().cpu() - as_float(base).double().cpu())
            if self.norm == "linf":
                reach = next(k for k in range(min(255, int(255 * self.epsilon) + 1), -1, -1) if k / 255 <= self.epsilon)
                delta = delta.round().clamp(-reach, reach)
            else:  # u is in float32, so that a whole level may come as 0.99999 of one
                sign, size = delta.sign(), delta.abs()
                delta = sign * (size + 1e-4).floor()
                over = delta.flatten(1).norm(dim=1) / 255 > self.epsilon
                delta[over] = sign[over] * (size[over] - 1e-4).clamp(min=0).floor()
            return (base.cpu().double() + delta).clamp(0, 255).to(torch.uint8)
        base = base.cpu()
        images = self.project(u.cpu().to(base.dtype), base)
        for power in range(-20, 0):
            over = self.distortion(images, base) > self.epsilon
            images[over] = base[over] + (images[over] - base[over]) * (1 - 2.0**power)
        return images


@dataclass(frozen=True)
class ClassAim:
    """Poison against the certified radius of a class; targets: of these test images of it alone, None for all of it.

    sigma: the noise of the victims it was crafted against, None for victims without noise and for baselines.
    """

    target_class: int
    targets: tuple[int, ...] | None = None
    sigma: float | None = None


@dataclass(frozen=True)
class TargetsAim:
    """Poison that makes victims take the test images target_index for adversarial_class."""

    target_index: tuple[int, ...]
    adversarial_class: int


@dataclass(frozen=True, eq=False)
class Poison:
    """Replacements for some training images, their labels unchanged.

    attack: how they were made; index: int64 [P], ascending, which images of the training split; images: [P, C, H, W] in
    the data set's dtype; labels: int64 [P], those of the data set; data: the data set's "name@fingerprint";
    settings: whatever else describes the attack (JSON values), such as target_class, sigma, train_images, validation.
    """

    attack: str
    index: Tensor
    images: Tensor
    labels: Tensor
    ball: Ball
    data: str
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def craft(
        cls, attack: str, data: Dataset, index: Tensor, u: Tensor, ball: Ball, settings: Mapping[str, Any]
    ) -> Poison:
        """Poison from images u [P, ...] in float that replace data.x_train[index]; they are brought into the ball."""
        index = index.cpu()
        ball.check(data)
        images = ball.rounded(u.detach(), data.x_train[index])
        name = f"{data.name}@{data.fingerprint}"
        held = {"train_images": len(data.x_train), "validation": len(data.x_val)}
        return cls(attack, index, images, data.y_train[index].clone(), ball, name, {**held, **settings})

    @property
    def aim(self) -> ClassAim | TargetsAim | None:
        """What the settings say it is for; None where they do not.  Raises ValueError where they make no sense."""
        settings = self.settings

        def whole(name: str) -> int:
            if type(settings[name]) is not int or settings[name] < 0:
                raise ValueError(f"the poison's {name} is {settings[name]!r}, not a class")
            return int(settings[name])

        def images(name: str) -> tuple[int, ...] | None:
            value = settings.get(name)
            if value is None:
                return None
            if not isinstance(value, list) or not value or any(type(i) is not int or i < 0 for i in value):
                raise ValueError(f"the poison's {name} is {value!r}, not a list of test images")
            return tuple(value)

        if "adversarial_class" in settings:
            if (targets := images("target_index")) is None:
                raise ValueError("the poison has an adversarial_class and no target_index")
            return TargetsAim(targets, whole("adversarial_class"))
        if settings.get("target_class") is None:
            return None
        sigma = settings.get("sigma")
        if sigma is not None:
            positive("the poison's sigma", sigma)
        return ClassAim(whole("target_class"), images("targets"), sigma)

    def targets_aim(self) -> TargetsAim:
        """`aim` of targeted poison; ValueError for poison of another kind."""
        aim = self.aim
        if not isinstance(aim, TargetsAim):
            raise ValueError(
                f"the poison ({self.attack}) names no target images: only targeted poison is judged by them"
            )
        return aim

    def distortion(self, data: Dataset) -> Tensor:
        """How far every image is from the data set's own, in the ball's norm: float64 [P]."""
        return self.ball.distortion(self.images, data.x_train[self.index])

    def apply(self, data: Dataset) -> Dataset:
        """The data set with its poison in.

        Raises ValueError, one line that says what to do, where the poison is not for these data (another name, order,
        size or labels), or is farther from them than its epsilon.
        """
        here = f"{data.name}@{data.fingerprint}"
        if here != self.data:
            raise ValueError(
                f"the poison was made for {self.data} and these data are {here}: give the same --data, --validation "
                f"{self.settings.get('validation')} and --train-images {self.settings.get('train_images')}"
            )
        if len(self.index) and int(self.index[-1]) >= len(data.x_train):
            raise ValueError(
                f"the poison replaces training image {int(self.index[-1])} and there are {len(data.x_train)}: give the "
                "same --validation and --train-images as for crafting"
            )
        if self.images.dtype != data.x_train.dtype or self.images.shape[1:] != data.x_train.shape[1:]:
            raise ValueError("the poison's images have another dtype or shape than the data's")
        if not torch.equal(self.labels, data.y_train[self.index]):
            raise ValueError("the poison's labels are not the data's: it was made for another order of the images")
        farthest = float(self.distortion(data).max()) if len(self.index) else 0.0
        if not farthest <= self.ball.epsilon:  # NaN is neither
            raise ValueError(
                f"the poison is {farthest:.6g} from the data, farther than its epsilon {self.ball.epsilon:g}"
            )
        images = data.x_train.clone()
        images[self.index] = self.images
        return dataclasses.replace(data, x_train=images)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an .npz that appears whole or not at all.  Raises FileNotFoundError where the folder is not there."""
        path = writable(path)
        about = {
            "attack": self.attack,
            "epsilon": self.ball.epsilon,
            "norm": self.ball.norm,
            "data": self.data,
            "settings": self.settings,
        }
        with replaced(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(
                file,
                index=self.index.numpy(),
                images=self.images.numpy(),
                labels=self.labels.numpy(),
                about=np.array(json.dumps(about)),
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Poison:
        """Reads what `save` wrote; nothing in the file is executed.

        Raises FileNotFoundError where there is none, ValueError for another kind of file.
        """
        with open_npz(path, "poison file") as file:
            file.look(("index", "images", "labels", "about"))
            arrays = {name: file.read(name) for name in file.declared}
        try:
            about = json.loads(str(arrays["about"]))
            ball = Ball(float(about["epsilon"]), about["norm"])
            index, images, labels = (torch.from_numpy(arrays[name]) for name in ("index", "images", "labels"))
            sound = (
                index.dtype == labels.dtype == torch.int64
                and images.dtype in (torch.uint8, torch.float32)
                and index.shape == labels.shape == images.shape[:1]
                and bool((index.diff() > 0).all())
                and len(index) > 0
                and int(index[0]) >= 0
                and ball.epsilon <= (1.0 if ball.norm == "linf" else images[0].numel() ** 0.5)
                and isinstance(about["settings"], dict)
            )
            found = cls(str(about["attack"]), index, images, labels, ball, str(about["data"]), about["settings"])
        except (*UNREADABLE, RecursionError) as error:
            raise ValueError(f"{path} is not a poison file ({reason(error)})") from error
        if not sound:
            raise ValueError(f"{path} is not a poison file: its arrays do not fit each other")
        return found
