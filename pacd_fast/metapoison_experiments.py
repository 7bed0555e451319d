"""MetaPoison's figures as experiments: crafted poison, victims on it and beside it, tables and pictures; resumable."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pacd_fast import datasets, plots, targeted, training, victims
from pacd_fast.datasets import Dataset, as_float
from pacd_fast.losses import Standard, layout
from pacd_fast.metapoison import MetaPoison, metapoison
from pacd_fast.poison import Poison
from pacd_fast.summary import mean_and_deviation

__all__ = ["EXPERIMENTS", "Experiment", "Report", "add_arguments", "run"]

# Pairs (test image, its class, poison class).  Small: of the classes with 500 of the 5 000 images, networks know birds
# worst (37 % of them right), so perturbing them costs the least accuracy.  The images are the first, each of another
# class, of which sixteen clean victims (seeds 0 to 7, 100 to 107) say: most are right, none sees a bird, which is the
# next likely of these classes.  Full: the first image of its class.
_SMALL_PAIRS = ((8, "cat", "bird"), (29, "frog", "bird"), (42, "dog", "bird"))
_FULL_PAIRS = ((12, "dog", "bird"), (13, "horse", "deer"), (4, "frog", "airplane"), (3, "airplane", "frog"))

_SMALL_IMAGES = 5000
# More steps succeed more often and cost more accuracy: 10 % are nearly all images of a class here.
_SMALL: dict[str, Any] = {
    "model": "convnet", "surrogates": 8, "unroll": 1, "steps": 4, "epochs": 12, "lr": 0.03, "drops": (0.6, 0.8),
}  # fmt: skip

# The class that is perturbed in the third-party attack; the targets of the multi-target attack.
_THIRD = {"small": "deer", "full": "ship"}
_SEVERAL = {"small": (8, 29), "full": (12, 16)}

# How victims are trained otherwise than the surrogates (section 3.5, figure 5b); the rate is a factor.
_TRANSFER: dict[str, dict[str, Any]] = {
    "as crafted": {},
    "batch 250, lr doubled": {"batch_size": 250, "lr": 2.0},
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
    data = datasets.load(options.data, data_dir=options.data_dir, train_images=_SMALL_IMAGES if options.small else None)
    if options.device == "auto":  # kept, because the results file names the machine
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    setup = _Setup(data, Path(options.work), options.small, options.victims, options.seed, options.device)
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
        return 1 if self.small else 10

    def path(self, name: str) -> Path:
        return self.work / f"metapoison-{self.size}-{name}"

    def attack(self, pair: tuple[int, str, str], **changes: Any) -> MetaPoison:
        target, _, poison_class = pair
        number = self.data.class_index(poison_class)
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
        plots.poison(poison, self.data, path.with_suffix(".png"))
        return poison

    def snapshot(self, name: str, step: int) -> Path:
        return self.path(f"{name}-step{step}.npz")

    def judged(self, poison: Poison | None, attack: MetaPoison, **changes: Any) -> list[targeted.Victim]:
        """Victims on the poison, or on clean data, trained as the surrogates were but for some changes.

        Those on clean data are trained once and asked for the targets of all pairs.
        """
        targets = attack.target_index if poison is not None else tuple(target for target, _, _ in self.pairs)
        settings = attack.settings()
        names = [field.name for field in dataclasses.fields(targeted.Recipe) if field.name in settings]
        count = changes.pop("count", None) or self.victims
        recipe = targeted.Recipe(**{**{name: getattr(attack, name) for name in names}, **changes})
        found = targeted.judge(
            self.data, targets, recipe, poison=poison, count=count, seed=self.seed, curve=not changes,
            out=self.path("victims.jsonl"), device=self.device,
        )  # fmt: skip
        places = [targets.index(target) for target in attack.target_index]
        return [victim.of(*places) for victim in found]


def _name(pair: tuple[int, str, str]) -> str:
    return f"{pair[1]}{pair[0]}-{pair[2]}"


def _title(pair: tuple[int, str, str]) -> str:
    return f"{pair[1]} {pair[0]} as {pair[2]}"


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
            row = {"pair": _title(pair), "trained on": kind, **_cells(one)}
            rows.append(row | {"crafting, s": round(crafting) if kind == "metapoison" else "-", "seed": setup.seed})
            pooled.setdefault(kind, []).append(one)
            curves = [victim.progress(attack.adversarial_class) for victim in found if victim.curve is not None]
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


def _progress(setup: _Setup) -> Report:
    """Figure 3: the surrogates' target loss while crafting, and that of victims on the poison as it was then."""
    pair = setup.pairs[0]
    attack = setup.attack(pair)
    poison, count = setup.poison(_name(pair), attack), min(setup.victims, 4)
    history = poison.settings["history"]
    clean = targeted.summary(setup.judged(None, attack, count=count), attack.adversarial_class)
    steps, judged = [0], [clean]
    for step in range(setup.every, attack.steps + 1, setup.every):
        found = setup.judged(Poison.load(setup.snapshot(_name(pair), step)), attack, count=count)
        steps.append(step)
        judged.append(targeted.summary(found, attack.adversarial_class))
    rows = []
    for step, one in zip(steps, judged, strict=True):
        surrogates = {"surrogates' target loss": "-", "unrolled": "-"}
        if step:
            last = history[step - 1]
            surrogates = {"surrogates' target loss": round(last["before"], 2), "unrolled": round(last["after"], 2)}
        named = {"pair": _title(pair), "crafting steps": step, "seed": setup.seed}
        rows.append(named | surrogates | {f"victims' {key}": value for key, value in _cells(one).items()})
    numbers = list(range(1, len(history) + 1))
    losses = {
        "surrogates": (numbers, [step["before"] for step in history]),
        "surrogates, unrolled": (numbers, [step["after"] for step in history]),
        "victims": (steps, [one["target loss"] for one in judged]),
    }
    rates = {
        "target taken for the adversarial class": (steps, [one["success"] for one in judged]),
        "test accuracy": (steps, [one["accuracy"] for one in judged]),
    }
    plots.panels(
        [
            plots.Panel(_title(pair), "crafting step", "target loss", losses),
            plots.Panel(f"{count} victims a point", "crafting step", "share", rates),
        ],
        setup.path("fig3.png"),
    )
    return Report(f"metapoison {setup.size}, crafting", ("pair", "crafting steps", "seed"), rows, _text(rows))


