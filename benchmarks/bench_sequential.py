"""Samples that certification needs when it may stop early: on published logs, and on votes of a network of ours.

    python -m benchmarks.bench_sequential [--published radii.npz]

Published: an .npz with one array of l2 radii an image for each log, named ...sigmaS, from runs of 100 000 samples (0
where they abstained); PACD_PUBLISHED_RADII may hold its path. An image's p_A is taken as Phi(radius / sigma); for those
that abstained it is not known: 0.3, and the worst case 1/2. Votes are drawn anew from p_A.

Ours: mnist_votes.npz holds the votes of 10 000 noisy copies (sigma = 1) of 500 test digits of mnist5k, by the mnist-cnn
of `pacd-fast train --sigma 1.0 --epochs 6` in bfloat16; votes are drawn anew from their shares.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks.report import record
from pacd_fast import _C, certify
from pacd_fast.data import load_dataset
from pacd_fast.networks import load_checkpoint
from pacd_fast.training import Training, train

N0, N, ALPHA = 100, 100_000, 0.001
VOTES = Path(__file__).parent / "mnist_votes.npz"
Outcomes = dict[str, np.ndarray]


def simulate(rule: Any, p: np.ndarray, runs: int, seed: int = 0) -> Outcomes:
    """Outcomes of `runs` runs of every image, p [N, classes]; `hits`: votes for the selected class among all n."""
    generator, steps, parts = np.random.default_rng(seed), np.diff([0, *rule.looks]), []
    for _ in range(runs):
        selection = generator.multinomial(rule.n0, p)
        votes = generator.multinomial(steps, p[:, None])
        outcome = rule.decide(selection, votes)
        outcome["hits"] = np.take_along_axis(votes.sum(1), outcome["selected"][:, None], 1)[:, 0]
        parts.append(outcome)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def published_p(radii: np.ndarray, sigma: float, abstained: float) -> np.ndarray:
    """[N, 4]: the selected class and three equal rivals."""
    p = np.where(radii > 0, stats.norm.cdf(radii.astype(np.float64) / sigma), abstained)
    return np.stack([p, (1 - p) / 3, (1 - p) / 3, (1 - p) / 3], 1)


def oracle(p: np.ndarray, targets: np.ndarray, runs: int, seed: int = 0) -> np.ndarray:
    """Samples [targets, images] of who knows p: until the likelihood ratio of p to the target is 1 / alpha, at most n.

    It looks after every 1 % more samples, and says "not certified" at the same level.
    """
    looks = [10]
    while looks[-1] < N:
        looks.append(min(N, max(looks[-1] + 1, int(looks[-1] * 1.01))))
    generator, t = np.random.default_rng(seed), np.array(looks)
    p = np.repeat(p, runs)[:, None]
    hits = generator.binomial(np.diff([0, *looks]), p).cumsum(1)
    samples = []
    for target in targets:
        ratio = hits * np.log(p / target) + (t - hits) * np.log((1 - p) / (1 - target))
        over = ratio >= -np.log(ALPHA)
        over[:, -1] = True
        samples.append(t[over.argmax(1)])
    return np.array(samples)


def published(path: str, runs: int = 10) -> None:
    rows = []
    with np.load(path) as logs:
        for name in logs:
            radii, sigma = logs[name], float(name.rsplit("sigma", 1)[1])
            grid = np.arange(0, radii.max(), 0.25).tolist()
            p = published_p(radii, sigma, 0.3)
            knows = oracle(p[:, 0], np.array([_C.radius_target(sigma, r) for r in grid]), runs)
            means, worst, lost = [], [], []
            for radius in grid:
                rule = _C.SequentialRadii(N0, N, ALPHA, sigma, radii=[radius])
                outcome = simulate(rule, p, runs)
                means.append(outcome["samples"].mean())
                full = stats.beta.ppf(ALPHA, outcome["hits"], N - outcome["hits"] + 1) >= _C.radius_target(
                    sigma, radius
                )
                lost.append(100 * (full.mean() - (outcome["prediction"] >= 0).mean()))
                worst.append(simulate(rule, published_p(radii, sigma, 0.5), 1)["samples"].mean())
            whole = simulate(_C.SequentialRadii(N0, N, ALPHA, sigma, radii=grid), p, runs)["samples"].mean()
            rows.append(
                {
                    "log": name,
                    "one radius": round(float(np.mean(means))),
                    "oracle": round(float(knows.mean())),
                    "of oracle": float(np.mean(means) / knows.mean()),
                    "without 0": float(np.mean(means[1:]) / knows[1:].mean()),
                    "fewer": N / float(np.mean(means)),
                    "fewer at worst": N / float(np.mean(worst)),
                    "grid": round(float(whole)),
                    "oracle's grid": round(float(knows.max(0).mean())),
                    "fewer ": N / float(whole),
                    "points lost": max(lost),
                }
            )
    record("sequential radii on published logs", rows)


def ours(runs: int = 10) -> None:
    with np.load(VOTES) as file:
        p = file["counts"].astype(np.float64) + 1e-3
    p /= p.sum(1, keepdims=True)
    radii = [0.5, 1.0, 1.5, 2.0, 2.5]
    rows: list[dict[str, Any]] = []
    for sides in (1, 2):
        makers = {
            "full": lambda sides=sides: _C.FullCertificates(N0, N, ALPHA, 1.0, sides=sides),
            "radii": lambda sides=sides: _C.SequentialRadii(N0, N, ALPHA, 1.0, radii=radii, sides=sides),
            "tolerance 0.05": lambda sides=sides: _C.SequentialRadii(N0, N, ALPHA, 1.0, tolerance=0.05, sides=sides),
        }
        full: Outcomes = {}
        for mode, make in makers.items():
            start = time.perf_counter()
            rule = make()
            seconds = time.perf_counter() - start
            outcome = simulate(rule, p, runs)
            full = full or outcome
            rows.append(
                {
                    "mode": mode,
                    "sides": sides,
                    "samples": round(float(outcome["samples"].mean())),
                    "fewer": N / float(outcome["samples"].mean()),
                    "ACR": float(outcome["radius"].mean()),
                    **{f">= {r}": float((outcome["radius"] >= r).mean()) for r in radii},
                    "within 0.05": float((full["radius"] - outcome["radius"] <= 0.05).mean()),
                    "tables s": seconds,
                }
            )
    record("sequential modes on MNIST votes", rows)
    predictions(p, runs)
    planning(p, radii)


def predictions(p: np.ndarray, runs: int) -> None:
    """PREDICT of Cohen et al. 2019 (n samples, a two-sided test of the top two) against bets that stop."""
    generator, rows = np.random.default_rng(1), []
    for n in (1000, N):
        votes = np.sort(generator.multinomial(n, np.repeat(p, runs, 0)), 1)
        first, both = votes[:, -1], votes[:, -1] + votes[:, -2]
        rows.append(
            {
                "rule": f"PREDICT, n = {n}",
                "samples": float(n),
                "predicted": float((2 * stats.binom.sf(first - 1, both, 0.5) <= ALPHA).mean()),
            }
        )
        for n0 in (20, 100):
            outcome = simulate(_C.SequentialPredict(n0, n, ALPHA), p, runs)
            rows.append(
                {
                    "rule": f"sequential, n0 = {n0}, n = {n}",
                    "samples": n0 + float(outcome["samples"].mean()),
                    "predicted": float((outcome["prediction"] >= 0).mean()),
                }
            )
    for row in rows:
        row["fewer"] = (
            next(other["samples"] for other in reversed(rows[: rows.index(row) + 1]) if "PREDICT" in other["rule"])
            / row["samples"]
        )
    record("sequential prediction on MNIST votes", rows)


def planning(p: np.ndarray, radii: list[float], lag: int = 2) -> None:
    """The host's time for planning and reporting, and samples drawn in vain, with reports `lag` batches late."""
    rule, rows = _C.SequentialRadii(N0, N, ALPHA, 1.0, radii=radii), []
    for size in (256, 2048, 16_384):
        generator = np.random.default_rng(2)
        planner = _C.SequentialPlanner(rule, list(range(len(p))), p.shape[1])
        needed = batches = pieces_drawn = 0
        seconds, queue = 0.0, []
        table = np.zeros((size + 1, p.shape[1]), dtype=np.int64)
        while not planner.done:
            start = time.perf_counter()
            pieces, complete = planner.plan(size)
            seconds += time.perf_counter() - start
            batches, pieces_drawn = batches + 1, pieces_drawn + len(pieces)
            table[pieces[:, 4]] += generator.multinomial(pieces[:, 3], p[pieces[:, 0]])
            queue.append(table[complete])
            table[complete] = 0
            while len(queue) > lag or (queue and not len(pieces)):
                start = time.perf_counter()
                planner.report(queue.pop(0))
                needed += sum(outcome.samples + N0 for _, outcome in planner.finished())
                seconds += time.perf_counter() - start
        rows.append(
            {
                "rows a batch": size,
                "batches": batches,
                "pieces a batch": pieces_drawn / batches,
                "host us a batch": 1e6 * seconds / batches,
                "host ns a sample": 1e9 * seconds / planner.drawn,
                "in vain %": 100 * (planner.drawn / needed - 1),
            }
        )
    record("sequential planning", rows)


MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "radii 0.5, 1, 1.5": {"radii": [0.5, 1.0, 1.5]},
    "tolerance 0.05": {"tolerance": 0.05},
    "two sides, radii 0.5, 1, 1.5": {"sides": 2, "radii": [0.5, 1.0, 1.5]},
}


def modes(images: int, sigma: float = 0.5) -> None:
    """Whole certifications of test digits of mnist5k by a network of ours, in bfloat16."""
    data = load_dataset("mnist5k")
    checkpoint = Path(__file__).parent.parent / "build" / f"modes-{sigma}.safetensors"
    if not checkpoint.exists():
        checkpoint.parent.mkdir(exist_ok=True)
        train(checkpoint, data, Training(model="mnist-cnn", hyperparameters={"sigma": sigma}, epochs=20), progress=True)
    model = load_checkpoint(checkpoint).model
    x, y = data.x_test[:images], data.y_test[:images]
    rows: list[dict[str, Any]] = []
    first = 0.0
    for mode, options in MODES.items():
        start = time.perf_counter()
        found = certify(
            model, x, num_classes=10, sigma=sigma, seed=1, dtype=torch.bfloat16, batch_size=256, progress=True,
            compile=False, **options,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        right, samples = found.prediction == y, float(found.samples.double().mean())
        first = first or seconds
        rows.append(
            {
                f"{images} digits, n = 100 000": mode,
                "samples an image": round(samples),
                "fewer": N / samples,
                "s": seconds,
                "times faster": first / seconds,
                "ACR": float((found.radius * right).mean()),
                **{f"at {r}": f"{float((right & (found.radius >= r)).double().mean()):.1%}" for r in (0.5, 1.0, 1.5)},
            }
        )
    record("modes", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", default=os.environ.get("PACD_PUBLISHED_RADII"), help="radii of published logs")
    parser.add_argument("--modes", type=int, metavar="DIGITS", help="only whole certifications of so many test digits")
    options = parser.parse_known_args()[0]
    if options.modes:
        modes(options.modes)
        return
    path = options.published
    if path:
        published(path)
    else:
        print("no --published and no PACD_PUBLISHED_RADII: the published logs are left out")
    ours()


if __name__ == "__main__":
    main()
