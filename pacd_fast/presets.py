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

from pacd_fast import ops
from pacd_fast.unfinished import AnotherRun, replaced

__all__ = ["Help", "Main", "Preset", "add_row", "chain", "device_of", "machine"]

Main = Callable[[Sequence[str]], int]
"""The command line as a function, which returns an exit status and raises what goes wrong."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False
        return action.help if none else super()._get_help_string(action)


@dataclass(frozen=True)
class Preset:
    """What it does in a line, its flags, and its run; run(options, main) returns an exit status."""

    text: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Main], int]


def chain(main: Main, command: Sequence[object], echo: bool = True) -> str:
    """Runs one pacd-fast command, after printing it as one would type it; what goes wrong in it stops the preset.

    Returns what the command printed; with echo it is printed too.
    """
    arguments = [str(part) for part in command]
    print(f"+ pacd-fast {shlex.join(arguments)}", file=sys.stderr, flush=True)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            status = main(arguments)
    except AnotherRun as error:
        raise ValueError(f"{error}; or give another --work") from error
    finally:
        if echo:
            print(printed.getvalue(), end="", flush=True)
    if status != 0:
        raise ValueError(f"the step `pacd-fast {arguments[0]}` ended with exit code {status}")
    return printed.getvalue()


def device_of(name: str) -> torch.device:
    """cpu, cuda, cuda:i, or auto: CUDA where a device and our operators are there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and ops.cuda_library == "loaded" else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: give cpu, cuda or cuda:i") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device can be used here; give --device cpu")
    if device.type == "cuda" and ops.cuda_library != "loaded":
        raise ValueError(f"the CUDA operators are {ops.cuda_library}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: give cpu, cuda or cuda:i")
    return device


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
    The file is that of benchmarks/: {table: {machine, torch, date, rows}}.  Raises ValueError where it is not.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        rows = content.get(table, {}).get("rows", [])
        before = [other for other in rows if all(other.get(name) == row[name] for name in key)]
        if most is not None and any(other[most] > row[most] for other in before):
            return False
        rows = [other for other in rows if other not in before]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a results file of benchmarks ({error}); give another --results") from error
    rows = sorted([*rows, row], key=lambda each: [_natural(str(each.get(name))) for name in key])
    content[table] = {
        "machine": machine(device),
        "torch": torch.__version__,
        "date": str(date.today()),
        "rows": rows,
    }
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return True
