"""Runs of several processes: what one process writes, whoever is killed, refused where the processes differ."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pacd_fast.certification import ResultsFile, certify, rank_files
from pacd_fast.certification.sharing import SharedSamples
from pacd_fast.cli import main, train
from pacd_fast.data import load_dataset
from pacd_fast.networks import build, load_checkpoint, save_checkpoint
from pacd_fast.randomness import seeded
from pacd_fast.ranks import Ranks

GLOO = dist.is_available() and dist.is_gloo_available()
pytestmark = pytest.mark.skipif(not GLOO, reason="this torch has no gloo")

CERTIFY = ["certify", "--sigma", "0.5", "--n", "300", "--count", "16", "--seed", "7", "--device", "cpu"]
CERTIFY += ["--checkpoint", "model.safetensors", "--data", "digits.npz"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """model.safetensors, other.safetensors, digits.npz, which is read faster than mnist5k, and certified.tsv."""
    path = tmp_path_factory.mktemp("ranks")
    data = load_dataset("mnist5k")
    parts = {name: getattr(data, name).numpy() for name in ("x_train", "y_train", "x_test", "y_test")}
    np.savez(path / "digits.npz", **{name: value[:200] for name, value in parts.items()})
    metadata = {"architecture": "mnist-cnn", "num_classes": "10", "in_channels": "1", "image_size": "28x28"}
    for seed, name in enumerate(("model", "other")):
        with seeded(torch.device("cpu"), seed):
            network = build("mnist-cnn", num_classes=10, in_channels=1, image_size=(28, 28))
        save_checkpoint(path / f"{name}.safetensors", network, metadata)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert main([*CERTIFY, "--out", "certified.tsv"]) == 0
    return path


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def rows(path: Path) -> list[list[str]]:
    """A results file without its last column, the time."""
    return [line.split("\t")[:-1] for line in path.read_text().splitlines()]


class Agent:
    """What torchrun is to its processes, with forks: they need not import torch again.  torchrun's own: see below."""

    def __init__(self, folder: Path, size: int):
        self.store = dist.TCPStore("localhost", 0, None, True, timedelta(seconds=60), False)
        self.folder, self.size, self.attempt = folder, size, -1
        self.running: dict[int, int] = {}  # rank: process id

    def start(self, function: Callable[[int], int]) -> None:
        self.attempt += 1
        for rank in range(self.size):
            child = os.fork()
            if child:
                self.running[rank] = child
                continue
            code = 70
            try:
                log = os.open(self.folder / f"log{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.size),
                    "MASTER_ADDR": "localhost", "MASTER_PORT": str(self.store.port),
                    "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "TORCHELASTIC_RESTART_COUNT": str(self.attempt),
                }  # fmt: skip
                torch.set_num_threads(1)
                Ranks.of_torchrun.cache_clear()
                code = function(rank)
                sys.stdout.flush()
                sys.stderr.flush()
            except Exception:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)

    def kill(self, signal_number: int = signal.SIGKILL, ranks: Sequence[int] | None = None) -> None:
        for rank in list(self.running) if ranks is None else ranks:
            os.kill(self.running[rank], signal_number)
        for rank in list(self.running) if ranks is None else ranks:
            os.waitpid(self.running.pop(rank), 0)

    def ended(self, limit: float = 60.0) -> list[int]:
        """The codes of those that ended; the others are stopped as soon as one has failed, as torchrun does it."""
        codes, until = [], time.monotonic() + limit
        while self.running:
            if time.monotonic() > until:
                self.kill()
                pytest.fail("they do not end: " + self.said())
            for rank, child in list(self.running.items()):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    del self.running[rank]
                    codes.append(os.waitstatus_to_exitcode(status))
            if any(codes):
                time.sleep(0.1)
                self.kill(signal.SIGTERM)
            time.sleep(0.01)
        return codes

    def said(self) -> str:
        return "".join((self.folder / f"log{rank}").read_text() for rank in range(self.size))


def together(folder: Path, size: int, arguments: Sequence[object], *more: Sequence[object]) -> tuple[list[int], str]:
    """Exit codes and output of a command by so many ranks; more: flags that rank 1, 2, ... have besides."""
    folder.mkdir(exist_ok=True)
    agent = Agent(folder, size)
    words = [
        [*map(str, arguments), *(map(str, more[rank - 1]) if 0 < rank <= len(more) else ())] for rank in range(size)
    ]
    agent.start(lambda rank: main(words[rank]))
    return agent.ended(), agent.said()


