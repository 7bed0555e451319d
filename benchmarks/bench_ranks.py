"""Several processes: certification by two ranks of a thread each beside one, and what a hand-out costs.

    python -m benchmarks.bench_ranks [--images 200] [--n 10000] [--rounds 3] [--only ranks | hand-outs]

Rates are of the sampling alone: every rank is ready before the clock starts, and it stops when all have ended.  One and
two ranks in turn in every round; ratios are those of one round.  "Two alone" is what the machine allows: two processes
that certify half of the images each and ask nobody.  On a machine that others use too, the processor's seconds say
more: those of one rank over those of the busier one of two are what two free cores come to.

Hand-outs are counted while so many ranks do nothing but ask.  At most X a second, a hand-out takes S = 1 / X of the
store.  R ranks with T seconds an image keep it busy for a share R S / T of the time, and a rank waits S / (1 - R S / T)
(as where a queue is served at random times), which is 1 % of T at R = T / S - 100.
"""

from __future__ import annotations

import argparse
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

HANDOUTS = 20_000
RANKS = (2, 4, 8)


def ranks_of(name: str, port: int, rank: int, size: int) -> Ranks:
    store = dist.TCPStore("localhost", port, None, False, timedelta(minutes=10))
    return Ranks(dist.PrefixStore(name, store), rank, size)


def start(what: str, store: dist.TCPStore, size: int, *numbers: int) -> tuple[float, float]:
    """Seconds from when all of so many ranks are ready to the end of the last, and the processor's of the busiest."""
    name = f"{what}/{store.add('runs', 1)}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "benchmarks.bench_ranks", *map(str, [what, *numbers, name, store.port, size])]
    running = [subprocess.Popen([*words, str(rank)], env=environment, stdout=subprocess.PIPE) for rank in range(size)]
    said = [[float(text) for text in each.communicate()[0].split()] for each in running]
    if any(each.returncode for each in running):
        raise RuntimeError("a rank has failed")
    return said[0][0], max(busy for _, busy in said)


def certified(ranks: Ranks, images: int, n: int, shared: int) -> None:
    data = load_dataset("mnist5k")
    torch.set_num_threads(1)
    with seeded(torch.device("cpu"), 0):
        network = build("mnist-cnn", num_classes=10, in_channels=1, image_size=(28, 28))
    question = Question(n=n, futility=0.0)
    chosen = data.x_test[:images] if shared else data.x_test[ranks.rank : images : ranks.size]
    sampler = sampler_of(network, chosen, 10, Noise.of("lattice", 0.5, None, None), 0, n, rows=256, compile=False)
    share = SharedImages(ranks, images) if shared and ranks.size > 1 else Share()
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
    if len(sys.argv) > 1 and sys.argv[1] in WORK:
        what, *numbers, name, port, size, rank = sys.argv[1:]
        WORK[what](ranks_of(name, int(port), int(rank), int(size)), *map(int, numbers))
        return
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=200)
    options.add_argument("--n", type=int, default=10_000)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--only", choices=["ranks", "hand-outs"])
    options = options.parse_args()
    store = dist.TCPStore("localhost", 0, None, True, timedelta(minutes=10), False)
    if options.only != "hand-outs":
        one_and_two(store, options.images, options.n, options.rounds)
    if options.only != "ranks":
        hand_outs(store, options.rounds)


def one_and_two(store: dist.TCPStore, images: int, n: int, rounds: int) -> None:
    ways = ((1, 1), (2, 1), (2, 0))
    seconds = [[start("certified", store, size, images, n, shared) for size, shared in ways] for _ in range(rounds)]
    row = {
        "what": f"{images} digits, n = {n}, mnist-cnn, eager",
        "one rank, s": f"{statistics.median(one[0] for one, _, _ in seconds):.1f}",
        "two ranks, s": f"{statistics.median(two[0] for _, two, _ in seconds):.1f}",
        "times faster": f"{statistics.median(one[0] / two[0] for one, two, _ in seconds):.2f}",
        "two alone": f"{statistics.median(one[0] / alone[0] for one, _, alone in seconds):.2f}",
        "by the processor's seconds": f"{statistics.median(one[1] / two[1] for one, two, _ in seconds):.2f}",
    }
    record("ranks", [row])


def hand_outs(store: dist.TCPStore, rounds: int) -> None:
    images = 20
    mnist = start("certified", store, 1, images, 10_000, 1)[1] / images * 10  # processor's seconds at n = 100 000
    rows = []
    for size in RANKS:
        took = statistics.median(start("handed", store, size)[0] for _ in range(rounds))
        rows.append(
            {
                "ranks that ask": size,
                "hand-outs a second": round(HANDOUTS / took),
                f"ranks at 1 %, mnist-cnn, {mnist:.1f} s an image": int(round(mnist * HANDOUTS / took - 100, -2)),
                "ranks at 1 %, 5 ms a sample, 500 s an image": int(round(500 * HANDOUTS / took - 100, -2)),
            }
        )
    record("hand-outs", rows)


WORK = {"certified": certified, "handed": handed}


if __name__ == "__main__":
    main()
