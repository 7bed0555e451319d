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

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pacd_fast import _C
from pacd_fast.labelflips.regularisation import automatic_freedom, l2_of_freedom, papers_l2
from pacd_fast.labelflips.rules import exact_flips, kl_flips, losing_tail

__all__ = ["CERTIFICATES", "FlipCertificates", "LabelFlipCertifier"]

CERTIFICATES: tuple[str, ...] = ("kl", "exact", "whitebox", "ridge")


@dataclass(frozen=True)
class FlipCertificates:
    """What `LabelFlipCertifier.certify` says about m test points; numpy arrays or tensors, like the features.

    Attributes:
        prediction: int64 [m], the class.
        flips: int64 [m], the number of label changes that cannot change it; 0 where nothing can be certified.
        log_tail: float64 [m], log of an upper bound on 1 - p, p the probability of the prediction under label noise; 0
            where nothing can be said, -inf for ``"ridge"``, which has no noise.  Below -log 2 the prediction is g's.
        conditional: True where the ridge parameter was computed from the labels (``l2="paper"``).  Such a certificate
            holds only against an attacker whose flips leave that number as it is; it is none against one who may
            change it.
    """

    prediction: Any
    flips: Any
    log_tail: Any
    conditional: bool = False

    def certified_accuracy(self, y: Any, r: int) -> float:
        """The share of points that are right and certified against r flips (r = 0: that are right)."""
        right = _array(self.prediction) == _array(y)
        return float(np.mean(right & (_array(self.flips) >= r)))


def _array(values: Any) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _features(values: Any, name: str) -> Tensor:
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    if tensor.dim() != 2:
        raise ValueError(
            f"{name} must be [points, features], not {tuple(tensor.shape)}: flatten each point to a row of features"
        )
    tensor = tensor.detach().double()
    if not bool(torch.isfinite(tensor).all()):
        row = int((~torch.isfinite(tensor).all(1)).nonzero()[0])
        raise ValueError(f"{name} has NaN or infinity (first in row {row}): fill in or leave out those points")
    return tensor


