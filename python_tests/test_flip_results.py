"""The file of label-flip certificates: resumed, refused, checked row by row against itself."""

import itertools
import time

import numpy as np
import pytest
from forks import Fork

from pacd_fast.cli import main
from pacd_fast.files import AnotherRun
from pacd_fast.labelflips import curves, problems, results
from pacd_fast.labelflips.certifier import CERTIFICATES
from pacd_fast.labelflips.problems import FeatureData, certify_data
from pacd_fast.labelflips.results import COLUMNS, FlipFile, Row, Run, is_flip_file, read_rows


def data(n=200, classes=2, name="small", seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n + 30)
    x = rng.normal(size=(n + 30, 8)) + 1.5 * np.eye(8)[y]
    return FeatureData(name, x[:n], y[:n], x[n:], y[n:])


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("flips") / "whole.tsv"
    certify_data(data(), path, (0.1, 0.3), attack=4)
    return path.read_bytes()


@pytest.fixture
def whole(tmp_path, content):
    """A file of every kind of row."""
    path = tmp_path / "whole.tsv"
    path.write_bytes(content)
    return path


def sorted_lines(path):
    return sorted(path.read_text().splitlines())


def test_a_file_holds_every_certificate_once(whole):
    rows = read_rows(whole)
    assert {(group[1], group[2]) for group in rows} == {
        *((name, q) for name in ("kl", "exact", "whitebox", "attacked") for q in (0.1, 0.3)),
        ("ridge", 0.0),
        ("undefended", 0.0),
    }
    for group, points in rows.items():
        assert len(points) == (4 if group[1] in ("attacked", "undefended") else 30)
        assert group[0].classes == 2 and group[0].n == 200 and not group[4]
    found = {(curve.certificate, curve.q): curve for curve in curves.read_flips([whole])}
    direct = problems.LabelFlipCertifier(0.3).fit(data().x_train, data().y_train).certify_all(data().x_test)
    for name in CERTIFICATES:
        curve = found[name, 0.0 if name == "ridge" else 0.3]
        assert np.array_equal(curve.flips, direct[name].flips)
        assert np.array_equal(curve.correct, direct[name].prediction == data().y_test)
        assert curve.accuracy(3) == direct[name].certified_accuracy(data().y_test, 3)
    assert found["kl", 0.1].constant == np.mean(data().y_test == np.bincount(data().y_train).argmax())
    # the best attack on the unsmoothed classifier needs one more than its certificate, the smoothed one's as many
    assert (found["attacked", 0.1].flips >= found["whitebox", 0.1].flips[found["attacked", 0.1].idx]).all()


def test_every_point_is_written_as_it_is_done_and_done_once(whole, tmp_path, monkeypatch):
    """Stopped after any row, the next call computes the rest and nothing twice."""
    lines = whole.read_text().splitlines(keepends=True)
    attacked, certified = [], []
    attack_smoothed, logistic = problems.attack_smoothed, problems.LogisticAttack.flips
    certify_all = problems.LabelFlipCertifier.certify_all

    def count(log, function):
        def call(*args):
            log.append(1)
            return function(*args)

        return call

    monkeypatch.setattr(problems, "attack_smoothed", count(attacked, attack_smoothed))
    monkeypatch.setattr(problems.LogisticAttack, "flips", lambda *args: map(count(attacked, tuple), logistic(*args)))
    monkeypatch.setattr(problems.LabelFlipCertifier, "certify_all", count(certified, certify_all))
    for kept in (0, 1, 30, 200, len(lines) - 12, len(lines) - 5, len(lines) - 1, len(lines)):
        for torn in ("", "17\t1"):
            part = tmp_path / "part.tsv"
            part.write_text("".join(lines[:kept]) + (torn if kept else lines[0][: len(torn)]))
            attacked.clear(), certified.clear()
            there = certify_data(data(), part, (0.1, 0.3), attack=4)
            assert there == max(kept - 1, 0) and sorted_lines(part) == sorted_lines(whole)
            assert len(attacked) == min(12, len(lines) - kept)
            assert len(certified) == 0 if kept >= len(lines) - 12 else len(certified) <= 2
    more = tmp_path / "more.tsv"
    more.write_text(whole.read_text())
    attacked.clear()
    assert certify_data(data(), more, (0.3, 0.2), attack=6) == len(lines) - 1
    assert len(attacked) == 2 * 2 + 4 + 2 and set(sorted_lines(whole)) < set(sorted_lines(more))


