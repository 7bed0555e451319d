"""Label-flip certificates against brute force, a linear program, 60 digits and attacks."""

from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from pacd_fast import _C, LabelFlipCertifier, ops
from pacd_fast.labelflips.attacks import attack_logistic, attack_ridge, attack_smoothed, harmful_flips
from pacd_fast.labelflips.certifier import CERTIFICATES, exact_flips, fast_ica, kl_flips, pca, random_convolutions

U = 2.0**-53


# --- the bound, against 60 digits


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


# --- the tables, against exact fractions and a linear program


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


# --- brute force: all draws of the labels, all flip sets


def all_labels(n, classes):
    return np.array(np.unravel_index(np.arange(classes**n), (classes,) * n))  # [n, classes^n]


def base_classifier(alpha, labels, classes):
    sums = np.array([(alpha[:, None] * (labels == c)).sum(0) for c in range(classes)])
    return (sums[1] >= 0.5).astype(int) if classes == 2 else sums.argmax(0)


def smoothed(base, n, classes, q):
    """P(base classifier says c | labels y) for every y, [classes, classes^n], by one small matrix product per label."""
    noise = np.full((classes, classes), q / (classes - 1)) + np.eye(classes) * (1 - q - q / (classes - 1))
    shares = []
    for c in range(classes):
        share = (base == c).astype(float).reshape((classes,) * n)
        for axis in range(n):
            share = np.moveaxis(np.tensordot(noise, share, (1, axis)), 0, axis)
        shares.append(share.reshape(-1))
    return np.array(shares)


def certificates(alpha, y, q, classes):
    """(prediction, flips) of the four certificates for one row of influences, from the certifier's own parts."""
    certifier = LabelFlipCertifier(q)
    certifier.classes_, certifier.labels_ = classes, torch.tensor(y)
    said, whitebox = (int(v[0]) for v in _C.linear_flips(alpha[None], y, q, classes, True))
    unsmoothed, ridge = (int(v[0]) for v in _C.linear_flips(alpha[None], y, q, classes, False))
    tail = certifier._log_tail(torch.tensor(alpha)[None], torch.tensor([said])).numpy()
    kl, exact = int(kl_flips(tail, q, classes, len(y))[0]), int(exact_flips(tail, q, classes, len(y))[0])
    return {"kl": (said, kl), "exact": (said, exact), "whitebox": (said, whitebox), "ridge": (unsmoothed, ridge)}


@pytest.mark.parametrize("classes", [2, 3])
def test_no_flip_set_breaks_a_certificate(classes):
    """Influences are multiples of 1/64 and q has few bits: every number here is exact, and ties are frequent."""
    rng = np.random.default_rng(classes)
    most = dict.fromkeys(CERTIFICATES, 0)
    for trial in range(240 if classes == 2 else 80):
        n = int(rng.integers(3, 13 if classes == 2 else 9))
        q = float(rng.choice([2**-20, 2**-10, 1 / 64, 1 / 16, 1 / 8, 1 / 4, 3 / 8]))
        y = rng.integers(0, classes, n)
        size = np.abs(rng.normal(size=n)) + rng.choice([0.2, 2.0])
        winner = int(rng.integers(classes))
        if classes == 3 and trial % 2:  # a clear majority, so that few labels leave something to certify
            y = np.where(rng.random(n) < 0.8, winner, y)
        agrees = y == (1 if classes == 2 else winner)
        alpha = np.where(agrees, size, -size if trial % 3 else size / 4)
        # from the scale of a fitted classifier, votes of 0 and 1, to much larger
        alpha = np.round(alpha / np.abs(alpha).sum() * rng.choice([0.5, 1, 2, 4]) * 64) / 64
        labels = all_labels(n, classes)
        base = base_classifier(alpha, labels, classes)
        share = smoothed(base, n, classes, q)
        distance = (labels != y[:, None]).sum(0)
        found = certificates(alpha, y, q, classes)
        for name, (prediction, flips) in found.items():
            assert 0 <= flips <= n
            reach = distance <= flips
            if name == "ridge":
                assert bool((base[reach] == prediction).all())
            elif flips:
                assert float(share[prediction][reach].min()) > 0.5  # so it is the most probable class, strictly
            if flips < n:
                most[name] = max(most[name], flips)
        # without smoothing the answer is exact; where the votes can tie it may be one short
        prediction, flips = found["ridge"]
        true = min(n, int(distance[base != prediction].min(initial=n + 1)) - 1)
        sums = np.sort(np.array([(alpha[:, None] * (labels == c)).sum(0) for c in range(classes)]), 0)
        ties = sums[-1] == sums[-2] if classes > 2 else (alpha[:, None] * labels).sum(0) == 0.5
        assert flips == true or (bool(ties.any()) and 0 <= flips < true)
    assert all(value >= 1 for value in most.values()), most  # there was something to break


