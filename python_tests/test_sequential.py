"""Rules of sequential certification: errors over all paths in rationals and in simulation, planner, give-ups."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator
from fractions import Fraction

import mpmath as mp
import numpy as np
import pytest
import torch

from pacd_fast import _C, ops

RULES = {
    "full": lambda n, alpha, **options: _C.FullCertificates(10, n, alpha, 1.0, **options),
    "radii": lambda n, alpha, **options: _C.SequentialRadii(10, n, alpha, 1.0, radii=[0.0, 0.25, 0.5, 0.75], **options),
    "tolerance": lambda n, alpha, **options: _C.SequentialRadii(10, n, alpha, 1.0, tolerance=0.25, **options),
}


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)


def all_paths(looks: list[int], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Votes between looks [N, looks, classes] of every possible run, and in how many orders each comes about."""
    votes, orders = np.zeros((1, 0, classes), dtype=np.int64), np.ones(1, dtype=np.uint64)
    for m in np.diff([0, *looks]).tolist():
        parts = list(compositions(m, classes))
        ways = [math.factorial(m) // math.prod(map(math.factorial, part)) for part in parts]
        new = np.broadcast_to(np.array(parts)[None, :, None], (len(votes), len(parts), 1, classes))
        old = np.broadcast_to(votes[:, None], (len(votes), len(parts), *votes.shape[1:]))
        votes = np.concatenate([old, new], 2).reshape(-1, votes.shape[1] + 1, classes)
        orders = (orders[:, None] * np.array(ways, dtype=np.uint64)).ravel()
    assert int(orders.sum()) == classes ** looks[-1] < 2**64
    return votes, orders


def chance(claims: np.ndarray, votes: np.ndarray, orders: np.ndarray, p: list[Fraction]) -> Fraction:
    """P(a path of `claims`, bool [N], is taken) when the classes have the probabilities p."""
    totals = votes[claims].sum(1)
    groups: dict[tuple[int, ...], int] = {}
    for total, ways in zip(map(tuple, totals.tolist()), orders[claims].tolist(), strict=True):
        groups[total] = groups.get(total, 0) + ways
    return sum(
        (ways * math.prod(share**k for share, k in zip(p, total, strict=True)) for total, ways in groups.items()),
        Fraction(0),
    )


def radius_of(p: list[Fraction], sides: int) -> mp.mpf:
    """The l2 radius at sigma = 1 when class 0 is selected and all is known; negative where it is not ahead."""

    def quantile(x: Fraction) -> mp.mpf:
        return mp.sqrt(2) * mp.erfinv(2 * mp.mpf(x.numerator) / x.denominator - 1)

    return quantile(p[0]) if sides == 1 else (quantile(p[0]) - quantile(max(p[1:]))) / 2


@pytest.mark.parametrize("alpha", [0.2, 0.05])
@pytest.mark.parametrize("mode", RULES)
def test_errors_over_all_paths(mode, alpha):
    """Up to 207 900 runs with 6 looks, p at each claim exactly: wrong with probability at most alpha."""
    rule = RULES[mode](40 if mode == "full" else 56, alpha)
    votes, orders = all_paths(rule.looks.tolist(), 2)
    outcome = rule.decide(np.full((len(votes), 2), [10, 0]), votes)
    claimed = outcome["prediction"] == 0
    bounds = np.unique(outcome["p_lower"][claimed])
    assert len(bounds) > 3
    worst = Fraction(0)
    for p in [Fraction(1, 3), *map(Fraction, bounds[:: max(1, len(bounds) // 6)].tolist()), Fraction(99, 100)]:
        # At p = p_lower the claim "p_A >= p_lower" is true, and still counts as an error here: the tests' own claim is
        # "above".  What is certified without a doubt is a radius at most that of p_lower.
        false = claimed & (outcome["p_lower"] >= float(p))
        error = chance(false, votes, orders, [p, 1 - p])
        assert error <= Fraction(alpha)
        worst = max(worst, error)
    assert worst > Fraction(alpha) / 4
    radius = np.array([_C.product_down(1.0, radius_at(x)) for x in outcome["p_lower"][claimed]])
    assert (outcome["radius"][claimed] <= radius).all() and (outcome["radius"][~claimed] == 0).all()


def radius_at(p: float) -> float:
    return float(_C.two_sided_radius(1.0, p, 1.0))


@pytest.mark.parametrize("mode", RULES)
def test_two_sided_errors_over_all_paths(mode):
    """126 225 runs of three classes with 3 looks: the issued radius exceeds the true one with at most alpha."""
    alpha = 0.4
    rule = RULES[mode](40, alpha, sides=2)
    votes, orders = all_paths(rule.looks.tolist(), 3)
    outcome = rule.decide(np.full((len(votes), 3), [10, 0, 0]), votes)
    issued = np.where(outcome["prediction"] == 0, outcome["radius"], -1.0)
    assert (outcome["p_lower"][issued >= 0] < 0.5).any()  # it certifies below 1/2, which one side never does
    worst = Fraction(0)
    third, half = Fraction(1, 3), Fraction(1, 2)
    settings = [(third, third, third), (half, half, Fraction(0)), (Fraction(2, 5), Fraction(2, 5), Fraction(1, 5))]
    for a, b in ((0.5, 0.25), (0.6, 0.3), (0.7, 0.15), (0.8, 0.2), (0.45, 0.3)):
        settings.append((Fraction(a), Fraction(b), 1 - Fraction(a) - Fraction(b)))
    for p in settings:
        error = chance(issued >= float(radius_of(list(p), 2)) * (1 + 1e-12), votes, orders, list(p))
        assert error <= Fraction(alpha)
        worst = max(worst, error)
    assert worst > Fraction(alpha) / 50


def test_prediction_errors_over_all_paths():
    """32 805 runs of three classes with 7 looks, ties and rivals that lead, from every selection of 4 samples."""
    alpha, rule = 0.2, _C.SequentialPredict(4, 14, 0.2)
    assert rule.looks.tolist() == list(range(8, 15))
    votes, orders = all_paths(rule.looks.tolist(), 3)
    worst = Fraction(0)
    for selection in compositions(4, 3):
        if selection[0] != max(selection):
            continue
        predicted = rule.decide(np.full((len(votes), 3), selection), votes)["prediction"] == 0
        for p in ((0.5, 0.5), (0.375, 0.375), (0.3125, 0.375), (0.25, 0.5)):
            law = [Fraction(p[0]), Fraction(p[1]), 1 - Fraction(p[0]) - Fraction(p[1])]
            error = chance(predicted, votes, orders, law)
            assert error <= Fraction(alpha)
            worst = max(worst, error)
        assert chance(predicted, votes, orders, [Fraction(15, 16), Fraction(1, 16), Fraction(0)]) > Fraction(1, 2)
    assert worst > Fraction(alpha) / 20


def test_giving_up_loses_no_more_than_it_says():
    """On all paths: who is certified with giving up has the same certificate without; a share of futility is lost."""
    futility = 0.05
    plain, quick = RULES["full"](45, 0.05, futility=0.0), RULES["full"](45, 0.05, futility=futility)
    votes, orders = all_paths(quick.looks.tolist(), 2)
    selection = np.full((len(votes), 2), [10, 0])
    full = plain.decide(selection, votes.sum(1, keepdims=True))
    early = quick.decide(selection, votes)
    certified = early["prediction"] == 0
    for name in ("radius", "p_lower", "prediction", "counted"):
        assert (early[name][certified] == full[name][certified]).all()
    assert (early["samples"] < 45).any() and (full["samples"] == 45).all()
    lost = (full["prediction"] == 0) & ~certified
    assert lost.any()
    totals = votes.sum(1)[:, 0]
    for hits in np.unique(totals[lost]).tolist():  # whatever p, given the hits at the end
        ends = totals == hits
        assert Fraction(int(orders[lost & ends].sum()), int(orders[ends].sum())) <= Fraction(futility)
    # By default next to nothing is lost.
    careful = RULES["full"](45, 0.05).decide(selection, votes)
    lost = (full["prediction"] == 0) & (careful["prediction"] != 0)
    assert Fraction(int(orders[lost].sum()), int(orders[full["prediction"] == 0].sum())) <= Fraction(1e-6)


SIGMA, TARGETS = 0.5, [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("images", [50_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_errors_in_simulation(images):
    """At alpha = 0.05, p from 0.3 to 0.9999 and at each target radius exactly, which is the worst case."""
    alpha, n = 0.05, 2000
    rules = {
        "radii": _C.SequentialRadii(10, n, alpha, SIGMA, radii=TARGETS),
        "one radius": _C.SequentialRadii(10, n, alpha, SIGMA, radii=TARGETS[2:3]),
        "tolerance": _C.SequentialRadii(10, n, alpha, SIGMA, tolerance=0.1),
        "full": _C.FullCertificates(10, n, alpha, SIGMA),
    }
    exact = [_C.radius_target(SIGMA, radius) for radius in TARGETS]
    levels = [0.3, 0.45, *exact, 0.55, 0.75, 0.9, 0.99, 0.999, 0.9999]
    generator = np.random.default_rng(0)
    each, most = images // len(levels) + 1, 0.0
    for name, rule in rules.items():
        steps = np.diff([0, *rule.looks])
        for p in levels:
            wrong = 0
            for start in range(0, each, 20_000):
                size = (min(each - start, 20_000), len(steps))
                hits = generator.binomial(steps, p, size)
                votes = np.stack([hits, steps - hits], 2)
                outcome = rule.decide(np.full((size[0], 2), [10, 0]), votes)
                claimed = outcome["prediction"] == 0
                wrong += int((claimed & (outcome["p_lower"] >= p)).sum())
            # four standard deviations: one in 30 000 by chance, and there are 50 of them
            assert wrong <= alpha * each + 4 * math.sqrt(alpha * each), (name, p)
            most = max(most, wrong / each)
    assert most > 0.7 * alpha  # at the targets the level is nearly used up


@pytest.mark.parametrize("images", [20_000, pytest.param(300_000, marks=pytest.mark.slow)])
def test_two_sided_and_prediction_errors_in_simulation(images):
    alpha, n = 0.05, 1000
    rules = {
        "full": _C.FullCertificates(10, n, alpha, 1.0, sides=2),
        "radii": _C.SequentialRadii(10, n, alpha, 1.0, radii=[0.1, 0.25, 0.5, 1.0], sides=2),
        "tolerance": _C.SequentialRadii(10, n, alpha, 1.0, tolerance=0.2, sides=2),
        "predict": _C.SequentialPredict(10, n, alpha),
    }
    generator = np.random.default_rng(1)
    settings = [
        (0.4, 0.4, 0.2),
        (0.5, 0.5, 0.0),
        (0.35, 0.4, 0.25),
        (0.45, 0.3, 0.25),
        (0.6, 0.3, 0.1),
        (0.9, 0.05, 0.05),
    ]
    each = images // len(settings)
    for name, rule in rules.items():
        for p in settings:
            votes = np.stack([generator.multinomial(m, p, each) for m in np.diff([0, *rule.looks])], 1)
            outcome = rule.decide(np.full((each, 3), [6, 3, 1]), votes)
            true = max(0.0, float(radius_of(list(map(Fraction, p)), 2)))
            claimed = outcome["prediction"] == 0
            wrong = claimed & (p[0] <= max(p[1:])) if name == "predict" else claimed & (outcome["radius"] >= true)
            assert wrong.sum() <= alpha * each + 4 * math.sqrt(alpha * each), (name, p)


def test_void_samples_are_misses_and_hits_for_every_rival():
    generator = np.random.default_rng(2)
    for rule, looks_at_rivals in (
        (_C.SequentialRadii(10, 500, 0.05, 1.0, radii=[0.25, 0.5], sides=2), True),
        (_C.SequentialRadii(10, 500, 0.05, 1.0, radii=[0.25, 0.5]), False),
        (_C.SequentialPredict(10, 500, 0.05), True),
        (_C.FullCertificates(10, 500, 0.05, 1.0, sides=2), True),
    ):
        votes = np.stack([generator.multinomial(m, (0.7, 0.3), 200) for m in np.diff([0, *rule.looks])], 1)
        void = np.minimum(votes[..., 1], generator.integers(0, 4, votes.shape[:2]))
        without = votes - np.stack([np.zeros_like(void), void], 2)
        selection = np.full((200, 2), [7, 3])
        outcome, forgotten = rule.decide(selection, without, void), rule.decide(selection, without)
        for name, values in rule.decide(selection, votes).items():
            assert (outcome[name] == values).all()
        assert looks_at_rivals == any((forgotten[name] != values).any() for name, values in outcome.items())


class Votes:
    """A model's votes: sample s of an image on a stream always falls on the same class."""

    def __init__(self, rule, images: int, classes: int, seed: int):
        generator = np.random.default_rng(seed)
        p = generator.dirichlet(np.full(classes, 0.25), images)
        self.classes = classes
        self.streams = [
            np.stack([generator.choice(classes, samples, p=row) for row in p]) for samples in (rule.n0, rule.n)
        ]

    def count(self, image: int, stream: int, first: int, count: int) -> np.ndarray:
        return np.bincount(self.streams[stream][image, first : first + count], minlength=self.classes)

    def decided(self, rule) -> dict[str, np.ndarray]:
        looks = [0, *rule.looks.tolist()]
        images = range(len(self.streams[0]))
        selection = np.stack([self.count(i, 0, 0, rule.n0) for i in images])
        votes = [[self.count(i, 1, a, b - a) for a, b in itertools.pairwise(looks)] for i in images]
        return rule.decide(selection, np.array(votes))


def run(rule, votes: Votes, rows: int, lag: int) -> tuple[dict, list[int], object]:
    """Drives a planner as a device does: slots are copied and zeroed behind each batch, reported `lag` later."""
    images = len(votes.streams[0])
    planner = _C.SequentialPlanner(rule, list(range(100, 100 + images)), votes.classes)
    table, queue, outcomes, sizes = np.zeros((rows + 1, votes.classes), dtype=np.int64), deque(), {}, []
    seen: set[tuple[int, int, int]] = set()
    while not planner.done:
        pieces, complete = planner.plan(rows)
        for image, stream, first, count, slot in pieces.tolist():
            table[slot] += votes.count(image, stream, first, count)
            samples = {(image, stream, s) for s in range(first, first + count)}
            assert not samples & seen and first + count <= (rule.n0, rule.n)[stream]
            seen |= samples
        sizes.append(int(pieces[:, 3].sum()))
        queue.append(table[complete].copy())
        table[complete] = 0
        while queue and (len(queue) > lag or not len(pieces)):
            planner.report(queue.popleft())
        for image, outcome in planner.finished():
            assert image not in outcomes
            outcomes[image] = outcome
    assert planner.drawn == len(seen) == sum(sizes)
    return outcomes, sizes, planner


PLANNED = {
    "full": _C.FullCertificates(20, 700, 0.01, 0.5),
    "all": _C.FullCertificates(20, 700, 0.01, 0.5, futility=0.0),
    "radii": _C.SequentialRadii(20, 700, 0.01, 0.5, radii=[0.0, 0.25, 0.5]),
    "tolerance": _C.SequentialRadii(20, 700, 0.01, 0.5, tolerance=0.1, sides=2),
    "predict": _C.SequentialPredict(20, 700, 0.01),
}


@pytest.mark.parametrize("rows, lag", [(1, 0), (7, 3), (64, 1), (300, 0), (1000, 2), (100_000, 1)])
@pytest.mark.parametrize("mode", PLANNED)
def test_outcomes_do_not_depend_on_batches(mode, rows, lag):
    rule = PLANNED[mode]
    images = 3 if rows == 1 else 25
    votes = Votes(rule, images, 4, seed=5)
    expected = votes.decided(rule)
    outcomes, sizes, _ = run(rule, votes, rows, lag)
    assert sorted(outcomes) == list(range(images))
    for image, outcome in outcomes.items():
        for name in ("prediction", "selected", "radius", "p_lower", "rival_upper", "samples", "counted"):
            assert getattr(outcome, name) == expected[name][image], (image, name)
        assert (outcome.counts == votes.count(image, 1, 0, outcome.counted)).all()
        assert (outcome.selection == votes.count(image, 0, 0, 20)).all()
        again = rule.issue(outcome.selection, outcome.counts)
        for name in ("prediction", "radius", "p_lower", "rival_upper"):
            assert getattr(again, name) == getattr(outcome, name)
    # Full batches, until all is on its way.
    assert all(size == rows for size in sizes[: -lag - 3])


def test_samples_in_vain_are_few():
    rule = PLANNED["radii"]
    votes = Votes(rule, 200, 4, seed=6)
    outcomes, sizes, planner = run(rule, votes, 128, 2)
    needed = sum(outcome.samples + rule.n0 for outcome in outcomes.values())
    assert needed <= planner.drawn <= needed + 6 * 128
    assert all(size == 128 for size in sizes[:-4])


def test_the_planner_says_what_is_wrong():
    rule = PLANNED["radii"]
    planner = _C.SequentialPlanner(rule, [41], 3)
    with pytest.raises(ValueError, match="no plan"):
        planner.report(np.zeros((0, 3)))
    pieces, complete = planner.plan(52)
    assert pieces.tolist() == [[0, 0, 0, 20, 0], [0, 1, 0, 32, 1]] and complete.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"votes have 1 rows, the oldest plan completed 2 slots"):
        planner.report(np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"votes must be \[slots, classes\]"):
        planner.report(np.zeros((2, 4)))
    assert planner.failure == ""
    planner.report([[20, 0, 0], [29, 0, 0]])
    assert planner.failure == "the model returned NaN or infinity for 3 of 32 noisy copies of image 41"
    assert planner.done and planner.finished() == []
    with pytest.raises(ValueError, match="rows must be positive"):
        planner.plan(0)
    with pytest.raises(ValueError, match="add up to 31, where nothing looks"):
        rule.issue([20, 0, 0], [31, 0, 0])


@pytest.mark.parametrize(
    "message, make",
    {
        "radii must not be negative and must rise": lambda: _C.SequentialRadii(10, 100, 0.1, 1.0, radii=[0.5, 0.25]),
        "must not be negative": lambda: _C.SequentialRadii(10, 100, 0.1, 1.0, radii=[-0.5]),
        r"radius 3.0* cannot be certified with n = 100, .*: radii up to 1.88": lambda: _C.SequentialRadii(
            10, 100, 0.1, 1.0, radii=[0.5, 3.0]
        ),
        "give radii or a positive tolerance": lambda: _C.SequentialRadii(10, 100, 0.1, 1.0),
        "tolerance must be at least 0.007": lambda: _C.SequentialRadii(10, 100, 0.1, 1.0, tolerance=0.001),
        "too small to certify anything": lambda: _C.SequentialRadii(10, 3, 0.1, 1.0, radii=[0.0]),
        "sides must be 1 or 2": lambda: _C.FullCertificates(10, 100, 0.1, 1.0, sides=3),
        "futility must be in": lambda: _C.FullCertificates(10, 100, 0.1, 1.0, futility=1.0),
        "sigma must be positive": lambda: _C.FullCertificates(10, 100, 0.1, 0.0),
        "n0 must be positive": lambda: _C.SequentialPredict(0, 100, 0.1),
        "alpha must be at most 1/2": lambda: _C.SequentialRadii(10, 100, 0.6, 1.0, radii=[0.0]),
        "n must be in": lambda: _C.FullCertificates(10, 0, 0.1, 1.0),
        "n must be in ": lambda: _C.SequentialPredict(10, 2**31, 0.1),
        "alpha must be in": lambda: _C.SequentialPredict(10, 100, 0.0),
    }.items(),
)
def test_bad_arguments(message, make):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_image_without_votes_ends_the_run_after_those_on_their_way():
    planner = _C.SequentialPlanner(PLANNED["radii"], [3, 4, 5], 3)
    while not planner.done:
        pieces, complete = planner.plan(60)
        votes = np.zeros((len(complete), 3), dtype=np.int64)
        for i, slot in enumerate(complete):
            (piece,) = (p for p in pieces.tolist() if p[4] == slot)
            votes[i, 0] = piece[3] - (piece[0] == 1)  # image 4 has samples without a vote
        planner.report(votes)
    assert [image for image, _ in planner.finished()] == [0]
    assert planner.failure.endswith("noisy copies of image 4")


def test_full_certificates_are_those_of_the_bounds():
    """The rule at n against Clopper-Pearson and the quantile, rounded down, bit for bit."""
    sigma, higher = 0.3, 0  # no power of two, whose products are exact
    rule = _C.FullCertificates(100, 1000, 0.001, sigma, futility=0.0)
    for hits in (0, 400, 548, 549, 550, 600, 650, 700, 750, 800, 850, 900, 950, 999, 1000):
        selection, counts = np.array([60, 40, 0]), np.array([hits, 1000 - hits, 0])
        outcome = rule.issue(selection, counts)
        p = ops.clopper_pearson_lower(torch.tensor(hits), 1000, 0.001)
        z = float(ops.normal_quantile(p))
        radius = _C.product_down(sigma, z) if float(p) > 0.5 else 0.0
        higher += float(p) > 0.5 and radius < sigma * z
        expected = (0 if float(p) > 0.5 else -1, 0, float(p), max(0.0, radius))
        assert (outcome.prediction, outcome.selected, outcome.p_lower, outcome.radius) == expected
    assert higher > 0  # cases in which a radius to the nearest would be seen
