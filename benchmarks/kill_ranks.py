"""A certification whose processes are killed: the whole run three times, then ten times a rank of torchrun's.

    python -m benchmarks.kill_ranks

Kills are SIGKILL, at a random moment within two seconds after a new row.  The file must be that of a process that
nobody disturbed, but for times.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.report import record
from pacd_fast.cli import main as pacd_fast
from pacd_fast.networks import build, save_checkpoint
from pacd_fast.randomness import seeded

WHOLE, RANKS = 3, 10
SIZES = (2, 3, 2, 3)  # processes of a run; the last run is the one whose ranks are killed


def rows(*files: Path) -> dict[str, list[str]]:
    """By image: the columns but the last, the time."""
    lines = [line for file in files if file.exists() for line in file.read_text().split("\n")[1:-1]]
    return {line.split("\t")[0]: line.split("\t")[:-1] for line in lines}


def ranks_of(run: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of torchrun's children."""
    try:
        return [int(child) for child in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


class Run:
    """torchrun on one file."""

    def __init__(self, out: Path, command: list[str]):
        self.out, self.command = out, command

    def start(self, size: int, restarts: int) -> None:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        words += ["--max-restarts", str(restarts), "-m", "--", "pacd_fast", *self.command, "--out", str(self.out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.out.with_suffix(".log"), "ab") as log:
            self.torchrun = subprocess.Popen(words, stdout=log, stderr=log, env=environment)

    def there(self) -> int:
        return len(rows(self.out, *self.out.parent.glob(f"{self.out.name}.rank*")))

    def wait_for_a_row(self) -> int:
        """And up to two seconds more; how many are there then."""
        before = self.there()
        while self.there() == before and self.torchrun.poll() is None:
            time.sleep(0.02)
        time.sleep(random.uniform(0, 2))
        return self.there()

    def kill(self, *processes: int) -> None:
        if self.torchrun.poll() is not None:
            raise RuntimeError(
                f"the run ended before it was killed: {self.out.with_suffix('.log').read_text()[-2000:]}"
            )
        for process in processes:
            os.kill(process, signal.SIGKILL)


def killed(folder: Path, images: int, n: int) -> list[dict[str, object]]:
    """Runs it all in an empty folder; what was there at every kill.  Raises RuntimeError where the file differs."""
    with seeded(torch.device("cpu"), 0):
        network = build("mnist-cnn", num_classes=10, in_channels=1, image_size=(28, 28))
    metadata = {"architecture": "mnist-cnn", "num_classes": "10", "in_channels": "1", "image_size": "28x28"}
    save_checkpoint(folder / "model.safetensors", network, metadata)
    command = ["certify", "--checkpoint", str(folder / "model.safetensors"), "--data", "mnist5k", "--sigma", "0.5"]
    command += ["--n", str(n), "--count", str(images), "--seed", "7", "--device", "cpu", "--batch-size", "256"]
    command += ["--compile", "no"]
    began = time.perf_counter()
    if pacd_fast([*command, "--out", str(folder / "undisturbed.tsv")]):
        raise RuntimeError("the undisturbed run failed")
    expected, alone = rows(folder / "undisturbed.tsv"), time.perf_counter() - began
    run, found, began = Run(folder / "results.tsv", command), [], time.perf_counter()

    def note(what: str, there: int) -> None:
        seconds = time.perf_counter() - began
        found.append({"killed": what, "rows before": there, "rows after": run.there(), "after, s": f"{seconds:.0f}"})
        if run.there() < there:
            raise RuntimeError(f"rows were lost: {found[-1]}")

    for size in SIZES[:WHOLE]:
        run.start(size, 0)
        there = run.wait_for_a_row()
        run.kill(run.torchrun.pid, *ranks_of(run.torchrun))
        run.torchrun.wait()
        note(f"the whole run, {size} ranks", there)
    run.start(SIZES[-1], RANKS)
    for _ in range(RANKS):
        there = run.wait_for_a_row()
        victim = random.randrange(SIZES[-1])
        process = ranks_of(run.torchrun)[victim]
        run.kill(process)
        note(f"rank {victim} of {SIZES[-1]}", there)
        while process in ranks_of(run.torchrun):
            time.sleep(0.02)
    if run.torchrun.wait():
        raise RuntimeError(run.out.with_suffix(".log").read_text()[-3000:])
    if rows(run.out) != expected or list(rows(run.out)) != list(expected) or len(expected) != images:
        raise RuntimeError("the file is not that of the undisturbed run")
    seconds = f"{time.perf_counter() - began:.0f}"
    found.append({"killed": "-, equal to the file of one process", "rows before": images, "rows after": images})
    found[-1] |= {"after, s": f"{seconds} (one process: {alone:.0f})"}
    return found


def main() -> None:
    images, n = (int(number) for number in sys.argv[1:] or (200, 10_000))
    with tempfile.TemporaryDirectory() as folder:
        record("killed ranks", killed(Path(folder), images, n))


if __name__ == "__main__":
    main()
