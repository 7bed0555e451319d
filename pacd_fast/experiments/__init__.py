"""The papers' tables and figures, each a function on a dataclass of settings; all are resumed where they stopped.

`lab` and `metapoison_lab` are what experiments share, `pacd_tables`, `pacd_figures`, `metapoison_figures`, `flips`,
`clean_victims` the experiments, `claims` the rules that judge them, `paper_numbers` what the papers print, `record` the
file of measured tables, `plots` the pictures.  Not an API: commands and names may change.  Imports everything but
`cli`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pacd_fast.experiments import metapoison_figures, pacd_figures, pacd_tables
from pacd_fast.experiments.clean_victims import CleanVictims, clean_victims
from pacd_fast.experiments.flips import FIGURES, FlipsWhere, flips
from pacd_fast.experiments.lab import FULL, MEDIUM, SMALL, Lab, Scale, Where
from pacd_fast.experiments.metapoison_lab import MetaWhere
from pacd_fast.experiments.record import add_row, commit, machine, write_table
from pacd_fast.ranks import Ranks

__all__ = ["EXPERIMENTS", "Experiment", "add_row", "commit", "machine", "write_table"]


@dataclass(frozen=True)
class Experiment:
    """A table or figure: what it shows in a line, its settings, and its run.

    Attributes:
        settings: a dataclass whose fields are the command's flags.
        run: takes the settings and, where there is one, the scale.
        scales: by size, "full" among them; their fields are flags too.
        shared: whether torchrun's processes share its victims.
    """

    title: str
    settings: type
    run: Callable[..., None]
    scales: Mapping[str, Scale] | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shared: bool = False


def _pacd(
    name: str, title: str, function: Callable[[Lab], None], medium: Scale | None = None, **smaller: Any
) -> Experiment:
    """An experiment on poison of a class; smaller: what `--small` changes of SMALL, to take about 20
    minutes (no others where no radius of theirs is shown)."""

    def run(where: Where, scale: Scale) -> None:
        lab = Lab(name, where, scale, ranks=Ranks.of_torchrun())
        function(lab)
        lab.finish()

    scales = {"full": FULL, "small": dataclasses.replace(SMALL, **smaller)}
    if medium is not None:
        scales["medium"] = medium
    return Experiment(f"{title} (Mehra et al. 2021)", Where, run, scales, shared=True)


def _metapoison(title: str, function: Callable[..., metapoison_figures.Report]) -> Experiment:
    """A figure of MetaPoison: a table and a picture."""

    def run(where: MetaWhere) -> None:
        lab = where.lab()
        report = function(lab)
        if lab.ranks.rank:
            return
        results = where.results or Path(where.work) / "results.json"
        for row in report.rows:
            add_row(results, report.table, report.key, row, where.device)
        print(report.text)

    return Experiment(f"MetaPoison: {title}", MetaWhere, run, shared=True)


EXPERIMENTS: dict[str, Experiment] = {
    "clean-mnist": Experiment(
        "MNIST, class 8, no poison: train by one method, certify 500 test images (PACD, tables 2-4)",
        CleanVictims,
        clean_victims("mnist", "MNIST"),
        shared=True,
    ),
    "clean-cifar10": Experiment(
        "CIFAR-10, class 8, no poison: train by one method, certify 500 test images (PACD, tables 2-4)",
        CleanVictims,
        clean_victims("cifar10", "CIFAR-10"),
        defaults={"data": "cifar10"},
        shared=True,
    ),
    "table1": _pacd(
        "table1", "standard poisoning does little to victims that train robustly", pacd_tables.table1,
        epochs=30, count=10, others=0, macer_k=2, train_dtype="bfloat16",
    ),
    "table2": _pacd(
        "table2", "poison against Gaussian augmentation: ACR, ACA", pacd_tables.radius_table("gaussian", 2), MEDIUM
    ),
    "table3": _pacd(
        "table3", "poison against MACER: ACR, ACA", pacd_tables.radius_table("macer", 3),
        macer_k=2, epochs=30, craft_epochs=20,
    ),
    "table4": _pacd(
        "table4", "poison against SmoothAdv: ACR, ACA", pacd_tables.radius_table("smoothadv", 4), epochs=30
    ),
    "table5": _pacd(
        "table5", "the l2 distortion that PGD needs, clean and poisoned", pacd_tables.table5, attacked=20
    ),
    "table6": _pacd(
        "table6", "isotropic Gaussians: the attack beside the analysis", pacd_tables.table6, n=10_000
    ),
    "table7": _pacd(
        "table7", "weight decay, with and without Gaussian augmentation", pacd_tables.table7,
        epochs=30, craft_epochs=20, others=0, train_dtype="bfloat16", dtype="bfloat16",
    ),
    "fig3": _pacd("fig3", "ACR against epsilon", pacd_figures.figure3, craft_epochs=20, epochs=30, others=0),
    "fig4": _pacd(
        "fig4", "poison against one method, victims of another", pacd_figures.figure4,
        poisons=1, craft_epochs=15, macer_k=2, epochs=20, others=0, train_dtype="bfloat16",
    ),
    "fig6": _pacd(
        "fig6", "every class as the target", pacd_figures.figure6,
        craft_epochs=12, epochs=30, others=0, train_dtype="bfloat16", dtype="bfloat16",
    ),
    "fig7": _pacd(
        "fig7", "deeper victims; the paper's are of --data cifar10", pacd_figures.figure7,
        craft_epochs=12, epochs=7, count=30, others=0, train_dtype="bfloat16", dtype="bfloat16",
    ),
    "d6": _pacd("d6", "single test images, by poison in 1 % of the data", pacd_tables.single_targets, n=100_000),
    **{
        name: Experiment(f"label-flip certificates: {each.title}", FlipsWhere, flips(name))
        for name, each in FIGURES.items()
    },
    "metapoison-fig3": _metapoison(
        "crafting: the surrogates' unrolled loss, and victims on the way", metapoison_figures.figure3
    ),
    "metapoison-fig4": _metapoison(
        "victims of several target-poison pairs, beside noise and a watermark", metapoison_figures.figure4
    ),
    "metapoison-fig5a": _metapoison("success against the budget", metapoison_figures.figure5a),
    "metapoison-fig5b": _metapoison("transfer to victims that are trained otherwise", metapoison_figures.figure5b),
    "metapoison-fig6": _metapoison(
        "weight trajectories, feature distances, third-party and multi-target", metapoison_figures.figure6
    ),
}  # fmt: skip
