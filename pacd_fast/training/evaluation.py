"""How good a classifier is: accuracy, accuracy under noise, and the l2 distortion that an attack needs.

The distortion is that of Mehra et al. 2021, 4.6: PGD against the soft smoothed classifier (Salman et al. 2019).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pacd_fast import _C, ops
from pacd_fast.arguments import at_least, positive
from pacd_fast.data import as_float
from pacd_fast.randomness import Stream
from pacd_fast.tables import aligned, mean_and_deviation
from pacd_fast.training.losses import SmoothAdv, layout

RADII = tuple(10.0 ** (exponent / 10) for exponent in range(-20, 11))  # 0.01 to 10, ten per factor of ten
ROWS = 512  # rows a pass through the network


@dataclass(frozen=True)
class Evaluation:
    """One model's figures.

    labels: int64 [N]; natural: bool [N], right without noise; noisy: float64 [N], share of noisy copies that are right;
    attacked: int64 [M], the images that were attacked; distortion: float64 [M], see `distortions`.
    """

    labels: Tensor
    natural: Tensor
    noisy: Tensor
    attacked: Tensor
    distortion: Tensor


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Which images [N, ...] (uint8 or float) the model gets right as they are: bool [N], on the CPU."""
    device = next(model.parameters()).device
    parts = [model(as_float(part).to(device)).argmax(1).cpu() for part in images.split(ROWS)]
    return torch.cat(parts) == labels.cpu()


