"""Tables for people: aligned text, Markdown, mean and deviation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["aligned", "columns", "markdown", "mean_and_deviation"]


def mean_and_deviation(values: Sequence[float], form: str) -> str:
    """1.234 for one value, 1.234±0.012 for several (the sample's standard deviation), - for none."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):{form}}"
    return mean if len(values) == 1 else f"{mean}±{statistics.stdev(values):{form}}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of equally many cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    )


def columns(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as aligned text with a head."""
    return aligned([list(rows[0]), *([str(value) for value in row.values()] for row in rows)]) if rows else ""


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table, padded to read well as text; floats get three digits."""

    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    head = list(rows[0])
    cells = [head, *([cell(row[key]) for key in head] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
