"""The figures of Rosenfeld et al. 2020: certified accuracy against label flips."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pacd_fast import plots
from pacd_fast.labelflips.certifier import CERTIFICATES
from pacd_fast.labelflips.curves import Curve, read, table
from pacd_fast.labelflips.problems import certify_data, load_features
from pacd_fast.labelflips.results import ATTACKED, UNDEFENDED

__all__ = ["EXPERIMENTS", "Experiment", "draw", "reproduce"]


@dataclass(frozen=True)
class Experiment:
    """A figure of the paper: what to certify, and how."""

    data: str
    features: str
    dim: int
    qs: tuple[float, ...]
    title: str
    attack: int = 50
    certificates: tuple[str, ...] = CERTIFICATES


EXPERIMENTS = {
    "flips-mnist17": Experiment("mnist17", "network", 50, (0.1, 0.3, 0.4, 0.45), "MNIST 1/7"),
    "flips-mnist": Experiment("mnist", "ica", 30, (0.1, 0.3, 0.5), "MNIST, 10 classes, 30 independent components"),
    "flips-mnist-kmeans": Experiment("mnist", "kmeans", 1600, (0.1, 0.3, 0.5), "MNIST, 10 classes, k-means of patches"),
    "flips-cifar10": Experiment("cifar10", "kmeans", 3200, (0.01, 0.05, 0.12), "CIFAR-10, k-means of patches"),
}


def reproduce(
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
    experiment, folder = EXPERIMENTS[name], Path(out)
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
    curves = read([file])
    print(f"{sum(len(c.flips) for c in curves) - there} certificates in {time.perf_counter() - began:.1f} s")
    (folder / f"{name}.md").write_text(table(curves) + "\n", encoding="utf-8")
    for certificate in ("exact", "whitebox"):
        shown = [curve for curve in curves if curve.certificate in (certificate, "ridge", UNDEFENDED)]
        draw(shown, folder / f"{name}-{certificate}.png", f"{experiment.title}: {certificate}")
    kept.unlink()
    return curves


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
