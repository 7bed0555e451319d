"""Whole certifications: ours, the published loop, ART's, and the bare forward pass, eager and compiled.

    python -m benchmarks.bench_certify [mnist-cnn | resnet20 | resnet110]

Every contender runs in a process of its own, so that none inherits another's memory, caches or settings, and all of
them in turn in every round; ratios are those of one round.  "Multiplications alone" is the limit: no pass through as
many is faster on this machine.  Weights are random; the ResNets are plain modules, with no code of ours in them.
Compiling is left out: it is paid once, for all images (the table says how long it took).  Samples are those of
selection and estimation together, a whole number of our batches: what the last one is padded with is nothing beside
n = 100 000, and would be much beside the few thousand that a ResNet's timing draws.
"""

from __future__ import annotations

import functools
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import pacd_fast
from benchmarks.report import medians, record
from pacd_fast import _C, ops
from pacd_fast.data import as_float, load_dataset
from pacd_fast.networks import build, fold_batch_norm
from pacd_fast.ops import reference

N = 100_000
DEVICE = "cuda" if torch.cuda.is_available() and ops.cuda_library == "loaded" else "cpu"
DRAWN = {"mnist-cnn": 100 * 256, "resnet20": 40 * 256, "resnet110": 10 * 256}  # samples of one timing, of which
if DEVICE == "cuda":
    DRAWN = {"mnist-cnn": 64 * 16384, "resnet20": 32 * 16384, "resnet110": 8 * 16384}
SELECTION = 100
ROUNDS = {"mnist-cnn": 5, "resnet20": 1, "resnet110": 1}
SIZES = {
    "mnist-cnn": (64, 128, 256, 512, 1024),
    "resnet20": (128, 256, 512),
    "resnet110": (128, 256),
}  # of an eager pass
NAME = next((name for name in DRAWN if name in sys.argv[1:]), "mnist-cnn")


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.shortcut(x)).relu()


