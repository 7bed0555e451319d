"""Whether a paper's claim holds in what was measured: the rules of benchmarks/claims.md, as functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence


def below(poisoned: Sequence[float], clean: Sequence[float]) -> bool:
    """Whether the mean is below that of clean victims by more than two standard errors of the difference.

    A single number is taken to vary as those of the other group do.
    """
    variances = [statistics.variance(group) for group in (poisoned, clean) if len(group) > 1]
    if len(variances) == 1:
        variances *= 2
    error = math.sqrt(sum(v / len(group) for v, group in zip(variances, (poisoned, clean), strict=False)))
    return statistics.fmean(poisoned) < statistics.fmean(clean) - 2 * error


def verdict(cells: Mapping[str, bool]) -> str:
    """Of the cells of a claim, by name: "holds", "does not hold here", or how many hold and which do not."""
    wrong = [name for name, holds in cells.items() if not holds]
    if not wrong:
        return "holds"
    if len(wrong) == len(cells):
        return "does not hold here"
    return f"holds in part: {len(cells) - len(wrong)} of {len(cells)}, not for {', '.join(wrong)}"


def spread(groups: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Standard deviations between poisons and between victims of one poison, of a number per victim, by poison.

    One-way random effects: the variance of the poisons' means, less what victims alone would give it.  None for less
    than two poisons or one victim each.
    """
    if len(groups) < 2 or any(len(group) < 2 for group in groups):
        return None
    within = statistics.fmean(statistics.variance(group) for group in groups)
    size = statistics.fmean(len(group) for group in groups)
    between = statistics.variance([statistics.fmean(group) for group in groups]) - within / size
    return math.sqrt(max(between, 0.0)), math.sqrt(within)
