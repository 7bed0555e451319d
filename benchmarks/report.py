"""Timing side by side, results.json, and the tables that README takes from it."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results.json"
README = Path(__file__).parent.parent / "README.md"


def medians(functions: dict[str, Callable[[], object]], rounds: int = 15, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each function, all of them in turn in every round, so that a slow moment hits them all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + warmup):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def machine(device: str = "cpu") -> str:
    """The device in words: model, cores, threads in use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def table(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table; floats get three digits."""

    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    head = list(rows[0])
    cells = [head, *([cell(row[key]) for key in head] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def record(name: str, rows: list[dict[str, Any]], device: str = "cpu") -> None:
    """Prints the rows, puts them into results.json under (name, device), and renews README's tables."""
    where = machine(device)
    print(f"\n{name} ({where}, torch {torch.__version__}, {date.today()})\n{table(rows)}", flush=True)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    key = name if device == "cpu" else f"{name} on {device}"
    results[key] = {"machine": where, "torch": torch.__version__, "date": str(date.today()), "rows": rows}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    renew_readme(results)


def renew_readme(results: dict[str, Any]) -> None:
    """Rewrites what stands between <!-- results: NAME --> and <!-- end --> in README, for every NAME recorded."""
    text = README.read_text(encoding="utf-8")
    for name, result in results.items():
        start = f"<!-- results: {name} -->"
        if start not in text:
            continue
        before, rest = text.split(start, 1)
        after = rest.split("<!-- end -->", 1)[1]
        note = f"{result['machine']}, torch {result['torch']}, {result['date']}"
        text = f"{before}{start}\n{table(result['rows'])}\n\n{note}\n<!-- end -->{after}"
    README.write_text(text, encoding="utf-8")
