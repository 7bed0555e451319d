"""The confidence sequence is one: bounds on the right side of mpmath's, coverage over all paths, monotone."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath as mp
import numpy as np
import pytest

from pacd_fast import _C

PRECISION = 300  # bits


def log_wealth(hits: int, samples: int, p: mp.mpf, q: mp.mpf, prior_hits: int = 0, prior_samples: int = 0) -> mp.mpf:
    """log of (1/4 Beta(1/2, 1/2) + 3/4 Beta((h + 1) / 2, (m - h + 1) / 2)) of the data over the likelihood of p."""
    misses, half = samples - hits, mp.mpf(1) / 2

    def marginal(a: mp.mpf, b: mp.mpf) -> mp.mpf:
        def log_beta(x: mp.mpf, y: mp.mpf) -> mp.mpf:
            return mp.loggamma(x) + mp.loggamma(y) - mp.loggamma(x + y)

        return mp.exp(log_beta(hits + a, misses + b) - log_beta(a, b))

    evidence = marginal(half, half)
    if prior_samples:
        evidence = (evidence + 3 * marginal(mp.mpf(prior_hits + 1) / 2, mp.mpf(prior_samples - prior_hits + 1) / 2)) / 4
    return mp.log(evidence) - (hits * mp.log(p) if hits else 0) - (misses * mp.log(q) if misses else 0)


def moved(x: float, ulps: int) -> float:
    for _ in range(abs(ulps)):
        x = math.nextafter(x, math.inf if ulps > 0 else -math.inf)
    return x


def arguments() -> list[tuple[int, int, float, int, int]]:
    """(hits, samples, alpha, prior hits, prior samples): ends, few misses, large counts, priors that are far off."""
    cases = [(h, t, a, 0, 0) for t in (1, 2, 10) for h in range(t + 1) for a in (1e-12, 1e-3, 0.5)]
    cases += [(t - m, t, 1e-3, 99, 100) for t in (100, 100_000, 10_000_000) for m in (0, 1, 5)]
    cases += [(500, 1000, 1e-3, h, 100) for h in (0, 50, 100)] + [(2**31 - 2, 2**31 - 1, 1e-200, 7, 10)]
    generator = np.random.default_rng(0)
    for _ in range(300):
        t = int(math.exp(generator.uniform(0, math.log(1e7))))
        m = int(generator.choice([0, 1, 20, 100, 1000]))
        hits, prior = (int(round(size * generator.beta(0.5, 0.5))) for size in (t, m))
        cases.append((hits, t, math.exp(generator.uniform(math.log(1e-30), math.log(0.9))), prior, m))
    return cases


def test_bounds_are_on_the_right_side_and_within_two_ulp():
    with mp.workprec(PRECISION):
        for hits, samples, alpha, prior_hits, prior_samples in arguments():
            case = (hits, samples, alpha, prior_hits, prior_samples)
            least = -mp.log(mp.mpf(alpha))

            def excluded(
                p: mp.mpf, below: bool, hits=hits, samples=samples, prior=(prior_hits, prior_samples), least=least
            ) -> bool:
                inside = not 0 < p < 1 or (p * samples >= hits if below else p * samples <= hits)
                return not inside and log_wealth(hits, samples, p, 1 - p, *prior) >= least

            low, high = float(_C.betting_lower(*case)), float(_C.betting_upper(*case))
            if hits == 0:
                assert low == 0.0
            else:
                assert excluded(mp.mpf(low), True), case
                assert not excluded(mp.mpf(moved(low, 2)), True), case
            if hits == samples:
                assert high == 1.0
            else:
                assert high == 1.0 or excluded(mp.mpf(high), False), case
                assert not excluded(mp.mpf(moved(high, -2)), False), case


def test_reaching_a_wealth_is_never_claimed_too_early():
    generator = np.random.default_rng(1)
    reached = 0
    with mp.workprec(PRECISION):
        for _ in range(300):
            samples = int(generator.integers(1, 300))
            hits = int(generator.binomial(samples, 0.7))
            exact = log_wealth(hits, samples, mp.mpf(0.5), mp.mpf(0.5), 15, 20)
            if not mp.log(1e-100) < -exact < 0:
                continue
            alpha = float(mp.exp(-exact))  # the level that is just reached, to half a unit in the last place
            for level in (moved(alpha, -1), alpha, moved(alpha, 1)):
                says = _C.betting_reaches(hits, samples, 0.5, level, 15, 20)
                assert says == (exact >= -mp.log(mp.mpf(level)))
                reached += says
    assert reached > 100
    assert not _C.betting_reaches(10, 10, 1.0, 0.1) and not _C.betting_reaches(11, 10, 0.5, 0.1)


@pytest.mark.parametrize("prior", [(0, 0), (3, 4), (20, 20), (0, 7)])
@pytest.mark.parametrize("alpha", [0.3, 0.05])
def test_coverage_over_all_paths(prior, alpha):
    """P(the sequence ever misses p) over all paths of 60 draws, in rationals: at most alpha, for each p."""
    length = 60
    hits, samples = (array.ravel() for array in np.meshgrid(range(length + 1), range(length + 1), indexing="ij"))
    inside = hits <= samples
    bounds = np.full((2, (length + 1) ** 2), np.nan)
    bounds[0, inside] = _C.betting_lower(hits[inside], samples[inside], alpha, *prior)
    bounds[1, inside] = _C.betting_upper(hits[inside], samples[inside], alpha, *prior)
    low, high = bounds.reshape(2, length + 1, length + 1)
    worst = Fraction(0)
    for p in (Fraction(1, 20), Fraction(1, 2), Fraction(7, 10), Fraction(9, 10), Fraction(99, 100)):
        alive = {0: Fraction(1)}
        missed = Fraction(0)
        for t in range(1, length + 1):
            after: dict[int, Fraction] = {}
            for h, mass in alive.items():
                after[h] = after.get(h, Fraction(0)) + mass * (1 - p)
                after[h + 1] = after.get(h + 1, Fraction(0)) + mass * p
            out = {h for h in after if not Fraction(low[h, t]) <= p <= Fraction(high[h, t])}
            missed += sum((after[h] for h in out), Fraction(0))
            alive = {h: mass for h, mass in after.items() if h not in out}
        assert missed <= Fraction(alpha)
        worst = max(worst, missed)
    assert worst > Fraction(alpha) / 10  # and it is not empty caution


def test_bounds_rise_with_the_hits_and_tighten_with_a_good_prior():
    for samples in (1, 7, 100, 1000):
        hits = np.arange(samples + 1)
        for prior in ((0, 0), (5, 100), (100, 100)):
            for bound in (_C.betting_lower, _C.betting_upper):
                assert (np.diff(bound(hits, samples, 1e-3, *prior)) > 0).all()
    assert _C.betting_lower(990, 1000, 1e-3, 99, 100) > _C.betting_lower(990, 1000, 1e-3)
    assert _C.betting_lower(990, 1000, 1e-3, 1, 100) > 0.9  # a prior that is far off costs little
    assert _C.betting_lower(np.array([[5], [6]]), 10, np.array([1e-3, 1e-2, 1e-1])).shape == (2, 3)


def test_the_upper_bound_is_the_mirrored_lower_one():
    for hits, samples in ((0, 5), (3, 1000), (999, 1000)):
        mirrored = 1 - float(_C.betting_lower(samples - hits, samples, 1e-3, 4, 10))
        assert float(_C.betting_upper(hits, samples, 1e-3, 6, 10)) == pytest.approx(mirrored, rel=1e-12)


@pytest.mark.parametrize(
    "case", [(-1, 5, 0.1), (6, 5, 0.1), (1, 2**31, 0.1), (1, 5, 0.0), (1, 5, 1.0), (1, 5, math.nan), (1, 5, 0.1, 3, 2)]
)
def test_bad_arguments(case):
    for bound in (_C.betting_lower, _C.betting_upper):
        with pytest.raises(ValueError, match="alpha in"):
            bound(*case)
