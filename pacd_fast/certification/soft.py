"""Certification of the soft smoothed classifier: the empirical Bernstein bound (Zhai et al. 2020) in the same loop."""

from __future__ import annotations

import decimal
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from pacd_fast import ops
from pacd_fast._C import product_down
from pacd_fast.arguments import positive, whole
from pacd_fast.certification.classifier import Compile, Model
from pacd_fast.certification.noise import Noise, Numbers
from pacd_fast.certification.rows import ABSTAIN
from pacd_fast.certification.sampler import Sampler
from pacd_fast.certification.sharing import sampler_bar
from pacd_fast.certification.vote import sampler_of

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
    images: Any,
    *,
    num_classes: int,
    sigma: float,
    beta: float = 1.0,
    n0: float = 100,
    n: float = 100_000,
    alpha: float = 0.001,
    noise: str = "lattice",
    step: Numbers | None = None,
    offset: Numbers | None = None,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    compile: Compile = "auto",
    image_ids: Tensor | None = None,
    progress: bool = False,
) -> SoftCertificates:
    """Soft randomized smoothing: certifies argmax_c E[softmax(beta * f(x + noise))_c] in l2, for a batch of images.

    Per image n0 samples choose the class, n others give `bernstein_lower` p on its mean probability; the radius is
    sigma * Phi^-1(p), and where p <= 1/2 it abstains.  What is certified is the softmax times 1 - 2^-20 rounded down to
    multiples of 2^-20: a function into [0, 1] like any other, whose classes add up to at most 1 and whose sums are
    exact; a void sample counts 0 for every class.  On the CPU eager certificates do not depend on batch size, order or
    number of threads.

    Args:
        beta: inverse temperature, positive; MACER's authors certify at 1 and train at 16.
        n: below 2^23.
        the rest: as for `pacd_fast.certify`.

    Raises:
        ValueError: for arguments out of range, an n at which nothing could be certified, a model that returns another
            number of classes or NaN.
    """
    seed = secrets.randbits(63) if seed is None else seed
    n0, n = whole("n0", n0), whole("n", n)
    _check(n0, n, alpha, beta, sigma)
    law = Noise.of(noise, sigma, step, offset)
    sampler = sampler_of(
        model, images, num_classes, law, seed, n0 + n, dtype=dtype, rows=batch_size, compile=compile,
        image_ids=image_ids,
    )  # fmt: skip
    count = len(sampler.copies.images)
    sums = _sums(sampler, n0, n, beta, progress).cpu().unflatten(0, (count, 2))
    result = SoftCertificates(
        prediction=torch.full((count,), ABSTAIN),
        radius=torch.zeros(count, dtype=torch.float64),
        p_lower=torch.zeros(count, dtype=torch.float64),
        mean=sums[:, 1, :num_classes].double() / (n * UNIT),
        seed=seed,
    )
    for i, (selection, estimation) in enumerate(sums):
        if missing := n0 + n - int(selection[-1] + estimation[-1]):
            image = int(sampler.copies.ids[i])
            raise ValueError(f"the model returned NaN for {missing} of {n0 + n} noisy copies of image {image}")
        selected = int(selection[:num_classes].argmax())
        p_lower = bernstein_lower(int(estimation[selected]), int(estimation[num_classes + selected]), n, alpha)
        result.p_lower[i] = p_lower
        if p_lower > 0.5:
            z = ops.normal_quantile(torch.tensor(p_lower, dtype=torch.float64))
            result.prediction[i] = selected
            result.radius[i] = max(0.0, product_down(law.sigma, float(z)))
    return result


def _sums(sampler: Sampler, n0: int, n: int, beta: float, progress: bool) -> Tensor:
    """int64 [2 images, 2 classes + 1], by image and stream: sums, sums of squares, and samples with a value."""
    images, classes = len(sampler.copies.images), sampler.classifier.num_classes

    def count(sums: Tensor, logits: Tensor, slots: Tensor, void: Tensor) -> None:
        p = torch.softmax(beta * logits.double(), 1)  # in float32 thousands of classes add up to more than 1
        lost, whole_rows = void.unsqueeze(1), ~p.isnan().any(1, keepdim=True)
        units = torch.where(whole_rows & ~lost, p * (UNIT - 1), 0.0).floor().to(torch.int64)
        row = torch.cat([units, units * units, (whole_rows | lost).long()], 1) * (slots >= 0).unsqueeze(1)
        sums.index_add_(0, slots.clamp(min=0), row)

    with (
        sampler_bar(images * (n0 + n), progress) as bar,
        sampler.counting(count, 2 * images, 2 * classes + 1) as batch,
    ):
        for pieces in batches([(i, s, c) for i in range(images) for s, c in enumerate((n0, n))], sampler.rows):
            batch.add(pieces)
            bar.update(sum(piece[3] for piece in pieces))
    return batch.table


def batches(wanted: list[tuple[int, int, int]], rows: int) -> Iterator[list[tuple[int, int, int, int, int]]]:
    """All samples of (image, stream, count) in batches of so many rows, the last one smaller; a slot for each."""
    batch: list[tuple[int, int, int, int, int]] = []
    room = rows
    for slot, (image, stream, count) in enumerate(wanted):
        first = 0
        while first < count:
            part = min(room, count - first)
            batch.append((image, stream, first, part, slot))
            first, room = first + part, room - part
            if room == 0:
                yield batch
                batch, room = [], rows
    if batch:
        yield batch


def _check(n0: int, n: int, alpha: float, beta: float, sigma: float) -> None:
    if n0 < 1 or not 2 <= n < 2**23:
        raise ValueError(f"n0 must be positive and n in [2, 2^23), not {n0} and {n}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), not {alpha}")
    positive("beta", beta)
    positive("sigma", sigma)
    if not bernstein_lower(n * UNIT, n * UNIT * UNIT, n, alpha) > 0.5:
        enough = 2 + int(14 / 3 * math.log(2 / alpha))
        raise ValueError(f"n = {n} is too small to certify anything at alpha = {alpha}: it takes n = {enough}")
