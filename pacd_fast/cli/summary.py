"""pacd-fast summary, plot, merge: what results files come to."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pacd_fast.arguments import at_least, number, readable, whole_number
from pacd_fast.certification import Results, merge, read_results, summarize, summary_table
from pacd_fast.cli.flags import add_out
from pacd_fast.experiments import plots
from pacd_fast.experiments.flips import draw_flips
from pacd_fast.files import claimed, opened
from pacd_fast.labelflips import FLIPS, flips_summary, flips_table, is_flip_file, read_flips
from pacd_fast.tables import columns

FILES = "curves are called as their files, or NAME where NAME=FILE is given"


def add_commands(add: Any) -> None:
    sub = add("summary", run_summary, "tabulate results files, ours or those of locuslab/smoothing")
    sub.add_argument("files", nargs="+", metavar="[NAME=]FILE", help=FILES)
    sub.add_argument("--radii", type=number, nargs="+", help="where to give the certified accuracy")
    sub.add_argument("--target-class", type=whole_number)
    sub.add_argument("--flips", type=whole_number, nargs="+", help="the same for files of label-flip certificates")
    sub.add_argument("--over-seeds", action="store_true", help="add the mean and standard deviation of the files")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    sub = add("plot", run_plot, "draw certified accuracy against radius")
    sub.add_argument("files", nargs="+", metavar="[NAME=]FILE", help=FILES)
    sub.add_argument("--title")
    add_out(sub, ".png, .pdf or .svg")
    sub = add("merge", run_merge, "put the shards of one run together")
    sub.add_argument("files", nargs="+")
    sub.add_argument("--out", required=True)


def named(files: Sequence[str]) -> dict[str, str]:
    """Paths by the names of their curves: NAME of NAME=FILE, else the file's; by path where those repeat.

    Files without a row, of many, are left out, and said to be.  Raises ValueError where one name is given twice.
    """
    found: list[tuple[str | None, str]] = []
    for text in files:
        name, given, path = text.partition("=")
        found.append((name, path) if given and name and not Path(text).exists() else (None, text))
    for _, path in found:
        readable(path)
    if len(found) > 1 and len(kept := [each for each in found if not _without_rows(each[1])]) < len(found):
        if not kept:
            raise ValueError(f"there is no certificate in any of {', '.join(path for _, path in found)}")
        for _, path in found:
            if path not in [other for _, other in kept]:
                print(f"{path}: no certificates in it yet, left out", file=sys.stderr)
        found = kept
    stems = [name or Path(path).name.removesuffix(".tsv") for name, path in found]
    names = [stem if name or stems.count(stem) == 1 else path for stem, (name, path) in zip(stems, found, strict=True)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is the name of two files: call them NAME=FILE")
    for _, path in found:
        _note_torn(path)
    return dict(zip(names, (path for _, path in found), strict=True))


def _without_rows(path: str) -> bool:
    """Whether a log was started and has no whole row: nothing, or the head of our files and locuslab's."""
    with opened(path, "results file") as file:
        text = file.read(2**16)
    head, _, rest = text.partition(b"\n")
    whole = b"\n" in rest if head.count(b"\t") > 5 else bool(rest.strip())  # locuslab's last line may have no end
    return not text or (head.startswith(b"idx\t") and not whole)


def _note_torn(path: str) -> None:
    """Says where the last row of a file of ours has no end: its run was stopped, or is writing."""
    with opened(path, "results file") as file:
        head = file.readline(2**12)
        if head.startswith(b"idx\t") and head.count(b"\t") > 5:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                print(f"{path}: its last row is torn, and left out", file=sys.stderr)


def _read(files: Mapping[str, str]) -> dict[str, Results]:
    return {name: read_results(path, progress=True) for name, path in files.items()}


def run_summary(options: argparse.Namespace) -> None:
    files = named(options.files)
    flips = all(map(is_flip_file, files.values()))
    if flips and (options.radii or options.target_class is not None or options.over_seeds):
        raise ValueError("--radii, --target-class and --over-seeds are not for files of label flips, but --flips is")
    if options.flips and not flips:
        raise ValueError("--flips is for files of label flips alone")
    if options.json and options.over_seeds:
        raise ValueError("--over-seeds adds a column to the table: leave out --json")
    if flips:
        for count in options.flips or ():
            at_least("--flips", count, 0)
        if options.json:
            print(json.dumps(flips_summary(list(files.values()), options.flips), indent=2))
        else:
            print(flips_table(read_flips(list(files.values())), options.flips or FLIPS, columns))
        return
    results = _read(files)
    if options.json:
        summaries = {name: summarize(each, options.radii, options.target_class) for name, each in results.items()}
        print(json.dumps({name: each.to_dict() for name, each in summaries.items()}, indent=2))
    else:
        print(summary_table(results, options.radii, options.target_class, options.over_seeds))


def run_plot(options: argparse.Namespace) -> None:
    with claimed(options.out, force=options.force):
        files = named(options.files)
        if all(map(is_flip_file, files.values())):
            draw_flips(read_flips(list(files.values())), options.out, options.title)
        else:
            plots.certified_accuracy(_read(files), options.out, options.title)
    print(options.out)


def run_merge(options: argparse.Namespace) -> None:
    for path in options.files:
        readable(path, "results file")
        _note_torn(path)
    print(f"{options.out}: {merge(options.files, options.out)} images")
