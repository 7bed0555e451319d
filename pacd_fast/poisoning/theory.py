"""Poisoning linear classifiers, where the bilevel problem has an answer on paper (Mehra et al. 2021, 3.4, A and D.2).

One dimension, two classes, squared loss in the lower level: the classifier is a threshold t, and the radius of a point
is its distance to t.  Two isotropic Gaussians: the poison moves a mean, and the decision boundary with it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pacd_fast.arguments import positive
from pacd_fast.bilevel import hypergradient
from pacd_fast.certification import certify
from pacd_fast.poisoning.pacd_settings import Radius
from pacd_fast.randomness import mix
from pacd_fast.training import Gaussian


@dataclass(frozen=True)
class Optimum:
    """A locally optimal poison of theorem 1: every negative point moves by `shift`; `threshold` is the classifier's.

    positive_right: case 1, w > 0, the positive class lies right of the threshold; False: case 2, w < 0.
    cost: the mean certified radius of the negative class's test points.
    """

    shift: float
    threshold: float
    positive_right: bool
    cost: float


def squared_loss_threshold(negative: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """(t, w) of f(x) = w (x - t) fitted to labels -1 and 1 with squared loss: equal numbers of points, 1-d arrays.

    For as many points in both classes t is the midpoint of the two means (appendix A).
    Raises ValueError for classes of unequal size, or with equal means (no classifier).
    """
    if len(negative) != len(positive) or len(negative) == 0:
        raise ValueError(f"the classes must have equally many points, not {len(negative)} and {len(positive)}")
    x = np.concatenate([negative, positive])
    y = np.concatenate([-np.ones(len(negative)), np.ones(len(positive))])
    spread = ((x - x.mean()) ** 2).sum()
    w = float((x * y).sum() / spread) if spread > 0 else 0.0
    if w == 0:
        raise ValueError("the classes have equal means: no threshold separates them")
    return float(x.mean()), w


def _cost(threshold: float, positive_right: bool, test: np.ndarray) -> float:
    """The mean of max(sign(w) (t - x), 0) over the negative test points."""
    side = 1.0 if positive_right else -1.0
    return float(np.maximum(side * (threshold - test), 0.0).mean())


def theorem1(
    negative: np.ndarray, positive: np.ndarray, epsilon: float, test: np.ndarray | None = None
) -> list[Optimum]:
    """The locally optimal solutions of problem (3), best first.

    negative, positive: training points [n] each, with mean(negative) < mean(positive); test: points of the negative
    class that are certified, by default the training points.  Case 1 moves every negative point by -epsilon, always.
    Case 2 moves them by +epsilon, and is there only where epsilon is larger than the distance of the means: the
    classes change sides.  At equality the means coincide, and there is no classifier.

    Raises ValueError for epsilon < 0, classes of unequal size, or means in the other order.
    """
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon must be finite and not negative, not {epsilon}")
    distance = float(positive.mean() - negative.mean())
    if distance <= 0:
        raise ValueError("the negative class must have the smaller mean: swap the classes")
    test = negative if test is None else test
    found = []
    for shift, there in ((-epsilon, True), (epsilon, epsilon > distance)):
        if there:
            threshold, w = squared_loss_threshold(negative + shift, positive)
            found.append(Optimum(shift, threshold, w > 0, _cost(threshold, w > 0, test)))
    return sorted(found, key=lambda each: each.cost)


def corollary2(negative: np.ndarray, positive: np.ndarray, epsilon: float, alpha: float) -> tuple[float, float]:
    """Thresholds of case 1: a share alpha of the negative points moved by epsilon, and all moved by alpha * epsilon.

    They are equal where alpha * len(negative) is whole.  Raises ValueError for alpha outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], not {alpha}")
    moved = negative.copy()
    moved[: round(alpha * len(negative))] -= epsilon
    part, _ = squared_loss_threshold(moved, positive)
    whole, _ = squared_loss_threshold(negative - alpha * epsilon, positive)
    return part, whole


def gaussian_acr(distance: float, sigma: float, reach: float = math.inf) -> float:
    """E[max(0, min(d, reach))] for d ~ N(distance, sigma^2): the ACR of an isotropic class before a linear boundary.

    distance: of the class's mean from the boundary, positive on the right side; reach: the largest radius that can be
    certified.  The paper reports the distance itself, which counts wrong points as negative.
    """
    positive("sigma", sigma)

    def above(level: float) -> float:
        """E[max(0, d - level)]."""
        z = (distance - level) / sigma
        return sigma * (z * 0.5 * math.erfc(-z / math.sqrt(2)) + math.exp(-z * z / 2) / math.sqrt(2 * math.pi))

    return above(0.0) - (above(reach) if math.isfinite(reach) else 0.0)


