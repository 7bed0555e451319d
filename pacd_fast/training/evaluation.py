"""How good a classifier is: accuracy, accuracy under noise, and the l2 distortion that an attack needs.

The distortion is that of Mehra et al. 2021, 4.6: PGD against the soft smoothed classifier (Salman et al. 2019).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pacd_fast import _C, ops
from pacd_fast.arguments import at_least, positive, whole
from pacd_fast.data import Dataset, as_float, labelled
from pacd_fast.networks import takes
from pacd_fast.randomness import Stream
from pacd_fast.tables import aligned, mean_and_deviation
from pacd_fast.training.losses import SmoothAdv, eval_mode, frozen, layout

RADII = tuple(10.0 ** (exponent / 10) for exponent in range(-20, 11))  # 0.01 to 10, ten per factor of ten
ROWS = 512  # rows a pass through the network
DROPPED = 5  # steps of PGD after which images that are wrong already leave the batch: asking waits for the card


@dataclass(frozen=True)
class Evaluation:
    """One model's figures.

    labels: int64 [N]; natural: bool [N], right without noise; noisy: float64 [N], share of noisy copies that are right,
    None where it was not asked for; attacked: int64 [M], the images that were attacked; distortion: float64 [M], see
    `distortions`.
    """

    labels: Tensor
    natural: Tensor
    noisy: Tensor | None
    attacked: Tensor
    distortion: Tensor


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


@torch.no_grad()
def check_classifier(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Two images through the model: it must take them, give logits, and have a class for every label.

    Raises ValueError, one line that says what does not fit.
    """
    few = as_float(images[:2]).to(_device(model))
    with eval_mode(model):
        with takes(images.shape[1:]):
            logits = model(few)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(few):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must return logits [B, classes], not {found} for {len(few)} images")
    if not logits.is_floating_point():
        raise ValueError(f"the model's logits must be floating, not {logits.dtype}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(f"labels must be in [0, {logits.shape[1]}), the model's classes, and are in [{low}, {high}]")


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor, progress: bool = False) -> Tensor:
    """Which images [N, ...] (uint8 or float) the model gets right as they are: bool [N], on the CPU.

    Raises ValueError for a model that returns NaN.
    """
    device, votes = _device(model), []
    parts = images.split(ROWS)
    for number, part in enumerate(tqdm(parts, desc="accuracy", unit="batch", disable=not progress or len(parts) < 2)):
        logits = model(as_float(part).to(device))
        if bool((lost := logits.isnan().any(1)).any()):
            raise ValueError(f"the model returned NaN for image {number * ROWS + int(lost.nonzero()[0])}")
        votes.append(logits.argmax(1).cpu())
    return torch.cat(votes) == labels.cpu()


@torch.no_grad()
def _correct_under_noise(
    model: nn.Module, images: Tensor, labels: Tensor, sigma: float, copies: int, seed: int, progress: bool
) -> Tensor:
    """Share of `copies` noisy copies that the model gets right: float64 [N], on the CPU."""
    device, shares = _device(model), []
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
    device = _device(model)
    if device.type == "cpu":
        _C.keep_freed_memory()
    found = torch.full((len(images),), RADII[-1], dtype=torch.float64)
    with frozen(model), tqdm(total=len(images), desc="distortion", unit="image", disable=not progress) as bar:
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
        active = torch.arange(len(x), device=x.device)  # not known to be wrong yet
        delta = torch.zeros_like(x)
        for step in range(steps + 1):
            here, pixels, label = delta[active].requires_grad_(), x[active], y[active]
            noisy = ops.noisy_copies(
                pixels + here,
                self.sigma,
                self.copies,
                self.seed,
                image_ids=ids[active],
                stream=Stream.EVALUATION,
                memory_format=layout(x),
            )
            p = ops.soft_smooth(self.model(noisy).view(len(active), self.copies, -1))
            first = (p.detach().argmax(1) != label) & norms[active].isinf()
            norms[active] = torch.where(first, here.detach().flatten(1).norm(dim=1), norms[active])
            if step == steps:
                break
            likelihood = p.gather(1, label.unsqueeze(1)).clamp(min=1e-20)
            (slope,) = torch.autograd.grad(-likelihood.log().sum(), here)
            delta[active] = SmoothAdv.step(pixels, here.detach(), slope, radius[active], steps)
            if step % DROPPED == 0:  # the one wait: those that are wrong leave the batch
                active = active[norms[active].isinf()]
                if len(active) == 0:
                    break
        return norms


