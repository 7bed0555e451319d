"""Victims of targeted poison: how they are judged, the commands around them, and an attack that works."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_metapoison import TINY, attack, small
from torch import nn

from pacd_fast.cli import main
from pacd_fast.cli import poison as command
from pacd_fast.data import Dataset, as_float, load_dataset
from pacd_fast.poisoning import (
    Ball,
    MetaPoison,
    Poison,
    Victim,
    VictimRecipe,
    audit_targets,
    judge_victims,
    metapoison,
    noise_beside,
    summarize_victims,
    targeted,
    victims_table,
    watermark_beside,
)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    """What the flags say reaches the attack; by default the authors' settings."""
    monkeypatch.chdir(tmp_path)
    data = small()
    np.savez("small.npz", **{name: getattr(data, name).numpy() for name in ("x_train", "y_train", "x_test", "y_test")})
    made = []

    def stop(data, attack, **options):
        made.append(attack)
        raise ValueError("enough")

    monkeypatch.setattr(command, "metapoison", stop)
    base = ["poison", "metapoison", "--data", "small.npz", "--out", "p.npz"]
    given = ["--target-index", "1", "2", "--target-class", "2", "--poison-class", "1", "--epsilon", "16/255"]
    given += ["--adversarial-class", "0", "--surrogates", "2", "--steps", "2", "--epochs", "2", "--lr", "0.01"]
    assert main([*base, *given, "--momentum", "0", "--model", TINY, "--drops", "0.5"]) == 2
    assert made[-1].target_index == (5, 8) and (made[-1].poison_class, made[-1].adversarial_class) == (1, 0)
    assert made[-1].ball.epsilon == 16 / 255 and made[-1].momentum == 0.0 and made[-1].drops == (0.5,)
    assert main([*base, "--poison-class", "1", "--norm", "l2"]) == 2 and made[-1].ball.norm == "l2"
    default = made[-1]
    assert (default.surrogates, default.unroll, default.steps, default.batch_size) == (24, 2, 60, 125)
    assert (default.lr, default.adversarial_class, default.ball.epsilon) == (0.1, 1, 16 / 255)
    capsys.readouterr()
    for bad, message in (
        (["--poison-class", "bird"], "has no class 'bird': it has 0, 1, 2"),
        (["--poison-class", "1", "--target-class", "2", "--target-index", "4"], "target_index 4 is out of range"),
    ):
        assert main([*base, *bad]) == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(base)
    assert "--poison-class" in capsys.readouterr().err


def test_poison_and_audit_as_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = small()
    arrays = {name: getattr(data, name).numpy() for name in ("x_train", "y_train", "x_test", "y_test")}
    np.savez("small.npz", **arrays)
    source = ["--data", "small.npz", "--device", "cpu"]
    craft = [
        "--poison-class",
        "1",
        "--target-index",
        "0",
        "--epsilon",
        "16/255",
        "--epochs",
        "2",
    ]
    craft += ["--surrogates", "2", "--steps", "2", "--lr", "0.01", "--model", TINY, "--batch-size", "16"]
    assert main(["poison", "metapoison", *source, *craft, "--out", "p.npz"]) == 0 and Path("p.png").exists()
    poison = Poison.load("p.npz")
    assert float(poison.distortion(load_dataset("small.npz")).max()) <= 16 / 255
    judge = ["audit", *source, "--poison", "p.npz", "--seeds", "2", "--epochs", "3", "--batch-size", "20"]
    capsys.readouterr()
    assert main(judge) == 0
    said = capsys.readouterr().out
    for name in ("clean", "metapoison", "noise", "watermark"):
        assert re.search(rf"^{name} +[0-2]/2 ", said, re.MULTILINE)
    found = json.loads(Path("audit/audit.json").read_text())["p"]
    assert found["clean"]["victims"] == 2 and 0 <= found["metapoison"]["low"] <= found["metapoison"]["high"] <= 1
    lines = Path("audit/p.jsonl").read_text()
    assert len(lines.splitlines()) == 8
    assert main(judge) == 0 and Path("audit/p.jsonl").read_text() == lines  # nobody is trained twice
    assert main([*judge, "--against", "clean", "--optimizer", "sgd", "--lr", "0.2", "--work", "other"]) == 0
    assert len(Path("other/p.jsonl").read_text().splitlines()) == 4
    random = ["poison", "random", *source, "--target-class", "1", "--validation", "0", "--out", "r.npz"]
    assert main(random) == 0
    assert main([*judge, "--poison", "p.npz", "r.npz"]) == 2
    assert "audit them one by one" in capsys.readouterr().err.splitlines()[-1]


def test_what_a_killed_run_left_is_taken_up(tmp_path, monkeypatch):
    """A torn line in the file and in that of another process; a file that only has a similar name is left alone."""
    data, recipe, out = small(), VictimRecipe(model=TINY, epochs=1, batch_size=16, lr=0.01), tmp_path / "v.jsonl"
    found = judge_victims(data, [0], recipe, count=2, out=out)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text(lines[0] + lines[1][:30])
    (tmp_path / "v.jsonl.rank1").write_text(lines[1] + lines[0][:20])
    (tmp_path / "v.jsonl.ranking").write_text("mine\n")
    monkeypatch.setattr(targeted, "fit", None)
    assert judge_victims(data, [0], recipe, count=2, out=out) == found
    assert out.read_text() == "".join(lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.jsonl", "v.jsonl.ranking"]


def digits(per_class: int = 80) -> Dataset:
    """Three digits of MNIST, few of each, and their held-out images."""
    whole = load_dataset("mnist5k")
    few = [(whole.y_train == digit).nonzero().flatten()[:per_class] for digit in (4, 7, 9)]
    train = torch.cat(few).sort().values
    test = torch.isin(whole.y_test, torch.tensor([4, 7, 9])).nonzero().flatten()
    renamed = torch.zeros(10, dtype=torch.int64)
    renamed[[4, 7, 9]] = torch.arange(3)
    x, y, empty = whole.x_train[train], renamed[whole.y_train[train]], whole.x_train[:0]
    names = ("four", "seven", "nine")
    return Dataset("digits", x, y, whole.x_test[test], renamed[whole.y_test[test]], empty, whole.y_train[:0], names)


def dense(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, num_classes))


