"""pacd-fast labelflip and reproduce: features, files, tables and pictures."""

import functools
import gzip
import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from pacd_fast import LabelFlipCertifier
from pacd_fast.cli import main
from pacd_fast.experiments.flips import FIGURES, Figure, reproduce_flips
from pacd_fast.labelflips import problems
from pacd_fast.labelflips.certifier import CERTIFICATES
from pacd_fast.labelflips.curves import flips_table, read_flips
from pacd_fast.labelflips.problems import load_features
from pacd_fast.labelflips.results import COLUMNS, is_flip_file


@pytest.fixture
def features(tmp_path):
    """Dogfish and IMDB in small: two classes of features in an .npz."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 330)
    x = rng.normal(size=(330, 8)) + 1.5 * y[:, None] * (np.arange(8) < 2)
    path = tmp_path / "dogfish.npz"
    np.savez(path, X_train=x[:300], y_train=y[:300], X_test=x[300:], y_test=y[300:])
    return path


@pytest.fixture
def mnist(tmp_path):
    """A folder in torchvision's layout with a few images that differ by class."""
    folder = tmp_path / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    patterns = rng.integers(0, 256, (10, 28, 28))
    for part, n in (("train", 400), ("t10k", 60)):
        y = np.arange(n) % 10
        images = np.clip(0.5 * patterns[y] + 0.5 * rng.integers(0, 256, (n, 28, 28)), 0, 255).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", y.astype(np.uint8))):
            sizes = b"".join(int(size).to_bytes(4, "big") for size in array.shape)
            with gzip.open(folder / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())
    return tmp_path / "data"


