"""Tests of the noise and the bounds that run on the user's own machine in a few seconds, and the bits for a battery."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from scipy import stats

from pacd_fast import _C, ops


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and "ok" or "FAILED"."""

    verdict: str
    what: str
    found: str


# Philox4x32-10 of Random123's known-answer file: counter, key, result.
KNOWN_ANSWERS = (
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
)


def checks(draws: int = 20_000_000, seed: int = 2026) -> Iterator[Check]:
    """Yields one `Check` after another; `draws` normal numbers are looked at (at least 100 000).

    Each statistic is a z-score or a p-value of its null distribution; it fails beyond 5 standard deviations, which
    happens by chance once in 1.7 million.
    """
    if draws < 100_000:
        raise ValueError(f"draws must be at least 100000, not {draws}")
    right = all(list(_C.philox4x32(counter, key)) == result for counter, key, result in KNOWN_ANSWERS)
    yield Check("ok" if right else "FAILED", "Philox4x32-10", "Random123's known answers")
    yield from noise_checks(draws, seed)
    yield from lattice_checks(draws, seed)
    table = _C.clopper_pearson_table(1000, 0.001)
    error = np.abs(table[1:] / stats.beta.ppf(0.001, np.arange(1, 1001), np.arange(1000, 0, -1)) - 1).max()
    yield Check(
        "ok" if error < 1e-10 else "FAILED",
        "Clopper-Pearson against scipy, n = 1000",
        f"relative difference {error:.1e}",
    )
    p = torch.linspace(1e-12, 1 - 1e-12, 100_001, dtype=torch.float64)
    low, high = ops.normal_quantile(p), ops.normal_quantile(p, rounding="up")
    error = float((low - torch.special.ndtri(p)).abs().max())
    inside = bool((low <= high).all())
    yield Check(
        "ok" if error < 1e-9 and inside else "FAILED", "normal quantile against torch", f"difference {error:.1e}"
    )


def _score(what: str, z: float) -> Check:
    return Check("ok" if abs(z) < 5 else "FAILED", what, f"{z:+.2f} standard deviations")


