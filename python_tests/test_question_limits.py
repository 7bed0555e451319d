"""What may be asked of a certification at the ends of each number's range; one step further is refused."""

from __future__ import annotations

import math

import pytest

from pacd_fast import largest_radius, smallest_n
from pacd_fast.certification.question import Question, check_certifiable, check_level

ASKED = {"sigma": 0.5, "n0": 100, "n": 1000, "alpha": 0.001, "radii": None, "tolerance": None, "sides": 1}
TAKEN = [
    {"n0": 1, "n": 1, "alpha": 0.9},
    {"n": 2**31 - 1},
    {"n": 10},
    {"alpha": 1 - 2**-20},
    {"alpha": 1e-200},
    {"futility": 0.0},
    {"futility": 0.5},
    {"sides": 2},
    {"radii": [0.0]},
    {"radii": [0.0, 5e-324, 0.1]},
    {"radii": [0.1], "alpha": 0.5},
    {"tolerance": 0.1, "alpha": 0.5},
    {"sigma": 1e-30},
]
REFUSED = {
    "n0 and n must be positive, not 0 and 1000": {"n0": 0},
    "n0 and n must be positive, not 100 and 0": {"n": 0},
    "n must be below 2\\^31, not 2147483648": {"n": 2**31},
    "n = 9 is too small to certify anything at alpha = 0.001: it takes n = 10": {"n": 9},
    "alpha must be in .*not 0.99999952": {"alpha": 1 - 2**-21},
    "alpha must be in .*not 1e-201": {"alpha": 1e-201},
    "futility must be in .*, not -1e-300": {"futility": -1e-300},
    "futility must be in .*, not 0.50000": {"futility": math.nextafter(0.5, 1)},
    "futility must be in .*, not nan": {"futility": math.nan},
    "sides must be 1 or 2, not 0": {"sides": 0},
    "sides must be 1 or 2, not 3": {"sides": 3},
    "radii or a tolerance, not both": {"radii": [0.1], "tolerance": 0.1},
    "alpha must be at most 1/2 to stop early, not 0.5000": {"radii": [0.1], "alpha": math.nextafter(0.5, 1)},
    "alpha must be at most 1/2 to stop early, not 0.6": {"tolerance": 0.1, "alpha": 0.6},
    "tolerance must be positive": {"tolerance": 0.0},
    "radii must hold at least one": {"radii": []},
    "radii must rise and not be negative, not 0.1 0.1": {"radii": [0.1, 0.1]},
    "radii must rise and not be negative, not -5e-324": {"radii": [-5e-324]},
    "radii must rise and not be negative, not inf": {"radii": [math.inf]},
    "radii must rise and not be negative, not nan": {"radii": [math.nan]},
    "sigma must be positive": {"sigma": 0.0},
}


@pytest.mark.parametrize("changed", TAKEN, ids=str)
def test_taken(changed):
    given = {**ASKED, "futility": 1e-6, **changed}
    question = Question.of(**given)
    assert (question.n0, question.n, question.alpha) == (given["n0"], given["n"], given["alpha"])
    assert (question.sides, question.futility) == (given["sides"], given["futility"])
    assert question.radii == tuple(given["radii"] or ()) and question.tolerance == (given["tolerance"] or 0.0)


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(ValueError, match=message):
        Question.of(**{**ASKED, "futility": 1e-6, **REFUSED[message]})


def test_defaults_are_those_of_cohen_and_give_up_almost_nothing():
    question = Question()
    assert (question.n0, question.n, question.alpha, question.sides) == (100, 100_000, 0.001, 1)
    assert (question.radii, question.tolerance, question.futility) == ((), 0.0, 1e-6)
    with pytest.raises(AttributeError):
        question.n = 5


QUESTIONS = {
    "full": Question(),
    "radii 0.25 0.5": Question(radii=(0.25, 0.5)),
    "tolerance 0.05": Question(tolerance=0.05),
}


@pytest.mark.parametrize("target", QUESTIONS)
def test_a_target_is_read_as_it_was_written(target):
    question = QUESTIONS[target]
    assert question.target == target
    assert Question.read(0.5, 100, 100_000, 0.001, target, 1, 1e-6) == question
    assert question.likely == (100_000 if target == "full" else 10_000)
    assert type(question.rule(0.5)).__name__ == ("FullCertificates" if target == "full" else "SequentialRadii")
    assert Question(n=5, radii=(0.1,)).likely == 1


@pytest.mark.parametrize(
    "target",
    ["", "Full", "full 0.5", "radii", "radii ", "tolerance", "tolerance 0", "tolerance 0.1 0.2", "radius 0.5"],
)
def test_targets_that_are_none(target):
    with pytest.raises(ValueError, match="is none of full, radii|radii must hold|could not convert|must be positive"):
        Question.read(0.5, 100, 100_000, 0.001, target, 1, 1e-6)


@pytest.mark.parametrize("alpha", [1e-200, 1e-9, 0.001, 0.01, 0.25, 0.3, 0.49, 0.5, 0.51, 0.9])
def test_the_smallest_n_is_where_the_bound_passes_one_half(alpha):
    n = smallest_n(alpha)
    assert alpha ** (1 / n) > 0.5 and (n == 1 or alpha ** (1 / (n - 1)) <= 0.5 * (1 + 1e-12))
    check_certifiable(n, alpha, 0.5)
    assert n == 1 or largest_radius(0.5, n - 1, alpha) == 0.0
    assert largest_radius(0.5, n, alpha) > 0


def test_the_message_says_what_is_reached():
    with pytest.raises(ValueError) as caught:
        check_certifiable(9, 0.001, 0.5)
    reached = (
        f"radius {largest_radius(0.5, 10, 0.001):.4f}; n = 100000 reaches {largest_radius(0.5, 100_000, 0.001):.4f}"
    )
    assert str(caught.value).endswith(reached)
    check_level(2**31 - 1, 0.3, least=0.3)
    with pytest.raises(ValueError, match="at least 0.3, at most"):
        check_level(10, 0.29, least=0.3)
