"""Files and numbers of an earlier version (commit efdd240): the same seeds give the same, and its files are read and
resumed.

Bits are those of one processor and one torch; elsewhere, convolutions are summed in another order, and what is trained
is compared with a tolerance.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pacd_fast.cli import main
from pacd_fast.data import load_dataset
from pacd_fast.experiments import machine
from pacd_fast.networks import build, fingerprint, load_checkpoint
from pacd_fast.poisoning import Ball, MetaPoison, Pacd, Poison, Recipe, metapoison, pacd
from pacd_fast.training import Gaussian, fit

BEFORE = Path(__file__).parent / "data" / "efdd240"
ABOUT = json.loads((BEFORE / "about.json").read_text())
SAME_BITS = machine().startswith(ABOUT["cpu"]) and torch.__version__ == ABOUT["torch"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    return load_dataset("mnist5k", train_images=400, validation=200)


def without_time(path: Path) -> list[list[str]]:
    return [line.split("\t")[:-1] for line in path.read_text().splitlines()]


def same_images(ours: Poison, before: Poison) -> bool:
    """Equal where the processor is; elsewhere nearly all pixels are, and none is off by more than a few levels."""
    assert torch.equal(ours.index, before.index) and ours.ball == before.ball
    if SAME_BITS:
        return torch.equal(ours.images, before.images)
    return float((ours.images != before.images).double().mean()) < 0.2


def test_certificates(tmp_path):
    """Certified again and resumed: the votes of a network that is sure of itself hang on no rounding."""
    checkpoint = str(BEFORE / "victim.safetensors")
    command = ["certify", "--checkpoint", checkpoint, "--data", "mnist5k", "--max", "8", "--n", "1000", "--seed", "7"]
    command += ["--noise", "float", "--futility", "0"]
    command += ["--device", "cpu", "--batch-size", "64"]
    assert main([*command, "--out", str(tmp_path / "again.tsv")]) == 0
    before, ours = without_time(BEFORE / "certificates.tsv"), without_time(tmp_path / "again.tsv")
    columns = [ours[0].index(name) for name in before[0]]
    assert [[row[i] for i in columns] for row in ours] == before


def test_a_victim(tmp_path):
    victim = load_checkpoint(BEFORE / "victim.safetensors")
    assert victim.fingerprint == ABOUT["victim"] and victim.sigma == 0.25 and victim.arch == "convnet"
    out = tmp_path / "v.safetensors"
    shutil.copy(BEFORE / "victim.safetensors", out)
    train = ["train", "--model", "convnet", "--data", "mnist5k", "--method", "gaussian", "--sigma", "0.25"]
    train += ["--epochs", "4", "--lr", "0.003", "--batch-size", "50", "--seed", "3", "--device", "cpu", "--resume"]
    before = out.stat().st_mtime_ns
    assert main([*train, "--out", str(out)]) == 0 and out.stat().st_mtime_ns == before  # it is this very run


def test_training_goes_on_from_an_unfinished_run(tmp_path, digits):
    shutil.copy(BEFORE / "training.partial", tmp_path / "partial")
    torch.manual_seed(1)
    network = build("convnet", num_classes=10, in_channels=1, image_size=(28, 28))
    data, options = (digits.x_train[:100], digits.y_train[:100]), {"epochs": 2, "batch_size": 50, "seed": 9}
    fit(network, data, Gaussian(0.5), checkpoint=tmp_path / "partial", resume=True, **options)
    if SAME_BITS:
        assert fingerprint(network) == ABOUT["trained"]
    torch.manual_seed(1)
    whole = build("convnet", num_classes=10, in_channels=1, image_size=(28, 28))
    fit(whole, data, Gaussian(0.5), **options)
    for ours, theirs in zip(network.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("resume", [False, True])
def test_poison_of_a_class(tmp_path, digits, resume):
    shutil.copy(BEFORE / "pacd.partial", tmp_path / "partial")
    recipe = Recipe(epochs=2, clean_batch=40, poison_batch=5, upper_batch=10, lower_steps=2, solver_steps=3)
    attack = Pacd(Gaussian(0.5), 8, Ball(0.1), model="convnet", recipe=recipe, seed=5, fraction=0.25)
    ours = pacd(digits, attack, checkpoint=tmp_path / "partial" if resume else None, resume=resume)
    assert same_images(ours, Poison.load(BEFORE / "pacd.npz"))


@pytest.mark.parametrize("resume", [False, True])
def test_poison_of_targets(tmp_path, digits, resume):
    shutil.copy(BEFORE / "metapoison.partial", tmp_path / "partial")
    attack = MetaPoison(
        3, 3, (0,), 0.02, model="convnet", surrogates=1, unroll=1, steps=2, epochs=2, batch_size=50, seed=6
    )
    ours = metapoison(digits, attack, checkpoint=tmp_path / "partial" if resume else None, resume=resume)
    assert same_images(ours, Poison.load(BEFORE / "metapoison.npz"))


def test_label_flips(tmp_path, capsys):
    command = ["labelflip", "--data", str(BEFORE / "features.npz"), "--q", "0.1", "0.3", "--attack", "3"]
    command += ["--certificate", "kl", "exact", "whitebox", "ridge"]
    assert main([*command, "--l2", "230.6678801872033", "--out", str(tmp_path / "flips.tsv")]) == 0
    before, ours = ([line.split("\t") for line in p.read_text().splitlines()]
                    for p in (BEFORE / "flips.tsv", tmp_path / "flips.tsv"))  # fmt: skip
    # the data has a fingerprint now, and the constant classifier's accuracy is computed from the rows
    same = [name for name in before[0] if name not in ("log_tail", "constant", "data")]
    tables = []
    for head, *rows in (before, ours):
        key = [head.index(name) for name in same]
        tables.append({tuple(row[i] for i in key): float(row[head.index("log_tail")]) for row in rows})
        assert len(tables[-1]) == len(rows)
    assert tables[0].keys() == tables[1].keys()
    np.testing.assert_allclose(*([table[key] for key in tables[0]] for table in tables), rtol=1e-12)