def noise_checks(draws: int, seed: int) -> Iterator[Check]:
    """Moments to the 6th order, Kolmogorov-Smirnov, tails, and correlations between elements, samples and images."""
    side = 1024
    copies = max(2, min(256, draws // (4 * side)))
    images = max(2, draws // (copies * side))
    power_sums, tails, count, ks = np.zeros(7), np.zeros(2), 0, 0.0
    pairs = {"neighbouring elements": 0.0, "neighbouring samples": 0.0, "neighbouring images": 0.0}
    pair_counts = dict.fromkeys(pairs, 0)
    previous: torch.Tensor | None = None
    bins = np.linspace(-4, 4, 513)
    histogram = np.zeros(514)
    for first in range(0, images, 8):
        ids = torch.arange(first, min(first + 8, images))
        z = ops.noisy_copies(torch.zeros(len(ids), side), 1.0, copies, seed, image_ids=ids, stream=1).double()
        z = z.view(len(ids), copies, side)
        for order in range(1, 7):
            power_sums[order] += float((z**order).sum())
        tails += [float((z.abs() > level).sum()) for level in (4.0, 5.0)]
        histogram += np.bincount(np.searchsorted(bins, z.numpy().ravel()), minlength=514)
        count += z.numel()
        for name, a, b in (
            ("neighbouring elements", z[..., 1:], z[..., :-1]),
            ("neighbouring samples", z[:, 1:], z[:, :-1]),
            ("neighbouring images", z[1:], z[:-1]),
        ):
            pairs[name] += float((a * b).sum())
            pair_counts[name] += a.numel()
        if previous is not None:
            pairs["neighbouring images"] += float((z[0] * previous).sum())
            pair_counts["neighbouring images"] += previous.numel()
        previous = z[-1]
    moments = (0, 1, 0, 3, 0, 15)
    variances = (1, 2, 15, 96, 945, 10170)  # of z^k: E z^2k - (E z^k)^2
    for order, (mean, variance) in enumerate(zip(moments, variances, strict=True), 1):
        yield _score(
            f"moment {order} of {count:,} draws", (power_sums[order] / count - mean) / math.sqrt(variance / count)
        )
    below = np.cumsum(histogram[:-1]) / count
    ks = float(np.abs(below - stats.norm.cdf(bins)).max() * math.sqrt(count))
    yield Check(
        "ok" if stats.kstwobign.sf(ks) > 5e-7 else "FAILED",
        "Kolmogorov-Smirnov on 513 points",
        f"p = {stats.kstwobign.sf(ks):.3f}",
    )
    for level, seen in zip((4.0, 5.0), tails, strict=True):
        expected = count * 2 * stats.norm.sf(level)
        yield Check(
            "ok"
            if 2 * min(stats.poisson.cdf(seen, expected), stats.poisson.sf(seen - 1, expected)) > 5e-7
            else "FAILED",
            f"draws beyond {level:g} sigma",
            f"{seen:.0f}, expected {expected:.1f}",
        )
    for name, total in pairs.items():
        yield _score(f"correlation of {name}", total / math.sqrt(pair_counts[name]))


def cell_counts(
    sigma: float, step: float, offset: float, pixel: float, draws: int, seed: int
) -> tuple[int, np.ndarray]:
    """How often lattice noise on one pixel fell into each cell: the number of the first one, and int64 [cells]."""
    a, side = (float(np.float32(pixel)) - offset) / step, 4096
    reach = math.ceil(10 * sigma / step) + 1  # more than 64 digits reach
    first = round(a) - reach
    counts = np.zeros(2 * reach + 1, np.int64)
    for sample in range(0, -(-draws // side), 256):
        y, voids = ops.lattice_copies(
            torch.full((1, side), pixel), sigma, 256, seed, step=step, offset=offset, first=sample, stream=1
        )
        if voids.any():
            raise RuntimeError("a cell was not decided, which happens once in 1e11")
        cells = ((y.double() - offset) / step).round().long().flatten()
        counts += torch.bincount(cells - first, minlength=counts.size).numpy()
    return first, counts


def lattice_p_value(first: int, counts: np.ndarray, sigma: float, step: float, offset: float, pixel: float) -> float:
    """Chi-square of `cell_counts` against the exact masses of a Gaussian; cells that expect below 20 draws together."""
    a, s = (float(np.float32(pixel)) - offset) / step, float(np.float32(sigma)) / step
    ends = (np.arange(first, first + counts.size + 1) - 0.5 - a) / s
    ends[[0, -1]] = -np.inf, np.inf
    expected = np.diff(stats.norm.cdf(ends)) * counts.sum()
    rare = expected < 20
    if expected[rare].sum() < 20:  # with the least of the others
        rare[np.where(rare, np.inf, expected).argmin()] = True
    seen, wanted = (np.append(v[~rare], v[rare].sum()) for v in (counts, expected))
    return float(stats.chi2.sf(((seen - wanted) ** 2 / wanted).sum(), len(seen) - 1))


def lattice_checks(draws: int, seed: int) -> Iterator[Check]:
    """The law of lattice noise's cells, for sigma from a quarter of a step of 1/255 to 255 steps."""
    for sigma in (0.001, 0.01, 0.12, 0.5, 1.0):
        law = (sigma, 1 / 255, 0.0, 0.3)
        p = lattice_p_value(*cell_counts(*law, max(draws // 10, 100_000), seed), *law)
        yield Check("ok" if p > 5e-7 else "FAILED", f"lattice noise of sigma {sigma:g}, chi-square", f"p = {p:.3f}")


def write_bits(out: BinaryIO, seed: int = 20261120) -> None:
    """Writes the words behind the noise, sample after sample, image after image, until the pipe closes."""
    image = 0
    while True:
        out.write(_C.random_bits(seed, 1, image, 0, 196, 2000).tobytes())
        image += 1
