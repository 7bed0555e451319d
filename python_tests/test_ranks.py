"""Certification by several processes: what one writes, whoever is killed; refused where the processes differ."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from torchrun_agent import CERTIFY, GLOO, Agent, rows, together
from tqdm import tqdm

from pacd_fast.certification import ResultsFile, rank_files, sampler
from pacd_fast.certification.sharing import SharedSamples
from pacd_fast.cli import main
from pacd_fast.ranks import Ranks

pytestmark = [pytest.mark.skipif(not GLOO, reason="this torch has no gloo"), pytest.mark.usefixtures("there")]


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


@pytest.mark.parametrize("share", ["images", "samples"])
def test_batches_that_run_ahead_of_their_votes(share, folder, tmp_path):
    """As on a card, whose votes the host sees two batches later."""
    out = tmp_path / "results.tsv"

    def function(rank: int) -> int:
        sampler.AHEAD["cpu"] = 2
        return main([*CERTIFY, "--share", share, "--out", str(out)])

    agent = Agent(tmp_path, 2)
    agent.start(function)
    assert agent.ended() == [0, 0], agent.said()
    assert rows(out) == rows(folder / "certified.tsv")


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

    def slowly(rank: int) -> int:
        """A rank that is still at work when its first row is seen, on a machine of any speed."""
        append = ResultsFile.append

        def waiting(self: ResultsFile, row: object) -> None:
            append(self, row)
            time.sleep(0.2)

        ResultsFile.append = waiting
        return main(command)

    agent, cut_short = Agent(tmp_path, 2), 0
    for turn in range(13):
        agent.size, before = 2 + turn % 2, written()
        agent.start(slowly)
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


def test_a_rank_that_is_killed_while_it_writes_its_bar_stops_no_other(tmp_path):
    agent = Agent(tmp_path, 2)

    def held(rank: int) -> int:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    agent.start(held)
    assert all(agent.ended())
    assert together(tmp_path, 2, [*CERTIFY, "--out", tmp_path / "results.tsv"])[0] == [0, 0]


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
