"""What torchrun does to its processes, for tests: forks with its environment and store, stopped when one fails."""

from __future__ import annotations

import faulthandler
import os
import signal
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

from pacd_fast.cli import main
from pacd_fast.networks import build, save_checkpoint
from pacd_fast.randomness import seeded
from pacd_fast.ranks import Ranks

GLOO = dist.is_available() and dist.is_gloo_available()
trains = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a card, torch cannot train in a fork")

CERTIFY = ["certify", "--sigma", "0.5", "--n", "300", "--count", "16", "--seed", "7", "--device", "cpu"]
CERTIFY += ["--checkpoint", "model.safetensors", "--data", "digits.npz"]


def prepared(path: Path) -> Path:
    """A folder with model.safetensors, other.safetensors, digits.npz, which are noise, and certified.tsv."""
    images = np.random.default_rng(0).integers(0, 256, (200, 1, 28, 28), dtype=np.uint8)
    labels = np.arange(200) % 10
    np.savez(path / "digits.npz", x_train=images, x_test=images[::-1], y_train=labels, y_test=labels)
    metadata = {"architecture": "mnist-cnn", "num_classes": "10", "in_channels": "1", "image_size": "28x28"}
    for seed, name in enumerate(("model", "other")):
        with seeded(torch.device("cpu"), seed):
            network = build("mnist-cnn", num_classes=10, in_channels=1, image_size=(28, 28))
        save_checkpoint(path / f"{name}.safetensors", network, metadata)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert main([*CERTIFY, "--out", "certified.tsv"]) == 0
    return path


def rows(path: Path) -> list[list[str]]:
    """A results file without its last column, the time."""
    return [line.split("\t")[:-1] for line in path.read_text().splitlines()]


class Agent:
    """What torchrun is to its processes, with forks: they need not import torch again."""

    def __init__(self, folder: Path, size: int):
        self.store = dist.TCPStore("localhost", 0, None, True, timedelta(seconds=60), False)
        self.folder, self.size, self.attempt = folder, size, -1
        self.running: dict[int, int] = {}  # rank: process id

    def start(self, function: Callable[[int], int]) -> None:
        self.attempt += 1
        # They begin when all are there: while the store's thread looks up who called, it holds a lock of the C library,
        # and a fork that happens then waits for that lock for ever.
        waiting, opened = os.pipe()
        for rank in range(self.size):
            (self.folder / f"log{rank}").touch()  # there before anybody asks
            child = os.fork()
            if child:
                self.running[rank] = child
                continue
            code = 70
            signal.alarm(300)  # whatever becomes of the test
            os.close(opened)
            os.read(waiting, 1)
            try:
                log = os.open(self.folder / f"log{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                faulthandler.dump_traceback_later(200, file=sys.stderr)  # before `ended` loses patience
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
            except SystemExit as end:
                code = int(end.code or 0)
            except Exception:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(opened)
        os.close(waiting)

    def kill(self, signal_number: int = signal.SIGKILL, ranks: Sequence[int] | None = None) -> None:
        for rank in list(self.running) if ranks is None else ranks:
            os.kill(self.running[rank], signal_number)
        for rank in list(self.running) if ranks is None else ranks:
            os.waitpid(self.running.pop(rank), 0)

    def ended(self, limit: float = 240.0) -> list[int]:
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
