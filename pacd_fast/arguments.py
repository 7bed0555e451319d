"""Numbers and paths that a caller gives: texts read, and checks with an error of one line that says what to give."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from pathlib import Path
from typing import Any

__all__ = [
    "at_least",
    "not_negative",
    "number",
    "option",
    "positive",
    "seed_in_range",
    "whole",
    "whole_number",
    "writable",
]


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


def writable(path: str | os.PathLike[str]) -> Path:
    """The path of a file that can be written: its folder is there, and it is no folder itself.

    Raises FileNotFoundError or ValueError.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    return path


def whole_number(text: str) -> int:
    """A whole number as one types it: 100000, 100_000 or 1e5.  Raises ValueError; for command lines."""
    if len(text) > 40 or not text.isascii():
        raise ValueError(f"{text[:40]!r} is not a whole number")
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not (math.isfinite(value) and abs(value) < 2**63 and value == int(value)):
            raise ValueError(f"{text!r} is not a whole number") from None
        return int(value)


def number(text: str) -> float:
    """A number, or a quotient such as 16/255.  Raises ValueError; for command lines."""
    above, slash, below = text.partition("/")
    try:
        return float(above) / (float(below) if slash else 1.0)
    except ZeroDivisionError as error:
        raise ValueError(f"{text!r} is no number and no quotient such as 16/255") from error


def option(default: Any, text: str, **more: Any) -> Any:
    """A field of a dataclass of settings whose flag on the command line has this help text.

    more: "choices", "flag" (its name, where it is not the field's) or "metavar".
    """
    return dataclasses.field(default=default, metadata={"help": text, **more})
