"""Label-flip attacks on one test point: upper bounds to show beside the certificates.

On the unsmoothed ridge classifier the greedy attack is optimal.  On the smoothed one (the paper's C.2) the same flips
are the best for the mean vote, and an attack counts once the attacked prediction is proved.  On the undefended
network's last layer (the paper's C.1), multinomial logistic regression, flips are ranked by influence and the model
is trained again.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pacd_fast import _C

__all__ = ["attack_logistic", "attack_ridge", "attack_smoothed", "harmful_flips"]


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
    best: np.ndarray | None = None
    fewest = len(y) + 1
    for rival in range(classes):
        if rival == winner:
            continue
        index, new, _ = harmful_flips(alpha, y, classes, winner, rival)
        good, bad = 0, len(index)  # `good` changes leave the prediction, `bad` may not
        attacked = y.copy()
        attacked[index] = new
        if _ridge_prediction(alpha, attacked, classes) == winner:
            continue
        while bad - good > 1:
            middle = (good + bad) // 2
            attacked = y.copy()
            attacked[index[:middle]] = new[:middle]
            if _ridge_prediction(alpha, attacked, classes) == winner:
                good = middle
            else:
                bad = middle
        if bad < fewest:
            fewest = bad
            best = y.copy()
            best[index[:bad]] = new[:bad]
    return best


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

    best: np.ndarray | None = None
    fewest = len(y) + 1
    for rival in range(classes):
        if rival == winner:
            continue
        index, new, _ = harmful_flips(alpha, y, classes, winner, rival)
        good, bad = 0, min(len(index), fewest)
        attacked = y.copy()
        attacked[index[:bad]] = new[:bad]
        if not changed(attacked):
            continue
        while bad - good > 1:
            middle = (good + bad) // 2
            attacked = y.copy()
            attacked[index[:middle]] = new[:middle]
            if changed(attacked):
                bad = middle
            else:
                good = middle
        if bad < fewest:
            fewest = bad
            best = y.copy()
            best[index[:bad]] = new[:bad]
    return best


class _Logistic:
    """Two-class logistic regression with a small ridge, fitted by Newton's method from where it last was."""

    def __init__(self, x: Tensor, l2: float) -> None:
        self.x, self.l2 = x, l2
        self.weight = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)

    def curvature(self, p: Tensor) -> Tensor:
        hessian = self.x.T @ (self.x * (p * (1 - p))[:, None])
        hessian.diagonal().add_(self.l2)
        return hessian

    def fit(self, y: Tensor, start: Tensor, steps: int = 20) -> Tensor:
        w = start
        for _ in range(steps):
            p = torch.sigmoid(self.x @ w)
            move = torch.linalg.solve(self.curvature(p), self.x.T @ (y - p) - self.l2 * w)
            size = float(move.norm())
            w = w + move * min(1.0, 10.0 / max(size, 1e-300))
            if size <= 1e-3 * (1 + float(w.norm())):
                break
        return w


def attack_logistic(
    X: Any, y: Any, X_test: Any, *, l2: float = 1e-2, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """How many label changes an attacker needs against undefended logistic regression (the paper's C.1).

    Per test point, training labels are ranked by their influence on its logit, x' H^-1 x_i with H as if every point had
    probability 1/2 (the fitted curvature all but vanishes for points that are told apart well, and ranks several times
    worse), and the least number of top ones is found (doubling, then bisection) whose change, with the model trained
    again, changes the prediction.  An upper
    bound on the classifier's robustness, not the least number.

    Args:
        X: [n, k] features; y: [n] of 0 and 1; X_test: [m, k].  A constant is added.
        l2: ridge on the weights, not scaled by n.

    Returns:
        The changes, int64 [m], -1 where `limit` of them are not enough; and the predictions before them, int64 [m].

    Raises:
        ValueError: for more than two classes.
    """
    x, test = (torch.as_tensor(v).double() for v in (X, X_test))
    labels = torch.as_tensor(y, device=x.device).double()
    if bool(((labels != 0) & (labels != 1)).any()):
        raise ValueError("the logistic attack is for two classes, 0 and 1")
    x, test = (torch.cat([v, v.new_ones(len(v), 1)], 1) for v in (x, test.to(x.device)))
    model = _Logistic(x, l2)
    weight = model.fit(labels, model.weight)
    inverse = torch.linalg.inv(model.curvature(torch.full_like(labels, 0.5)))
    limit = len(labels) if limit is None else min(limit, len(labels))
    flips = np.full(len(test), -1, dtype=np.int64)
    for j, point in enumerate(test):
        side = bool(point @ weight >= 0)
        # how far each change moves the logit towards the other class
        harm = (x @ (inverse @ point)) * (1 - 2 * labels) * (-1 if side else 1)
        order = harm.argsort(descending=True)
        order = order[harm[order] > 0][:limit]
        last = weight

        def attacked(r: int, order: Tensor = order, side: bool = side, point: Tensor = point) -> bool:
            nonlocal last
            changed = labels.clone()
            changed[order[:r]] = 1 - changed[order[:r]]
            last = model.fit(changed, last)
            return bool(point @ last >= 0) != side

        good, bad = 0, 8
        while bad < len(order) and not attacked(bad):
            good, bad = bad, 2 * bad
        bad = min(bad, len(order))
        if bad == 0 or not attacked(bad):
            continue
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if attacked(middle) else (middle, bad)
        flips[j] = bad
    return flips, (test @ weight >= 0).long().cpu().numpy()
