"""The tables and figures of Mehra et al. 2021, each a resumable command: craft, audit, ours beside the paper's.

`--small` fits on two CPU cores; every number of a scale can be given instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pacd_fast import plots, theory
from pacd_fast.losses import at_least
from pacd_fast.pacd_settings import PRESETS as POISONS
from pacd_fast.presets import Main, Preset, add_row, chain
from pacd_fast.summary import mean_and_deviation

__all__ = ["PRESETS"]


@dataclass(frozen=True)
class Scale:
    """How large an experiment is; `small` ones keep 5 000 training images."""

    seeds: int
    baseline_seeds: int
    epochs: int
    craft_epochs: int | None
    train_images: int | None
    count: int
    n: int
    others: int
    others_n: int
    attacked: int
    macer_k: int

    def flags(self) -> list[object]:
        """Those of `audit`."""
        return [
            "--epochs", self.epochs, "--count", self.count, "--n", self.n, "--others", self.others,
            "--others-n", self.others_n, "--attacked", self.attacked,
        ]  # fmt: skip


FULL = Scale(5, 5, 100, None, None, 500, 100_000, 200, 10_000, 100, 16)
SMALL = Scale(5, 3, 40, 30, 5000, 100, 1000, 90, 1000, 0, 4)

# (clean, watermarked, poisoned) ACR and ACA in per cent by data and sigma: tables 2 to 4.
_TABLES = {
    "gaussian": {
        ("mnist", 0.25): ((0.896, 98.92), (0.908, 99.24), (0.325, 71.96)),
        ("mnist", 0.5): ((1.481, 99.16), (1.514, 99.12), (0.733, 90.68)),
        ("mnist", 0.75): ((1.549, 98.48), (1.566, 98.36), (0.698, 84.92)),
        ("cifar10", 0.25): ((0.521, 85.76), (0.470, 83.22), (0.059, 26.84)),
        ("cifar10", 0.5): ((0.634, 75.04), (0.611, 74.01), (0.221, 42.28)),
    },
    "macer": {
        ("mnist", 0.25): ((0.915, 99.64), (0.894, 98.84), (0.431, 79.81)),
        ("mnist", 0.5): ((1.484, 98.56), (1.475, 98.68), (0.685, 84.36)),
        ("mnist", 0.75): ((1.353, 93.81), (1.415, 94.52), (1.008, 88.41)),
        ("cifar10", 0.25): ((0.593, 83.84), (0.486, 77.01), (0.379, 72.41)),
        ("cifar10", 0.5): ((0.759, 72.92), (0.811, 75.66), (0.521, 65.24)),
    },
    "smoothadv": {
        ("mnist", 0.25): ((0.896, 99.16), (0.906, 99.28), (0.672, 93.21)),
        ("mnist", 0.5): ((1.408, 99.21), (1.401, 98.01), (1.037, 93.81)),
        ("mnist", 0.75): ((1.262, 95.68), (1.433, 97.21), (0.924, 88.88)),
        ("cifar10", 0.25): ((0.504, 78.76), (0.441, 70.16), (0.271, 55.78)),
        ("cifar10", 0.5): ((0.479, 65.84), (0.473, 62.51), (0.277, 49.11)),
    },
}
# Base accuracy of the target class, clean and poisoned by the standard attack (table 1).
_TABLE1 = {
    "mnist": {
        "standard": (99.28, 60.08), "gaussian": (98.99, 98.31), "smoothadv": (99.18, 99.31), "macer": (99.21, 98.31),
    },
    "cifar10": {
        "standard": (92.71, 0.36), "gaussian": (88.84, 88.38), "smoothadv": (79.48, 74.95), "macer": (87.12, 88.54),
    },
}  # fmt: skip
_FIG3 = {0.0: "0.896", 0.1: "0.325"}
_TABLE5 = {
    ("mnist", 0.25): (3.271, 1.339), ("mnist", 0.5): (3.637, 2.170), ("mnist", 0.75): (3.961, 2.213),
    ("cifar10", 0.25): (1.754, 0.132), ("cifar10", 0.5): (1.996, 0.367),
}  # fmt: skip
_TABLE6 = {0.25: (0.4047, 90.0, 0.3585, 88.0), 0.5: (0.4139, 90.0, 0.3587, 87.6), 0.75: (0.4123, 90.0, 0.3544, 87.6)}
# ACR clean and poisoned by weight decay, without and with Gaussian augmentation (table 7).
_TABLE7 = {
    "standard": {0.0: (0.95, 0.01), 1e-4: (0.89, 0.03), 1e-2: (0.87, 0.37), 1e-1: (0.82, 0.68)},
    "gaussian": {0.0: (1.48, 0.73), 1e-4: (1.49, 0.62), 1e-2: (1.29, 0.58), 1e-1: (0.85, 0.72)},
}


@dataclass
class _Bench:
    """One run of one experiment: its options, its scale, and the commands it is made of."""

    options: argparse.Namespace
    main: Main
    scale: Scale

    @property
    def data(self) -> str:
        return Path(self.options.data).stem

    @property
    def sigmas(self) -> list[float]:
        both = {"cifar10": [0.25, 0.5]}.get(self.data, [0.25, 0.5, 0.75])
        return self.options.sigma or ([0.5] if self.options.small else both)

    @property
    def source(self) -> list[object]:
        """The data: the papers' split; where small and nothing else is said, the embedded digits."""
        name, held = self.options.data, 5000
        if self.embedded:
            name, held = "mnist5k", 500
        flags: list[object] = ["--data", name, "--validation", held]
        if self.scale.train_images is not None and not (self.embedded and self.scale.train_images > 3500):
            flags += ["--train-images", self.scale.train_images]
        return flags + (["--data-dir", self.options.data_dir] if self.options.data_dir else [])

    @property
    def embedded(self) -> bool:
        return self.options.small and self.options.data == "mnist" and not self.options.data_dir

    @property
    def label(self) -> str:
        """What the folders of this experiment's data are called."""
        images = self.scale.train_images
        if self.embedded and images is not None and images > 3500:
            images = None
        return ("mnist5k" if self.embedded else self.data) + ("" if images is None else f"-{images}")

    @property
    def crafted(self) -> str:
        """What is added to the names of poison files: victims of one name are of one training set."""
        return "" if self.scale.craft_epochs is None else f"-crafted{self.scale.craft_epochs}"

    @property
    def preset(self) -> str:
        return "cifar10" if self.data == "cifar10" else "mnist-small" if self.options.small else "mnist"

    def craft(self, name: str, *flags: object) -> Path:
        """A poison file; made if it is not there, under a name of its own where it is crafted otherwise than usual."""
        bilevel = not {"watermark", "random"} & set(flags)
        out = Path(self.options.work) / f"{self.label}-{name}{self.crafted if bilevel else ''}.npz"
        if not out.exists():
            preset = self.preset
            command = ["poison", *self.source, "--preset", preset, "--device", self.options.device, "--resume"]
            # the authors give SmoothAdv, with one lower step instead of ten, twice the epochs
            epochs = (self.scale.craft_epochs or 0) * (2 if "smoothadv" in flags else 1)
            craft = ["--epochs", epochs] if epochs and bilevel else []
            chain(self.main, [*command, *flags, *craft, "--metrics", out.with_suffix(".jsonl"), "--out", out])
        return out

    def audit(
        self, folder: str, method: str, poisons: Sequence[Path], *flags: object, scale: Scale | None = None
    ) -> dict[str, Any]:
        """Figures by training set, "clean" among them; folders with one name share their victims."""
        scale = scale or self.scale
        work = Path(self.options.work) / f"{self.label}-{folder}-epochs{scale.epochs}"
        k = ["--k", scale.macer_k] if method == "macer" else []
        command = ["audit", *self.source, "--poison", *poisons, "--method", method, *k, "--seeds", scale.seeds]
        command += [*scale.flags(), "--dtype", self.options.dtype, "--device", self.options.device, "--work", work]
        chain(self.main, [*command, *flags])
        found = json.loads((work / "audit.json").read_text(encoding="utf-8"))["measured"]
        return {name.removeprefix(f"{self.label}-").removesuffix(self.crafted): each for name, each in found.items()}

    def three(self, method: str, sigma: float) -> dict[str, Any]:
        """Clean, watermarked, random and poisoned, as in tables 2 to 4."""
        poison = self.craft(f"{method}-{sigma:g}", "--loss", method, "--sigma", sigma)
        others = [self.craft("watermark", "--attack", "watermark"), self.craft("random", "--attack", "random")]
        folder = f"{method}-{sigma:g}"
        found = self.audit(folder, method, [poison], "--sigma", sigma)
        fewer = dataclasses.replace(self.scale, seeds=self.scale.baseline_seeds)
        if fewer.seeds == self.scale.seeds:
            return self.audit(folder, method, [poison, *others], "--sigma", sigma)
        return {**self.audit(folder, method, others, "--sigma", sigma, scale=fewer), **found}

    def row(self, table: str, key: Sequence[str], **row: Any) -> None:
        """Prints a row and puts it into the results file."""
        row = {"data": self.label, "victims": self.scale.seeds, **row}
        row |= {"epochs": self.scale.epochs, "n": self.scale.n, "images": self.scale.count}
        key = ["data", *key, "epochs", "n", "images"]
        if not add_row(self.options.results, table, key, row, self.options.device, most="victims"):
            print(f"{self.options.results} keeps its row, which has more victims", file=sys.stderr)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def _percent(values: Sequence[float]) -> str:
    return mean_and_deviation([100 * value for value in values], ".2f")


