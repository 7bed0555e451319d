"""--train-images and --validation mean the same images to every command, and an audit takes them from the poison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pacd_fast.cli import audit, main, parser
from pacd_fast.cli.flags import load_data
from pacd_fast.data import load_dataset
from pacd_fast.poisoning import Poison


@pytest.fixture
def path(tmp_path, monkeypatch) -> str:
    """30 images of three classes, no two alike."""
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).integers(0, 256, (42, 8, 8), dtype=np.uint8)
    y = np.arange(42) % 3
    np.savez("small.npz", x_train=x[:30], y_train=y[:30], x_test=x[30:], y_test=y[30:])
    return "small.npz"


def test_train_images_of_a_command_are_the_first_ones(path):
    options = parser().parse_args(["train", "--data", path, "--train-images", "12", "--validation", "6", "--out", "v"])
    found, whole = load_data(options, validation=1, train_images=2), load_dataset(path)
    assert torch.equal(found.x_train, whole.x_train[:12]) and torch.equal(found.x_val, whole.x_train[24:])
    options = parser().parse_args(["audit", "--data", path, "--poison", "p.npz"])
    found = load_data(options, validation=5, train_images=2)  # where the command line does not say
    assert torch.equal(found.x_train, whole.x_train[:2]) and torch.equal(found.x_val, whole.x_train[25:])


def test_train_images_of_poison_are_those_of_its_audit(path, monkeypatch, capsys):
    flags = ["--target-class", "1", "--validation", "6", "--train-images", "18", "--epsilon", "0.1"]
    assert main(["poison", "random", "--data", path, *flags, "--out", "p.npz"]) == 0
    poison = Poison.load("p.npz")
    assert poison.index.tolist() == [1, 4, 7, 10, 13, 16] and poison.settings["train_images"] == 18
    seen = []

    def stopped(data, *given, **options):
        seen.append(data)
        raise ValueError("far enough")

    monkeypatch.setattr(audit, "audit", stopped)
    assert main(["audit", "--data", path, "--poison", "p.npz", "--sigma", "0.5", "--device", "cpu"]) == 2
    assert "far enough" in capsys.readouterr().err and Path("p.npz").exists()
    assert len(seen[0].x_train) == 18 and len(seen[0].x_val) == 6
