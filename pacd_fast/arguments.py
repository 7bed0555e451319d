"""Checks of numbers and paths that a caller gives: each raises an error of one line that says what to give instead."""

from __future__ import annotations

import math
import numbers
import os
from pathlib import Path

__all__ = ["at_least", "not_negative", "positive", "seed_in_range", "writable"]


def positive(name: str, value: float) -> None:
    """Raises ValueError unless value is a finite number above 0."""
    if not (isinstance(value, numbers.Real) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, not {value}")


def not_negative(name: str, value: float) -> None:
    """Raises ValueError unless value is a finite number from 0."""
    if not (isinstance(value, numbers.Real) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, not {value}")


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