def _fall(clean: Sequence[float], now: Sequence[float]) -> str:
    before, after = sum(clean) / len(clean), sum(now) / len(now)
    return f"{1 - after / before:.1%}" if before else "-"


def _radius_table(method: str, number: int) -> Callable[[_Bench], None]:
    """Tables 2, 3 and 4: ACR and ACA of the target class."""

    def run(bench: _Bench) -> None:
        for sigma in bench.sigmas:
            found, paper = bench.three(method, sigma), _TABLES[method].get((bench.data, sigma))
            names = ["clean", "watermark", "random", f"{method}-{sigma:g}"]
            for name, theirs in zip(names, (paper[0], paper[1], None, paper[2]) if paper else [None] * 4, strict=True):
                each = found[name]
                bench.row(
                    f"PACD table {number}", ["sigma", "training data"], sigma=sigma,
                    **{"training data": "poison" if name not in names[:3] else name},
                    victims=len(each["acr"]), ACR=mean_and_deviation(each["acr"], ".3f"),
                    **{
                        "ACR, paper": "-" if theirs is None else f"{theirs[0]:.3f}",
                        "ACA, %": _percent(each["aca"]),
                        "ACA, %, paper": "-" if theirs is None else f"{theirs[1]:.2f}",
                        "ACR falls by": "-" if name == "clean" else _fall(found["clean"]["acr"], each["acr"]),
                        "others' ACR": mean_and_deviation(each["others_acr"], ".3f"),
                    },
                )  # fmt: skip

    return run


