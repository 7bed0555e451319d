"""Files that are written whole or not at all, and those that an interrupted run goes on from, and no other run."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["AnotherRun", "keep_lines", "read", "replaced", "restore", "write"]


class AnotherRun(ValueError):
    """A file that is there belongs to a run with other settings."""


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Where to write what is to stand at path: it gets there at the end, at once, or not at all after an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, run: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Saves tensors and plain values, and what describes the run (JSON values); replaces the file at once."""
    with replaced(path) as temporary:
        try:
            torch.save({**state, "run": json.dumps(run)}, temporary)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error


def read(path: Path, run: Mapping[str, Any], kind: str, device: torch.device) -> dict[str, Any] | None:
    """What `write` saved for this very run; None where there is no file.

    kind: what the file is called in messages, such as "training".
    Raises ValueError for a damaged file, and AnotherRun, naming the first thing that differs.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
        there, here = json.loads(state["run"]), json.loads(json.dumps(run))
    except Exception as error:  # a damaged file fails in many ways, and all mean the same
        raise ValueError(
            f"{path} is not a {kind} checkpoint ({type(error).__name__}); delete it to start again"
        ) from error
    for key, value in here.items():
        if there.get(key) != value:
            raise AnotherRun(
                f"{path} is of another run: {key} is {there.get(key)} there and {value} here; delete it to start again"
            )
    return state


def restore(path: Path, network: nn.Module, weights: Any, optimizer: torch.optim.Optimizer, moments: Any) -> None:
    """Puts what a file holds into a network and its optimiser; AnotherRun where they are others."""
    try:
        network.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    except (RuntimeError, ValueError) as error:
        raise AnotherRun(f"{path} is of another network; delete it to start again") from error


def keep_lines(path: Path, epochs: int) -> None:
    """Leaves the lines of the first epochs in a metrics file: a run that starts or goes on writes the others again."""
    if path.exists() and not path.is_file():
        return  # /dev/stdout, say
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    if lines and not lines[0].startswith('{"epoch"'):
        raise ValueError(f"{path} is there and no file of metrics; give another name")
    path.write_text("".join(f"{line}\n" for line in lines[:epochs]), encoding="utf-8")