@pytest.mark.parametrize("classes", [2, 3])
def test_fitted_certifier_against_every_flip_set(classes):
    """The same through fit and certify, with influences as they come."""
    rng = np.random.default_rng(10 + classes)
    n, m = (12, 6) if classes == 2 else (8, 6)
    certified = dict.fromkeys(CERTIFICATES, 0)
    for trial in range(6):
        y = np.concatenate(
            [np.arange(classes), rng.choice(classes, n - classes, p=[0.5, 0.5] if classes == 2 else [0.8, 0.1, 0.1])]
        )
        centres = rng.normal(size=(classes, 2)) * 3
        X = centres[y] + 0.5 * rng.normal(size=(n, 2))
        test = centres[rng.integers(0, classes, m)] + 0.5 * rng.normal(size=(m, 2))
        q = [0.1, 1e-5, 0.02][trial % 3]
        certifier = LabelFlipCertifier(q, l2=[0.0, 1.0, "auto"][trial % 3], intercept=bool(trial % 2)).fit(X, y)
        found = certifier.certify_all(test)
        assert np.array_equal(found["exact"].prediction, certifier.predict(test))
        labels = all_labels(n, classes)
        distance = (labels != y[:, None]).sum(0)
        for j, alpha in enumerate(certifier.influences(test).numpy()):
            base = base_classifier(alpha, labels, classes)
            share = smoothed(base, n, classes, q)
            for name in CERTIFICATES:
                flips, prediction = int(found[name].flips[j]), int(found[name].prediction[j])
                reach = distance <= flips
                certified[name] += flips
                if name == "ridge":
                    assert bool((base[reach] == prediction).all())
                    continue
                if flips:
                    assert float(share[prediction][reach].min()) > 0.5
                assert 1 - share[prediction][distance == 0][0] <= np.exp(found[name].log_tail[j]) + 1e-14
    needed = (
        CERTIFICATES if classes == 2 else CERTIFICATES[1:]
    )  # eight labels of three classes are few for the closed form
    assert all(certified[name] > 0 for name in needed), certified


def test_certificates_are_ordered():
    rng = np.random.default_rng(3)
    y = rng.integers(0, 2, 400)
    X, test = (
        rng.normal(size=(400, 5)) + 1.5 * y[:, None],
        rng.normal(size=(50, 5)) + 1.5 * rng.integers(0, 2, 50)[:, None],
    )
    for q in (0.01, 0.2, 0.4):
        found = LabelFlipCertifier(q).fit(X, y).certify_all(test)
        assert bool((found["kl"].flips <= found["exact"].flips).all())
        assert bool((found["exact"].flips <= found["whitebox"].flips).all())
        assert found["whitebox"].flips.sum() <= found["ridge"].flips.sum()


# --- attacks on larger problems


def problem(seed, n=600, classes=2, k=6, m=12):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, k))
    y = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    truth = rng.integers(0, classes, m)
    return centres[y] + 0.7 * rng.normal(size=(n, k)), y, centres[truth] + 0.7 * rng.normal(size=(m, k)), truth


