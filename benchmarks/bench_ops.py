"""The operators one by one: time, bandwidth, ratio to a peer, ratio to a yardstick, in one run on the same inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import beta
from statsmodels.stats.proportion import proportion_confint

from benchmarks.report import medians, record
from pacd_fast import _C, ops
from pacd_fast.networks import layers


def row(
    what: str, unit: str, count: int, times: dict[str, float], bytes_moved: int | None, peer: str, yardstick: str
) -> dict[str, Any]:
    scale = 1e9 / count
    return {
        "operator": what,
        "unit": unit,
        "ours, ns": times["ours"] * scale,
        "GB/s": bytes_moved / times["ours"] / 1e9 if bytes_moved else "-",
        "peer": peer,
        "peer, ns": times["peer"] * scale,
        "times faster": times["peer"] / times["ours"],
        "yardstick": yardstick,
        "yardstick / ours": times["yardstick"] / times["ours"] if "yardstick" in times else "-",
    }


def noise(device: str) -> list[dict[str, Any]]:
    rows = []
    for shape, copies in (((1, 28, 28), 1000), ((3, 32, 32), 400)):  # batches of locuslab/smoothing
        copies = copies if device == "cpu" else copies * 64
        x = torch.rand(1, *shape, device=device)
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(copies, *shape, dtype=dtype, device=device)
            times = medians(
                {
                    "ours": lambda x=x, copies=copies, out=out: ops.noisy_copies(x, 0.5, copies, 1, out=out),
                    "peer": lambda x=x, copies=copies, shape=shape, dtype=dtype: (
                        x.expand(copies, *shape) + 0.5 * torch.randn(copies, *shape, device=x.device)
                    ).to(dtype),
                    "yardstick": (lambda out=out: out.fill_(1.0)) if device == "cpu" else out.normal_,
                },
                rounds=41,
                device=device,
            )
            name = f"noisy_copies {copies} x {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
            size, yardstick = out.numel() * out.element_size(), "fill_" if device == "cpu" else "normal_"
            rows.append(row(name, "element", out.numel(), times, size, "expand + randn", yardstick))
    return rows


def votes(device: str) -> list[dict[str, Any]]:
    rows = []
    for images, classes in ((4096, 10), (4096, 1000)):
        logits = torch.randn(images, classes, device=device)
        index = torch.randint(0, 16, (images,), device=device)
        counts = torch.zeros(16, classes, dtype=torch.int64, device=device)
        one = torch.ones_like(index)
        times = medians(
            {
                "ours": lambda counts=counts, logits=logits, index=index: ops.add_votes_(counts, logits, index),
                "peer": lambda counts=counts, logits=logits, index=index, one=one: counts.index_put_(
                    (index, logits.argmax(1)), one, accumulate=True
                ),
                "yardstick": lambda logits=logits: logits.sum(),
            },
            rounds=41,
            device=device,
        )
        rows.append(
            row(
                f"add_votes_ {images} x {classes}",
                "row",
                images,
                times,
                logits.numel() * 4,
                "argmax, index_put_",
                "sum",
            )
        )
    return rows


def bounds(device: str) -> list[dict[str, Any]]:
    k = torch.randint(1, 100_001, (2000,), device=device)
    host = k.cpu().numpy()
    times = medians(
        {
            "ours": lambda: ops.clopper_pearson_lower(k, 100_000, 0.001),
            "peer": lambda: [proportion_confint(int(hits), 100_000, 0.002, method="beta") for hits in host[:100]],
            "yardstick": lambda: beta.ppf(0.001, host, 100_001 - host),
        },
        rounds=7,
    )
    times["peer"] *= len(host) / 100
    name = "clopper_pearson_lower, n = 100 000, verified"
    rows = [row(name, "bound", len(host), times, None, "statsmodels, one by one", "scipy, not verified")]
    p = torch.rand(20_000, dtype=torch.float64, device=device)
    times = medians(
        {"ours": lambda: ops.normal_quantile(p), "peer": lambda: torch.special.ndtri(p)}, rounds=7, device=device
    )
    return [*rows, row("normal_quantile, verified", "quantile", p.numel(), times, None, "torch, not verified", "-")]


def pooling(device: str) -> list[dict[str, Any]]:
    """The first pooling of the MNIST network, a batch of 200; bytes: what has to be read and written once.

    Freed memory is kept, as in training, for both sides: else the pages of the results are what is measured.
    """
    _C.keep_freed_memory()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(200, 20, 24, 24, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        ours, peer = ops.max_pool_relu(leaf), F.relu(F.max_pool2d(leaf, 2))
        slope, size = torch.randn_like(peer), x.numel() * x.element_size()
        name = f"max_pool_relu 200 x 20 x 24 x 24 {str(dtype).removeprefix('torch.')}"
        times = medians(
            {
                "ours": lambda x=x: ops.max_pool_relu(x),
                "peer": lambda x=x: F.relu(F.max_pool2d(x, 2)),
                "yardstick": lambda x=x: x.sum(),
            },
            rounds=41,
            device=device,
        )
        rows.append(row(name, "element", x.numel(), times, size * 5 // 4, "max_pool2d, relu", "sum"))
        times = medians(
            {
                "ours": lambda ours=ours, leaf=leaf, slope=slope: torch.autograd.grad(ours, leaf, slope, True),
                "peer": lambda peer=peer, leaf=leaf, slope=slope: torch.autograd.grad(peer, leaf, slope, True),
                "yardstick": lambda x=x: x.clone(memory_format=torch.preserve_format),
            },
            rounds=41,
            device=device,
        )
        moved = size // 4 + x.numel() // 4 + size  # the slope, a byte a window, the result
        rows.append(row(f"{name}, gradient", "element", x.numel(), times, moved, "max_pool2d, relu", "clone"))
    return rows


def first_layer() -> list[dict[str, Any]]:
    """The MNIST network's first convolution on the CPU, back to a batch of 200 images."""
    layer = torch.nn.Conv2d(1, 20, 5).to(memory_format=torch.channels_last).requires_grad_(False)
    x = torch.rand(200, 1, 28, 28).requires_grad_()
    there, other = layers.convolution(layer, x), layer(x)
    slope = torch.randn_like(other)
    times = medians(
        {
            "ours": lambda: torch.autograd.grad(there, x, slope, True),
            "peer": lambda: torch.autograd.grad(other, x, slope, True),
            "yardstick": lambda: layer(x),
        },
        rounds=41,
    )
    return [
        row(
            "5x5 convolution 1 to 20, gradient of 200 images",
            "element",
            x.numel(),
            times,
            None,
            "torch",
            "forward pass",
        )
    ]


