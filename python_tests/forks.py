"""A function in a fork of this process: what is killed, or measured, and need not import torch again.

Not for what trains: where there is a CUDA device, torch refuses to differentiate in a fork.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


class Fork:
    """Runs `function`, whose int is the exit code; what it prints goes to a file, or to the descriptor `out`."""

    def __init__(self, function: Callable[[], int | None], log: Path, out: int | None = None):
        self.log, self.code = log, None
        log.write_bytes(b"")  # there before anybody asks
        self.id = os.fork()
        if self.id:
            return
        code = 70
        signal.alarm(300)  # whatever becomes of the test
        try:
            said = os.open(log, os.O_WRONLY | os.O_APPEND)
            os.dup2(said if out is None else out, 1)
            os.dup2(said, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
            torch.set_num_threads(1)  # a fork has none of the parent's threads
            code = function() or 0
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def running(self) -> bool:
        if self.code is None:
            done, status = os.waitpid(self.id, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if done else None
        return self.code is None

    def kill(self) -> None:
        """SIGKILL, which it must still be running for."""
        assert self.running(), f"it ended with {self.code} before it could be killed: {self.said()}"
        os.kill(self.id, signal.SIGKILL)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.id, 0)[1])
        assert self.code == -signal.SIGKILL

    def ended(self, limit: float = 120.0) -> str:
        """What it printed, once it has ended with 0."""
        until = time.monotonic() + limit
        while self.running():
            if time.monotonic() > until:
                self.kill()
                pytest.fail("it does not end: " + self.said())
            time.sleep(0.002)
        assert self.code == 0, self.said()
        return self.said()

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")