@pytest.mark.parametrize("classes", [2, 4])
def test_attacks_never_break_a_certificate(classes, record_property):
    X, y, test, _ = problem(5, classes=classes)
    q, draws = 0.2, 4000
    certifier = LabelFlipCertifier(q).fit(X, y)
    found = certifier.certify_all(test)
    rng = np.random.default_rng(0)
    ratios = []
    for j, alpha in enumerate(certifier.influences(test).numpy()):
        attacked = attack_ridge(alpha, y, classes)
        assert attacked is not None
        # greedy is optimal without smoothing: the attack needs exactly one more than is certified
        assert int((attacked != y).sum()) == int(found["ridge"].flips[j]) + 1
        attacked = attack_smoothed(alpha, y, q, classes)
        assert attacked is not None
        flips, needed = int(found["whitebox"].flips[j]), int((attacked != y).sum())
        assert flips < needed
        ratios.append(flips / needed)
        # the strongest attack of the certified size, for every rival: the sampled majority stays
        winner = int(found["whitebox"].prediction[j])
        for rival in set(range(classes)) - {winner} if flips else ():
            index, new, _ = harmful_flips(alpha, y, classes, winner, rival)
            worst = y.copy()
            worst[index[:flips]] = new[:flips]
            changed = rng.random((draws, len(y))) < q
            sampled = np.where(changed, (worst + rng.integers(1, classes, (draws, len(y)))) % classes, worst)
            share = (base_classifier(alpha, sampled.T, classes) == winner).mean()
            assert share > 0.5 - 5 * 0.5 / np.sqrt(draws)
    record_property("white-box certificate / attack, median", float(np.median(ratios)))
    assert np.median(ratios) > 0.5


def test_logistic_attack():
    X, y, test, _ = problem(8, n=300, m=5)
    flips, prediction = attack_logistic(X, y, test)
    assert bool((flips >= 1).all()) and bool((flips < 300).all()) and set(prediction) <= {0, 1}
    assert attack_logistic(X, y, test[:1], limit=1)[0][0] in (-1, 1)
    with pytest.raises(ValueError, match="two classes"):
        attack_logistic(X, y + 1, test)


# --- the classifier


def test_predictions_are_those_of_ridge_regression():
    X, y, test, _ = problem(1, classes=3)
    certifier = LabelFlipCertifier(0.1, l2=2.0).fit(X, y)
    centred = X - X.mean(0)
    weights = np.linalg.solve(centred.T @ centred + 2 * np.eye(X.shape[1]), centred.T @ np.eye(3)[y])
    scores = (test - X.mean(0)) @ weights + np.eye(3)[y].mean(0)
    assert np.array_equal(certifier.predict(test), scores.argmax(1))
    assert certifier.influences(test).numpy() @ np.eye(3)[y] == pytest.approx(scores, abs=1e-12)
    assert certifier.influences(test).sum(1).numpy() == pytest.approx(1)


def test_tiles_do_not_change_the_answer():
    X, y, test, _ = problem(2, classes=3, m=40)
    whole = LabelFlipCertifier(0.1).fit(X, y).certify_all(test)
    tiled = LabelFlipCertifier(0.1, memory_budget=8 * len(y) * 3).fit(X, y).certify_all(test)
    for name in CERTIFICATES:
        assert np.array_equal(whole[name].prediction, tiled[name].prediction)
        assert np.abs(whole[name].flips - tiled[name].flips).max() <= 1  # influences may differ in the last bit


def test_tensors_in_tensors_out():
    X, y, test, truth = problem(4)
    arrays = LabelFlipCertifier(0.1).fit(X, y).certify(test)
    tensors = LabelFlipCertifier(0.1).fit(torch.tensor(X), torch.tensor(y)).certify(torch.tensor(test))
    assert isinstance(arrays.flips, np.ndarray) and isinstance(tensors.flips, torch.Tensor)
    assert np.array_equal(arrays.flips, tensors.flips.numpy())
    assert arrays.certified_accuracy(truth, 0) == tensors.certified_accuracy(truth, 0)


