"""Group-sequential boundaries: exact levels in rationals over all paths, give-ups, radii against mpmath."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import mpmath as mp
import numpy as np
import pytest
import torch

from pacd_fast import _C, ops


def steps(looks: list[int]) -> list[tuple[int, int]]:
    return list(pairwise([0, *looks]))


def greedy_in_rationals(looks: list[int], alpha: float, p: float) -> tuple[list[int], Fraction]:
    """Most misses that each look accepts, and what all of them spend: the definition, without a rounding.

    Probabilities after t samples are whole numbers over denominator^t.
    """
    miss, denominator = (1 - Fraction(p)).as_integer_ratio()
    hit = denominator - miss
    alive, spent, most = {0: 1}, 0, []
    for before, t in steps(looks):
        m = t - before
        law = [math.comb(m, j) * miss**j * hit ** (m - j) for j in range(m + 1)]
        after: dict[int, int] = {}
        for misses, mass in alive.items():
            for j, share in enumerate(law):
                after[misses + j] = after.get(misses + j, 0) + mass * share
        spent *= denominator**m
        allowed = Fraction(alpha) if t == looks[-1] else Fraction(0.5 * alpha * math.sqrt(t / looks[-1]))
        limit = int(allowed * denominator**t)  # whole numbers below it
        bound = most[-1] if most else -1
        for misses in sorted(after):
            if spent + after[misses] > limit:
                break
            spent += after.pop(misses)
            bound = misses
        most.append(bound)
        alive = after
    return most, Fraction(spent, denominator ** looks[-1])


LOOKS = {
    "every one": list(range(1, 41)),
    "few": [5, 20, 60],
    "one": [30],
    "as they are": _C.look_schedule(120, 8).tolist(),
}


@pytest.mark.parametrize("looks", LOOKS.values(), ids=LOOKS.keys())
@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.001, 1e-9])
def test_boundaries_are_the_exact_ones(looks, alpha):
    for p in (0.03, 0.3, 0.5, 0.6827, 0.9, 0.995):
        accept, _ = _C.sequential_boundaries(looks, alpha, p)
        exact, spent = greedy_in_rationals(looks, alpha, p)
        assert (np.array(looks) - accept).tolist() == exact
        assert spent <= Fraction(alpha)


def chance_of_acceptance(looks: np.ndarray, accept: np.ndarray, p: float) -> float:
    """P(some look accepts), by a plain recursion over hits in float64: another algorithm, good to 1e-10."""
    alive, total = np.array([1.0]), 0.0
    for (before, t), bound in zip(steps(looks.tolist()), accept.tolist(), strict=True):
        m = t - before
        factorials = [math.lgamma(j + 1) for j in range(m + 1)]
        log_law = [
            factorials[m] - factorials[j] - factorials[m - j] + j * math.log(p) + (m - j) * math.log1p(-p)
            for j in range(m + 1)
        ]
        alive = np.convolve(alive, np.exp(log_law))
        total += alive[bound:].sum()
        alive[bound:] = 0
    return total


@pytest.mark.parametrize("p", [0.5, 0.84, 0.99])
def test_the_level_is_used_up_at_larger_n(p):
    looks = _C.look_schedule(5000, 32)
    accept, _ = _C.sequential_boundaries(looks, 0.001, p)
    assert 0.8 * 0.001 < chance_of_acceptance(looks, accept, p) <= 0.001 * (1 + 1e-9)
    # Whoever lies below the claim is accepted less often still.
    assert chance_of_acceptance(looks, accept, p - 0.0005) < chance_of_acceptance(looks, accept, p)


def test_the_last_look_keeps_most_of_the_level():
    """An image that uses all n samples loses little against Clopper-Pearson: 0.16 in z and one count at most."""
    n = 100_000
    for p in (0.5, 0.9, 0.999):
        accept, _ = _C.sequential_boundaries(_C.look_schedule(n), 0.001, p)
        deviation = math.sqrt(n * p * (1 - p))
        hits = torch.arange(int(accept[-1]) - 300, n + 1)[:301]
        fixed = int(hits[ops.clopper_pearson_lower(hits, n, 0.001) > p][0])
        assert fixed > hits[0]
        assert 0 <= accept[-1] - fixed <= 0.16 * deviation + 1


@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.05, 0.5])
def test_give_ups_lose_at_most_their_share(beta):
    """P(given up at any look | m misses at the end), by counting all orders of hits and misses."""
    for looks, most in (([4, 10, 25, 40], 9), (list(range(2, 31)), 3), ([10, 20], 0), ([5, 30], 30)):
        n = looks[-1]
        fewest = _C.give_up_boundary(looks, most, beta).tolist()
        assert fewest[-1] == most + 1
        for ends in {most, max(0, most - 2)}:
            # orders that are not given up, by misses so far
            ways = {0: 1}
            for (before, t), bound in zip(steps(looks), fewest, strict=True):
                after: dict[int, int] = {}
                for misses, count in ways.items():
                    for j in range(t - before + 1):
                        if misses + j < bound:
                            after[misses + j] = after.get(misses + j, 0) + count * math.comb(t - before, j)
                ways = after
            kept = Fraction(ways.get(ends, 0), math.comb(n, ends))
            assert 1 - kept <= Fraction(beta)
    if beta == 0.5:
        assert _C.give_up_boundary([10, 20], 5, beta)[0] < 6  # it does give up
    with pytest.raises(ValueError, match="beta"):
        _C.give_up_boundary([10, 20], 5, 1.0)


def test_nothing_is_given_up_that_could_be_saved():
    """The early boundary is the smallest allowed: one miss less would lose more than its share."""
    looks, most, beta = [30, 100], 20, 0.05
    bound = int(_C.give_up_boundary(looks, most, beta)[0])

    def tail(b: int) -> Fraction:
        ways = sum(math.comb(most, j) * math.comb(100 - most, 30 - j) for j in range(b, most + 1))
        return Fraction(ways, math.comb(100, 30))

    allowed = Fraction(beta * math.sqrt(30 / 100))
    assert tail(bound) <= allowed < tail(bound - 1)


def test_the_schedule_of_looks():
    assert _C.look_schedule(60, 8).tolist() == [*range(8, 17), 18, 20, 22, 24, 27, 30, 33, 37, 41, 46, 51, 60]
    assert _C.look_schedule(20, 32).tolist() == [20]
    for n in (1, 31, 32, 33, 100, 1000, 100_000, 2**31 - 1):
        looks = _C.look_schedule(n)
        assert looks[-1] == n and (np.diff(looks) > 0).all()
        assert looks[0] == min(32, n) or n == 33
    for bad in ((0, 1), (2**31, 1), (5, 0)):
        with pytest.raises(ValueError, match="n must be"):
            _C.look_schedule(*bad)


def quantile(p: mp.mpf) -> mp.mpf:
    return mp.sqrt(2) * mp.erfinv(2 * p - 1)


def test_radii_from_probabilities_are_never_too_large():
    generator = np.random.default_rng(0)
    with mp.workprec(200):
        for _ in range(300):
            sigma, low = generator.uniform(0.1, 2), generator.uniform(0.02, 0.9999)
            up = generator.uniform(0, 1.2 * (1 - low))
            radius = float(_C.two_sided_radius(sigma, low, up))
            gap = quantile(mp.mpf(low)) - quantile(min(mp.mpf(up), 1 - mp.mpf(low)))
            exact = mp.mpf(sigma) / 2 * gap
            if exact <= 0:
                assert radius == 0.0
            else:
                assert exact * (1 - mp.mpf(2) ** -49) - mp.mpf(2) ** -51 <= radius <= exact
    assert _C.two_sided_radius(1.0, 0.4, 0.4) == 0.0 == _C.two_sided_radius(1.0, 0.0, 0.3)
    assert _C.two_sided_radius(1.0, 0.4, 0.2) > 0 and math.isnan(_C.two_sided_radius(1.0, math.nan, 0.2))
    # What A leaves bounds its rivals, so the two sides never say less than one.
    one = _C.product_down(1.0, float(_C.two_sided_radius(1.0, 0.9, 1.0)))
    assert one == float(_C.two_sided_radius(1.0, 0.9, 0.5)) > 1.28


def test_probabilities_from_radii():
    with mp.workprec(200):
        for sigma in (0.12, 0.25, 1.0):
            for radius in (0.25, 0.5, 0.75, 3.0 * sigma):
                p = _C.radius_target(sigma, radius)
                assert mp.mpf(sigma) * quantile(mp.mpf(p)) >= radius
                below = mp.mpf(math.nextafter(math.nextafter(math.nextafter(p, 0), 0), 0))
                assert mp.mpf(sigma) * quantile(below) < radius
    assert _C.radius_target(1.0, 0.0) == 0.5 and _C.radius_target(1.0, 9.0) == 1.0


@pytest.mark.parametrize(
    "case", [([], 0.1, 0.5), ([5, 5], 0.1, 0.5), ([0, 5], 0.1, 0.5), ([5], 0.6, 0.5), ([5], 0.1, 1.0), ([5], 0.1, 0.0)]
)
def test_bad_arguments(case):
    with pytest.raises(ValueError, match="must"):
        _C.sequential_boundaries(*case)