def test_attacks_are_in_the_file_one_by_one(tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    seen = []

    def attack_smoothed(alpha, y, q, classes):
        seen.append(q)
        if len(seen) == 4:
            raise Stop
        return None

    monkeypatch.setattr(problems, "attack_smoothed", attack_smoothed)
    with pytest.raises(Stop):
        certify_data(data(), tmp_path / "a.tsv", (0.1, 0.3), ("exact",), attack=5)
    found = {(curve.certificate, curve.q): len(curve.flips) for curve in curves.read_flips([tmp_path / "a.tsv"])}
    assert found == {("exact", 0.1): 30, ("exact", 0.3): 30, ("attacked", 0.1): 2, ("attacked", 0.3): 1}
    flips = problems.LogisticAttack.flips

    def two(*args):
        yield from itertools.islice(flips(*args), 2)
        raise Stop

    monkeypatch.setattr(problems.LogisticAttack, "flips", two)
    monkeypatch.setattr(problems, "attack_smoothed", lambda *args: None)
    with pytest.raises(Stop):
        certify_data(data(), tmp_path / "a.tsv", (0.1, 0.3), ("exact",), attack=5)
    found = {(curve.certificate, curve.q): len(curve.flips) for curve in curves.read_flips([tmp_path / "a.tsv"])}
    assert found["attacked", 0.1] == found["attacked", 0.3] == 5 and found["undefended", 0] == 2


def test_a_killed_command_goes_on(tmp_path):
    problem = data(n=2500, classes=3)
    problem.save(tmp_path / "small.npz")
    out, once = tmp_path / "killed.tsv", tmp_path / "once.tsv"
    arguments = ["labelflip", "--data", str(tmp_path / "small.npz"), "--q", "0.1", "--attack", "30", "--out"]
    running = Fork(lambda: main([*arguments, str(out)]), tmp_path / "log")
    while running.running() and not (out.exists() and out.read_bytes().count(b"attacked") >= 2):
        time.sleep(0.001)
    running.kill()
    before = out.read_bytes()
    assert main([*arguments, str(out)]) == 0 and main([*arguments, str(once)]) == 0
    assert sorted_lines(out) == sorted_lines(once)
    assert out.read_bytes().startswith(before[: before.rfind(b"\n") + 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": data(seed=1)}, "data is small@"),
        ({"data": data(name="other")}, "data is small@"),
        ({"l2": 3.0}, "l2 of kl at q = 0.1 is"),
        ({"freedom": 2.0}, "l2 of kl at q = 0.1 is"),
        ({"l2": "paper"}, "l2 of kl at q = 0.1 is"),
        ({"intercept": False}, "intercept is True there and False here"),
    ],
)
def test_another_run_is_refused_and_named(whole, change, message):
    before = whole.read_bytes()
    given = {"data": data(), **change}
    with pytest.raises(AnotherRun, match=message):
        certify_data(given.pop("data"), whole, (0.1,), **given)
    assert whole.read_bytes() == before


def test_two_writers_and_files_that_are_none(whole, tmp_path):
    run = Run(2, 200, 0, True, data().tag)
    with FlipFile(tmp_path / "a.tsv", run), pytest.raises(ValueError, match="another process"):
        FlipFile(tmp_path / "a.tsv", run)
    with FlipFile(tmp_path / "a.tsv", run) as file:
        row = Row(3, 1, 1, 5, -30.0, "whitebox", 0.1, 2.0)
        file.append([row])
        with pytest.raises(ValueError, match="already in"):
            file.append([row])
    with pytest.raises(ValueError, match="is a device|not a regular file"):
        FlipFile("/dev/full", run)
    with pytest.raises(ValueError, match="is a device|not a regular file"):
        read_rows("/dev/zero")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        FlipFile(tmp_path / "no" / "a.tsv", run)
    (tmp_path / "text.tsv").write_text("something else\n")
    before = (tmp_path / "text.tsv").read_bytes()
    with pytest.raises(ValueError, match="not a file of label-flip certificates"):
        FlipFile(tmp_path / "text.tsv", run)
    assert (tmp_path / "text.tsv").read_bytes() == before
    assert not is_flip_file("/dev/zero") and not is_flip_file(tmp_path) and is_flip_file(whole)


def changed(whole, column, text, certificate="exact"):
    """The file with one field of its first row of a certificate replaced, and the number of that line."""
    lines = whole.read_text().splitlines()
    number = next(i for i, line in enumerate(lines) if f"\t{certificate}\t" in line)
    fields = lines[number].split("\t")
    fields[COLUMNS.index(column)] = text if isinstance(text, str) else text(fields)
    lines[number] = "\t".join(fields)
    bad = whole.with_name("bad.tsv")
    bad.write_text("\n".join(lines) + "\n")
    return bad, number + 1


@pytest.mark.parametrize("certificate", ["kl", "exact", "whitebox", "attacked", "ridge", "undefended"])
@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("idx", "-1"), ("idx", "1_0"), ("idx", "\uff11"), ("idx", "1.0"), ("idx", ""), ("idx", "9" * 30),
        ("label", "2"), ("label", "-1"), ("predict", "2"), ("predict", "x"),
        ("correct", "7"), ("correct", lambda fields: str(1 - int(fields[3]))),
        ("flips", "-5"), ("flips", "201"), ("flips", "1" + "0" * 30), ("flips", "nan"),
        ("log_tail", "0.5"), ("log_tail", "inf"), ("log_tail", "x"), ("log_tail", "1e"),
        ("certificate", "foo"), ("q", "nan"), ("q", "0.5"), ("q", "-0.1"), ("q", "1e-301"), ("q", "0.1_1"),
        ("l2", "-1.0"), ("l2", "inf"), ("l2", "nan"), ("conditional", "2"), ("conditional", "yes"),
        ("classes", "1"), ("classes", "-2"), ("n", "-1"), ("n", "0"), ("majority", "2"), ("intercept", ""),
        ("data", ""), ("data", "\x1b[0m"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_are_refused(whole, column, text, certificate):
    bad, number = changed(whole, column, text, certificate)
    with pytest.raises(ValueError, match=f"bad.tsv, line {number}: "):
        read_rows(bad)


def test_a_tail_belongs_to_its_certificate(whole):
    for certificate, text in (
        ("kl", "nan"),
        ("ridge", "-1.0"),
        ("ridge", "nan"),
        ("attacked", "-1.0"),
        ("exact", "nan"),
    ):
        bad, number = changed(whole, "log_tail", text, certificate)
        with pytest.raises(ValueError, match=f"line {number}: log_tail of {certificate} cannot be {text}"):
            read_rows(bad)


@pytest.mark.parametrize("certificate", ["kl", "exact", "whitebox"])
def test_flips_follow_from_the_tail(whole, certificate):
    flips = COLUMNS.index("flips")
    for by in (3, -3) if certificate != "whitebox" else (-30,):
        lines = [line.split("\t") for line in whole.read_text().splitlines()]
        rows = [line for line in lines if line[6] == certificate and 3 <= int(line[flips]) < 190]
        row = max(rows, key=lambda line: int(line[flips]))
        row[flips] = str(max(0, int(row[flips]) + by))
        whole.with_name("bad.tsv").write_text("\n".join("\t".join(line) for line in lines) + "\n")
        with pytest.raises(ValueError, match="its flips are not those of its log_tail"):
            read_rows(whole.with_name("bad.tsv"))


def test_a_hostile_file_costs_seconds(whole):
    """n of 10^15 and a tail that no table reaches: the claimed flips bound the work."""
    lines = whole.read_text().splitlines()
    fields = next(line for line in lines if "\texact\t" in line).split("\t")
    began, out = time.process_time(), [lines[0]]
    for i in range(200):
        for column, text in {"flips": 10**12, "log_tail": -1e300, "q": 0.1 + i * 1e-3, "n": 10**15}.items():
            fields[COLUMNS.index(column)] = str(text)
        out.append("\t".join(fields))
    bad = whole.with_name("bad.tsv")
    bad.write_text("\n".join(out) + "\n")
    with pytest.raises(ValueError, match="its flips are not those"):
        read_rows(bad)
    assert time.process_time() - began < 5


def test_files_without_rows_second_rows_and_missing_columns(whole):
    bad, lines = whole.with_name("bad.tsv"), whole.read_text().splitlines()
    for text, message in (
        (lines[0] + "\n", "no certificate yet"),
        (lines[0], "not a file of label-flip"),
        ("", "not a file of label-flip"),
        (f"{lines[0]}\n{lines[1]}\n{lines[1]}\n", "line 3: a second row of point"),
        (f"{lines[0]}\n{lines[1]}\t1\n", "line 2: 16 columns instead of 15"),
        (f"{lines[0]}\n1\t2\n", "line 2: 2 columns"),
        (f"{lines[0]}\n\n", "line 2: 1 columns"),
    ):
        bad.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_rows(bad)
    bad.write_bytes(lines[0].encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match="it is not text"):
        read_rows(bad)
    bad.write_text(f"{lines[0]}\n{lines[1]}\n{lines[2][:9]}")  # growing
    assert sum(map(len, read_rows(bad).values())) == 1


def test_conditional_is_in_the_file_the_table_and_the_summary(tmp_path):
    path = tmp_path / "paper.tsv"
    certify_data(data(), path, (0.1, 0.3), ("exact", "ridge"), l2="paper")
    found = curves.read_flips([path])
    assert all(curve.conditional for curve in found) and len({curve.l2 for curve in found}) == 2
    text = curves.flips_table(found)
    assert "exact (conditional)" in text and curves.CONDITIONAL in text
    assert all(each["conditional"] for each in curves.flips_summary([path]))
    certify_data(data(), tmp_path / "auto.tsv", (0.1,), ("exact",))
    assert "conditional" not in curves.flips_table(curves.read_flips([tmp_path / "auto.tsv"]))


def test_the_command_says_what_conditional_means_and_what_to_do_with_many_features(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main(["labelflip", "--help"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("--l2 ")]
    assert "with many features try --freedom 5, or --scan" in line and "conditional: holds against" in line
    data().save(tmp_path / "f.npz")
    words = ["labelflip", "--data", str(tmp_path / "f.npz"), "--l2", "paper", "--out", str(tmp_path / "o.tsv")]
    assert main(words) == 0
    assert curves.CONDITIONAL in capsys.readouterr().out


def test_columns_are_the_fields_of_a_row_and_a_run():
    row, run = Row(1, 1, 0, 7, -3.5, "kl", 0.25, 2.0, True), Run(3, 100, 2, False, "a@b")
    line = dict(zip(COLUMNS, [*row.fields(), *run.fields()], strict=True))
    assert line == {
        "idx": "1", "label": "1", "predict": "0", "correct": "0", "flips": "7", "log_tail": "-3.5", "certificate": "kl",
        "q": "0.25", "l2": "2.0", "conditional": "1", "classes": "3", "n": "100", "majority": "2", "intercept": "0",
        "data": "a@b",
    }  # fmt: skip
    assert set(results.KINDS) == {*CERTIFICATES, "attacked", "undefended"}
