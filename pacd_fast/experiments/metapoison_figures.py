"""MetaPoison's figures: crafted poison, victims on it and beside it, tables and pictures (Huang et al. 2020)."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pacd_fast.data import Dataset, as_float
from pacd_fast.experiments import plots
from pacd_fast.experiments.metapoison_lab import TRANSFER, MetaLab
from pacd_fast.poisoning import MetaPoison, Poison, noise_beside, summarize_victims, watermark_beside
from pacd_fast.randomness import Purpose, mix, seeded
from pacd_fast.tables import markdown, mean_and_deviation
from pacd_fast.training import Standard, fit, layout, network_for


@dataclass(frozen=True)
class Report:
    """Rows for the table of a results file, told apart by `key`, and what to print."""

    table: str
    key: tuple[str, ...]
    rows: list[dict[str, Any]]
    text: str


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


def figure4(lab: MetaLab) -> Report:
    """Figure 4: victims on the poison of several pairs, beside clean data, noise and a watermark."""
    rows: list[dict[str, Any]] = []
    panels: list[plots.Panel] = []
    pooled: dict[str, list[dict[str, Any]]] = {}
    for pair in lab.scale.pairs:
        attack = lab.attack(pair)
        began = time.perf_counter()
        poison = lab.poison(_name(pair), attack)
        crafting = sum(step["seconds"] for step in poison.settings["history"])
        kinds = {
            "clean": None,
            "noise": noise_beside(poison, lab.data, lab.seed),
            "watermark": watermark_beside(poison, lab.data),
            "metapoison": poison,
        }
        lines: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
        for kind, images in kinds.items():
            found = lab.judged(images, attack)
            one = summarize_victims(found, attack.adversarial_class)
            row = {"pair": _title(pair), "trained on": kind, **_cells(one)}
            rows.append(row | {"crafting, s": round(crafting) if kind == "metapoison" else "-", "seed": lab.seed})
            pooled.setdefault(kind, []).append(one)
            curves = [victim.progress(attack.adversarial_class) for victim in found if victim.curve is not None]
            for name in ("loss", "success", "accuracy") if curves else ():
                means = torch.tensor([curve[name] for curve in curves], dtype=torch.float64).mean(0).tolist()
                lines.setdefault(name, {})[kind] = (list(range(1, len(means) + 1)), means)
            print(f"{row['pair']}, {kind}: {row['success']}, {time.perf_counter() - began:.0f} s", file=sys.stderr)
        labels = {"loss": "target loss", "success": "success rate", "accuracy": "test accuracy"}
        panels += [plots.Panel(f"{pair[1]} as {pair[2]}", "epoch", labels[name], line) for name, line in lines.items()]
    lab.draw(panels, "fig4.png")
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
                "seed": lab.seed,
            }
        )
    return Report(f"metapoison {lab.size}", ("pair", "trained on", "seed"), rows, markdown(rows))


def figure3(lab: MetaLab) -> Report:
    """Figure 3: the surrogates' target loss while crafting, and that of victims on the poison as it was then."""
    pair = lab.scale.pairs[0]
    attack = lab.attack(pair)
    poison, count = lab.poison(_name(pair), attack), min(lab.victims, 4)
    history = poison.settings["history"]
    clean = summarize_victims(lab.judged(None, attack, count=count), attack.adversarial_class)
    steps, judged = [0], [clean]
    for step in range(lab.scale.every, attack.steps + 1, lab.scale.every):
        found = lab.judged(Poison.load(lab.snapshot(_name(pair), step)), attack, count=count)
        steps.append(step)
        judged.append(summarize_victims(found, attack.adversarial_class))
    rows = []
    for step, one in zip(steps, judged, strict=True):
        surrogates = {"surrogates' target loss": "-", "unrolled": "-"}
        if step:
            last = history[step - 1]
            surrogates = {"surrogates' target loss": round(last["before"], 2), "unrolled": round(last["after"], 2)}
        named = {"pair": _title(pair), "crafting steps": step, "seed": lab.seed}
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
    lab.draw(
        [
            plots.Panel(_title(pair), "crafting step", "target loss", losses),
            plots.Panel(f"{count} victims a point", "crafting step", "share", rates),
        ],
        "fig3.png",
    )
    return Report(f"metapoison {lab.size}, crafting", ("pair", "crafting steps", "seed"), rows, markdown(rows))


def figure5a(lab: MetaLab) -> Report:
    """Figure 5a: success against the share of the training images that is perturbed."""
    rows: list[dict[str, Any]] = []
    lines = {}
    budgets = (0.01, 0.03, 0.05, 0.1)
    for pair in lab.scale.pairs[: 1 if lab.size == "small" else 2]:
        rates, usual = [], lab.attack(pair).budget
        for budget in budgets:
            attack = lab.attack(pair, budget=budget)
            poison = lab.poison(_name(pair) + ("" if budget == usual else f"-{budget:g}"), attack)
            one = summarize_victims(lab.judged(poison, attack), attack.adversarial_class)
            rates.append(one["success"])
            rows.append({"pair": _title(pair), "budget": f"{budget:.0%}", "seed": lab.seed} | _cells(one))
        lines[_title(pair)] = ([100 * budget for budget in budgets], rates)
    lab.draw([plots.Panel("budget", "poisons, % of the images", "success rate", lines)], "fig5a.png")
    return Report(f"metapoison {lab.size}, budget", ("pair", "budget", "seed"), rows, markdown(rows))