def test_features_to_file_to_table_to_picture(features, tmp_path, capsys):
    out = tmp_path / "flips.tsv"
    q = ["--q", "0.1", "0.3", "--certificate", *CERTIFICATES]
    assert main(["labelflip", "--data", str(features), *q, "--attack", "3", "--out", str(out)]) == 0
    assert ["dogfish", "exact", "0.3"] in [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    lines = out.read_text().splitlines()
    assert lines[0].split("\t") == list(COLUMNS) and is_flip_file(out) and not is_flip_file(features)
    assert len(lines) == 1 + 30 * (2 * 3 + 1) + 3 * 3  # ridge has no q; 3 points attacked at each q and undefended
    curves = {(curve.certificate, curve.q): curve for curve in read_flips([out])}
    assert len(curves) == 10 and all(curve.n == 300 for curve in curves.values())
    for q in (0.1, 0.3):
        assert bool((curves["kl", q].flips <= curves["exact", q].flips).all())
        assert curves["exact", q].accuracy(0) > 0.7
        assert curves["exact", q].accuracy(1) <= curves["exact", q].accuracy(0)
        assert bool((curves["attacked", q].flips >= 0).all())
    assert main(["summary", str(out), "--json", "--flips", "1", "7"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 10 and set(found[0]["certified_accuracy"]) == {"1", "7"}
    assert found[0]["certified_accuracy"]["7"] == curves["kl", 0.1].accuracy(7)
    assert main(["summary", str(out)]) == 0
    assert main(["plot", str(out), "--title", "Dogfish", "--out", str(tmp_path / "flips.png")]) == 0
    assert (tmp_path / "flips.png").read_bytes().startswith(b"\x89PNG")


def test_other_l2_and_classifier(features, tmp_path, capsys):
    paper, other = str(tmp_path / "paper.tsv"), str(tmp_path / "other.tsv")
    assert main(["labelflip", "--data", str(features), "--l2", "paper", "--out", paper]) == 0
    assert "conditional" in capsys.readouterr().out
    given = ["labelflip", "--data", str(features), "--l2", "3.5", "--no-intercept", "--max", "5", "--out"]
    assert main([*given, paper]) == 2
    assert "paper.tsv is another run: intercept is True there and False here" in capsys.readouterr().err
    assert main([*given, other]) == 0
    (curve,) = read_flips([other])
    assert curve.l2 == 3.5 and len(curve.flips) == 5


@pytest.mark.parametrize("kind", ["ica", "kmeans", "pca", "random-conv", "simclr", "pixels"])
def test_features_of_images(mnist, kind, monkeypatch):
    if kind == "simclr":
        small = functools.partial(problems.SimCLR, batch_size=100, width=4)
        monkeypatch.setattr(problems, "SimCLR", small)
    dim = None if kind == "pixels" else 8
    data = load_features("mnist", kind, dim, data_dir=str(mnist), epochs=1)
    assert data.x_train.shape == (400, dim or 784) and data.x_test.shape[0] == 60
    assert data.y_train.tolist() == [i % 10 for i in range(400)] and data.name == f"mnist-{kind}{dim or ''}"
    assert np.isfinite(data.x_train).all() and data.x_train.std() > 0
    if kind == "kmeans":
        assert data.x_train.std(0) == pytest.approx(1, abs=0.02)  # the training images' scale
        with pytest.raises(ValueError, match="multiple of 4"):
            load_features("mnist", "kmeans", 9, data_dir=str(mnist))
    again = load_features("mnist", kind, dim, data_dir=str(mnist), epochs=1)
    assert again.tag == data.tag


def test_two_digits_by_a_network_of_the_other_eight(mnist):
    data = load_features("mnist17", None, 7, data_dir=str(mnist), epochs=1)
    assert data.x_train.shape == (80, 7) and data.x_test.shape == (12, 7)
    assert data.y_train.tolist() == [0, 1] * 40
    again = load_features("mnist17", None, 7, data_dir=str(mnist), epochs=1)
    assert np.array_equal(data.x_train, again.x_train)  # one seed, one network


def test_reproduce_writes_table_and_pictures(mnist, tmp_path, monkeypatch, capsys):
    small = Figure("mnist17", "pca", 5, (0.1,), "MNIST 1/7", attack=2)
    monkeypatch.setitem(FIGURES, "flips-mnist17", small)
    curves = reproduce_flips("flips-mnist17", tmp_path / "out", data_dir=str(mnist))
    text = flips_table(curves)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"flips-mnist17{end}" for end in (".tsv", ".md", "-exact.png", "-whitebox.png")}
    assert all(f"| {name} " in text for name in (*CERTIFICATES, "attacked", "undefended"))
    command = ["reproduce", "flips-mnist17", "--data-dir", str(mnist), "--results", str(tmp_path / "r.json")]
    assert main([*command, "--work", str(tmp_path / "again")]) == 0
    assert text in capsys.readouterr().out
    rows = json.loads((tmp_path / "r.json").read_text())["label flips, figures"]["rows"]
    assert len(rows) == len(curves) and {row["certificate"] for row in rows} == {c.certificate for c in curves}
    exact = next(c for c in curves if c.certificate == "exact")
    assert next(row for row in rows if row["certificate"] == "exact")["10"] == f"{exact.accuracy(10):.3f}"
    again = tmp_path / "again" / "flips-mnist17.tsv"
    assert again.read_bytes() == (tmp_path / "out" / "flips-mnist17.tsv").read_bytes()


def test_reproduce_goes_on_with_the_features_it_had(mnist, tmp_path, monkeypatch):
    monkeypatch.setitem(FIGURES, "flips-mnist", Figure("mnist", "pca", 5, (0.1, 0.3), "MNIST", attack=3))
    whole = reproduce_flips("flips-mnist", tmp_path / "whole", data_dir=str(mnist))
    lines = (tmp_path / "whole" / "flips-mnist.tsv").read_bytes().splitlines(keepends=True)
    folder = tmp_path / "part"
    folder.mkdir()
    load_features("mnist", "pca", 5, data_dir=str(mnist)).save(folder / "flips-mnist-features.npz")
    (folder / "flips-mnist.tsv").write_bytes(b"".join(lines[:100]))
    monkeypatch.setitem(
        reproduce_flips.__globals__,
        "load_features",
        lambda path, *a, **k: load_features(path) if path.endswith(".npz") else pytest.fail(),
    )
    resumed = reproduce_flips("flips-mnist", folder)
    assert {path.suffix for path in folder.iterdir()} == {".tsv", ".md", ".png"}  # the features are no longer needed
    assert flips_table(resumed) == flips_table(whole)


def test_scan_prints_the_exchange_and_writes_nothing(features, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert main(["labelflip", "--data", str(features), "--scan", "--q", "0.05", "--certificate", "ridge"]) == 0
    out = capsys.readouterr().out
    assert set(tmp_path.iterdir()) == before
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:4] == ["freedom", "l2", "accuracy", "median"] and "conditional on the choice" in out
    assert [line[0] for line in lines[1:-1]] == ["2", "5", "5.333"] and lines[3][1] == "(auto)"
    data = load_features(str(features))
    certifier = LabelFlipCertifier(0.05, certificate="ridge", freedom=2.0).fit(data.x_train, data.y_train)
    found = certifier.certify(data.x_test)
    expected = [
        f"{certifier.l2_:.4g}",
        f"{found.certified_accuracy(data.y_test, 0):.4f}",
        f"{np.median(found.flips):g}",
    ]
    assert lines[1][1:4] == expected and lines[1][5] == f"{found.certified_accuracy(data.y_test, 10):.3f}"
    assert main(["labelflip", "--data", str(features), "--scan", "--q", "0.1", "0.2"]) == 2
    assert main(["labelflip", "--data", str(features), "--scan", "--l2", "3"]) == 2


def test_features_are_saved_once(mnist, tmp_path, capsys):
    kept, out = str(tmp_path / "kept.npz"), str(tmp_path / "a.tsv")
    images = ["labelflip", "--data", "mnist", "--data-dir", str(mnist), "--features", "pca", "--dim", "6"]
    assert main([*images, "--save-features", kept, "--max", "9", "--out", out]) == 0
    assert main([*images, "--save-features", kept, "--out", out]) == 2
    assert "exists already" in capsys.readouterr().err
    saved = load_features(kept)
    assert np.array_equal(saved.x_train, load_features("mnist", "pca", 6, data_dir=str(mnist)).x_train)
    assert main(["labelflip", "--data", kept, "--out", str(tmp_path / "b.tsv")]) == 0
    (a,), (b,) = read_flips([out]), read_flips([tmp_path / "b.tsv"])
    assert len(a.flips) == 9 and np.array_equal(a.flips, b.flips[:9])


def test_conditional_and_flips_of_the_summary(features, tmp_path, capsys):
    out = str(tmp_path / "a.tsv")
    assert main(["labelflip", "--data", str(features), "--l2", "paper", "--max", "5", "--out", out]) == 0
    capsys.readouterr()
    assert main(["summary", out]) == 0
    printed = capsys.readouterr().out
    assert "exact (conditional)" in printed and "leaves it as it is" in printed
    assert main(["summary", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["conditional"] is True
    assert main(["summary", out, "--flips", "-5"]) == 2
    assert "--flips must be at least 0" in capsys.readouterr().err
    Path(out).write_text(Path(out).read_text().splitlines()[0] + "\n")
    assert main(["summary", out]) == 2 and "no certificate yet" in capsys.readouterr().err
    assert main(["plot", out, "--out", str(tmp_path / "a.png")]) == 2 and not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "nothing.npz"], "nothing.npz"),
        (["--data", "nothing"], "unknown data"),
        (["--features", "pca"], "leave out --features"),
        (["--q", "0.6"], "q must be in"),
        (["--l2", "much"], "--l2 must be"),
        (["--out", "no/such/folder.tsv"], "does not exist"),
    ],
)
def test_bad_input_is_one_line(features, tmp_path, capsys, change, message):
    arguments = {"--data": str(features), "--out": str(tmp_path / "x.tsv")}
    arguments.update(zip(change[::2], change[1::2], strict=True))
    assert main(["labelflip", *[part for pair in arguments.items() for part in pair]]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_labels_of_any_number_type(tmp_path):
    x = np.zeros((3, 2))
    for dtype in (np.float16, np.float64, np.longdouble, np.uint8, bool):
        np.savez(tmp_path / "x.npz", X_train=x, y_train=np.array([0, 1, 1], dtype), X_test=x, y_test=np.zeros(3, dtype))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a bound that float16 does not reach
            assert load_features(str(tmp_path / "x.npz")).y_train.tolist() == [0, 1, 1]


def test_what_overflows_leaves_no_file(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(40, 3))
    labels = np.arange(40) % 2
    np.savez(tmp_path / "x.npz", X_train=x, y_train=labels, X_test=1e300 * x[:5], y_test=labels[:5])
    assert main(["labelflip", "--data", str(tmp_path / "x.npz"), "--out", str(tmp_path / "out.tsv")]) == 2
    assert "overflow" in capsys.readouterr().err and not (tmp_path / "out.tsv").exists()


def test_damaged_files(features, tmp_path):
    np.savez(tmp_path / "half.npz", X_train=np.zeros((3, 2)), y_train=np.zeros(3))
    with pytest.raises(ValueError, match="has no X_test, y_test"):
        load_features(str(tmp_path / "half.npz"))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError):
        load_features(str(tmp_path / "text.npz"))
    with pytest.raises(ValueError, match="not a file of label-flip certificates"):
        read_flips([features])


