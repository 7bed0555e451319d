"""The file of measured tables: {table: {machine, torch, date, commit, rows}}; machine and commit in words."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pacd_fast.files import read_json, replaced


def machine(device: str = "cpu") -> str:
    """The device in words: model, cores, threads in use."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    model, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


@cache
def commit() -> str:
    """The commit of the checkout that this package lies in, with a + where its code differs from it.

    Elsewhere, installed from a wheel say, its version.  Asked before a run, it stays the one that runs, wherever the
    checkout goes meanwhile.
    """
    here = Path(__file__)

    def git(*words: str) -> str:
        line = ["git", "-C", str(here.parent), *words]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # An environment that lies in another project's checkout is none of ours.
        git("ls-files", "--error-unmatch", here.name)
        code = (":/pacd_fast", ":/csrc", ":/cmake", ":/CMakeLists.txt", ":/benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", *code) else "")
    except (OSError, subprocess.CalledProcessError):
        return version("pacd_fast")


def _natural(text: str) -> list[str | float]:
    """A key that sorts numbers in a text by their size: 3% before 10%."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [float(part) if i % 2 else part for i, part in enumerate(parts)]


def write_table(path: str | Path, table: str, rows: Sequence[dict[str, Any]], device: str = "cpu") -> None:
    """Puts a whole table into a results file; the other tables stay as they are."""
    path = Path(path)
    content = read_json(path, "results file of benchmarks") if path.exists() else {}
    content[table] = {
        "machine": machine(device),
        "torch": torch.__version__,
        "date": str(date.today()),
        "commit": commit(),
        "rows": list(rows),
    }
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def add_row(
    path: str | Path,
    table: str,
    key: Sequence[str],
    row: dict[str, Any],
    device: str = "cpu",
    most: str | None = None,
) -> bool:
    """Puts a row into one table of a results file, in the place of the row with the same values under `key`.

    most: a column by which a row does not give way to one with less; then nothing is written, and the result is False.
    Raises ValueError where the file is not a results file.
    """
    path = Path(path)
    try:
        content = read_json(path, "results file of benchmarks") if path.exists() else {}
        rows = content.get(table, {}).get("rows", [])
        before = [other for other in rows if all(other.get(name) == row[name] for name in key)]
        if most is not None and any(other[most] > row[most] for other in before):
            return False
        rows = [other for other in rows if other not in before]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a results file of benchmarks ({error}); give another --results") from error
    write_table(path, table, sorted([*rows, row], key=lambda r: [_natural(str(r.get(name))) for name in key]), device)
    return True