def figure5b(lab: MetaLab) -> Report:
    """Figure 5b: victims that are trained otherwise than the surrogates."""
    rows: list[dict[str, Any]] = []
    lines = {}
    for pair in lab.scale.pairs[:2]:
        attack = lab.attack(pair)
        poison, rates = lab.poison(_name(pair), attack), []
        for name, changes in TRANSFER.items():
            changes = changes | ({"lr": changes["lr"] * attack.lr} if "lr" in changes else {})
            for kind, images in (("clean", None), ("metapoison", poison)):
                found = lab.judged(images, attack, count=min(lab.victims, 4) if images is None else None, **changes)
                one = summarize_victims(found, attack.adversarial_class)
                rows.append({"pair": _title(pair), "victims": name, "trained on": kind, "seed": lab.seed} | _cells(one))
            rates.append(one["success"])
        lines[_title(pair)] = (list(range(len(rates))), rates)
    names = ", ".join(f"{i}: {name}" for i, name in enumerate(TRANSFER))
    lab.draw([plots.Panel(names, "victims", "success rate", lines)], "fig5b.png")
    return Report(f"metapoison {lab.size}, transfer", ("pair", "victims", "trained on", "seed"), rows, markdown(rows))


def figure6(lab: MetaLab) -> Report:
    """Figure 6: weight trajectories, distances in feature space, and the kinds of attack."""
    pair = lab.scale.pairs[0]
    attack, third = lab.attack(pair), lab.scale.third
    of_third = dataclasses.replace(attack, poison_class=lab.data.class_index(third))
    kinds = {
        "default": (_name(pair), pair[2], attack),
        "third-party": (f"{_name(pair)}-{third}", third, of_third),
        "multi-target": (
            f"{_name(pair)}-multi",
            pair[2],
            dataclasses.replace(attack, target_index=lab.scale.several),
        ),
    }
    rows: list[dict[str, Any]] = []
    for kind, (name, perturbed, settings) in kinds.items():
        one = summarize_victims(lab.judged(lab.poison(name, settings), settings), attack.adversarial_class)
        named = {"attack": kind, "targets": len(settings.target_index), "perturbed": perturbed, "taken for": pair[2]}
        rows.append({**named, "seed": lab.seed, **_cells(one)})
    poison = lab.poison(_name(pair), attack)
    paths, features = {}, {}
    for kind, images in (("clean", lab.data), ("metapoison", poison.apply(lab.data))):
        paths[kind], model = _trajectory(lab, attack, images)
        features[kind] = _distances(lab.data, poison, model.cpu())
    plane, share = _principal_plane(torch.cat(list(paths.values())))
    curves = {
        kind: (part[:, 0].tolist(), part[:, 1].tolist()) for kind, part in zip(paths, plane.chunk(2), strict=True)
    }
    against = list(features["clean"])
    lines = {kind: (list(range(len(against))), list(each.values())) for kind, each in features.items()}
    names = ", ".join(f"{i} {name}" for i, name in enumerate(against))
    lab.draw(
        [
            plots.Panel(f"weights by epoch: {share:.0%} of variance", "first component", "second component", curves),
            plots.Panel("features: the target's distance", names, "of that to any image", lines),
        ],
        "fig6.png",
    )
    text = [markdown(rows), f"weights: the first two components hold {share:.1%} of the variance"]
    for kind, each in features.items():
        shares = ", ".join(f"to {name} {value:.2f}" for name, value in each.items())
        text.append(f"features of a victim on {kind} data: the target's distance {shares} of that to any test image")
    return Report(f"metapoison {lab.size}, attacks", ("attack", "seed"), rows, "\n".join(text))


def _trajectory(lab: MetaLab, attack: MetaPoison, data: Dataset) -> tuple[Tensor, nn.Module]:
    """The weights of one victim before training and after every epoch, [epochs + 1, weights], and the victim.

    The initial weights and the order of the images are the same for all data.
    """
    with seeded(torch.device("cpu"), mix(lab.seed, Purpose.TRAJECTORY_WEIGHTS)):
        model = network_for(attack.model, data)
    model = model.to(lab.device)
    kept = [_flat(model)]
    fit(
        model,
        data,
        Standard(),
        epochs=attack.epochs,
        batch_size=attack.batch_size,
        lr=attack.lr,
        seed=mix(lab.seed, Purpose.TRAJECTORY_TRAINING),
        optimizer="momentum" if attack.momentum > 0 else "sgd",
        drops=[math.ceil(share * attack.epochs - 1e-9) for share in attack.drops],
        after_epoch=lambda epoch, model: kept.append(_flat(model)),
    )
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
