"""What is asked of each image: a radius from all samples, the largest of some radii, a radius within a tolerance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pacd_fast import ops
from pacd_fast._C import FullCertificates, Rule, SequentialRadii, product_down
from pacd_fast.arguments import positive, whole

LARGEST_N = 2**31 - 1


@dataclass(frozen=True)
class Question:
    """Counts, level, and when an image is decided; numbers are checked where it is made (ValueError).

    Attributes:
        n0, n: selection and, at most, estimation samples of an image; alpha: failure probability of each certificate.
        sides: 1, the bound of the selected class alone; 2, and one of its most frequent rival.
        radii: rising; empty for others. tolerance: positive; 0 for others.
        futility: where neither is given, a share of at most so many certificates may be lost to giving up early.
    """

    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001
    sides: int = 1
    radii: tuple[float, ...] = ()
    tolerance: float = 0.0
    futility: float = 1e-6

    @classmethod
    def of(
        cls,
        sigma: float,
        n0: float,
        n: float,
        alpha: float,
        radii: Sequence[float] | None,
        tolerance: float | None,
        sides: int,
        futility: float,
    ) -> Question:
        """As a caller puts it.  Raises ValueError for what cannot be answered at this sigma."""
        n0, n = whole("n0", n0), whole("n", n)
        if n < 1 or n0 < 1:
            raise ValueError(f"n0 and n must be positive, not {n0} and {n}")
        if n0 > LARGEST_N:
            raise ValueError(f"n0 must be below 2^31, not {n0}")
        check_level(n, alpha)
        if sides not in (1, 2):
            raise ValueError(f"sides must be 1 or 2, not {sides}")
        if not (math.isfinite(futility) and 0 <= futility <= 0.5):
            raise ValueError(f"futility must be in [0, 1/2], not {futility}")
        if radii is not None and tolerance is not None:
            raise ValueError("give radii or a tolerance, not both")
        if (radii is not None or tolerance is not None) and alpha > 0.5:
            raise ValueError(f"alpha must be at most 1/2 to stop early, not {alpha}")
        if tolerance is not None:
            positive("tolerance", tolerance)
        steps = () if radii is None else tuple(map(float, radii))
        if radii is not None and not steps:
            raise ValueError("radii must hold at least one radius")
        if not all(math.isfinite(each) and each >= 0 for each in steps) or sorted(set(steps)) != list(steps):
            raise ValueError(f"radii must rise and not be negative, not {' '.join(map(repr, steps))}")
        check_certifiable(n, alpha, sigma)
        return cls(n0, n, float(alpha), int(sides), steps, float(tolerance or 0.0), float(futility))

    def rule(self, sigma: float) -> Rule:
        """The rule that answers it.  Raises ValueError for radii or a tolerance beyond what n can reach."""
        if self.radii or self.tolerance:
            return SequentialRadii(self.n0, self.n, self.alpha, sigma, list(self.radii), self.tolerance, self.sides)
        return FullCertificates(self.n0, self.n, self.alpha, sigma, self.sides, self.futility)

    @property
    def target(self) -> str:
        """What is asked for, as the results file has it: "full", "radii 0.25 0.5" or "tolerance 0.05"."""
        if self.radii:
            return "radii " + " ".join(map(repr, self.radii))
        return f"tolerance {self.tolerance!r}" if self.tolerance else "full"

    @property
    def likely(self) -> int:
        """Estimation samples that an image is likely to take."""
        return max(1, self.n // 10) if self.radii or self.tolerance else self.n

    @classmethod
    def read(cls, sigma: float, n0: int, n: int, alpha: float, target: str, sides: int, futility: float) -> Question:
        """The question of a results file.  Raises ValueError."""
        kind, *numbers = target.split(" ")
        values = [float(text) for text in numbers]
        if kind != "radii" and len(values) != {"full": 0, "tolerance": 1}.get(kind):
            raise ValueError(f"target {target!r} is none of full, radii ..., tolerance ...")
        radii, tolerance = values if kind == "radii" else None, values[0] if kind == "tolerance" else None
        return cls.of(sigma, n0, n, alpha, radii, tolerance, sides, futility)


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


def check_level(n: int, alpha: float, least: float = 1e-200) -> None:
    """Raises ValueError where there is no Clopper-Pearson bound (see `ops.clopper_pearson_lower`)."""
    if n > LARGEST_N:
        raise ValueError(f"n must be below 2^31, not {n}")
    if not least <= alpha <= 1 - 2**-20:
        raise ValueError(f"alpha must be in (0, 1), not {alpha} (at least {least:g}, at most 1 - 2^-20)")


def check_certifiable(n: int, alpha: float, sigma: float) -> None:
    """Raises ValueError for an n at which nothing could be certified."""
    positive("sigma", sigma)
    if n < (enough := smallest_n(alpha)):
        least, usual = largest_radius(sigma, enough, alpha), largest_radius(sigma, 100_000, alpha)
        raise ValueError(
            f"n = {n} is too small to certify anything at alpha = {alpha}: it takes n = {enough}, which reaches "
            f"radius {least:.4f}; n = 100000 reaches {usual:.4f}"
        )
