"""What the white-box counts are decided by (csrc/flips.h): margins, harms and tail bounds against exact numbers."""

import itertools
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from flip_problems import all_labels

from pacd_fast import _C


def contests(alpha, y, q, classes, r):
    """(winner, {rival: (margin, harm)}) of the noisy vote in exact arithmetic, from the definitions."""
    q, a, y = Fraction(q), [Fraction(float(v)) for v in alpha], [int(label) for label in y]
    keep, other = 1 - q, q / (classes - 1)
    if classes == 2:
        mean = sum(v * (keep if label == 1 else other) for v, label in zip(a, y, strict=True)) - Fraction(1, 2)
        winner = int(mean >= 0)
        # a label that becomes the other one moves the vote by (keep - other) alpha, harmful where it helps the other
        harms = [abs(v) for v, label in zip(a, y, strict=True) if (label == winner) == (v > 0)]
        margins = {1 - winner: (abs(mean), harms)}
    else:
        sums = [sum(v for v, label in zip(a, y, strict=True) if label == c) for c in range(classes)]
        winner = max(range(classes), key=lambda c: sums[c])
        margins = {}
        for rival in set(range(classes)) - {winner}:

            def value(label, rival=rival):
                return (label == winner) - (label == rival)

            harms = [
                max(v * value(label) - v * value(new) for new in range(classes)) for v, label in zip(a, y, strict=True)
            ]
            margins[rival] = ((sums[winner] - sums[rival]) * (keep - other), harms)
    return winner, {
        rival: (margin, (keep - other) * sum(sorted(harms, reverse=True)[:r], Fraction(0)))
        for rival, (margin, harms) in margins.items()
    }


