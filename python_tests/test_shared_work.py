"""Work that several processes share: certify in a process group, victims to train, audits, crafting."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torchrun_agent import GLOO, Agent, rows, together, trains

from pacd_fast import files
from pacd_fast.certification import certify
from pacd_fast.cli import main, train
from pacd_fast.experiments import lab
from pacd_fast.networks import load_checkpoint
from pacd_fast.poisoning import Poison, targeted
from pacd_fast.ranks import Ranks

pytestmark = [
    pytest.mark.skipif(not GLOO, reason="this torch has no gloo"),
    pytest.mark.usefixtures("there", "one_thread"),
]


def test_certify_in_a_group(folder, tmp_path):
    """All get what one finds, whatever they ask; without a seed too; what differs is refused."""
    with np.load(folder / "digits.npz") as data:
        images = torch.from_numpy(data["x_test"][:7])
    network = load_checkpoint(folder / "model.safetensors").model
    sigmas = torch.tensor([0.25, 0.5, 0.25, 0.25, 0.5, 0.5, 0.25])
    asked = {
        "full": {"sigma": 0.5, "n": 300},
        "radii": {"sigma": sigmas, "n": 400, "radii": [0.0, 0.1, 0.2], "image_ids": torch.arange(7) * 5},
    }

    def function(rank: int) -> int:
        dist.init_process_group("gloo")
        group, batch = dist.group.WORLD, images.numpy() if rank else images
        for name, question in asked.items():
            found = certify(network, batch, num_classes=10, seed=3, group=group, progress=not rank, **question)
            torch.save({**vars(found), "noise": str(found.noise)}, tmp_path / f"{name}{rank}.pt")
        found = certify(network, images[:2], num_classes=10, sigma=0.5, n=100, group=group)
        torch.save(found.seed, tmp_path / f"seed{rank}.pt")
        pair = dist.new_group([1, 2])
        if rank:
            found = certify(network, images, num_classes=10, seed=3, group=pair, **asked["full"])
            torch.save(found.counts, tmp_path / f"pair{rank}.pt")
        try:
            certify(network, images[: 3 + rank // 2], num_classes=10, sigma=0.5, n=100, seed=3, group=group)
        except ValueError as error:
            (tmp_path / f"refused{rank}").write_text(str(error))
        dist.destroy_process_group()
        return 0

    agent = Agent(tmp_path, 3)
    agent.start(function)
    assert agent.ended() == [0, 0, 0], agent.said()
    for name, question in asked.items():
        alone = certify(network, images, num_classes=10, seed=3, batch_size=256, compile=False, **question)
        for rank in range(3):
            found = torch.load(tmp_path / f"{name}{rank}.pt")
            for field, value in vars(alone).items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(found[field], value), (name, rank, field)
                else:
                    assert str(found[field]) == str(value)
            if name == "full":
                assert rank == 0 or torch.equal(torch.load(tmp_path / f"pair{rank}.pt"), alone.counts)
    assert len({torch.load(tmp_path / f"seed{rank}.pt") for rank in range(3)}) == 1
    for rank in range(3):
        assert re.match(r"image_ids is .* at rank 2 and .* at rank 0", (tmp_path / f"refused{rank}").read_text())


@trains
def test_victims_are_shared_out_and_a_restart_goes_on(folder, tmp_path):
    command = ["train", "--data", str(folder / "digits.npz"), "--epochs", "2", "--batch-size", "50", "--lr", "0.001"]
    command += ["--device", "cpu"]
    alone, said = tmp_path / "alone.safetensors", io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main([*command, "--seeds", "3", "--out", str(alone)]) == 0
    command += ["--seeds", "3", "--out", str(tmp_path / "victim.safetensors")]

    def function(rank: int) -> int:
        if rank == 1 and agent.attempt == 0:
            trained = train.train

            def deadly(out, *arguments, **options):
                trained(out, *arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)

            train.train = deadly
        return main(command)

    agent = Agent(tmp_path, 2)
    agent.start(function)
    assert -signal.SIGKILL in agent.ended(), agent.said()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("victim-*.safetensors")}
    assert before
    for rank in range(2):
        (tmp_path / f"log{rank}").unlink()
    agent.start(function)
    assert agent.ended() == [0, 0], agent.said()
    for seed in range(3):
        found, expected = (load_checkpoint(tmp_path / f"{name}-{seed}.safetensors") for name in ("victim", "alone"))
        assert found.fingerprint == expected.fingerprint
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert said.getvalue().replace("alone", "victim") in agent.said()
    codes, text = together(tmp_path / "again", 2, command)
    assert 2 in codes and "exists already" in text
    few = [*command[:-4], "--seeds", "2", "--out", str(tmp_path / "few.safetensors")]
    codes, text = together(tmp_path / "few", 3, few)  # of fewer than processes, each by all of them
    assert codes == [0, 0, 0] and text.count("accuracy without noise") == 2
    for seed in range(2):
        found, expected = (load_checkpoint(tmp_path / f"{name}-{seed}.safetensors") for name in ("few", "alone"))
        assert found.fingerprint != expected.fingerprint  # the order of their sums
        for weight, other in zip(found.model.parameters(), expected.model.parameters(), strict=True):
            torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-4)


@trains
def test_an_audit_is_shared_out(folder, tmp_path):
    data = ["--data", str(folder / "digits.npz"), "--device", "cpu"]
    mark = str(tmp_path / "mark.npz")
    assert main(["poison", "watermark", *data, "--target-class", "2", "--out", mark]) == 0
    command = ["audit", *data, "--poison", mark, "--sigma", "0.4", "--seeds", "2", "--epochs", "1", "--count", "3"]
    command += ["--n", "100", "--others", "2", "--others-n", "50", "--attacked", "0", "--work"]
    assert main([*command, str(tmp_path / "alone")]) == 0
    codes, said = together(tmp_path, 2, [*command, tmp_path / "work"])
    assert codes == [0, 0], said
    one, two = (json.loads((tmp_path / name / "audit.json").read_text())["measured"] for name in ("alone", "work"))
    assert {name: each["accuracy"] for name, each in one.items()} == {n: each["accuracy"] for n, each in two.items()}
    assert all(len(each["acr"]) == len(each["others_acr"]) == 2 for each in two.values())
    names = [sorted(path.name for path in (tmp_path / name).glob("*[0-9s].[st]*")) for name in ("alone", "work")]
    assert names[0] == names[1] and len(names[0]) == 4 * 3
    for path in (tmp_path / "alone").glob("*.safetensors"):
        assert load_checkpoint(path).fingerprint == load_checkpoint(tmp_path / "work" / path.name).fingerprint
    assert "others' ACR" not in (tmp_path / "log1").read_text() and "others' ACR" in said


@trains
def test_one_network_is_trained_by_all_and_a_restart_goes_on(folder, tmp_path):
    """Killed after its first epoch.  A gradient's float32 sum of 50 images errs by 3e-6 of its terms' size at most."""
    command = ["train", "--data", str(folder / "digits.npz"), "--epochs", "2", "--batch-size", "50", "--lr", "0.05"]
    command += ["--optimizer", "sgd", "--device", "cpu", "--out"]
    assert main([*command, str(tmp_path / "alone.safetensors")]) == 0
    out = tmp_path / "victim.safetensors"

    def function(rank: int) -> int:
        if rank == 0 and agent.attempt == 0:
            write = files.write

            def deadly(*arguments):
                write(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)

            files.write = deadly
        return main([*command, str(out)])

    agent = Agent(tmp_path, 2)
    agent.start(function)
    assert -signal.SIGKILL in agent.ended() and files.partial(out).exists()
    agent.start(function)
    assert agent.ended() == [0, 0], agent.said()
    assert "victim.safetensors: accuracy" in agent.said() and "accuracy" not in (tmp_path / "log1").read_text()
    found, expected = (load_checkpoint(path).model.state_dict() for path in (out, tmp_path / "alone.safetensors"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert not files.partial(out).exists()


CRAFTING = {
    "metapoison": "--poison-class 1 --target-index 0 --budget 0.03 --model convnet --surrogates 2 --steps 2 --epochs 2 "
    "--batch-size 60 --lr 0.05 --epsilon 0.1",
    "pacd": "--target-class 1 --validation 40 --epochs 1 --clean-batch 60 --poison-batch 9 --lower-steps 2 "
    "--upper-batch 5 --solver-steps 3",
}


@trains
@pytest.mark.parametrize("attack", CRAFTING)
def test_poison_is_crafted_by_all(attack, folder, tmp_path):
    command = ["poison", attack, "--data", str(folder / "digits.npz"), "--device", "cpu", *CRAFTING[attack].split()]
    assert main([*command, "--out", str(tmp_path / "alone.npz")]) == 0
    codes, said = together(tmp_path, 2, [*command, "--out", tmp_path / "poison.npz"])
    assert codes == [0, 0], said
    assert (tmp_path / "log1").read_text() == ""
    found, expected = (Poison.load(tmp_path / f"{name}.npz") for name in ("poison", "alone"))
    assert torch.equal(found.index, expected.index)
    far = (found.images.int() - expected.images.int()).abs()
    assert far.count_nonzero() <= far.numel() // 100, far.count_nonzero()
    assert not list(tmp_path.glob("*.partial"))
    before = (tmp_path / "poison.npz").read_bytes()
    (tmp_path / "poison.npz.partial").write_bytes(b"a kill came between")
    for attempt, words in ((0, "exists already"), (1, "was written before the restart")):
        agent = Agent(tmp_path, 2)
        agent.attempt = attempt - 1
        agent.start(lambda rank: main([*command, "--out", str(tmp_path / "poison.npz")]))
        codes = agent.ended()
        assert (codes == [0, 0] if attempt else 2 in codes) and words in agent.said()
    assert (tmp_path / "poison.npz").read_bytes() == before and not list(tmp_path.glob("*.partial"))


@trains
def test_victims_of_targeted_poison_are_shared_out(folder, tmp_path):
    """Two victims are trained when both processes are killed; they are not trained again by three."""
    data = ["--data", str(folder / "digits.npz"), "--device", "cpu"]
    poison = str(tmp_path / "poison.npz")
    assert main(["poison", "metapoison", *data, *CRAFTING["metapoison"].split(), "--out", poison]) == 0
    command = ["audit", *data, "--poison", poison, "--seeds", "3", "--epochs", "1", "--against", "clean", "--work"]
    assert main([*command, str(tmp_path / "alone")]) == 0

    def function(rank: int) -> int:
        if agent.attempt == 0:
            write = targeted.append_line

            def deadly(*arguments):
                write(*arguments)
                while len(list((tmp_path / "work").glob("poison.jsonl*"))) < 2:
                    time.sleep(0.01)  # until both have written one
                os.kill(os.getpid(), signal.SIGKILL)

            targeted.append_line = deadly
        else:
            fit = targeted.fit

            def counted(*arguments, **options):
                files.append_line(tmp_path / f"trained{rank}", "one")
                fit(*arguments, **options)

            targeted.fit = counted
        return main([*command, str(tmp_path / "work")])

    agent = Agent(tmp_path, 2)
    agent.start(function)
    assert set(agent.ended()) <= {-signal.SIGKILL, -signal.SIGTERM}
    time.sleep(0.1)
    assert (tmp_path / "work/poison.jsonl.rank1").exists()
    agent = Agent(tmp_path, 3)
    agent.attempt = 0
    agent.start(function)
    assert agent.ended() == [0, 0, 0], agent.said()
    one, two = (json.loads((tmp_path / name / "audit.json").read_text()) for name in ("alone", "work"))
    for each in (one, two):
        for measured in each["poison"].values():
            measured["accuracies"] = [round(value, 9) for value in measured["accuracies"]]
    assert one == two and set(one["poison"]) == {"clean", "metapoison"}
    lines = [(tmp_path / name / "poison.jsonl").read_text().splitlines() for name in ("alone", "work")]
    assert len(lines[1]) == 6 and sorted(lines[0]) == sorted(lines[1])
    assert not list((tmp_path / "work").glob("*.rank*")) and not list((tmp_path / "work").glob("*.partial"))
    assert sum(len(path.read_text().splitlines()) for path in tmp_path.glob("trained*")) == 6 - 2
    assert (tmp_path / "log2").read_text() == "" and "test accuracy" in (tmp_path / "log0").read_text()
    codes, said = together(tmp_path / "others", 2, [*command, tmp_path / "w"], ["--lr", "0.3"])
    assert 2 in codes and "lr is 0.3 at rank 1 and 0.05 at rank 0: all need the same" in said


@trains
def test_a_table_is_reproduced_by_all(tmp_path, monkeypatch):
    """One poison is crafted by both, victims are handed out; one process finds the same with that poison."""
    command = ["reproduce", "table2", "--data", _digits(tmp_path), "--small", "--sigma", "0.5"]
    command += ["--epochs", "1", "--train-images", "600"]
    command += ["--seeds", "2", "--baseline-seeds", "1", "--poisons", "1", "--craft-epochs", "1", "--count", "2"]
    command += ["--n", "100", "--others", "0", "--device", "cpu", "--work"]

    def crafted(*arguments, group, **options):
        files.append_line(tmp_path / f"crafted{Ranks.of_group(group).rank}", "once")
        return pacd(*arguments, group=group, **options)

    pacd = lab.pacd
    monkeypatch.setattr(lab, "pacd", crafted)
    codes, said = together(tmp_path / "logs", 2, [*command, tmp_path / "two"])
    assert codes == [0, 0], said
    assert [(tmp_path / f"crafted{rank}").read_text() for rank in (0, 1)] == ["once\n"] * 2
    assert "| poison" in said and (tmp_path / "logs/log1").read_text() == ""
    (tmp_path / "one").mkdir()
    (poison,) = (tmp_path / "two").glob("*gaussian*.npz")
    shutil.copy(poison, tmp_path / "one")
    assert main([*command, str(tmp_path / "one")]) == 0
    names = [sorted(str(file.relative_to(tmp_path / each)) for file in (tmp_path / each).rglob("*")) for each in WORKS]
    assert set(names[0]) >= set(names[1]) and not set(names[0]) - set(names[1]) - {poison.with_suffix(".jsonl").name}
    two, one = (json.loads((tmp_path / each / "results.json").read_text()) for each in WORKS)
    assert two["PACD table 2"]["rows"] == one["PACD table 2"]["rows"] and len(one["PACD table 2"]["rows"]) == 4
    codes, said = together(tmp_path / "logs", 2, ["reproduce", "flips-mnist", "--work", tmp_path / "none"])
    assert 2 in codes and "flips-mnist is for one process" in said


@trains
def test_one_victim_is_trained_and_certified_by_all(tmp_path, monkeypatch):
    def counted(function, ranks_of):
        def call(*arguments, **options):
            ranks = ranks_of(options)
            files.append_line(tmp_path / f"{function.__name__}{ranks.rank}", str(ranks.size))
            return function(*arguments, **options)

        monkeypatch.setattr(module, function.__name__, call)

    module = importlib.import_module("pacd_fast.experiments.clean_victims")
    counted(module.train, lambda options: Ranks.of_group(options["group"]))
    counted(module.certify_dataset, lambda options: options["ranks"])
    command = ["reproduce", "clean-mnist", "--data", _digits(tmp_path), "--sigma", "0.5", "--seeds", "1"]
    command += ["--epochs", "1", "--n", "100", "--count", "5", "--device", "cpu", "--work"]
    codes, said = together(tmp_path / "logs", 2, [*command, tmp_path / "two"])
    assert codes == [0, 0], said
    assert (tmp_path / "logs/log1").read_text() == ""
    for name in ("train0", "train1", "certify_dataset0", "certify_dataset1"):
        assert (tmp_path / name).read_text() == "2\n"
    (tmp_path / "one").mkdir()
    for victim in (tmp_path / "two").glob("*.safetensors"):
        shutil.copy(victim, tmp_path / "one")
    assert main([*command, str(tmp_path / "one")]) == 0
    (two,), (one,) = (json.loads((tmp_path / w / "results.json").read_text())["clean MNIST"]["rows"] for w in WORKS)
    assert two["seeds"] == one["seeds"] == 1
    certified = [[row[0] for row in rows(next((tmp_path / work).glob("*.tsv")))] for work in WORKS]
    assert certified[0] == certified[1] and len(certified[0]) > 5
    assert not list((tmp_path / "two").glob("*.rank*")) and not list((tmp_path / "two").glob("*.partial"))


def _digits(folder: Path) -> str:
    """A file of noise in the place of MNIST."""
    images = np.random.default_rng(1).integers(0, 256, (5600, 1, 28, 28), dtype=np.uint8)
    labels = np.resize([*range(10), 8, 8], 5600)
    np.savez(folder / "mnist.npz", x_train=images, y_train=labels, x_test=images[:50], y_test=labels[:50])
    return str(folder / "mnist.npz")


WORKS = ("two", "one")
