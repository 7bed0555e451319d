"""pacd-fast report: one page of HTML that shows results, audits, label flips and poison."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pacd_fast.arguments import at_least, whole_number
from pacd_fast.cli.flags import add_data, add_out, load_data
from pacd_fast.cli.summary import FILES, named
from pacd_fast.experiments.report import report
from pacd_fast.files import claimed, replaced


def add_commands(add: Any) -> None:
    sub = add("report", run, "one page (HTML, needs no network) of results, audits, label flips and poison")
    sub.add_argument(
        "files", nargs="+", metavar="[NAME=]FILE", help=f"results, label flips, audit.json, poison .npz; {FILES}"
    )
    add_data(sub)
    sub.set_defaults(data=None)  # pictures are shown where the data are given
    sub.add_argument("--images", type=whole_number, default=8, help="pictures a group")
    sub.add_argument("--title")
    add_out(sub, "page to write (.html)")


def run(options: argparse.Namespace) -> None:
    at_least("--images", options.images, 0)
    if Path(options.out).suffix not in (".html", ".htm"):
        raise ValueError(f"--out must end in .html, not {Path(options.out).name!r}")
    with claimed(options.out, force=options.force):
        data = None if options.data is None else load_data(options)
        text = report(named(options.files), data, options.title, options.images)
        with replaced(options.out) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(options.out)
