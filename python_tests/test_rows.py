"""Rows of results files at the ends of what they may be, and rows that one file takes over from another."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from test_results import LOCUSLAB, RUN, row, rows, write

from pacd_fast import ops
from pacd_fast.certification import ResultsFile, Row, read_results
from pacd_fast.certification.rows import check_row, dense

TWO_SIDES = dataclasses.replace(RUN, sides=2)


def test_bounds_may_be_0_and_1_and_nothing_beyond():
    check_row(row(0, 3, -1, 0.0, 0.0, 0), RUN)
    for upper in (0.0, 1.0):
        check_row(dataclasses.replace(row(0, 3, -1, 0.0, 0.5), rival_upper=upper), TWO_SIDES)
    for upper in (-1e-12, 1 + 1e-12, float("nan")):
        with pytest.raises(ValueError, match="rival_upper"):
            check_row(dataclasses.replace(row(0, 3, -1, 0.0, 0.5), rival_upper=upper), TWO_SIDES)
    for lower in (-1e-12, 1 + 1e-12, float("nan")):
        with pytest.raises(ValueError, match="p_lower"):
            check_row(row(0, 3, -1, 0.0, lower, 100_000), RUN)


def test_counts_of_samples_at_both_ends():
    run = dataclasses.replace(RUN, n=10)
    for samples, count, voids in ((1, 0, 0), (1, 0, 1), (10, 0, 10), (10, 0, 0)):
        check_row(row(0, 3, -1, 0.0, 0.0, count, samples=samples, voids=voids), run)
    for samples, count, voids, message in (
        (0, 0, 0, "samples 0 is not in 1..10"),
        (11, 0, 0, "samples 11 is not in 1..10"),
        (10, 11, 0, "count 11 is not in 0..10"),
        (10, -1, 0, "count -1 is not in 0..10"),
        (5, 0, 6, "voids 6 is not in 0..5"),
        (5, 0, -1, "voids -1 is not in 0..5"),
    ):
        with pytest.raises(ValueError, match=message):
            check_row(row(0, 3, -1, 0.0, 0.0, count, samples=samples, voids=voids), run)


def test_a_row_of_one_side_says_nothing_of_the_rival():
    assert Row(0, 3, 3, 0.1, 0.9, 95_000, 1.0, 100_000).rival_upper == 1.0


@pytest.mark.parametrize("alpha", [1e-3, 0.5, 0.6, 0.99, 1 - 2**-20])
def test_honest_bounds_of_any_level_are_taken(alpha):
    """At one near 1 the bound is less than 1e-9 below the share of votes, or above it."""
    run = dataclasses.replace(RUN, n=1000, alpha=alpha)
    for count in (0, 1, 300, 700, 999, 1000):
        lower = float(ops.clopper_pearson_lower(torch.tensor(count), 1000, alpha))
        check_row(row(0, 3, -1, 0.0, lower, count, samples=1000), run)
    if alpha <= 0.5:
        with pytest.raises(ValueError, match="p_lower .* is above 700 votes of 1000"):
            check_row(row(0, 3, -1, 0.0, 0.7 + 2e-9, 700, samples=1000), run)


def test_classes_are_below_two_to_the_24th_and_counts_below_the_31st():
    with pytest.raises(ValueError, match="rising classes"):
        dense(f"{2**24}:1")
    with pytest.raises(ValueError, match="rising classes"):
        dense(f"1:{2**31}")
    assert dense(f"1:{2**31 - 1}").tolist() == [0, 2**31 - 1]
    with pytest.raises(ValueError, match="for more than 10 classes"):
        dense(f"{2**24 - 1}:1", 10)


def test_times_of_locuslab_have_days_hours_and_minutes(tmp_path):
    (tmp_path / "a").write_text(LOCUSLAB.partition("\n")[0] + "\n0\t3\t3\t0.5\t1\t2 days, 1:02:03.5\n")
    assert read_results(tmp_path / "a").time.tolist() == [2 * 86400 + 3600 + 2 * 60 + 3.5]


def test_rows_are_taken_over_once_byte_for_byte(tmp_path):
    every = list(rows(9))
    other = write(tmp_path / "other.tsv", every[3:])
    path = write(tmp_path / "r.tsv", every[:5])
    lines = [file.read_text().splitlines()[1:] for file in (path, other)]
    with ResultsFile(path, RUN) as file:
        for _ in range(2):  # the second time there is nothing new
            file.take(other)
            assert file.done == set(range(9))
            assert path.read_text().splitlines()[1:] == [*lines[0], *lines[1][2:]]
        with pytest.raises(ValueError, match="image 7 is in"):
            file.append(every[7])
    assert np.array_equal(read_results(path).idx, np.arange(9))
    elsewhere = write(tmp_path / "elsewhere.tsv", [row(20)], dataclasses.replace(RUN, seed=6))
    with ResultsFile(path, RUN) as file, pytest.raises(ValueError, match="is another run: seed"):
        file.take(elsewhere)


def test_a_file_is_free_when_it_is_closed_or_was_refused(tmp_path):
    """While the objects are there still, and so their descriptors."""
    path = write(tmp_path / "r.tsv", [row(0)])
    closed = ResultsFile(path, RUN)
    closed.close()
    with pytest.raises(ValueError, match="is another run") as refused:
        ResultsFile(path, dataclasses.replace(RUN, seed=6))
    with ResultsFile(path, RUN) as file:
        assert file.done == {0}
    assert refused.tb is not None and closed.done == {0}


def test_the_rows_of_a_class_are_those_with_its_label(tmp_path):
    results = read_results(write(tmp_path / "r.tsv", list(rows(30))))
    for label in range(3):
        assert results.of_class(label).idx.tolist() == results.idx[results.label == label].tolist() != []
    with pytest.raises(ValueError, match="no image of class 7 among 30"):
        results.of_class(7)


@pytest.mark.parametrize(
    ("name", "text"),
    [("n0", "-1"), ("n", "0"), ("n", str(2**31)), ("alpha", "2.0"), ("alpha", "nan"), ("sigma", "0.0"),
     ("sigma", "inf"), ("seed", "-5"), ("dtype", "float8"), ("noise", "pink"), ("sides", "3"), ("futility", "0.7"),
     ("rows", "-1"), ("compiled", "2")],
)  # fmt: skip
def test_a_run_that_cannot_be_is_refused(name, text, tmp_path):
    header, line = write(tmp_path / "r.tsv", [row(0)]).read_text().splitlines()
    fields = line.split("\t")
    fields[header.split("\t").index(name)] = text
    (tmp_path / "r.tsv").write_text(header + "\n" + "\t".join(fields) + "\n")
    with pytest.raises(ValueError, match=rf"r.tsv, line 2: malformed row \({name} must be .*, not '?{text}'?\)"):
        read_results(tmp_path / "r.tsv")
