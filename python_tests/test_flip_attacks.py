"""Label-flip attacks: never stronger than a certificate allows, and strong enough to mean something."""

import numpy as np
import pytest
import torch
from flip_problems import all_labels, base_classifier, problem, smoothed

from pacd_fast import _C, LabelFlipCertifier
from pacd_fast.labelflips import LogisticAttack, attack_logistic, attack_ridge, attack_smoothed, harmful_flips, logistic


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


@pytest.mark.parametrize("classes", [2, 3])
def test_an_attack_on_the_smoothed_classifier_is_proved(classes):
    """The attacked prediction is another class by a certificate of its own, and by enumeration the majority."""
    X, y, test, _ = problem(6, n=300, classes=classes, m=10)
    certifier = LabelFlipCertifier(0.1).fit(X, y)
    unproved = 0
    for alpha in certifier.influences(test).numpy():
        attacked = attack_smoothed(alpha, y, 0.1, classes)
        before = int(_C.linear_flips(alpha[None], y, 0.1, classes, True)[0][0])
        said, flips = (int(v[0]) for v in _C.linear_flips(alpha[None], attacked, 0.1, classes, True))
        assert said != before and flips >= 1
        # the same change with one flip less is either not another class, or not proved
        index, new, _ = harmful_flips(alpha, y, classes, before, said)
        fewer = y.copy()
        count = int((attacked != y).sum()) - 1
        fewer[index[:count]] = new[:count]
        said, flips = (int(v[0]) for v in _C.linear_flips(alpha[None], fewer, 0.1, classes, True))
        assert said == before or flips == 0
        unproved += said != before
    assert unproved >= 5  # so that taking what is not proved would have been seen
    rng = np.random.default_rng(0)
    for _ in range(10):
        n = 9 if classes == 2 else 7
        y = rng.integers(0, classes, n)
        alpha = np.where(y == 1, 1.0, -0.3) * rng.uniform(0.5, 1.5, n) / n * 3
        attacked = attack_smoothed(alpha, y, 0.05, classes)
        if attacked is None:
            continue
        labels = all_labels(n, classes)
        share = smoothed(base_classifier(alpha, labels, classes), n, classes, 0.05)
        before = int(_C.linear_flips(alpha[None], y, 0.05, classes, True)[0][0])
        here = int((labels == attacked[:, None]).all(0).argmax())
        assert share[before][here] < 0.5


def retrained(x, y, l2=1e-2):
    """Logistic regression with a constant, by Newton's method with halved steps, to the last digits."""
    x = np.column_stack([x, np.ones(len(x))])

    def loss(w):
        return np.logaddexp(0, x @ w).sum() - y @ (x @ w) + l2 / 2 * w @ w

    w = np.zeros(x.shape[1])
    for _ in range(200):
        p = 1 / (1 + np.exp(-x @ w))
        gradient = x.T @ (p - y) + l2 * w
        move = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + l2 * np.eye(len(w)), gradient)
        length = 1.0
        while loss(w - length * move) > loss(w) - 1e-4 * length * gradient @ move and length > 1e-9:
            length /= 2
        w = w - length * move
        if gradient @ move < 1e-14:
            break
    return w


def influence_order(x, y, point, side, l2=1e-2):
    """Training points from the most harmful flip to the least, by their influence at p = 1/2."""
    x, point = np.column_stack([x, np.ones(len(x))]), np.append(point, 1.0)
    harm = (x @ np.linalg.solve(x.T @ x / 4 + l2 * np.eye(len(point)), point)) * (1 - 2 * y) * (-1 if side else 1)
    return np.argsort(-harm, kind="stable")