@torch.no_grad()
def _correct_under_noise(
    model: nn.Module, images: Tensor, labels: Tensor, sigma: float, copies: int, seed: int, progress: bool
) -> Tensor:
    """Share of `copies` noisy copies that the model gets right: float64 [N], on the CPU."""
    device, shares = next(model.parameters()).device, []
    parts = torch.arange(len(images)).split(max(1, ROWS // copies))
    for part in tqdm(parts, desc="under noise", unit="batch", disable=not progress):
        x, y = as_float(images[part]).to(device), labels[part].to(device)
        ids = part.to(device)
        noisy = ops.noisy_copies(
            x, sigma, copies, seed, image_ids=ids, stream=Stream.EVALUATION, memory_format=layout(x)
        )
        right = model(noisy).argmax(1).view(len(part), copies) == y.unsqueeze(1)
        shares.append(right.double().mean(1).cpu())
    return torch.cat(shares)


def distortions(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    sigma: float,
    copies: int = 20,
    iterations: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """The smallest l2 distortion by which PGD makes the soft smoothed classifier wrong: float64 [N], in pixel units.

    The classifier is the mean softmax of `copies` noisy copies, the noise fixed per image.  Radii of a grid from 0.01
    to 10, ten per factor of ten, are searched by bisection (an attack that succeeds at a radius is taken to succeed
    at every larger one); at each, PGD takes at most `iterations` steps of 2 * radius / iterations along the normalised
    gradient, from the image on, within [0, 1] and the ball (see `SmoothAdv`).  Recorded is the norm of the first
    iterate that is wrong, the smallest over all radii; 0 where the image is wrong from the start, 10 where no radius
    is enough.  An upper bound on the true distance, as every attack is.

    Args:
        model: in eval mode, on the device to use; images: float [N, ...] in [0, 1]; labels: int64 [N].
    """
    device = next(model.parameters()).device
    if device.type == "cpu":
        _C.keep_freed_memory()
    were = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    found = torch.full((len(images),), RADII[-1], dtype=torch.float64)
    if len(images) == 0:
        return found
    bar = tqdm(total=len(images), desc="distortion", unit="image", disable=not progress)
    try:
        for part in torch.arange(len(images)).split(max(1, ROWS // copies)):
            x, y = images[part].to(device), labels[part].to(device)
            attack = _Attack(model, sigma, copies, iterations, seed)
            smallest = attack.run(x, y, part.to(device), torch.zeros(len(part), device=device), 0)
            low = torch.full_like(y, -1)  # radii up to this one fail, and from `high` on they succeed
            high = torch.where(smallest == 0, 0, len(RADII))
            radii = x.new_tensor(RADII)
            while bool((high - low > 1).any()):
                open_ = (high - low > 1).nonzero().flatten()
                middle = (low + high)[open_] // 2
                norm = attack.run(x[open_], y[open_], part.to(device)[open_], radii[middle], iterations)
                won = norm.isfinite()
                high[open_] = torch.where(won, middle, high[open_])
                low[open_] = torch.where(won, low[open_], middle)
                smallest[open_] = torch.minimum(smallest[open_], norm)
            found[part] = smallest.clamp(max=RADII[-1]).double().cpu()
            bar.update(len(part))
    finally:
        bar.close()
        for parameter, flag in zip(model.parameters(), were, strict=True):
            parameter.requires_grad_(flag)
    return found


@dataclass(frozen=True)
class _Attack:
    model: nn.Module
    sigma: float
    copies: int
    iterations: int
    seed: int

    def run(self, x: Tensor, y: Tensor, ids: Tensor, radius: Tensor, steps: int) -> Tensor:
        """The norm of the first wrong iterate of each image, inf where there is none; [B]."""
        norms = torch.full_like(radius, math.inf)
        active = torch.arange(len(x), device=x.device)
        delta = torch.zeros_like(x)
        for step in range(steps + 1):
            here = delta[active].requires_grad_()
            noisy = ops.noisy_copies(
                x[active] + here,
                self.sigma,
                self.copies,
                self.seed,
                image_ids=ids[active],
                stream=Stream.EVALUATION,
                memory_format=layout(x),
            )
            p = ops.soft_smooth(self.model(noisy).view(len(active), self.copies, -1))
            wrong = p.detach().argmax(1) != y[active]
            norms[active[wrong]] = delta[active[wrong]].flatten(1).norm(dim=1)
            if step == steps or bool(wrong.all()):
                break
            likelihood = p.gather(1, y[active].unsqueeze(1)).clamp(min=1e-20)
            (slope,) = torch.autograd.grad(-likelihood.log().sum(), here)
            active = active[~wrong]
            delta[active] = SmoothAdv.step(x[active], delta[active], slope[~wrong], radius[active], steps)
        return norms


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    sigma: float,
    attacked: Tensor | None,
    copies: int = 20,
    iterations: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """All figures of one model: images float [N, ...], labels int64 [N]; attacked: int64 [M], which of them, or None.

    Accuracy under noise is of 100 noisy copies an image.  Raises ValueError for numbers out of range.
    """
    positive("sigma", sigma)
    at_least("copies", copies, 1)
    at_least("iterations", iterations, 1)
    if len(images) == 0:
        raise ValueError("there are no images to measure on")
    model = model.eval().to(memory_format=torch.channels_last)
    attacked = torch.zeros(0, dtype=torch.int64) if attacked is None else attacked
    return Evaluation(
        labels=labels,
        natural=correct(model, images, labels),
        noisy=_correct_under_noise(model, images, labels, sigma, 100, seed, progress),
        attacked=attacked,
        distortion=distortions(
            model,
            images[attacked],
            labels[attacked],
            sigma=sigma,
            copies=copies,
            iterations=iterations,
            seed=seed,
            progress=progress,
        ),
    )


@dataclass(frozen=True)
class Figures:
    """Of one class, or all: one number per model; natural and noisy accuracy, mean distortion (NaN for no image)."""

    images: int
    attacked: int
    natural: list[float]
    noisy: list[float]
    distortion: list[float]


def figures(measured: Sequence[Evaluation], classes: int) -> dict[int | None, Figures]:
    """The figures per class that there are images of, and under None of all."""
    first, result = measured[0], {}
    for which in (None, *range(classes)):
        mask = torch.ones_like(first.labels, dtype=torch.bool) if which is None else first.labels == which
        if not bool(mask.any()):
            continue
        hit = mask[first.attacked]
        result[which] = Figures(
            images=int(mask.sum()),
            attacked=int(hit.sum()),
            natural=[float(m.natural[mask].double().mean()) for m in measured],
            noisy=[float(m.noisy[mask].mean()) for m in measured],
            distortion=[float(m.distortion[hit].mean()) for m in measured],
        )
    return result


def evaluation_dict(measured: Sequence[Evaluation], class_names: Sequence[str]) -> dict[str, Any]:
    """`figures` for JSON, under the classes' names and "all"; no number where no image was attacked."""
    found = {}
    for which, each in figures(measured, len(class_names)).items():
        fields = dataclasses.asdict(each)
        if not each.attacked:
            fields["distortion"] = []
        found["all" if which is None else class_names[which]] = fields
    return found


def evaluation_table(measured: Sequence[Evaluation], class_names: Sequence[str]) -> str:
    """`figures` as text: mean and standard deviation over models."""
    lines = [["class", "images", "accuracy", "under noise", "attacked", "l2 distortion"]]
    for which, each in figures(measured, len(class_names)).items():
        lines.append(
            [
                "all" if which is None else class_names[which],
                str(each.images),
                mean_and_deviation(each.natural, ".2%"),
                mean_and_deviation(each.noisy, ".2%"),
                str(each.attacked),
                mean_and_deviation(each.distortion, ".3f") if each.attacked else "-",
            ]
        )
    return aligned(lines)
