"""From influences to a bound on the losing classes' probability, and from that to flips: closed form and tight rule."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pacd_fast import _C, ops

__all__ = ["exact_flips", "kl_flips", "losing_tail", "union"]


def kl_flips(log_tail: np.ndarray, q: float, classes: int, limit: int) -> np.ndarray:
    """The paper's closed form (equation 5): the largest r with r KL < -log(4 p (1 - p)) / 2, at most `limit`.

    KL = (keep - other) log(keep / other) for one label, keep = 1 - q, other = q / (K - 1): for two classes equation 4.
    Strict, because with equality the attacked vote may be tied.  Each side is rounded so that r is never too large.

    Args:
        log_tail: float64, any shape, log of an upper bound on 1 - p; -inf where p is 1.
        q: label noise, in (0, (K - 1) / K).
        classes: K.
        limit: the number of training labels.

    Returns:
        int64 of log_tail's shape; 0 where 1 - p may be 1/2 or more.
    """
    u = 2.0**-53
    keep, other = 1.0 - q, q / (classes - 1)
    gap = (keep - other) + 4 * u
    per_flip = gap * math.log1p(gap / (other * (1 - 4 * u))) * (1 + 16 * u)
    log_tail = np.asarray(log_tail, dtype=np.float64)
    useful = log_tail < -math.log(2) * (1 + 4 * u)
    # per_flip is 2e-31 or more, so that budget / per_flip of a tail no smaller than exp(-1e200) is finite
    x = np.where(useful, np.maximum(log_tail, -1e200), -1.0)
    budget = -0.5 * (math.log(4) + x + np.log1p(-np.exp(x))) - 8 * u * (2 + np.abs(x))
    flips = np.ceil(budget / per_flip * (1 - 4 * u)) - 1
    return np.where(useful, np.clip(flips, 0, limit), 0).astype(np.int64)


def exact_flips(log_tail: np.ndarray, q: float, classes: int, limit: int) -> np.ndarray:
    """The tight answer for a base classifier of which only 1 - p <= exp(log_tail) is known (Neyman-Pearson): the
    largest r with 1 - p < tau(r), at most `limit`; tau from `_C.flip_table`, rounded down.  Arguments and result as
    those of `kl_flips`.
    """
    log_tail = np.asarray(log_tail, dtype=np.float64)
    if log_tail.size == 0:
        return np.zeros(log_tail.shape, dtype=np.int64)
    table = _C.flip_table(q, classes, limit, float(log_tail.min()))
    return np.maximum(np.searchsorted(-table, -log_tail, side="left") - 1, 0).astype(np.int64)


def union(log_tails: Tensor) -> Tensor:
    """log of a sum of probabilities, rounded up, at most 0: float64 [m, P] of logarithms -> [m].

    torch.logsumexp is within (P + 3) 2^-53 + 2^-53 |result|; 16 times as much is added.
    """
    total = torch.logsumexp(log_tails, 1).clamp(min=-1e300)
    return (total + 2.0**-49 * (total.abs() + log_tails.shape[1] + 1)).clamp(max=0.0)


def losing_tail(alpha: Tensor, labels: Tensor, prediction: Tensor, q: float, classes: int) -> Tensor:
    """log of an upper bound on P(the base classifier does not say `prediction`) under label noise, at most 0.

    Two classes: Chernoff's bound on alpha @ y.  K classes: the union of its bounds on the K - 1 rivals.  A prediction
    that is not the more probable side of a vote gets 0, which says nothing.

    Args:
        alpha: float64 [m, n], influences.
        labels: int64 [n], 0 to K - 1.
        prediction: int64 [m].
        q: label noise.
        classes: K.

    Returns:
        float64 [m].

    Raises:
        ValueError: where influences overflow.
    """
    if classes == 2:
        t, log_tail = ops.chernoff_newton(alpha, labels, q)
        agrees = (t >= 0) == (prediction == 1)
    else:
        others = torch.arange(classes - 1, device=alpha.device)
        rivals = others + (others >= prediction[:, None])
        pairs = torch.stack([prediction[:, None].expand_as(rivals), rivals], -1)
        t, log_tail = ops.chernoff_newton_pairs(alpha, labels, pairs, q, classes)
        agrees = t >= 0
    if bool(torch.isnan(log_tail).any()):
        raise ValueError("influences overflow float64: rescale the features")
    log_tail = torch.where(agrees, log_tail, torch.zeros_like(log_tail))
    return union(log_tail) if classes > 2 else log_tail.clamp(max=0.0)