@pytest.mark.parametrize(("n", "k"), [(200, 3), (120, 60), (150, 200)])  # the last: any labels can be told apart
def test_logistic_attack_needs_the_least_number_of_top_flips(n, k):
    """Against a model trained by another method: r flips change the prediction, and r - 1 do not."""
    X, y, test, _ = problem(8, n=n, k=k, m=12)
    attack = LogisticAttack(X, y)
    clean = retrained(X, y)
    checked, found = 0, dict(attack.flips(test))
    assert sorted(found) == list(range(len(test)))
    for index, point in enumerate(test):
        side = bool(np.append(point, 1.0) @ clean >= 0)
        assert attack.predict(point) == side
        flips, order = found[index], influence_order(X, y, point, side)
        for count, expected in ((flips, True), (flips - 1, False)):
            changed = y.copy()
            changed[order[:count]] = 1 - changed[order[:count]]
            vote = np.append(point, 1.0) @ retrained(X, changed)
            assert (bool(vote >= 0) != side) == expected
            checked += flips > 1
    assert checked >= 6 and attack.weight.shape == (k + 1,)


def test_a_direction_spoilt_by_rounding_ends_the_fit_where_it_is():
    X, y, _, _ = problem(8, n=50, m=1)
    x, nothing = torch.tensor(X).float(), torch.zeros(6, dtype=torch.float64)
    fits = logistic._Fits(x, 0.1, nothing, [(nothing, torch.tensor(y).double())] * 2)
    assert fits.known() == []
    fits._direction[1] = fits._gradient[1]  # uphill
    fits.step([])
    assert bool((fits.weight[0] != 0).any()) and bool((fits.weight[1] == 0).all()) and fits.known() == [1]
    assert torch.equal(fits._votes[1], torch.zeros(50, dtype=torch.float64)) and fits._loss[1] == fits._losses(
        [1], fits.weight[[1]], fits._votes[[1]]
    )


def test_points_attacked_together_or_alone_need_the_same(monkeypatch):
    """More points than are attacked at a time, of many lengths: a row that is done goes on with the next point."""
    X, y, test, _ = problem(9, n=120, k=30, m=12)
    attack = LogisticAttack(X, y)
    alone = [next(attack.flips(point[None]))[1] for point in test]
    assert len(set(alone)) > 3
    for rows in (12, 5):
        monkeypatch.setattr(logistic, "_TOGETHER", rows)
        assert dict(attack.flips(test)) == dict(enumerate(alone))
    assert dict(attack.flips(test[:0])) == {} and dict(attack.flips(test, 0)) == dict.fromkeys(range(12), -1)


def test_logistic_attack_within_a_limit():
    X, y, test, _ = problem(8, n=200, m=6)
    flips, prediction = attack_logistic(X, y, test)
    assert set(prediction.tolist()) == {0, 1}
    most = int(np.median(flips))
    assert flips.min() < flips.max() and 1 <= most < flips.max()
    limited, again = attack_logistic(X, y, test, limit=most)
    assert np.array_equal(limited, np.where(flips <= most, flips, -1)) and np.array_equal(again, prediction)
    with pytest.raises(ValueError, match="two classes"):
        attack_logistic(X, y + 1, test)


def test_an_attack_may_take_every_label_or_find_none_that_do():
    one = np.ones(2, dtype=np.int64)
    assert attack_ridge(np.ones(2), one, 2).tolist() == [0, 0]
    assert attack_smoothed(np.full(2, 0.3), one, 0.05, 2).tolist() == [0, 0]
    assert attack_ridge(np.full(1, 0.3), one[:1], 2) is None  # too little to begin with
    assert attack_smoothed(np.ones(2), one, 0.05, 2) is None  # it changes, and nothing proves it
    for classes in (2, 3):
        for attack in (attack_ridge, lambda alpha, y, c: attack_smoothed(alpha, y, 0.05, c)):
            assert attack(np.zeros(4), np.array([0, 1, 1, 0]), classes) is None


def test_a_logistic_prediction_is_the_side_of_the_boundary_however_near():
    X, y, test, _ = problem(8, n=200, m=1)
    attack, w = LogisticAttack(X, y), retrained(X, y)
    for logit in (-2.0, -0.5, -0.01, 0.01, 0.5, 2.0):
        point = test[0] + (logit - np.append(test[0], 1.0) @ w) * w[:-1] / (w[:-1] @ w[:-1])
        assert attack.predict(point) == (logit > 0)