def test_certificates_of_two_rules_are_two_curves(features, tmp_path):
    auto, other = str(tmp_path / "a.tsv"), str(tmp_path / "b.tsv")
    assert main(["labelflip", "--data", str(features), "--out", auto]) == 0
    assert main(["labelflip", "--data", str(features), "--l2", "500", "--out", other]) == 0
    assert len({curve.l2 for curve in read_flips([auto, other])}) == 2
    assert [len(curve.flips) for curve in read_flips([auto, auto])] == [30]
    lines = Path(auto).read_text().splitlines()
    fields = lines[1].split("\t")
    fields[COLUMNS.index("label")] = str(1 - int(fields[COLUMNS.index("label")]))
    fields[COLUMNS.index("correct")] = str(1 - int(fields[COLUMNS.index("correct")]))
    Path(other).write_text("\n".join([lines[0], "\t".join(fields)]) + "\n")
    with pytest.raises(ValueError, match="another certificate of point 0 was read before"):
        read_flips([auto, other])


@pytest.mark.parametrize(
    "wrong",
    [
        ["--max", "0"],
        ["--max", "-5"],
        ["--attack", "-3"],
        ["--device", "cuda:77"],
        ["--memory", "0"],
        ["--dim", "0"],
        ["--epochs", "0"],
        ["--seed", "-1"],
        ["--freedom", "0"],
        ["--freedom", "2", "--l2", "3"],
        ["--q", "nan"],
    ],
)
def test_wrong_numbers_are_one_line(features, tmp_path, capsys, wrong):
    assert main(["labelflip", "--data", str(features), *wrong, "--out", str(tmp_path / "a.tsv")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1 and not list(tmp_path.glob("a.tsv"))


def test_feature_files_that_are_damaged_or_have_no_classes(features, tmp_path, capsys):
    whole = features.read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    arrays = dict(np.load(features))
    np.savez(tmp_path / "floats.npz", **{**arrays, "y_train": arrays["y_train"] + 0.5})
    for name, message in (("half.npz", "not a readable .npz file"), ("floats.npz", "y_train must be whole numbers")):
        assert main(["labelflip", "--data", str(tmp_path / name), "--out", str(tmp_path / "a.tsv")]) == 2
        assert message in capsys.readouterr().err
