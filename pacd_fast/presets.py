"""What every preset of `reproduce` is made of: the chain of commands, the row in the results file, the machine."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

__all__ = ["Main", "Preset", "add_row", "chain", "machine"]

Main = Callable[[Sequence[str]], int]
"""The command line as a function, `pacd_fast.__main__.main`."""


@dataclass(frozen=True)
class Preset:
    """What it does in a line, its flags, and its run; run(options, main) returns an exit status."""

    text: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Main], int]


def chain(main: Main, command: Sequence[object], echo: bool = True) -> str:
    """Runs one pacd-fast command, after printing it as one would type it; stops the preset where it fails.

    Returns what the command printed; with echo it is printed too.
    """
    arguments = [str(part) for part in command]
    print(f"+ pacd-fast {shlex.join(arguments)}", file=sys.stderr, flush=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(arguments)
    if echo:
        print(printed.getvalue(), end="", flush=True)
    if status != 0:
        raise ValueError(f"the step `pacd-fast {arguments[0]}` did not finish; run the same command again to go on")
    return printed.getvalue()


def machine(device: str = "cpu") -> str:
    """The device in words: model, cores, threads in use."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    model, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _natural(text: str) -> list[str | float]:
    """A key that sorts numbers in a text by their size: 3% before 10%."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [float(part) if i % 2 else part for i, part in enumerate(parts)]


def add_row(path: str | Path, table: str, key: Sequence[str], row: dict[str, Any], device: str = "cpu") -> None:
    """Puts a row into one table of a results file, in the place of the row with the same values under `key`.

    The file is that of benchmarks/: {table: {machine, torch, date, rows}}.  Raises ValueError where it is not.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        rows = content.get(table, {}).get("rows", [])
        rows = [other for other in rows if any(other.get(name) != row[name] for name in key)]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a results file of benchmarks ({error}); give another --results") from error
    rows = sorted([*rows, row], key=lambda each: [_natural(str(each.get(name))) for name in key])
    content[table] = {
        "machine": machine(device),
        "torch": torch.__version__,
        "date": str(date.today()),
        "rows": rows,
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
