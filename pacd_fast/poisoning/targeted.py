"""What targeted poison does to victims: networks from scratch on the data with and without it, and their errors."""

from __future__ import annotations

import dataclasses
import glob
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pacd_fast import ops
from pacd_fast.arguments import at_least, writable
from pacd_fast.data import Dataset, as_float
from pacd_fast.files import append_line, read_text
from pacd_fast.poisoning.baselines import noise_beside, watermark_beside
from pacd_fast.poisoning.metapoison_settings import margin
from pacd_fast.poisoning.poison import Poison
from pacd_fast.randomness import Purpose, mix, seeded
from pacd_fast.ranks import Ranks
from pacd_fast.tables import aligned, mean_and_deviation
from pacd_fast.training import Standard, digest, eval_mode, fit, layout, network_for

COMPANIONS = ("clean", "noise", "watermark")
"""What poison is compared with: no poison, random noise and a watermark on the same images in the same ball."""


@dataclass(frozen=True)
class VictimRecipe:
    """How victims are trained; by default the paper's baseline (section 3.5): no augmentation and no decay.

    drops: shares of the epochs after which the rate falls to a tenth; the rest: see `fit`.
    """

    model: str = "resnet20"
    epochs: int = 100
    batch_size: int = 125
    lr: float = 0.1
    optimizer: str = "momentum"
    weight_decay: float = 0.0
    augment: bool = False
    drops: tuple[float, ...] = (0.4, 0.6, 0.8)

    @classmethod
    def of(cls, poison: Poison, **changes: Any) -> VictimRecipe:
        """That of the surrogates the poison was crafted with, and changes to it; None changes nothing."""
        known = {
            field.name: poison.settings[field.name]
            for field in dataclasses.fields(cls)
            if field.name in poison.settings
        }
        known["drops"] = tuple(known.get("drops", cls.drops))
        if poison.settings.get("momentum") == 0:
            known["optimizer"] = "sgd"
        return cls(**known | {name: value for name, value in changes.items() if value is not None})


@dataclass(frozen=True)
class Victim:
    """One trained victim: its seed, its logits on the targets, [targets][classes], its accuracy on the test images.

    curve: "logits" and "accuracy" at the end of every epoch, as lists, where asked for; accuracy there on the first
    1 000 test images.
    """

    seed: int
    logits: list[list[float]]
    accuracy: float
    curve: dict[str, list[Any]] | None = None

    def of(self, *positions: int) -> Victim:
        """The same victim asked for some of its targets only, by their place among them."""
        curve = None
        if self.curve is not None:
            curve = {**self.curve, "logits": [[each[i] for i in positions] for each in self.curve["logits"]]}
        return dataclasses.replace(self, logits=[self.logits[i] for i in positions], curve=curve)

    def judged(self, adversarial_class: int) -> dict[str, list[float]]:
        """By target: "margin", Carlini and Wagner's, negative where the attack succeeds; "loss", the cross-entropy to
        the adversarial class; "success", whether that is the class predicted."""
        return _judged(self.logits, adversarial_class)

    def progress(self, adversarial_class: int) -> dict[str, list[float]]:
        """By epoch, averaged over targets, what `judged` has, and "accuracy"; empty without a curve."""
        if self.curve is None:
            return {}
        points = [_judged(logits, adversarial_class) for logits in self.curve["logits"]]
        means = {name: [statistics.fmean(point[name]) for point in points] for name in ("margin", "loss", "success")}
        return {**means, "accuracy": self.curve["accuracy"]}


def _judged(logits: list[list[float]], adversarial_class: int) -> dict[str, list[float]]:
    at = torch.tensor(logits, dtype=torch.float64)
    wanted = torch.full((len(at),), adversarial_class)
    return {
        "margin": margin(at, adversarial_class).tolist(),
        "loss": F.cross_entropy(at, wanted, reduction="none").tolist(),
        "success": (at.argmax(1) == wanted).double().tolist(),
    }


