"""What poison does to certified robustness: victims from scratch on clean and poisoned data, certified side by side."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pacd_fast import plots, results
from pacd_fast.poison import Poison
from pacd_fast.results import Results
from pacd_fast.summary import mean_and_deviation, summarize
from pacd_fast.victims import numbered

__all__ = ["Audit", "Measured", "run"]

CLEAN = "clean"


@dataclass(frozen=True)
class Audit:
    """What to do to every training set: train `seeds` victims, certify test images of the target class and of others.

    source: the flags that name the data (--data, --data-dir, ...); recipe: those of `train` after --method; images:
    how many of the target class; others: how many of all other classes together, certified with others_n samples each;
    attacked: images of the target class for the PGD distortion, 0 for none; sigma: of certification; indices: certify
    these test images instead of some of the target class; model: the victims' network, by default the data's.
    """

    source: tuple[object, ...]
    method: str
    recipe: tuple[object, ...]
    target_class: int
    seeds: int = 5
    first_seed: int = 0
    images: int = 500
    n: int = 100_000
    others: int = 200
    others_n: int = 10_000
    attacked: int = 50
    choice: int = 0
    dtype: str = "float32"
    device: str = "auto"
    sigma: float | None = None
    indices: tuple[int, ...] | None = None
    model: str | None = None

    def certificates(self, victim: Path, others: bool = False) -> Path:
        """The file of a victim's certificates of the target class, of the test images by index, or of the others."""
        what = "images" if self.indices is not None and not others else f"class-{self.target_class}"
        return victim.with_suffix(f".{'not-' * others}{what}.tsv")


@dataclass(frozen=True)
class Measured:
    """One training set's victims, a number per victim, of the target class but for others_*.

    accuracy: of the base classifier without noise; others_* and distortion are empty where nothing was measured.
    """

    accuracy: list[float]
    acr: list[float]
    aca: list[float]
    others_acr: list[float]
    others_aca: list[float]
    distortion: list[float]


def run(
    audit: Audit,
    poisons: Mapping[str, str | Path],
    work: str | Path,
    step: Callable[[Sequence[object]], str],
    clean: bool = True,
) -> dict[str, Measured]:
    """Audits training sets: clean data first, then each poison file under its name.

    step: runs one pacd-fast command and returns what it printed.  Every victim, and every certified image, is kept in
    `work`: run again, an audit goes on where it stopped.
    """
    work = Path(work)
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Measured] = {}
    sets: dict[str, str | Path | None] = {CLEAN: None} if clean else {}
    if CLEAN in poisons:
        raise ValueError(f"a poison cannot be called {CLEAN!r}: rename the file")
    network = [] if audit.model is None else ["--model", audit.model]
    smoothed = network + ([] if audit.sigma is None else ["--sigma", audit.sigma])
    for name, path in {**sets, **poisons}.items():
        target, others, checkpoints = [], [], []
        for seed in range(audit.first_seed, audit.first_seed + audit.seeds):
            victim = numbered(work / f"{name}-{audit.method}.safetensors", seed)
            checkpoints.append(victim)
            poisoned = [] if path is None else ["--poison", path]
            where = [*audit.source, "--device", audit.device]
            step(
                ["train", *where, *poisoned, "--method", audit.method, *network, *audit.recipe]
                + ["--seed", seed, "--resume", "--metrics", victim.with_suffix(".jsonl"), "--out", victim]
            )
            certify = ["certify", *where, "--checkpoint", victim, *smoothed, "--dtype", audit.dtype]
            certify += ["--choice", audit.choice]
            file = audit.certificates(victim)
            chosen = ["--target-class", audit.target_class, "--count", audit.images]
            if audit.indices is not None:
                chosen = ["--images", *audit.indices]
            step([*certify, *chosen, "--n", audit.n, "--out", file])
            target.append(results.exactly(file, audit.images if audit.indices is None else audit.indices))
            if audit.others:
                file = audit.certificates(victim, others=True)
                except_ = ["--except-class", audit.target_class, "--count", audit.others, "--n", audit.others_n]
                step([*certify, *except_, "--out", file])
                others.append(results.exactly(file, audit.others))
        what = f"{audit.target_class}-{audit.first_seed}-{audit.seeds}-{audit.attacked}-{audit.choice}"
        kept = work / f"{name}-{audit.method}-evaluate-{what}.json"
        if not kept.exists() or kept.stat().st_mtime < max(victim.stat().st_mtime for victim in checkpoints):
            measure = ["evaluate", *audit.source, "--device", audit.device, "--checkpoint", *checkpoints, "--json"]
            wanted = ["--target-class", audit.target_class, "--count", audit.attacked, "--choice", audit.choice]
            kept.write_text(step([*measure, *wanted, *smoothed]), encoding="utf-8")
        evaluated = json.loads(kept.read_text(encoding="utf-8"))["all"]
        summaries = [summarize(each, [0.0]) for each in target]
        beside = [summarize(each, [0.0]) for each in others]
        found[name] = Measured(
            evaluated["natural"],
            [each.acr for each in summaries],
            [each.aca for each in summaries],
            [each.acr for each in beside],
            [each.aca for each in beside],
            evaluated["distortion"],
        )
    return found


def curves(audit: Audit, names: Sequence[str], work: str | Path, out: str | Path, title: str) -> None:
    """Certified accuracy of the target class against radius, over all victims of a training set."""
    together: dict[str, Results] = {}
    for name in names:
        seeds = range(audit.first_seed, audit.first_seed + audit.seeds)
        victims = [numbered(Path(work) / f"{name}-{audit.method}.safetensors", seed) for seed in seeds]
        together[name] = results.pooled([results.read(audit.certificates(victim)) for victim in victims])
    plots.certified_accuracy(together, out, title)


def rows(found: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """The table's rows: mean and standard deviation over victims, and the change of the ACR against clean data."""
    clean = found.get(CLEAN)
    table = []
    for name, each in found.items():
        row = {
            "data": name,
            "ACR": mean_and_deviation(each.acr, ".3f"),
            "ACA, %": mean_and_deviation([100 * a for a in each.aca], ".2f"),
            "ACR falls by": _fall(clean.acr, each.acr) if clean is not None and each is not clean else "-",
            "accuracy, %": mean_and_deviation([100 * a for a in each.accuracy], ".2f"),
            "others' ACR": mean_and_deviation(each.others_acr, ".3f"),
            "others' ACA, %": mean_and_deviation([100 * a for a in each.others_aca], ".2f"),
            "PGD distortion": mean_and_deviation(each.distortion, ".3f"),
            "victims": len(each.acr),
        }
        table.append(row)
    return table


def _fall(clean: Sequence[float], poisoned: Sequence[float]) -> str:
    before, after = sum(clean) / len(clean), sum(poisoned) / len(poisoned)
    return f"{1 - after / before:.1%}" if before > 0 else "-"


def as_text(table: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned columns."""
    cells = [list(table[0]), *([str(value) for value in row.values()] for row in table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def save(path: str | Path, audit: Audit, found: Mapping[str, Measured], poisons: Mapping[str, Poison]) -> None:
    """Everything as JSON: the audit's settings, a list per figure and training set, and what each poison says."""
    content = {
        "audit": dataclasses.asdict(audit),
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
    Path(path).write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