@pytest.mark.parametrize("share", ["images", "samples"])
@pytest.mark.parametrize("question", [[], ["--radii", "0", "0.25", "0.5"]], ids=["full", "radii"])
def test_several_ranks_write_what_one_does(share, question, folder, tmp_path):
    arguments = [*CERTIFY, *question]
    alone, out = folder / "certified.tsv", tmp_path / "results.tsv"
    if question:
        alone = tmp_path / "alone.tsv"
        assert main([*map(str, arguments), "--out", str(alone)]) == 0
    codes, said = together(tmp_path / "logs", 3, [*arguments, "--share", share, "--out", out])
    assert codes == [0, 0, 0], said
    assert rows(out) == rows(alone)
    assert [path.name for path in tmp_path.glob("results*")] == ["results.tsv"]
    bars = re.split(r"[\r\n]+", said.strip())
    assert "16/16 images" in bars[-1] and all("sample" in line for line in bars)
    assert (tmp_path / "logs/log1").read_text() == (tmp_path / "logs/log2").read_text() == ""  # one bar: rank 0's


def test_killed_ranks_and_runs_are_taken_up_by_others(folder, tmp_path):
    """One rank is killed and the others stopped, as torchrun does before it restarts them; or all are killed."""
    out = tmp_path / "results.tsv"
    command = [*CERTIFY, "--batch-size", "64", "--out", str(out)]

    def written() -> set[str]:
        found = set()
        for file in (out, *rank_files.parts(out)):
            with contextlib.suppress(FileNotFoundError):
                found |= {line.split("\t")[0] for line in file.read_text().split("\n")[1:-1]}
        return found

    agent, cut_short = Agent(tmp_path, 2), 0
    for turn in range(13):
        agent.size, before = 2 + turn % 2, written()
        agent.start(lambda rank: main(command))
        until = time.monotonic() + 30
        while written() <= before and len(before) < 16 and time.monotonic() < until:
            time.sleep(0.001)
        if turn % 4 == 3:
            agent.kill()
        else:
            agent.kill(ranks=[turn % agent.size])
            agent.kill(signal.SIGTERM)
        found = written()
        assert found >= before, "rows were lost"
        assert found > before or len(before) == 16, agent.said()
        cut_short += len(found) < 16
    assert cut_short >= 3
    assert together(tmp_path, 3, command)[0] == [0, 0, 0]
    header, *expected = rows(folder / "certified.tsv")
    column = header.index("rows")
    assert [row[:column] + row[column + 1 :] for row in rows(out)[1:]] == [
        r[:column] + r[column + 1 :] for r in expected
    ]
    assert not rank_files.parts(out)
    before = out.read_bytes()
    assert together(tmp_path, 2, command)[0] == [0, 0]
    assert out.read_bytes() == before, "all was there, and nothing is to be changed"


def test_one_process_goes_on_from_several(folder, tmp_path):
    out = tmp_path / "results.tsv"
    header, *lines = (folder / "certified.tsv").read_text().splitlines(keepends=True)
    out.write_text(header)
    rank_files.part(out, 1).write_text("".join([header, *lines[3:9]]))
    rank_files.part(out, 12).write_text("".join([header, lines[8], lines[1], lines[0][:40]]))
    without_seed = [word for i, word in enumerate(CERTIFY) if "--seed" not in CERTIFY[max(0, i - 1) : i + 1]]
    assert main([*without_seed, "--out", str(out)]) == 0
    assert rows(out) == rows(folder / "certified.tsv") and not rank_files.parts(out)
    assert out.read_text().count(lines[5]) == 1, "its time too"


