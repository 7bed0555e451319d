"""Promises that hold for all arguments, tried on many: bounds, votes, planner, flips, results files, poison."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from test_results import RUN
from test_sequential import PLANNED, Votes, run

from pacd_fast import _C, ops
from pacd_fast.certification import ResultsFile, Row, read_results
from pacd_fast.certification.rows import dense, rounded, sparse
from pacd_fast.labelflips import exact_flips, kl_flips
from pacd_fast.poisoning import Ball

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
many = settings(max_examples=200, deadline=None, derandomize=True, database=None)

levels = st.floats(-40, -0.01).map(math.exp)
unit = st.floats(0, 1, allow_nan=False)


def lower(k: int, n: int, alpha: float) -> float:
    return float(ops.clopper_pearson_lower(torch.tensor(k), n, alpha))


def upper(k: int, n: int, alpha: float) -> float:
    return float(ops.clopper_pearson_upper(torch.tensor(k), n, alpha))


@many
@given(st.integers(1, 10**6), unit, levels, st.floats(1e-6, 1))
def test_clopper_pearson_is_monotone(n, share, alpha, factor):
    """More hits, a larger level, fewer samples for the same hits: a larger lower bound, whatever the rounding."""
    k = round(share * n)
    here = lower(k, n, alpha)
    assert 0 <= here and upper(k, n, alpha) <= 1 and (alpha > 0.5 or here <= k / n <= upper(k, n, alpha))
    assert lower(max(k - 1, 0), n, alpha) <= here <= lower(min(k + 1, n), n, alpha)
    assert lower(k, n, alpha * factor) <= here and upper(k, n, alpha * factor) >= upper(k, n, alpha)
    assert lower(k, n + 1, alpha) <= here <= lower(k + 1, n + 1, alpha)
    assert upper(k, n, alpha) == pytest.approx(1 - lower(n - k, n, alpha), abs=1e-15)


@many
@given(st.lists(unit, min_size=2, max_size=2), st.floats(0.01, 10))
def test_radii_are_monotone(probabilities, sigma):
    low, high = sorted(probabilities)
    for rival in (0.0, 0.3, 1.0):
        assert 0 <= float(_C.two_sided_radius(sigma, low, rival)) <= float(_C.two_sided_radius(sigma, high, rival))
    p = _C.radius_target(sigma, 0.1)
    assert p == 1 or _C.product_down(sigma, float(ops.normal_quantile(torch.tensor(p, dtype=torch.float64)))) >= 0.1


@many
@given(st.integers(1, 40), st.integers(2, 12), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_votes_add_up(rows, classes, slots, seed):
    """Every row with finite logits and a slot gives one vote, to a class with its largest logit."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=draw).round()  # ties
    where = torch.randint(-1, slots, (rows,), generator=draw)
    counts = torch.zeros(slots, classes, dtype=torch.int64)
    ops.tally_votes(counts, logits, where)
    assert counts.sum(1).tolist() == [int((where == slot).sum()) for slot in range(slots)]
    largest = logits == logits.amax(1, keepdim=True)
    for slot in range(slots):
        assert bool((counts[slot] <= largest[where == slot].sum(0)).all())


@few
@given(
    st.sampled_from(sorted(PLANNED)), st.integers(1, 12), st.integers(2, 5), st.integers(5, 2000), st.integers(0, 4),
    st.integers(0, 1000),
)  # fmt: skip
def test_the_planner_draws_every_sample_once_and_decides_every_image(mode, images, classes, rows, lag, seed):
    """For any batch size and delay of reports; `run` asserts that no sample is drawn twice."""
    rule = PLANNED[mode]
    votes = Votes(rule, images, classes, seed)
    expected = votes.decided(rule)
    outcomes, sizes, planner = run(rule, votes, rows, lag)
    assert sorted(outcomes) == list(range(images)) and planner.done and not planner.failure
    assert max(sizes) <= rows
    for image, outcome in outcomes.items():
        found = (outcome.prediction, outcome.radius, outcome.p_lower, outcome.samples, outcome.counted)
        names = ("prediction", "radius", "p_lower", "samples", "counted")
        assert found == tuple(expected[name][image] for name in names)
        assert outcome.counts.sum() == outcome.counted <= outcome.samples <= rule.n