def _table1(bench: _Bench) -> None:
    """Standard poisoning, and victims that train robustly: accuracy of the base classifier."""
    poison = bench.craft("standard", "--attack", "standard")
    for method, theirs in _TABLE1.get(bench.data, _TABLE1["mnist"]).items():
        found = bench.audit(f"table1-{method}", method, [poison], "--sigma", 0.25)
        bench.row("PACD table 1", ["method"], method=method, **{
            "accuracy clean, %": _percent(found["clean"]["accuracy"]), "clean, paper": theirs[0],
            "accuracy poisoned, %": _percent(found["standard"]["accuracy"]), "poisoned, paper": theirs[1],
        })  # fmt: skip


def _table5(bench: _Bench) -> None:
    """The l2 distortion that PGD needs against the smoothed classifier."""
    scale = bench.scale
    for sigma in bench.sigmas:
        poison = bench.craft(f"gaussian-{sigma:g}", "--loss", "gaussian", "--sigma", sigma)
        found = bench.audit(f"gaussian-{sigma:g}", "gaussian", [poison], "--sigma", sigma, scale=scale)
        theirs = _TABLE5.get((bench.data, sigma), ("-", "-"))
        bench.row("PACD table 5", ["sigma"], sigma=sigma, **{
            "distortion clean": mean_and_deviation(found["clean"]["distortion"], ".3f"), "clean, paper": theirs[0],
            "distortion poisoned": mean_and_deviation(found[f"gaussian-{sigma:g}"]["distortion"], ".3f"),
            "poisoned, paper": theirs[1], "attacked": scale.attacked,
        })  # fmt: skip


