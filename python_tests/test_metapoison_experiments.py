"""pacd-fast reproduce metapoison-*: every figure from end to end on small random images, and nothing twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchrun_agent import GLOO, together, trains

from pacd_fast.cli import main
from pacd_fast.experiments import EXPERIMENTS as EVERY
from pacd_fast.experiments import metapoison_figures
from pacd_fast.experiments import metapoison_lab as module

EXPERIMENTS = [name for name in EVERY if name.startswith("metapoison")]


def flat(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes))


@pytest.fixture
def command(tmp_path, monkeypatch, one_thread):
    """A preset's command line for tiny settings, as a function of its name; and the results file."""
    tiny = {"model": f"{__name__}:flat", "surrogates": 2, "steps": 5, "epochs": 2, "lr": 0.01}
    settings = {**module.SCALES["small"].settings, **tiny}
    monkeypatch.setitem(module.SCALES, "small", replace(module.SCALES["small"], train_images=200, settings=settings))
    rng = np.random.default_rng(0)
    y_test = np.arange(80) % 10
    y_test[[8, 29, 42]] = [3, 6, 5]
    arrays = {"x_train": rng.integers(0, 256, (200, 32, 32, 3), np.uint8), "y_train": np.arange(200) % 10}
    arrays |= {"x_test": rng.integers(0, 256, (80, 32, 32, 3), np.uint8), "y_test": y_test}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    common = ["--small", "--data", str(tmp_path / "cifar10.npz"), "--victims", "2", "--device", "cpu"]
    common += ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results.json")]
    return lambda name: ["reproduce", name, *common], tmp_path / "results.json", tmp_path / "work"


def test_every_figure_from_end_to_end(command, capsys, monkeypatch):
    line, results, work = command
    assert set(EXPERIMENTS) == {f"metapoison-{name}" for name in ("fig3", "fig4", "fig5a", "fig5b", "fig6")}
    for name in EXPERIMENTS:
        assert main(line(name)) == 0
        assert (work / f"metapoison-small-{name.removeprefix('metapoison-')}.png").stat().st_size > 5000
    tables = json.loads(results.read_text())
    rows = {name: tables[name]["rows"] for name in tables}
    assert set(rows) == {"metapoison small"} | {
        f"metapoison small, {what}" for what in ("crafting", "budget", "transfer", "attacks")
    }
    assert len(rows["metapoison small"]) == 4 * (3 + 1) and len(rows["metapoison small, attacks"]) == 3
    assert {row["budget"] for row in rows["metapoison small, budget"]} == {"1%", "3%", "5%", "10%"}
    assert len(rows["metapoison small, transfer"]) == 2 * 4 * 2
    assert [row["crafting steps"] for row in rows["metapoison small, crafting"]] == [0, 1, 2, 3, 4, 5]
    pooled = next(row for row in rows["metapoison small"] if row["pair"] == "all" and row["trained on"] == "clean")
    each = [row for row in rows["metapoison small"] if row["trained on"] == "clean" and row["pair"] != "all"]
    assert pooled["success"] == f"{sum(int(row['success'].split('/')[0]) for row in each)}/6"
    assert "features of a victim on metapoison data" in capsys.readouterr().out
    # A second run reads what is there: nothing is crafted or trained but the trajectories of figure 6.
    lines = (work / "metapoison-small-victims.jsonl").read_text()
    monkeypatch.setattr(module, "metapoison", None)
    assert main(line("metapoison-fig4")) == 0
    assert (work / "metapoison-small-victims.jsonl").read_text() == lines
    assert json.loads(results.read_text()) == tables


@pytest.mark.skipif(not GLOO, reason="this torch has no gloo")
@trains
def test_a_figure_by_two_processes(command, tmp_path):
    """They craft one poison, share its victims, and one of them writes; alone, with that poison, it is the same."""
    line, results, work = command
    codes, said = together(tmp_path / "logs", 2, line("metapoison-fig5b"))
    assert codes == [0, 0], said
    assert (tmp_path / "logs/log1").read_text() == "" and "| pair" in said
    found = json.loads(results.read_text())["metapoison small, transfer"]["rows"]
    lines = sorted((work / "metapoison-small-victims.jsonl").read_text().splitlines())
    names = {path.name for path in work.iterdir()}
    for path in (results, work / "metapoison-small-victims.jsonl", work / "metapoison-small-fig5b.png"):
        path.unlink()
    assert main(line("metapoison-fig5b")) == 0
    assert json.loads(results.read_text())["metapoison small, transfer"]["rows"] == found and len(found) == 2 * 4 * 2
    assert sorted((work / "metapoison-small-victims.jsonl").read_text().splitlines()) == lines
    assert {path.name for path in work.iterdir()} == names


def test_other_settings_are_refused(command, capsys, monkeypatch):
    line, _, work = command
    assert main(line("metapoison-fig3")) == 0
    small = module.SCALES["small"]
    monkeypatch.setitem(module.SCALES, "small", replace(small, settings={**small.settings, "surrogates": 3}))
    assert main(line("metapoison-fig3")) == 2
    assert "was crafted with other settings; delete it" in capsys.readouterr().err
    given = line("metapoison-fig3")
    assert main([part.replace("cifar10.npz", "other.npz") for part in given]) == 2
    assert "--data must be cifar10" in capsys.readouterr().err
    assert main([*given, "--victims", "0"]) == 2
    assert main([*given, "--medium"]) == 2 and "not both" in capsys.readouterr().err
    assert Path(work / "metapoison-small-cat8-bird.png").exists()


def test_medium_has_the_authors_counts(tmp_path):
    """What `--medium` says of itself."""
    arrays = {"x_train": np.zeros((12_000, 32, 32, 3), np.uint8), "y_train": np.arange(12_000) % 9}
    arrays |= {"x_test": np.zeros((20, 32, 32, 3), np.uint8), "y_test": (np.arange(20) + 3) % 10}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    lab = module.MetaWhere(medium=True, data=str(tmp_path / "cifar10.npz"), work=str(tmp_path / "work")).lab()
    (pair,) = lab.scale.pairs
    attack = lab.attack(pair)
    assert (attack.surrogates, attack.steps, attack.unroll, attack.budget) == (24, 60, 2, 0.1)
    assert attack.ball.epsilon == 16 / 255 and attack.model == "convnet" and len(lab.data.x_train) == 10_000
    assert len(attack.chosen(lab.data)[0]) == 1000


def test_the_principal_plane():
    """Points on a plane in 30 dimensions: their distances survive, and it holds all of the variance."""
    torch.manual_seed(0)
    points = torch.randn(7, 2) @ torch.linalg.qr(torch.randn(30, 2))[0].T
    plane, share = metapoison_figures._principal_plane(points)
    torch.testing.assert_close(torch.cdist(plane, plane).float(), torch.cdist(points, points), rtol=1e-4, atol=1e-4)
    assert share == pytest.approx(1.0) and float(plane[:, 0].var()) >= float(plane[:, 1].var())
    assert metapoison_figures._principal_plane(torch.eye(5))[1] == pytest.approx(0.5)  # four equal directions
