"""What poison does to certified robustness: victims from scratch on clean and poisoned data, certified side by side."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pacd_fast.certification import Results, Selection, certify_dataset, exactly, pooled, read_results, summarize
from pacd_fast.data import Dataset, random_subset
from pacd_fast.files import read_json, replaced
from pacd_fast.networks import load_checkpoint
from pacd_fast.poisoning.poison import Poison
from pacd_fast.ranks import Ranks
from pacd_fast.tables import mean_and_deviation
from pacd_fast.training import Training, evaluate, evaluation_dict, numbered, train

CLEAN = "clean"


@dataclass(frozen=True)
class Audit:
    """What to do to every training set: train `seeds` victims, certify test images of the target class and of others.

    Attributes:
        training: how victims are trained.
        target_class: the class that is certified; sigma: the noise it is certified with.
        seeds, first_seed: the victims' seeds; own_seeds: how many victims some training sets have instead, by name.
        images, n: how many test images of the target class, and the estimation samples for each.
        others, others_n: the same for all other classes together; 0 images for none.
        attacked: images of the target class for the PGD distortion, 0 for none.
        choice: the seed of these choices of images.
        dtype: of certification.
        indices: certify these test images instead of some of the target class.
    """

    training: Training
    target_class: int
    sigma: float
    seeds: int = 5
    first_seed: int = 0
    images: int = 500
    n: int = 100_000
    others: int = 200
    others_n: int = 10_000
    attacked: int = 50
    choice: int = 0
    dtype: str = "float32"
    indices: tuple[int, ...] | None = None
    own_seeds: Mapping[str, int] = field(default_factory=dict)

    def victims(self, name: str, work: Path) -> dict[int, Path]:
        """The checkpoints of a training set's victims, by seed."""
        checkpoint = work / f"{name}-{self.training.method}.safetensors"
        count = self.own_seeds.get(name, self.seeds)
        return {seed: numbered(checkpoint, seed) for seed in range(self.first_seed, self.first_seed + count)}

    def certificates(self, victim: Path, others: bool = False) -> Path:
        """The file of a victim's certificates of the target class, of the test images by index, or of the others."""
        what = "images" if self.indices is not None and not others else f"class-{self.target_class}"
        return victim.with_suffix(f".{'not-' * others}{what}.tsv")

    def seconds(self, name: str, work: Path) -> dict[Path, float]:
        """What training and certifying a training set's victims took, by victim; NaN without its metrics."""
        found = {}
        for victim in self.victims(name, work).values():
            metrics, total = victim.with_suffix(".jsonl"), math.nan
            if metrics.exists():
                total = sum(json.loads(epoch)["seconds"] for epoch in metrics.read_text(encoding="utf-8").splitlines())
            for others in (False, True)[: 1 + bool(self.others)]:
                total += float(read_results(self.certificates(victim, others)).time.sum())
            found[victim] = total
        return found


@dataclass(frozen=True)
class Audited:
    """One training set's victims, a number per victim, of the target class but for others_*.

    accuracy: of the base classifier without noise; others_* and distortion are empty where nothing was measured.
    """

    accuracy: list[float]
    acr: list[float]
    aca: list[float]
    others_acr: list[float]
    others_aca: list[float]
    distortion: list[float]


def audit(
    data: Dataset,
    poisons: Mapping[str, Poison],
    settings: Audit,
    work: str | Path,
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
    ranks: Ranks | None = None,
) -> dict[str, Audited]:
    """Audits training sets: clean data first, then each poison under its name.

    Every victim, and every certified image, is kept in `work`: run again, an audit goes on where it stopped.

    ranks: the processes that do it together, each of which calls this: victims are handed out to them, the first of
        every training set before the second of any, and all get the figures, of which rank 0 makes those that no
        certificate holds.

    Raises ValueError for poison of other data, a name that is "clean", own_seeds of a set that is not there, a `work`
    that the ranks do not share, and as training and certification do.
    """
    if CLEAN in poisons:
        raise ValueError(f"a poison cannot be called {CLEAN!r}: rename the file")
    work = Path(work)
    work.mkdir(parents=True, exist_ok=True)
    if unknown := sorted(settings.own_seeds.keys() - {CLEAN, *poisons}):
        raise ValueError(f"own_seeds has {unknown[0]!r}, which is not among the training sets")
    sets = {CLEAN: data, **{name: poison.apply(data) for name, poison in poisons.items()}}
    ranks = Ranks() if ranks is None else ranks
    if ranks.size > 1:
        tasks = [(name, *each) for name in sets for each in settings.victims(name, work).items()]
        made = []
        tasks.sort(key=lambda task: task[1])
        for name, seed, victim in map(tasks.__getitem__, ranks.handed(len(tasks))):
            _certified(seed, victim, sets[name], data, settings, device, progress and ranks.rank == 0)
            made.append(str(victim.absolute()))
        there = [path for each in ranks.to_first(made) for path in each]
        if missing := [path for path in there if not Path(path).exists()]:
            raise ValueError(
                f"{missing[0]} is not to be seen from rank 0: --work must be on a disk that all ranks share"
            )
    found = {}
    if ranks.rank == 0:
        found = {name: _audited(name, images, data, settings, work, device, progress) for name, images in sets.items()}
    figures = ranks.everyones({name: dataclasses.asdict(each) for name, each in found.items()})[0]
    return {name: Audited(**each) for name, each in figures.items()}


