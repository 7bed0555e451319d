"""MetaPoison's figures as experiments: crafted poison, victims on it and beside it, tables and pictures; resumable."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pacd_fast import datasets, plots, targeted
from pacd_fast.datasets import Dataset
from pacd_fast.metapoison import MetaPoison, metapoison
from pacd_fast.metapoison_commands import class_of
from pacd_fast.poison import Poison
from pacd_fast.results import mean_and_deviation

__all__ = ["EXPERIMENTS", "Experiment", "Report", "add_arguments", "run"]

# Pairs (test image, its class, poison class).  Small: the first test image of its class that at least half of eight
# pilot victims, trained on clean data, get right and at most one takes for the poison class; only five classes have the
# 500 images that a budget of 10 % asks for among the first 5 000.  Full: the first test image of the class.
_SMALL_PAIRS = ((12, "dog", "bird"), (13, "horse", "deer"), (8, "cat", "frog"))
_FULL_PAIRS = ((12, "dog", "bird"), (13, "horse", "deer"), (4, "frog", "airplane"), (3, "airplane", "frog"))

_SMALL: dict[str, Any] = {
    "model": "convnet", "surrogates": 8, "unroll": 1, "steps": 20, "epochs": 12, "lr": 0.05, "drops": (0.6, 0.8),
}  # fmt: skip

# What stands before the paper's settings when a victim is trained otherwise (section 3.5, figure 5b).
_TRANSFER: dict[str, dict[str, Any]] = {
    "as crafted": {},
    "batch 250, lr doubled": {"batch_size": 250, "lr": 2.0},  # a factor of the crafting's
    "plain SGD": {"optimizer": "sgd"},
    "decay and augmentation": {"weight_decay": 5e-4, "augment": True},
}


@dataclass(frozen=True)
class Report:
    """Rows for the table of a results file, told apart by `key`, and what to print."""

    table: str
    key: tuple[str, ...]
    rows: list[dict[str, Any]]
    text: str


@dataclass(frozen=True)
class Experiment:
    """What it shows, in a line, and its run."""

    title: str
    run: Callable[[_Setup], Report]


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """The flags of every experiment."""
    sub.add_argument("--small", action="store_true", help="convnet, 5 000 images: at most 30 minutes on 2 CPU cores")
    sub.add_argument("--data", default="cifar10", help="cifar10, or the path of an .npz file called cifar10.npz")
    sub.add_argument("--data-dir", help="where the data lie, in torchvision's layout")
    sub.add_argument("--victims", type=int, default=8, help="per poison")
    sub.add_argument("--seed", type=int, default=0, help="of the crafting, and of the first victim")
    sub.add_argument("--device", default="auto")


def run(name: str, options: argparse.Namespace) -> Report:
    """Runs an experiment with the flags above and --work, where everything finished is kept and not done again."""
    if Path(options.data).stem != "cifar10":  # a file of another name would silently get another normalisation
        raise ValueError(f"--data must be cifar10, or an .npz file that is called cifar10.npz, not {options.data}")
    if options.victims < 1:
        raise ValueError(f"--victims must be at least 1, not {options.victims}")
    data = datasets.load(options.data, data_dir=options.data_dir, train_images=5000 if options.small else None)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    setup = _Setup(data, Path(options.work), options.small, options.victims, options.seed, device)
    setup.work.mkdir(parents=True, exist_ok=True)
    return EXPERIMENTS[name].run(setup)


@dataclass(frozen=True)
class _Setup:
    """Data, a folder, the scale, and what the figures share: poison crafted once and victims trained once."""

    data: Dataset
    work: Path
    small: bool
    victims: int
    seed: int
    device: str

    @property
    def size(self) -> str:
        return "small" if self.small else "full"

    @property
    def pairs(self) -> tuple[tuple[int, str, str], ...]:
        return _SMALL_PAIRS if self.small else _FULL_PAIRS

    @property
    def every(self) -> int:
        """Crafting steps between two snapshots."""
        return 5 if self.small else 10

    def path(self, name: str) -> Path:
        return self.work / f"metapoison-{self.size}-{name}"

    def attack(self, pair: tuple[int, str, str], **changes: Any) -> MetaPoison:
        target, _, poison_class = pair
        number = class_of(poison_class, self.data)
        settings = {"poison_class": number, "adversarial_class": number, "target_index": (target,), "seed": self.seed}
        return MetaPoison(**{**(_SMALL if self.small else {}), **settings, **changes})

    def poison(self, name: str, attack: MetaPoison) -> Poison:
        """Crafted poison, with snapshots on the way beside it; read where it is there already."""
        path = self.path(f"{name}.npz")
        if path.exists():
            poison = Poison.load(path)
            if any(poison.settings.get(key) != value for key, value in attack.settings().items()):
                raise ValueError(f"{path} was crafted with other settings; delete it or give another --work")
            return poison
        partial = path.with_suffix(".partial")

        def keep(step: int, poison: Poison) -> None:
            if (step + 1) % self.every == 0:
                poison.save(self.snapshot(name, step + 1))

        print(f"crafting {path.stem}", file=sys.stderr, flush=True)
        poison = metapoison(
            self.data, attack, device=self.device, checkpoint=partial, resume=True, progress=True, after_step=keep
        )
        poison.save(path)
        partial.unlink(missing_ok=True)
        plots.poison_images(poison, self.data, path.with_suffix(".png"))
        return poison

    def snapshot(self, name: str, step: int) -> Path:
        return self.path(f"{name}-step{step}.npz")

    def judged(self, poison: Poison | None, attack: MetaPoison, **changes: Any) -> list[targeted.Victim]:
        """Victims on the poison, or on clean data, trained as the surrogates were but for some changes."""
        settings = attack.settings()
        names = [field.name for field in dataclasses.fields(targeted.Recipe) if field.name in settings]
        count = changes.pop("count", self.victims)
        recipe = targeted.Recipe(**{**{name: getattr(attack, name) for name in names}, **changes})
        return targeted.judge(
            self.data, attack.target_index, attack.adversarial_class, recipe,
            poison=poison, count=count, seed=self.seed, curve=not changes, out=self.path("victims.jsonl"),
            device=self.device,
        )  # fmt: skip


def _name(pair: tuple[int, str, str]) -> str:
    return f"{pair[1]}{pair[0]}-{pair[2]}"


def _cells(one: dict[str, Any]) -> dict[str, Any]:
    """A summary as a row of a results file."""
    return {
        "success": f"{one['successes']}/{one['trials']}",
        "95 % interval": f"{one['low']:.0%} to {one['high']:.0%}",
        "target loss": round(one["target loss"], 2),
        "margin": round(one["margin"], 2),
        "test accuracy, %": mean_and_deviation([100 * accuracy for accuracy in one["accuracies"]], ".2f"),
    }


def _pairs(setup: _Setup) -> Report:
    """Figure 4: victims on the poison of several pairs, beside clean data, noise and a watermark."""
    rows: list[dict[str, Any]] = []
    panels: list[plots.Panel] = []
    pooled: dict[str, list[dict[str, Any]]] = {}
    for pair in setup.pairs:
        attack = setup.attack(pair)
        began = time.perf_counter()
        poison = setup.poison(_name(pair), attack)
        crafting = sum(step["seconds"] for step in poison.settings["history"])
        kinds = {
            "clean": None,
            "noise": targeted.noise(poison, setup.data, setup.seed),
            "watermark": targeted.watermark(poison, setup.data),
            "metapoison": poison,
        }
        lines: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
        for kind, images in kinds.items():
            found = setup.judged(images, attack)
            one = targeted.summary(found, attack.adversarial_class)
            row = {"pair": f"{pair[1]} {pair[0]} as {pair[2]}", "trained on": kind, **_cells(one)}
            rows.append(row | {"crafting, s": round(crafting) if kind == "metapoison" else "-", "seed": setup.seed})
            pooled.setdefault(kind, []).append(one)
            curves = [victim.curve for victim in found if victim.curve is not None]
            for name in ("loss", "success", "accuracy") if curves else ():
                means = torch.tensor([curve[name] for curve in curves], dtype=torch.float64).mean(0).tolist()
                lines.setdefault(name, {})[kind] = (list(range(1, len(means) + 1)), means)
            print(f"{row['pair']}, {kind}: {row['success']}, {time.perf_counter() - began:.0f} s", file=sys.stderr)
        labels = {"loss": "target loss", "success": "success rate", "accuracy": "test accuracy"}
        panels += [plots.Panel(f"{pair[1]} as {pair[2]}", "epoch", labels[name], line) for name, line in lines.items()]
    plots.panels(panels, setup.path("fig4.png"), columns=3)
    for kind, each in pooled.items():
        successes, trials = sum(one["successes"] for one in each), sum(one["trials"] for one in each)
        accuracies = [accuracy for one in each for accuracy in one["accuracies"]]
        rows.append(
            {
                "pair": "all",
                "trained on": kind,
                "success": f"{successes}/{trials}",
                "95 % interval": "-",  # victims of one poison are not independent trials of the attack
                "target loss": round(sum(one["target loss"] for one in each) / len(each), 2),
                "margin": round(sum(one["margin"] for one in each) / len(each), 2),
                "test accuracy, %": mean_and_deviation([100 * accuracy for accuracy in accuracies], ".2f"),
                "crafting, s": "-",
                "seed": setup.seed,
            }
        )
    return Report(f"metapoison {setup.size}", ("pair", "trained on", "seed"), rows, _text(rows))


def _text(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned text."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


EXPERIMENTS: dict[str, Experiment] = {
    "metapoison-fig4": Experiment("victims of several target-poison pairs, beside noise and watermark", _pairs),
}
