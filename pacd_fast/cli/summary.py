"""pacd-fast summary, plot, merge: what results files come to."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pacd_fast.arguments import at_least, number, whole_number
from pacd_fast.certification import Results, merge, read_results, summarize, summary_table
from pacd_fast.experiments import plots
from pacd_fast.experiments.flips import draw_flips
from pacd_fast.labelflips import FLIPS, flips_summary, flips_table, is_flip_file, read_flips
from pacd_fast.tables import columns


def add_commands(add: Any) -> None:
    sub = add("summary", run_summary, "tabulate results files, ours or those of locuslab/smoothing")
    sub.add_argument("files", nargs="+")
    sub.add_argument("--radii", type=number, nargs="+", help="where to give the certified accuracy")
    sub.add_argument("--target-class", type=whole_number)
    sub.add_argument("--flips", type=whole_number, nargs="+", help="the same for files of label-flip certificates")
    sub.add_argument("--over-seeds", action="store_true", help="add the mean and standard deviation of the files")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    sub = add("plot", run_plot, "draw certified accuracy against radius")
    sub.add_argument("files", nargs="+")
    sub.add_argument("--title")
    sub.add_argument("--out", required=True, help=".png, .pdf or .svg")
    sub = add("merge", run_merge, "put the shards of one run together")
    sub.add_argument("files", nargs="+")
    sub.add_argument("--out", required=True)


def _named(files: Sequence[str]) -> dict[str, Results]:
    """The files by name; by path where names repeat."""
    names = [Path(file).name.removesuffix(".tsv") for file in files]
    return {
        name if names.count(name) == 1 else str(file): read_results(file)
        for name, file in zip(names, files, strict=True)
    }


def run_summary(options: argparse.Namespace) -> None:
    flips = all(is_flip_file(path) for path in options.files)
    if flips and (options.radii or options.target_class is not None or options.over_seeds):
        raise ValueError("--radii, --target-class and --over-seeds are not for files of label flips, but --flips is")
    if options.flips and not flips and all(Path(path).exists() for path in options.files):
        raise ValueError("--flips is for files of label flips alone")
    if options.json and options.over_seeds:
        raise ValueError("--over-seeds adds a column to the table: leave out --json")
    if flips:
        for count in options.flips or ():
            at_least("--flips", count, 0)
        if options.json:
            print(json.dumps(flips_summary(options.files, options.flips), indent=2))
        else:
            print(flips_table(read_flips(options.files), options.flips or FLIPS, columns))
        return
    results = _named(options.files)
    if options.json:
        summaries = {name: summarize(each, options.radii, options.target_class) for name, each in results.items()}
        print(json.dumps({name: each.to_dict() for name, each in summaries.items()}, indent=2))
    else:
        print(summary_table(results, options.radii, options.target_class, options.over_seeds))


def run_plot(options: argparse.Namespace) -> None:
    if all(is_flip_file(path) for path in options.files):
        draw_flips(read_flips(options.files), options.out, options.title)
    else:
        plots.certified_accuracy(_named(options.files), options.out, options.title)
    print(options.out)


def run_merge(options: argparse.Namespace) -> None:
    print(f"{options.out}: {merge(options.files, options.out)} images")