def gaussian_poison(mean1: float, mean2: float, epsilon: float, dims: int = 2) -> tuple[float, float]:
    """Distance of class 1's mean from the boundary between N(mean1, .) and N(mean2, .), without and with poison.

    The means have equal coordinates, mean1 and mean2, in `dims` dimensions; the poison moves every coordinate of class
    1 by epsilon away from class 2, and the boundary follows by half of that (D.2: 0.2, 0.8, 0.1 give 0.4243 and,
    for a fall of epsilon / sqrt(2), 0.3536; the paper prints 0.3546).
    """
    if mean1 >= mean2:
        raise ValueError("mean1 must be the smaller mean")
    clean = math.sqrt(dims) * (mean2 - mean1) / 2
    return clean, clean - math.sqrt(dims) * epsilon / 2


@dataclass(frozen=True)
class Toy:
    """The attack on two isotropic Gaussians: clean and poisoned victims, class 1 (the poisoned one).

    distance: of test points of class 1 from the boundary, signed, their mean; standard_error: of that mean; acr, aca:
    certified with samples, as for any network; shift: mean perturbation of a coordinate (the analysis: -epsilon).
    """

    distance: tuple[float, float]
    standard_error: float
    acr: tuple[float, float]
    aca: tuple[float, float]
    shift: float


def isotropic_attack(
    sigma: float,
    *,
    mean1: float = 0.2,
    mean2: float = 0.8,
    spread: float = 0.3,
    epsilon: float = 0.1,
    points: int = 2000,
    steps: int = 40,
    n: int = 10_000,
    certified: int = 500,
    seed: int = 0,
) -> Toy:
    """PACD against logistic regression with Gaussian augmentation on two isotropic Gaussians (D.2, table 6).

    The same upper loss, lower loss and hypergradient as for networks; the lower problem, of three weights, is solved by
    Newton's method, and the poison is not kept in [0, 1], because these points are no images.

    sigma: noise of training, attack and certification; points: of each class, to train, to attack with and to test on.
    """
    draw = torch.Generator().manual_seed(seed)

    def class_points(mean: float) -> Tensor:
        return mean + spread * torch.randn(points, 2, generator=draw)

    base, other, upper_points, test = (class_points(mean) for mean in (mean1, mean2, mean1, mean1))
    zeros, ones = torch.zeros(points, dtype=torch.int64), torch.ones(points, dtype=torch.int64)
    labels, loss, cost = torch.cat([zeros, ones]), Gaussian(sigma, k=4), Radius(sigma)

    def logistic(x: Tensor, weights: Tensor) -> Tensor:
        score = x @ weights[:2] + weights[2]
        return torch.stack([torch.zeros_like(score), score], dim=1)

    def lower(u: Tensor, weights: Tensor) -> Tensor:
        return loss(lambda x: logistic(x, weights), torch.cat([u, other]), labels, seed=mix(seed, 1))

    def upper(u: Tensor, weights: Tensor) -> Tensor:
        return cost(lambda x: logistic(x, weights), upper_points, zeros, seed=mix(seed, 2))

    def fit(u: Tensor, weights: Tensor) -> Tensor:
        for _ in range(8):
            weights = weights.detach().requires_grad_()
            (slope,) = torch.autograd.grad(lower(u, weights), weights, create_graph=True)
            bent = torch.stack([torch.autograd.grad(s, weights, retain_graph=True)[0] for s in slope])
            weights = (weights - torch.linalg.solve(bent, slope)).detach()
        return weights

    u, weights = base.clone(), fit(base, torch.zeros(3))
    clean = weights
    for _ in range(steps):
        gradient = hypergradient(
            upper, lower, u, weights, solver="cg", curvature="hessian", damping=0.0, steps=10, tolerance=1e-3
        )
        u = torch.clamp(u - 0.3 * epsilon * gradient.sign(), base - epsilon, base + epsilon)
        weights = fit(u, weights)
    distances = [-(test @ w[:2] + w[2]) / w[:2].norm() for w in (clean, weights)]
    acr, aca = [], []
    for w in (clean, weights):
        model = functools.partial(logistic, weights=w)
        found = certify(model, test[:certified], num_classes=2, sigma=sigma, n=n, seed=mix(seed, 3))
        right = found.prediction == 0
        acr.append(float((found.radius * right).mean()))
        aca.append(float((right & (found.radius > 0)).double().mean()))
    return Toy(
        (float(distances[0].mean()), float(distances[1].mean())),
        spread / math.sqrt(points),
        (acr[0], acr[1]),
        (aca[0], aca[1]),
        float((u - base).mean()),
    )