def judge_victims(
    data: Dataset,
    target_index: Sequence[int],
    recipe: VictimRecipe,
    *,
    poison: Poison | None = None,
    count: int = 8,
    seed: int = 0,
    curve: bool = False,
    out: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
    ranks: Ranks | None = None,
) -> list[Victim]:
    """Trains victims with the seeds seed, seed + 1, ... from scratch and asks them for the targets, test images.

    out: a file of JSON lines, one per victim; those that are in it already, trained alike on the same images, are read
    and not trained again, and beside it lies the last epoch of the one in training.
    ranks: the processes to which victims are handed out, each of which calls this and gets all; until the end those of
    the n-th lie beside out as well (victims.jsonl.rank1, ...).

    Raises ValueError for a poison that is not for these data, a recipe out of range, or a file of another kind.
    """
    ranks = Ranks() if ranks is None else ranks
    images = list(map(int, target_index))
    at_least("victims", count, 1)
    poisoned = data if poison is None else poison.apply(data)
    run = {
        **dataclasses.asdict(recipe) | {"drops": list(recipe.drops)},
        "data": f"{data.name}@{data.fingerprint}",
        "train_images": len(data.x_train),
        "trained_on": digest(poisoned.x_train, poisoned.y_train),
        "target_index": images,
    }
    ranks.agree(run)
    path = None if out is None else Path(out)
    if path is not None and ranks.rank == 0:
        _read(path, run)  # cuts off a torn last line
        _take_up(path)
    ranks.everyones("those of a killed run are in the file")
    known = {} if path is None else _read(path, run)
    ranks.everyones("it was read by all")
    mine = path if path is None or ranks.rank == 0 else path.with_name(f"{path.name}.rank{ranks.rank}")
    wanted = range(seed, seed + count)
    todo = [number for number in wanted if number not in known or (curve and known[number].curve is None)]
    test, labels = as_float(data.x_test).to(device), data.y_test.to(device)
    targets = test[images]

    def unfinished(number: int) -> Path | None:
        return None if path is None else path.with_name(f"{path.name}.{number}-{run['trained_on']}.partial")

    for number in set(wanted) - set(todo):
        if (left := unfinished(number)) is not None:
            left.unlink(missing_ok=True)  # of a run that was killed between its line and this
    trained = []
    for number in map(todo.__getitem__, ranks.handed(len(todo))):
        points: dict[str, list[Any]] = {"logits": [], "accuracy": []}

        def watch(epoch: int, model: nn.Module, points: dict[str, list[Any]] = points) -> None:
            logits, accuracy = _asked(model, test[:1000], labels[:1000], targets)
            points["logits"].append(logits)
            points["accuracy"].append(accuracy)

        with seeded(torch.device("cpu"), mix(number, Purpose.VICTIM_WEIGHTS)):
            model = network_for(recipe.model, data)
        model = model.to(device)
        partial = None if curve else unfinished(number)
        fit(
            model,
            poisoned,
            Standard(),
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            optimizer=recipe.optimizer,
            drops=[math.ceil(share * recipe.epochs - 1e-9) for share in recipe.drops],
            augment=recipe.augment,
            seed=mix(number, Purpose.VICTIM_TRAINING),
            checkpoint=partial,
            resume=partial is not None,
            progress=progress and ranks.rank == 0,
            after_epoch=watch if curve else None,
        )
        logits, accuracy = _asked(model, test, labels, targets)
        victim = Victim(number, logits, accuracy, points if curve else None)
        trained.append(dataclasses.asdict(victim))
        if mine is not None:
            append_line(mine, json.dumps({"run": run, **trained[-1]}))
        if partial is not None:
            partial.unlink(missing_ok=True)
    for rank, theirs in enumerate(ranks.everyones(trained)):
        for each in theirs:
            known[each["seed"]] = Victim(**each)
            if rank and ranks.rank == 0 and path is not None:
                append_line(path, json.dumps({"run": run, **each}))
    ranks.everyones("rank 0 has written")
    if mine is not None and mine != path:
        mine.unlink(missing_ok=True)
    return [known[number] for number in wanted]


def _take_up(path: Path) -> None:
    """Puts the victims of a killed run's other processes into the file, where they may be twice."""
    for left in writable(path).parent.glob(f"{glob.escape(path.name)}.rank[0-9]*"):
        for line in read_text(left, "file of victims", 2**30).splitlines(keepends=True):
            if line.endswith("\n"):
                append_line(path, line[:-1])
        left.unlink()


