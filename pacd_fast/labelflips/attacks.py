"""Label-flip attacks on one test point: upper bounds to show beside the certificates.

On the unsmoothed ridge classifier the greedy attack is optimal.  On the smoothed one (the paper's C.2) the same flips
are the best for the mean vote, and an attack counts once the attacked prediction is proved.  On the undefended
network's last layer (the paper's C.1), multinomial logistic regression, flips are ranked by influence and the model
is trained again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pacd_fast import _C

__all__ = ["LogisticAttack", "attack_logistic", "attack_ridge", "attack_smoothed", "harmful_flips"]


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


class LogisticAttack:
    """Label flips against undefended two-class logistic regression with a small ridge (the paper's C.1).

    Flips are ranked by their influence on the test point's logit, x' H^-1 x_i with H as if every point had probability
    1/2 (the fitted curvature all but vanishes for points that are told apart well, and ranks several times worse).
    The least number of top ones that changes the prediction is found by doubling and bisection, training the model
    again each time, to a coarse solution first: an upper bound on the classifier's robustness, not the least number.

    Training is L-BFGS in the basis of the features' principal axes, where the curvature is close to diagonal, from the
    last solution: O(n k) a step.  What it learns of the curvature, which depends on the weights and not on the labels,
    is kept between the models of one test point.

    Args:
        X: [n, k] features.  A constant is added.
        y: [n] of 0 and 1.
        l2: ridge on the weights, not scaled by n.

    Attributes:
        weight: float64 [k + 1], of the model of the clean labels, in that basis.

    Raises:
        ValueError: for more than two classes.
    """

    def __init__(self, X: Any, y: Any, *, l2: float = 1e-2) -> None:
        x = torch.as_tensor(X).double()
        self._labels = torch.as_tensor(y, device=x.device).double()
        if bool(((self._labels != 0) & (self._labels != 1)).any()):
            raise ValueError("the logistic attack is for two classes, 0 and 1")
        self._l2 = l2
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        values, self._axes = torch.linalg.eigh(x.T @ x)
        self._x = x @ self._axes
        self._squares = self._x * self._x
        self._half_curvature = values.clamp(min=0) / 4 + l2
        self.weight = self._fit(self._labels, torch.zeros_like(values), [], 1e-8)

    def _point(self, x: Any) -> Tensor:
        point = torch.as_tensor(x, device=self._x.device).double()
        return torch.cat([point, point.new_ones(1)]) @ self._axes

    def predict(self, x: Any) -> int:
        """The clean model's class of a test point [k]."""
        return int(self._point(x) @ self.weight >= 0)

    def flips(self, x: Any, limit: int | None = None) -> int:
        """How many label changes changed the prediction at a test point [k]; -1 where `limit` are not enough."""
        point = self._point(x)
        side = bool(point @ self.weight >= 0)
        # how far each change moves the logit towards the other class
        harm = (self._x @ (point / self._half_curvature)) * (1 - 2 * self._labels) * (-1 if side else 1)
        order = harm.argsort(descending=True, stable=True)
        order = order[harm[order] > 0][:limit]
        weight, curvature = self.weight, []  # type: ignore[var-annotated]

        def attacked(count: int, tolerance: float = 1e-3) -> bool:
            nonlocal weight
            labels = self._labels.clone()
            labels[order[:count]] = 1 - labels[order[:count]]
            weight = self._fit(labels, weight, curvature, tolerance)
            return bool(point @ weight >= 0) != side

        good, bad = 0, 8
        while bad < len(order) and not attacked(bad):
            good, bad = bad, 2 * bad
        bad = min(bad, len(order))
        if bad == 0 or not attacked(bad):
            return -1
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if attacked(middle) else (middle, bad)
        # near the boundary a coarse solution may have the wrong sign
        if attacked(bad, 1e-8):
            while bad > 1 and attacked(bad - 1, 1e-8):
                bad -= 1
            return bad
        while bad < len(order):
            bad += 1
            if attacked(bad, 1e-8):
                return bad
        return -1

    def _fit(
        self, y: Tensor, start: Tensor, curvature: list[tuple[Tensor, Tensor, Tensor]], tolerance: float
    ) -> Tensor:
        """Weights within `tolerance` of the least loss, by the estimate -gradient @ direction; fills `curvature`."""
        w, votes = start, self._x @ start
        loss, gradient = self._loss(w, votes, y), self._gradient(w, votes, y)
        diagonal = self._diagonal(votes)
        for step in range(1, 1000):
            if step % 10 == 0:
                diagonal = self._diagonal(votes)
            direction = -_inverse(curvature, diagonal, gradient)
            slope = gradient @ direction
            if float(slope) > -tolerance:
                break
            change, length = self._x @ direction, 1.0
            while length > 1e-9:
                new = self._loss(w + length * direction, votes + length * change, y)
                if float(new) <= float(loss + 1e-4 * length * slope):
                    break
                length /= 2
            else:
                break  # no progress within rounding
            w, votes, loss = w + length * direction, votes + length * change, new
            last, gradient = gradient, self._gradient(w, votes, y)
            moved, turned = length * direction, gradient - last
            if float(moved @ turned) > 0:
                curvature.append((moved, turned, 1 / (moved @ turned)))
                del curvature[:-30]
        return w

    def _loss(self, w: Tensor, votes: Tensor, y: Tensor) -> Tensor:
        return (torch.nn.functional.softplus(votes) - y * votes).sum() + self._l2 / 2 * (w @ w)

    def _gradient(self, w: Tensor, votes: Tensor, y: Tensor) -> Tensor:
        return (torch.sigmoid(votes) - y) @ self._x + self._l2 * w

    def _diagonal(self, votes: Tensor) -> Tensor:
        p = torch.sigmoid(votes)
        return (p * (1 - p)) @ self._squares + self._l2


def _inverse(curvature: list[tuple[Tensor, Tensor, Tensor]], diagonal: Tensor, gradient: Tensor) -> Tensor:
    """L-BFGS's product of the inverse Hessian with a gradient (Nocedal and Wright 2006, algorithm 7.4)."""
    out, factors = gradient.clone(), []
    for moved, turned, scale in reversed(curvature):
        factor = scale * (moved @ out)
        factors.append(factor)
        out -= factor * turned
    out /= diagonal
    for (moved, turned, scale), factor in zip(curvature, reversed(factors), strict=True):
        out += moved * (factor - scale * (turned @ out))
    return out


def attack_logistic(
    X: Any, y: Any, X_test: Any, *, l2: float = 1e-2, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`LogisticAttack` on every test point of X_test [m, k].

    Returns:
        The changes, int64 [m], -1 where `limit` of them are not enough; and the predictions before them, int64 [m].

    Raises:
        ValueError: for more than two classes.
    """
    attack = LogisticAttack(X, y, l2=l2)
    flips = np.array([attack.flips(x, limit) for x in X_test], dtype=np.int64)
    return flips, np.array([attack.predict(x) for x in X_test], dtype=np.int64)
