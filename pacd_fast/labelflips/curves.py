"""Certified accuracy against label flips, from files of certificates: curves and their table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pacd_fast.labelflips.results import KINDS, NOISELESS, Group, Point, read_rows
from pacd_fast.tables import markdown

__all__ = ["CONDITIONAL", "FLIPS", "Curve", "flips_cells", "read_flips", "flips_summary", "flips_table"]

FLIPS = (1, 10, 50, 100, 200, 500, 1000, 2000)
CONDITIONAL = (
    "conditional: l2 was computed from the labels (l2 = paper); these certificates hold only against an attacker who "
    "leaves it as it is"
)


@dataclass(frozen=True)
class Curve:
    """One certificate at one q, over its test points.

    Attributes:
        certificate, q, l2, conditional: as in `Row`.
        correct: bool [m]; flips: int64 [m]; idx: int64 [m], ascending.
        n, data: as in `Run`, data without its fingerprint.
        constant: accuracy of the best constant classifier on these points.
    """

    certificate: str
    q: float
    l2: float
    conditional: bool
    idx: np.ndarray
    correct: np.ndarray
    flips: np.ndarray
    n: int
    constant: float
    data: str

    @property
    def name(self) -> str:
        name = self.certificate if self.certificate in NOISELESS else f"{self.certificate}, q = {self.q:g}"
        return f"{name} (conditional)" if self.conditional else name

    def accuracy(self, r: int) -> float:
        return float(np.mean(self.correct & (self.flips >= r)))


def read_flips(paths: Sequence[str | Path]) -> list[Curve]:
    """The curves of files, by data, q and certificate; errors as those of `results.read_rows`.

    A point may be in several files if its row is the same; else ValueError.
    """
    merged: dict[Group, dict[int, Point]] = {}
    for path in paths:
        for group, points in read_rows(path).items():
            known = merged.setdefault(group, {})
            for idx, point in points.items():
                # repr, because NaN is not equal to itself
                if repr(known.setdefault(idx, point)) != repr(point):
                    raise ValueError(f"{path}: another certificate of point {idx} was read before")
    curves = []
    for (run, certificate, q, l2, conditional), points in merged.items():
        order = np.array(sorted(points), dtype=np.int64)
        label, predict, flips = (np.array([points[i][j] for i in order.tolist()], dtype=np.int64) for j in range(3))
        data, constant = run.data.rpartition("@")[0] or run.data, float(np.mean(label == run.majority))
        curves.append(Curve(certificate, q, l2, conditional, order, label == predict, flips, run.n, constant, data))
    return sorted(curves, key=lambda c: (c.data, c.certificate in NOISELESS, c.q, KINDS.index(c.certificate), c.l2))


def flips_cells(curve: Curve, flips: Sequence[int] = FLIPS) -> dict[str, str]:
    """A curve's line of the table, by the names of its columns."""
    return {
        "data": curve.data,
        "certificate": curve.certificate + (" (conditional)" if curve.conditional else ""),
        "q": f"{curve.q:g}" if curve.q else "-",
        "l2": f"{curve.l2:.4g}" if curve.l2 else "-",
        "points": str(len(curve.flips)),
        "accuracy": f"{curve.accuracy(0):.4f}",
        "median": f"{np.median(curve.flips):g}",
        **{str(r): f"{curve.accuracy(r):.3f}" for r in flips},
    }


def flips_table(curves: Sequence[Curve], flips: Sequence[int] = FLIPS, form: Callable[[Any], str] = markdown) -> str:
    """Accuracy, median flips of all points, certified accuracy at each number of flips: Markdown, or tables.columns.

    A line below says what conditional certificates are worth, where there are any.
    """
    text = form([flips_cells(curve, flips) for curve in curves])
    return f"{text}\n\n{CONDITIONAL}" if any(curve.conditional for curve in curves) else text


def flips_summary(paths: Sequence[str | Path], flips: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """What the table of these files says, as plain values for JSON."""
    return [
        {
            "data": c.data,
            "certificate": c.certificate,
            "conditional": c.conditional,
            "q": c.q,
            "l2": c.l2,
            "points": len(c.flips),
            "n": c.n,
            "accuracy": c.accuracy(0),
            "constant": c.constant,
            "median_flips": float(np.median(c.flips)),
            "certified_accuracy": {str(r): c.accuracy(r) for r in flips or FLIPS},
        }
        for c in read_flips(paths)
    ]
