"""Training losses with one signature, loss(model, x, y, seed=...) -> scalar: standard, Gaussian, MACER, SmoothAdv.

Each is differentiable twice with respect to weights and images: the attack's lower-level problem is made of the same
objects.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pacd_fast import ops
from pacd_fast.arguments import at_least, not_negative, positive
from pacd_fast.randomness import Stream


class Loss(Protocol):
    """A training loss: images [B, ...] in [0, 1] and int64 labels [B] to a scalar.

    `seed` decides all its randomness, so that a second evaluation (a Hessian-vector product, say) sees the same noise.
    Those of this module are means over images, and take image_ids, int64 [B], which noise each image gets, by default 0
    to B - 1: with its rows' numbers a part of a batch sees the noise that it has in the whole batch.
    A loss that changes while training goes on has a method `at_epoch(epoch)` that returns the loss of that epoch.

    Those of this module are ``of_logits(model(inputs(x, seed=seed)), y)``: what the network sees, [B * copies, ...],
    and what its logits cost.  Gauss-Newton products, and with them PACD, need these two parts.
    """

    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, seed: int) -> Tensor: ...


@dataclass(frozen=True)
class Standard:
    """Cross-entropy on the images as they are."""

    def inputs(self, x: Tensor, *, seed: int, image_ids: Tensor | None = None) -> Tensor:
        return x.contiguous(memory_format=layout(x))

    def of_logits(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y)

    def __call__(
        self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, seed: int, image_ids: Tensor | None = None
    ) -> Tensor:
        return self.of_logits(model(self.inputs(x, seed=seed, image_ids=image_ids)), y)


@dataclass(frozen=True)
class Gaussian:
    """Gaussian augmentation (Cohen et al. 2019): mean cross-entropy of k noisy copies of every image."""

    sigma: float
    k: int = 1

    def __post_init__(self) -> None:
        positive("sigma", self.sigma)
        at_least("k", self.k, 1)

    def inputs(self, x: Tensor, *, seed: int, image_ids: Tensor | None = None) -> Tensor:
        return _noisy(x, self.sigma, self.k, seed, image_ids)

    def of_logits(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y.repeat_interleave(self.k))

    def __call__(
        self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, seed: int, image_ids: Tensor | None = None
    ) -> Tensor:
        return self.of_logits(model(self.inputs(x, seed=seed, image_ids=image_ids)), y)


@dataclass(frozen=True)
class Macer:
    """MACER (Zhai et al. 2020), as its authors ran it: cross-entropy of the smoothed classifier, and a larger radius.

    Over k noisy copies of every image, -log(mean softmax of the label + 1e-10), plus lam times the hinge
    gamma * sigma / 2 - radius, the radius that of the softmax at inverse temperature beta.  The hinge counts for images
    that are right and whose radius is at most gamma * sigma / 2; for the rest it is 0.  Averaged over the batch.
    """

    sigma: float
    k: int = 16
    beta: float = 16.0
    gamma: float = 8.0
    lam: float = 16.0

    def __post_init__(self) -> None:
        positive("sigma", self.sigma)
        at_least("k", self.k, 1)
        positive("beta", self.beta)
        positive("gamma", self.gamma)
        not_negative("lam", self.lam)

    def inputs(self, x: Tensor, *, seed: int, image_ids: Tensor | None = None) -> Tensor:
        return _noisy(x, self.sigma, self.k, seed, image_ids)

    def of_logits(self, logits: Tensor, y: Tensor) -> Tensor:
        logits = _by_image(logits, y)
        likelihood = ops.soft_smooth(logits).gather(1, y.unsqueeze(1)).squeeze(1)
        radius = ops.soft_radius(logits, y, beta=self.beta, sigma=self.sigma, squeeze=0.0)
        widest = self.gamma * self.sigma / 2
        hinge = torch.where((radius > 0) & (radius <= widest), widest - radius, 0.0)
        return (self.lam * hinge - (likelihood + 1e-10).log()).mean()

    def __call__(
        self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, seed: int, image_ids: Tensor | None = None
    ) -> Tensor:
        return self.of_logits(model(self.inputs(x, seed=seed, image_ids=image_ids)), y)


@dataclass(frozen=True)
class SmoothAdv:
    """SmoothAdv (Salman et al. 2019): cross-entropy of k noisy copies of adversarial images of the smoothed classifier.

    The adversarial image is found by `steps` steps of length 2 epsilon / steps along the l2-normalised gradient of
    -log(mean softmax of the label) over the same noisy copies that are then trained on, clipped to [0, 1] and to the
    ball of radius epsilon; batch norm is in eval mode meanwhile.  Where the gradient is 0 the image stays.  The
    perturbation is a constant for all derivatives of the loss: they are those of Gaussian(sigma, k) at the adversarial
    image, in the direction of x as well as of the weights.

    warmup: epochs over which `at_epoch` raises the radius from 0 to epsilon, linearly; 0 for none.  The loss itself
    uses the full epsilon.
    """

    sigma: float
    epsilon: float = 1.0
    steps: int = 2
    k: int = 1
    warmup: int = 5

    def __post_init__(self) -> None:
        positive("sigma", self.sigma)
        not_negative("epsilon", self.epsilon)
        at_least("steps", self.steps, 1)
        at_least("k", self.k, 1)
        at_least("warmup", self.warmup, 0)

    def at_epoch(self, epoch: int) -> SmoothAdv:
        """The loss of an epoch, counted from 0: its radius is epsilon * min(1, (epoch + 1) / warmup)."""
        share = min(1.0, (epoch + 1) / max(self.warmup, 1))
        return dataclasses.replace(self, epsilon=self.epsilon * share, warmup=0)

    def inputs(self, x: Tensor, *, seed: int, image_ids: Tensor | None = None) -> Tensor:
        """The noisy copies of images that are adversarial already: x plus its `perturbation`."""
        return _noisy(x, self.sigma, self.k, seed, image_ids)

    def of_logits(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y.repeat_interleave(self.k))

    def __call__(
        self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, seed: int, image_ids: Tensor | None = None
    ) -> Tensor:
        adversarial = x + self.perturbation(model, x, y, seed=seed, image_ids=image_ids)
        return self.of_logits(model(self.inputs(adversarial, seed=seed, image_ids=image_ids)), y)

    @torch.enable_grad()
    def perturbation(
        self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, seed: int, image_ids: Tensor | None = None
    ) -> Tensor:
        """What is added to x, [B, ...], without gradient."""
        x = x.detach()
        delta = torch.zeros_like(x)
        with eval_mode(model), frozen(model):
            for _ in range(self.steps if self.epsilon > 0 else 0):
                delta.requires_grad_()
                logits = model(_noisy(x + delta, self.sigma, self.k, seed, image_ids))
                (slope,) = torch.autograd.grad(_smoothed_loss(_by_image(logits, x), y), delta)
                delta = self.step(x, delta.detach(), slope, x.new_full(x.shape[:1], self.epsilon), self.steps)
        return delta.detach()

    @staticmethod
    def step(x: Tensor, delta: Tensor, slope: Tensor, radius: Tensor, steps: int) -> Tensor:
        """One of `steps` steps: 2 radius / steps along the normalised slope, then into [0, 1] and the ball.

        x, delta, slope: [B, ...]; radius: [B].
        """
        reach, norm = radius.view(-1, *[1] * (x.dim() - 1)), _norms(slope)
        delta = delta + (2 / steps) * reach * slope / torch.where(norm > 0, norm, 1.0)
        delta = (x + delta).clamp(0, 1) - x
        return delta * (reach / _norms(delta).clamp(min=1e-12)).clamp(max=1.0)


METHODS: dict[str, type[Any]] = {"standard": Standard, "gaussian": Gaussian, "macer": Macer, "smoothadv": SmoothAdv}
"""The losses by the names that the command line and checkpoints use."""


def _noisy(x: Tensor, sigma: float, k: int, seed: int, image_ids: Tensor | None) -> Tensor:
    """The k copies of every image that the model sees, [B * k, ...]; under autocast in its dtype already."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    ids = None if image_ids is None else image_ids.to(x.device)
    return ops.noisy_copies(
        x, sigma, k, seed, image_ids=ids, stream=Stream.TRAINING, memory_format=layout(x), dtype=dtype
    )


