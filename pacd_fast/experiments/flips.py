"""The figures of Rosenfeld et al. 2020: certified accuracy against label flips, as tables and pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from pacd_fast.arguments import option
from pacd_fast.experiments import plots
from pacd_fast.experiments.record import add_row, machine
from pacd_fast.labelflips import (
    ATTACKED,
    CERTIFICATES,
    UNDEFENDED,
    Curve,
    certify_data,
    flips_cells,
    flips_table,
    load_features,
    read_flips,
)


@dataclass(frozen=True)
class Figure:
    """A figure of the paper: what to certify, and how."""

    data: str
    features: str
    dim: int
    qs: tuple[float, ...]
    title: str
    attack: int = 50
    certificates: tuple[str, ...] = CERTIFICATES


FIGURES = {
    "flips-mnist17": Figure("mnist17", "network", 50, (0.1, 0.3, 0.4, 0.45), "MNIST 1/7"),
    "flips-mnist": Figure("mnist", "ica", 30, (0.1, 0.3, 0.5), "MNIST, 10 classes, 30 independent components"),
    "flips-mnist-kmeans": Figure("mnist", "kmeans", 1600, (0.1, 0.3, 0.5), "MNIST, 10 classes, k-means of patches"),
    "flips-cifar10": Figure("cifar10", "kmeans", 3200, (0.01, 0.05, 0.12), "CIFAR-10, k-means of patches"),
}


def reproduce_flips(
    name: str,
    out: str | Path,
    *,
    data: str | None = None,
    data_dir: str | None = None,
    download: bool = False,
    seed: int = 0,
    attack: int | None = None,
    progress: bool = False,
) -> list[Curve]:
    """Runs an experiment, writes name.tsv, name.md and a picture per certificate into the folder `out`; its curves.

    Run again, it goes on where it was stopped; the features are kept in name-features.npz until it is done.
    data: an .npz of the experiment's images, instead of data_dir.
    """
    experiment, folder = FIGURES[name], Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    began, kept = time.perf_counter(), folder / f"{name}-features.npz"
    if kept.exists():
        features = load_features(str(kept))
    else:
        features = load_features(
            data or experiment.data,
            experiment.features,
            experiment.dim,
            data_dir=data_dir,
            download=download,
            seed=seed,
        )
        features.save(kept)
    print(
        f"{features.name}: {len(features.x_train)} training and {len(features.x_test)} test points, "
        f"features in {time.perf_counter() - began:.1f} s",
        flush=True,
    )
    began, file = time.perf_counter(), folder / f"{name}.tsv"
    there = certify_data(
        features,
        file,
        experiment.qs,
        experiment.certificates,
        attack=experiment.attack if attack is None else attack,
        seed=seed,
        progress=progress,
    )
    curves = read_flips([file])
    print(f"{sum(len(c.flips) for c in curves) - there} certificates in {time.perf_counter() - began:.1f} s")
    (folder / f"{name}.md").write_text(flips_table(curves) + "\n", encoding="utf-8")
    for certificate in ("exact", "whitebox"):
        shown = [curve for curve in curves if curve.certificate in (certificate, "ridge", UNDEFENDED)]
        draw_flips(shown, folder / f"{name}-{certificate}.png", f"{experiment.title}: {certificate}")
    kept.unlink()
    return curves


def draw_flips(curves: Sequence[Curve], out: str | Path, title: str | None = None) -> None:
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


@dataclass(frozen=True)
class FlipsWhere:
    """What the figures on label flips are asked."""

    data: str | None = option(None, "an .npz of the same images, instead of --data-dir")
    data_dir: str | None = option(None, "where the data lie, in torchvision's layout")
    download: bool = option(False, "fetch the data into --data-dir where it is missing")
    seed: int = option(0, "of the features and of the attack's choice")
    work: str = option("reproduced", "folder for tables and pictures; made if missing")
    results: str | None = option(None, "file that gets the rows, by default results.json in --work")


def flips(name: str) -> Callable[[FlipsWhere], None]:
    """A figure as an experiment: its table printed and kept, and a picture per certificate."""

    def run(where: FlipsWhere) -> None:
        curves = reproduce_flips(
            name, where.work, data=where.data, data_dir=where.data_dir, download=where.download, seed=where.seed,
            progress=True,
        )  # fmt: skip
        print(flips_table(curves))
        here = {"seed": where.seed, "machine": machine(), "date": str(date.today())}
        kept = where.results or Path(where.work) / "results.json"
        for row in map(flips_cells, curves):
            add_row(kept, "label flips, figures", ["data", "certificate", "q", "seed"], {**row, **here})

    return run
