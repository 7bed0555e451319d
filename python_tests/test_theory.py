"""Theorem 1, corollary 2 and the isotropic Gaussians: formulas against brute force, the attack against formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pacd_fast.poisoning import theory

RNG = np.random.default_rng(5)
NEGATIVE, POSITIVE = RNG.normal(0.0, 0.4, 40), RNG.gamma(2.0, 0.3, 40) + 0.2  # no two distributions alike
DISTANCE = POSITIVE.mean() - NEGATIVE.mean()


def cost_of(poison: np.ndarray, test: np.ndarray) -> float:
    """The upper cost of problem (3), with the lower problem solved by least squares."""
    x = np.concatenate([poison, POSITIVE])
    y = np.repeat([-1.0, 1.0], 40)
    (w, b), *_ = np.linalg.lstsq(np.stack([x, np.ones(80)], axis=1), y, rcond=None)
    return float(np.maximum(np.sign(w) * (-b / w - test), 0).mean())


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 0.99, 1.01, 1.5, 3.0])
def test_theorem_1_against_brute_force(share):
    epsilon = share * DISTANCE
    found = theory.theorem1(NEGATIVE, POSITIVE, epsilon)
    assert len(found) == (2 if share > 1 else 1)
    for each in found:
        assert abs(each.shift) == epsilon
        assert each.cost == pytest.approx(cost_of(NEGATIVE + each.shift, NEGATIVE), rel=1e-9)
        side = 1 if each.shift <= 0 else -1
        for _ in range(50):  # a local optimum: no poison near it, in the ball, does better
            inward = side * np.abs(RNG.normal(0, 0.02 * (epsilon or 0.0), 40))
            nearby = np.clip(NEGATIVE + each.shift + inward, NEGATIVE - epsilon, NEGATIVE + epsilon)
            assert cost_of(nearby, NEGATIVE) >= each.cost - 1e-12
    if share <= 1:  # and the only one: of all shifts the best is -epsilon
        shifts = np.linspace(-epsilon, epsilon, 101)[: 100 if share > 0.98 else 101]
        assert min(cost_of(NEGATIVE + s, NEGATIVE) for s in shifts) >= found[0].cost - 1e-12
        for _ in range(200):
            anywhere = NEGATIVE + RNG.uniform(-epsilon, epsilon, 40)
            assert cost_of(anywhere, NEGATIVE) >= found[0].cost - 1e-12


def test_theorem_1_names_the_best_optimum_first():
    """Test points on the right of both thresholds: there the classes that change sides are the better poison."""
    better = set()
    for test in (np.array([-5.0]), np.array([-0.5]), np.array([5.0])):
        found = theory.theorem1(NEGATIVE, POSITIVE, 1.5 * DISTANCE, test)
        assert [each.cost for each in found] == sorted(each.cost for each in found)
        assert [each.cost for each in found] == [
            pytest.approx(cost_of(NEGATIVE + each.shift, test), rel=1e-9) for each in found
        ]
        better.add(found[0].shift > 0)
    assert better == {True, False}


def test_the_fitted_threshold_is_least_squares():
    t, w = theory.squared_loss_threshold(NEGATIVE, POSITIVE)
    x, y = np.concatenate([NEGATIVE, POSITIVE]), np.repeat([-1.0, 1.0], 40)
    slope, intercept = np.polyfit(x, y, 1)
    assert w == pytest.approx(slope) and t == pytest.approx(-intercept / slope)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_corollary_2(alpha):
    part, whole = theory.corollary2(NEGATIVE, POSITIVE, 0.3, alpha)
    assert part == pytest.approx(whole, abs=1e-12)
    assert part == pytest.approx((NEGATIVE.mean() + POSITIVE.mean() - alpha * 0.3) / 2)


@pytest.mark.parametrize("distance", [-0.5, 0.0, 0.3, 1.0])
def test_the_acr_of_a_gaussian_class_against_simulation(distance):
    d = distance + 0.3 * np.random.default_rng(0).standard_normal(400_000)
    for reach in (math.inf, 0.5):
        values = np.clip(d, 0, reach)
        error = 5 * values.std() / math.sqrt(len(d))
        assert abs(theory.gaussian_acr(distance, 0.3, reach) - values.mean()) < error + 1e-12


def test_the_papers_toy_numbers():
    clean, poisoned = theory.gaussian_poison(0.2, 0.8, 0.1)
    assert clean == pytest.approx(0.4243, abs=5e-5)
    assert clean - poisoned == pytest.approx(0.1 / math.sqrt(2)) and abs(poisoned - 0.3546) < 2e-3


@pytest.mark.parametrize("sigma", [pytest.param(0.25, marks=pytest.mark.slow), 0.5])
def test_the_attack_finds_the_analytic_answer(sigma):
    toy = theory.isotropic_attack(sigma, points=2000, steps=30, n=2000, certified=300)
    expected = theory.gaussian_poison(0.2, 0.8, 0.1)
    for found, value in zip(toy.distance, expected, strict=True):
        assert abs(found - value) < 3 * toy.standard_error
    # the fall shares the test points: its error is that of the boundary alone
    assert toy.distance[0] - toy.distance[1] == pytest.approx(0.1 / math.sqrt(2), rel=0.03)
    assert toy.shift == pytest.approx(-0.1, rel=0.01)
    assert toy.acr[1] < toy.acr[0] and toy.aca[1] < toy.aca[0]


def test_bad_arguments():
    with pytest.raises(ValueError, match="epsilon must be finite"):
        theory.theorem1(NEGATIVE, POSITIVE, -0.1)
    with pytest.raises(ValueError, match="swap the classes"):
        theory.theorem1(POSITIVE, NEGATIVE, 0.1)
    with pytest.raises(ValueError, match="equally many points"):
        theory.squared_loss_threshold(NEGATIVE[:3], POSITIVE)
    with pytest.raises(ValueError, match="equal means"):
        theory.squared_loss_threshold(np.array([0.0, 1.0]), np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="alpha must be in"):
        theory.corollary2(NEGATIVE, POSITIVE, 0.1, 1.5)
    with pytest.raises(ValueError, match="mean1 must be the smaller"):
        theory.gaussian_poison(0.8, 0.2, 0.1)
    with pytest.raises(ValueError, match="sigma must be positive"):
        theory.gaussian_acr(0.1, 0.0)
