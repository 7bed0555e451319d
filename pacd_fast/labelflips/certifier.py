"""Label-flip certificates: how many adversarial training labels a prediction survives.

The base classifier is ridge regression on given features, so its prediction is linear in the labels: alpha(x) @ y.  The
smoothed classifier g predicts what the base classifier says most often when every label is changed at random with
probability q (Rosenfeld et al., "Certified Robustness to Label-Flipping Attacks via Randomized Smoothing", 2020).  No
sampling is involved: the probability of the other answers is bounded analytically.

Four certificates for one test point, all of them numbers r such that no change of up to r training labels changes the
prediction:

- ``"kl"``: the paper's closed form, r KL < -log(4 p (1 - p)) / 2, from the bound on 1 - p alone.
- ``"exact"``: the tight answer from the bound on 1 - p alone (Neyman-Pearson); about twice as many flips.
- ``"whitebox"``: uses that the vote is linear: what r flips do to its mean and variance, Cantelli and Berry-Esseen.
- ``"ridge"``: the classifier *without* smoothing, whose answer is exact; the baseline to show beside every number.

Two classes: the base classifier says 1 where alpha @ y >= 1/2.  K classes: it says argmax_c of the sum of alpha over
the labels c; 1 - p is bounded by the sum over the K - 1 rivals of the probability that the rival's sum is not below
the winner's.  Where that is below 1/2 the winner has the majority, so it is the most probable class and beats every
rival pairwise, whatever the tie rule; all comparisons are strict.  A certificate is about g with the influences as
computed (float64): they do not depend on the labels, so an attack on the labels cannot change them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pacd_fast import _C, ops
from pacd_fast.labelflips.attacks import attack_logistic, attack_ridge, attack_smoothed
from pacd_fast.labelflips.features import (
    Whitening,
    fast_ica,
    network_features,
    pca,
    random_convolutions,
    train_feature_network,
)

__all__ = [
    "CERTIFICATES",
    "FlipCertificates",
    "LabelFlipCertifier",
    "Whitening",
    "attack_logistic",
    "attack_ridge",
    "attack_smoothed",
    "exact_flips",
    "fast_ica",
    "kl_flips",
    "network_features",
    "pca",
    "random_convolutions",
    "train_feature_network",
]

CERTIFICATES = ("kl", "exact", "whitebox", "ridge")


@dataclass(frozen=True)
class FlipCertificates:
    """What `LabelFlipCertifier.certify` says about m test points; numpy arrays or tensors, like the features.

    Attributes:
        prediction: int64 [m], the class.
        flips: int64 [m], the number of label changes that cannot change it; 0 where nothing can be certified.
        log_tail: float64 [m], log of an upper bound on 1 - p, p the probability of the prediction under label noise; 0
            where nothing can be said, -inf for ``"ridge"``, which has no noise.  Below -log 2 the prediction is g's.
    """

    prediction: Any
    flips: Any
    log_tail: Any

    def certified_accuracy(self, y: Any, r: int) -> float:
        """The share of points that are right and certified against r flips (r = 0: that are right)."""
        right = _array(self.prediction) == _array(y)
        return float(np.mean(right & (_array(self.flips) >= r)))


def _array(values: Any) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def kl_flips(log_tail: np.ndarray, q: float, classes: int, limit: int) -> np.ndarray:
    """The paper's closed form (equation 5): the largest r with r KL < -log(4 p (1 - p)) / 2, at most `limit`.

    KL = (keep - other) log(keep / other) for one label, keep = 1 - q, other = q / (K - 1): for two classes equation 4.
    Strict, because with equality the attacked vote may be tied.  Each side is rounded so that r is never too large.
    """
    u = 2.0**-53
    keep, other = 1.0 - q, q / (classes - 1)
    gap = (keep - other) + 4 * u
    per_flip = gap * math.log1p(gap / (other * (1 - 4 * u))) * (1 + 16 * u)
    log_tail = np.asarray(log_tail, dtype=np.float64)
    useful = log_tail < -math.log(2) * (1 + 4 * u)
    x = np.where(useful, np.maximum(log_tail, -1e300), -1.0)
    budget = -0.5 * (math.log(4) + x + np.log1p(-np.exp(x))) - 8 * u * (2 + np.abs(x))
    flips = np.ceil(budget / per_flip * (1 - 4 * u)) - 1
    return np.where(useful, np.clip(flips, 0, limit), 0).astype(np.int64)


def exact_flips(log_tail: np.ndarray, q: float, classes: int, limit: int) -> np.ndarray:
    """The tight answer for a base classifier of which only 1 - p <= exp(log_tail) is known: the largest r with
    1 - p < tau(r), at most `limit`; tau from `_C.flip_table`, rounded down."""
    log_tail = np.asarray(log_tail, dtype=np.float64)
    if log_tail.size == 0:
        return np.zeros(log_tail.shape, dtype=np.int64)
    table = _C.flip_table(q, classes, limit, float(log_tail.min()))
    return np.maximum(np.searchsorted(-table, -log_tail, side="left") - 1, 0).astype(np.int64)


def _union(log_tails: Tensor) -> Tensor:
    """log of a sum of probabilities [m, P] -> [m], rounded up, at most 0."""
    top = log_tails.amax(1, keepdim=True)
    total = top.squeeze(1) + torch.exp(log_tails - top).sum(1).log()
    return (total + 2.0**-49 * (total.abs() + log_tails.shape[1] + 1)).clamp(max=0.0)


def _tensor(values: Any, name: str) -> Tensor:
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    if name == "y":
        if tensor.dim() != 1:
            raise ValueError(f"y must be one label per training point, a vector, not {tuple(tensor.shape)}")
        if tensor.is_floating_point() and not bool((tensor == tensor.round()).all()):
            raise ValueError("y must hold whole numbers 0 to K - 1")
        return tensor.long()
    if tensor.dim() != 2:
        raise ValueError(
            f"{name} must be [points, features], not {tuple(tensor.shape)}: flatten each point to a row of features"
        )
    tensor = tensor.detach().double()
    if not bool(torch.isfinite(tensor).all()):
        row = int((~torch.isfinite(tensor).all(1)).nonzero()[0])
        raise ValueError(f"{name} has NaN or infinity (first in row {row}): fill in or leave out those points")
    return tensor


def _two_thirds_freedom(values: Tensor) -> float:
    """The l2 with sum(v / (v + l2)) = 2 len(v) / 3, by bisection of its logarithm; 0 without features."""
    if len(values) == 0:
        return 0.0
    low, high = math.log(float(values[0])) - 1.0, math.log(float(values[-1])) + 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if float((values / (values + math.exp(middle))).sum()) > 2 * len(values) / 3:
            low = middle
        else:
            high = middle
    return math.exp(low)


class LabelFlipCertifier:
    """Ridge regression smoothed over its training labels, with certificates against label flips.

    Args:
        q: label noise: every training label is changed with this probability.  In (0, 1/2) for two classes,
            (0, (K - 1) / K) for K.  More noise certifies more flips per unit of margin and leaves less margin.
        l2: the ridge parameter.  ``"auto"``: the one that keeps two thirds of the features' effective degrees of
            freedom, sum of v / (v + l2) = 2 k / 3 over the eigenvalues v of X'X that are not 0; it reads no label,
            and does not depend on the features' scale.  ``"paper"``: the paper's (1 + q) s^2 k cond(X'X) / (2 n), s^2
            the residual variance of least squares; it reads the labels, so its certificates are *conditional* on an
            attacker who leaves that parameter as it is (`conditional_` is then True).  Or a number, not negative.
        certificate: ``"kl"``, ``"exact"``, ``"whitebox"`` or ``"ridge"``; see the module.
        intercept: add an unpenalised constant (features are centred).  Influences then sum to one, and the mean
            vote under noise is 1/2 exactly where the unsmoothed vote is.  False is the paper's classifier.
        memory_budget: bytes for the influences [rows, n] of the test points that are worked on at once.
        classes: K, by default the largest label + 1.  K is part of the rule: certificates hold for labels that are
            changed among these K.  Whoever fits again on labels that may have lost a class gives the same K.

    Attributes after `fit`: ``classes_`` (K), ``l2_`` (the number), ``conditional_``, ``coef_`` [k, K].

    Example:
        >>> certifier = LabelFlipCertifier(q=0.1).fit(X, y)
        >>> certificates = certifier.certify(X_test)
        >>> certificates.prediction, certificates.flips
    """

    def __init__(
        self,
        q: float = 0.1,
        l2: str | float = "auto",
        certificate: str = "exact",
        *,
        intercept: bool = True,
        memory_budget: int = 256 * 2**20,
        classes: int | None = None,
    ) -> None:
        self.q = q
        self.l2 = l2
        self.certificate = certificate
        self.intercept = intercept
        self.memory_budget = memory_budget
        self.classes = classes

    def fit(self, X: Any, y: Any) -> LabelFlipCertifier:
        """Features X [n, k] and labels y [n] of 0..K-1, numpy arrays or tensors (CPU or CUDA).

        Raises:
            ValueError: with what to change.
        """
        x, labels = _tensor(X, "X"), _tensor(y, "y")
        labels = labels.to(x.device)
        if len(x) != len(labels):
            raise ValueError(
                f"X has {len(x)} points and y has {len(labels)} labels: they must be the same training points"
            )
        if len(x) == 0:
            raise ValueError("X has no points: at least one of every class is needed")
        low, classes = int(labels.min()), int(labels.max()) + 1
        if low < 0:
            raise ValueError(
                f"labels must be 0 to K - 1, found {low}: renumber them with np.unique(y, return_inverse=True)[1]"
            )
        if self.classes is not None:
            if not isinstance(self.classes, int) or self.classes < max(2, classes):
                raise ValueError(f"classes must be at least {max(2, classes)} for these labels, not {self.classes}")
            classes = self.classes
        if classes < 2:
            raise ValueError("y has one class only: at least two are needed")
        counts = torch.bincount(labels, minlength=classes)
        if self.classes is None and bool((counts == 0).any()):
            missing = (counts == 0).nonzero().flatten().tolist()[:5]
            raise ValueError(
                f"labels are 0 to {classes - 1}, but none is {missing[0] if len(missing) == 1 else missing}: "
                "renumber them with np.unique(y, return_inverse=True)[1]"
            )
        top = (classes - 1) / classes
        if not (isinstance(self.q, (int, float)) and 1e-300 <= self.q < top):
            raise ValueError(
                f"q must be in (0, {top:.4g}) for {classes} classes, not {self.q}: a label must most probably stay"
            )
        if self.certificate not in CERTIFICATES:
            raise ValueError(f"certificate must be one of {', '.join(CERTIFICATES)}, not {self.certificate!r}")
        n, k = x.shape
        self.mean_ = x.mean(0) if self.intercept else torch.zeros(k, dtype=torch.float64, device=x.device)
        self.design_ = x - self.mean_
        gram = self.design_.T @ self.design_
        if not bool(torch.isfinite(gram).all()):
            raise ValueError("the features' squares are beyond float64: rescale X")
        values, vectors = torch.linalg.eigh(gram)
        if float(values[-1]) <= 1e-24 * float((x * x).sum()):
            raise ValueError(
                "all features are constant over the training points, so they tell nothing apart: use other features"
            )
        self.classes_, self.labels_ = classes, labels
        self.l2_ = self._choose_l2(values, vectors, labels)
        self.conditional_ = self.l2 == "paper"
        scale = values.clamp(min=0) + self.l2_
        if self.l2_ == 0 and (k > n or bool(values[0] <= 1e-13 * k * values[-1])):
            raise ValueError(
                f"{k} features for {n} points without regularisation have no unique solution: "
                'use l2="auto" or l2 > 0, or fewer features'
            )
        self.solver_ = (vectors / scale) @ vectors.T
        onehot = torch.nn.functional.one_hot(labels, classes).double()
        self.coef_ = self.solver_ @ (self.design_.T @ onehot)
        self.prior_ = onehot.mean(0) if self.intercept else torch.zeros(classes, dtype=torch.float64, device=x.device)
        return self

    def _choose_l2(self, values: Tensor, vectors: Tensor, labels: Tensor) -> float:
        n, k = self.design_.shape
        if self.l2 == "auto":
            return _two_thirds_freedom(values[values > 1e-13 * k * values[-1]])
        if self.l2 == "paper":
            used = values > 1e-13 * k * values[-1]  # a feature that never varies has no part in least squares
            k = int(used.sum())
            freedom = n - k - self.intercept
            if freedom < 1:
                raise ValueError(f'l2="paper" needs more points ({n}) than features that vary ({k}): use l2="auto"')
            values, vectors = values[used], vectors[:, used]
            targets = torch.nn.functional.one_hot(labels, self.classes_).double()[:, 1 if self.classes_ == 2 else 0 :]
            if self.intercept:
                targets = targets - targets.mean(0)
            fitted = self.design_ @ ((vectors / values) @ (vectors.T @ (self.design_.T @ targets)))
            residual = float(((targets - fitted) ** 2).sum() / targets.shape[1] / freedom)
            return (1 + self.q) * residual * k / (2 * n) * float(values[-1] / values[0])
        if isinstance(self.l2, (int, float)) and math.isfinite(self.l2) and self.l2 >= 0:
            return float(self.l2)
        raise ValueError(f'l2 must be "auto", "paper" or a number that is not negative, not {self.l2!r}')

    def _features(self, X: Any) -> Tensor:
        if not hasattr(self, "solver_"):
            raise ValueError("fit the certifier first: LabelFlipCertifier(...).fit(X, y)")
        x = _tensor(X, "X").to(self.mean_.device)
        if x.shape[1] != len(self.mean_):
            raise ValueError(
                f"X has {x.shape[1]} features, the certifier was fitted on {len(self.mean_)}: use the same feature map"
            )
        return x

    def influences(self, X: Any) -> Tensor:
        """alpha float64 [m, n]: the base classifier's sum of class c at test point j is alpha[j, y == c].sum()."""
        x = self._features(X)
        alpha = ((x - self.mean_) @ self.solver_) @ self.design_.T
        return alpha.add_(1 / len(self.design_)) if self.intercept else alpha

    def _scores(self, x: Tensor) -> Tensor:
        """The unsmoothed sum of every class, [m, K]: influences(x) @ onehot without the influences."""
        return (x - self.mean_) @ self.coef_ + self.prior_

    def _predict(self, x: Tensor, smoothed: bool) -> Tensor:
        scores = self._scores(x)
        if self.classes_ > 2:
            return scores.argmax(1)  # under label noise scores shrink by a common factor and shift by a common amount
        vote = (1 - self.q) * scores[:, 1] + self.q * scores[:, 0] if smoothed else scores[:, 1]
        return (vote >= 0.5).long()

    def predict(self, X: Any) -> Any:
        """The class of every test point [m]: the majority vote under label noise (``"ridge"``: without noise)."""
        prediction = self._predict(self._features(X), self.certificate != "ridge")
        return prediction if isinstance(X, Tensor) else prediction.cpu().numpy()

    def certify(self, X: Any) -> FlipCertificates:
        """Prediction and certificate of every test point of X [m, k].

        Raises:
            ValueError: for features of the wrong shape or with NaN.
        """
        return self.certify_all(X, (self.certificate,))[self.certificate]

    def certify_all(self, X: Any, certificates: Sequence[str] = CERTIFICATES) -> dict[str, FlipCertificates]:
        """Several certificates from one pass over the influences."""
        if unknown := set(certificates) - set(CERTIFICATES):
            raise ValueError(f"certificates are {', '.join(CERTIFICATES)}, not {', '.join(map(repr, sorted(unknown)))}")
        x = self._features(X)
        n, smoothed = len(self.design_), set(certificates) != {"ridge"}
        rows = max(1, int(self.memory_budget) // (8 * n))
        predictions = {True: self._predict(x, True).cpu().numpy(), False: self._predict(x, False).cpu().numpy()}
        log_tail = np.zeros(len(x))
        linear = {True: np.zeros(len(x), dtype=np.int64), False: np.zeros(len(x), dtype=np.int64)}
        labels = self.labels_.cpu().numpy()
        for begin in range(0, len(x), rows):
            part = slice(begin, min(begin + rows, len(x)))
            alpha = self.influences(x[part])
            if smoothed:
                log_tail[part] = (
                    self._log_tail(alpha, torch.from_numpy(predictions[True][part]).to(alpha.device)).cpu().numpy()
                )
            for noisy, name in ((True, "whitebox"), (False, "ridge")):
                if name in certificates:
                    said, flips = _C.linear_flips(
                        alpha.cpu().numpy(), labels, self.q, self.classes_, noisy, torch.get_num_threads()
                    )
                    linear[noisy][part] = np.where(said == predictions[noisy][part], flips, 0)
            del alpha
        out = {}
        for name in certificates:
            if name == "ridge":
                flips, tail = linear[False], np.full(len(x), -np.inf)
            else:
                rule = kl_flips if name == "kl" else exact_flips
                flips, tail = rule(log_tail, self.q, self.classes_, n), log_tail
                if name == "whitebox":  # the same classifier, so the better of the two proofs stands
                    flips = np.maximum(flips, linear[True])
            arrays = (predictions[name != "ridge"], flips, tail.copy())
            out[name] = FlipCertificates(
                *(torch.from_numpy(a).to(x.device) if isinstance(X, Tensor) else a for a in arrays)
            )
        return out

    def _log_tail(self, alpha: Tensor, prediction: Tensor) -> Tensor:
        """log of an upper bound on P(base classifier != prediction) [m], at most 0."""
        if self.classes_ == 2:
            t, log_tail = ops.chernoff_newton(alpha, self.labels_, self.q)
            agrees = (t >= 0) == (prediction == 1)
        else:
            others = torch.arange(self.classes_ - 1, device=alpha.device)
            rivals = others + (others >= prediction[:, None])
            pairs = torch.stack([prediction[:, None].expand_as(rivals), rivals], -1)
            t, log_tail = ops.chernoff_newton_pairs(alpha, self.labels_, pairs, self.q, self.classes_)
            agrees = t >= 0
        if bool(torch.isnan(log_tail).any()):
            raise ValueError("influences overflow float64: rescale the features")
        log_tail = torch.where(agrees, log_tail, torch.zeros_like(log_tail))
        return _union(log_tail) if self.classes_ > 2 else log_tail.clamp(max=0.0)