@torch.no_grad()
def _asked(model: nn.Module, test: Tensor, labels: Tensor, targets: Tensor) -> tuple[list[list[float]], float]:
    """The logits on the targets, and the accuracy on the test images."""

    def logits(images: Tensor) -> Tensor:
        return torch.cat([model(part.contiguous(memory_format=layout(part))) for part in images.split(500)]).float()

    with eval_mode(model):
        at, everywhere = logits(targets), logits(test)
    return at.tolist(), float((everywhere.argmax(1) == labels).double().mean())


def _read(path: Path, run: dict[str, Any]) -> dict[int, Victim]:
    """The victims in a file that are of this run; a torn last line is cut off."""
    if not writable(path).exists():
        return {}
    text = read_text(path, "file of victims", 2**30)
    whole = text[: text.rfind("\n") + 1]
    found = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            values = json.loads(line)
            if values.pop("run") == run:
                victim = Victim(**values)
                found[victim.seed] = victim
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a line about a victim; choose another file") from error
    if whole != text:
        if not whole and not text.startswith('{"run": '[: len(text)]):
            raise ValueError(f"{path} is not a file of victims; choose another file")
        os.truncate(path, len(whole.encode()))
    return found


def summarize_victims(found: Sequence[Victim], adversarial_class: int, level: float = 0.95) -> dict[str, Any]:
    """Over victims: success rate with its two-sided Clopper-Pearson interval at `level`, and means of the rest.

    Trials are victims times targets.  The interval speaks of further seeds, and for one target alone: several targets
    in one victim are not independent.
    """
    judged = [victim.judged(adversarial_class) for victim in found]
    successes = int(sum(sum(one["success"]) for one in judged))
    trials = sum(len(victim.logits) for victim in found)
    k, tail = torch.tensor(successes), (1 - level) / 2
    return {
        "victims": len(found),
        "successes": successes,
        "trials": trials,
        "success": successes / trials,
        "low": float(ops.clopper_pearson_lower(k, trials, tail)),
        "high": float(ops.clopper_pearson_upper(k, trials, tail)),
        "target loss": statistics.fmean(loss for one in judged for loss in one["loss"]),
        "margin": statistics.fmean(each for one in judged for each in one["margin"]),
        "accuracy": statistics.fmean(victim.accuracy for victim in found),
        "accuracies": [victim.accuracy for victim in found],
    }


def victims_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Summaries side by side as text, a line a name."""
    lines = [["trained on", "success", "95 % interval", "target loss", "margin", "test accuracy, %"]]
    for name, one in summaries.items():
        lines.append(
            [
                name,
                f"{one['successes']}/{one['trials']}",
                f"{one['low']:.0%} to {one['high']:.0%}",
                f"{one['target loss']:.2f}",
                f"{one['margin']:.2f}",
                mean_and_deviation([100 * accuracy for accuracy in one["accuracies"]], ".2f"),
            ]
        )
    return aligned(lines)


def audit_targets(
    poison: Poison,
    data: Dataset,
    recipe: VictimRecipe,
    *,
    count: int = 8,
    seed: int = 0,
    against: Sequence[str] = COMPANIONS,
    out: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
    ranks: Ranks | None = None,
) -> dict[str, dict[str, Any]]:
    """The summary of victims on the poison and on what it is compared with, by name; all with the same seeds.

    out, ranks: see `judge_victims`.  Raises ValueError for poison without targets, and as `judge_victims` does.
    """
    aim = poison.targets_aim()
    unknown = set(against) - set(COMPANIONS)
    if unknown:
        raise ValueError(f"unknown comparison {sorted(unknown)[0]!r}: give {', '.join(COMPANIONS)}")
    images: dict[str, Poison | None] = {poison.attack: poison}
    if "clean" in against:
        images = {"clean": None, **images}
    if "noise" in against:
        images["noise"] = noise_beside(poison, data, seed)
    if "watermark" in against:
        images["watermark"] = watermark_beside(poison, data)
    found = {}
    for name, each in images.items():
        trained = judge_victims(
            data, aim.target_index, recipe,
            poison=each, count=count, seed=seed, out=out, device=device, progress=progress, ranks=ranks,
        )  # fmt: skip
        found[name] = summarize_victims(trained, aim.adversarial_class)
        if progress and (ranks is None or ranks.rank == 0):
            one = found[name]
            print(f"{name}: success {one['successes']}/{one['trials']}, margin {one['margin']:.2f}", file=sys.stderr)
    return found
