"""From a bound on the losing classes to flips: tables against exact fractions, a linear program and 60 digits."""

from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from pacd_fast import _C, ops
from pacd_fast.labelflips.rules import exact_flips, kl_flips, losing_tail, union


def tau(q, classes, r):
    """The Neyman-Pearson minimum in exact arithmetic, from whole convolutions."""
    keep, other = 1 - Fraction(q), Fraction(q) / (classes - 1)
    masses = {0: Fraction(1)}
    for _ in range(r):
        step: dict[int, Fraction] = {}
        for s, mass in masses.items():
            for move, p in ((-1, keep), (0, other * (classes - 2)), (1, other)):
                step[s + move] = step.get(s + move, 0) + mass * p
        masses = step
    wanted, price = Fraction(1, 2), Fraction(0)
    for s in sorted(masses):
        take = min(wanted, masses[s])
        wanted -= take
        price += take * (keep / other) ** s
    return price


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("q", [1e-12, 1e-3, 0.1, 0.3, 0.49, 0.4999999])
def test_table_is_just_below_the_exact_minimum(q, classes):
    with mpmath.workdps(60):
        for r, entry in enumerate(_C.flip_table(q, classes, 14)):
            exact = tau(q, classes, r)
            log_exact = mpmath.log(mpmath.mpf(exact.numerator) / exact.denominator)
            assert entry <= log_exact <= entry + 1e-11