@pytest.mark.slow
def test_an_attack_on_digits_beats_noise_on_fresh_victims(tmp_path):
    """A seven becomes a nine through a sixth of the images, all nines.  It and the settings were chosen on other seeds.

    The watermark is no bound here: laid over nines, a seven teaches a dense network even more than this attack.
    """
    data = digits()
    recipe = VictimRecipe(model=f"{__name__}:dense", epochs=8, batch_size=30, lr=0.05, drops=())
    pilot = judge_victims(data, range(len(data.x_test)), recipe, count=6, seed=100)
    margins = torch.tensor([victim.judged(2)["margin"] for victim in pilot])
    sevens = (data.y_test == 1) & (margins.amin(0) > 0.3)  # that no pilot takes for a nine; the nearest of them
    target = int(torch.where(sevens, margins.mean(0), torch.inf).argmin())
    plan = MetaPoison(
        poison_class=2, adversarial_class=2, target_index=(target,), budget=1 / 6, ball=Ball(0.1), model=recipe.model,
        surrogates=8, unroll=1, steps=16, epochs=8, batch_size=30, lr=0.05, drops=(), seed=3,
    )  # fmt: skip
    poison = metapoison(data, plan)
    out = tmp_path / "victims.jsonl"
    found = audit_targets(poison, data, VictimRecipe.of(poison), count=8, out=out)
    print(victims_table(found))
    assert found["clean"]["successes"] <= 1 and found["noise"]["successes"] <= 1
    assert found["metapoison"]["successes"] >= 4
    assert found["metapoison"]["margin"] < found["noise"]["margin"] - 0.8
    assert found["metapoison"]["accuracy"] > found["clean"]["accuracy"] - 0.03
    lines = out.read_text().splitlines()
    assert len(lines) == 32
    # Victims whose line is there are not trained again; a torn one is.
    out.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])
    again = audit_targets(poison, data, VictimRecipe.of(poison), count=8, out=out)
    assert again == found and len(out.read_text().splitlines()) == 32


def test_judging(tmp_path):
    data = small()
    recipe = VictimRecipe(model=TINY, epochs=3, batch_size=16, lr=0.05)
    found = judge_victims(data, [0, 2], recipe, count=2, seed=7, curve=True, out=tmp_path / "a.jsonl")
    assert [victim.seed for victim in found] == [7, 8] and found[0].logits != found[1].logits
    curve, last = found[0].progress(1), found[0].judged(1)
    assert {len(values) for values in curve.values()} == {3}
    assert curve["margin"][-1] == pytest.approx(sum(last["margin"]) / 2) and curve["accuracy"][-1] == found[0].accuracy
    one = found[0].of(1)
    assert one.judged(1) == {name: values[1:] for name, values in last.items()}
    assert one.progress(1)["loss"][-1] == pytest.approx(last["loss"][1])
    assert judge_victims(data, [0, 2], recipe, count=2, seed=7, out=tmp_path / "a.jsonl") == found
    one = summarize_victims([Victim(0, [[0.0, 1.0], [2.0, 0.0]], 0.5)] * 4, 1)
    assert one["margin"] == 0.5 and one["target loss"] == pytest.approx(
        (math.log1p(math.exp(-1)) + math.log1p(math.e**2)) / 2
    )
    assert (one["successes"], one["trials"], one["success"]) == (4, 8, 0.5)
    assert one["low"] == pytest.approx(0.157, abs=1e-3) and one["high"] == pytest.approx(0.843, abs=1e-3)
    assert "4/8" in victims_table({"clean": one}) and "16% to 84%" in victims_table({"clean": one})
    poison = metapoison(data, attack(steps=1))
    mark, noise = watermark_beside(poison, data), noise_beside(poison, data, seed=1)
    for other in (mark, noise):
        assert torch.equal(other.index, poison.index) and float(other.distortion(data).max()) <= poison.ball.epsilon
    base, target = as_float(data.x_train[poison.index]), as_float(data.x_test[:1])
    expected = base + (0.1 * (target - base)).clamp(-16 / 255, 16 / 255)
    assert float((as_float(mark.images) - expected).abs().max()) <= 0.5 / 255 + 1e-6
    assert VictimRecipe.of(poison, lr=0.2).lr == 0.2 and VictimRecipe.of(poison).model == TINY
    assert VictimRecipe.of(metapoison(data, attack(steps=1, momentum=0.0))).optimizer == "sgd"
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="line 1: not a line about a victim"):
        judge_victims(data, [0], recipe, out=tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match="victims must be at least 1"):
        judge_victims(data, [0], recipe, count=0)
    with pytest.raises(ValueError, match="unknown comparison 'smoke'"):
        audit_targets(poison, data, recipe, against=["smoke"])
    with pytest.raises(ValueError, match="names no target images"):
        audit_targets(dataclasses.replace(poison, settings={}), data, recipe)
    with pytest.raises(ValueError, match="unknown optimizer 'lbfgs'"):
        judge_victims(data, [0], dataclasses.replace(recipe, optimizer="lbfgs"))
