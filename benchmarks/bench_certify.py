"""Whole certifications at n = 100 000: ours, the published loop, ART's, and the bare forward pass.

Every contender runs in a process of its own, so that none inherits another's memory, caches or settings, and all of
them in turn in every round; ratios are those of one round.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import pacd_fast
from benchmarks.report import medians, record
from pacd_fast import _C, ops
from pacd_fast.data import as_float, load_dataset
from pacd_fast.networks import build
from pacd_fast.ops import reference

N = 100_000
DEVICE = "cuda" if torch.cuda.is_available() and ops.cuda_library == "loaded" else "cpu"


def network(dtype: torch.dtype, layout: torch.memory_format) -> nn.Module:
    torch.manual_seed(0)
    model = build("mnist-cnn", num_classes=10, in_channels=1, image_size=(28, 28)).eval()
    return model.to(DEVICE, dtype, memory_format=layout)


def image() -> Tensor:
    return as_float(load_dataset("mnist5k").x_test[0]).to(DEVICE)


def published() -> tuple[float, str]:
    smooth, x = reference.Smooth(network(torch.float32, torch.contiguous_format), 10, 0.5), image()
    smooth.certify(x, 100, 2000, 0.001, 1000)
    start = time.perf_counter()
    smooth.certify(x, 100, N, 0.001, 1000)
    return time.perf_counter() - start, "batch 1000"


def art() -> tuple[float, str]:
    """PyTorchRandomizedSmoothing.certify of the Adversarial Robustness Toolbox."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
    smooth = PyTorchRandomizedSmoothing(
        model=network(torch.float32, torch.contiguous_format),
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 28, 28),
        nb_classes=10,
        channels_first=True,
        sample_size=100,
        scale=0.5,
        alpha=0.001,
        device_type="gpu" if DEVICE == "cuda" else "cpu",
    )
    x = image().unsqueeze(0).cpu().numpy().astype(np.float32)
    smooth.certify(x, n=2000, batch_size=1000)
    start = time.perf_counter()
    smooth.certify(x, n=N, batch_size=1000)
    return time.perf_counter() - start, "batch 1000"


def bare(dtype: torch.dtype) -> tuple[float, str]:
    """Nothing but the network, on N noisy samples that lie ready, at the best of several batch sizes and layouts.

    Noisy, and several batches in turn, because max pooling depends on its input: on the clean image, or on one batch
    again and again, its branches are guessed right and a pass takes up to a fifth less time.
    """
    if DEVICE == "cpu":
        _C.keep_freed_memory()
    x, found = image().unsqueeze(0), {}
    for layout in (torch.contiguous_format, torch.channels_last):
        model = network(dtype, layout)
        for size in (64, 128, 256, 512, 1024) if DEVICE == "cpu" else (1024, 4096, 16384):
            batches = [
                ops.noisy_copies(x, 0.5, size, 1, first=i * size, dtype=dtype, memory_format=layout) for i in range(8)
            ]
            with torch.inference_mode():
                run = {"all": lambda model=model, batches=batches: [model(batch) for batch in batches]}
                seconds = medians(run, rounds=5)["all"] / 8
            found[size, str(layout).removeprefix("torch.").removesuffix("_format")] = (seconds / size, model, batches)
    size, name = min(found, key=lambda key: found[key][0])
    _, model, batches = found[size, name]
    start = time.perf_counter()
    with torch.inference_mode():
        for i in range(N // size):
            model(batches[i % 8])
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * N / (N // size * size), f"batch {size}, {name}"


def ours(dtype: torch.dtype) -> tuple[float, str]:
    model, x = network(torch.float32, torch.contiguous_format), image().unsqueeze(0)
    options: dict[str, Any] = dict(num_classes=10, sigma=0.5, seed=1, dtype=dtype)
    pacd_fast.certify(model, x, n=2000, **options)
    start = time.perf_counter()
    pacd_fast.certify(model, x, n=N, **options)
    return time.perf_counter() - start, "batch size found on the way"


CONTENDERS = {
    "published loop (Cohen et al.)": published,
    "ART PyTorchRandomizedSmoothing": art,
    "bare forward pass, float32": lambda: bare(torch.float32),
    "pacd_fast, float32": lambda: ours(torch.float32),
    "bare forward pass, bfloat16": lambda: bare(torch.bfloat16),
    "pacd_fast, bfloat16": lambda: ours(torch.bfloat16),
}


def main(rounds: int = 5) -> None:
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    how: dict[str, str] = {}
    for _ in tqdm(range(rounds), unit="round", desc="certify", mininterval=10):
        for name in CONTENDERS:
            command = [sys.executable, "-m", "benchmarks.bench_certify", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                print(f"{name} is left out: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                times[name].append(math.nan)
                continue
            seconds, how[name] = done.stdout.strip().splitlines()[-1].split("\t")
            times[name].append(float(seconds))

    def ratio(over: str, under: str) -> float:
        ratios = sorted(a / b for a, b in zip(times[over], times[under], strict=True) if a == a and b == b)
        return ratios[len(ratios) // 2] if ratios else math.nan

    rows = []
    for name, each in times.items():
        seconds = [one for one in each if one == one]
        if not seconds:
            continue
        median = sorted(seconds)[len(seconds) // 2]
        forward = name.replace("pacd_fast", "bare forward pass")
        rows.append(
            {
                "one image, n = 100 000": f"{name}, {how[name]}",
                "s": median,
                "us a sample": median / N * 1e6,
                "times the published loop": ratio("published loop (Cohen et al.)", name),
                "over the bare forward pass": f"{ratio(name, forward) - 1:+.1%}" if forward != name else "-",
            }
        )
    record("certification", rows, DEVICE)


if __name__ == "__main__":
    print("\t".join(map(str, CONTENDERS[sys.argv[1]]())))
