"""Files that an interrupted run goes on from: written whole or not at all, and read only by the run that wrote them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["read", "write"]


def write(path: Path, run: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Saves tensors and plain values, and what describes the run (JSON values); replaces the file at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            torch.save({**state, "run": json.dumps(run)}, temporary)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, run: Mapping[str, Any], kind: str, device: torch.device) -> dict[str, Any] | None:
    """What `write` saved for this very run; None where there is no file.

    kind: what the file is called in messages, such as "training".
    Raises ValueError for a damaged file, or one of another run, naming the first thing that differs.
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
            raise ValueError(
                f"{path} is of another run: {key} is {there.get(key)} there and {value} here; delete it to start again"
            )
    return state