def _table6(bench: _Bench) -> None:
    """Two isotropic Gaussians and logistic regression, beside the analysis."""
    analytic = theory.gaussian_poison(0.2, 0.8, 0.1)
    for sigma, theirs in _TABLE6.items():
        toys = [theory.isotropic_attack(sigma, n=bench.scale.n, seed=seed) for seed in range(bench.scale.seeds)]
        row: dict[str, Any] = {"sigma": sigma}
        for i, name in enumerate(("clean", "poisoned")):
            row[f"distance {name}"] = mean_and_deviation([toy.distance[i] for toy in toys], ".4f")
            row[f"{name}, analysis"] = round(analytic[i], 4)
            row[f"ACR {name}"] = mean_and_deviation([toy.acr[i] for toy in toys], ".4f")
            row[f"ACA {name}, %"] = _percent([toy.aca[i] for toy in toys])
            row[f"ACR, ACA {name}, paper"] = f"{theirs[2 * i]:.4f}, {theirs[2 * i + 1]:.2f}"
        row["standard error of a distance"] = round(toys[0].standard_error, 4)
        add_row(
            bench.options.results, "PACD table 6", ["sigma"], {**row, "seeds": bench.scale.seeds, "n": bench.scale.n}
        )
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def _table7(bench: _Bench) -> None:
    """Weight decay, with and without Gaussian augmentation; each decay's poison is the one of table 2."""
    sigma, poison = 0.5, bench.craft("gaussian-0.5", "--loss", "gaussian", "--sigma", 0.5)
    for method, decays in _TABLE7.items():
        for decay, theirs in decays.items():
            folder = f"{method}-{sigma:g}" + (f"-decay{decay:g}" if decay else "")
            scale = dataclasses.replace(bench.scale, seeds=min(3, bench.scale.seeds))
            smoothed = ["--sigma", sigma] if method == "gaussian" else []
            found = bench.audit(folder, method, [poison], *smoothed, "--weight-decay", decay, scale=scale)
            printed: tuple[object, ...] = theirs if bench.data == "mnist" else ("-", "-")
            bench.row("PACD table 7", ["method", "weight decay"], method=method, **{
                "weight decay": decay,
                "ACR clean": mean_and_deviation(found["clean"]["acr"], ".3f"), "clean, paper": printed[0],
                "ACR poisoned": mean_and_deviation(found["gaussian-0.5"]["acr"], ".3f"), "poisoned, paper": printed[1],
            })  # fmt: skip


def _fig3(bench: _Bench) -> None:
    """ACR against epsilon, Gaussian augmentation at sigma 0.25."""
    points: dict[float, list[float]] = {}
    for epsilon in (0.1, 0.2, 0.3):
        usual = epsilon == POISONS[bench.preset].epsilon
        name = "gaussian-0.25" if usual else f"gaussian-0.25-epsilon{epsilon:g}"
        poison = bench.craft(name, "--loss", "gaussian", "--sigma", 0.25, "--epsilon", epsilon)
        found = bench.audit("gaussian-0.25", "gaussian", [poison], "--sigma", 0.25)
        points[0.0], points[epsilon] = found["clean"]["acr"], found[name]["acr"]
    for epsilon, acr in points.items():
        bench.row("PACD figure 3", ["epsilon"], epsilon=epsilon, ACR=mean_and_deviation(acr, ".3f"), **{
            "paper": _FIG3.get(epsilon, "lower still (figure)") if bench.data == "mnist" else "-",
        })  # fmt: skip
    picture = Path(bench.options.work) / f"{bench.label}-fig3.png"
    plots.bars({f"{epsilon:g}": {"ACR": acr} for epsilon, acr in points.items()}, picture, "ACR", "epsilon (linf)")
    print(picture)


def _fig4(bench: _Bench) -> None:
    """Poison crafted against one method, victims of another."""
    sigma = 0.25 if bench.data == "cifar10" else 0.5
    methods = ["gaussian", "macer", "smoothadv"]
    poisons = {m: bench.craft(f"{m}-{sigma:g}", "--loss", m, "--sigma", sigma) for m in methods}
    groups: dict[str, dict[str, list[float]]] = {}
    for victim in methods:
        found = bench.audit(f"{victim}-{sigma:g}", victim, list(poisons.values()), "--sigma", sigma)
        groups[victim] = {"clean": found["clean"]["acr"]}
        for crafted in methods:
            each = found[f"{crafted}-{sigma:g}"]
            groups[victim][f"poison against {crafted}"] = each["acr"]
            bench.row("PACD figure 4", ["victim", "crafted against"], victim=victim, **{
                "crafted against": crafted, "sigma": sigma,
                "ACR clean": mean_and_deviation(found["clean"]["acr"], ".3f"),
                "ACR poisoned": mean_and_deviation(each["acr"], ".3f"), "ACA poisoned, %": _percent(each["aca"]),
                "paper": "poisoned well below clean (figure)",
            })  # fmt: skip
    picture = Path(bench.options.work) / f"{bench.label}-fig4.png"
    plots.bars(groups, picture, "ACR", "training method of the victims")
    print(picture)


