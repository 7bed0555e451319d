"""How much to regularise: the ridge parameter from effective degrees of freedom, or by the paper's rule.

The effective degrees of freedom of ridge regression are sum v / (v + l2) over the eigenvalues v of X'X; divided by the
number of points they are the mean leverage: what share of a fitted value the point's own label has on average.
"""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["automatic_freedom", "l2_of_freedom", "papers_l2"]


def automatic_freedom(values: Tensor, points: int) -> float:
    """Two thirds of the features' degrees of freedom, but at most max(sqrt(n), n / 40).

    The first keeps narrow features nearly as they are.  The second bounds the mean leverage: hundreds of features for
    hundreds of points would let every label decide its own point, and an attacker need a handful of flips
    (benchmarks/bench_labelflip.py compares rules).

    Args:
        values: the eigenvalues of X'X that are not 0.
        points: n.
    """
    return min(2 * len(values) / 3, max(math.sqrt(points), points / 40))


def l2_of_freedom(values: Tensor, freedom: float) -> float:
    """The l2 with sum v / (v + l2) = freedom, by bisection of its logarithm; 0 without eigenvalues.

    Args:
        values: float64 [k], ascending, positive.
        freedom: in (0, k).
    """
    if len(values) == 0:
        return 0.0
    # sum v / (v + l2) >= freedom at l2 = (k / freedom - 1) times the smallest value, and <= freedom at that much of
    # the largest
    share = math.log(len(values) / freedom - 1)
    low, high = math.log(float(values[0])) + share - 1e-3, math.log(float(values[-1])) + share + 1e-3
    for _ in range(60):
        middle = (low + high) / 2
        if float((values / (values + math.exp(middle))).sum()) > freedom:
            low = middle
        else:
            high = middle
    return math.exp(low)


def papers_l2(design: Tensor, targets: Tensor, values: Tensor, vectors: Tensor, q: float, intercept: bool) -> float:
    """(1 + q) s^2 k cond(X'X) / (2 n), s^2 the residual variance of least squares: it reads the labels.

    Args:
        design: [n, k], centred with an intercept.
        targets: [n, K] of 0 and 1; one column for two classes.
        values, vectors: of X'X where the features vary, [k'] ascending and [k, k'].

    Raises:
        ValueError: where least squares has no degree of freedom left for s^2.
    """
    n, k = len(design), len(values)
    freedom = n - k - intercept
    if freedom < 1:
        raise ValueError(f'l2="paper" needs more points ({n}) than features that vary ({k}): use l2="auto"')
    if intercept:
        targets = targets - targets.mean(0)
    fitted = design @ ((vectors / values) @ (vectors.T @ (design.T @ targets)))
    residual = float(((targets - fitted) ** 2).sum() / targets.shape[1] / freedom)
    return (1 + q) * residual * k / (2 * n) * float(values[-1] / values[0])
