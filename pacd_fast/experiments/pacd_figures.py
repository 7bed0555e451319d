"""The figures of Mehra et al. 2021: ACR by epsilon, transfer between methods, classes, and networks."""

from __future__ import annotations

from pacd_fast.experiments import plots
from pacd_fast.experiments.claims import below
from pacd_fast.experiments.lab import Lab, together
from pacd_fast.experiments.pacd_tables import TARGET, percent
from pacd_fast.experiments.paper_numbers import EPSILON
from pacd_fast.poisoning import Ball, fall
from pacd_fast.tables import mean_and_deviation


def figure3(lab: Lab) -> None:
    """ACR against epsilon, Gaussian augmentation at sigma 0.25."""
    points: dict[float, list[float]] = {}
    audits = {}
    for epsilon in (0.1, 0.2, 0.3):
        usual = epsilon == lab.preset.epsilon
        name = "gaussian-0.25" if usual else f"gaussian-0.25-epsilon{epsilon:g}"
        attack = lab.attack("gaussian", TARGET, hyperparameters={"sigma": 0.25}, ball=Ball(epsilon))
        poisons = lab.crafted(name, attack)
        found = lab.audit("gaussian-0.25", lab.training("gaussian", 0.25), 0.25, TARGET, poisons)
        audits[0.0], audits[epsilon] = [found["clean"]], [found[label] for label in poisons]
    for epsilon, each in sorted(audits.items()):
        points[epsilon] = together(each).acr
        paper = EPSILON.get(epsilon, "lower still (figure)") if lab.data_name == "mnist" else "-"
        acr = mean_and_deviation(points[epsilon], ".3f")
        lab.row("PACD figure 3", ["epsilon"], each, epsilon=epsilon, ACR=acr, paper=paper)
    cells = {f"epsilon {epsilon:g}": below(points[epsilon], points[0.0]) for epsilon in points if epsilon}
    cells["largest below smallest"] = below(points[0.3], points[0.1])
    ours = ", ".join(f"{row['ACR']} at {row['epsilon']:g}" for row in lab.rows["PACD figure 3"])
    lab.judge("the larger epsilon, the lower the ACR", ours, cells)
    plots.bars({f"{epsilon:g}": {"ACR": acr} for epsilon, acr in points.items()}, lab.picture, "ACR", "epsilon (linf)")


def figure4(lab: Lab) -> None:
    """Poison crafted against one method, victims of another."""
    sigma = 0.25 if lab.data_name == "cifar10" else 0.5
    methods = ["gaussian", "macer", "smoothadv"]
    poisons = {
        m: lab.crafted(f"{m}-{sigma:g}", lab.attack(m, TARGET, hyperparameters={"sigma": sigma})) for m in methods
    }
    groups: dict[str, dict[str, list[float]]] = {}
    cells = {}
    for victim in methods:
        every = {label: path for paths in poisons.values() for label, path in paths.items()}
        found = lab.audit(f"{victim}-{sigma:g}", lab.training(victim, sigma), sigma, TARGET, every)
        groups[victim] = {"clean": found["clean"].acr}
        for crafted in methods:
            audits = [found[label] for label in poisons[crafted]]
            each = together(audits)
            groups[victim][f"poison against {crafted}"] = each.acr
            cells[f"{crafted} on {victim}"] = below(each.acr, found["clean"].acr)
            lab.row("PACD figure 4", ["victim", "crafted against"], audits, victim=victim, **{
                "crafted against": crafted, "sigma": sigma,
                "ACR clean": mean_and_deviation(found["clean"].acr, ".3f"),
                "ACR poisoned": mean_and_deviation(each.acr, ".3f"), "ACA poisoned, %": percent(each.aca),
                "ACR falls by": fall(found["clean"].acr, each.acr), "paper": "poisoned well below clean (figure)",
            })  # fmt: skip
    falls = ", ".join(
        f"{row['crafted against']} on {row['victim']} -{row['ACR falls by']}" for row in lab.rows["PACD figure 4"]
    )
    lab.judge("poison against one method lowers the ACR of victims of another", falls, cells)
    plots.bars(groups, lab.picture, "ACR", "training method of the victims")


def figure6(lab: Lab) -> None:
    """Every class as the target, Gaussian augmentation; small: four of them."""
    sigma = 0.25 if lab.data_name == "cifar10" else 0.5
    groups, cells = {}, {}
    for target in (1, 3, 5, 8) if lab.where.small else range(10):
        name = f"gaussian-{sigma:g}" + ("" if target == TARGET else f"-class{target}")
        poisons = lab.crafted(name, lab.attack("gaussian", target, hyperparameters={"sigma": sigma}))
        found = lab.audit(name, lab.training("gaussian", sigma), sigma, target, poisons)
        audits = [found[label] for label in poisons]
        clean, poisoned = found["clean"].acr, together(audits).acr
        groups[str(target)] = {"clean": clean, "poison": poisoned}
        cells[f"class {target}"] = below(poisoned, clean)
        lab.row("PACD figure 6", ["class"], audits, **{
            "class": target, "ACR clean": mean_and_deviation(clean, ".3f"),
            "ACR poisoned": mean_and_deviation(poisoned, ".3f"),
            "ACR falls by": fall(clean, poisoned), "paper": "falls for every class (figure)",
        })  # fmt: skip
    falls = ", ".join(f"class {row['class']} -{row['ACR falls by']}" for row in lab.rows["PACD figure 6"])
    lab.judge("every class can be attacked", falls, cells)
    plots.bars(groups, lab.picture, "ACR", "target class")


def figure7(lab: Lab) -> None:
    """Deeper victims: poison crafted against ResNet-20 (on digits: the paper's network), victims ResNet-56 and -110.

    Small: not ResNet-110.
    """
    sigma, groups, cells = 0.5, {}, {}
    poisons = lab.crafted(f"gaussian-{sigma:g}", lab.attack("gaussian", TARGET, hyperparameters={"sigma": sigma}))
    for model in ("resnet20", "resnet56", "resnet110")[: 2 if lab.where.small else 3]:
        training = lab.training("gaussian", sigma, model=model)
        found = lab.audit(f"{model}-{sigma:g}", training, sigma, TARGET, poisons, seeds=min(3, lab.scale.seeds))
        audits = [found[label] for label in poisons]
        clean, poisoned = found["clean"].acr, together(audits).acr
        groups[model] = {"clean": clean, "poison": poisoned}
        cells[model] = below(poisoned, clean)
        lab.row("PACD figure 7", ["model"], audits, model=model, **{
            "ACR clean": mean_and_deviation(clean, ".3f"), "ACR poisoned": mean_and_deviation(poisoned, ".3f"),
            "ACR falls by": fall(clean, poisoned), "paper": "poisoned well below clean (figure)",
        })  # fmt: skip
    falls = ", ".join(f"{row['model']} -{row['ACR falls by']}" for row in lab.rows["PACD figure 7"])
    lab.judge("poison against one network lowers the ACR of deeper ones", falls, cells)
    plots.bars(groups, lab.picture, "ACR", "victims' network")