def cancelling(rng, n, classes):
    """Labels and influences whose vote is many times smaller than its terms."""
    y = rng.integers(0, classes, n)
    alpha = rng.normal(size=n) * 10.0 ** rng.integers(-3, 9, n)
    where = np.flatnonzero(y == (1 if classes == 2 else 0))
    if len(where) > 1:
        rest = alpha[where[1:]].sum()
        alpha[where[0]] = -rest + rng.normal()  # what is left is of size 1
    return y, alpha


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("scale", ["plain", "cancelling"])
def test_margins_are_rounded_down_and_harms_up(classes, scale):
    rng = np.random.default_rng(classes)
    compared = 0
    for _ in range(60):
        n, q = int(rng.integers(4, 60)), float(rng.choice([1e-9, 0.013, 0.1, 0.3, 0.47]))
        y, alpha = cancelling(rng, n, classes)
        if scale == "plain":
            alpha = rng.normal(size=n) / n
        r = int(rng.integers(0, n // 2))
        winner, exact = contests(alpha, y, q, classes, r)
        found = _C.flip_bounds(alpha, y, q, classes, True, r)
        if {rival for rival, *_ in found} != set(exact):  # another winner, within rounding of a tie
            continue
        doubt = float(np.abs(alpha).sum() + 1) * 2.0**-48
        for rival, margin, harm, _ in found:
            true_margin, true_harm = exact[rival]
            assert Fraction(margin) <= true_margin <= Fraction(margin) + Fraction(doubt)
            assert true_harm <= Fraction(harm) <= true_harm * (1 + Fraction(2) ** -40) + Fraction(2) ** -1000
            compared += 1
    assert compared > 40


@pytest.mark.parametrize("classes", [2, 3])
def test_unsmoothed_margins_and_harms(classes):
    """Without noise: an attack of r flips takes no more than harm(r), and the vote is not less than the margin."""
    rng = np.random.default_rng(classes)
    for _ in range(100):
        n = int(rng.integers(4, 40))
        y, alpha = cancelling(rng, n, classes)
        r = int(rng.integers(1, n))
        _, noisy = contests(alpha, y, Fraction(0), classes, r)
        found = _C.flip_bounds(alpha, y, 0.1, classes, False, r)
        if {rival for rival, *_ in found} != set(noisy):
            continue
        for rival, margin, harm, miss in found:
            true_margin, true_harm = noisy[rival]
            assert Fraction(margin) <= true_margin and true_harm <= Fraction(harm) and miss == 0
            assert true_harm > 0 or harm <= 1e-300
            # within an ulp, and not merely larger: one flip of doubt in a billion
            assert Fraction(harm) <= true_harm * (1 + Fraction(2) ** -50) + Fraction(2) ** -1000


def moments(label, winner, rival, q, classes):
    """(mean, variance, E|s - Es|^3, largest |s - Es|) of a label's value under noise, from its distribution."""
    q = mpmath.mpf(q)
    probability = [1 - q if c == label else q / (classes - 1) for c in range(classes)]
    value = [c if classes == 2 else (c == winner) - (c == rival) for c in range(classes)]
    mean = mpmath.fsum(p * v for p, v in zip(probability, value, strict=True))
    away = [abs(v - mean) for v in value]
    return tuple(mpmath.fsum(p * d**k for p, d in zip(probability, away, strict=True)) for k in (2, 3)) + (max(away),)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_bound_on_a_lost_vote_is_the_formula(classes):
    """min of Cantelli, Bernstein, and Berry-Esseen with 0.56 (Shevtsova 2010), at the least favourable moments."""
    rng = np.random.default_rng(20 + classes)
    active = {"cantelli": 0, "bernstein": 0, "berry-esseen": 0}
    with mpmath.workdps(40):
        for trial in range(120):
            n = int(rng.choice([30, 300]))
            q = float(rng.choice([1e-3, 0.02, 0.2, 0.4]))
            y = np.where(rng.random(n) < rng.uniform(0.1, 0.9), 1, rng.integers(0, classes, n))
            alpha = rng.uniform(0.5, 1.5, n) if trial % 2 else np.exp(rng.normal(size=n))
            alpha = np.where((classes == 2) & (y == 0), -0.2, 1) * alpha
            if classes == 2:  # a margin of a few deviations
                away = (alpha * np.where(y == 1, 1 - q, q)).sum() - rng.uniform(0.5, 5) * np.sqrt(
                    q * (1 - q) * (alpha**2).sum()
                )
                alpha = alpha * (0.5 / away if away > 0 else 1)
            r = int(rng.integers(0, 1 + n // 20))
            winner = int(_C.linear_flips(alpha[None], y, q, classes, True)[0][0])
            top = np.sort(np.abs(alpha))[::-1][:r]
            for rival, before, harm, miss in _C.flip_bounds(alpha, y, q, classes, True, r)[:2]:
                m = mpmath.mpf(before - harm)
                if m <= 1e-6:
                    continue
                each = [moments(label, winner, rival, q, classes) for label in range(classes)]
                variance = mpmath.fsum(each[k][0] * mpmath.mpf(a) ** 2 for k, a in zip(y, alpha, strict=True))
                third = mpmath.fsum(each[k][1] * abs(mpmath.mpf(a)) ** 3 for k, a in zip(y, alpha, strict=True))
                shift = third_shift = mpmath.mpf(0)
                if classes > 2:  # a flip may give a label that is neither's the moments of one that is, or back
                    outside = next(c for c in range(classes) if c not in (winner, rival))
                    shift = (each[winner][0] - each[outside][0]) * mpmath.fsum(mpmath.mpf(a) ** 2 for a in top)
                    third_shift = abs(each[winner][1] - each[outside][1]) * mpmath.fsum(mpmath.mpf(a) ** 3 for a in top)
                most, least, third = variance + shift, variance - shift, third + third_shift
                reach = max(e[2] for e in each) * mpmath.mpf(np.abs(alpha).max())
                bounds = {
                    "cantelli": most / (most + m**2),
                    "bernstein": mpmath.exp(-(m**2) / (2 * most + 2 * reach * m / 3)),
                }
                if least > 0:
                    normal = mpmath.ncdf(-m / mpmath.sqrt(most))
                    bounds["berry-esseen"] = normal + mpmath.mpf("0.56") * third / least**1.5
                best = min(bounds, key=lambda name: bounds[name])
                active[best] += 1
                assert bounds[best] * (1 - mpmath.mpf(10) ** -14) <= miss <= bounds[best] * (1 + mpmath.mpf(10) ** -9)
    assert min(active.values()) >= 5, active


@pytest.mark.parametrize("classes", [2, 3])
def test_the_bound_on_a_lost_vote_against_every_draw_and_flip_set(classes):
    rng = np.random.default_rng(30 + classes)
    n, compared, closest = (9 if classes == 2 else 6), 0, 0.0
    labels = all_labels(n, classes)
    for _ in range(40):
        q = float(rng.choice([0.01, 0.1, 0.25]))
        y = rng.integers(0, classes, n)
        size = np.abs(rng.normal(size=n)) + 0.3
        alpha = np.where(y == 1, size, -size / 3)
        alpha = alpha / np.abs(alpha).sum() * rng.uniform(1, 3)
        for r in range(3):
            for rival, before, harm, miss in _C.flip_bounds(alpha, y, q, classes, True, r):
                if before - harm <= 0:
                    continue
                winner = contests(alpha, y, q, classes, 0)[0]
                if classes == 2:
                    vote = (alpha[:, None] * labels).sum(0) - 0.5
                    lost = vote <= 1e-12 if winner == 1 else vote >= -1e-12
                else:
                    lost = (alpha[:, None] * ((labels == winner) * 1.0 - (labels == rival))).sum(0) <= 1e-12
                worst = 0.0
                for where in itertools.combinations(range(n), r):
                    for new in itertools.product(range(classes), repeat=r):
                        changed = y.copy()
                        changed[list(where)] = new
                        same = labels == changed[:, None]
                        worst = max(worst, float(np.where(same, 1 - q, q / (classes - 1)).prod(0)[lost].sum()))
                assert worst <= miss
                compared, closest = compared + 1, max(closest, worst / miss)
    assert compared >= 30 and closest > 0.3  # near enough for a bound that is too small to be seen


def decided(alpha, y, q, classes, smoothed):
    """The most flips that bounds for every r allow, by the rule: every margin left, and less than 1/2 lost in all."""
    for r in range(len(y) + 1):
        found = _C.flip_bounds(alpha, y, q, classes, smoothed, r)
        left = [margin - harm for _, margin, harm, _ in found]
        if min(left) <= 0 or sum(miss for *_, miss in found) >= 0.5:
            return max(r - 1, 0)
    return len(y)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_counts_follow_from_the_bounds_of_all_rivals(classes):
    rng = np.random.default_rng(40 + classes)
    summed = positive = 0
    for trial in range(60):
        n, q = int(rng.integers(10, 80)), float(rng.choice([0.02, 0.15, 0.3]))
        winner = 1
        y = np.where(rng.random(n) < 0.5, winner, rng.integers(0, classes, n))
        alpha = np.where(y == winner, 1.0, 0.3) * rng.uniform(0.5, 1.5, n) / n * 2
        if trial % 2:  # all rivals alike: what counts is their sum, not the worst of them
            y = np.concatenate([np.full(n, winner), np.repeat([c for c in range(classes) if c != winner], 4)])
            alpha = np.full(len(y), rng.uniform(0.8, 2) / n)
        for smoothed in (False, True):
            _, flips = _C.linear_flips(alpha[None], y, q, classes, smoothed)
            assert int(flips[0]) == decided(alpha, y, q, classes, smoothed)
            positive += int(flips[0]) > 0
        after = _C.flip_bounds(alpha, y, q, classes, True, min(len(y), int(flips[0]) + 1))
        summed += max(miss for *_, miss in after) < 0.5 <= sum(miss for *_, miss in after)
    assert positive >= 30 and (classes == 2 or summed >= 3)


def test_ten_tied_rivals_together_have_the_majority():
    """Each of nine rivals is beaten with probability 0.9, so the winner may have 0.1: nothing may be certified."""
    y = np.repeat(np.arange(10), [14, *[10] * 9])
    alpha = np.ones(len(y))
    found = _C.flip_bounds(alpha, y, 0.3, 10, True, 0)
    misses = [miss for *_, miss in found]
    assert len(found) == 9 and max(misses) < 0.5 < sum(misses)
    assert _C.linear_flips(alpha[None], y, 0.3, 10, True)[1][0] == 0


def test_the_worst_flips_of_many_labels_may_be_of_small_influences():
    """5000 labels: the largest 1024 influences harm once, smaller ones twice, so these come first (|alpha| alone does
    not say which)."""
    y = np.repeat([0, 1, 3], [1800, 2000, 1200])
    alpha = np.repeat([0.875, 0.5, -1.0], [1800, 2000, 1200])
    margin, twice = 1800 * 0.875 - 2000 * 0.5, 2 * 0.875  # class 2 has 0 and is farther away
    _, flips = _C.linear_flips(alpha[None], y, 0.1, 4, False)
    assert int(flips[0]) == int(np.ceil(margin / twice)) - 1
    rng = np.random.default_rng(0)
    for classes in (2, 3, 5):
        y = rng.integers(0, classes, 1500)
        alpha = rng.normal(size=1500) * np.where(y == 0, 0.4, 1.0) + np.where(y == 0, 0.9, 0.1)
        said, flips = _C.linear_flips(alpha[None], y, 0.1, classes, False)
        _, exact = contests(alpha, y, Fraction(0), classes, int(flips[0]))
        _, after = contests(alpha, y, Fraction(0), classes, int(flips[0]) + 1)
        assert all(margin > harm for margin, harm in exact.values())
        assert any(margin <= harm for margin, harm in after.values())
