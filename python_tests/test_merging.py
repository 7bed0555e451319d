"""Results files together: shards read and merged, rows sorted, rows that say more than they can are refused."""

import dataclasses
import itertools
import os
import random

import numpy as np
import pytest
from scipy.special import ndtri
from test_results import HEADER, LOCUSLAB, RUN, row, rows, without_time, write

from pacd_fast import _C
from pacd_fast.certification import ResultsFile, exactly, merge, pooled, read_results


def test_read_several_files(tmp_path):
    first = write(tmp_path / "a.tsv", [row(0), row(2)])
    second = write(tmp_path / "b.tsv", [row(1)])
    assert read_results([first, second]).idx.tolist() == [0, 2, 1]
    with pytest.raises(ValueError, match="image 0 is both in"):
        read_results([first, first])
    other = write(tmp_path / "c.tsv", [row(5)], dataclasses.replace(RUN, seed=5))
    with pytest.raises(ValueError, match=r"c\.tsv is another run: seed is 5 there"):
        read_results([first, other])
    published = tmp_path / "d.tsv"
    published.write_text(LOCUSLAB.replace("\n0\t", "\n7\t"))
    with pytest.raises(ValueError, match="differ in format"):
        read_results([first, published])
    for nothing in (tmp_path / "absent.tsv", [tmp_path / "absent.tsv"]):
        with pytest.raises(FileNotFoundError, match="no such results file"):
            read_results(nothing)
    with pytest.raises(ValueError, match="no file: no certified image"):
        read_results([])
    with pytest.raises(ValueError, match="is a folder"):
        read_results(tmp_path)
    (tmp_path / "b.tsv").write_bytes(b"\xff\xfe\0\0")
    with pytest.raises(ValueError, match="it is not text"):
        read_results(tmp_path / "b.tsv")