def _fig6(bench: _Bench) -> None:
    """Every class as the target, Gaussian augmentation; small: four of them."""
    sigma, groups = (0.25 if bench.data == "cifar10" else 0.5), {}
    for target in (1, 3, 5, 8) if bench.options.small else range(10):
        name = f"gaussian-{sigma:g}" + ("" if target == 8 else f"-class{target}")
        poison = bench.craft(name, "--loss", "gaussian", "--sigma", sigma, "--target-class", target)
        folder = f"gaussian-{sigma:g}" + ("" if target == 8 else f"-class{target}")
        found = bench.audit(folder, "gaussian", [poison], "--sigma", sigma)
        groups[str(target)] = {"clean": found["clean"]["acr"], "poison": found[name]["acr"]}
        bench.row("PACD figure 6", ["class"], **{
            "class": target, "ACR clean": mean_and_deviation(found["clean"]["acr"], ".3f"),
            "ACR poisoned": mean_and_deviation(found[name]["acr"], ".3f"),
            "ACR falls by": _fall(found["clean"]["acr"], found[name]["acr"]), "paper": "falls for every class (figure)",
        })  # fmt: skip
    picture = Path(bench.options.work) / f"{bench.label}-fig6.png"
    plots.bars(groups, picture, "ACR", "target class")
    print(picture)


def _fig7(bench: _Bench) -> None:
    """Deeper victims: poison crafted against ResNet-20 (on digits: the paper's network), victims ResNet-56 and -110."""
    sigma = 0.5
    poison = bench.craft(f"gaussian-{sigma:g}", "--loss", "gaussian", "--sigma", sigma)
    groups = {}
    for model in ["resnet20", "resnet56", "resnet110"][: 1 if bench.options.small and bench.data != "cifar10" else 3]:
        scale = dataclasses.replace(bench.scale, seeds=min(3, bench.scale.seeds))
        found = bench.audit(f"{model}-{sigma:g}", "gaussian", [poison], "--sigma", sigma, "--model", model, scale=scale)
        groups[model] = {"clean": found["clean"]["acr"], "poison": found[f"gaussian-{sigma:g}"]["acr"]}
        bench.row("PACD figure 7", ["model"], model=model, **{
            "ACR clean": mean_and_deviation(found["clean"]["acr"], ".3f"),
            "ACR poisoned": mean_and_deviation(found[f"gaussian-{sigma:g}"]["acr"], ".3f"),
            "paper": "poisoned well below clean (figure)",
        })  # fmt: skip
    picture = Path(bench.options.work) / f"{bench.label}-fig7.png"
    plots.bars(groups, picture, "ACR", "victims' network")
    print(picture)


def _d6(bench: _Bench) -> None:
    """A few test images, each by poison in the nearest 1 % of the data (D.6: birds, epsilon 0.06, 0.63 -> 0.26)."""
    from pacd_fast import datasets

    target = 2 if bench.data == "cifar10" else 8
    name = "mnist5k" if bench.embedded else bench.options.data
    data = datasets.load(name, data_dir=bench.options.data_dir)
    images = datasets.random_subset(data.y_test, target, 2 if bench.options.small else 5, 0).tolist()
    sigma, epsilon = (0.25, 0.06) if bench.data == "cifar10" else (0.5, 0.2)
    scale = dataclasses.replace(bench.scale, seeds=min(3, bench.scale.seeds), others=0)
    clean, poisoned = [], []
    for image in images:
        label = f"target{image}"
        flags = ["--targets", image, "--target-class", target, "--epsilon", epsilon, "--upper-batch", 1]
        batch = ["--poison-batch", 20] if bench.options.small else []
        poison = bench.craft(label, "--loss", "gaussian", "--sigma", sigma, *flags, *batch)
        found = bench.audit(f"d6-{label}", "gaussian", [poison], "--sigma", sigma, scale=scale)
        clean += found["clean"]["acr"]
        poisoned += found[label]["acr"]
    bench.row("PACD D.6", ["epsilon"], epsilon=epsilon, targets=len(images), **{
        "radius clean": mean_and_deviation(clean, ".3f"),
        "clean, paper": 0.63 if bench.data == "cifar10" else "-",
        "radius poisoned": mean_and_deviation(poisoned, ".3f"),
        "poisoned, paper": 0.26 if bench.data == "cifar10" else "-",
    })  # fmt: skip


