"""Randomized smoothing of any yes/no function, by Monte Carlo: for learning algorithms, not only classifiers.

phi maps samples of anything (an image, a whole training set) to 0 or 1; the sampler draws them from the smoothing
measure mu around the given input.  The majority vote g keeps its value for every other measure rho with d(mu, rho)
below a radius that depends on p, the share of the vote (Rosenfeld et al. 2020, section 3).  A *guarantee* is that
function of p; three are here, the paper's examples 1 to 3.  `LabelFlipCertifier` is an instance of the same idea that
needs no sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pacd_fast import _C, ops
from pacd_fast.arguments import positive
from pacd_fast.certification.question import check_level

Guarantee = Callable[[float], float]


@dataclass(frozen=True)
class SmoothingCertificate:
    """With probability 1 - alpha over the samples, g(rho) = prediction for every rho closer than `radius`, in the
    guarantee's distance; for a guarantee in whole numbers, at distance `radius` too.

    `abstained`: the vote was too close; prediction is then only the more frequent value, and radius is 0.
    """

    prediction: int
    abstained: bool
    p_lower: float
    radius: float
    ones: int
    samples: int


def gaussian_guarantee(sigma: float) -> Guarantee:
    """Example 1 (Cohen et al. 2019): N(x, sigma^2 I) and N(x + delta, sigma^2 I); radius in the l2 norm of delta."""
    positive("sigma", sigma)

    def radius(p: float) -> float:
        return max(0.0, _C.product_down(sigma, float(ops.normal_quantile(torch.tensor([p], dtype=torch.float64))[0])))

    return radius


def discrete_guarantee(change: float, values: int, dims: int) -> Guarantee:
    """Example 2 (Lee et al. 2019): each of `dims` coordinates takes another of its `values` with probability `change`,
    all alike; radius in the number of coordinates (l0), the tight one."""
    if dims < 1 or values < 2 or not 1e-300 <= change < (values - 1) / values:
        raise ValueError(
            f"dims must be positive, values at least 2 and change in (0, 1 - 1 / values), not {dims}, {values}, "
            f"{change}"
        )

    def radius(p: float) -> float:
        log_tail = math.log1p(-p) * (1 - 2.0**-50) if p < 1 else -math.inf
        table = _C.flip_table(change, values, dims, log_tail)
        return float(max(0, int(np.count_nonzero(table > log_tail)) - 1))

    return radius


def kl_guarantee(per_unit: float = 1.0) -> Guarantee:
    """Example 3 (Dvijotham et al. 2020): any measures with KL(rho || mu) < -log(4 p (1 - p)) / 2; the radius is that
    number over `per_unit`, e.g. the divergence of one changed label for a radius in labels."""
    positive("per_unit", per_unit)

    def radius(p: float) -> float:
        if p <= 0.5:
            return 0.0
        if p >= 1:
            return math.inf
        return max(0.0, (-0.5 * (math.log(4 * p) + math.log1p(-p)) - 2.0**-48) / per_unit * (1 - 2.0**-51))

    return radius


def randomized_smoothing_certificate(
    phi: Callable[[Any], Any],
    sampler: Callable[[int], Any],
    guarantee: Guarantee,
    *,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    batch: int = 1000,
) -> SmoothingCertificate:
    """Certify the majority vote of ``phi(sampler(count))``.

    `n0` samples choose the value, `n` further ones bound its share p from below (Clopper-Pearson at level 1 - alpha,
    rounded down); where that is above 1/2 the guarantee turns it into a radius.

    Args:
        phi: samples -> zeros and ones, one per sample (array, tensor or sequence).  One fixed function: it must not
            depend on the batch or on anything random that the sampler does not draw.
        sampler: count -> that many independent samples from mu, fresh at every call.
        guarantee: `gaussian_guarantee(sigma)`, `discrete_guarantee(change, values, dims)`, `kl_guarantee(per_unit)`, or
            any function from p to a radius that is valid for all phi.
        batch: samples per call.

    Example: how many labels may an attacker change, for any learning algorithm `train_and_predict` on n labels::

        def sampler(count):
            return np.where(rng.random((count, len(y))) < q, 1 - y, y)
        certificate = randomized_smoothing_certificate(
            train_and_predict, sampler, discrete_guarantee(q, 2, len(y)), n=1000)

    Raises:
        ValueError: for bad numbers, or where phi returns anything but one 0 or 1 per sample.
    """
    if n0 < 1 or n < 1 or batch < 1:
        raise ValueError(f"n0, n and batch must be positive, not {n0}, {n}, {batch}")
    check_level(n, alpha)

    def ones(count: int) -> int:
        total = 0
        for begin in range(0, count, batch):
            size = min(batch, count - begin)
            votes = phi(sampler(size))
            votes = votes.detach().cpu().numpy() if isinstance(votes, torch.Tensor) else np.asarray(votes)
            votes = votes.reshape(-1)
            if len(votes) != size or not bool(np.isin(votes, (0, 1)).all()):
                raise ValueError(f"phi must return one 0 or 1 for each of {size} samples")
            total += int(votes.astype(np.int64).sum())
        return total

    prediction = int(2 * ones(n0) >= n0)
    hits = ones(n)
    agreeing = hits if prediction else n - hits
    p_lower = float(ops.clopper_pearson_lower(torch.tensor([agreeing]), n, alpha)[0])
    certified = p_lower > 0.5
    return SmoothingCertificate(prediction, not certified, p_lower, guarantee(p_lower) if certified else 0.0, hits, n)
