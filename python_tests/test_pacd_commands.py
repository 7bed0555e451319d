"""The commands poison and audit, the pictures of poison, and the tables and figures of PACD as experiments."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pacd import TINY, digits  # noqa: F401
from torch.distributed import HashStore

from pacd_fast.certification import read_results
from pacd_fast.cli import main
from pacd_fast.experiments import EXPERIMENTS, lab, plots
from pacd_fast.experiments.claims import below
from pacd_fast.poisoning import Audit, Audited, Ball, Poison, audit, auditing, watermark
from pacd_fast.ranks import Ranks
from pacd_fast.training import Training


@pytest.fixture(scope="module")
def npz(digits, tmp_path_factory) -> Path:  # noqa: F811
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    arrays = {
        "x_train": torch.cat([digits.x_train, digits.x_val]),
        "y_train": torch.cat([digits.y_train, digits.y_val]),
    }
    arrays |= {"x_test": digits.x_test, "y_test": digits.y_test}
    np.savez(path, **{name: array.numpy() for name, array in arrays.items()})
    return path


def test_the_commands_poison_and_audit(npz, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--data", str(npz), "--device", "cpu"]
    craft = ["--target-class", "2", "--model", TINY, "--sigma", "0.4", "--epochs", "2", "--clean-batch", "200"]
    craft += ["--poison-batch", "60", "--upper-batch", "30", "--lower-lr", "0.005", "--validation", "100"]
    assert main(["poison", "pacd", *data, *craft, "--epsilon", "38/255", "--out", "p.npz", "--metrics", "m.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "class 2; largest linf distortion 0.1490 (epsilon 0.14902)" in said and Path("p.png").stat().st_size > 5000
    assert len(Path("m.jsonl").read_text().splitlines()) == 2 * (len(Poison.load("p.npz").index) // 60)
    mark = ["--target-class", "2", "--validation", "100", "--out", "mark.npz"]
    assert main(["poison", "watermark", *data, *mark]) == 0
    judge = ["--poison", "p.npz", "mark.npz", "--model", TINY, "--seeds", "2", "--epochs", "3", "--count", "6"]
    judge += ["--n", "100", "--others", "4", "--others-n", "50", "--attacked", "2", "--lr", "0.003"]
    capsys.readouterr()
    assert main(["audit", *data, *judge]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines] == ["data", "clean", "p", "mark"]
    assert "clean, victim 1 of 2 (seed 0)" in said.err and "p, victim 2 of 2 (seed 1)" in said.err
    content = json.loads(Path("audit/audit.json").read_text())
    assert content["poisons"]["p"]["target_class"] == 2 and content["audit"]["sigma"] == 0.4
    assert {len(v) for each in content["measured"].values() for v in each.values()} == {2}
    assert Path("audit/curves.png").stat().st_size > 5000
    before = {path.name: path.stat().st_mtime_ns for path in Path("audit").glob("*.safetensors")}
    assert len(before) == 6
    assert main(["audit", *data, *judge]) == 0  # everything is there: nothing is trained again
    assert capsys.readouterr().out == said.out
    assert before == {path.name: path.stat().st_mtime_ns for path in Path("audit").glob("*.safetensors")}
    # poison for other classes is not judged by the first one's, nor with flags that nobody reads
    assert main(["poison", "watermark", *data, mark[0], "1", *mark[2:-1], "other.npz"]) == 0
    capsys.readouterr()
    assert main(["audit", *data, "--poison", "mark.npz", "other.npz", "--sigma", "0.4"]) == 2
    assert "the poison files differ in target_class (1, 2)" in capsys.readouterr().err
    assert main(["audit", *data, "--poison", "mark.npz", "--method", "standard"]) == 2
    assert "which noise to certify with: give --sigma" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["poison", "pacd", *data, *craft, "--budget", "0.2", "--out", "q.npz"])
    assert "unrecognized arguments: --budget" in capsys.readouterr().err
    Path("notes.txt").write_text("mine")
    assert main(["poison", "pacd", *data, *craft, "--out", "q.npz", "--metrics", "notes.txt"]) == 2
    assert Path("notes.txt").read_text() == "mine"
    # another class in the same folder is another audit: nothing of the first is counted
    assert main(["poison", "pacd", *data, *craft, "--target-class", "1", "--out", "p1.npz"]) == 0
    again = [*judge[3:], "--poison", "p1.npz"]
    assert main(["audit", *data, *again]) == 0
    alone = json.loads(Path("audit/audit.json").read_text())["measured"]["clean"]
    assert main(["audit", *data, *again, "--work", "fresh"]) == 0
    assert json.loads(Path("fresh/audit.json").read_text())["measured"]["clean"]["accuracy"] == alone["accuracy"]
    for seed in range(2):
        names = {path.name for path in Path("audit").glob(f"clean-gaussian-{seed}.*.tsv")}
        kinds = {f"{prefix}class-{label}" for prefix in ("", "not-") for label in (1, 2)}
        assert names == {f"clean-gaussian-{seed}.{kind}.tsv" for kind in kinds}
    # other data, another split, a class that is not there, no folder
    wrong = [
        (["audit", "--data", "mnist5k", "--poison", "p.npz"], "the poison was made for digits@"),
        (["audit", *data, "--poison", "p.npz", "--train-images", "300"], "give the same --data"),
        (["audit", *data, "--poison", "none.npz"], "no such poison file"),
        (["poison", "pacd", *data, *craft, "--target-class", "9", "--out", "q.npz"], "has no class '9'"),
        (["poison", "pacd", *data, *craft, "--out", "nowhere/q.npz"], "create it first"),
        (["poison", "pacd", *data, *craft, "--epsilon", "0", "--out", "q.npz"], "epsilon must be positive"),
        (["poison", "pacd", *data, *craft, "--out", "q.txt"], "must end in .npz"),
        (["train", "--data", "mnist5k", "--poison", "p.npz", "--out", "v.safetensors"], "the poison was made for"),
    ]
    for arguments, message in wrong:
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error and error.startswith("pacd-fast ")


def test_pictures(digits, tmp_path):  # noqa: F811
    marked = watermark(digits, target_class=1, ball=Ball(0.05))
    plots.poison(marked, digits, tmp_path / "p.pdf")
    plots.bars({"a": {"clean": [1.0, 1.2], "poison": [0.5]}, "b": {"clean": [1.0]}}, tmp_path / "b.svg", "ACR", "x")
    svg = (tmp_path / "b.svg").read_text()
    assert (tmp_path / "p.pdf").stat().st_size > 3000 and "ACR" in svg
    dots = [len(re.findall("<use", part.split("</g>")[0])) for part in svg.split('id="PathCollection')[1:]]
    assert dots == [2, 1, 1]  # every victim
    bars = [part.split("</g>")[0] for part in svg.split('id="LineCollection')[1:]]
    assert [bar.count(" d=") for bar in bars] == [1, 0]  # a single victim has no deviation
    with pytest.raises(ValueError, match="name it .png"):
        plots.poison(marked, digits, tmp_path / "p.txt")
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.bars({}, tmp_path / "b.png", "", "")
    with pytest.raises(ValueError, match="changes no image"):
        empty = dataclasses.replace(marked, index=marked.index[:0], images=marked.images[:0])
        plots.poison(empty, digits, tmp_path / "p.png")


@pytest.fixture
def stubs(monkeypatch):
    """Crafting and auditing replaced: what was crafted and audited, and figures that depend on names alone."""
    crafted, audited = [], []

    def fake_pacd(data, attack, **options):
        crafted.append(attack)
        return Poison("pacd", torch.zeros(1, dtype=torch.int64), data.x_train[:1], data.y_train[:1], attack.ball, "x")

    def fake_audit(data, poisons, settings, work, **options):
        audited.append((settings, Path(work).name))
        levels = {"clean": 1.0, "watermark": 0.995, "random": 0.99}
        found = {}
        for stem in ("clean", *poisons):
            level = next((value for name, value in levels.items() if stem.endswith(name)), 0.5)
            level -= 0.02 * stem.count("seed1")
            victims = len(settings.victims(stem, Path(work)))
            figures = {field.name: [level + 0.01 * s for s in range(victims)] for field in FIELDS}
            found[stem] = Audited(**figures)
        return found

    monkeypatch.setattr(lab, "pacd", fake_pacd)
    monkeypatch.setattr(lab, "audit", fake_audit)
    monkeypatch.setattr(
        lab.Audit, "seconds", lambda audit, name, work: {v: 200.0 for v in audit.victims(name, work).values()}
    )
    return crafted, audited


FIELDS = dataclasses.fields(Audited)
OF_CLASSES = [name for name, experiment in EXPERIMENTS.items() if experiment.scales is not None and name != "table6"]


@pytest.mark.parametrize("name", OF_CLASSES)
def test_every_table_crafts_audits_and_judges(name, tmp_path, stubs, capsys):
    """With crafting and audits replaced: which poisons are made, which figures go into which row, what is concluded."""
    crafted, audited = stubs
    options = ["reproduce", name, "--small", "--work", str(tmp_path / "w"), "--results", str(tmp_path / "r.json")]
    options += ["--data", "mnist"]
    assert main(options) == 0
    printed = capsys.readouterr()
    table = json.loads((tmp_path / "r.json").read_text())
    (claim,) = table.pop("PACD claims")["rows"]
    assert (
        claim["preset"] == name and claim["verdict"] in ("holds", "does not hold here") or "in part" in claim["verdict"]
    )
    (rows,) = [each["rows"] for each in table.values()]
    assert all(row["data"] == "mnist5k" and row["n"] == (100_000 if name == "d6" else 1000) for row in rows)
    assert printed.out.count("| mnist5k") == len(rows)  # the table is printed as it goes into the page of figures
    assert (tmp_path / "w" / f"mnist5k-{name}.png").stat().st_size > 5000
    assert {attack.seed for attack in crafted} == ({0} if name == "fig4" else {0, 1}) and audited
    if name == "table2":
        by_name = {row["training data"]: row for row in rows}
        assert by_name["poison"]["ACR"] == "0.500±0.014" and by_name["poison"]["ACR falls by"] == "50.5%"
        assert by_name["poison"]["victims"] == 6 and by_name["poison"]["sd of poisons, victims"] == "0.013, 0.010"
        assert all(row["epochs"] == 40 for row in rows) and claim["verdict"] == "holds"
        assert claim["minutes"] == "50"  # three victims of clean data, watermark, noise, two poisons: once each
        assert by_name["clean"]["ACR, paper"] == "1.481" and by_name["watermark"]["ACR falls by"] == "0.5%"
    if name == "fig4":  # what its own small scale says
        assert all(row["epochs"] == 20 for row in rows) and all(s.training.epochs == 20 for s, _ in audited)
        assert {a.recipe.epochs for a in crafted} == {15, 30}  # SmoothAdv's twice
    assert {attack.recipe.dtype for attack in crafted} == {row["crafted in"] for row in rows} == {"float32"}
    half = name in ("table1", "table7", "fig4", "fig6", "fig7")
    assert {s.training.dtype for s, _ in audited} == {"bfloat16" if half else "float32"}
    assert {row["trained in"] for row in rows} == {"bfloat16" if half else "float32"}
    half = name in ("table7", "fig6", "fig7")
    assert {s.dtype for s, _ in audited} == {"bfloat16" if half else "float32"}
    assert {row["certified in"] for row in rows} == {"bfloat16" if half else "float32"}
    if name == "fig7":
        assert {s.training.model for s, _ in audited} == {"resnet20", "resnet56"}
        assert main([*options, "--train-dtype", "float32"]) == 0  # rows of their own
        both = json.loads((tmp_path / "r.json").read_text())["PACD figure 7"]["rows"]
        assert [row["trained in"] for row in both].count("float32") == len(both) / 2 == 2
        assert main([*options, "--dtype", "float32"]) == 0
        all_three = json.loads((tmp_path / "r.json").read_text())["PACD figure 7"]["rows"]
        assert [row["certified in"] for row in all_three].count("float32") == len(all_three) / 3 == 2
    if name == "table2":
        assert main([*options, "--craft-dtype", "bfloat16", "--baseline-seeds", "2"]) == 0  # other poison, own rows
        said = capsys.readouterr().err
        assert "--dtype bfloat16 --seed 1 --out" in said
        fewer, usual = [line for line in said.splitlines() if line.startswith("+ pacd-fast audit")]
        assert "watermark.npz" in fewer and "--seeds 2" in fewer and "seed1" in usual and "--seeds 3" in usual
        assert [attack.recipe.dtype for attack in crafted].count("bfloat16") == 2
        both = json.loads((tmp_path / "r.json").read_text())["PACD table 2"]["rows"]
        in_half = {row["training data"]: row["victims"] for row in both if row["crafted in"] == "bfloat16"}
        assert in_half == {"clean": 3, "watermark": 2, "random": 2, "poison": 6} and len(both) == 8
    if name == "d6":  # single digits saturate at a beta of 16
        assert {a.upper.beta for a in crafted} == {1.0} and {row["images"] for row in rows} == {1}
    before = len(crafted)
    assert main(options) == 0 and len(crafted) == before  # poison is kept
    assert main([*options, "--craft-epochs", "2"]) == 0  # other poison, under another name
    assert len(crafted) > before
    capsys.readouterr()
    assert main([*options, "--seeds", "0"]) == 2 and "seeds must be at least 1" in capsys.readouterr().err
    assert main([*options[:-1], "fashion-mnist"]) == 2
    assert "--data must be mnist, cifar10" in capsys.readouterr().err


def test_the_first_victim_of_every_set_comes_before_the_second_of_any(digits, tmp_path, monkeypatch):  # noqa: F811
    made, empty = [], Audited(*[[] for _ in FIELDS])
    monkeypatch.setattr(auditing, "_certified", lambda seed, victim, *_: made.append((victim.name, seed)))
    monkeypatch.setattr(auditing, "_audited", lambda *_: empty)
    ranks = Ranks(HashStore(), 0, 2)
    monkeypatch.setattr(ranks, "to_first", lambda value: [])
    monkeypatch.setattr(ranks, "everyones", lambda value: [value])
    marked = {name: watermark(digits, target_class=1, ball=Ball(0.05)) for name in ("few", "many")}
    settings = Audit(Training("gaussian", {"sigma": 0.4}, model=TINY), 2, 0.4, seeds=2, own_seeds={"few": 1})
    assert audit(digits, marked, settings, tmp_path, ranks=ranks).keys() == {"clean", "few", "many"}
    sets = [name.split("-")[0] for name, _ in made]
    assert [seed for _, seed in made] == [0, 0, 0, 1, 1] and sets == ["clean", "few", "many", "clean", "many"]
    with pytest.raises(ValueError, match="own_seeds has 'many', which is not among"):
        audit(digits, {"few": marked["few"]}, dataclasses.replace(settings, own_seeds={"many": 1}), tmp_path)


def test_the_seconds_of_an_audit_are_those_of_its_files(digits, tmp_path):  # noqa: F811
    settings = Audit(
        Training("gaussian", {"sigma": 0.4}, model=TINY, epochs=2), 2, 0.4, seeds=2, images=3, n=50, others=0
    )
    audit(digits, {}, settings, tmp_path)
    parts = [
        [json.loads(line)["seconds"] for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()],
        [s for path in tmp_path.glob("*.tsv") for s in read_results(path).time],
    ]
    assert [len(part) for part in parts] == [4, 6] and all(sum(part) > 0 for part in parts)
    found = settings.seconds("clean", tmp_path)
    assert len(found) == 2 and sum(found.values()) == pytest.approx(sum(map(sum, parts)))
    next(tmp_path.glob("*.jsonl")).unlink()
    assert np.isnan(list(settings.seconds("clean", tmp_path).values())).sum() == 1


@pytest.mark.parametrize(
    ("poisoned", "clean", "expected"),
    [
        ([0.0, 0.2], [0.5, 0.7], True),
        ([0.4, 0.6], [0.5, 0.7], False),
        ([0.31], [0.5, 0.7], False),  # s^2 = 0.02, SE^2 = 0.02 + 0.01; without a deviation of its own it would be below
        ([0.25], [0.5, 0.7], True),
        ([0.5, 0.7], [0.94], False),
        ([0.5, 0.7], [0.95], True),
        ([0.4], [0.5], True),
        ([0.5], [0.5], False),
    ],
)
def test_below_is_by_two_standard_errors(poisoned, clean, expected):
    assert below(poisoned, clean) is expected


def test_medium_is_table_2_of_cifar10(tmp_path, stubs, capsys):
    """What `--medium` is: 10 000 images, six epochs of crafting at the paper's smallest sigma, victims in bfloat16."""
    crafted, audited = stubs
    images = np.zeros((16_000, 32, 32, 3), np.uint8)
    arrays = {"x_train": images, "y_train": np.arange(16_000) % 10}
    arrays |= {"x_test": images[:400], "y_test": np.arange(400) % 10}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    shared = ["--medium", "--work", str(tmp_path / "w"), "--data", str(tmp_path / "cifar10.npz")]
    assert main(["reproduce", "table2", *shared]) == 0
    (attack,) = crafted
    assert attack.recipe.epochs == 6 and attack.sigma == 0.25 and attack.model == "resnet20"
    assert attack.ball.epsilon == 0.03 and attack.loss.sigma == 0.25 and attack.recipe.dtype == "bfloat16"
    for settings, folder in audited:
        assert settings.training.epochs == 30 and settings.training.dtype == "bfloat16"
        assert folder == "cifar10-10000-gaussian-0.25-epochs30-bfloat16" and (settings.images, settings.n) == (40, 1000)
        assert settings.dtype == "bfloat16"
    ((settings, _),) = audited
    assert settings.seeds == 3 and settings.own_seeds == {"cifar10-10000-watermark": 1, "cifar10-10000-random": 1}
    rows = json.loads((tmp_path / "w" / "results.json").read_text())["PACD table 2"]["rows"]
    assert {row["data"] for row in rows} == {"cifar10-10000"} and {row["sigma"] for row in rows} == {0.25}
    wrong = [
        (["table2", *shared, "--small"], "give --small or --medium, not both"),
        (["table2", *shared[:-1], "mnist"], "--medium is of CIFAR-10: give --data cifar10"),
    ]
    for arguments, message in wrong:
        assert main(["reproduce", *arguments]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    with pytest.raises(SystemExit, match="2"):  # the other presets have no such flag
        main(["reproduce", "table3", *shared])
    assert "unrecognized arguments: --medium" in capsys.readouterr().err


def test_experiments_agree_on_the_victims_they_share(tmp_path, stubs):
    """All small ones in one folder, as by default: where two find the same files, they ask the same of them."""
    _, audited = stubs
    for name in OF_CLASSES:
        assert main(["reproduce", name, "--small", "--data", "mnist", "--work", str(tmp_path)]) == 0
    asked: dict[tuple[str, int], set[str]] = {}
    for settings, folder in audited:
        alike = dataclasses.replace(settings, seeds=1, own_seeds={}, attacked=0)  # files of their own
        if not settings.others:
            alike = dataclasses.replace(alike, others=90, others_n=1000)
        asked.setdefault((folder, settings.target_class), set()).add(repr(alike))
    assert len(asked) > 20 and {folder: each for folder, each in asked.items() if len(each) > 1} == {}


@pytest.mark.slow
def test_table_6_prints_the_analysis_beside_the_attack(tmp_path, capsys):
    options = ["reproduce", "table6", "--n", "100", "--work", str(tmp_path)]
    assert main([*options, "--results", str(tmp_path / "r.json")]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["PACD table 6"]["rows"]
    assert [row["sigma"] for row in rows] == [0.25, 0.5, 0.75]
    for row in rows:
        for state, value in (("clean", 0.4243), ("poisoned", 0.3536)):
            assert row[f"{state}, analysis"] == value
            assert abs(float(row[f"distance {state}"].split("±")[0]) - value) < 3 * row["standard error of a distance"]