def _labels(values: Any, classes: int | None) -> tuple[Tensor, int]:
    """Labels int64 [n] and the number of classes: the one given, or the largest label + 1."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    renumber = "renumber them with np.unique(y, return_inverse=True)[1]"
    if tensor.dim() != 1:
        raise ValueError(f"y must be one label per training point, a vector, not {tuple(tensor.shape)}")
    if tensor.is_floating_point() and not bool((tensor == tensor.round()).all()):
        raise ValueError("y must hold whole numbers 0 to K - 1")
    labels = tensor.long()
    if len(labels) == 0:
        raise ValueError("X has no points: at least one of every class is needed")
    low, seen = int(labels.min()), int(labels.max()) + 1
    if low < 0:
        raise ValueError(f"labels must be 0 to K - 1, found {low}: {renumber}")
    if classes is not None:
        if not isinstance(classes, int) or classes < max(2, seen):
            raise ValueError(f"classes must be at least {max(2, seen)} for these labels, not {classes}")
        return labels, classes
    if seen < 2:
        raise ValueError("y has one class only: at least two are needed")
    missing = (torch.bincount(labels, minlength=seen) == 0).nonzero().flatten().tolist()[:5]
    if missing:
        which = missing[0] if len(missing) == 1 else missing
        raise ValueError(f"labels are 0 to {seen - 1}, but none is {which}: {renumber}")
    return labels, seen


class LabelFlipCertifier:
    """Ridge regression smoothed over its training labels, with certificates against label flips.

    **Many features.** An attacker needs about margin x n / sqrt(degrees of freedom) flips, so hundreds of weak
    features cost many flips and may buy little accuracy.  ``"auto"`` keeps at most max(sqrt(n), n / 40) degrees of
    freedom, however many features there are; without the labels it cannot know whether fewer would do.  Where features
    are good (from a network trained on similar data), `freedom` = 5 certifies several times as many flips at nearly
    the same accuracy, and so do the first ten principal components (`pca(x, 10, whiten=False)`).  ``pacd-fast
    labelflip --scan`` shows the exchange on your data; who chooses by looking at it has read the labels, so look at
    other data, or call the certificates conditional.

    Args:
        q: label noise: every training label is changed with this probability.  In (0, 1/2) for two classes,
            (0, (K - 1) / K) for K.  More noise certifies more flips per unit of margin and leaves less margin.
        l2: the ridge parameter.  ``"auto"``: the one that leaves `freedom` effective degrees of freedom; it reads no
            label, and does not depend on the features' scale.  ``"paper"``: the paper's
            (1 + q) s^2 k cond(X'X) / (2 n), s^2 the residual variance of least squares; it reads the labels, so its
            certificates are *conditional* on an attacker who leaves that parameter as it is (their `conditional` is
            then True).  Or a number, not negative.
        certificate: ``"kl"``, ``"exact"``, ``"whitebox"`` or ``"ridge"``; see the module.
        intercept: add an unpenalised constant (features are centred).  Influences then sum to one, and the mean
            vote under noise is 1/2 exactly where the unsmoothed vote is.  False is the paper's classifier.
        memory_budget: bytes for the influences [rows, n] of the test points that are worked on at once.
        classes: K, by default the largest label + 1.  K is part of the rule: certificates hold for labels that are
            changed among these K.  Whoever fits again on labels that may have lost a class gives the same K.
        freedom: with ``l2="auto"``, the effective degrees of freedom sum v / (v + l2) to leave, v the eigenvalues of
            X'X; in (0, number of features that vary).  By default two thirds of the features, at most
            max(sqrt(n), n / 40).  Chosen without a look at labels, it keeps certificates unconditional.

    Attributes after `fit`:
        classes_: K.
        l2_: the ridge parameter as a number.
        freedom_: the effective degrees of freedom it leaves.
        varying_features_: the rank of the features, centred with `intercept`.
        conditional_: whether the labels were read for it.
        coef_: float64 [k, K], the weights of centred features.
        intercept_: float64 [K]; zeros without `intercept`.

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
        freedom: float | None = None,
    ) -> None:
        self.q = q
        self.l2 = l2
        self.certificate = certificate
        self.intercept = intercept
        self.memory_budget = memory_budget
        self.classes = classes
        self.freedom = freedom

    def fit(self, X: Any, y: Any) -> LabelFlipCertifier:
        """Features X [n, k] and labels y [n] of 0..K-1, numpy arrays or tensors (CPU or CUDA).

        Raises:
            ValueError: with what to change.
        """
        x = _features(X, "X")
        if len(x) != len(y):
            raise ValueError(f"X has {len(x)} points and y has {len(y)} labels: they must be the same training points")
        labels, classes = _labels(y, self.classes)
        labels = labels.to(x.device)
        _check_noise(self.q, classes)
        if self.certificate not in CERTIFICATES:
            raise ValueError(f"certificate must be one of {', '.join(CERTIFICATES)}, not {self.certificate!r}")
        n, k = x.shape
        self._mean = x.mean(0) if self.intercept else torch.zeros(k, dtype=torch.float64, device=x.device)
        self._design = x - self._mean
        gram = self._design.T @ self._design
        if not bool(torch.isfinite(gram).all()):
            raise ValueError("the features' squares are beyond float64: rescale X")
        values, vectors = torch.linalg.eigh(gram)
        if float(values[-1]) <= 1e-24 * float((x * x).sum()):
            raise ValueError(
                "all features are constant over the training points, so they tell nothing apart: use other features"
            )
        self._values, self._vectors = values.clamp(min=0), vectors
        self.classes_, self._labels = classes, labels
        self._regularise()
        return self

    def _regularise(self) -> None:
        """From the eigenvalues to l2 and the weights."""
        n, k = self._design.shape
        onehot = torch.nn.functional.one_hot(self._labels, self.classes_).double()
        used = self._values > 1e-13 * k * self._values[-1]  # a feature that never varies has no part in the rules
        values = self._values[used]
        self.l2_ = self._choose_l2(values, self._vectors[:, used], onehot)
        self.conditional_ = self.l2 == "paper"
        if self.l2_ == 0 and (k > n or not bool(used.all())):
            raise ValueError(
                f"{k} features for {n} points without regularisation have no unique solution: "
                'use l2="auto" or l2 > 0, or fewer features'
            )
        self.varying_features_ = len(values)
        self.freedom_ = float((values / (values + self.l2_)).sum())
        self._solver = (self._vectors / (self._values + self.l2_)) @ self._vectors.T
        self.coef_ = self._solver @ (self._design.T @ onehot)
        zeros = torch.zeros(self.classes_, dtype=torch.float64, device=onehot.device)
        self.intercept_ = onehot.mean(0) if self.intercept else zeros

    def _choose_l2(self, values: Tensor, vectors: Tensor, onehot: Tensor) -> float:
        if self.freedom is not None:
            if self.l2 != "auto":
                raise ValueError('freedom chooses l2: give it with l2="auto" only')
            if not (isinstance(self.freedom, (int, float)) and 0 < self.freedom < len(values)):
                raise ValueError(
                    f"freedom must be in (0, {len(values)}), the number of features that vary, not {self.freedom}"
                )
        if self.l2 == "auto":
            freedom = automatic_freedom(values, len(onehot)) if self.freedom is None else self.freedom
            return l2_of_freedom(values, freedom)
        if self.l2 == "paper":
            targets = onehot[:, 1:] if self.classes_ == 2 else onehot
            return papers_l2(self._design, targets, values, vectors, self.q, self.intercept)
        if isinstance(self.l2, (int, float)) and math.isfinite(self.l2) and self.l2 >= 0:
            return float(self.l2)
        raise ValueError(f'l2 must be "auto", "paper" or a number that is not negative, not {self.l2!r}')

    def adjusted(
        self, *, q: float | None = None, l2: str | float | None = None, freedom: float | None = None
    ) -> LabelFlipCertifier:
        """A fitted copy with other settings for the same training points; what takes long in `fit` is shared.

        Raises:
            ValueError: before `fit`, and for settings that `fit` refuses.
        """
        self._fitted()
        other = copy.copy(self)
        other.q = self.q if q is None else q
        _check_noise(other.q, self.classes_)
        if l2 is not None or freedom is not None:
            other.l2, other.freedom = "auto" if l2 is None else l2, freedom
        if other.l2 == "paper" or (other.l2, other.freedom) != (self.l2, self.freedom):
            other._regularise()
        return other

    def _fitted(self) -> None:
        if not hasattr(self, "_solver"):
            raise ValueError("fit the certifier first: LabelFlipCertifier(...).fit(X, y)")

    def _test_features(self, X: Any) -> Tensor:
        self._fitted()
        x = _features(X, "X").to(self._mean.device)
        if x.shape[1] != len(self._mean):
            raise ValueError(
                f"X has {x.shape[1]} features, the certifier was fitted on {len(self._mean)}: use the same feature map"
            )
        return x

    def influences(self, X: Any) -> Tensor:
        """alpha float64 [m, n]: the base classifier's sum of class c at test point j is alpha[j, y == c].sum()."""
        x = self._test_features(X)
        alpha = ((x - self._mean) @ self._solver) @ self._design.T
        return alpha.add_(1 / len(self._design)) if self.intercept else alpha

    def _predict(self, x: Tensor, smoothed: bool) -> Tensor:
        scores = (x - self._mean) @ self.coef_ + self.intercept_  # influences(x) @ onehot without the influences
        if self.classes_ > 2:
            return scores.argmax(1)  # under label noise scores shrink by a common factor and shift by a common amount
        vote = (1 - self.q) * scores[:, 1] + self.q * scores[:, 0] if smoothed else scores[:, 1]
        return (vote >= 0.5).long()

    def predict(self, X: Any) -> Any:
        """The class of every test point [m]: the majority vote under label noise (``"ridge"``: without noise)."""
        prediction = self._predict(self._test_features(X), self.certificate != "ridge")
        return prediction if isinstance(X, Tensor) else prediction.cpu().numpy()

    def certify(self, X: Any) -> FlipCertificates:
        """Prediction and certificate of every test point of X [m, k].

        Raises:
            ValueError: for features of the wrong shape or with NaN.
        """
        return self.certify_all(X, (self.certificate,))[self.certificate]

    def certify_all(
        self, X: Any, certificates: Sequence[str] = CERTIFICATES, influences: Tensor | None = None
    ) -> dict[str, FlipCertificates]:
        """Several certificates from one pass over the influences.

        Args:
            X: [m, k].
            certificates: names of them.
            influences: what `influences(X)` returned, where it is there already; they do not depend on q.
        """
        if unknown := set(certificates) - set(CERTIFICATES):
            raise ValueError(f"certificates are {', '.join(CERTIFICATES)}, not {', '.join(map(repr, sorted(unknown)))}")
        x = self._test_features(X)
        n, smoothed = len(self._design), set(certificates) != {"ridge"}
        if influences is not None and influences.shape != (len(x), n):
            raise ValueError(f"influences must be [{len(x)}, {n}], not {tuple(influences.shape)}")
        rows = max(1, int(self.memory_budget) // (8 * n))
        predictions = {True: self._predict(x, True).cpu().numpy(), False: self._predict(x, False).cpu().numpy()}
        log_tail = np.zeros(len(x))
        linear = {True: np.zeros(len(x), dtype=np.int64), False: np.zeros(len(x), dtype=np.int64)}
        labels = self._labels.cpu().numpy()
        for begin in range(0, len(x), rows):
            part = slice(begin, min(begin + rows, len(x)))
            alpha = self.influences(x[part]) if influences is None else influences[part]
            if smoothed:
                said = torch.from_numpy(predictions[True][part]).to(alpha.device)
                log_tail[part] = losing_tail(alpha, self._labels, said, self.q, self.classes_).cpu().numpy()
            for noisy, name in ((True, "whitebox"), (False, "ridge")):
                if name in certificates:
                    found, flips = _C.linear_flips(
                        alpha.cpu().numpy(), labels, self.q, self.classes_, noisy, torch.get_num_threads()
                    )
                    # within rounding of a tie the two may disagree about the class: then nothing is certified
                    linear[noisy][part] = np.where(found == predictions[noisy][part], flips, 0)
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
            given = [torch.from_numpy(a).to(x.device) if isinstance(X, Tensor) else a for a in arrays]
            out[name] = FlipCertificates(given[0], given[1], given[2], self.conditional_)
        return out


def _check_noise(q: float, classes: int) -> None:
    top = (classes - 1) / classes
    if not (isinstance(q, (int, float)) and 1e-300 <= q < top):
        raise ValueError(f"q must be in (0, {top:.4g}) for {classes} classes, not {q}: a label must most probably stay")