def evaluate(
    model: nn.Module,
    images: Any,
    labels: Any = None,
    *,
    sigma: float | None = None,
    noise_copies: int = 0,
    attacked: Tensor | None = None,
    copies: int = 20,
    iterations: int = 100,
    seed: int = 0,
    progress: bool = False,
    after_clean: Callable[[Tensor], object] | None = None,
) -> Evaluation:
    """The figures of one model: the accuracy, and where asked for that under noise and what an attack needs.

    Args:
        model: a module, on the device to use; it is evaluated in eval mode.
        images, labels: uint8 (divided by 255) or float [N, ...], and whole numbers [N], tensors or NumPy arrays; or a
            DataLoader or a Dataset (its test split) alone.
        sigma: the noise's standard deviation, for what follows.
        noise_copies: noisy copies of an image for the accuracy under noise, 0 for none.
        attacked: int64 [M], the images to attack, by index; None for none.  copies, iterations: see `distortions`.
        after_clean: called with which images are right, bool [N], before anything else is measured.

    Raises ValueError for numbers out of range, and a model that does not fit the images.
    """
    images, labels = _given(images, labels)
    attacked = torch.zeros(0, dtype=torch.int64) if attacked is None else attacked
    noise_copies = whole("noise_copies", noise_copies)
    at_least("noise_copies", noise_copies, 0)
    at_least("copies", copies, 1)
    at_least("iterations", iterations, 1)
    if noise_copies or len(attacked):
        if sigma is None:
            raise ValueError("accuracy under noise and the attack need sigma")
        positive("sigma", sigma)
    if len(attacked):
        check_pixels(images)
    check_classifier(model, images, labels)
    model.to(memory_format=torch.channels_last)
    noisy, distortion = None, torch.zeros(0, dtype=torch.float64)
    with eval_mode(model):
        natural = correct(model, images, labels, progress)
        if after_clean is not None:
            after_clean(natural)
        if noise_copies and sigma is not None:
            noisy = _correct_under_noise(model, images, labels, sigma, noise_copies, seed, progress)
        if len(attacked) and sigma is not None:
            distortion = distortions(
                model, as_float(images[attacked]), labels[attacked],
                sigma=sigma, copies=copies, iterations=iterations, seed=seed, progress=progress,
            )  # fmt: skip
    return Evaluation(labels, natural, noisy, attacked, distortion)


def _given(images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    if labels is None and isinstance(images, Dataset):
        return images.split("test")
    images, labels = labelled(images if labels is None else (images, labels))
    if len(images) == 0:
        raise ValueError("there are no images to measure on")
    return images, labels


def check_pixels(images: Tensor) -> None:
    """Raises ValueError for float images that are not in [0, 1]."""
    if images.is_floating_point() and not (float(images.min()) >= 0 and float(images.max()) <= 1):
        raise ValueError(
            f"float images must be in [0, 1], not in [{float(images.min()):g}, {float(images.max()):g}]; "
            "a normalisation belongs into the model: networks.Normalize as its first layer"
        )


@dataclass(frozen=True)
class Figures:
    """Of one class, or all: one number per model; natural and noisy accuracy, mean distortion (NaN for no image).

    noisy is empty where it was not measured.
    """

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
            noisy=[float(m.noisy[mask].mean()) for m in measured if m.noisy is not None],
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
    """`figures` as text: mean and standard deviation over models; a column for what was measured."""
    under_noise = any(each.noisy is not None for each in measured)
    attacked = any(len(each.attacked) for each in measured)
    lines = [["class", "images", "accuracy", *["under noise"] * under_noise, *["attacked", "l2 distortion"] * attacked]]
    for which, each in figures(measured, len(class_names)).items():
        line = ["all" if which is None else class_names[which], str(each.images)]
        line.append(mean_and_deviation(each.natural, ".2%"))
        if under_noise:
            line.append(mean_and_deviation(each.noisy, ".2%"))
        if attacked:
            line += [str(each.attacked), mean_and_deviation(each.distortion, ".3f") if each.attacked else "-"]
        lines.append(line)
    return aligned(lines)
