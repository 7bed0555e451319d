"""Numbers and paths that a caller gives: texts read, and checks with an error of one line that says what to give."""

from __future__ import annotations

import argparse
import dataclasses
import math
import numbers
import os
import re
import stat
from pathlib import Path
from typing import Any

__all__ = [
    "DTYPES",
    "NotANumber",
    "at_least",
    "not_negative",
    "number",
    "one_line",
    "option",
    "positive",
    "readable",
    "seed_in_range",
    "whole",
    "whole_number",
    "writable",
]


DTYPES = ("float32", "bfloat16")
"""What a network's passes may run in, by name."""


class NotANumber(argparse.ArgumentTypeError, ValueError):
    """A text that is not the number it should be; argparse shows these words, and not the name of a function."""


def positive(name: str, value: float) -> None:
    """Raises ValueError unless value is a finite number above 0."""
    if not (isinstance(value, numbers.Real) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, not {value}")


def not_negative(name: str, value: float) -> None:
    """Raises ValueError unless value is a finite number from 0."""
    if not (isinstance(value, numbers.Real) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, not {value}")


def whole(name: str, value: Any) -> int:
    """value as an int where it is a whole number, 1e5 as well.  Raises ValueError."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if not isinstance(value, float) or not value.is_integer():
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    return int(value)


def at_least(name: str, value: int, least: int) -> None:
    """Raises ValueError unless value is a whole number from `least`."""
    if not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


def seed_in_range(seed: int) -> None:
    """Raises ValueError unless seed is a whole number in [0, 2^63)."""
    if not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2^63), not {seed}")


def readable(path: str | os.PathLike[str], kind: str = "file") -> Path:
    """The path of a regular file, or of a link to one, without opening it: a device or a FIFO may never end.

    kind: what the file should be, in messages, such as "results file".
    Raises FileNotFoundError or ValueError.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{path}: no such {kind}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {_irregular(mode)}, not a {kind}")
    return path


def writable(path: str | os.PathLike[str]) -> Path:
    """The path of a regular file that can be written, or that can be made: its folder is there.

    Raises FileNotFoundError or ValueError.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; create it first")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return path
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {_irregular(mode)}; give the name of a file")
    return path


def _irregular(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def one_line(text: object, limit: int = 1000) -> str:
    """A text in one line that a terminal can show: no control sequences, cut between words.

    limit: characters at most, and a few for the dots that say that it was cut.
    """
    plain = re.sub(r"\x1b\[[0-9;?]*[ -/]*[@-~]", "", str(text))
    line = "".join(c if c.isprintable() else "?" for c in " ".join(plain.split()))
    if len(line) <= limit:
        return line
    return (line[: limit + 1].rpartition(" ")[0] or line[:limit]) + " ..."


def whole_number(text: str) -> int:
    """A whole number as one types it: 100000, 100_000 or 1e5, within 64 bits.  Raises NotANumber; for command lines."""
    value = math.nan
    if len(text) <= 40 and text.isascii():
        try:
            value = int(text)
        except ValueError:
            try:
                value = float(text)
            except ValueError:
                pass
    if not math.isfinite(value) or value != int(value):
        raise NotANumber(f"{one_line(text, 40)!r} is not a whole number")
    if not -(2**63) <= value < 2**63:
        raise NotANumber(f"{text} is beyond 64 bits")
    return int(value)


def number(text: str) -> float:
    """A number, or a quotient such as 16/255.  Raises NotANumber; for command lines."""
    above, slash, below = text.partition("/")
    try:
        if len(text) > 80 or not text.isascii():
            raise ValueError
        return float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError) as error:
        raise NotANumber(f"{one_line(text, 40)!r} is no number and no quotient such as 16/255") from error


def option(default: Any, text: str, **more: Any) -> Any:
    """A field of a dataclass of settings whose flag on the command line has this help text.

    more: "choices", "flag" (its name, where it is not the field's) or "metavar".
    """
    return dataclasses.field(default=default, metadata={"help": text, **more})