@few
@given(st.data(), st.integers(2, 4), st.booleans())
def test_flips_rise_with_the_margin(data, classes, smoothed):
    """Whoever is ahead by more, by a larger influence of a label of the winner, survives as many flips at least."""
    n = data.draw(st.integers(4, 60))
    seed = data.draw(st.integers(0, 2**32 - 1))
    draw = np.random.default_rng(seed)
    y, q = draw.integers(0, classes, n), float(draw.uniform(0.01, 0.4))
    size = draw.uniform(0.1, 1.0, n)
    alpha = np.where(y == 1, size, -size / (2 * classes)) if classes == 2 else size * np.where(y == 1, 2.0, 0.5)
    alpha *= 3 / np.abs(alpha).sum()
    # An ever smaller part of the others' influences: the winner's lead grows, no flip takes more, no variance rises.
    found = []
    for share in (1.0, 0.75, 0.5, 0.25, 0.0):
        here = np.where(y == 1, alpha, share * alpha)
        said, flips = _C.linear_flips(here[None], y, q, classes, smoothed)
        found.append(int(flips[0]) if said[0] == 1 else -1)
    assume(found[-1] >= 0)
    assert found == sorted(found)


@many
@given(st.floats(0.001, 0.49), st.integers(2, 10), st.lists(st.floats(-60, -0.0), min_size=2, max_size=2))
def test_flips_rise_as_the_tail_falls(q, classes, tails):
    high, low = np.array([max(tails)]), np.array([min(tails)])
    for rule in (kl_flips, exact_flips):
        assert 0 <= rule(high, q, classes, 300)[0] <= rule(low, q, classes, 300)[0] <= 300
    assert kl_flips(low, q, classes, 300)[0] <= exact_flips(low, q, classes, 300)[0]


@many
@given(st.lists(st.one_of(st.just(0), st.integers(0, 2**31 - 1)), min_size=1, max_size=30))
def test_votes_round_trip_as_text(counts):
    assert dense(sparse(counts), len(counts)).tolist() == counts


@many
@given(st.floats(0, 1e9), st.integers(0, 12))
def test_printed_numbers_are_on_their_side(value, decimals):
    down, up = float(rounded(value, decimals)), float(rounded(value, decimals, up=True))
    assert down <= value <= up and up - down <= 10.0**-decimals * (1 + 1e-9) + abs(value) * 1e-15


images = st.tuples(st.integers(0, 10**6), unit, st.integers(0, 9), st.floats(0, 1e5))


@few
@given(st.lists(images, max_size=12, unique_by=lambda image: image[0]))
def test_results_round_trip(tmp_path_factory, rows):
    """Any possible rows, in any order: what is read is what was written, rounded outward by the format's last place."""
    path = tmp_path_factory.mktemp("results") / "r.tsv"
    rule = _C.FullCertificates(RUN.n0, RUN.n, RUN.alpha, float(np.float32(RUN.sigma)), futility=0.0)
    written = []
    with ResultsFile(path, RUN) as file:
        for idx, share, label, seconds in rows:
            hits = round(share * RUN.n)
            o = rule.issue([RUN.n0, 0], [hits, RUN.n - hits])
            written.append(
                Row(
                    idx=idx, label=label, predict=o.prediction, radius=o.radius, p_lower=o.p_lower, count=hits,
                    time=seconds, samples=RUN.n, rival_upper=o.rival_upper, selection=sparse(o.selection),
                    votes=sparse(o.counts),
                )
            )  # fmt: skip
            file.append(written[-1])
    if not rows:
        return
    found = read_results(path)
    assert found.run == RUN
    for name in ("idx", "label", "predict", "count", "samples"):
        assert getattr(found, name).tolist() == [getattr(row, name) for row in written]
    assert found.votes.tolist() == [row.votes for row in written]
    for name, place in (("radius", 1e-6), ("p_lower", 1e-9)):
        for here, row in zip(getattr(found, name), written, strict=True):
            assert here <= getattr(row, name) < here + place * 1.000001


epsilons = {"linf": st.floats(1 / 255, 1.2), "l2": st.floats(1 / 255, 8.0)}


@many
@given(st.sampled_from(["linf", "l2"]), st.data(), st.sampled_from([torch.uint8, torch.float32]))
@example("l2", None, torch.uint8)
def test_poison_stays_in_the_ball_after_rounding(norm, data, dtype):
    """For any epsilon, any images and any perturbation, also one that lies on the border or is whole levels long."""
    epsilon = 2 * math.sqrt(2) / 255 if data is None else data.draw(epsilons[norm])
    seed = 0 if data is None else data.draw(st.integers(0, 2**32 - 1))
    draw = torch.Generator().manual_seed(seed)
    base = torch.randint(0, 256, (6, 1, 4, 5), generator=draw, dtype=torch.uint8)
    base[:2] = base[:2] // 128 * 255
    pixels = base.float() / 255
    wild = torch.randn(base.shape, generator=draw) * epsilon
    wild[::2] = (wild[::2] * 255).round() / 255  # whole levels
    ball = Ball(epsilon, norm)
    u = ball.project(pixels + wild, pixels)
    original = base if dtype == torch.uint8 else pixels
    images = ball.rounded(u, original)
    assert images.dtype == dtype and float(ball.distortion(images, original).max()) <= epsilon
    if dtype == torch.float32:
        assert float(images.min()) >= 0 and float(images.max()) <= 1
