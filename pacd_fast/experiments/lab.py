"""What the tables and figures of Mehra et al. 2021 share: data loaded once, poison crafted once, audits, rows.

Everything is kept in a folder and done once: an experiment goes on where it stopped, and experiments share poisons and
victims.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pacd_fast.arguments import DTYPES, at_least, option
from pacd_fast.data import Dataset, load_dataset
from pacd_fast.experiments.claims import spread, verdict
from pacd_fast.experiments.record import add_row, commit
from pacd_fast.files import replaced
from pacd_fast.poisoning import PRESETS, Audit, Audited, Ball, Pacd, Poison, Preset, audit, pacd, random, watermark
from pacd_fast.ranks import Ranks
from pacd_fast.tables import markdown
from pacd_fast.training import Training


@dataclass(frozen=True)
class Scale:
    """How large an experiment is."""

    poisons: int = option(1, "poisons of a setting, crafted with seeds 0 and up")
    seeds: int = option(5, "victims of a poison")
    baseline_seeds: int = option(5, "victims of watermark and noise")
    epochs: int = option(100, "of the victims")
    craft_epochs: int | None = option(None, "of crafting; by default the preset's")
    train_images: int | None = option(None, "training images; by default all")
    count: int = option(500, "test images to certify")
    n: int = option(100_000, "estimation samples for each of them")
    others: int = option(200, "test images of the other classes")
    others_n: int = option(10_000, "estimation samples for each of them")
    attacked: int = option(0, "images for the PGD distortion")
    macer_k: int = option(16, "copies of MACER's victims")
    craft_dtype: str = option("float32", "of the network's passes in crafting", choices=DTYPES)
    train_dtype: str = option("float32", "of the victims' passes in training", choices=DTYPES)
    dtype: str = option("float32", "of certification", choices=DTYPES)

    def __post_init__(self) -> None:
        for name in ("poisons", "seeds", "baseline_seeds", "epochs", "count", "n"):
            at_least(name, getattr(self, name), 1)


FULL = Scale()
SMALL = Scale(2, 3, 3, 40, 30, 5000, 100, 1000, 90, 1000, 0, 4)
MEDIUM = dataclasses.replace(
    SMALL, poisons=1, baseline_seeds=1, epochs=30, craft_epochs=6, train_images=10_000,
    craft_dtype="bfloat16", train_dtype="bfloat16", dtype="bfloat16",
)  # fmt: skip


def size_of(small: bool, medium: bool) -> str:
    """small, medium or full.  Raises ValueError where both are asked for."""
    if small and medium:
        raise ValueError("give --small or --medium, not both")
    return "small" if small else "medium" if medium else "full"


@dataclass(frozen=True)
class Where:
    """What every experiment on poison of a class is asked: the data, the device, the folders."""

    data: str = option("mnist", "mnist, cifar10, or cifar10.npz")
    data_dir: str | None = option(None, "where the data lie, in torchvision's layout")
    small: bool = option(False, "two CPU cores, about 20 minutes; without --data-dir the embedded digits")
    medium: bool = option(False, "CIFAR-10 on 10 000 images: hours on two CPU cores")
    sigma: tuple[float, ...] | None = option(None, "of tables 2 to 5; by default the paper's")
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto takes CUDA where it works")
    work: str = option("reproduced", "folder for checkpoints and results files; made if missing")
    results: str | None = option(None, "file that gets the rows, by default results.json in --work")

    def __post_init__(self) -> None:
        if Path(self.data).stem not in ("mnist", "cifar10"):  # other data would silently get other settings
            raise ValueError(f"--data must be mnist, cifar10, or an .npz file of that name, not {self.data}")
        if self.size == "medium" and Path(self.data).stem != "cifar10":
            raise ValueError(
                f"--medium is of CIFAR-10: give --data cifar10 or an .npz file of that name, not {self.data}"
            )

    @property
    def size(self) -> str:
        return size_of(self.small, self.medium)


@dataclass
class Lab:
    """One run of one experiment."""

    name: str
    where: Where
    scale: Scale
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    ranks: Ranks = field(default_factory=Ranks)
    seconds: dict[Path, float] = field(default_factory=dict)  # of what was crafted, trained and certified, once each

    def __post_init__(self) -> None:
        self.work = Path(self.where.work)
        self.work.mkdir(parents=True, exist_ok=True)
        # All processes of a run go the same way, and what the others than the first show nobody sees.
        self._unseen = tempfile.TemporaryDirectory() if self.ranks.rank else None
        self.shown = self.work if self._unseen is None else Path(self._unseen.name)

    @property
    def results(self) -> Path:
        if self.where.results and self.ranks.rank == 0:
            return Path(self.where.results)
        return self.shown / "results.json"

    @property
    def data_name(self) -> str:
        """mnist or cifar10: by this the paper's numbers are looked up."""
        return Path(self.where.data).stem

    @property
    def embedded(self) -> bool:
        return self.where.small and self.where.data == "mnist" and not self.where.data_dir

    @property
    def train_images(self) -> int | None:
        images = self.scale.train_images
        return None if self.embedded and images is not None and images > 3500 else images

    @cached_property
    def data(self) -> Dataset:
        """The papers' split; where small and nothing else is said, the embedded digits."""
        name, held = ("mnist5k", 500) if self.embedded else (self.where.data, 5000)
        return load_dataset(name, data_dir=self.where.data_dir, validation=held, train_images=self.train_images)

    @property
    def label(self) -> str:
        """What the folders of this experiment's data are called."""
        images = self.train_images
        return ("mnist5k" if self.embedded else self.data_name) + ("" if images is None else f"-{images}")

    @property
    def sigmas(self) -> tuple[float, ...]:
        every = (0.25, 0.5) if self.data_name == "cifar10" else (0.25, 0.5, 0.75)
        return self.where.sigma or {"small": (0.5,), "medium": every[:1], "full": every}[self.where.size]

    @property
    def preset(self) -> Preset:
        return PRESETS["cifar10" if self.data_name == "cifar10" else "mnist-small" if self.where.small else "mnist"]

    def say(self, command: str, *flags: object) -> None:
        """Prints a step as one would type it."""
        source: list[object] = ["--data", self.data.name if self.embedded else self.where.data]
        source += ["--data-dir", self.where.data_dir] if self.where.data_dir else []
        source += ["--validation", len(self.data.x_val), "--train-images", len(self.data.x_train)]
        words = [*command.split(), *source, *flags]
        print(f"+ pacd-fast {shlex.join(map(str, words))}", file=sys.stderr, flush=True)

    def attack(self, method: str, target_class: int, **changes: Any) -> Pacd:
        """The preset's attack against a method, at this scale."""
        recipe = dict(changes.pop("recipe", {}))
        if self.scale.craft_epochs is not None:  # the authors give SmoothAdv, with one lower step, twice the epochs
            recipe = {"epochs": self.scale.craft_epochs * (2 if method == "smoothadv" else 1), **recipe}
        recipe.setdefault("dtype", self.scale.craft_dtype)
        return self.preset.attack(method, self.data.name, target_class, recipe=recipe, **changes)

    def crafted(self, name: str, attack: Pacd) -> dict[str, Path]:
        """The poison files of a setting, one per crafting seed, by name; made where they are not there."""
        made = "" if self.scale.craft_epochs is None else f"-crafted{self.scale.craft_epochs}"
        made += "" if attack.recipe.dtype == "float32" else f"-{attack.recipe.dtype}"
        labels = [name if seed == 0 else f"{name}-seed{seed}" for seed in range(self.scale.poisons)]
        found = {label: self.work / f"{self.label}-{label}{made}.npz" for label in labels}
        team, seeds = self.ranks.teams(self.scale.poisons)
        for seed in seeds:
            here, out = dataclasses.replace(attack, seed=seed), found[labels[seed]]
            if not team.everyones(out.exists())[0]:
                flags: list[object] = ["--target-class", here.target_class, "--epsilon", here.ball.epsilon]
                flags += [] if here.sigma is None else ["--sigma", here.sigma]
                kind = "standard" if here.sigma is None else "pacd"
                flags += ["--epochs", here.recipe.epochs, "--dtype", here.recipe.dtype]
                self.say(f"poison {kind}", *flags, "--seed", seed, "--out", out)
                partial = out.with_name(out.name + ".partial")
                poison = pacd(
                    self.data, here, device=self.where.device, checkpoint=partial, resume=True,
                    metrics=out.with_suffix(".jsonl"), progress=self.ranks.rank == 0,
                    group=team.group(),
                )  # fmt: skip
                if team.rank == 0:
                    poison.save(out)
                    partial.unlink(missing_ok=True)
        self.ranks.everyones("they are there")
        return found

    def baseline(self, kind: str, target_class: int) -> dict[str, Path]:
        """The file of a watermark or of noise in the preset's ball."""
        out = self.work / f"{self.label}-{kind}.npz"
        if self.ranks.rank == 0 and not out.exists():
            self.say(f"poison {kind}", "--target-class", target_class, "--out", out)
            make = {"watermark": watermark, "random": random}[kind]
            make(self.data, target_class=target_class, ball=Ball(self.preset.epsilon)).save(out)
        self.ranks.everyones("it is there")
        return {kind: out}

    def training(self, method: str, sigma: float | None, **changes: Any) -> Training:
        """How this experiment's victims train."""
        given: dict[str, Any] = {} if sigma is None else {"sigma": sigma}
        if method == "macer":
            given["k"] = self.scale.macer_k
        return Training(method, given, **{"epochs": self.scale.epochs, "dtype": self.scale.train_dtype, **changes})

    def audit(
        self, folder: str, training: Training, sigma: float, target_class: int, poisons: Mapping[str, Path],
        seeds: int | None = None, own_seeds: Mapping[str, int] | None = None, **changes: Any,
    ) -> dict[str, Audited]:  # fmt: skip
        """Figures by training set, "clean" among them; folders with one name share their victims.

        seeds: victims of a training set; own_seeds: of some of the poisons, by name.
        """
        settings = Audit(
            training,
            target_class,
            sigma,
            seeds=self.scale.seeds if seeds is None else seeds,
            images=min(self.scale.count, int((self.data.y_test == target_class).sum())),
            n=self.scale.n,
            others=min(self.scale.others, int((self.data.y_test != target_class).sum())),
            others_n=self.scale.others_n,
            attacked=self.scale.attacked,
            dtype=self.scale.dtype,
            own_seeds={poisons[name].stem: count for name, count in (own_seeds or {}).items()},
        )
        settings = dataclasses.replace(settings, **changes)
        half = "" if training.dtype == "float32" else f"-{training.dtype}"
        work = self.work / f"{self.label}-{folder}-epochs{training.epochs}{half}"
        files = {path.stem: Poison.load(path) for path in poisons.values()}
        counts = {path: settings.own_seeds.get(path.stem, settings.seeds) for path in poisons.values()}
        for count in sorted(set(counts.values())):
            self.say(
                "audit", "--poison", *[path for path in counts if counts[path] == count], "--method", training.method,
                "--seeds", count, "--epochs", training.epochs, "--train-dtype", training.dtype,
                "--count", settings.images, "--n", settings.n, "--work", work,
            )  # fmt: skip
        found = audit(self.data, files, settings, work, device=self.where.device, progress=True, ranks=self.ranks)
        if self.ranks.rank == 0:
            self.seconds |= {path: files[path.stem].settings.get("seconds", 0.0) for path in poisons.values()}
            for name in found:
                self.seconds |= settings.seconds(name, work)
        names = {path.stem: name for name, path in poisons.items()}
        return {names.get(stem, stem): each for stem, each in found.items()}

    def row(self, table: str, key: Sequence[str], poisons: Sequence[Audited] = (), **row: Any) -> None:
        """Keeps a row, prints it, and puts it into the results file.

        poisons: the audits of the row's poisons, for how much of the spread is theirs and how much their victims'.
        """
        victims = sum(len(each.acr) for each in poisons) or self.scale.seeds
        images = row.pop("images", self.scale.count)
        row = {"data": self.label, **row, "victims": victims, "epochs": self.scale.epochs}
        row |= {"n": self.scale.n, "images": images}
        precisions = {"crafted in": self.scale.craft_dtype, "trained in": self.scale.train_dtype}
        row |= precisions | {"certified in": self.scale.dtype}
        if (both := spread([each.acr for each in poisons])) is not None:
            row["sd of poisons, victims"] = f"{both[0]:.3f}, {both[1]:.3f}"
        key = ["data", *key, "epochs", "n", "images", *precisions, "certified in"]
        if not add_row(self.results, table, key, row, self.where.device, most="victims"):
            print(f"{self.results} keeps its row, which has more victims", file=sys.stderr)
        self.rows.setdefault(table, []).append(row)
        print(", ".join(f"{name} {value}" for name, value in row.items()), file=sys.stderr, flush=True)

    def judge(self, claim: str, ours: str, cells: Mapping[str, bool]) -> None:
        """Records whether the paper's claim holds, by the rule that was written before, and at which commit.

        And the minutes that crafting, training and certification took on the clock, also for other experiments.
        """
        row = {"preset": self.name, "data": self.label, "the paper's claim": claim, "here": ours}
        minutes = f"{sum(self.seconds.values()) / 60:.0f}" if self.seconds else "-"
        row |= {"verdict": verdict(cells), "commit": commit(), "minutes": minutes}
        add_row(self.results, "PACD claims", ["preset", "data"], row, self.where.device)
        print(f"{claim}: {ours}; {verdict(cells)}", file=sys.stderr)

    def finish(self) -> None:
        """Prints the tables of this run, and keeps them as one Markdown file and one JSON file."""
        columns = {
            table: list(dict.fromkeys(name for row in rows for name in row)) for table, rows in self.rows.items()
        }
        filled = {
            table: [{name: row.get(name, "-") for name in columns[table]} for row in rows]
            for table, rows in self.rows.items()
        }
        text = "\n\n".join(f"{table}\n\n{markdown(rows)}" for table, rows in filled.items())
        for suffix, content in ((".md", text), (".json", json.dumps(filled, indent=1))):
            with replaced(self.picture.with_suffix(suffix)) as temporary:
                temporary.write_text(content + "\n", encoding="utf-8")
        print(text)

    @property
    def picture(self) -> Path:
        return self.shown / f"{self.label}-{self.name}.png"


def together(audits: Sequence[Audited]) -> Audited:
    """The victims of several poisons of one setting."""
    lists = {
        each.name: [value for audited in audits for value in getattr(audited, each.name)]
        for each in dataclasses.fields(Audited)
    }
    return Audited(**lists)
