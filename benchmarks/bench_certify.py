"""Whole certifications at n = 100 000: ours, the published loop, ART's, and the bare forward pass, in one run."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import pacd_fast
from benchmarks.report import medians, record
from pacd_fast import datasets, models, ops, reference

N = 100_000


def bare_forward(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> tuple[float, str]:
    """Seconds a sample of nothing but the network, at its best batch size and layout, and which they are."""
    found: dict[str, float] = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        network = models.build("mnist-cnn", num_classes=10, in_channels=1, image_size=(28, 28)).eval()
        network.load_state_dict(model.state_dict())
        network = network.to(x.device, dtype, memory_format=layout)
        for size in (64, 128, 256, 512, 1024) if x.device.type == "cpu" else (1024, 4096, 16384):
            batch = x.expand(size, *x.shape).to(dtype).contiguous(memory_format=layout)
            with torch.inference_mode():
                seconds = medians({"one": lambda network=network, batch=batch: network(batch)}, rounds=9)["one"]
            found[f"{size}, {str(layout).removeprefix('torch.').removesuffix('_format')}"] = seconds / size
    best = min(found, key=lambda key: found[key])
    return found[best], best


def forward_seconds(model: nn.Module, x: torch.Tensor, dtype: torch.dtype, best: str) -> float:
    """Seconds of N samples through the bare network, batch after batch, as long as a certification takes."""
    size, layout = best.split(", ")
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    network = models.build("mnist-cnn", num_classes=10, in_channels=1, image_size=(28, 28)).eval()
    network.load_state_dict(model.state_dict())
    network = network.to(x.device, dtype, memory_format=memory_format)
    batch = x.expand(int(size), *x.shape).to(dtype).contiguous(memory_format=memory_format)
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in range(N // int(size)):
            network(batch)
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * N / (N // int(size) * int(size))


def art_seconds(model: nn.Module, x: torch.Tensor) -> float | None:
    """PyTorchRandomizedSmoothing.certify of the Adversarial Robustness Toolbox; None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
    except ModuleNotFoundError:
        print("art is not installed: pip install '.[bench]'; its row is left out")
        return None
    smooth = PyTorchRandomizedSmoothing(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 28, 28),
        nb_classes=10,
        channels_first=True,
        sample_size=100,
        scale=0.5,
        alpha=0.001,
        device_type="gpu" if x.device.type == "cuda" else "cpu",
    )
    start = time.perf_counter()
    smooth.certify(x.unsqueeze(0).cpu().numpy().astype(np.float32), n=N, batch_size=1000)
    return time.perf_counter() - start


def main(rounds: int = 3) -> None:
    data = datasets.load("mnist5k")
    device = "cuda" if torch.cuda.is_available() and ops.cuda_library == "loaded" else "cpu"
    torch.manual_seed(0)
    model = models.build("mnist-cnn", num_classes=10, in_channels=1, image_size=(28, 28)).eval().to(device)
    x = datasets.as_float(data.x_test[0]).to(device)
    best = {dtype: bare_forward(model, x, dtype)[1] for dtype in (torch.float32, torch.bfloat16)}
    times: dict[str, list[float]] = {}

    def took(name: str, seconds: float | None) -> None:
        if seconds is not None:
            times.setdefault(name, []).append(seconds)

    def ours(dtype: torch.dtype) -> float:
        start = time.perf_counter()
        pacd_fast.certify(model, x.unsqueeze(0), num_classes=10, sigma=0.5, n=N, seed=1, dtype=dtype)
        return time.perf_counter() - start

    def published() -> float:
        start = time.perf_counter()
        reference.Smooth(model, 10, 0.5).certify(x, 100, N, 0.001, 1000)
        return time.perf_counter() - start

    for _ in tqdm(range(rounds), unit="round", desc="certify"):
        took("published", published())
        took("art", art_seconds(model, x))
        for dtype in best:
            took(f"bare {dtype}", forward_seconds(model, x, dtype, best[dtype]))
            took(f"ours {dtype}", ours(dtype))
    median = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    rows: list[dict[str, Any]] = []

    def add(what: str, name: str, bare: str | None) -> None:
        # ratios of figures of the same round, the median of which is told
        pairs = zip(times["published"], times[name], strict=True)
        ratios = sorted(a / b for a, b in pairs)
        rows.append(
            {
                "one image, n = 100 000": what,
                "s": median[name],
                "us a sample": median[name] / N * 1e6,
                "times faster than published": ratios[len(ratios) // 2],
                "over the bare forward pass": median[name] / median[bare] - 1 if bare else "-",
            }
        )

    add("published loop (Cohen et al.), batch 1000", "published", None)
    if "art" in times:
        add("ART PyTorchRandomizedSmoothing, batch 1000", "art", None)
    for dtype in best:
        short = str(dtype).removeprefix("torch.")
        add(f"bare forward pass, {short}, best: batch {best[dtype]}", f"bare {dtype}", None)
        add(f"pacd_fast, {short}", f"ours {dtype}", f"bare {dtype}")
    record("certification", rows, device)


if __name__ == "__main__":
    main()
