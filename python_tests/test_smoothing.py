"""Randomized smoothing of any function, by Monte Carlo."""

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy.stats import norm

from pacd_fast import LabelFlipCertifier, randomized_smoothing_certificate
from pacd_fast.certification import discrete_guarantee, gaussian_guarantee, kl_guarantee
from pacd_fast.labelflips import exact_flips, kl_flips


def test_gaussian_is_the_certificate_of_cohen():
    rng = np.random.default_rng(0)
    found = randomized_smoothing_certificate(
        lambda x: x[:, 0] > -1, lambda count: rng.normal(size=(count, 3)), gaussian_guarantee(0.5), n=20_000
    )
    assert found.prediction == 1 and not found.abstained and found.samples == 20_000
    assert found.radius <= 0.5 * norm.ppf(found.p_lower) <= found.radius * (1 + 1e-12)
    assert found.p_lower < norm.cdf(1) < found.p_lower + 0.02  # a bound, and a tight one
    assert found.radius < 0.5  # the true distance to the boundary in these units


def test_discrete_and_kl_are_the_label_flip_tables():
    for p in (0.51, 0.9, 1 - 1e-9):
        tail = np.log1p([-p])
        for values, change in ((2, 0.2), (5, 0.3)):
            radius = discrete_guarantee(change, values, 400)(p)
            assert radius == exact_flips(tail * (1 - 2.0**-50), change, values, 400)[0]
            keep, other = 1 - change, change / (values - 1)
            divergence = (keep - other) * np.log(keep / other)
            budget = kl_guarantee(divergence)(p)
            assert np.ceil(budget) - 1 == kl_flips(tail, change, values, 10**6)[0]
            assert np.ceil(budget) - 1 <= radius
    assert kl_guarantee()(0.5) == 0 and kl_guarantee()(1.0) == np.inf


def test_radii_of_divergences_are_rounded_down():
    rng = np.random.default_rng(3)
    with mp.workdps(50):
        for p in (*rng.uniform(0.5, 1, 60).tolist(), 1 - 1e-12, 0.5 + 1e-9):
            for per_unit in (1.0, 0.3, 7.7):
                exact = -mp.log(4 * mp.mpf(p) * (1 - mp.mpf(p))) / 2 / mp.mpf(per_unit)
                radius = kl_guarantee(per_unit)(p)
                assert 0 <= radius <= exact and exact - radius <= 1e-14 * (1 + exact) / per_unit


def test_a_sampled_learner_agrees_with_the_analytic_certificate():
    """The same smoothed ridge classifier, by sampling and by analysis: sampling cannot see tails below 1/n."""
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, 200)
    X, point = rng.normal(size=(200, 3)) + 2 * y[:, None], np.full((1, 3), 2.0)
    certifier = LabelFlipCertifier(0.3).fit(X, y)
    alpha = certifier.influences(point).numpy()[0]

    def sampler(count):
        return np.where(rng.random((count, len(y))) < 0.3, 1 - y, y)

    sampled = randomized_smoothing_certificate(
        lambda labels: labels @ alpha >= 0.5, sampler, discrete_guarantee(0.3, 2, 200), n=20_000
    )
    exact = certifier.certify(point)
    assert sampled.prediction == exact.prediction[0] == 1
    assert 0 < sampled.radius
    assert (
        1 - sampled.ones / sampled.samples
        <= np.exp(exact.log_tail[0]) + 5 * np.sqrt(np.exp(exact.log_tail[0]) / 20_000) + 1e-9
    )


def test_abstains_on_a_close_vote_and_predicts_zero():
    rng = np.random.default_rng(2)
    found = randomized_smoothing_certificate(
        lambda x: torch.tensor(x > 0), lambda count: rng.normal(size=count), gaussian_guarantee(1.0), n=1000, batch=64
    )
    assert found.abstained and found.radius == 0
    zero = randomized_smoothing_certificate(
        lambda x: x > 9, lambda count: rng.normal(size=count), gaussian_guarantee(1.0), n=1000
    )
    assert zero.prediction == 0 and not zero.abstained and zero.radius > 2 and zero.ones == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: gaussian_guarantee(0.0),
        lambda: gaussian_guarantee(float("inf")),
        lambda: discrete_guarantee(0.5, 2, 10),
        lambda: discrete_guarantee(0.1, 1, 10),
        lambda: discrete_guarantee(0.1, 2, 0),
        lambda: kl_guarantee(0.0),
        lambda: randomized_smoothing_certificate(len, list, kl_guarantee(), n=0),
        lambda: randomized_smoothing_certificate(len, list, kl_guarantee(), alpha=1.0),
        lambda: randomized_smoothing_certificate(lambda x: x[:3], np.zeros, kl_guarantee()),
        lambda: randomized_smoothing_certificate(lambda x: x + 0.5, np.zeros, kl_guarantee()),
        lambda: randomized_smoothing_certificate(lambda x: x + np.nan, np.zeros, kl_guarantee()),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError):
        call()
