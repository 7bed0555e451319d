"""Soft certificates: which samples choose the class and which bound it, and that every rounding is downwards."""

from __future__ import annotations

import dataclasses
import math

import mpmath as mp
import numpy as np
import pytest
import torch
from torch import Tensor

import pacd_fast
from pacd_fast import ops
from pacd_fast.certification import soft
from pacd_fast.certification.soft import UNIT, bernstein_lower
from pacd_fast.randomness import Stream


def logits_of(x: Tensor) -> Tensor:
    """Two classes whose logits differ by 6 times the first pixel."""
    score = 6.0 * x.flatten(1)[:, 0]
    return torch.stack([score, torch.zeros_like(score)], 1)


def units_of(x: Tensor, sigma: float, count: int, seed: int, image: int, stream: int) -> np.ndarray:
    """What the documentation says is certified, int64 [count, 2], by the logistic function in double."""
    noisy, _ = ops.lattice_copies(x, sigma, count, seed, step=1 / 255, image_ids=torch.tensor([image]), stream=stream)
    logits = logits_of(noisy).double().numpy()
    gap = logits[:, 0] - logits[:, 1]
    p = np.stack([1 / (1 + np.exp(-gap)), 1 / (1 + np.exp(gap))], 1)
    return np.floor(p * (UNIT - 1)).astype(np.int64)


def test_the_soft_class_is_chosen_by_the_selection_samples_alone():
    """With n0 = 1 the choice is often the class that has fewer in the long run, which is then certified not at all."""
    x, n, sigma = torch.full((24, 2), 0.04), 400, 0.5
    found = pacd_fast.soft_certify(logits_of, x, num_classes=2, sigma=sigma, n0=1, n=n, seed=3)
    others = 0
    for i in range(len(x)):
        chosen = int(units_of(x[i : i + 1], sigma, 1, 3, i, Stream.SELECTION)[0].argmax())
        units = units_of(x[i : i + 1], sigma, n, 3, i, Stream.ESTIMATION)
        bound = bernstein_lower(int(units[:, chosen].sum()), int((units[:, chosen] ** 2).sum()), n, 0.001)
        assert float(found.p_lower[i]) == bound
        assert int(found.prediction[i]) == (chosen if bound > 0.5 else -1)
        assert (found.mean[i] * n * UNIT).round().tolist() == units.sum(0).tolist()
        others += chosen != int(units.sum(0).argmax())
    assert 3 <= others <= 21  # both cases are there


def test_class_sums_are_at_most_one_with_thousands_of_classes():
    for logits in (torch.zeros(3000), torch.linspace(-4, 4, 3000), torch.linspace(0, 1e-3, 3000)):
        found = pacd_fast.soft_certify(
            lambda x, z=logits: z.expand(len(x), -1), torch.zeros(1, 2), num_classes=3000, sigma=0.5, n0=2, n=40, seed=1
        )
        exact = torch.softmax(logits.double(), 0)
        assert float(found.mean[0].sum()) <= 1 and bool((found.mean[0] <= exact).all())
        assert bool((found.mean[0] >= exact - 2.001 / UNIT).all())


def test_sure_soft_certificates_are_issued_as_soon_as_they_can_be():
    """A class that is sure counts 1 - 2^-20, and n = 37 is then just enough for a certificate."""

    def sure(x: Tensor) -> Tensor:
        return torch.tensor([0.0, 0.0, 90.0]).expand(len(x), -1)

    found = pacd_fast.soft_certify(sure, torch.zeros(2, 2), num_classes=3, sigma=0.5, n=37, seed=1)
    assert found.prediction.tolist() == [2, 2] and bool((found.radius > 0).all())
    assert found.mean[:, 2].tolist() == [1 - 1 / UNIT] * 2


def test_soft_certificates_are_rounded_down():
    """Bounds and radii of many images against 60 digits: none above, and none far below."""
    x, n = torch.linspace(0.2, 0.9, 60).view(-1, 1), 300
    found = pacd_fast.soft_certify(logits_of, x, num_classes=2, sigma=0.7, n=n, seed=5)
    sigma = mp.mpf(float(torch.tensor(0.7)))  # the float32 number that the noise has
    certified = 0
    with mp.workdps(60):
        for i in (found.prediction >= 0).nonzero().flatten().tolist():
            exact = sigma * mp.sqrt(2) * mp.erfinv(2 * mp.mpf(float(found.p_lower[i])) - 1)
            z = float(ops.normal_quantile(found.p_lower[i]))
            assert mp.mpf(float(found.radius[i])) <= sigma * mp.mpf(z) <= exact
            assert exact - mp.mpf(float(found.radius[i])) <= 4e-16 * exact
            certified += 1
    assert certified >= 30


def test_bernstein_is_rounded_down():
    draw = np.random.default_rng(1)
    with mp.workdps(60):
        for _ in range(60):
            n = int(draw.integers(40, 5000))
            units = (draw.beta(3, 1, n) * UNIT).astype(np.int64)
            total, squares, alpha = int(units.sum()), int((units * units).sum()), float(draw.choice([0.001, 0.05]))
            t, count = mp.log(2 / mp.mpf(alpha)), mp.mpf(n)
            variance = (count * squares - mp.mpf(total) ** 2) / (count * (count - 1) * UNIT**2)
            exact = total / (count * UNIT) - mp.sqrt(2 * variance * t / count) - 7 * t / (3 * (count - 1))
            bound = mp.mpf(bernstein_lower(total, squares, n, alpha))
            assert bound <= exact and exact - bound <= mp.mpf(2) ** -52 * max(1, abs(exact))


@pytest.mark.parametrize(("bound", "prediction"), [(0.5, -1), (math.nextafter(0.5, 1), 0)])
def test_a_bound_of_one_half_certifies_nothing(monkeypatch, bound, prediction):
    monkeypatch.setattr(soft, "bernstein_lower", lambda total, squares, n, alpha: bound if total < n * UNIT else 1.0)
    found = pacd_fast.soft_certify(logits_of, torch.ones(1, 2), num_classes=2, sigma=0.1, n=100, seed=1)
    assert found.p_lower.tolist() == [bound] and found.prediction.tolist() == [prediction]


def test_levels_that_are_none_are_refused_and_results_stay_as_they_are():
    for alpha in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match=rf"alpha must be in \(0, 1\), not {alpha}"):
            pacd_fast.soft_certify(logits_of, torch.ones(1, 2), num_classes=2, sigma=0.1, n=100, alpha=alpha)
    found = pacd_fast.soft_certify(logits_of, torch.ones(1, 2), num_classes=2, sigma=0.1, n=100, seed=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.radius = found.radius + 1
