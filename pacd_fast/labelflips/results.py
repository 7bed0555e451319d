"""The file of label-flip certificates, one row per test point and certificate: its table and its picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pacd_fast import plots
from pacd_fast.unfinished import replaced

COLUMNS = (
    "idx",
    "label",
    "predict",
    "correct",
    "flips",
    "log_tail",
    "certificate",
    "q",
    "l2",
    "classes",
    "n",
    "constant",
    "data",
)
_CURVE = ("data", "certificate", "q", "l2", "classes", "n")  # what one curve's rows have in common
FLIPS = (1, 10, 50, 100, 200, 500, 1000, 2000)
ATTACKED, UNDEFENDED = "attacked", "undefended"


def write(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """The rows as a .tsv; FileNotFoundError where its folder does not exist."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; create it first")
    with replaced(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, dialect="excel-tab", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def is_flip_file(path: str | Path) -> bool:
    """Whether a file starts with our header."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline().rstrip("\n").split("\t") == list(COLUMNS)
    except OSError:
        return False


@dataclass(frozen=True)
class Curve:
    """One certificate at one q: arrays [m] over its test points."""

    certificate: str
    q: float
    l2: float
    correct: np.ndarray
    flips: np.ndarray
    n: int
    constant: float
    data: str

    @property
    def name(self) -> str:
        return self.certificate if self.certificate in ("ridge", UNDEFENDED) else f"{self.certificate}, q = {self.q:g}"

    def accuracy(self, r: int) -> float:
        return float(np.mean(self.correct & (self.flips >= r)))


def read(paths: Sequence[str | Path]) -> list[Curve]:
    """The curves of .tsv files, in their order. ValueError for a file that is not one of ours, with its line."""
    groups: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for path in paths:
        if not is_flip_file(path):
            raise ValueError(f"{path} is not a file of label-flip certificates (its header is not {' '.join(COLUMNS)})")
        with open(path, newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file, dialect="excel-tab"), 2):
                if None in row or None in row.values():
                    raise ValueError(f"{path}, line {number}: expected {len(COLUMNS)} fields")
                group = groups.setdefault(tuple(row[name] for name in _CURVE), {})
                if group.get(row["idx"], row) != row:
                    raise ValueError(
                        f"{path}, line {number}: another certificate of point {row['idx']} was read before"
                    )
                group[row["idx"]] = row
    curves = []
    for (data, certificate, q, *_), points in groups.items():
        rows = list(points.values())
        try:
            curves.append(
                Curve(
                    certificate,
                    float(q),
                    float(rows[0]["l2"]),
                    np.array([row["correct"] == "1" for row in rows]),
                    np.array([int(row["flips"]) for row in rows]),
                    int(rows[0]["n"]),
                    float(rows[0]["constant"]),
                    data,
                )
            )
        except ValueError as error:
            raise ValueError(f"{data}, {certificate}, q = {q}: {error}") from error
    return curves


def cells(curve: Curve, flips: Sequence[int] = FLIPS) -> dict[str, str]:
    """A curve's line of the table, by the names of its columns."""
    return {
        "data": curve.data,
        "certificate": curve.certificate,
        "q": f"{curve.q:g}" if curve.q else "-",
        "l2": f"{curve.l2:.4g}" if curve.l2 else "-",
        "points": str(len(curve.flips)),
        "accuracy": f"{curve.accuracy(0):.4f}",
        "median": f"{np.median(curve.flips):g}",
        **{str(r): f"{curve.accuracy(r):.3f}" for r in flips},
    }


def table(curves: Sequence[Curve], flips: Sequence[int] = FLIPS) -> str:
    """A Markdown table: accuracy, median flips of all points, certified accuracy at each number of flips."""
    head = ["data", "certificate", "q", "l2", "points", "accuracy", "median", *map(str, flips)]
    ruler = ["---"] * 2 + ["---:"] * (len(head) - 2)
    lines = [head, ruler, *([cells(curve, flips)[name] for name in head] for curve in curves)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summarize(paths: Sequence[str | Path], flips: Sequence[int] | None, as_json: bool) -> None:
    """Prints the table of files of certificates, or the same as JSON."""
    curves, flips = read(paths), FLIPS if flips is None else flips
    if not as_json:
        print(table(curves, flips))
        return
    found = [
        {
            "data": c.data,
            "certificate": c.certificate,
            "q": c.q,
            "l2": c.l2,
            "points": len(c.flips),
            "n": c.n,
            "accuracy": c.accuracy(0),
            "constant": c.constant,
            "median_flips": float(np.median(c.flips)),
            "certified_accuracy": {str(r): c.accuracy(r) for r in flips},
        }
        for c in curves
    ]
    print(json.dumps(found, indent=2))


def draw(curves: Sequence[Curve], out: str | Path, title: str | None = None) -> None:
    """The picture of one data set's curves; see `plots.flip_curves`."""
    if len({curve.data for curve in curves}) > 1:
        raise ValueError("the files are of different data sets: draw each by itself")
    certified = [curve for curve in curves if curve.certificate not in (ATTACKED, UNDEFENDED)]
    undefended = next((curve for curve in curves if curve.certificate == UNDEFENDED), None)
    if not certified:
        raise ValueError("no label-flip certificates to draw")
    plots.flip_curves(
        {curve.name: (curve.flips[curve.correct], curve.accuracy(0)) for curve in certified},
        certified[0].n,
        out,
        constant=certified[0].constant,
        attacked=None if undefended is None else np.where(undefended.correct, undefended.flips, -1),
        title=title,
    )