def _certified(
    seed: int,
    victim: Path,
    images: Dataset,
    data: Dataset,
    settings: Audit,
    device: torch.device | str,
    progress: bool,
) -> list[Results]:
    """Trains a victim, as far as it is not there, and certifies it: the images that are asked about, and the others."""
    metrics = victim.with_suffix(".jsonl")
    train(victim, images, settings.training, seed=seed, device=device, resume=True, metrics=metrics, progress=progress)
    checkpoint = load_checkpoint(victim, arch=settings.training.model)

    def certified(out: Path, selection: Selection, n: int) -> Results:
        chosen = selection.indices(data.y_test)
        certify_dataset(
            checkpoint, data, "test", chosen, out,
            sigma=settings.sigma, n=n, dtype=settings.dtype, device=device, progress=progress,
        )  # fmt: skip
        return exactly(out, chosen)

    chosen = Selection(target_class=settings.target_class, count=settings.images, choice=settings.choice)
    if settings.indices is not None:
        chosen = Selection(images=settings.indices)
    found = [certified(settings.certificates(victim), chosen, settings.n)]
    if settings.others:
        rest = Selection(except_class=settings.target_class, count=settings.others, choice=settings.choice)
        found.append(certified(settings.certificates(victim, others=True), rest, settings.others_n))
    return found


def _audited(
    name: str, images: Dataset, data: Dataset, settings: Audit, work: Path, device: torch.device | str, progress: bool
) -> Audited:
    """Trains and certifies the victims of one training set; images: the data with its poison in."""
    target, others = [], []
    victims = settings.victims(name, work)
    for number, (seed, victim) in enumerate(victims.items(), 1):
        if progress:
            print(f"{name}, victim {number} of {len(victims)} (seed {seed})", file=sys.stderr, flush=True)
        of_class, *rest = _certified(seed, victim, images, data, settings, device, progress)
        target.append(of_class)
        others += rest
    evaluated = _evaluated(name, victims, data, settings, work, device, progress)
    of_target, of_others = [[summarize(each, [0.0]) for each in group] for group in (target, others)]
    return Audited(
        evaluated["natural"],
        [each.acr for each in of_target],
        [each.aca for each in of_target],
        [each.acr for each in of_others],
        [each.aca for each in of_others],
        evaluated["distortion"],
    )


def _evaluated(
    name: str,
    victims: Mapping[int, Path],
    data: Dataset,
    settings: Audit,
    work: Path,
    device: torch.device | str,
    progress: bool,
) -> dict[str, Any]:
    """Accuracy and distortion of the victims, from the file of an earlier audit where there is one."""
    what = f"{settings.target_class}-{settings.first_seed}-{len(victims)}-{settings.attacked}-{settings.choice}"
    kept = work / f"{name}-{settings.training.method}-evaluate-{what}.json"
    if not kept.exists() or kept.stat().st_mtime < max(victim.stat().st_mtime for victim in victims.values()):
        chosen = data.y_test == settings.target_class
        images, labels = data.x_test[chosen], data.y_test[chosen]
        attacked = None
        if settings.attacked:
            attacked = random_subset(labels, None, min(settings.attacked, len(labels)), settings.choice)
        measured = [
            evaluate(
                load_checkpoint(victim, arch=settings.training.model).model.to(device),
                images,
                labels,
                sigma=settings.sigma,
                attacked=attacked,
                copies=10 if data.name == "cifar10" else 20,
                progress=progress,
            )
            for victim in victims.values()
        ]
        with replaced(kept) as temporary:
            temporary.write_text(json.dumps(evaluation_dict(measured, data.class_names), indent=2), encoding="utf-8")
    evaluated = read_json(kept, "file of figures")
    if not isinstance(evaluated, dict) or not {"natural", "distortion"} <= set(evaluated.get("all", ())):
        raise ValueError(f"{kept} is not a file of figures; delete it to measure again")
    return dict(evaluated["all"])


def pooled_certificates(names: list[str], settings: Audit, work: str | Path) -> Iterator[tuple[str, Results]]:
    """For the curves of an audit: by training set, the certificates of the target class over all victims."""
    for name in names:
        victims = settings.victims(name, Path(work)).values()
        yield name, pooled([read_results(settings.certificates(victim)) for victim in victims])


def audit_rows(found: Mapping[str, Audited]) -> list[dict[str, Any]]:
    """The table's rows: mean and standard deviation over victims, and the change of the ACR against clean data."""
    clean = found.get(CLEAN)
    return [
        {
            "data": name,
            "ACR": mean_and_deviation(each.acr, ".3f"),
            "ACA, %": mean_and_deviation([100 * a for a in each.aca], ".2f"),
            "ACR falls by": fall(clean.acr, each.acr) if clean is not None and each is not clean else "-",
            "accuracy, %": mean_and_deviation([100 * a for a in each.accuracy], ".2f"),
            "others' ACR": mean_and_deviation(each.others_acr, ".3f"),
            "others' ACA, %": mean_and_deviation([100 * a for a in each.others_aca], ".2f"),
            "PGD distortion": mean_and_deviation(each.distortion, ".3f"),
            "victims": len(each.acr),
        }
        for name, each in found.items()
    ]


def fall(clean: list[float], poisoned: list[float]) -> str:
    """By how much the mean falls, in per cent of the clean one."""
    before, after = sum(clean) / len(clean), sum(poisoned) / len(poisoned)
    return f"{1 - after / before:.1%}" if before > 0 else "-"


def save_audit(path: str | Path, settings: Audit, found: Mapping[str, Audited], poisons: Mapping[str, Poison]) -> None:
    """Everything as JSON: the audit's settings, a list per figure and training set, and what each poison says."""
    content = {
        "audit": dataclasses.asdict(settings),
        "measured": {name: dataclasses.asdict(each) for name, each in found.items()},
        "poisons": {
            name: {
                "attack": p.attack,
                "epsilon": p.ball.epsilon,
                "norm": p.ball.norm,
                "images": len(p.index),
                **p.settings,
            }
            for name, p in poisons.items()
        },
    }
    with replaced(Path(path)) as temporary:
        temporary.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