def test_table_where_half_the_mass_is_one_step_of_the_sum():
    """q for which a binomial cdf is 1/2 to the last bit: whether the next step is entered is a matter of rounding."""
    with mpmath.workdps(60):
        for r in (1, 2, 3, 5, 12, 40):
            for j in range((r + 1) // 2):
                # P(Binomial(r, q) <= j) = 1/2
                q = float(mpmath.findroot(lambda p, j=j, r=r: _cdf(j, r, p) - mpmath.mpf(1) / 2, (j + 0.7) / (r + 0.4)))
                for near in (q, np.nextafter(q, 0), np.nextafter(q, 1)):
                    if near >= 0.5:
                        continue
                    exact = tau(float(near), 2, r)
                    entry = _C.flip_table(float(near), 2, r)[r]
                    log_exact = mpmath.log(mpmath.mpf(exact.numerator) / exact.denominator)
                    assert entry <= log_exact <= entry + 1e-11


def _cdf(j, r, p):
    return mpmath.fsum(mpmath.binomial(r, i) * p**i * (1 - p) ** (r - i) for i in range(j + 1))


@pytest.mark.parametrize(("classes", "r"), [(2, 1), (2, 4), (2, 7), (3, 1), (3, 3), (3, 5), (4, 4)])
def test_table_against_a_linear_program(classes, r):
    for q in (0.05, 0.2, 0.4):
        keep, other = 1 - q, q / (classes - 1)
        # r labels, given as class 0 and attacked to class 1: every draw, with its probability under either
        draws = np.array(np.meshgrid(*[range(classes)] * r)).reshape(r, -1)
        mu, rho = (np.where(draws == label, keep, other).prod(0) for label in (0, 1))
        best = linprog(mu, A_ub=-rho[None], b_ub=[-0.5], bounds=(0, 1))
        assert best.status == 0
        assert _C.flip_table(q, classes, r)[r] == pytest.approx(np.log(best.fun), abs=1e-7)


@pytest.mark.parametrize(("q", "r"), [(0.1, 900), (0.4, 2500), (1e-6, 700)])
def test_table_of_many_flips_against_60_digits(q, r):
    with mpmath.workdps(60):
        p = 1 - mpmath.mpf(q)

        def binomial(j, p):
            return mpmath.binomial(r, j) * p**j * (1 - p) ** (r - j)

        j, wanted, price = r, mpmath.mpf(1) / 2, mpmath.mpf(0)
        while wanted > binomial(j, p):
            wanted -= binomial(j, p)
            price += binomial(j, 1 - p)
            j -= 1
        price += wanted * binomial(j, 1 - p) / binomial(j, p)
        entry = _C.flip_table(q, 2, r)[r]
        assert entry <= mpmath.log(price) <= entry + 1e-8


def test_table_falls_and_stops_where_told():
    table = _C.flip_table(0.3, 2, 60_000, -500.0)
    assert len(table) < 3000 and table[-1] <= -500 < table[-2]
    assert bool((np.diff(table) <= 0).all()) and table[0] <= np.log(0.5)


def test_known_counts():
    # closed form and tight answer at 1 - p = 1e-3, 1e-6, 1e-10 (two classes)
    tails = np.log([1e-3, 1e-6, 1e-10])
    for q, kl, exact in (
        (0.1, [1, 3, 6], [2, 5, 11]),
        (0.3, [8, 18, 31], [14, 33, 60]),
        (0.4, [34, 76, 133], [58, 139, 250]),
    ):
        assert kl_flips(tails, q, 2, 10**6).tolist() == kl
        assert exact_flips(tails, q, 2, 10**4).tolist() == exact


def test_closed_form_never_exceeds_the_tight_answer():
    tails = -(10.0 ** np.linspace(-0.2, 3, 400))
    for classes in (2, 3, 10):
        for q in (1e-9, 0.1, 0.3, 0.49):
            kl, exact = kl_flips(tails, q, classes, 3000), exact_flips(tails, q, classes, 3000)
            assert bool((kl <= exact).all()) and bool((np.diff(exact) >= 0).all())
    for rule in (kl_flips, exact_flips):
        assert rule(np.array([0.0, -np.log(2), -0.1, -np.inf]), 0.1, 2, 7).tolist() == [0, 0, 0, 7]
        assert rule(np.empty(0), 0.1, 2, 7).shape == (0,)


# --- rounding: never more flips than in exact arithmetic, and no warning


def closed_form(log_tail, q, classes):
    """(budget, KL of one flip) of the paper's equation 5, to 60 digits."""
    keep, other = 1 - mpmath.mpf(q), mpmath.mpf(q) / (classes - 1)
    x = mpmath.mpf(log_tail)
    return -(mpmath.log(4) + x + mpmath.log1p(-mpmath.exp(x))) / 2, (keep - other) * mpmath.log(keep / other)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_closed_form_next_to_whole_numbers(classes):
    """Tails at which the budget is worth a whole number of flips to the last bit, and their neighbours.

    At q near (K - 1) / K a flip costs next to nothing, so tails next to 1/2 count, where the budget cancels.
    """
    rng = np.random.default_rng(classes)
    top = (classes - 1) / classes
    equal = 0
    with mpmath.workdps(60):
        for _ in range(400):
            q = float(
                rng.choice([rng.uniform(0, top), 10 ** -rng.uniform(1, 300), top * (1 - 10 ** -rng.uniform(2, 12))])
            )
            flips = int(rng.integers(1, 2000))
            per_flip = closed_form(-1, q, classes)[1]
            # exp(x) (1 - exp(x)) = exp(-2 r KL) / 4
            p = mpmath.exp(-2 * flips * per_flip) / 4
            x = mpmath.log(2 * p / (1 + mpmath.sqrt(1 - 4 * p)))
            tails = [float(x)]
            for direction in (-np.inf, 0.0):
                for _ in range(3):
                    tails.append(float(np.nextafter(tails[-1] if len(tails) != 4 else float(x), direction)))
            for tail, found in zip(tails, kl_flips(np.array(tails), q, classes, 10**6), strict=True):
                if not tail < 0:
                    continue
                budget, per_flip = closed_form(tail, q, classes)
                exact = max(0, int(mpmath.ceil(budget / per_flip)) - 1) if tail < -mpmath.log(2) else 0
                assert found <= exact
                equal += found == exact
    assert equal > 1000  # the guards cost a flip only next to a whole number


def test_rules_are_quiet_at_their_limits():
    """No overflow, division by zero or invalid value for any q and tail that can come."""
    tails = np.array(
        [0.0, -5e-324, -0.5, -np.log(2), np.nextafter(-np.log(2), -1), -0.7, -745.0, -1e9, -1e300, -np.inf]
    )
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        for classes in (2, 3, 10, 1000):
            top = (classes - 1) / classes
            for q in (1e-300, 1e-200, 1e-17, 0.1, top * (1 - 1e-9), np.nextafter(top, 0)):
                for rule in (kl_flips, exact_flips):
                    flips = rule(tails, float(q), classes, 50)
                    assert flips.dtype == np.int64 and flips[-1] == 50 and not flips[:3].any()
                    assert bool((np.diff(flips) >= 0).all())


def test_union_is_the_sum_rounded_up():
    rng = np.random.default_rng(0)
    with mpmath.workdps(60):
        for _ in range(2000):
            rivals = int(rng.integers(1, 12))
            tails = -(10.0 ** rng.uniform(-3, 3)) + rng.normal(size=rivals) * 10.0 ** rng.uniform(-17, 1)
            tails = np.minimum(tails, -1e-3)
            exact = mpmath.log(mpmath.fsum(mpmath.exp(mpmath.mpf(v)) for v in tails))
            found = float(union(torch.tensor(tails)[None])[0])
            if exact >= 0:
                assert found == 0
            else:
                assert exact <= found <= exact + mpmath.mpf(2) ** -48 * (abs(exact) + rivals + 1)
    nothing = torch.full((1, 3), -torch.inf, dtype=torch.float64)
    assert float(union(nothing)[0]) < -1e299
    nothing[0, 1] = -2.0
    assert -2 <= float(union(nothing)[0]) < -2 + 1e-13


def test_nine_tied_rivals_are_nine_times_one():
    y = torch.arange(10).repeat_interleave(torch.tensor([400, *[40] * 9]))
    alpha = torch.full((1, len(y)), 1 / len(y), dtype=torch.float64)
    ten = float(losing_tail(alpha, y, torch.tensor([0]), 0.3, 10)[0])
    pair = ops.chernoff_newton_pairs(alpha, y, torch.tensor([[[0, 1]]]), 0.3, 10)[1]
    assert ten == pytest.approx(float(pair[0, 0]) + np.log(9), abs=1e-12) and ten < -1


@pytest.mark.parametrize("classes", [2, 4])
def test_the_losing_class_has_no_bound(classes):
    rng = np.random.default_rng(classes)
    y = torch.tensor(np.where(rng.random(300) < 0.6, 1, rng.integers(0, classes, 300)))
    alpha = torch.tensor(rng.uniform(0.5, 1.5, (6, 300)) / 300)
    for c in range(classes):
        tail = losing_tail(alpha, y, torch.full((6,), c), 0.1, classes)
        assert bool((tail < -1).all()) if c == 1 else bool((tail == 0).all())
    mixed = losing_tail(alpha, y, torch.arange(6) % classes, 0.1, classes)
    assert ((mixed < 0) == (torch.arange(6) % classes == 1)).all()
    with pytest.raises(ValueError, match="rescale"):
        losing_tail(alpha * torch.inf, y, torch.ones(6, dtype=torch.int64), 0.1, classes)


@pytest.mark.parametrize("classes", [3, 4])
def test_a_tail_of_several_classes_does_not_depend_on_the_scale_of_the_influences(classes):
    """Nor on whether the best tilt is above 1: it is as many times larger as the influences are smaller."""
    rng = np.random.default_rng(classes)
    y = torch.tensor(np.where(rng.random(300) < 0.6, 1, rng.integers(0, classes, 300)))
    alpha, said = torch.tensor(rng.uniform(0.5, 1.5, (6, 300)) / 300), torch.ones(6, dtype=torch.int64)
    tails = [losing_tail(alpha * scale, y, said, 0.1, classes) for scale in (1.0, 1e-4, 1e4)]
    assert bool((tails[0] < -1).all())
    for other in tails[1:]:
        torch.testing.assert_close(other, tails[0], rtol=1e-6, atol=0)
