"""Label-flip attacks on one test point: upper bounds to show beside the certificates.

On the unsmoothed ridge classifier the greedy attack is optimal.  On the smoothed one (the paper's C.2) the same flips
are the best for the mean vote, and an attack counts once the attacked prediction is proved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from pacd_fast import _C

__all__ = ["attack_ridge", "attack_smoothed", "harmful_flips"]


def _arrays(alpha: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    alpha = np.ascontiguousarray(alpha.cpu().numpy() if isinstance(alpha, Tensor) else alpha, dtype=np.float64)
    y = np.ascontiguousarray(y.cpu().numpy() if isinstance(y, Tensor) else y, dtype=np.int64)
    if alpha.ndim != 1 or alpha.shape != y.shape:
        raise ValueError(f"alpha and y must be vectors over the training points, not {alpha.shape} and {y.shape}")
    return alpha, y


def harmful_flips(
    alpha: np.ndarray, y: np.ndarray, classes: int, winner: int, rival: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The label changes that move the vote from `winner` to `rival`, worst first: (index, new label, harm).

    A label with positive influence becomes the rival's, one with negative influence the winner's.  Two classes: a
    change moves the vote by |alpha|; K classes: the vote is the difference of two sums, and winner <-> rival moves
    both.
    """
    new = np.where(alpha > 0, rival, winner)
    both = (y == winner) | (y == rival)
    harm = np.abs(alpha) * np.where(both & (classes > 2), 2.0, 1.0)
    index = np.flatnonzero((new != y) & (alpha != 0))
    index = index[np.argsort(-harm[index], kind="stable")]
    return index, new[index], harm[index]


def _ridge_prediction(alpha: np.ndarray, y: np.ndarray, classes: int) -> int:
    if classes == 2:
        return int(math.fsum([*alpha[y == 1], -0.5]) >= 0)
    return int(np.argmax([math.fsum(alpha[y == c]) for c in range(classes)]))


def attack_ridge(alpha: Any, y: Any, classes: int) -> np.ndarray | None:
    """The fewest label changes that change the unsmoothed prediction: attacked labels int64 [n], or None if none do.

    Args:
        alpha: float64 [n], one row of `LabelFlipCertifier.influences`.
        y: int64 [n], 0 to classes - 1.
    """
    alpha, y = _arrays(alpha, y)
    winner = _ridge_prediction(alpha, y, classes)
    return _worst_flips(alpha, y, classes, winner, lambda labels: _ridge_prediction(alpha, labels, classes) != winner)


def attack_smoothed(alpha: Any, y: Any, q: float, classes: int) -> np.ndarray | None:
    """Few label changes that provably change the smoothed prediction (the paper's C.2): attacked labels [n], or None.

    The worst flips for the mean vote, as few as it takes until the white-box certificate holds for another class: so
    the number is an upper bound on what any certificate for this smoothed classifier can say.
    """
    alpha, y = _arrays(alpha, y)
    rows = alpha[None]
    winner = int(_C.linear_flips(rows, y, q, classes, True)[0][0])

    def changed(labels: np.ndarray) -> bool:
        said, flips = _C.linear_flips(rows, labels, q, classes, True)
        return bool(said[0] != winner and flips[0] >= 1)

    return _worst_flips(alpha, y, classes, winner, changed)


def _worst_flips(
    alpha: np.ndarray, y: np.ndarray, classes: int, winner: int, changed: Callable[[np.ndarray], bool]
) -> np.ndarray | None:
    """The fewest of the worst flips, over all rivals, after which `changed` says yes; it must be monotone in them."""
    best: np.ndarray | None = None
    fewest = len(y) + 1
    for rival in range(classes):
        if rival == winner:
            continue
        index, new, _ = harmful_flips(alpha, y, classes, winner, rival)

        def attacked(count: int, index: np.ndarray = index, new: np.ndarray = new) -> np.ndarray:
            labels = y.copy()
            labels[index[:count]] = new[:count]
            return labels

        good, bad = 0, min(len(index), fewest)
        if not changed(attacked(bad)):
            continue
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if changed(attacked(middle)) else (middle, bad)
        if bad < fewest:
            fewest, best = bad, attacked(bad)
    return best