def _budgets(setup: _Setup) -> Report:
    """Figure 5a: success against the share of the training images that is perturbed."""
    rows: list[dict[str, Any]] = []
    lines = {}
    budgets = (0.01, 0.03, 0.05, 0.1)
    for pair in setup.pairs[:1] if setup.small else setup.pairs[:2]:
        rates, usual = [], setup.attack(pair).budget
        for budget in budgets:
            attack = setup.attack(pair, budget=budget)
            poison = setup.poison(_name(pair) + ("" if budget == usual else f"-{budget:g}"), attack)
            one = targeted.summary(setup.judged(poison, attack), attack.adversarial_class)
            rates.append(one["success"])
            rows.append({"pair": _title(pair), "budget": f"{budget:.0%}", "seed": setup.seed} | _cells(one))
        lines[_title(pair)] = ([100 * budget for budget in budgets], rates)
    plots.panels([plots.Panel("budget", "poisons, % of the images", "success rate", lines)], setup.path("fig5a.png"))
    return Report(f"metapoison {setup.size}, budget", ("pair", "budget", "seed"), rows, _text(rows))


def _transfer(setup: _Setup) -> Report:
    """Figure 5b: victims that are trained otherwise than the surrogates."""
    rows: list[dict[str, Any]] = []
    lines = {}
    for pair in setup.pairs[:2]:
        attack = setup.attack(pair)
        poison, rates = setup.poison(_name(pair), attack), []
        for name, changes in _TRANSFER.items():
            changes = changes | ({"lr": changes["lr"] * attack.lr} if "lr" in changes else {})
            for kind, images in (("clean", None), ("metapoison", poison)):
                found = setup.judged(images, attack, count=min(setup.victims, 4) if images is None else None, **changes)
                one = targeted.summary(found, attack.adversarial_class)
                rows.append(
                    {"pair": _title(pair), "victims": name, "trained on": kind, "seed": setup.seed} | _cells(one)
                )
            rates.append(one["success"])
        lines[_title(pair)] = (list(range(len(rates))), rates)
    names = ", ".join(f"{i}: {name}" for i, name in enumerate(_TRANSFER))
    plots.panels([plots.Panel(names, "victims", "success rate", lines)], setup.path("fig5b.png"))
    return Report(f"metapoison {setup.size}, transfer", ("pair", "victims", "trained on", "seed"), rows, _text(rows))


