"""Several processes: certification by two ranks of a thread each beside one, and what a hand-out costs.

    python -m benchmarks.bench_ranks

Rates are of the sampling alone: every rank is ready before the clock starts, and it stops when all have ended.  One and
two ranks in turn in every round; ratios are those of one round.  On a machine that others use too, the processor's
seconds say more: those of one rank over those of the busier one of two are what two free cores come to.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from benchmarks.report import record
from pacd_fast.certification.noise import Noise
from pacd_fast.certification.question import Question
from pacd_fast.certification.sharing import Share, SharedImages
from pacd_fast.certification.vote import certificates, sampler_of
from pacd_fast.data import load_dataset
from pacd_fast.networks import build
from pacd_fast.randomness import seeded
from pacd_fast.ranks import Ranks

IMAGES, N, ROUNDS = 200, 10_000, 3
HANDOUTS = 20_000
RANKS = (2, 4, 8)


def ranks_of(name: str, port: int, rank: int, size: int) -> Ranks:
    store = dist.TCPStore("localhost", port, None, False, timedelta(minutes=10))
    return Ranks(dist.PrefixStore(name, store), rank, size)


def start(what: str, port: int, size: int, round_: int) -> tuple[float, float]:
    """Seconds from when all of so many ranks are ready to the end of the last, and the processor's of the busiest."""
    name = f"{what}/{size}/{round_}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "benchmarks.bench_ranks", what, name, str(port), str(size)]
    running = [subprocess.Popen([*words, str(rank)], env=environment, stdout=subprocess.PIPE) for rank in range(size)]
    said = [[float(text) for text in each.communicate()[0].split()] for each in running]
    if any(each.returncode for each in running):
        raise RuntimeError("a rank has failed")
    return said[0][0], max(busy for _, busy in said)


def certified(ranks: Ranks) -> None:
    data = load_dataset("mnist5k")
    torch.set_num_threads(1)
    with seeded(torch.device("cpu"), 0):
        network = build("mnist-cnn", num_classes=10, in_channels=1, image_size=(28, 28))
    question = Question(n=N, futility=0.0)
    images = data.x_test[:IMAGES]
    sampler = sampler_of(network, images, 10, Noise.of("lattice", 0.5, None, None), 0, N, rows=256, compile=False)
    share = SharedImages(ranks, IMAGES) if ranks.size > 1 else Share()
    sampler.classifier(sampler.classifier.empty())
    ranks.everyones("ready")
    started, before = time.perf_counter(), time.process_time()
    for _ in certificates(sampler, question, False, share):
        pass
    busy = time.process_time() - before
    ranks.everyones("done")
    print(time.perf_counter() - started, busy)


def handed(ranks: Ranks) -> None:
    ranks.everyones("ready")
    started, before = time.perf_counter(), time.process_time()
    for _ in ranks.handed(HANDOUTS):
        pass
    busy = time.process_time() - before
    ranks.everyones("done")
    print(time.perf_counter() - started, busy)


def main() -> None:
    if len(sys.argv) == 6:
        what, name, port, size, rank = sys.argv[1:]
        ranks = ranks_of(name, int(port), int(rank), int(size))
        {"certified": certified, "handed": handed}[what](ranks)
        return
    store = dist.TCPStore("localhost", 0, None, True, timedelta(minutes=10), False)
    seconds = [[start("certified", store.port, size, round_) for size in (1, 2)] for round_ in range(ROUNDS)]
    rows = [
        {
            "what": f"{IMAGES} digits, n = {N}, mnist-cnn",
            "one rank, s": statistics.median(one[0] for one, _ in seconds),
            "two ranks, s": statistics.median(two[0] for _, two in seconds),
            "times faster": statistics.median(one[0] / two[0] for one, two in seconds),
            "by the processor's seconds": statistics.median(one[1] / two[1] for one, two in seconds),
        }
    ]
    handouts = []
    for size in RANKS:
        took = statistics.median(start("handed", store.port, size, round_)[0] for round_ in range(ROUNDS))
        handouts.append({"ranks": size, "hand-outs a second": HANDOUTS / took})
    record("ranks", rows)
    record("hand-outs", handouts)


if __name__ == "__main__":
    main()
