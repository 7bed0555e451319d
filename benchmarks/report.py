"""Timing side by side, results.json, and the pages that take their tables from it: python -m benchmarks.report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from pacd_fast.experiments import machine, write_table
from pacd_fast.tables import markdown

RESULTS = Path(__file__).parent / "results.json"
PAGES = (Path(__file__).parent / "README.md", Path(__file__).parent.parent / "README.md")


CALLS = 20  # between two events on a card, where one call with a wait behind it takes 20 to 30 us whatever it does


def medians(
    functions: dict[str, Callable[[], object]], rounds: int = 15, warmup: int = 2, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds of each function, all of them in turn in every round, so that a slow moment hits them all.

    device: where all of them run, if that is a card; else the host's clock is asked, and a card waited for.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + warmup):
        for name, function in functions.items():
            seconds = seconds_on_card(function) if device.startswith("cuda") else seconds_on_host(function)
            if i >= warmup:
                times[name].append(seconds)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def seconds_on_host(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def seconds_on_card(function: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(CALLS):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / CALLS


def record(name: str, rows: list[dict[str, Any]], device: str = "cpu") -> None:
    """Prints the rows, puts them into results.json under (name, device), and renews README's tables."""
    print(f"\n{name} ({machine(device)}, torch {torch.__version__}, {date.today()})\n{markdown(rows)}", flush=True)
    write_table(RESULTS, name if device == "cpu" else f"{name} on {device}", rows, device)
    renew(json.loads(RESULTS.read_text(encoding="utf-8")))


def renew(results: dict[str, Any]) -> None:
    """Rewrites what stands between <!-- results: NAME --> and <!-- end --> in the pages, for every NAME recorded."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, result in results.items():
            start = f"<!-- results: {name} -->"
            for part in range(text.count(start)):
                before, rest = split_at(text, start, part)
                after = rest.split("<!-- end -->", 1)[1]
                text = f"{before}{start}\n{shown(result)}\n<!-- end -->{after}"
        page.write_text(text, encoding="utf-8")


def shown(result: dict[str, Any]) -> str:
    """A table of the results file as it stands in a page."""
    made = f"{result['machine']}, torch {result['torch']}, {result['date']}"
    return f"{markdown(result['rows'])}\n\n{made}" + (f", at {result['commit']}" if "commit" in result else "")


def split_at(text: str, mark: str, occurrence: int) -> tuple[str, str]:
    """What comes before and after the given occurrence of a mark."""
    parts = text.split(mark)
    return mark.join(parts[: occurrence + 1]), mark.join(parts[occurrence + 1 :])


if __name__ == "__main__":
    renew(json.loads(RESULTS.read_text(encoding="utf-8")))