# What each does, how, and what `--small` changes of SMALL so that it takes at most 20 minutes on two cores.
_RUNS: Mapping[str, tuple[str, Callable[[_Bench], None], dict[str, int]]] = {
    "table1": ("standard poisoning does little to victims that train robustly", _table1, {"seeds": 2, "epochs": 30}),
    "table2": ("poison against Gaussian augmentation: ACR, ACA", _radius_table("gaussian", 2), {}),
    "table3": (
        "poison against MACER: ACR, ACA",
        _radius_table("macer", 3),
        {"seeds": 3, "baseline_seeds": 2, "macer_k": 2, "epochs": 30, "craft_epochs": 20},
    ),
    "table4": (
        "poison against SmoothAdv: ACR, ACA",
        _radius_table("smoothadv", 4),
        {"seeds": 3, "baseline_seeds": 2, "epochs": 30},
    ),
    "table5": ("the l2 distortion that PGD needs, clean and poisoned", _table5, {"attacked": 20}),
    "table6": ("isotropic Gaussians: the attack beside the analysis", _table6, {"n": 10_000}),
    "table7": (
        "weight decay, with and without Gaussian augmentation",
        _table7,
        {"seeds": 2, "epochs": 30, "craft_epochs": 20},
    ),
    "fig3": ("ACR against epsilon", _fig3, {"seeds": 2, "craft_epochs": 20}),
    "fig4": (
        "poison against one method, victims of another",
        _fig4,
        {"seeds": 1, "craft_epochs": 15, "macer_k": 2, "epochs": 30},
    ),
    "fig6": ("every class as the target", _fig6, {"seeds": 2, "craft_epochs": 12, "epochs": 30}),
    "fig7": ("deeper victims", _fig7, {"seeds": 1, "epochs": 8, "count": 30, "others": 0}),
    "d6": ("single test images, by poison in 1 % of the data", _d6, {"seeds": 3}),
}


def _preset(name: str, text: str, experiment: Callable[[_Bench], None], smaller: dict[str, int]) -> Preset:
    small = dataclasses.replace(SMALL, **smaller)

    def add_arguments(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--data", default="cifar10" if name == "fig7" else "mnist", help="mnist, cifar10, or cifar10.npz"
        )
        sub.add_argument("--data-dir", help="where the data lie, in torchvision's layout")
        sub.add_argument("--small", action="store_true", help="two CPU cores, 20 minutes; without --data-dir mnist5k")
        sub.add_argument("--sigma", type=float, nargs="+", help="of tables 2 to 5; by default the paper's")
        sub.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of certification")
        for field in dataclasses.fields(Scale):
            both = f"by default {getattr(FULL, field.name)}, small {getattr(small, field.name)}"
            sub.add_argument(f"--{field.name.replace('_', '-')}", type=int, help=both)
        sub.add_argument("--device", default="auto")

    def run(options: argparse.Namespace, main: Main) -> int:
        if Path(options.data).stem not in ("mnist", "cifar10"):  # other data would silently get other settings
            raise ValueError(f"--data must be mnist, cifar10, or an .npz file of that name, not {options.data}")
        given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Scale)}
        scale = dataclasses.replace(
            small if options.small else FULL, **{k: v for k, v in given.items() if v is not None}
        )
        for field in ("seeds", "baseline_seeds", "epochs", "count", "n"):
            at_least(field, getattr(scale, field), 1)
        experiment(_Bench(options, main, scale))
        return 0

    return Preset(f"{text} (Mehra et al. 2021)", add_arguments, run)


PRESETS = {name: _preset(name, *each) for name, each in _RUNS.items()}
