"""Bounds are bounds: Clopper-Pearson and normal quantiles against mpmath, and their coverage."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath as mp
import numpy as np
import pytest
import torch

from pacd_fast import _C, largest_radius, ops, smallest_n

PRECISION = 220  # bits: 66 digits


def exact_log_tail(n: int, k: int, p: mp.mpf, q: mp.mpf) -> mp.mpf:
    """log P(Binomial(n, p) >= k) for k >= 1 and p + q = 1, by summing terms until they vanish at this precision."""
    first = mp.loggamma(n + 1) - mp.loggamma(k + 1) - mp.loggamma(n - k + 1) + k * mp.log(p)
    first += (n - k) * mp.log(q) if n > k else 0
    term = total = mp.mpf(1)
    odds = p / q if n > k else mp.mpf(0)
    for j in range(k, n):
        term *= odds * (n - j) / (j + 1)
        total += term
        if term < total * mp.mpf(2) ** -200 and odds * (n - j) < j + 1:
            break
    return first + mp.log(total)


def ulps(x: float, count: int) -> float:
    for _ in range(abs(count)):
        x = math.nextafter(x, math.inf if count > 0 else -math.inf)
    return x


def hostile(n: int) -> list[int]:
    return sorted({k for k in (0, 1, 2, n // 1000, n // 3, n // 2, n - n // 50, n - 2, n - 1, n) if 0 <= k <= n})


def assert_right_side_and_within_two_ulp(k: list[int], n: list[int], alpha: list[float]) -> None:
    arguments = torch.tensor(k), torch.tensor(n), torch.tensor(alpha, dtype=torch.float64)
    lower, upper = ops.clopper_pearson_lower(*arguments).tolist(), ops.clopper_pearson_upper(*arguments).tolist()
    with mp.workprec(PRECISION):
        for k_, n_, alpha_, low, high in zip(k, n, alpha, lower, upper, strict=True):
            target, given = mp.log(mp.mpf(alpha_)), (k_, n_, alpha_.hex())
            if k_ == 0:
                assert low == 0.0
            else:
                # P rises with p: at the bound it is at most alpha, two ULP higher it is more.
                assert low == 0 or exact_log_tail(n_, k_, mp.mpf(low), 1 - mp.mpf(low)) <= target, given
                above = mp.mpf(ulps(low, 2))
                assert above >= 1 or exact_log_tail(n_, k_, above, 1 - above) > target, given
            if k_ == n_:
                assert high == 1.0
            else:
                assert high == 1 or exact_log_tail(n_, n_ - k_, 1 - mp.mpf(high), mp.mpf(high)) <= target, given
                below = mp.mpf(ulps(high, -2))
                assert below <= 0 or exact_log_tail(n_, n_ - k_, 1 - below, below) > target, given


LEVELS = [1e-12, 1e-3, 0.05, 0.5, ulps(0.5, 1), 0.99, 1 - 2**-20]
SIZES = [*((n, alpha) for n in (1, 2, 3, 10, 137, 1000, 100_000) for alpha in LEVELS), (10**7, 1e-12), (10**7, 0.5)]
SIZES += [(10**7, 1 - 2**-20), *(pytest.param(10**7, LEVELS[i], marks=pytest.mark.slow) for i in (1, 2, 4, 5))]


@pytest.mark.parametrize(("n", "alpha"), SIZES)
def test_clopper_pearson_is_on_the_right_side_and_within_two_ulp(n, alpha):
    k = hostile(n)
    assert_right_side_and_within_two_ulp(k, [n] * len(k), [alpha] * len(k))


def test_clopper_pearson_on_random_arguments():
    generator = np.random.default_rng(0)
    n = np.exp(generator.uniform(0, math.log(50_000), 150)).astype(np.int64)
    k = (n * generator.beta(0.5, 0.5, 150)).round().astype(np.int64).clip(1, n)
    alpha = np.exp(generator.uniform(math.log(1e-100), math.log(0.999), 150))
    assert_right_side_and_within_two_ulp(k.tolist(), n.tolist(), alpha.tolist())


def test_clopper_pearson_is_tight_for_the_largest_n_and_levels_near_one():
    """Where the solver once stopped early (6 ULP loose, or the trivial bound), and at random about there."""
    cases = [
        (3, 2147483646, 0.4402071742647281),
        (2, 2147483645, 1 - 2**-20),
        (2147483645, 2147483646, 1 - 2**-20),
        (0, 2**31 - 1, 1 - 2**-20),
        (2**31 - 1, 2**31 - 1, 1 - 2**-20),
    ]
    generator = np.random.default_rng(5)
    for _ in range(150):
        n = int(np.exp(generator.uniform(math.log(2), math.log(2**31))))
        few = min(n, int(np.exp(generator.uniform(0, math.log(60)))) - 1)
        level = float(generator.choice([generator.uniform(0.3, 0.5), 1 - 2.0 ** -generator.uniform(1, 20)]))
        cases.append((few if generator.random() < 0.5 else n - few, n, level))
    assert_right_side_and_within_two_ulp(*(list(column) for column in zip(*cases, strict=True)))


def test_the_table_is_the_operator():
    for upper, bound in ((False, ops.clopper_pearson_lower), (True, ops.clopper_pearson_upper)):
        table = torch.from_numpy(_C.clopper_pearson_table(3000, 0.01, upper))
        assert torch.equal(table, bound(torch.arange(3001), 3000, 0.01))
        assert bool((table.diff() > 0).all())


def quantile_levels() -> list[float]:
    generator = np.random.default_rng(1)
    near_half = [0.5 + s * 2.0**-e for e in range(1, 54) for s in (1, -1)]
    near_one = [1 - 2.0**-e for e in range(1, 54)]
    tiny = [10.0**-e for e in range(1, 281, 7)]
    return [p for p in (*near_half, *near_one, *tiny, *generator.uniform(0, 1, 200).tolist()) if 0 < p < 1]


def test_normal_quantile_is_on_the_right_side_and_within_one_ulp():
    levels = quantile_levels()
    p = torch.tensor(levels, dtype=torch.float64)
    down, up = ops.normal_quantile(p).tolist(), ops.normal_quantile(p, rounding="up").tolist()

    def gap(z: float, level: float) -> mp.mpf:
        """Phi(z) - level, from the tail where z is far out."""
        if z > 0:
            return (1 - mp.mpf(level)) - mp.erfc(mp.mpf(z) / mp.sqrt(2)) / 2
        return mp.erfc(-mp.mpf(z) / mp.sqrt(2)) / 2 - mp.mpf(level)

    with mp.workprec(1200):
        for level, low, high in zip(levels, down, up, strict=True):
            if level == 0.5:
                assert low == high == 0.0
                continue
            assert gap(low, level) <= 0 <= gap(high, level)
            assert gap(ulps(low, 1), level) > 0 > gap(ulps(high, -1), level)


def test_normal_quantile_at_the_ends():
    p = torch.tensor([0.0, 1.0, 5e-324, 1e-300, -0.1, 1.1, math.nan], dtype=torch.float64)
    for rounding in ("down", "up"):
        z = ops.normal_quantile(p, rounding=rounding)
        assert z[0] == -math.inf and z[1] == math.inf and bool(z[4:].isnan().all())
        with mp.workprec(1200):
            for level, value in zip(p[2:4].tolist(), z[2:4].tolist(), strict=True):
                below = mp.erfc(-mp.mpf(value) / mp.sqrt(2)) / 2 <= level
                assert below == (rounding == "down")


def test_double_double_functions():
    generator = np.random.default_rng(2)
    with mp.workprec(400):
        for _ in range(200):
            x = generator.uniform(-640, 640)
            found = mp.fsum(map(mp.mpf, _C.exp_dd(x, 0.0)))
            assert abs(found / mp.exp(mp.mpf(x)) - 1) < mp.mpf(2) ** -96 * max(1, abs(x))
            y = 10 ** generator.uniform(-279, 279)
            found, exact = mp.fsum(map(mp.mpf, _C.log_dd(y, 0.0))), mp.log(mp.mpf(y))
            assert abs(found - exact) < mp.mpf(2) ** -96 * max(1, abs(exact))
        for n in (*range(60), 10**3, 10**5, 10**7, 2**31 - 1):
            found, exact = mp.fsum(map(mp.mpf, _C.log_factorial_dd(n))), mp.loggamma(n + 1)
            assert abs(found - exact) <= mp.mpf(2) ** -96 * max(1, exact)


def test_logarithm_has_the_error_that_it_states():
    generator = np.random.default_rng(6)
    near_one = 1 + generator.uniform(-1, 1, 3000) * 10.0 ** generator.uniform(-16, -0.3, 3000)
    edges = [2.0**e * m for e in (-1022, -1, 0, 1, 1023) for m in (1, 2**0.5, ulps(2**0.5, 1), ulps(2.0, -1))]
    with mp.workprec(200):
        for x in [*near_one.tolist(), *(2.0 ** generator.uniform(-1022, 1024, 3000)).tolist(), *edges]:
            exact = mp.log(mp.mpf(x))
            assert abs(_C.log_positive(x) - exact) <= 3.5 * mp.mpf(2) ** -53 * abs(exact), x


def test_product_is_rounded_down():
    generator = np.random.default_rng(3)
    for sigma, z in generator.uniform(0.01, 5, (1000, 2)).tolist():
        r = _C.product_down(sigma, z)
        assert mp.mpf(r) <= mp.fmul(sigma, z, exact=True) < mp.mpf(ulps(r, 1))


@pytest.mark.parametrize("n", [1, 5, 20, 60])
@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
def test_coverage_is_exact_for_small_n(n, alpha):
    """For every p the probability of a bound above p, summed exactly, is at most alpha."""
    k = torch.arange(n + 1)
    lower, upper = ops.clopper_pearson_lower(k, n, alpha), ops.clopper_pearson_upper(k, n, alpha)
    hits = k.double()
    log_choose = math.lgamma(n + 1) - torch.lgamma(hits + 1) - torch.lgamma(n - hits + 1)
    # right above and right below each bound, where coverage is worst, and everywhere else
    for p in [
        *(lower[1:] * (1 - 1e-9)).tolist(),
        *(upper[:-1] * (1 - 1e-9)).tolist(),
        *torch.linspace(0.001, 0.999, 500).tolist(),
    ]:
        mass = torch.exp(log_choose + hits * math.log(p) + (n - hits) * math.log1p(-p))
        assert float(mass[lower > p].sum()) <= alpha * (1 + 1e-9)
        assert float(mass[upper < p].sum()) <= alpha * (1 + 1e-9)


def test_coverage_by_simulation_at_full_n():
    n, alpha, runs = 100_000, 0.001, 200_000
    generator = np.random.default_rng(4)
    for p in (0.5001, 0.9, 0.999, 0.99999):
        hits, times = np.unique(generator.binomial(n, p, runs), return_counts=True)
        wrong = int(times[(ops.clopper_pearson_lower(torch.from_numpy(hits), n, alpha) > p).numpy()].sum())
        assert wrong <= alpha * runs + 5 * math.sqrt(alpha * runs)


def test_the_smallest_n_and_the_largest_radius():
    assert smallest_n(0.001) == 10 and smallest_n(0.5) == 2 and smallest_n(0.49) == 2
    for alpha in (1e-9, 0.001, 0.3, 0.9):
        n = smallest_n(alpha)
        assert float(ops.clopper_pearson_lower(torch.tensor(n), n, alpha)) > 0.5
        assert n == 1 or not float(ops.clopper_pearson_lower(torch.tensor(n - 1), n - 1, alpha)) > 0.5
    assert largest_radius(0.5, 100_000, 0.001) == pytest.approx(1.9057, abs=1e-4)
    assert largest_radius(0.5, 5, 0.001) == 0.0


@pytest.mark.parametrize("arguments", [(0, 0.1), (2**31, 0.1), (10, 0.0), (10, 1.0), (10, math.nan)])
def test_table_refuses_bad_arguments(arguments):
    with pytest.raises(ValueError, match="must be in"):
        _C.clopper_pearson_table(*arguments)


@pytest.mark.parametrize(
    ("n", "k"), [(10, 5), (1000, 3), (100_000, 33_333), (100_000, 99_999), (10_000_000, 3_000_000), (2**31 - 1, 2**30)]
)
def test_levels_near_one(n, k):
    """Up to 1 - 2^-20, and refused beyond it."""
    mp.mp.prec = 200
    for alpha in (0.99, 0.9999, 1 - 2**-20):
        low = float(ops.clopper_pearson_lower(torch.tensor(k), n, alpha))
        high = float(ops.clopper_pearson_upper(torch.tensor(k), n, alpha))
        assert 0 < low < 1 and 0 < high < 1
        if n <= 1000:
            for p, side in ((low, 1), (low * (1 + 2**-50), -1), (high, 1), (high * (1 - 2**-50), -1)):
                successes = range(k, n + 1) if p in (low, low * (1 + 2**-50)) else range(k + 1)
                terms = (mp.binomial(n, j) * mp.mpf(p) ** j * (1 - mp.mpf(p)) ** (n - j) for j in successes)
                assert (mp.mpf(alpha) - mp.fsum(terms)) * side >= 0, (alpha, p)
        else:  # a normal approximation, with room
            off = float(mp.sqrt(2) * mp.erfinv(2 * mp.mpf(alpha) - 1)) * math.sqrt(k / n * (1 - k / n) / n)
            room = off + 20 / n
            assert k / n < low < k / n + 1.1 * room and k / n - 1.1 * room < high < k / n
    for alpha in (1 - 2**-21, 1 - 1e-12, 1.0):
        with pytest.raises(ValueError, match="alpha must be in"):
            ops.clopper_pearson_lower(torch.tensor(k), n, alpha)
        with pytest.raises(ValueError, match="alpha in"):
            _C.clopper_pearson_table(min(n, 10**6), alpha)


def test_the_largest_radius_is_rounded_down():
    for sigma in torch.rand(200).tolist():
        p = ops.clopper_pearson_lower(torch.tensor(1000), 1000, 0.001)
        exact = Fraction(float(torch.tensor(sigma))) * Fraction(float(ops.normal_quantile(p)))
        assert Fraction(largest_radius(sigma, 1000, 0.001)) <= exact