def test_a_growing_file_can_be_read(tmp_path):
    path = write(tmp_path / "r.tsv", [row(0), row(1)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert read_results(path).idx.tolist() == [0]
    path.write_bytes(whole + b"2\t")
    assert read_results(path).idx.tolist() == [0, 1]


def test_merge_equals_the_run_without_shards(tmp_path):
    every = list(rows(21))
    whole = write(tmp_path / "whole.tsv", every)
    shards = [write(tmp_path / f"{k}.tsv", [dataclasses.replace(r, time=k) for r in every[k::3]]) for k in range(3)]
    write(shards[0], every[1:2])  # one image twice, with another time
    with open(shards[2], "ab") as file:
        file.write(b"99\t1")  # torn
    (tmp_path / "empty.tsv").write_text("")
    for i, order in enumerate(itertools.permutations([*shards, tmp_path / "empty.tsv"])):
        out = tmp_path / f"merged{i}.tsv"
        assert merge(order, out) == 21
        assert without_time(out) == without_time(whole)
        assert out.read_bytes().endswith(b"\n")
    with ResultsFile(out, RUN) as file:
        assert file.done == set(range(21))


def test_merge_refuses(tmp_path):
    first = write(tmp_path / "a.tsv", [row(0), row(1)])
    with pytest.raises(ValueError, match="exists already"):
        merge([first], first)
    disagrees = write(tmp_path / "b.tsv", [row(2), row(1, count=92_999)])
    with pytest.raises(ValueError, match="image 1 has another count than"):
        merge([first, disagrees], tmp_path / "out.tsv")
    small = dataclasses.replace(RUN, n=1000, n0=1)
    other = write(tmp_path / "c.tsv", [row(5, count=930, samples=1000)], small)
    with pytest.raises(ValueError, match=r"c\.tsv is another run: n0 is 1 there and 100 here"):
        merge([first, other], tmp_path / "out.tsv")
    published = tmp_path / "d.tsv"
    published.write_text(LOCUSLAB)
    with pytest.raises(ValueError, match="is not a results file"):
        merge([first, published], tmp_path / "out.tsv")
    (tmp_path / "e.tsv").write_text(HEADER)
    with pytest.raises(ValueError, match="no certified image"):
        merge([tmp_path / "e.tsv"], tmp_path / "out.tsv")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        merge([first], tmp_path / "absent" / "out.tsv")
    assert not (tmp_path / "out.tsv").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder_is_an_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        ResultsFile(tmp_path / "r.tsv", RUN)


def test_rows_are_sorted_when_a_run_is_done(tmp_path):
    path, every = tmp_path / "r.tsv", list(rows(9))
    with ResultsFile(path, RUN) as file:
        for one in random.Random(3).sample(every, 9):
            file.append(one)
        assert read_results(path).idx.tolist() != list(range(9))
        file.sort()
    assert path.read_bytes() == write(tmp_path / "sorted.tsv", every).read_bytes()


def test_an_impossible_row_is_refused_where_it_stands(tmp_path):
    """Each row says more than its own numbers allow."""
    whole = write(tmp_path / "whole.tsv", [row(0), row(1)]).read_text()
    path = tmp_path / "r.tsv"
    for number, (text, instead) in enumerate([
        ("\t0.699999\t", "\t0.702600\t"), ("\t0.920000000\t", "\t0.930000002\t"), ("\t93000\t", "\t91999\t"),
        ("\t1.000000000\t", "\t1_0\t"), ("\n1\t3\t3\t", "\n1\t3\t \u0663\t"), ("\n1\t", "\n 1\t"), ("\n1\t", "\n1_0\t"),
        ("\t100\t100000", "\t+100\t100000"), ("\t2\t1.0", "\t9999999999999999999999\t1.0"),
    ]):  # fmt: skip
        assert text in whole, number
        path.write_text(whole.replace(text, instead), encoding="utf-8")
        with pytest.raises(ValueError, match=r"r\.tsv, line [23]: malformed row"):
            read_results(path)


def test_two_sides_bound_the_radius(tmp_path):
    run = dataclasses.replace(RUN, sides=2, alpha=0.01)
    enough = dataclasses.replace(row(0, radius=0.0), rival_upper=0.01)
    limit = 0.25 * (float(ndtri(0.92)) - float(ndtri(0.01)))
    with ResultsFile(tmp_path / "r.tsv", run) as file:
        with pytest.raises(ValueError, match="is worth"):
            file.append(dataclasses.replace(enough, radius=limit + 1e-6))
        file.append(dataclasses.replace(enough, radius=limit - 1e-6))


def test_a_million_rows_are_read_quickly(tmp_path):
    """Not timed: the reader handles columns, not rows; here a file of 50 000 rows equals its rows."""
    head = write(tmp_path / "one.tsv", [row(0)]).read_text()
    line = head.split("\n")[1].partition("\t")[2]
    path = tmp_path / "many.tsv"
    path.write_text(HEADER + "".join(f"{i}\t{line}\n" for i in range(50_000)))
    found = read_results(path)
    assert found.idx.tolist() == list(range(50_000)) and set(found.count.tolist()) == {93_000} and found.run == RUN


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.4, 0.7, 1e-3])
def test_honest_radii_are_accepted_at_any_sigma(tmp_path, sigma):
    """The radius has the noise's sigma, a float32 number, which may be a little larger than the one that is given."""
    run = dataclasses.replace(RUN, sigma=sigma, n0=100, n=100_000, alpha=0.001)
    rule = _C.FullCertificates(100, 100_000, 0.001, float(np.float32(sigma)), futility=0.0)
    issued = [rule.issue([100, 0], [hits, 100_000 - hits]) for hits in (51_000, 70_000, 99_000, 100_000)]
    content = [
        dataclasses.replace(row(i), label=0, predict=0, radius=o.radius, p_lower=o.p_lower, count=int(o.counts[0]))
        for i, o in enumerate(issued)
    ]
    found = read_results(write(tmp_path / "r.tsv", content, run))
    assert all(0 <= o.radius - there < 1e-6 for o, there in zip(issued, found.radius, strict=True))


def test_a_file_holds_exactly_the_wanted_images(tmp_path):
    path = write(tmp_path / "r.tsv", [row(2), row(0), row(5)])
    assert exactly(path, 3).idx.tolist() == exactly(path, [0, 2, 5]).idx.tolist() == [2, 0, 5]
    for wrong in (2, 4, [0, 2], [0, 2, 4], [0, 2, 5, 6]):
        with pytest.raises(ValueError, match="holds 3 images and not the"):
            exactly(path, wrong)


def test_victims_are_pooled_row_by_row(tmp_path):
    first = read_results(write(tmp_path / "a.tsv", [row(0), row(1)]))
    second = read_results(write(tmp_path / "b.tsv", [row(1), row(2)], dataclasses.replace(RUN, model="other@1")))
    both = pooled([first, second])
    assert both.idx.tolist() == [0, 1, 1, 2] and both.run == first.run
    assert both.radius.tolist() == [*first.radius.tolist(), *second.radius.tolist()]