def residual_layers() -> list[dict[str, Any]]:
    """ResNet-20's 3x3 convolutions on the CPU, a batch of 200, float32: forward, and back to their input."""
    _C.keep_freed_memory()
    rows = []
    for channels, size in ((16, 32), (32, 16), (64, 8)):
        layer = torch.nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False)
        layer.to(memory_format=torch.channels_last)
        x = torch.randn(200, channels, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
        there, other = layers.convolution(layer, x), layer(x)
        slope = torch.randn_like(other)
        name = f"3x3 convolution 200 x {channels} x {size} x {size}"
        for what, runs in (
            (
                "",
                {
                    "ours": lambda x=x, layer=layer: layers.convolution(layer, x),
                    "peer": lambda x=x, layer=layer: layer(x),
                },
            ),
            (
                ", gradient",
                {
                    "ours": lambda x=x, y=there, slope=slope: torch.autograd.grad(y, x, slope, True),
                    "peer": lambda x=x, y=other, slope=slope: torch.autograd.grad(y, x, slope, True),
                },
            ),
        ):
            runs["yardstick"] = lambda slope=slope: slope.clone(memory_format=torch.preserve_format)
            times = medians(runs, rounds=101)
            rows.append(row(name + what, "element", x.numel(), times, 2 * 4 * x.numel(), "torch", "clone"))
    return rows


def main() -> None:
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() and ops.cuda_library == "loaded" else [])):
        threads = torch.get_num_threads()
        if device == "cpu":
            torch.set_num_threads(1)
            record("noise on one thread", noise(device), device)
            torch.set_num_threads(threads)
        found = [*noise(device), *votes(device), *bounds(device), *pooling(device)]
        record("operators", [*found, *([*first_layer(), *residual_layers()] if device == "cpu" else [])], device)


if __name__ == "__main__":
    main()
