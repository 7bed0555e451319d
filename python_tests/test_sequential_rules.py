"""The rules of sequential certification against their plain Python versions, built from the boundary tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from pacd_fast import _C, ops

CLASSES, ALPHA, SIGMA = 3, 0.05, 0.5


def random_votes(rule: Any, images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Selection votes [N, classes] and votes between looks [N, looks, classes] of images from easy to hopeless."""
    generator = np.random.default_rng(seed)
    p = generator.dirichlet((1.5, 0.7, 0.3), images)
    selection = generator.multinomial(rule.n0, p)
    return selection, generator.multinomial(np.diff([0, *rule.looks]), p[:, None])


def boundaries(looks: np.ndarray, level: float, claims: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Most misses that accept and fewest that give up, [looks, claims], none above the claim before it."""
    pairs = [_C.sequential_boundaries(looks, level, p, beta) for p in claims.tolist()]
    accept, give_up = (np.stack([looks - pair[i] for pair in pairs], 1) for i in (0, 1))
    return np.minimum.accumulate(accept, 1), np.minimum.accumulate(give_up, 1)


SETTINGS: dict[str, dict[str, Any]] = {
    "radii": {"radii": [0.0, 0.2, 0.5, 0.8]},
    "one radius": {"radii": [0.5]},
    "tolerance": {"tolerance": 0.2},
    "radii, two sides": {"radii": [0.1, 0.2, 0.5, 0.8], "sides": 2},
    "tolerance, two sides": {"tolerance": 0.2, "sides": 2},
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())
def test_sequential_radii(options):
    n, sides, listed, tolerance = 400, options.get("sides", 1), options.get("radii"), options.get("tolerance", 0.0)
    rule = _C.SequentialRadii(20, n, ALPHA, SIGMA, **options)
    looks = rule.looks
    level = ALPHA / sides
    claims, accept, give_up = rule.tables()
    assert all((a == b).all() for a, b in zip((accept, give_up), boundaries(looks, level, claims, 0.05), strict=True))
    if listed:
        assert sides == 2 or claims.tolist() == [_C.radius_target(SIGMA, r) for r in listed]
    if sides == 2:
        rivals, rival_accept, rival_give_up = rule.tables(rival=True)
        again = boundaries(looks, level, 1 - rivals, 0.05)
        assert all((a == b).all() for a, b in zip((rival_accept, rival_give_up), again, strict=True))

    def radius(count: int, rival_count: int) -> float:
        if count == 0:
            return -1.0
        if sides == 1:
            z = ops.normal_quantile(torch.tensor(claims[count - 1]))
            return max(0.0, _C.product_down(SIGMA, float(z)))
        upper = rivals[rival_count - 1] if rival_count else 1.0
        found = float(_C.two_sided_radius(SIGMA, claims[count - 1], upper))
        return found if found > 0 else -1.0

    def issued(found: float) -> float:
        return max((r for r in listed if r <= found), default=-1.0) if listed else found

    selection, votes = random_votes(rule, 300, 3)
    outcome = rule.decide(selection, votes)
    slack = 0.875 * tolerance  # the grid has eight steps a tolerance, and the radius may lie up to one beyond
    for image in range(len(votes)):
        selected = int(selection[image].argmax())
        totals = votes[image].cumsum(0)
        misses, rival = looks - totals[:, selected], np.delete(totals, selected, 1).max(1)
        best, at, open_, rival_open = -1.0, -1, len(claims), len(rivals) if sides == 2 else 0
        for k in range(len(looks)):
            now = radius(
                int((misses[k] <= accept[k]).sum()), int((rival[k] <= rival_accept[k]).sum()) if sides == 2 else 0
            )
            open_ = min(open_, int((misses[k] < give_up[k]).sum()))
            if sides == 2:
                rival_open = min(rival_open, int((rival[k] < rival_give_up[k]).sum()))
            if issued(now) > best:
                best, at = issued(now), k
            if issued(radius(open_, rival_open)) <= best + slack:
                break
        assert outcome["selected"][image] == selected
        assert outcome["prediction"][image] == (selected if best >= 0 else -1)
        assert outcome["radius"][image] == max(best, 0.0)
        assert outcome["samples"][image] == looks[k]
        assert outcome["counted"][image] == looks[at if best >= 0 else k]
    assert len(np.unique(outcome["samples"])) > 5 and len(np.unique(outcome["radius"])) > (1 if listed else 5)


def test_boundaries_need_their_minimum():
    """Counts are whole, so a harder claim may be given one more miss than an easier one: the table takes it back."""
    rule = _C.SequentialRadii(20, 400, ALPHA, SIGMA, tolerance=0.02)
    claims, accept, _ = rule.tables()
    alone = np.stack([rule.looks - _C.sequential_boundaries(rule.looks, ALPHA, p)[0] for p in claims.tolist()], 1)
    assert (np.diff(alone, axis=1) > 0).any() and (np.diff(accept, axis=1) <= 0).all() and (accept <= alone).all()


@pytest.mark.parametrize("futility", [0.0, 1e-6, 0.05])
@pytest.mark.parametrize("sides", [1, 2])
def test_full_certificates(sides, futility):
    n = 400
    rule = _C.FullCertificates(20, n, ALPHA, SIGMA, sides=sides, futility=futility)
    assert rule.looks.tolist() == ([n] if futility == 0 else _C.look_schedule(n).tolist())
    selection, votes = random_votes(rule, 300, 4)
    outcome = rule.decide(selection, votes)
    for image in range(len(votes)):
        selected, totals = int(selection[image].argmax()), votes[image].sum(0)
        rival = int(np.delete(totals, selected).max())
        low = float(ops.clopper_pearson_lower(torch.tensor(int(totals[selected])), n, ALPHA / sides))
        up = float(ops.clopper_pearson_upper(torch.tensor(rival), n, ALPHA / 2)) if sides == 2 else 1.0
        z = float(ops.normal_quantile(torch.tensor(low, dtype=torch.float64)))
        radius = float(_C.two_sided_radius(SIGMA, low, up)) if sides == 2 else _C.product_down(SIGMA, z)
        if outcome["samples"][image] < n:
            assert outcome["prediction"][image] == -1
            # A hopeless image, and with these levels and images one in 20 is not among them by chance.
            assert radius <= 0 or futility > 1e-3
            continue
        assert outcome["prediction"][image] == (selected if radius > 0 else -1)
        assert outcome["radius"][image] == max(radius, 0.0)
        assert (outcome["p_lower"][image], outcome["rival_upper"][image]) == (low, up)
    stopped = outcome["samples"] < n
    assert stopped.any() == (futility > 0) and (outcome["prediction"] >= 0).any()
    if sides == 1 and futility:
        # The give-ups are those of give_up_boundary for the fewest hits with a bound above 1/2.
        hits = torch.arange(n + 1)
        least = int((ops.clopper_pearson_lower(hits, n, ALPHA) > 0.5).nonzero()[0])
        bound = _C.give_up_boundary(rule.looks, n - least, futility)
        misses = rule.looks - np.take_along_axis(votes.cumsum(1), outcome["selected"][:, None, None], 2)[..., 0]
        first = (misses >= bound).argmax(1)
        assert (outcome["samples"][stopped] == rule.looks[first[stopped]]).all()


def test_an_image_behind_its_rival_stops():
    """Two sides: given up once the votes of A and a rival that leads are too unlike an even split."""
    rule = _C.FullCertificates(20, 10_000, 0.001, SIGMA, sides=2)
    steps = np.diff([0, *rule.looks])
    votes = np.stack([steps // 4, steps - steps // 4], 1)[None]  # A has a quarter
    outcome = rule.decide(np.array([[11, 9]]), votes)
    ours = votes[0].cumsum(0)
    level = math.log(len(steps) * 2 / 1e-6)
    against = [
        total * math.log(2) + sum(c * math.log(c / total) for c in (a, b))
        for (a, b), total in zip(ours.tolist(), rule.looks.tolist(), strict=True)
    ]
    first = next(k for k, value in enumerate(against) if value >= level)
    assert 0 < first and outcome["samples"][0] == rule.looks[first] < 200 and outcome["prediction"][0] == -1


@pytest.mark.parametrize("n", [12, 300])
def test_sequential_predict(n):
    rule = _C.SequentialPredict(20, n, ALPHA, futility=1e-3)
    assert rule.looks.tolist() == _C.look_schedule(n, 8).tolist()
    selection, votes = random_votes(rule, 400, 5)
    outcome = rule.decide(selection, votes)
    predicted = 0
    for image in range(len(votes)):
        selected = int(selection[image].argmax())
        second = int(np.delete(selection[image], selected).max())
        totals = votes[image].cumsum(0)
        said = -1
        for k, t in enumerate(rule.looks.tolist()):
            a, b = int(totals[k, selected]), int(np.delete(totals[k], selected).max())
            prior = (int(selection[image, selected]), int(selection[image, selected]) + second)
            bet = a > b and _C.betting_reaches(a, a + b, 0.5, ALPHA / 2, *prior)
            last = a > b and t == n and float(ops.clopper_pearson_lower(torch.tensor(a), a + b, ALPHA / 2)) >= 0.5
            if bet or last:
                said = selected
                break
            if b - a >= n - t:
                break
            entropy = sum(c * math.log(c / (a + b)) for c in (a, b) if c)
            if a < b and (a + b) * math.log(2) + entropy >= math.log(len(rule.looks) * CLASSES / 1e-3):
                break
        assert outcome["prediction"][image] == said
        assert outcome["samples"][image] == t == outcome["counted"][image]
        predicted += said >= 0
    assert 100 < predicted < 400
