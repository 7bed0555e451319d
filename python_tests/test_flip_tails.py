"""The label-flip tail bound (csrc/chernoff.h) against 60 digits."""

import mpmath
import numpy as np
import pytest
import torch

from pacd_fast import _C, ops

U = 2.0**-53


def cumulant(alpha, y, q, t):
    """K(t) of the two-class bound in mpmath."""
    q, t = mpmath.mpf(q), mpmath.mpf(t)
    total = t / 2
    for a, label in zip(alpha, y, strict=True):
        e = mpmath.exp(-t * mpmath.mpf(a))
        total += mpmath.log(q + (1 - q) * e) if label == 1 else mpmath.log(1 - q + q * e)
    return total


def pair_cumulant(alpha, y, q, classes, pair, t):
    """K(t) of class pair[0] against pair[1] in mpmath."""
    q, t = mpmath.mpf(q), mpmath.mpf(t)
    other, total = q / (classes - 1), mpmath.mpf(0)
    for a, label in zip(alpha, y, strict=True):
        e = mpmath.exp(-t * mpmath.mpf(a))
        up, down = (1 - q if label == c else other for c in pair)
        total += mpmath.log(up * e + down / e + 1 - up - down)
    return total


def optimum(f, t):
    """min f near t, by Newton's method on differences in 60 digits."""
    t = mpmath.mpf(t)
    for _ in range(8):
        h = abs(t) * mpmath.mpf(10) ** -15
        slope, bend = (f(t + h) - f(t - h)) / (2 * h), (f(t + h) - 2 * f(t) + f(t - h)) / h**2
        t -= slope / bend
        if abs(slope / bend) < abs(t) * mpmath.mpf(10) ** -18:
            break
    return f(t)


def votes(rng, n, classes):
    """Labels, and influences of any scale that mostly agree with them."""
    y = rng.integers(0, classes, n)
    alpha = rng.normal(size=n) * 10.0 ** rng.uniform(-3, 3)
    alpha = np.where(rng.random(n) < rng.uniform(0.6, 1), np.abs(alpha) * np.where(y == 1, 1, -1), alpha)
    return y, alpha / np.abs(alpha).sum() * rng.uniform(1.2, 4)


@pytest.mark.parametrize("q", [1e-12, 1e-8, 1e-4, 0.01, 0.1, 0.3, 0.45, 0.4999])
def test_bound_against_60_digits(q):
    rng = np.random.default_rng(round(q * 1e6))
    useful = 0

    def compare(f, t, log_tail, bounded):
        nonlocal useful
        assert log_tail >= f(t)
        if bounded and log_tail < -0.69:  # else K falls without end, or says nothing
            best = optimum(f, t)
            assert log_tail - best <= 1e-12 * abs(best)
            useful += 1

    with mpmath.workdps(60):
        for n in (3, 17, 128, 300):
            y, alpha = votes(rng, n, 2)
            t, log_tail = (float(v) for v in ops.chernoff_newton(torch.tensor(alpha)[None], torch.tensor(y), q))
            bounded = alpha[alpha < 0].sum() < 0.5 if t > 0 else alpha[alpha > 0].sum() > 0.5
            compare(lambda s, a=alpha, y=y: cumulant(a, y, q, s), t, log_tail, bounded)
            y, alpha = votes(rng, n, 4)
            alpha = np.where((y == 1) | (y == 2), np.abs(alpha) * np.where(y == 1, 1, -1), alpha)
            pairs = torch.tensor([[[1, 2], [2, 1]]])
            t, log_tail = (
                v[0].tolist()
                for v in ops.chernoff_newton_pairs(torch.tensor(alpha)[None], torch.tensor(y), pairs, 1.4 * q, 4)
            )
            assert log_tail[0] == log_tail[1] and t[0] == -t[1]
            compare(lambda s, a=alpha, y=y: pair_cumulant(a, y, 1.4 * q, 4, (1, 2), s), t[0], log_tail[0], True)
    assert useful >= 2


def test_bound_of_many_labels_against_60_digits():
    rng = np.random.default_rng(2)
    y = rng.integers(0, 2, 13_007)
    alpha = rng.normal(size=len(y)) * 5e-4 + (2 * y - 1) * 2e-5
    with mpmath.workdps(60):
        for q in (1e-12, 0.1, 0.45):
            t, log_tail = (float(v) for v in ops.chernoff_newton(torch.tensor(alpha)[None], torch.tensor(y), q))
            exact = cumulant(alpha, y, q, t)
            assert exact <= log_tail <= exact + 1e-12 * abs(exact)