def _by_image(logits: Tensor, images: Tensor) -> Tensor:
    return logits.view(len(images), -1, logits.shape[-1])


def _smoothed_loss(logits: Tensor, y: Tensor) -> Tensor:
    """-log(mean softmax of the label), summed over images; for one copy the cross-entropy, which is stabler."""
    if logits.shape[1] == 1:
        return F.cross_entropy(logits.squeeze(1), y, reduction="sum")
    return F.nll_loss(ops.soft_smooth(logits).clamp(min=1e-20).log(), y, reduction="sum")


def _norms(x: Tensor) -> Tensor:
    """l2 norms of the images of a batch, [B, 1, ...]; small squares would underflow float32 where a network is sure."""
    return x.flatten(1).norm(dim=1, dtype=torch.float64).to(x.dtype).view(-1, *[1] * (x.dim() - 1))


@contextlib.contextmanager
def eval_mode(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Modules in eval mode, as each was afterwards; a plain function is left as it is."""
    were_training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in were_training:
        module.training = False
    try:
        yield
    finally:
        for module in were_training:
            module.training = True


@contextlib.contextmanager
def frozen(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A module's own parameters without gradients, as each was afterwards: only the images' are looked for."""
    learning = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def layout(x: Tensor) -> torch.memory_format:
    """channels_last for images: the faster layout of convolutions on the CPU."""
    return torch.channels_last if x.dim() == 4 else torch.contiguous_format
