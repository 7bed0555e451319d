"""Certification of the soft smoothed classifier: the empirical Bernstein bound (Zhai et al. 2020) in the same loop."""

from __future__ import annotations

import decimal
import math
import secrets
from dataclasses import dataclass
from decimal import Decimal

import torch
from torch import Tensor

from pacd_fast import ops
from pacd_fast._C import Certification, product_down
from pacd_fast.arguments import positive, seed_in_range
from pacd_fast.certification.results import ABSTAIN
from pacd_fast.certification.sampler import Model, Sampler

UNIT = 2**20  # probabilities are rounded down to multiples of 1 / UNIT: their sums and sums of squares are exact


@dataclass(frozen=True)
class SoftCertificates:
    """The soft certificates of N images; as `Certificates`, with means in the place of votes.

    Attributes:
        prediction: int64 [N], the soft smoothed classifier's class, -1 where it abstains.
        radius: float64 [N], l2 radius within which the prediction is constant, 0 where it abstains; in pixel units.
        p_lower: float64 [N], lower confidence bound on the selected class's mean probability under noise.
        mean: float64 [N, num_classes], the mean of the n estimation samples.
        seed: what the noise was drawn from; give it again to get the same certificates.
    """

    prediction: Tensor
    radius: Tensor
    p_lower: Tensor
    mean: Tensor
    seed: int


def bernstein_lower(total: int, squares: int, n: int, alpha: float) -> float:
    """A lower bound at level 1 - alpha on the mean of a variable in [0, 1], rounded down.

    Maurer and Pontil 2009, theorem 4: mean - sqrt(2 V t / n) - 7 t / (3 (n - 1)) with t = log(2 / alpha) and V the
    sample variance.

    Args:
        total, squares: the sum of n draws and of their squares, in units of 2^-20 and 2^-40: exact.
        n: at least 2; alpha: in (0, 1).

    Raises:
        ValueError: for n or alpha out of range.
    """
    if n < 2 or not 0 < alpha < 1:
        raise ValueError(f"n must be at least 2 and alpha in (0, 1), not {n} and {alpha}")
    with decimal.localcontext() as context:
        context.prec = 60
        t = (2 / Decimal(alpha)).ln()
        variance = Decimal(n * squares - total * total) / Decimal(n * (n - 1) * UNIT * UNIT)
        spread = (2 * variance * t / n).sqrt() + 7 * t / Decimal(3 * (n - 1))
        bound = Decimal(total) / Decimal(n * UNIT) - spread - Decimal(10) ** -50  # far more than 60 digits' rounding
        nearest = float(bound)
        return math.nextafter(nearest, -math.inf) if Decimal(nearest) > bound else nearest


def soft_certify(
    model: Model,
    images: Tensor,
    *,
    num_classes: int,
    sigma: float,
    beta: float = 1.0,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    image_ids: Tensor | None = None,
    progress: bool = False,
) -> SoftCertificates:
    """Soft randomized smoothing: certifies argmax_c E[softmax(beta * f(x + noise))_c] in l2, for a batch of images.

    Per image n0 samples choose the class, n others give `bernstein_lower` p on its mean probability; the radius is
    sigma * Phi^-1(p), and where p <= 1/2 it abstains.  What is certified is the softmax times 1 - 2^-20 rounded down to
    multiples of 2^-20: a function into [0, 1] like any other, whose classes add up to at most 1 and whose sums are
    exact.  On the CPU certificates do not depend on batch size, order or number of threads.

    Args:
        beta: inverse temperature, positive; MACER's authors certify at 1 and train at 16.
        model, images, num_classes, sigma, n0, n, alpha, seed, dtype, batch_size, image_ids, progress: as for
            `pacd_fast.certify`; n below 2^23.

    Raises:
        ValueError: for arguments out of range, an n at which nothing could be certified, a model that returns another
            number of classes or NaN.
    """
    seed = secrets.randbits(63) if seed is None else seed
    _check(n0, n, alpha, beta, sigma, seed)
    sampler = Sampler(model, images, num_classes, sigma, seed, dtype, batch_size, image_ids)
    loop = Certification(len(images), n0, n, alpha, sampler.sigma)

    def tally(counts: Tensor, logits: Tensor, image_index: Tensor) -> None:
        """Adds sums, sums of squares, and the number of rows without a NaN."""
        p = torch.softmax(beta * logits.double(), 1)  # in float32 thousands of classes add up to more than 1
        whole = ~p.isnan().any(1, keepdim=True)
        units = torch.where(whole, p * (UNIT - 1), 0.0).floor().to(torch.int64)
        counts.index_add_(0, image_index, torch.cat([units, units * units, whole.long()], 1))

    shape = (len(images), num_classes)
    result = SoftCertificates(
        prediction=torch.full(shape[:1], ABSTAIN),
        radius=torch.zeros(shape[:1], dtype=torch.float64),
        p_lower=torch.zeros(shape[:1], dtype=torch.float64),
        mean=torch.zeros(shape, dtype=torch.float64),
        seed=seed,
    )
    for i, selection, estimation, _ in sampler.run(loop, n0 + n, progress, tally, 2 * num_classes + 1):
        if missing := n0 + n - int(selection[-1] + estimation[-1]):
            image = int(sampler.image_ids[i])
            raise ValueError(f"the model returned NaN for {missing} of {n0 + n} noisy copies of image {image}")
        selected = int(selection[:num_classes].argmax())
        p_lower = bernstein_lower(int(estimation[selected]), int(estimation[num_classes + selected]), n, alpha)
        result.p_lower[i] = p_lower
        result.mean[i] = estimation[:num_classes].double() / (n * UNIT)
        if p_lower > 0.5:
            z = ops.normal_quantile(torch.tensor(p_lower, dtype=torch.float64))
            result.prediction[i] = selected
            result.radius[i] = max(0.0, product_down(sampler.sigma, float(z)))
    return result


def _check(n0: int, n: int, alpha: float, beta: float, sigma: float, seed: int) -> None:
    if n0 < 1 or not 2 <= n < 2**23:
        raise ValueError(f"n0 must be positive and n in [2, 2^23), not {n0} and {n}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), not {alpha}")
    positive("beta", beta)
    positive("sigma", sigma)
    seed_in_range(seed)
    if not bernstein_lower(n * UNIT, n * UNIT * UNIT, n, alpha) > 0.5:
        enough = 2 + int(14 / 3 * math.log(2 / alpha))
        raise ValueError(f"n = {n} is too small to certify anything at alpha = {alpha}: it takes n = {enough}")