@pytest.mark.cuda
def test_the_same_bits_on_cuda():
    rng = np.random.default_rng(0)
    alpha, y = torch.tensor(rng.normal(size=(20, 600)) * 0.02), torch.tensor(rng.integers(0, 3, 600))
    pairs = torch.tensor([[[0, 1], [1, 2]]]).repeat(20, 1, 1)
    there = alpha.cuda(), y.cuda(), pairs.cuda()
    for ours, theirs in (
        (ops.chernoff_newton(alpha, y % 2, 0.2), ops.chernoff_newton(there[0], there[1] % 2, 0.2)),
        (ops.chernoff_newton_pairs(alpha, y, pairs, 0.2, 3), ops.chernoff_newton_pairs(*there, 0.2, 3)),
    ):
        assert all(torch.equal(a, b.cpu()) for a, b in zip(ours, theirs, strict=True))
    X, y, test, _ = problem(6, classes=3)
    expected = LabelFlipCertifier(0.1).fit(X, y).certify_all(test)
    found = (
        LabelFlipCertifier(0.1)
        .fit(torch.tensor(X).cuda(), torch.tensor(y).cuda())
        .certify_all(torch.tensor(test).cuda())
    )
    for name in CERTIFICATES:
        assert np.abs(found[name].flips.cpu().numpy() - expected[name].flips).max() <= 1


def test_the_ridge_parameter_reads_no_label_unless_asked():
    X, y, _, _ = problem(7)
    changed = y.copy()
    changed[:40] = 1 - changed[:40]
    assert LabelFlipCertifier(0.1).fit(X, y).l2_ == LabelFlipCertifier(0.1).fit(X, changed).l2_
    certifier = LabelFlipCertifier(0.1, l2="paper").fit(X, y)
    assert certifier.conditional_ and not LabelFlipCertifier(0.1).fit(X, y).conditional_
    assert certifier.l2_ != LabelFlipCertifier(0.1, l2="paper").fit(X, changed).l2_
    # the paper's formula, without intercept as there
    certifier = LabelFlipCertifier(0.1, l2="paper", intercept=False).fit(X, y)
    residual = ((y - X @ np.linalg.lstsq(X, y, rcond=None)[0]) ** 2).sum() / (len(X) - X.shape[1])
    assert certifier.l2_ == pytest.approx(1.1 * residual * X.shape[1] / (2 * len(X)) * np.linalg.cond(X.T @ X))
    # two thirds of the degrees of freedom, at any scale of the features
    for scale in (1.0, 1e-4):
        certifier = LabelFlipCertifier(0.1).fit(scale * X, y)
        values = np.linalg.eigvalsh(np.cov(scale * X.T, bias=True) * len(X))
        assert (values / (values + certifier.l2_)).sum() == pytest.approx(2 * X.shape[1] / 3)


GOOD = problem(9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": 0.5}, "q must be in"),
        ({"q": 0.0}, "q must be in"),
        ({"q": -1.0}, "q must be in"),
        ({"q": float("nan")}, "q must be in"),
        ({"y": GOOD[1] + 1}, "renumber"),
        ({"y": GOOD[1] - 1}, "renumber"),
        ({"y": GOOD[1] * 2}, "renumber"),
        ({"y": GOOD[1] * 0}, "one class"),
        ({"y": GOOD[1] + 0.5}, "whole numbers"),
        ({"y": GOOD[1][:-1]}, "same training points"),
        ({"y": GOOD[1][:, None]}, "vector"),
        ({"X": np.where(GOOD[0] == GOOD[0][3, 2], np.nan, GOOD[0])}, "row 3"),
        ({"X": GOOD[0][:, 0]}, "flatten"),
        ({"X": GOOD[0][:0], "y": GOOD[1][:0]}, "no points"),
        ({"X": GOOD[0][:4], "y": np.array([0, 1, 0, 1]), "l2": 0.0}, "regularisation"),
        ({"X": np.tile(GOOD[0], 2), "l2": 0.0}, "regularisation"),
        ({"X": GOOD[0][:4], "y": np.array([0, 1, 0, 1]), "l2": "paper"}, "more points"),
        ({"X": GOOD[0] * 0}, "constant"),
        ({"X": GOOD[0] * 0 + 3.7}, "constant"),
        ({"X": GOOD[0] * 1e160}, "rescale"),
        ({"l2": "best"}, "l2 must be"),
        ({"l2": -1.0}, "l2 must be"),
        ({"certificate": "chernoff"}, "certificate must be"),
    ],
)
def test_bad_input_says_what_to_change(change, message):
    given = {"X": GOOD[0], "y": GOOD[1], "q": 0.1, "l2": "auto", "certificate": "exact", **change}
    with pytest.raises(ValueError, match=message):
        LabelFlipCertifier(given["q"], given["l2"], given["certificate"]).fit(given["X"], given["y"])