REFUSED = {
    "dtype is bfloat16 at rank 1 and float32 at rank 0": ["--dtype", "bfloat16"],
    "at rank 1 and mnist-cnn@": ["--checkpoint", "other.safetensors"],
    "seed is 8 at rank 1 and 7 at rank 0": ["--seed", "8"],
    "rows is 64 at rank 1 and 256 at rank 0": ["--batch-size", "64"],
    "rank 1: unknown device 'tpu'": ["--device", "tpu"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_ranks_that_differ_are_refused_in_one_line(message, tmp_path):
    arguments = [*CERTIFY, "--out", tmp_path / "results.tsv"]
    codes, said = together(tmp_path, 2, arguments, REFUSED[message])
    assert 2 in codes and 0 not in codes
    assert message in said and said.strip().count("\n") == 0, said
    assert not (tmp_path / "results.tsv").exists()


def test_a_rank_that_fails_ends_the_run_with_its_line(tmp_path):
    """Whatever it is; rows that are there stay."""

    def function(rank: int) -> int:
        if rank == 1:

            def broken(self: ResultsFile, row: object) -> None:
                raise RuntimeError("the cat sat on the keyboard")

            ResultsFile.append = broken
        return main([*CERTIFY, "--out", str(tmp_path / "results.tsv")])

    agent = Agent(tmp_path, 3)
    agent.start(function)
    assert 2 in agent.ended()
    wrong = [line for line in re.split(r"[\r\n]", agent.said()) if "sample" not in line and line.strip()]
    assert wrong == ["pacd-fast certify: rank 1: RuntimeError: the cat sat on the keyboard"]


def test_other_commands_are_for_one_process(tmp_path):
    codes, said = together(tmp_path, 2, ["info"])
    assert 2 in codes and "this command is for one process" in said


def test_the_same_fault_of_all_ranks_is_said_once(tmp_path):
    codes, said = together(tmp_path, 3, [*CERTIFY, "--alpha", "2", "--out", tmp_path / "results.tsv"])
    assert 2 in codes and 0 not in codes
    assert re.fullmatch(r"pacd-fast certify: rank \d: alpha must be .*", said.strip())


def test_a_disk_of_ones_own_is_said(folder, tmp_path):
    """Rank 1 writes into a folder that rank 0 cannot see."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    outs = tmp_path / "results.tsv", elsewhere / "results.tsv"

    def function(rank: int) -> int:
        rank_files._gather.__defaults__ = (0.3,)
        return main([*CERTIFY, "--out", str(outs[rank])])

    agent = Agent(tmp_path, 2)
    agent.start(function)
    assert 2 in agent.ended()
    there = rank_files.part(outs[1], 1)
    assert f"rows of rank 1 are in {there}" in agent.said() and "same file system" in agent.said()
    assert rows(outs[0])[0] == rows(there)[0]
    there.rename(rank_files.part(outs[0], 1))
    assert main([*CERTIFY, "--out", str(outs[0])]) == 0
    assert rows(outs[0]) == rows(folder / "certified.tsv")


def test_rows_of_a_batch_are_shared_out():
    class Three(Ranks):
        def __init__(self, rank: int):
            super().__init__(None, rank, 3)

    draw = np.random.default_rng(3)
    for _ in range(50):
        rows_each = int(draw.integers(1, 20))
        counts, left = [], int(draw.integers(1, 3 * rows_each + 1))
        while left:
            counts.append(int(draw.integers(1, left + 1)))
            left -= counts[-1]
        pieces = np.array([[i, i % 2, 100 * i, count, i + 1] for i, count in enumerate(counts)])
        mine = [SharedSamples(Three(rank), 0).mine(pieces, rows_each) for rank in range(3)]
        samples = [(i, s, first + k, slot) for part in mine for i, s, first, n, slot in part.tolist() for k in range(n)]
        assert samples == [(i, s, first + k, slot) for i, s, first, n, slot in pieces.tolist() for k in range(n)]
        assert all(part[:, 3].sum() <= rows_each for part in mine)


def test_torchrun_restarts_a_killed_rank(folder, tmp_path):
    """The real one, and a rank that is killed once, in the middle."""
    (tmp_path / "deadly.py").write_text(DEADLY)
    out = tmp_path / "results.tsv"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "--", "deadly", *CERTIFY, "--out", str(out)]
    for name in ("digits.npz", "model.safetensors"):
        command[command.index(name)] = str(folder / name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists() and "exitcode: -9" in done.stderr
    assert re.search(r"[1-9]\d* of 16 images are there", done.stderr)
    assert rows(out) == rows(folder / "certified.tsv")
    assert not rank_files.parts(out)


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
    assert -signal.SIGKILL in agent.ended()
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
    codes, text = together(tmp_path / "few", 4, command)
    assert 2 in codes and "4 processes share the victims, and there are 3" in text


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


DEADLY = """import os, signal, sys
from pathlib import Path
from pacd_fast.certification import ResultsFile
from pacd_fast.cli import main

append = ResultsFile.append

def deadly(self, row):
    append(self, row)
    if len(self.done) == 3 and os.environ["RANK"] == "1" and not Path("died").exists():
        Path("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)

ResultsFile.append = deadly
sys.exit(main())
"""
