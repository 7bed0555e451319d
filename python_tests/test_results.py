"""The results file survives kills, never mixes runs, rounds down, and its summaries equal counting by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
import time
from decimal import Decimal

import numpy as np
import pytest
from forks import Fork
from pacd_fast._C import FullCertificates
from scipy.special import ndtri

from pacd_fast.certification import (
    ResultsFile,
    Row,
    Run,
    peek,
    read_results,
    rounded,
    summarize,
    summary_table,
)
from pacd_fast.certification.rows import check_row, columns, dense, sparse

OLD = Run(100, 100_000, 0.001, 0.5, 2**64 - 1, "float32", "mnist-cnn@0123456789ab", "mnist5k-test@c0b26e9ecbbb")
RUN = dataclasses.replace(
    OLD, noise="lattice", step="0.00392156862745098", rows=256, compiled=1, machine="cpu AVX512, torch 2.15.0"
)
HEADER = "\t".join(columns(2)) + "\n"
BOTH = pytest.mark.parametrize("run", [OLD, RUN], ids=["first version", "second"])

# Columns and form of what certify.py of locuslab/smoothing writes; older versions wrote seconds as a number.
LOCUSLAB = (
    "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
    "0\t3\t3\t0.486\t1\t16.6\n20\t7\t7\t1.22\t1\t0:00:17.5\n100\t4\t-1\t0.0\t0\t1 day, 0:00:01\n"
    "340\t2\t4\t0.172\t0\t17\n"
)


def row(idx, label=3, predict=3, radius=0.7, p_lower=0.92, count=93_000, time=1.25, samples=100_000, voids=2):
    votes = sparse([0, samples - count - voids, 0, count])
    return Row(idx, label, predict, radius, p_lower, count, time, samples, voids, 1.0, sparse([3, 0, 0, 97]), votes)


def rows(count, seed=0):
    generator = random.Random(seed)
    for idx in range(count):
        p = 0.9999 * generator.random()
        predict = generator.randrange(3) if p > 0.5 else -1
        radius = generator.random() * RUN.sigma * float(ndtri(p)) if predict >= 0 else 0.0
        yield row(idx, generator.randrange(3), predict, radius, p, math.ceil(p * 100_000), generator.random())


def write(path, some_rows, run=RUN):
    with ResultsFile(path, run) as file:
        for one in some_rows:
            if one.idx not in file.done:
                file.append(one)
    return path


def without_time(path):
    return [line.rsplit("\t", 1)[0] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("decimals", [6, 9])
def test_rounded_is_on_its_side_and_closest(decimals):
    generator = random.Random(1)
    values = [0.0, 0.1, 0.3, 0.5, 1.0, 1.9, 1 - 2**-53, 5e-324, 1e-7, 0.001, 123.456789012345]
    values += [generator.random() * 4 for _ in range(2000)]
    values += [math.nextafter(k / 10**6, up) for k in range(1, 2000) for up in (0, 2)]
    for value in values:
        text, up = rounded(value, decimals), rounded(value, decimals, up=True)
        assert Decimal(up) >= Decimal(value) > Decimal(up) - Decimal(1).scaleb(-decimals) and float(up) >= value
        assert len(text.partition(".")[2]) == decimals
        assert "E" not in text
        assert Decimal(text) <= Decimal(value) < Decimal(text) + Decimal(1).scaleb(-decimals)
        assert float(text) <= value
    # 0.3 is 0.299999999999999988897769753748 as a double.
    assert rounded(0.3, 6) == "0.299999"
    assert rounded(0.5, 6) == "0.500000"


def test_one_row_as_text(tmp_path):
    written = [row(7, 3, 3, 1.11456789, 0.9876543219, 99_000, 0.5), row(8, 3, -1, 0.0, 0.4)]
    header, first, second, end = write(tmp_path / "old.tsv", written, OLD).read_text().split("\n")
    assert (
        header.split("\t")
        == ("idx label predict radius correct p_lower count n0 n alpha sigma seed dtype model data time").split()
    )
    run = "100\t100000\t0.001\t0.5\t18446744073709551615\tfloat32\tmnist-cnn@0123456789ab\tmnist5k-test@c0b26e9ecbbb"
    assert first == f"7\t3\t3\t1.114567\t1\t0.987654321\t99000\t{run}\t0.500000"
    assert second == f"8\t3\t-1\t0.000000\t0\t0.400000000\t93000\t{run}\t1.250000"
    assert end == ""
    header, first, second, end = write(tmp_path / "new.tsv", written).read_text().split("\n")
    assert (
        header.split("\t")
        == (
            "idx label predict radius correct p_lower count samples voids rival_upper n0 n alpha sigma seed dtype "
            "model data noise step target sides futility rows compiled machine selection votes time"
        ).split()
    )
    run += "\tlattice\t0.00392156862745098\tfull\t1\t0.0\t256\t1\tcpu AVX512, torch 2.15.0"
    votes = "0:3 3:97\t1:998 3:99000"
    assert first == f"7\t3\t3\t1.114567\t1\t0.987654321\t99000\t100000\t2\t1.000000000\t{run}\t{votes}\t0.500000"


def test_votes_as_text():
    for counts in ([0, 0], [5], [0, 3, 0, 10**9]):
        assert dense(sparse(counts), len(counts)).tolist() == counts
    for wrong in (
        "",
        "1",
        "1:2 1:3",
        "2:1 1:1",
        "1:-2",
        "a:1",
        "1:1:1",
        "1:1  2:1",
        "\u0661:1",
        "99999999999:1",
        "1:9999999999",
    ):
        with pytest.raises(ValueError, match="votes"):
            dense(wrong)
    with pytest.raises(ValueError, match="for more than 3 classes"):
        dense("3:1", 3)


def test_numpy_scalars_are_written_as_numbers(tmp_path):
    run = dataclasses.replace(RUN, sigma=np.float64(0.1), n=np.int64(100_000), alpha=np.float64(1e-12))
    one = row(np.int64(0), np.int64(3), np.int64(3), np.float64(0.1), np.float64(0.92), np.int64(93_000), np.float32(1))
    assert peek(write(tmp_path / "r.tsv", [one], run)) == dataclasses.replace(RUN, sigma=0.1, alpha=1e-12)


@pytest.mark.parametrize("value", [0.1 + 0.2, 1 / 3, 1e-12, 5e-324, 0.25, 1.7976931348623157e308])
def test_sigma_and_alpha_read_back_as_the_same_double(tmp_path, value):
    run = dataclasses.replace(RUN, sigma=value, alpha=min(value, 1 - 2**-53))
    assert peek(write(tmp_path / "r.tsv", [row(0, radius=0.0)], run)) == run


def test_pandas_and_the_published_analysis_read_it(tmp_path):
    pandas = pytest.importorskip("pandas")
    path = write(tmp_path / "r.tsv", rows(200))
    frame = pandas.read_csv(path, delimiter="\t")
    assert tuple(frame.columns) == columns(2)
    assert not frame.isna().any().any()
    ours = summarize(read_results(path), [0.0, 0.5, 1.0])
    published = [(frame["correct"] & (frame["radius"] >= r)).mean() for r in (0.0, 0.5, 1.0)]
    assert ours.certified_accuracy == pytest.approx(published, abs=0)


@BOTH
def test_read_returns_what_was_written(tmp_path, run):
    written = list(rows(50))
    results = read_results(write(tmp_path / "r.tsv", written, run))
    assert len(results) == 50
    assert results.run == run
    for name in ("samples", "voids", "selection", "votes"):
        column = getattr(results, name)
        assert (column is None) if run == OLD else column.tolist() == [getattr(one, name) for one in written]
    for i, one in enumerate(written):
        assert (results.idx[i], results.label[i], results.predict[i]) == (one.idx, one.label, one.predict)
        assert results.correct[i] == (one.label == one.predict)
        assert 0 <= one.radius - results.radius[i] <= 1e-6 + 1e-15
        assert 0 <= one.p_lower - results.p_lower[i] <= 1e-9 + 1e-15
        assert results.count[i] == one.count
        assert abs(results.time[i] - one.time) < 1e-6


@BOTH
def test_resume_after_a_cut_at_every_byte(tmp_path, run):
    written = list(rows(3))
    whole = write(tmp_path / "whole.tsv", written, run).read_bytes()
    header = whole.index(b"\n") + 1
    path = tmp_path / "r.tsv"
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        assert peek(path) == (run if lines > 1 else None)
        with ResultsFile(path, run) as file:
            assert file.done == set(range(max(0, lines - 1)))
            assert path.read_bytes() == whole[: max(header, whole[:cut].rfind(b"\n") + 1)]
            for one in written:
                if one.idx not in file.done:
                    file.append(one)
        assert path.read_bytes() == whole


def test_resume_after_sigkill(tmp_path):
    path = tmp_path / "r.tsv"

    def append_for_ever() -> None:
        file = ResultsFile(path, RUN)
        for idx in itertools.count():
            if idx not in file.done:
                file.append(Row(idx, 3, 3, 0.5, 0.9, 95_000, 1.0, 100_000))
            if idx == 200:
                print("under way", flush=True)

    for _ in range(3):
        writer = Fork(append_for_ever, tmp_path / "log")
        while writer.running() and not writer.said():
            time.sleep(0.001)
        writer.kill()
    results = read_results(path)
    assert results.idx.tolist() == list(range(len(results)))
    assert len(results) > 200


def test_rows_are_on_disk_at_once(tmp_path):
    with ResultsFile(tmp_path / "r.tsv", RUN) as file:
        for idx in range(3):
            file.append(row(idx))
            assert read_results(tmp_path / "r.tsv").idx.tolist() == list(range(idx + 1))


@pytest.mark.parametrize(
    ("column", "value"),
    [("n0", 10), ("n", 1000), ("alpha", 0.01), ("sigma", math.nextafter(0.5, 1)), ("seed", 1), ("dtype", "bfloat16"),
     ("model", "mnist-cnn@ffffffffffff"), ("data", "mnist-test@c0b26e9ecbbb"), ("noise", "float"), ("step", "0.1"),
     ("target", "radii 0.25"), ("sides", 2), ("futility", 0.1), ("rows", 64), ("compiled", 0),
     ("machine", "cpu AVX2, torch 2.11.0")],
)  # fmt: skip
def test_another_run_is_refused_and_nothing_changed(tmp_path, column, value):
    some = [row(i, count=930, samples=1000) for i in range(3)]
    path = write(tmp_path / "r.tsv", some, dataclasses.replace(RUN, **{column: value}))
    path.write_text(path.read_text() + "3\t1\t")
    before = path.read_bytes()
    message = (
        f"{path} is another run: {column} is {value} there and {getattr(RUN, column)} here; choose another --out or"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        ResultsFile(path, RUN)
    assert path.read_bytes() == before


def test_other_files_are_refused_and_not_changed(tmp_path):
    path = tmp_path / "r.tsv"
    for content in (
        b"precious notes",
        b"precious\nnotes\n",
        b"\xff\xfe\n",
        LOCUSLAB.encode(),
        b"\n",
        HEADER.encode() + b"1\t2\n",
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a results file|2 columns instead of 29"):
            ResultsFile(path, RUN)
        assert path.read_bytes() == content
    with pytest.raises(ValueError, match="is a folder"):
        ResultsFile(tmp_path, RUN)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ResultsFile(tmp_path / "absent" / "r.tsv", RUN)


def test_two_writers(tmp_path):
    with ResultsFile(tmp_path / "r.tsv", RUN), pytest.raises(ValueError, match="being written by another process"):
        ResultsFile(tmp_path / "r.tsv", RUN)
    ResultsFile(tmp_path / "r.tsv", RUN).close()


def test_impossible_rows_are_not_written(tmp_path):
    path = tmp_path / "r.tsv"
    with ResultsFile(path, RUN) as file:
        file.append(row(0))
        for bad, message in [
            (row(0), "is in .* already"),
            (row(-1), "negative"),
            (row(1, predict=-2), "negative"),
            (row(1, radius=math.nan), "radius nan"),
            (row(1, radius=math.inf), "radius inf"),
            (row(1, radius=-0.1), "radius -0.1"),
            (row(1, predict=-1), "abstained with radius"),
            (row(1, p_lower=1.1), "p_lower 1.1"),
            (row(1, p_lower=math.nan), "p_lower nan"),
            (row(1, count=100_001), "count 100001 is not in 0..100000"),
            (row(1, samples=0, count=0), "samples 0 is not in 1..100000"),
            (row(1, samples=100_001), "samples 100001 is not in"),
            (row(1, voids=-1), "voids -1 is not in 0..100000"),
            (row(1, count=91_999), "p_lower 0.92 is above 91999 votes of 100000"),
            (row(1, radius=0.703), "radius 0.703 is more than p_lower 0.92 is worth"),
            (row(1, time=math.nan), "time nan"),
        ]:
            with pytest.raises(ValueError, match=message):
                file.append(bad)
    assert read_results(path).idx.tolist() == [0]


@pytest.mark.parametrize("text", ["a\tb", "a\nb", "", 'a"b', "a\u2028b"])
def test_names_that_would_break_a_row(text):
    with pytest.raises(ValueError, match="model must be printable"):
        dataclasses.replace(RUN, model=text)


def test_locuslab_files(tmp_path):
    path = tmp_path / "sigma_0.50"
    path.write_text(LOCUSLAB)
    results = read_results(path)
    assert results.idx.tolist() == [0, 20, 100, 340]
    assert results.predict.tolist() == [3, 7, -1, 4]
    assert results.correct.tolist() == [True, True, False, False]
    assert results.time.tolist() == [16.6, 17.5, 86401.0, 17.0]
    assert (results.p_lower, results.count, results.run) == (None, None, None)
    summary = summarize(results)
    assert summary.acr == (0.486 + 1.22) / 4
    assert summary.p_lower_quantiles is None
    assert summary.radii == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert summary.certified_accuracy == (0.5, 0.5, 0.25, 0.25, 0.25)
    assert "p_A" not in summary_table({"a": results})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: "", "is empty"),
        (lambda t: HEADER, "no certified image in it yet"),
        (lambda t: t.replace("radius", "Radius"), "is not a results file"),
        (lambda t: t.replace("\t0.5\t", "\thalf\t", 1), "line 2: malformed row (could not convert"),
        (lambda t: t.replace("\n1\t", "\n1.0\t"), "line 3: malformed row (invalid literal"),
        (lambda t: t.replace("\n2\t", "\n1\t"), "line 4: image 1 is in the file twice"),
        (lambda t: t.replace("\n1\t3\t3", "\n1\t3\t2"), "line 3: malformed row (correct is 1 for label 3 and"),
        (lambda t: t.replace("\n1\t3\t3\t0.6", "\n1\t3\t3\t-0.6"), "line 3: malformed row (radius -0.6"),
        (lambda t: t.replace("\n1\t3\t3\t0.699999", "\n1\t3\t3\tnan"), "line 3: malformed row (radius nan"),
        (lambda t: t.replace("\t1.250000\n", "\n", 1), "line 2: 28 columns instead of 29"),
        (lambda t: t.replace("\n1\t", "\n\n1\t"), "line 3: 1 columns instead of 29"),
        (lambda t: t.replace("float32", "bfloat16", 1), "line 3 is another run: dtype is float32 there and bfloat16"),
    ],
)  # fmt: skip
def test_malformed_files(tmp_path, edit, message):
    path = write(tmp_path / "r.tsv", [row(idx) for idx in range(3)])
    assert edit(path.read_text()) != path.read_text()
    path.write_text(edit(path.read_text()))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_results(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_honest_rows_pass_for_a_sigma_that_float32_rounds_up():
    """The radius is of the noise that is drawn: float32(0.1) is 1.5e-8 of it above 0.1."""
    rule = FullCertificates(100, 2000, 0.001, float(np.float32(0.1)))
    run = Run(100, 2000, 0.001, 0.1, 0, "float32", "m", "d", rows=1, machine="cpu")
    for count in range(1100, 2001):
        outcome = rule.issue(np.array([100, 0]), np.array([count, 2000 - count]), 0)
        check_row(Row(0, 0, outcome.prediction, outcome.radius, outcome.p_lower, count, 1.0, samples=2000), run)
