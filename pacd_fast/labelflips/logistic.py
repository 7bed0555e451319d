"""Label-flip attack on undefended logistic regression (the paper's C.1): many test points at a time, trained again."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["LogisticAttack", "attack_logistic"]

_TOGETHER = 32  # points attacked at a time: the features are read from memory once for all of them
_PAIRS = 10  # steps of which L-BFGS remembers the curvature; of more, the older ones are from other labels
_SURE = 100.0  # a vote's sign counts as known this many estimated errors from zero: at 10 one in 300 points was wrong

_Search = Generator[tuple[Tensor, Tensor], float, int]


class LogisticAttack:
    """Label flips against undefended two-class logistic regression with a small ridge (the paper's C.1).

    Flips are ranked by their influence on the test point's logit, x' H^-1 x_i with H as if every point had probability
    1/2 (the fitted curvature all but vanishes for points that are told apart well, and ranks several times worse).
    The least number of top ones that changes the prediction is found by false position, training the model again each
    time until the sign of its logit is clear: an upper bound on the classifier's robustness, not the least number.

    Training is L-BFGS in the basis of the features' principal axes, where the curvature is close to diagonal, from the
    last solution: O(n k) a step, of 32 test points at a time.  The features are rounded to float32 in that basis, which
    moves a logit by about 1e-7 of the sizes of its terms; votes, losses and weights are float64.

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
        self._half_curvature = values.clamp(min=0) / 4 + l2
        nothing = torch.zeros_like(values)
        clean = _Fits(self._x, l2, nothing, [(nothing, self._labels)])
        while not clean.known():
            clean.step([])
        self.weight = clean.weight[0]

    def predict(self, x: Any) -> int:
        """The clean model's class of a test point [k]."""
        return int(self._point(x) @ self.weight >= 0)

    def flips(self, X: Any, limit: int | None = None) -> Iterator[tuple[int, int]]:
        """(index, changes) of the test points X [m, k], each as it is done: so many changes changed the prediction.

        -1 where `limit` are not enough.
        """
        done: list[tuple[int, int]] = []
        waiting = enumerate(self._point(x) for x in X)

        def one_by_one() -> Generator[tuple[Tensor, Tensor], float, None]:
            for index, point in waiting:
                done.append((index, (yield from self._search(point, limit))))

        searches, questions = [], []
        for search in (one_by_one() for _ in range(_TOGETHER)):
            if (question := next(search, None)) is not None:
                searches.append(search)
                questions.append(question)
        fits = _Fits(self._x.float(), self._l2, self.weight, questions) if questions else None
        while fits is not None and searches:
            ended, known = [], fits.known()
            for row in known:
                try:
                    fits.ask(row, *searches[row].send(fits.vote(row)))
                except StopIteration:
                    ended.append(row)
            yield from done
            done.clear()
            fits.step(known)
            if ended:
                left = [row for row in range(len(searches)) if row not in ended]
                searches = [searches[row] for row in left]
                fits.keep(left)
        yield from done

    def _point(self, x: Any) -> Tensor:
        point = torch.as_tensor(x, device=self._x.device).double()
        return torch.cat([point, point.new_ones(1)]) @ self._axes

    def _search(self, point: Tensor, limit: int | None) -> _Search:
        """The least number of top flips that change the prediction; is sent the logit of the (point, labels) it yields.

        It takes the prediction for monotone in the number, and the logit for close to linear.
        """
        clean = float(point @ self.weight)
        side = -1 if clean >= 0 else 1
        # how far each change moves the logit towards the other class
        harm = (self._x @ (point / self._half_curvature)) * (1 - 2 * self._labels) * side
        order = harm.argsort(descending=True, stable=True)
        order = order[harm[order] > 0][:limit]
        good, left, bad, right = 0, abs(clean), len(order) + 1, 0.0
        guess, asked = 8, 0
        while bad - good > 1:
            guess, asked = min(max(guess, good + 1), bad - 1), asked + 1
            labels = self._labels.clone()
            labels[order[:guess]] = 1 - labels[order[:guess]]
            logit = yield point, labels
            if (logit >= 0) == (clean >= 0):
                good, left = guess, abs(logit)
            else:
                bad, right = guess, -abs(logit)
            if bad > len(order):
                guess = min(4 * good, math.ceil(1.1 * good * abs(clean) / max(abs(clean) - left, 1e-9)))
            elif asked % 3 == 0:  # where the logit is far from linear
                guess = (good + bad) // 2
            else:
                guess = good + math.ceil((bad - good) * left / max(left - right, 1e-9))
        return bad if bad <= len(order) else -1


class _Fits:
    """Logistic regressions on the same features, for several labels, by L-BFGS: a step of all of them at a time.

    Weights, votes and losses are float64.  Products with the features and the memory of steps are of the features'
    dtype: in float32 they are twice as fast, and a direction spoilt by rounding ends where the loss does not fall.

    Args:
        x: float32 or float64 [n, k].
        l2: ridge.
        start: float64 [k], the weights where the first fit for a point starts; the next starts from the last.
        questions: for each row, a point whose logit is wanted, float64 [k], and the labels, float64 [n].

    Attributes:
        weight: float64 [rows, k].
    """

    weight: Tensor
    _votes: Tensor  # [rows, n]
    _diagonal: Tensor  # of the Hessian, [rows, k]
    _moved: Tensor  # of the last steps, [rows, _PAIRS, k]
    _turned: Tensor  # the gradient, in those steps

    def __init__(self, x: Tensor, l2: float, start: Tensor, questions: list[tuple[Tensor, Tensor]]) -> None:
        self._x, self._squares, self._l2, self._taken = x, x * x, l2, 0
        votes = x.double() @ start
        self._start = {"weight": start, "_votes": votes, "_diagonal": self._curvature(votes)}
        self._start |= {name: x.new_zeros(_PAIRS, x.shape[1]) for name in ("_moved", "_turned")}
        for name, value in self._start.items():
            setattr(self, name, value.expand(len(questions), *value.shape).clone())
        self._points = [point for point, _ in questions]
        self._labels = torch.stack([labels for _, labels in questions])
        self._stuck = votes.new_zeros(len(questions))
        self._loss, self._gradient = self._losses(slice(None), self.weight, self._votes), self._slopes()

    def keep(self, rows: list[int]) -> None:
        """Forgets all rows but these."""
        for name in (*self._start, "_labels", "_stuck", "_loss", "_gradient"):
            setattr(self, name, getattr(self, name)[rows])
        self._points = [self._points[row] for row in rows]

    def ask(self, row: int, point: Tensor, labels: Tensor) -> None:
        """Other labels for a row, from the next `step` on, which is to be told."""
        if point is not self._points[row]:
            self._points[row] = point
            for name, value in self._start.items():
                getattr(self, name)[row] = value
        self._labels[row], self._stuck[row] = labels, 0

    def vote(self, row: int) -> float:
        """The logit of a row's point."""
        return float(self._points[row] @ self.weight[row])

    def known(self) -> list[int]:
        """The rows whose vote has a sign that further steps will not change; plans the next step.

        The loss is within half the decrement of the least, and the vote within a multiple of the root of decrement
        x'H^-1x of its last value: by the estimate of H, hence _SURE.
        """
        point = torch.stack(self._points)
        inverse = self._inverse(torch.stack([self._gradient, point], 1).to(self._x)).double()
        self._direction = -inverse[:, 0]
        decrement = (self._gradient * inverse[:, 0]).sum(1)
        vote, spread = (point * self.weight).sum(1), (point * inverse[:, 1]).sum(1)
        sure = (decrement < 1) & (vote * vote > _SURE**2 * decrement * spread)
        self._slope = -decrement
        return (sure | (decrement <= 1e-8) | (self._stuck > 0)).nonzero().flatten().tolist()

    def step(self, resting: list[int]) -> None:
        """A step of all rows but those `resting`, which were asked something else or are about to go."""
        change = self._product(self._direction, self._x.T)
        length = torch.ones_like(self._loss)
        length[resting] = 0
        weight, votes, loss = self.weight.clone(), self._votes.clone(), self._loss.clone()
        loss[resting] = self._losses(resting, weight[resting], votes[resting])
        rows = length.nonzero().flatten()
        while len(rows):  # those whose step is still too long
            weight[rows] = self.weight[rows] + length[rows, None] * self._direction[rows]
            votes[rows] = self._votes[rows] + length[rows, None] * change[rows]
            loss[rows] = self._losses(rows, weight[rows], votes[rows])
            rows = rows[~(loss <= self._loss + 1e-4 * length * self._slope)[rows]]
            length[rows] /= 2
            hopeless = length[rows] < 1e-9  # no progress within rounding
            stuck, rows = rows[hopeless], rows[~hopeless]
            self._stuck[stuck], length[stuck] = 1, 0
            weight[stuck], votes[stuck], loss[stuck] = self.weight[stuck], self._votes[stuck], self._loss[stuck]
        self.weight, self._votes, self._loss, moved = weight, votes, loss, weight - self.weight
        last = self._gradient
        self._gradient = self._slopes()
        turned = self._gradient - last
        product = (moved * turned).sum(1)
        scale = torch.where((length > 0) & (product > 0), product, math.inf).rsqrt()[:, None]
        self._moved = torch.cat([self._moved[:, 1:], (scale * moved)[:, None].to(self._x)], 1)
        self._turned = torch.cat([self._turned[:, 1:], (scale * turned)[:, None].to(self._x)], 1)
        self._taken += 1
        if self._taken % 10 == 0:
            self._diagonal = self._curvature(self._votes)

    def _product(self, rows: Tensor, matrix: Tensor) -> Tensor:
        return (rows.to(matrix) @ matrix).double()

    def _losses(self, rows: Tensor | list[int] | slice, weight: Tensor, votes: Tensor) -> Tensor:
        own = (torch.nn.functional.softplus(votes) - self._labels[rows] * votes).sum(1)
        return own + self._l2 / 2 * (weight * weight).sum(1)

    def _slopes(self) -> Tensor:
        return self._product(torch.sigmoid(self._votes) - self._labels, self._x) + self._l2 * self.weight

    def _curvature(self, votes: Tensor) -> Tensor:
        p = torch.sigmoid(votes)
        return (p * (1 - p)).to(self._squares) @ self._squares + self._l2

    def _inverse(self, v: Tensor) -> Tensor:
        """L-BFGS's inverse Hessian times v [rows, 2, k] (Byrd, Nocedal and Schnabel 1994, theorem 2.2).

        A pair has moved . turned = 1, or is zero and changes nothing.
        """
        moved, over = self._moved, self._turned / self._diagonal[:, None]
        first = v / self._diagonal[:, None]
        triangle = torch.triu(moved @ self._turned.mT, 1) + torch.eye(_PAIRS, dtype=v.dtype, device=v.device)
        along = torch.linalg.solve_triangular(triangle, moved @ v.mT, upper=True)
        twice = along + (over @ self._turned.mT) @ along - over @ v.mT
        back = torch.linalg.solve_triangular(triangle.mT, twice, upper=False)
        return first + back.mT @ moved - along.mT @ over


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
    flips = np.zeros(len(X_test), dtype=np.int64)
    for index, count in attack.flips(X_test, limit):
        flips[index] = count
    return flips, np.array([attack.predict(x) for x in X_test], dtype=np.int64)
