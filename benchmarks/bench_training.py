"""Seconds an epoch of GA, MACER, SmoothAdv against a plain PyTorch loop; the fused soft radius against torch operators.

Ours and the plain loop live in two processes that take turns: ours tells the C library to keep freed memory, which
would make the plain loop faster than its users have it.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.report import medians, record
from pacd_fast import _C, ops
from pacd_fast.networks import build
from pacd_fast.ops import reference
from pacd_fast.training import Gaussian, Macer, SmoothAdv, fit, layout

SHAPES = {"mnist-cnn": (1, 28, 28), "resnet20": (3, 32, 32)}
EPOCH = {"mnist-cnn": 55_000, "resnet20": 45_000}
STEPS = {"gaussian": 8, "macer": 1, "smoothadv": 4}  # of one measurement
METHODS: dict[str, Any] = {"gaussian": Gaussian(0.5), "macer": Macer(0.5), "smoothadv": SmoothAdv(0.5, warmup=0)}


def prepared(network: str, count: int, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    shape = SHAPES[network]
    model = build(network, num_classes=10, in_channels=shape[0], image_size=shape[1:]).to(device)
    images, y = torch.randint(256, (count, *shape), dtype=torch.uint8), torch.randint(10, (count,))
    return model, images.to(device), y.to(device)


class PlainBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def plain_network(network: str, like: nn.Module) -> nn.Module:
    """The network as one writes it with torch's modules, at the weights of ours."""
    if network == "mnist-cnn":
        first = [nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)]
        plain = nn.Sequential(*first, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))
    else:
        first = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        blocks = [PlainBlock(16, 16, 1) for _ in range(3)]
        for inputs, outputs in ((16, 32), (32, 64)):
            blocks += [PlainBlock(inputs, outputs, 2), *(PlainBlock(outputs, outputs, 1) for _ in range(2))]
        plain = nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    for mine, given in zip(plain.parameters(), like.parameters(), strict=True):
        mine.data.copy_(given.data)
    plain.to(next(like.parameters()).device)
    x = torch.rand(2, *SHAPES[network], device=next(like.parameters()).device)
    torch.testing.assert_close(plain(x), like(x))  # the same function
    return plain


