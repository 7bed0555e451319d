"""Which linear solver serves PACD best: the ACR that is left after equal time of one thread.

Time is the processor's, so that other programs do not count.

Embedded digits, class 8, epsilon 0.1, Gaussian augmentation at sigma 0.5.  Victims from scratch, certified at n = 1000.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.report import record
from pacd_fast import certify
from pacd_fast.data import Dataset, as_float, load_dataset, random_subset
from pacd_fast.experiments import plots
from pacd_fast.networks import build
from pacd_fast.poisoning import PRESETS, Ball, Pacd, Recipe, pacd
from pacd_fast.tables import mean_and_deviation
from pacd_fast.training import Gaussian, fit

SIGMA, TARGET, IMAGES = 0.5, 8, 100
SOLVERS = {
    "minres, Gauss-Newton": {"solver": "minres"},
    "cg, Gauss-Newton": {"solver": "cg"},
    "nystrom, Gauss-Newton": {"solver": "nystrom", "solver_steps": 5, "rank": 5},
    "neumann, Gauss-Newton": {"solver": "neumann"},
    "minres, Hessian": {"solver": "minres", "curvature": "hessian"},
    "adam, Hessian (the authors')": {"solver": "adam", "curvature": "hessian"},
}
PICTURE = Path(__file__).parent / "figures" / "pacd-solvers.png"


def radii(data: Dataset, victims: int) -> list[float]:
    """The ACR of the target class, a victim each."""
    chosen = random_subset(data.y_test, TARGET, IMAGES, 0)
    x, found = as_float(data.x_test[chosen]), []
    for seed in range(100, 100 + victims):
        torch.manual_seed(seed)
        model = build("mnist-cnn", num_classes=10, in_channels=1, image_size=(28, 28))
        fit(model, data, Gaussian(SIGMA), epochs=40, seed=seed)
        each = certify(model, x, num_classes=10, sigma=SIGMA, n=1000, seed=seed, batch_size=256)
        found.append(float((each.radius * (each.prediction == TARGET)).mean()))
    return found


def main(seconds: float = 120, victims: int = 3) -> None:
    torch.set_num_threads(1)
    data = load_dataset("mnist5k", validation=500)
    clean, rows, picture = radii(data, victims), [], {}
    print(f"clean {mean_and_deviation(clean, '.3f')}", flush=True)
    for name, settings in SOLVERS.items():
        preset = PRESETS["mnist-small"].recipe.__dict__
        recipe = Recipe(**{**preset, "epochs": 10_000, **settings})
        attack = Pacd(Gaussian(SIGMA), TARGET, Ball(0.1), recipe=recipe)
        made = pacd(data, attack, max_seconds=seconds, clock=time.process_time)
        left = radii(made.apply(data), victims)
        picture[name] = {"ACR": left}
        rows.append(
            {
                f"solver, {seconds:g} s of crafting": name,
                "outer steps": made.settings["outer_steps"],
                "unsolved": made.settings["unsolved"],
                "ACR": mean_and_deviation(left, ".3f"),
                "ACR, clean": mean_and_deviation(clean, ".3f"),
                "falls by": f"{1 - sum(left) / sum(clean):.1%}",
            }
        )
        print(rows[-1], flush=True)
    record("PACD solvers", rows)
    plots.bars({name.replace(", ", "\n"): each for name, each in picture.items()}, PICTURE, "ACR left", "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="of crafting, each solver")
    parser.add_argument("--victims", type=int, default=3)
    options = parser.parse_args()
    main(options.seconds, options.victims)