def test_a_row_is_the_same_alone_in_a_batch_and_with_any_number_of_threads():
    rng = np.random.default_rng(0)
    y = torch.tensor(rng.integers(0, 3, 1000))
    alpha = torch.tensor(rng.normal(size=(9, 1000))) * 0.01
    pairs = torch.tensor([[[0, 1], [2, 1]]]).repeat(9, 1, 1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            two, many = ops.chernoff_newton(alpha, y % 2, 0.2), ops.chernoff_newton_pairs(alpha, y, pairs, 0.2, 3)
            results.append(torch.cat([torch.stack(two, 1), *many], 1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    alone = torch.stack([torch.cat(ops.chernoff_newton(row[None], y % 2, 0.2)) for row in alpha])
    assert torch.equal(alone, results[0][:, :2])


def test_votes_that_no_label_can_change():
    y = torch.tensor([0, 1, 1])
    t, log_tail = ops.chernoff_newton(torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.2, 0.1]], dtype=torch.float64), y, 0.1)
    assert bool((t < 0).all()) and bool((log_tail < -1000).all())  # alpha @ y stays below 1/2
    t, log_tail = ops.chernoff_newton_pairs(torch.zeros(1, 3, dtype=torch.float64), y, torch.tensor([[[0, 1]]]), 0.1, 2)
    assert float(t) == 0 and float(log_tail) == 0
    assert bool(
        torch.isnan(ops.chernoff_newton(torch.tensor([[np.nan, 0.0, 0.0]], dtype=torch.float64), y, 0.1)[1]).all()
    )


def test_exponential_and_logarithm_within_their_stated_errors():
    rng = np.random.default_rng(1)
    points = [
        *rng.uniform(0, 708, 1500),
        *10.0 ** rng.uniform(-18, 2.85, 3000),
        *((np.arange(40) + 0.5) * np.log(2)),
        0.0,
        708.0,
    ]
    with mpmath.workdps(60):
        for x in (float(p) for p in points):
            e, g = _C.exp_negative(x)
            assert abs(e / mpmath.exp(-mpmath.mpf(x)) - 1) <= 3.5 * U
            assert x == 0 or abs(g / -mpmath.expm1(-mpmath.mpf(x)) - 1) <= 4 * U
        for p in rng.uniform(2**-0.5, 2**0.5, 2000):
            assert abs(_C.log_near_one(p) - mpmath.log(mpmath.mpf(p))) <= 2 * U
    assert _C.exp_negative(0.0) == (1.0, 0.0) and _C.exp_negative(1e9) == _C.exp_negative(708.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda a, y: ops.chernoff_newton(a.float(), y, 0.1),
        lambda a, y: ops.chernoff_newton(a, y[:-1], 0.1),
        lambda a, y: ops.chernoff_newton(a, y + 1, 0.1),
        lambda a, y: ops.chernoff_newton(a, y, 0.5),
        lambda a, y: ops.chernoff_newton(a, y, float("nan")),
        lambda a, y: ops.chernoff_newton_pairs(a, y, torch.tensor([[[0, 0]]]), 0.1, 2),
        lambda a, y: ops.chernoff_newton_pairs(a, y, torch.tensor([[[0, 2]]]), 0.1, 2),
        lambda a, y: ops.chernoff_newton_pairs(a, y, torch.tensor([[0, 1]]), 0.1, 2),
        lambda a, y: ops.chernoff_newton_pairs(a, y, torch.tensor([[[0, 1]]]), 0.1, 1),
        lambda a, y: _C.flip_table(0.6, 2, 10),
        lambda a, y: _C.flip_table(0.1, 1, 10),
        lambda a, y: _C.flip_table(0.1, 2, -1),
        lambda a, y: _C.linear_flips(a.numpy(), y.numpy() + 1, 0.1, 2, True),
    ],
)
def test_operators_refuse_bad_input(call):
    with pytest.raises(ValueError):
        call(torch.ones(1, 3, dtype=torch.float64), torch.tensor([0, 1, 1]))