def resnet(depth: int) -> nn.Module:
    blocks = (depth - 2) // 6
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
        layers += [Block(inputs, outputs, 1 if inputs == outputs else 2)]
        layers += [Block(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def network(dtype: torch.dtype, layout: torch.memory_format) -> nn.Module:
    torch.manual_seed(0)
    if NAME == "mnist-cnn":
        model = build("mnist-cnn", num_classes=10, in_channels=1, image_size=(28, 28)).eval()
    else:
        model = resnet(int(NAME.removeprefix("resnet"))).eval()
    return model.to(DEVICE, dtype, memory_format=layout)


def image() -> Tensor:
    if NAME == "mnist-cnn":
        return as_float(load_dataset("mnist5k").x_test[0]).to(DEVICE)
    return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def published() -> tuple[float, str]:
    smooth, x = reference.Smooth(network(torch.float32, torch.contiguous_format), 10, 0.5), image()
    smooth.certify(x, SELECTION, 1000, 0.001, 1000)
    start = time.perf_counter()
    smooth.certify(x, SELECTION, DRAWN[NAME] - SELECTION, 0.001, 1000)
    return time.perf_counter() - start, "batch 1000"


def art() -> tuple[float, str]:
    """PyTorchRandomizedSmoothing.certify of the Adversarial Robustness Toolbox."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
    smooth = PyTorchRandomizedSmoothing(
        model=network(torch.float32, torch.contiguous_format),
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(image().shape),
        nb_classes=10,
        channels_first=True,
        sample_size=SELECTION,
        scale=0.5,
        alpha=0.001,
        device_type="gpu" if DEVICE == "cuda" else "cpu",
    )
    x = image().unsqueeze(0).cpu().numpy().astype(np.float32)
    smooth.certify(x, n=1000, batch_size=1000)
    start = time.perf_counter()
    smooth.certify(x, n=DRAWN[NAME] - SELECTION, batch_size=1000)
    return time.perf_counter() - start, "batch 1000"


def bare(dtype: torch.dtype, compiled: bool) -> tuple[float, str]:
    """Nothing but the network, on noisy samples that lie ready, at the best of several batch sizes and layouts.

    Noisy, and several batches in turn, because max pooling depends on its input: on the clean image, or on one batch
    again and again, its branches are guessed right and a pass takes up to a fifth less time.
    """
    if DEVICE == "cpu":
        _C.keep_freed_memory()
    x, found = image().unsqueeze(0), {}
    one_channel = compiled and x.shape[1] == 1
    layouts = (torch.contiguous_format,) if one_channel else (torch.contiguous_format, torch.channels_last)
    sizes = (1024, 4096, 16384) if DEVICE == "cuda" else (256, 512) if compiled else SIZES[NAME]
    for layout in layouts[-1:] if compiled else layouts:
        model = network(dtype, layout).requires_grad_(False)
        if compiled:
            fold_batch_norm(model)
        for size in sizes:
            batches = [
                ops.noisy_copies(x, 0.5, size, 1, first=i * size, dtype=dtype, memory_format=layout) for i in range(4)
            ]
            with torch.inference_mode(), inductor.patch(freezing=True):
                torch._dynamo.reset()
                call = torch.compile(model, dynamic=False) if compiled else model
                passes = passes_over(call, batches)
                run = {"all": lambda passes=passes: [run() for run in passes]}
                seconds = medians(run, rounds=3 if compiled or NAME != "mnist-cnn" else 5)["all"] / 4
            found[size, str(layout).removeprefix("torch.").removesuffix("_format")] = (seconds / size, call, batches)
    size, name = min(found, key=lambda key: found[key][0])
    _, call, batches = found[size, name]
    with torch.inference_mode(), inductor.patch(freezing=True):
        passes = passes_over(call, batches)
        passes[0]()  # compiled anew where another size came after it
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(DRAWN[NAME] // size):
            passes[i % 4]()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    how = f"batch {size}, {name}" + (", CUDA graph" if DEVICE == "cuda" else "")
    return (time.perf_counter() - start) * DRAWN[NAME] / (DRAWN[NAME] // size * size), how


def passes_over(call: Callable[[Tensor], Tensor], batches: list[Tensor]) -> list[Callable[[], object]]:
    """A pass over each batch; on a card as a CUDA graph."""
    if DEVICE == "cpu":
        return [functools.partial(call, batch) for batch in batches]
    graphs = []
    for batch in batches:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                call(batch)
        torch.cuda.current_stream().wait_stream(aside)
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            call(batch)
    return [graph.replay for graph in graphs]


def arithmetic(dtype: torch.dtype) -> tuple[float, str]:
    """The network's multiplications alone, at the best rate that a matrix product or a convolution has here."""
    model = network(dtype, torch.contiguous_format)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(image().unsqueeze(0).to(dtype))
    multiplications, rate = counter.get_total_flops() / 2, 0.0
    side, count = (8192, 2048) if DEVICE == "cuda" else (2048, 64)
    square = torch.rand(side, side, device=DEVICE).to(dtype)
    convolution = nn.Conv2d(64, 64, 3, padding=1).to(DEVICE, dtype, memory_format=torch.channels_last)
    images = torch.rand(count, 64, 32, 32, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        for work, call in (
            (side**3, lambda: square @ square), (count * 32**2 * 64 * 64 * 9, lambda: convolution(images)),
        ):  # fmt: skip
            rate = max(rate, work / medians({"": call}, rounds=7, device=DEVICE)[""])
    text = f"{multiplications / 1e6:.1f} million at {rate / 1e9:.0f} G/s"
    return DRAWN[NAME] * multiplications / rate, text


def ours(dtype: torch.dtype, compiled: bool, noise: str = "lattice") -> tuple[float, str]:
    """Smooth prepares the network at its first call: folded, cast, compiled, and its batch size chosen."""
    model, x = network(torch.float32, torch.contiguous_format), image()
    smooth = pacd_fast.Smooth(model, 10, 0.5, seed=1, dtype=dtype, compile=compiled, noise=noise)
    rows = 256 if DEVICE == "cpu" else 4096
    start = time.perf_counter()
    smooth.certify(x, SELECTION, 1000, 0.001, rows)
    prepared = time.perf_counter() - start
    start = time.perf_counter()
    found = smooth.certify(x, SELECTION, DRAWN[NAME] - SELECTION, 0.001, rows)
    seconds = time.perf_counter() - start
    assert found[1] > 0, "the image is certified, and all samples were drawn"
    return seconds, f"batch {rows}" + (f", compiled in {prepared:.0f} s" if compiled else "")


CONTENDERS: dict[str, Callable[[], tuple[float, str]]] = {
    "published loop (Cohen et al.)": published,
    "ART PyTorchRandomizedSmoothing": art,
}
for _dtype in (torch.float32, torch.bfloat16):
    CONTENDERS[f"multiplications alone, {str(_dtype).removeprefix('torch.')}"] = functools.partial(arithmetic, _dtype)
    for _compiled in (False, True):
        _what = str(_dtype).removeprefix("torch.") + (", compiled" if _compiled else "")
        CONTENDERS[f"bare forward pass, {_what}"] = functools.partial(bare, _dtype, _compiled)
        CONTENDERS[f"pacd_fast, {_what}"] = functools.partial(ours, _dtype, _compiled)
CONTENDERS["pacd_fast, bfloat16, compiled, noise in floats"] = functools.partial(ours, torch.bfloat16, True, "float")


def main(network_name: str = NAME) -> None:
    rounds = ROUNDS[network_name]
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    how: dict[str, str] = {}
    for _ in tqdm(range(rounds), unit="round", desc="certify", mininterval=10):
        for name in CONTENDERS:
            command = [sys.executable, "-m", "benchmarks.bench_certify", network_name, "--one", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                print(f"{name} is left out: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                times[name].append(math.nan)
                continue
            seconds, how[name] = done.stdout.strip().splitlines()[-1].split("\t")
            times[name].append(float(seconds))

    def ratio(over: str, under: str) -> float:
        ratios = [a / b for a, b in zip(times[over], times[under], strict=True) if a == a and b == b]
        return statistics.median(ratios) if ratios else math.nan

    rows = []
    for name, each in times.items():
        seconds = [one for one in each if one == one]
        if not seconds:
            continue
        median = statistics.median(seconds)
        forward = name.replace("pacd_fast", "bare forward pass").removesuffix(", noise in floats")
        rows.append(
            {
                "one image, n = 100 000": f"{name}, {how[name]}",
                "s": median * N / DRAWN[network_name],
                "us a sample": median / DRAWN[network_name] * 1e6,
                "times the published loop": ratio("published loop (Cohen et al.)", name),
                "over the bare forward pass": f"{ratio(name, forward) - 1:+.1%}" if forward != name else "-",
            }
        )
    record("certification" if network_name == "mnist-cnn" else f"certification, {network_name}", rows, DEVICE)


if __name__ == "__main__":
    if "--one" in sys.argv:
        print("\t".join(map(str, CONTENDERS[sys.argv[sys.argv.index("--one") + 1]]())))
    else:
        main()