def _behaviour(setup: _Setup) -> Report:
    """Figure 6: weight trajectories, distances in feature space, and the kinds of attack."""
    pair = setup.pairs[0]
    attack, third = setup.attack(pair), _THIRD[setup.size]
    of_third = dataclasses.replace(attack, poison_class=setup.data.class_index(third))
    kinds = {
        "default": (_name(pair), pair[2], attack),
        "third-party": (f"{_name(pair)}-{third}", third, of_third),
        "multi-target": (
            f"{_name(pair)}-multi",
            pair[2],
            dataclasses.replace(attack, target_index=_SEVERAL[setup.size]),
        ),
    }
    rows: list[dict[str, Any]] = []
    for kind, (name, perturbed, settings) in kinds.items():
        one = targeted.summary(setup.judged(setup.poison(name, settings), settings), attack.adversarial_class)
        named = {"attack": kind, "targets": len(settings.target_index), "perturbed": perturbed, "taken for": pair[2]}
        rows.append({**named, "seed": setup.seed, **_cells(one)})
    poison = setup.poison(_name(pair), attack)
    paths, features = {}, {}
    for kind, images in (("clean", setup.data), ("metapoison", poison.apply(setup.data))):
        paths[kind], model = _trajectory(setup, attack, images)
        features[kind] = _distances(setup.data, poison, model.cpu())
    plane, share = _principal_plane(torch.cat(list(paths.values())))
    curves = {
        kind: (part[:, 0].tolist(), part[:, 1].tolist()) for kind, part in zip(paths, plane.chunk(2), strict=True)
    }
    against = list(features["clean"])
    lines = {kind: (list(range(len(against))), list(each.values())) for kind, each in features.items()}
    names = ", ".join(f"{i} {name}" for i, name in enumerate(against))
    plots.panels(
        [
            plots.Panel(f"weights by epoch: {share:.0%} of variance", "first component", "second component", curves),
            plots.Panel("features: the target's distance", names, "of that to any image", lines),
        ],
        setup.path("fig6.png"),
    )
    text = [_text(rows), f"weights: the first two components hold {share:.1%} of the variance"]
    for kind, each in features.items():
        shares = ", ".join(f"to {name} {value:.2f}" for name, value in each.items())
        text.append(f"features of a victim on {kind} data: the target's distance {shares} of that to any test image")
    return Report(f"metapoison {setup.size}, attacks", ("attack", "seed"), rows, "\n".join(text))


def _trajectory(setup: _Setup, attack: MetaPoison, data: Dataset) -> tuple[Tensor, nn.Module]:
    """The weights of one victim before training and after every epoch, [epochs + 1, weights], and the victim.

    The initial weights and the order of the images are the same for all data.
    """
    torch.manual_seed(training.mix(setup.seed, 31))
    model = victims.network_for(attack.model, data).to(setup.device)
    kept = [_flat(model)]
    training.fit(
        model, data, Standard(),
        epochs=attack.epochs, batch_size=attack.batch_size, lr=attack.lr, seed=training.mix(setup.seed, 32),
        optimizer="momentum" if attack.momentum > 0 else "sgd",
        drops=[math.ceil(share * attack.epochs - 1e-9) for share in attack.drops],
        after_epoch=lambda epoch, model: kept.append(_flat(model)),
    )  # fmt: skip
    return torch.stack(kept), model


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([w.detach().cpu().flatten() for w in model.parameters()])


def _principal_plane(points: Tensor) -> tuple[Tensor, float]:
    """Points [N, D] in the plane of their first two principal components, [N, 2], and the share of variance there."""
    centred = (points - points.mean(0)).double()
    left, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    return left[:, :2] * sizes[:2], float(sizes[:2].square().sum() / sizes.square().sum())


@torch.no_grad()
def _distances(data: Dataset, poison: Poison, model: nn.Module) -> dict[str, float]:
    """The mean distance of the first target from groups of images, in the input of the last linear layer.

    As shares of its mean distance from 1 000 test images.
    """
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda module, given: seen.append(given[0]))

    def features(images: Tensor) -> Tensor:
        x = as_float(images)
        model(x.contiguous(memory_format=layout(x)))
        return seen.pop()

    target = int(poison.settings["target_index"][0])
    own = (data.y_test == data.y_test[target]).nonzero().flatten()
    groups = {
        "poisons": poison.images,
        "their originals": data.x_train[poison.index],
        "its own class": data.x_test[own[own != target][:500]],
    }
    try:
        at = features(data.x_test[[target]])
        usual = (features(data.x_test[:1000]) - at).norm(dim=1).mean()
        return {name: float((features(images) - at).norm(dim=1).mean() / usual) for name, images in groups.items()}
    finally:
        hook.remove()


def _text(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned text."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


EXPERIMENTS: dict[str, Experiment] = {
    "metapoison-fig3": Experiment("crafting: the surrogates' unrolled loss, and victims on the way", _progress),
    "metapoison-fig4": Experiment("victims of several target-poison pairs, beside noise and a watermark", _pairs),
    "metapoison-fig5a": Experiment("success against the budget", _budgets),
    "metapoison-fig5b": Experiment("transfer to victims that are trained otherwise", _transfer),
    "metapoison-fig6": Experiment("weight trajectories, feature distances, third-party and multi-target", _behaviour),
}
