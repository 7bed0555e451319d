"""Evaluation of checkpoints: a distance that is known, commands end to end, victims on clean data as an experiment."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from test_training import write_data
from torch import nn

from pacd_fast.cli import evaluate as evaluate_command
from pacd_fast.cli import main
from pacd_fast.experiments import add_row
from pacd_fast.networks import load_checkpoint
from pacd_fast.training import distortions, victims


def test_the_distortion_of_a_linear_classifier_is_the_distance_to_its_boundary():
    torch.manual_seed(0)
    weight = torch.randn(16)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        network[1].weight.copy_(torch.stack([weight, -weight]))
        network[1].bias.copy_(torch.tensor([-0.5 * weight.sum(), 0.5 * weight.sum()]))
    direction = (weight / weight.norm()).view(1, 1, 4, 4)
    far = torch.tensor([0.02, 0.1, 0.3, 0.5, -0.2])
    x = 0.5 + far.view(-1, 1, 1, 1) * direction
    y = torch.tensor([0, 0, 0, 0, 0])  # the last is wrong from the start
    found = distortions(network, x, y, sigma=0.05, copies=2000, iterations=100)
    assert found[4] == 0
    # The noise of 2000 copies moves the boundary by 0.05 / sqrt(2000) or so; a step is 2 % of a radius.
    torch.testing.assert_close(found[:4], far[:4].double(), rtol=0.03, atol=0.006)
    assert all(p.requires_grad for p in network.parameters())
    blind = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        blind[1].weight.zero_()
        blind[1].bias.copy_(torch.tensor([1.0, 0.0]))
    assert distortions(blind, x[:1], y[:1], sigma=0.1, copies=2, iterations=3).tolist() == [10.0]


def test_train_several_seeds_then_evaluate(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_data(tmp_path)
    train = ["train", "--method", "gaussian", "--sigma", "0.3", "--data", data, "--epochs", "1", "--seeds", "2"]
    assert main([*train, "--out", "v.safetensors", "--metrics", "v.jsonl"]) == 0
    assert "over 2 seeds: " in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.glob("v*")) == [
        "v-0.jsonl",
        "v-0.safetensors",
        "v-1.jsonl",
        "v-1.safetensors",
    ]
    assert load_checkpoint("v-1.safetensors").metadata["loss"] == "Gaussian(sigma=0.3, k=1)"
    both = ["evaluate", "--checkpoint", "v-0.safetensors", "v-1.safetensors", "--data", data]
    assert main(both) == 0  # the first question first: no sigma, no noise, no attack
    first, second, head, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("v-0.safetensors: accuracy ") and first.endswith("% on 200 test images")
    assert second.startswith("v-1.safetensors: accuracy ") and head.split() == ["class", "images", "accuracy"]
    assert len(lines) == 11 and "±" in lines[0]
    attack = ["--attack", "4", "--copies", "4", "--iterations", "3", "--noise-copies", "5"]
    assert main([*both, *attack, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["all"]["images"] == 200 and found["all"]["attacked"] == 4 and len(found["all"]["distortion"]) == 2
    assert found["3"]["images"] == 20 and all(0 <= value <= 1 for value in found["3"]["noisy"])
    assert main([*both, *attack, "--target-class", "3"]) == 0
    text = capsys.readouterr().out
    assert "±" in text and len(text.strip().splitlines()) == 5 and "under noise" in text and "l2 distortion" in text
    for wrong in (
        ["--copies", "-1"],
        ["--copies", "0"],
        ["--target-class", "77"],
        ["--sigma", "-1"],
        ["--iterations", "0"],
        ["--attack", "-1"],
        ["--noise-copies", "-1"],
    ):
        assert main([*both, *attack, *wrong]) == 2


def test_a_preset_runs_resumes_and_records(tmp_path, capsys, monkeypatch):
    data = write_data(tmp_path, 5100, "mnist")
    results, work = tmp_path / "results.json", tmp_path / "work"
    command = ["reproduce", "clean-mnist", "--data", data, "--method", "gaussian", "--sigma", "0.5", "--seeds", "2"]
    command += ["--epochs", "1", "--n", "100", "--count", "3", "--work", str(work), "--results", str(results)]
    assert main(command) == 0
    first = json.loads(results.read_text())["clean MNIST"]
    (row,) = first["rows"]
    assert row["ACR, paper"] == "1.481±0.02" and row["as good"] == "no" and row["seeds"] == 2 and "±" in row["ACR"]
    before = {p.name: p.read_bytes() for p in work.iterdir()}
    assert main(command) == 0 and {p.name: p.read_bytes() for p in work.iterdir()} == before
    assert [r["ACR"] for r in json.loads(results.read_text())["clean MNIST"]["rows"]] == [row["ACR"]]
    assert main([*command, "--seeds", "1"]) == 0  # fewer victims take no row's place
    assert [r["seeds"] for r in json.loads(results.read_text())["clean MNIST"]["rows"]] == [2]
    assert main([*command, "--count", "2"]) == 2  # the file has three images
    assert "holds 3 images and not the 2 that are wanted; give another --work" in capsys.readouterr().err
    assert main([*command, "--n", "200"]) == 2 and "another run: n is 100" in capsys.readouterr().err
    add_row(results, "clean MNIST", ["method"], row | {"method": "macer"})
    assert len(json.loads(results.read_text())["clean MNIST"]["rows"]) == 2
    capsys.readouterr()
    assert main([*command, "--data", "cifar10"]) == 2 and "--data must be mnist" in capsys.readouterr().err
    assert main([*command, "--results", str(tmp_path / "no" / "r.json")]) == 2
    monkeypatch.chdir(tmp_path)  # where no repository is, the row goes beside the victims
    assert main(command[:-2]) == 0 and json.loads((work / "results.json").read_text())["clean MNIST"]["rows"]
    Path(results).write_text("[]")
    assert main(command) == 2 and "is not a results file" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    data = write_data(tmp_path)
    train = ["train", "--data", data, "--method", "gaussian", "--epochs", "1", "--seeds", "2", "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    assert main([*train, "--out", "v.safetensors"]) == 0
    capsys.readouterr()
    measure, calls = evaluate_command.evaluate, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(evaluate_command, "evaluate", interrupted)
    both = ["evaluate", "--checkpoint", "v-0.safetensors", "v-1.safetensors", "--data", data, "--attack", "2"]
    assert main([*both, "--iterations", "2", "--copies", "2"]) == 130
    said = capsys.readouterr()
    assert "\nclass" in said.out and "the figures are those of v-0.safetensors" in said.err
    assert said.err.rstrip().endswith("pacd-fast evaluate: stopped")

    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(victims, "fit", stopped)
    row = ["reproduce", "clean-mnist", "--data", write_data(tmp_path, 5100, "mnist"), "--epochs", "1", "--work", "w"]
    row += ["--count", "3"]
    assert main(row) == 130 and "run the same command again to go on" in capsys.readouterr().err
