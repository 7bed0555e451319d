"""LabelFlipCertifier against brute force over all draws and all flip sets, and what it says to bad input."""

import numpy as np
import pytest
import torch
from flip_problems import all_labels, base_classifier, certificates, problem, smoothed

from pacd_fast import _C, LabelFlipCertifier, ops
from pacd_fast.labelflips.certifier import CERTIFICATES


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


def test_the_better_of_two_proofs_is_taken_with_many_classes():
    """39 rivals alike: the sum of the white-box bounds after a flip may be 1/2 where the exact rule still holds."""
    y = np.repeat(np.arange(40), 10)
    X = np.eye(40)[y]
    certifier = LabelFlipCertifier(0.1, l2=1e-6).fit(X, y)
    test = X.mean(0) + np.linspace(0.1, 0.4, 16)[:, None] * (np.eye(40)[1] - X.mean(0))
    found = certifier.certify_all(test)
    linear = _C.linear_flips(certifier.influences(test).numpy(), y, 0.1, 40, True)[1]
    assert (found["exact"].flips > linear).any()
    assert np.array_equal(found["whitebox"].flips, np.maximum(found["exact"].flips, linear))


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
        assert certifier.freedom_ == pytest.approx(2 * X.shape[1] / 3)
    # many features: max(sqrt(n), n / 40) of them, and as many as are asked for
    wide = np.random.default_rng(0).normal(size=(2500, 90))
    labels = np.arange(2500) % 2
    for points, freedom in ((2500, 62.5), (900, 30.0), (100, 10.0)):
        certifier = LabelFlipCertifier(0.1).fit(wide[:points], labels[:points])
        assert certifier.freedom_ == pytest.approx(min(60.0, freedom)) and certifier.varying_features_ == 90
    asked = LabelFlipCertifier(0.1, freedom=7.5).fit(wide, labels)
    assert asked.freedom_ == pytest.approx(7.5) and not asked.conditional_


def test_many_features_do_not_cost_most_of_the_flips():
    """600 points of 480 features, most of them noise: within a fifth of the best l2, where two thirds of the degrees
    of freedom leave less than a seventh."""
    rng = np.random.default_rng(1)
    spread = np.arange(1.0, 481) ** -0.75
    y, truth = np.arange(600) % 2, np.arange(100) % 2
    centres = rng.normal(size=(2, 480)) * 0.6
    X, test = ((centres[labels] + rng.normal(size=(len(labels), 480))) * spread for labels in (y, truth))
    automatic = LabelFlipCertifier(0.1, certificate="ridge").fit(X, y)

    def median(certifier):
        found = certifier.certify(test)
        return float(np.median(np.where(found.prediction == truth, found.flips, 0)))

    best = max(median(automatic.adjusted(freedom=f)) for f in (1, 3, 10, 30, 100))
    assert median(automatic) >= best / 5 > 0
    assert median(automatic.adjusted(freedom=320.0)) < best / 7


def test_adjusted_is_a_fit_with_other_settings():
    X, y, test, _ = problem(12, classes=3)
    first = LabelFlipCertifier(0.1).fit(X, y)
    for settings in ({"q": 0.3}, {"l2": 2.5}, {"freedom": 1.5}, {"q": 0.2, "l2": "paper"}):
        expected = LabelFlipCertifier(
            settings.get("q", 0.1), settings.get("l2", "auto"), freedom=settings.get("freedom")
        )
        expected.fit(X, y)
        adjusted = first.adjusted(**settings)
        assert (adjusted.l2_, adjusted.conditional_) == (expected.l2_, expected.conditional_)
        ours, theirs = adjusted.certify_all(test), expected.certify_all(test)
        for name in CERTIFICATES:
            assert np.array_equal(ours[name].flips, theirs[name].flips)
            assert ours[name].conditional == theirs[name].conditional == (settings.get("l2") == "paper")
    assert (
        first.q == 0.1
        and first.adjusted(q=0.2, l2="paper").adjusted(q=0.1).l2_ != first.adjusted(q=0.2, l2="paper").l2_
    )
    given = first.certify_all(test, influences=first.influences(test))
    assert np.array_equal(given["exact"].flips, first.certify_all(test)["exact"].flips)
    with pytest.raises(ValueError, match="influences must be"):
        first.certify_all(test, influences=first.influences(test)[:2])
    with pytest.raises(ValueError, match="q must be in"):
        first.adjusted(q=0.9)
    with pytest.raises(ValueError, match="fit the certifier first"):
        LabelFlipCertifier().adjusted(q=0.1)


def test_conditional_certificates_say_so():
    """Whoever gets the certificates alone sees that the labels chose l2."""
    X, y, test, _ = problem(13)
    for l2, conditional in (("paper", True), ("auto", False), (1.0, False)):
        for found in LabelFlipCertifier(0.1, l2=l2).fit(X, y).certify_all(torch.tensor(test)).values():
            assert found.conditional is conditional


def test_a_class_that_the_exact_sums_deny_is_not_certified():
    """The prediction comes from the weights, the counts from the influences: where they disagree (within rounding of a
    tie in practice, here by force), there is no certificate."""
    X, y, test, _ = problem(14, classes=2)
    for classes, labels in ((2, y), (3, np.arange(len(y)) % 3)):
        certifier = LabelFlipCertifier(0.05, classes=classes).fit(X + 2 * np.eye(6)[labels], labels)
        points = test + 2 * np.eye(6)[np.arange(len(test)) % classes]
        before = certifier.certify_all(points)
        assert all((found.flips > 0).any() for found in before.values())
        certifier.coef_ = certifier.coef_.roll(1, 1)  # the weights of another class
        certifier.intercept_ = certifier.intercept_.roll(1, 0)
        after = certifier.certify_all(points)
        for name in CERTIFICATES:
            changed = after[name].prediction != before[name].prediction
            assert changed.any() and not after[name].flips[changed].any()
            assert (after[name].log_tail[changed] == (-np.inf if name == "ridge" else 0)).all()


def test_without_intercept_the_prediction_depends_on_q():
    """(1 - q) s1 + q s0 against 1/2: with influences that do not sum to one, noise alone may change the class."""
    X, y, test, _ = problem(15, n=80, m=400)
    smoothed = LabelFlipCertifier(0.4, intercept=False, l2=5.0).fit(X, y)
    unsmoothed = LabelFlipCertifier(0.4, certificate="ridge", intercept=False, l2=5.0).fit(X, y)
    alpha = smoothed.influences(test).numpy()
    one, zero = alpha[:, y == 1].sum(1), alpha[:, y == 0].sum(1)
    assert np.array_equal(smoothed.predict(test), (0.6 * one + 0.4 * zero >= 0.5).astype(int))
    assert np.array_equal(unsmoothed.predict(test), (one >= 0.5).astype(int))
    assert (smoothed.predict(test) != unsmoothed.predict(test)).sum() >= 5
    said, _ = _C.linear_flips(alpha, y, 0.4, 2, True)
    assert np.array_equal(smoothed.predict(test), said)


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
        ({"freedom": 0}, "freedom must be in"),
        ({"freedom": 6}, "freedom must be in"),
        ({"freedom": float("nan")}, "freedom must be in"),
        ({"freedom": 2.0, "l2": 1.0}, "freedom chooses l2"),
    ],
)
def test_bad_input_says_what_to_change(change, message):
    given = {"X": GOOD[0], "y": GOOD[1], **change}
    settings = {name: value for name, value in given.items() if name not in ("X", "y")}
    with pytest.raises(ValueError, match=message):
        LabelFlipCertifier(**settings).fit(given["X"], given["y"])


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