def test_bad_test_points():
    certifier = LabelFlipCertifier(0.1)
    with pytest.raises(ValueError, match="fit"):
        certifier.certify(GOOD[2])
    certifier.fit(GOOD[0], GOOD[1])
    with pytest.raises(ValueError, match="features"):
        certifier.certify(GOOD[2][:, :3])
    with pytest.raises(ValueError, match="NaN"):
        certifier.certify(GOOD[2] * np.nan)
    with pytest.raises(ValueError, match="certificates are"):
        certifier.certify_all(GOOD[2], ("nothing",))
    assert certifier.certify(GOOD[2][:0]).flips.shape == (0,)


def test_more_noise_is_fine_for_more_classes():
    X, y, test, _ = problem(11, classes=4)
    assert LabelFlipCertifier(0.7).fit(X, y).certify(test).flips.min() >= 0
    with pytest.raises(ValueError, match="q must be in"):
        LabelFlipCertifier(0.75).fit(X, y)


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


# --- features


def test_whitened_and_independent_components():
    rng = np.random.default_rng(0)
    sources = np.stack(
        [
            rng.uniform(-1, 1, 4000),
            rng.laplace(size=4000),
            np.sign(rng.normal(size=4000)) + 0.1 * rng.normal(size=4000),
        ],
        1,
    )
    mixed = torch.tensor(sources @ rng.normal(size=(3, 5)))
    z = pca(mixed, 3)(mixed)
    assert torch.allclose(z.T @ z / len(z), torch.eye(3, dtype=torch.float64), atol=1e-9)
    found = fast_ica(mixed, 3)(mixed).numpy()
    match = np.abs(found.T @ ((sources - sources.mean(0)) / sources.std(0)) / len(found))
    assert match.max(0).min() > 0.98 and match.max(1).min() > 0.98  # every source, up to order and sign
    with pytest.raises(ValueError, match="dim"):
        pca(mixed, 6)
    with pytest.raises(ValueError, match="directions"):
        pca(mixed, 4)


def test_random_convolutions_are_fixed():
    images = torch.rand(7, 3, 8, 8)
    features = random_convolutions(3, 10)(images)
    assert features.shape == (7, 10) and torch.equal(features, random_convolutions(3, 10)(images))
    assert not torch.equal(features, random_convolutions(3, 10, seed=1)(images))


def test_a_class_that_an_attacker_removes_stays_a_class():
    """Certificates are for K classes; with K given, every single flip is tried, and none wins."""
    generator = np.random.default_rng(3)
    y = np.array([0, 1] * 12 + [2])
    X = generator.normal(size=(25, 2)) + 4 * np.eye(3)[y][:, :2]
    points = 4 * np.eye(2)[[0, 1] * 4] + generator.normal(size=(8, 2))
    options = {"q": 0.05, "certificate": "ridge", "l2": 0.5, "classes": 3}
    found = LabelFlipCertifier(**options).fit(X, y).certify(points)
    assert (found.flips >= 1).any()
    for i in range(len(y)):
        for label in range(3):
            changed = y.copy()
            changed[i] = label  # i = 7: nothing of class 2 is left
            attacked = LabelFlipCertifier(**options).fit(X, changed).certify(points)
            assert ((attacked.prediction == found.prediction) | (found.flips < 1)).all()
    with pytest.raises(ValueError, match="classes must be at least 3"):
        LabelFlipCertifier(classes=2).fit(X, y)
    with pytest.raises(ValueError, match="none is 2"):
        LabelFlipCertifier().fit(X, np.where(y == 2, 3, y))


def test_certified_accuracy_takes_tensors():
    X, y = torch.randn(30, 3), torch.arange(30) % 2
    found = LabelFlipCertifier().fit(X, y).certify(X[:5])
    assert found.certified_accuracy(y[:5], 0) == float((found.prediction == y[:5]).double().mean())