def plain_loss(loss: Any, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The losses as one writes them from the papers."""
    if isinstance(loss, Gaussian):
        return F.cross_entropy(model(x + torch.randn_like(x) * loss.sigma), y)
    if isinstance(loss, SmoothAdv):
        noise, delta = torch.randn_like(x) * loss.sigma, torch.zeros_like(x, requires_grad=True)
        model.eval()
        for _ in range(loss.steps):
            (slope,) = torch.autograd.grad(F.cross_entropy(model(x + delta + noise), y, reduction="sum"), delta)
            slope = slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = (x + delta.detach() + 2 * loss.epsilon / loss.steps * slope).clamp(0, 1) - x
            delta = delta.renorm(2, 0, loss.epsilon).requires_grad_()
        model.train()
        return F.cross_entropy(model(x + delta.detach() + noise), y)
    repeated = x.repeat_interleave(loss.k, 0)
    logits = model(repeated + torch.randn_like(repeated) * loss.sigma).view(len(x), loss.k, -1)
    natural = F.nll_loss(torch.log(torch.softmax(logits, 2).mean(1) + 1e-10), y, reduction="sum")
    top, which = torch.softmax(loss.beta * logits, 2).mean(1).topk(2)
    right = which[:, 0] == y
    normal = torch.distributions.Normal(0.0, 1.0)
    high, low = top[right, 0], top[right, 1]
    gap = normal.icdf(low) - normal.icdf(high)
    keep = torch.isfinite(gap) & (gap.abs() <= loss.gamma)
    hinge = normal.icdf(low[keep]) - normal.icdf(high[keep]) + loss.gamma
    return (natural + loss.lam * loss.sigma / 2 * hinge.sum()) / len(x)


def plain_steps(network: str, method: str, batch: int, device: str) -> Callable[[], None]:
    model, images, y = prepared(network, batch * STEPS[method], device)
    model = plain_network(network, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images = images.float() / 255

    def run() -> None:
        for x, labels in zip(images.split(batch), y.split(batch), strict=True):
            optimizer.zero_grad()
            plain_loss(METHODS[method], model, x, labels).backward()
            optimizer.step()

    return run


def our_steps(network: str, method: str, batch: int, device: str) -> Callable[[], None]:
    model, images, y = prepared(network, batch * STEPS[method], device)
    return lambda: void(fit(model, (images, y), METHODS[method], epochs=1, batch_size=batch))


def void(_: object) -> None:
    return None


def bare_steps(network: str, method: str, batch: int, device: str) -> Callable[[], None]:
    """What the network itself costs in one of our steps: its passes and the optimiser, on images that are there."""
    _C.keep_freed_memory()
    model, _, y = prepared(network, batch, device)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    loss = METHODS[method]
    noisy = torch.rand(batch * loss.k, *SHAPES[network], device=device)
    noisy = noisy.contiguous(memory_format=layout(noisy))
    grad = torch.ones(batch * loss.k, 10, device=device)

    def run() -> None:
        for _ in range(STEPS[method]):
            model.eval().requires_grad_(False)
            for _ in range(getattr(loss, "steps", 0)):
                leaf = noisy.detach().requires_grad_()
                torch.autograd.grad(model(leaf), leaf, grad)
            model.train().requires_grad_()
            optimizer.zero_grad(set_to_none=True)
            model(noisy).backward(grad)
            optimizer.step()

    return run


_prepared: dict[tuple[Any, ...], Callable[[], None]] = {}


def timed(which: str, network: str, method: str, batch: int, device: str, threads: int) -> float:
    """Seconds of one step, in the process that is asked; the first measurement is to warm up."""
    torch.set_num_threads(threads)
    key = (which, network, method, batch, device)
    if key not in _prepared:
        _prepared.clear()  # one at a time: their activations are large
        make = {"ours": our_steps, "plain": plain_steps, "bare": bare_steps}[which]
        _prepared[key] = make(network, method, batch, device)
        _prepared[key]()
    start = time.perf_counter()
    _prepared[key]()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS[method]


def epochs(device: str, rounds: int = 7) -> list[dict[str, Any]]:
    spawn, rows = multiprocessing.get_context("spawn"), []
    with (
        ProcessPoolExecutor(1, spawn) as ours,
        ProcessPoolExecutor(1, spawn) as bare,
        ProcessPoolExecutor(1, spawn) as plain,
    ):
        pools = {"plain": plain, "ours": ours, "bare": bare}
        for network in SHAPES:
            for method in METHODS:
                # 64 for MACER's 16 copies on ResNet-20, its authors' batch: 200 would take 7 GB a process
                batch = 64 if (network, method, device) == ("resnet20", "macer", "cpu") else 200
                times: dict[str, list[float]] = {which: [] for which in pools}
                for _ in range(rounds):
                    for which, pool in pools.items():
                        arguments = (which, network, method, batch, device, torch.get_num_threads())
                        times[which].append(pool.submit(timed, *arguments).result())
                middle = {which: sorted(found)[len(found) // 2] for which, found in times.items()}
                steps = EPOCH[network] / batch
                rows.append(
                    {
                        "network": network,
                        "method": method,
                        "batch": batch,
                        "plain, s an epoch": middle["plain"] * steps,
                        "ours, s an epoch": middle["ours"] * steps,
                        "times faster": middle["plain"] / middle["ours"],
                        "outside the network, %": 100 * (1 - middle["bare"] / middle["ours"]),
                    }
                )
    return rows


def soft(device: str) -> list[dict[str, Any]]:
    rows = []
    for images, copies in ((200, 16), (100, 20), (2000, 16)):
        logits = torch.randn(images, copies, 10, device=device, requires_grad=True)
        y = torch.randint(10, (images,), device=device)
        ones = torch.ones(images, device=device)

        def both(module: Any, logits: Tensor = logits, y: Tensor = y, ones: Tensor = ones) -> None:
            radius = module.soft_radius(logits, y, beta=16.0, sigma=0.5)
            torch.autograd.grad(radius, logits, ones)

        times = medians(
            {"ours": lambda both=both: both(ops), "plain": lambda both=both: both(reference)}, rounds=201, warmup=20
        )
        rows.append(
            {
                "soft_radius, forward and backward": f"[{images}, {copies}, 10]",
                "ours, us": times["ours"] * 1e6,
                "torch, us": times["plain"] * 1e6,
                "times faster": times["plain"] / times["ours"],
            }
        )
    return rows


def main() -> None:
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() and ops.cuda_library == "loaded" else [])):
        record("soft radius", soft(device), device)
        record("training", epochs(device), device)


if __name__ == "__main__":
    main()
