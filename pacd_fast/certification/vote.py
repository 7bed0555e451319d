"""Randomized smoothing (Cohen, Rosenfeld, Kolter 2019): sample, predict and certify at the model's speed."""

from __future__ import annotations

import math
import secrets
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from pacd_fast import ops
from pacd_fast._C import Certification, product_down
from pacd_fast.arguments import positive, seed_in_range
from pacd_fast.certification.results import ABSTAIN
from pacd_fast.certification.sampler import Model, Sampler


@dataclass(frozen=True)
class Certificate:
    """One image's certificate; see `Certificates` for the fields."""

    index: int
    prediction: int
    selected: int
    radius: float
    p_lower: float
    counts: Tensor
    selection_counts: Tensor
    seconds: float


@dataclass(frozen=True)
class Certificates:
    """The certificates of N images.

    Attributes:
        prediction: int64 [N], the smoothed classifier's class, -1 where it abstains.
        radius: float64 [N], l2 radius within which the prediction is constant, 0 where it abstains; in pixel units.
        p_lower: float64 [N], lower confidence bound on the selected class's probability under noise.
        counts: int64 [N, num_classes], votes of the n estimation samples.
        selection_counts: int64 [N, num_classes], votes of the n0 selection samples.
        seed: what the noise was drawn from; give it again to get the same certificates.

    Each certificate holds with probability at least 1 - alpha over the noise, one by one (not all N at once).
    """

    prediction: Tensor
    radius: Tensor
    p_lower: Tensor
    counts: Tensor
    selection_counts: Tensor
    seed: int


def smallest_n(alpha: float) -> int:
    """The smallest n at which an image can be certified at all: alpha^(1/n) > 1/2."""
    n = max(1, int(math.log(alpha) / math.log(0.5)) - 1)
    while not float(ops.clopper_pearson_lower(torch.tensor(n), n, alpha)) > 0.5:
        n += 1
    return n


def largest_radius(sigma: float, n: int, alpha: float) -> float:
    """The radius of an image whose n votes all agree: sigma * Phi^-1(alpha^(1/n)), down; 0 if n is too small."""
    p = ops.clopper_pearson_lower(torch.tensor(n), n, alpha)
    return max(0.0, product_down(float(torch.tensor(sigma, dtype=torch.float32)), float(ops.normal_quantile(p))))


def certify(
    model: Model,
    images: Tensor,
    *,
    num_classes: int,
    sigma: float,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    image_ids: Tensor | None = None,
    progress: bool = False,
) -> Certificates:
    """CERTIFY of Cohen et al. 2019 for a batch of images, in l2.

    Per image n0 samples choose the class, n others give a Clopper-Pearson lower bound p on its probability under noise,
    at level 1 - alpha; the radius is sigma * Phi^-1(p), and where p <= 1/2 it abstains.  Both are rounded down.

    Args:
        model: images [M, ...] -> logits [M, num_classes].  A module is copied, put into eval mode and, for 4-d images
            on the CPU or in half precision, into channels_last; it must not look at other images of its batch.
        images: float [N, ...], pixels as the model takes them, on any device; moved to the model's.  Noise and radius
            are about the float32 image: float64 pixels must be float32 numbers.
        sigma: the noise's standard deviation in pixel units, rounded to float32 (the radius uses the rounded number).
        n0, n: selection and estimation samples per image; alpha: failure probability of each certificate.
        seed: in [0, 2^63); by default from the operating system's entropy.  A seed that an adversary knows while
            choosing the inputs voids the probability statement.
        dtype: float32 or bfloat16; by default the model's own, and float32 for a float64 model.  The certificate is for
            the model in that dtype, as torch computes it (on CUDA, TF32 where torch.backends allows it).
        batch_size: rows a forward pass; by default the fastest of a few, tried on the first samples.  On the CPU
            certificates do not depend on it; on CUDA the libraries choose kernels by size, and a vote near a tie may
            change.  (On the CPU the process keeps what memory it has freed, for the next batch.)
        image_ids: int64 [N], which noise each image gets; by default 0..N-1.
        progress: show a bar with samples a second, images done and time left.

    Raises:
        ValueError: for arguments out of range, an n at which nothing could be certified, a model that returns another
            number of classes or NaN.
    """
    seed = secrets.randbits(63) if seed is None else seed
    count = len(images)
    result = Certificates(
        prediction=torch.full((count,), ABSTAIN),
        radius=torch.zeros(count, dtype=torch.float64),
        p_lower=torch.zeros(count, dtype=torch.float64),
        counts=torch.zeros(count, num_classes, dtype=torch.int64),
        selection_counts=torch.zeros(count, num_classes, dtype=torch.int64),
        seed=seed,
    )
    for certificate in certify_each(
        model,
        images,
        num_classes=num_classes,
        sigma=sigma,
        n0=n0,
        n=n,
        alpha=alpha,
        seed=seed,
        dtype=dtype,
        batch_size=batch_size,
        image_ids=image_ids,
        progress=progress,
    ):
        result.prediction[certificate.index] = certificate.prediction
        result.radius[certificate.index] = certificate.radius
        result.p_lower[certificate.index] = certificate.p_lower
        result.counts[certificate.index] = certificate.counts
        result.selection_counts[certificate.index] = certificate.selection_counts
    return result


def certify_each(
    model: Model,
    images: Tensor,
    *,
    num_classes: int,
    sigma: float,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    seed: int,
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    image_ids: Tensor | None = None,
    progress: bool = False,
) -> Generator[Certificate, None, None]:
    """The same as `certify`, one image at a time as they are finished, in order; `seed` is needed."""
    check_arguments(n0, n, alpha, sigma, seed)
    sampler = Sampler(model, images, num_classes, sigma, seed, dtype, batch_size, image_ids)
    loop = Certification(len(images), n0, n, alpha, sampler.sigma)
    for index, selection, estimation, seconds in sampler.run(loop, n0 + n, progress):
        missing = n0 + n - int(selection.sum() + estimation.sum())
        if missing:
            raise ValueError(
                f"the model returned NaN for {missing} of {n0 + n} noisy copies "
                f"of image {int(sampler.image_ids[index])}"
            )
        prediction, selected, p_lower, radius = loop.issue(selection.numpy(), estimation.numpy())
        yield Certificate(index, prediction, selected, radius, p_lower, estimation, selection, seconds)


def check_level(n: int, alpha: float, least: float = 1e-200) -> None:
    """Raises ValueError where there is no Clopper-Pearson bound (see `ops.clopper_pearson_lower`)."""
    if n >= 2**31:
        raise ValueError(f"n must be below 2^31, not {n}")
    if not least <= alpha <= 1 - 2**-20:
        raise ValueError(f"alpha must be in (0, 1), not {alpha} (at least {least:g}, at most 1 - 2^-20)")


def check_arguments(n0: int, n: int, alpha: float, sigma: float, seed: int) -> None:
    """Raises ValueError for numbers out of range, or an n at which nothing could be certified, before any sample."""
    if n < 1 or n0 < 1:
        raise ValueError(f"n0 and n must be positive, not {n0} and {n}")
    check_level(n, alpha)
    positive("sigma", sigma)
    seed_in_range(seed)
    if n < (enough := smallest_n(alpha)):
        least, usual = largest_radius(sigma, enough, alpha), largest_radius(sigma, 100_000, alpha)
        raise ValueError(
            f"n = {n} is too small to certify anything at alpha = {alpha}: it takes n = {enough}, which reaches "
            f"radius {least:.4f}; n = 100000 reaches {usual:.4f}"
        )
