"""Victims on clean data: train by one method, certify 500 test images (PACD, tables 2 to 4, clean columns)."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from pacd_fast.arguments import DTYPES, at_least, option
from pacd_fast.certification import Selection, certify_dataset, exactly, summarize
from pacd_fast.data import load_dataset
from pacd_fast.experiments.paper_numbers import CLEAN_DEVIATIONS, RADIUS_TABLES
from pacd_fast.experiments.record import add_row, machine
from pacd_fast.networks import load_checkpoint
from pacd_fast.ranks import Ranks
from pacd_fast.tables import mean_and_deviation
from pacd_fast.training import Training, numbered, train


@dataclass(frozen=True)
class CleanVictims:
    """What is trained and certified."""

    data: str = option("mnist", "mnist or cifar10, or the path of an .npz file of that name")
    data_dir: str | None = option(None, "where the data lie, in torchvision's layout")
    method: str = option("gaussian", "how victims train", choices=("gaussian", "macer", "smoothadv"))
    sigma: float = option(0.5, "of training and certification")
    seeds: int = option(3, "victims, seeds 0 and up")
    epochs: int = option(100, "of training")
    drops: tuple[int, ...] | None = option(
        None, "as in train; by default for the last tenth of the epochs; without numbers: never, as in the paper"
    )
    n: int = option(100_000, "estimation samples per image")
    count: int = option(500, "test images to certify")
    train_dtype: str = option("float32", "of the network's passes in training", choices=DTYPES)
    dtype: str = option("float32", "the certificates are for the model in it", choices=DTYPES)
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto takes CUDA where it works")
    work: str = option("reproduced", "folder for checkpoints and results files; made if missing")
    results: str | None = option(None, "file that gets the rows, by default results.json in --work")


def clean_victims(data_name: str, title: str, target_class: int = 8) -> Callable[[CleanVictims], None]:
    """The experiment on one data set."""

    def run(settings: CleanVictims) -> None:
        at_least("--seeds", settings.seeds, 1)
        if Path(settings.data).stem != data_name:  # a file of another name would silently get other settings
            raise ValueError(f"--data must be {data_name}, or an .npz file called {data_name}.npz, not {settings.data}")
        drops = settings.drops
        if drops is None:
            drops = (settings.epochs * 9 // 10,) if settings.epochs >= 10 else ()
        work = Path(settings.work)
        work.mkdir(parents=True, exist_ok=True)
        data = load_dataset(settings.data, data_dir=settings.data_dir, validation=5000)
        training = Training(
            settings.method, {"sigma": settings.sigma}, epochs=settings.epochs, drops=drops, dtype=settings.train_dtype
        )
        chosen = Selection(target_class=target_class, count=settings.count).indices(data.y_test)
        ranks = Ranks.of_torchrun()
        checkpoint = work / f"{data_name}-{settings.method}-{settings.sigma:g}.safetensors"
        team, seeds = ranks.teams(settings.seeds)
        for seed in seeds:
            victim = numbered(checkpoint, seed)
            print(f"victim {victim}", file=sys.stderr, flush=True)
            metrics = victim.with_suffix(".jsonl")
            shown = ranks.rank == 0
            train(
                victim, data, training, seed=seed, device=settings.device, resume=True, metrics=metrics,
                progress=shown, group=team.group(),
            )  # fmt: skip
            certify_dataset(
                load_checkpoint(victim), data, "test", chosen, victim.with_suffix(".tsv"),
                n=settings.n, dtype=settings.dtype, ranks=team, device=settings.device, progress=shown,
            )  # fmt: skip
        ranks.everyones("they are there")
        if ranks.rank:
            return
        files = [numbered(checkpoint, seed).with_suffix(".tsv") for seed in range(settings.seeds)]
        summaries = [summarize(exactly(file, chosen), [0.0], target_class) for file in files]
        row = _row(settings, drops, [s.acr for s in summaries], [100 * s.aca for s in summaries], data_name)
        key = ["method", "sigma", "epochs", "rate drops at", "trained in", "certified in", "n", "images"]
        print("\n".join(f"{key:14} {value}" for key, value in row.items()))
        results = settings.results or work / "results.json"
        if not add_row(results, f"clean {title}", key, row, settings.device, most="seeds"):
            print(f"{results} keeps its row, which has more victims", file=sys.stderr)

    return run


def _row(
    settings: CleanVictims, drops: tuple[int, ...], radii: list[float], accuracies: list[float], data_name: str
) -> dict[str, Any]:
    row = {
        "method": settings.method,
        "sigma": settings.sigma,
        "seeds": settings.seeds,
        "ACR": mean_and_deviation(radii, ".3f"),
        "ACR, paper": "-",
        "ACA, %": mean_and_deviation(accuracies, ".2f"),
        "ACA, %, paper": "-",
        "as good": "-",
        "epochs": settings.epochs,
        "rate drops at": " ".join(map(str, drops)) or "-",
        "trained in": settings.train_dtype,
        "certified in": settings.dtype,
        "images": settings.count,
        "n": settings.n,
        "machine": machine(settings.device),
        "date": str(date.today()),
    }
    deviations = CLEAN_DEVIATIONS[data_name].get((settings.method, settings.sigma))
    if deviations is not None:
        acr, aca = RADIUS_TABLES[settings.method][data_name, settings.sigma][0]
        good = statistics.fmean(radii) >= acr - deviations[0] and statistics.fmean(accuracies) >= aca - deviations[1]
        row |= {
            "ACR, paper": f"{acr:.3f}±{deviations[0]:.2f}",
            "ACA, %, paper": f"{aca:.2f}±{deviations[1]:.2f}",
            "as good": "yes" if good else "no",
        }
    return row
