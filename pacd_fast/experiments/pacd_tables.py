"""The tables of Mehra et al. 2021, ours beside the paper's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from pacd_fast.data import random_subset
from pacd_fast.experiments import plots
from pacd_fast.experiments.claims import below
from pacd_fast.experiments.lab import Lab, together
from pacd_fast.experiments.paper_numbers import (
    DISTORTION,
    GAUSSIANS,
    RADIUS_TABLES,
    SINGLE_TARGETS,
    STANDARD_POISON,
    WEIGHT_DECAY,
)
from pacd_fast.experiments.record import add_row
from pacd_fast.poisoning import Audited, Ball, Radius, fall
from pacd_fast.poisoning.theory import gaussian_poison, isotropic_attack
from pacd_fast.tables import mean_and_deviation

TARGET = 8  # the paper's class: eights, ships


def percent(values: Sequence[float]) -> str:
    return mean_and_deviation([100 * value for value in values], ".2f")


def radius_table(method: str, number: int) -> Callable[[Lab], None]:
    """Tables 2, 3 and 4: ACR and ACA of the target class, clean, watermarked, with noise, and poisoned."""

    def run(lab: Lab) -> None:
        cells, curves = {}, {}
        for sigma in lab.sigmas:
            theirs = RADIUS_TABLES[method].get((lab.data_name, sigma))
            poisons = lab.crafted(f"{method}-{sigma:g}", lab.attack(method, TARGET, hyperparameters={"sigma": sigma}))
            others = {**lab.baseline("watermark", TARGET), **lab.baseline("random", TARGET)}
            folder, training = f"{method}-{sigma:g}", lab.training(method, sigma)
            fewer = dict.fromkeys(others, lab.scale.baseline_seeds)
            found = lab.audit(folder, training, sigma, TARGET, {**others, **poisons}, own_seeds=fewer)
            rows = {"clean": [found["clean"]], "watermark": [found["watermark"]], "random": [found["random"]],
                    "poison": [found[name] for name in poisons]}  # fmt: skip
            printed = (theirs[0], theirs[1], None, theirs[2]) if theirs else [None] * 4
            for (name, audits), paper in zip(rows.items(), printed, strict=True):
                each = together(audits)
                lab.row(
                    f"PACD table {number}", ["sigma", "training data"], audits, sigma=sigma,
                    **{
                        "training data": name, "ACR": mean_and_deviation(each.acr, ".3f"),
                        "ACR, paper": "-" if paper is None else f"{paper[0]:.3f}", "ACA, %": percent(each.aca),
                        "ACA, %, paper": "-" if paper is None else f"{paper[1]:.2f}",
                        "ACR falls by": "-" if name == "clean" else fall(found["clean"].acr, each.acr),
                        "others' ACR": mean_and_deviation(each.others_acr, ".3f"),
                    },
                )  # fmt: skip
                curves[name if len(lab.sigmas) == 1 else f"{name}, sigma {sigma:g}"] = {"ACR": each.acr}
            clean = found["clean"].acr
            cells[f"poison at {sigma:g}"] = below(together(rows["poison"]).acr, clean)
            cells[f"watermark at {sigma:g}"] = not below(found["watermark"].acr, clean)
            cells[f"noise at {sigma:g}"] = not below(found["random"].acr, clean)
        shown = next(iter(lab.rows.values()))
        acr = {row["training data"]: row["ACR"] for row in shown if row["sigma"] == lab.sigmas[-1]}
        lab.judge(
            f"poison against {method} lowers its victims' ACR, a watermark does not",
            ", ".join(f"{name} {value}" for name, value in acr.items()),
            cells,
        )
        plots.bars(curves, lab.picture, "ACR", "training data")

    return run


def table1(lab: Lab) -> None:
    """Standard poisoning, and victims that train robustly: accuracy of the base classifier."""
    poisons = lab.crafted("standard", lab.attack("standard", TARGET))
    falls, bars = {}, {}
    for method, theirs in STANDARD_POISON[lab.data_name].items():
        sigma = None if method == "standard" else 0.25
        found = lab.audit(f"table1-{method}", lab.training(method, sigma), 0.25, TARGET, poisons)
        clean, poisoned = found["clean"], together([found[name] for name in poisons])
        falls[method] = (sum(clean.accuracy) / len(clean.accuracy)) - (sum(poisoned.accuracy) / len(poisoned.accuracy))
        if method == "standard":
            works = below(poisoned.accuracy, clean.accuracy)
        bars[method] = {"clean": clean.accuracy, "poisoned": poisoned.accuracy}
        lab.row("PACD table 1", ["method"], [found[name] for name in poisons], method=method, **{
            "accuracy clean, %": percent(clean.accuracy), "clean, paper": theirs[0],
            "accuracy poisoned, %": percent(poisoned.accuracy), "poisoned, paper": theirs[1],
        })  # fmt: skip
    cells = {"standard": works} | {m: falls[m] < falls["standard"] / 2 for m in falls if m != "standard"}
    lab.judge(
        "standard poison lowers the accuracy of standard victims, not of robustly trained ones",
        ", ".join(f"{method} -{100 * lost:.1f} points" for method, lost in falls.items()),
        cells,
    )
    plots.bars(bars, lab.picture, "accuracy of the target class", "training method of the victims")


def table5(lab: Lab) -> None:
    """The l2 distortion that PGD needs against the smoothed classifier."""
    cells, bars = {}, {}
    for sigma in lab.sigmas:
        attack = lab.attack("gaussian", TARGET, hyperparameters={"sigma": sigma})
        poisons = lab.crafted(f"gaussian-{sigma:g}", attack)
        found = lab.audit(f"gaussian-{sigma:g}", lab.training("gaussian", sigma), sigma, TARGET, poisons)
        clean, poisoned = found["clean"].distortion, together([found[name] for name in poisons]).distortion
        theirs = DISTORTION.get((lab.data_name, sigma), ("-", "-"))
        lab.row("PACD table 5", ["sigma"], [found[name] for name in poisons], sigma=sigma, **{
            "distortion clean": mean_and_deviation(clean, ".3f"), "clean, paper": theirs[0],
            "distortion poisoned": mean_and_deviation(poisoned, ".3f"), "poisoned, paper": theirs[1],
            "attacked": lab.scale.attacked,
        })  # fmt: skip
        cells[f"sigma {sigma:g}"] = below(poisoned, clean)
        bars[f"{sigma:g}"] = {"clean": clean, "poisoned": poisoned}
    shown = lab.rows["PACD table 5"][-1]
    ours = f"{shown['distortion clean']} clean, {shown['distortion poisoned']} poisoned at sigma {shown['sigma']}"
    lab.judge("poison lowers the l2 distortion that PGD needs", ours, cells)
    plots.bars(bars, lab.picture, "l2 distortion", "sigma")


def table6(lab: Lab) -> None:
    """Two isotropic Gaussians and logistic regression, beside the analysis."""
    analytic, cells = gaussian_poison(0.2, 0.8, 0.1), {}
    seeds = max(lab.scale.seeds, 5)
    for sigma, theirs in GAUSSIANS.items():
        toys = [isotropic_attack(sigma, n=lab.scale.n, seed=seed) for seed in range(seeds)]
        row: dict[str, Any] = {"sigma": sigma}
        for i, name in enumerate(("clean", "poisoned")):
            distances = [toy.distance[i] for toy in toys]
            row[f"distance {name}"] = mean_and_deviation(distances, ".4f")
            row[f"{name}, analysis"] = round(analytic[i], 4)
            row[f"ACR {name}"] = mean_and_deviation([toy.acr[i] for toy in toys], ".4f")
            row[f"ACA {name}, %"] = percent([toy.aca[i] for toy in toys])
            row[f"ACR, ACA {name}, paper"] = f"{theirs[2 * i]:.4f}, {theirs[2 * i + 1]:.2f}"
            off = abs(sum(distances) / seeds - analytic[i])
            cells[f"{name} at {sigma:g}"] = off <= 3 * toys[0].standard_error / seeds**0.5
        row["standard error of a distance"] = round(toys[0].standard_error, 4)
        row |= {"seeds": seeds, "n": lab.scale.n}
        add_row(lab.results, "PACD table 6", ["sigma"], row)
        lab.rows.setdefault("PACD table 6", []).append(row)
    shown = lab.rows["PACD table 6"][0]
    ours = f"{shown['distance clean']} and {shown['distance poisoned']} at sigma 0.25, "
    ours += f"{analytic[0]:.4f} and {analytic[1]:.4f} on paper"
    lab.judge("the boundary between two Gaussians moves as the analysis says", ours, cells)


def table7(lab: Lab) -> None:
    """Weight decay, with and without Gaussian augmentation; each decay's poison is the one of table 2.

    Small: not 0.0001, which is close to none.
    """
    sigma, cells, bars = 0.5, {}, {}
    poisons = lab.crafted("gaussian-0.5", lab.attack("gaussian", TARGET, hyperparameters={"sigma": sigma}))
    for method, decays in WEIGHT_DECAY.items():
        for decay, theirs in decays.items():
            if lab.where.small and decay == 1e-4:
                continue
            folder = f"{method}-{sigma:g}" + (f"-decay{decay:g}" if decay else "")
            training = lab.training(method, sigma if method == "gaussian" else None, weight_decay=decay)
            found = lab.audit(folder, training, sigma, TARGET, poisons, seeds=min(3, lab.scale.seeds))
            clean, poisoned = found["clean"].acr, together([found[name] for name in poisons]).acr
            printed: tuple[object, ...] = theirs if lab.data_name == "mnist" else ("-", "-")
            lab.row(
                "PACD table 7", ["method", "weight decay"], [found[name] for name in poisons], method=method,
                **{
                    "weight decay": decay,
                    "ACR clean": mean_and_deviation(clean, ".3f"), "clean, paper": printed[0],
                    "ACR poisoned": mean_and_deviation(poisoned, ".3f"), "poisoned, paper": printed[1],
                },
            )  # fmt: skip
            cells[f"{method} at decay {decay:g}"] = below(poisoned, clean)
            bars[f"{method}\n{decay:g}"] = {"clean": clean, "poisoned": poisoned}
    usual = [row for row in lab.rows["PACD table 7"] if row["method"] == "gaussian"]
    ours = ", ".join(f"{row['ACR clean']} to {row['ACR poisoned']} at {row['weight decay']:g}" for row in usual)
    lab.judge("weight decay does not prevent the attack", ours, cells)
    plots.bars(bars, lab.picture, "ACR", "victims' method and weight decay")


def single_targets(lab: Lab) -> None:
    """A few test images, each by poison in the nearest 1 % of the data (D.6: birds, epsilon 0.06, 0.63 -> 0.26).

    A single digit's soft radius saturates at the authors' beta of 16, where it has no slope: there beta is 1.
    """
    cifar = lab.data_name == "cifar10"
    target = 2 if cifar else TARGET
    images = random_subset(lab.data.y_test, target, 2 if lab.where.small else 5, 0).tolist()
    sigma, epsilon, beta = (0.25, 0.06, 16.0) if cifar else (0.5, 0.2, 1.0)
    clean: list[Audited] = []
    poisoned: list[Audited] = []
    recipe = {"upper_batch": 1, **({"poison_batch": 20} if lab.where.small else {})}
    for image in images:
        attack = lab.attack(
            "gaussian", target, hyperparameters={"sigma": sigma}, recipe=recipe, ball=Ball(epsilon),
            targets=(image,), fraction=0.01,
        )  # fmt: skip
        attack = dataclasses.replace(attack, upper=Radius(sigma, lab.preset.copies, beta))
        poisons = lab.crafted(f"target{image}-beta{beta:g}", attack)
        found = lab.audit(
            f"d6-target{image}", lab.training("gaussian", sigma), sigma, target, poisons,
            seeds=min(3, lab.scale.seeds), others=0, indices=(image,),
        )  # fmt: skip
        clean.append(found["clean"])
        poisoned += [found[name] for name in poisons]
    before, after = together(clean).acr, together(poisoned).acr
    paper = SINGLE_TARGETS if cifar else ("-", "-")
    lab.row("PACD D.6", ["epsilon"], poisoned, epsilon=epsilon, targets=len(images), images=1, **{
        "radius clean": mean_and_deviation(before, ".3f"), "clean, paper": paper[0],
        "radius poisoned": mean_and_deviation(after, ".3f"), "poisoned, paper": paper[1],
    })  # fmt: skip
    ours = f"{mean_and_deviation(before, '.3f')} clean, {mean_and_deviation(after, '.3f')} poisoned"
    lab.judge("1 % of poison lowers the radius of single test images", ours, {"targets": below(after, before)})
    plots.bars({"targets": {"clean": before, "poisoned": after}}, lab.picture, "radius", "single test images")
