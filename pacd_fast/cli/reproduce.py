"""pacd-fast reproduce: a table or a figure of the papers, in one command."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

from pacd_fast.cli.flags import Help, add_fields, device_of, given
from pacd_fast.experiments import EXPERIMENTS, Experiment, commit
from pacd_fast.files import AnotherRun
from pacd_fast.ranks import Ranks


def add_commands(add: Any) -> None:
    parser = add("reproduce", run, "a table or a figure of the papers, in one command")
    presets = parser.add_subparsers(dest="preset", required=True, metavar="preset")
    for name, experiment in EXPERIMENTS.items():
        text = experiment.title.replace("%", "%%")  # argparse's own sign
        sub = presets.add_parser(name, help=text, description=text, formatter_class=Help)
        lacking = {"medium"} if experiment.scales is not None and "medium" not in experiment.scales else ()
        add_fields(sub, experiment.settings, skip=lacking, defaults=experiment.defaults)
        if experiment.scales is not None:
            full, *others = experiment.scales.items()
            texts = {
                field.name: f"{field.metadata['help']}; by default {getattr(full[1], field.name)}"
                + "".join(f", {size} {getattr(scale, field.name)}" for size, scale in others)
                for field in dataclasses.fields(full[1])
            }
            add_fields(sub, type(full[1]), optional=True, texts=texts)


def run(options: argparse.Namespace) -> None:
    experiment, ranks = EXPERIMENTS[options.preset], Ranks.of_torchrun()
    if ranks.size > 1 and not experiment.shared:
        raise ValueError(f"{options.preset} is for one process; torchrun is for what trains victims")
    commit()  # noted now: until the rows are written, the checkout may move on
    if hasattr(options, "device"):
        options.device = str(device_of(options.device))
    settings = experiment.settings(**given(experiment.settings, options))
    Path(settings.work).mkdir(parents=True, exist_ok=True)
    if settings.results is not None and not Path(settings.results).parent.is_dir():
        where = Path(settings.results)
        raise FileNotFoundError(f"{where}: the folder {where.parent} does not exist; create it or give --results")
    with contextlib.ExitStack() as quiet:
        if ranks.rank:  # the first one says it for all
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        _run(options, experiment, settings)


def _run(options: argparse.Namespace, experiment: Experiment, settings: Any) -> None:
    try:
        if experiment.scales is None:
            experiment.run(settings)
        else:
            scale = experiment.scales[settings.size]
            experiment.run(settings, dataclasses.replace(scale, **given(type(scale), options)))
    except AnotherRun as error:
        raise ValueError(f"{error}; or give another --work") from error
