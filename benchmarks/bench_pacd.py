"""One outer step of PACD against the same step written plainly, as the authors' program does it.

The plain step: ten lower steps, ten of Adam on ||H q - grad||^2 with two Hessian-vector products each, every product on
a graph and a noise of its own, the default layout.  Both start from one trained network and have the same images.
Residuals are those of the system that our step solves; the plain one, whose noise changes, has no system of its own.
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

from benchmarks.report import record
from pacd_fast import _C
from pacd_fast.bilevel import hypergradient
from pacd_fast.data import Dataset, as_float, load_dataset
from pacd_fast.networks import build
from pacd_fast.ops import reference
from pacd_fast.poisoning import Radius, lower_problem
from pacd_fast.training import Gaussian, fit

CLEAN, POISON, VALIDATION, COPIES, SIGMA, DAMPING = 400, 100, 100, 20, 0.5, 1e-3
OURS: dict[str, dict[str, Any]] = {
    "ours, minres, 10 Gauss-Newton products": {"solver": "minres"},
    "ours, minres, 10 Gauss-Newton products, bfloat16": {"solver": "minres", "dtype": torch.bfloat16},
    "ours, cg, 5 Gauss-Newton products": {"solver": "cg", "steps": 5},
    "ours, minres, 10 Hessian products": {"solver": "minres", "curvature": "hessian"},
}
PLAIN = "plain: Adam on the normal equations, 20 Hessian products"


def start(epochs: int = 4) -> tuple[Dataset, nn.Module]:
    """The embedded digits, and the paper's network after a few epochs."""

    data = load_dataset("mnist5k", validation=1000)
    torch.manual_seed(0)
    network = build("mnist-cnn", num_classes=10, in_channels=1, image_size=(28, 28))
    return data, fit(network, data, Gaussian(SIGMA), epochs=epochs).train()


def batches(data: Dataset) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean images, poison, labels of both, validation images."""
    of_class, others = data.y_train == 8, data.y_train != 8
    clean, poison = data.x_train[others][:CLEAN], data.x_train[of_class][:POISON]
    labels = torch.cat([data.y_train[others][:CLEAN], data.y_train[of_class][:POISON]])
    return as_float(clean), as_float(poison), labels, as_float(data.x_val[data.y_val == 8][:VALIDATION])


def plain_step(network: nn.Module, data: Dataset) -> tuple[Tensor, list[Tensor]]:
    """The hypergradient and the solution q, after ten lower steps."""
    clean, poison, y, x_val = batches(data)
    weights = list(network.parameters())
    optimizer = torch.optim.Adam(weights, lr=1e-3)

    def noisy(x: Tensor) -> Tensor:
        return x + SIGMA * torch.randn_like(x)

    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(network(noisy(torch.cat([clean, poison]))), y).backward()
        optimizer.step()
    logits = network(noisy(x_val.repeat_interleave(COPIES, 0))).view(len(x_val), COPIES, -1)
    upper = reference.soft_radius(logits, torch.full((len(x_val),), 8), beta=16.0, sigma=SIGMA).mean()
    target = torch.autograd.grad(upper, weights)
    q = [torch.zeros_like(w, requires_grad=True) for w in weights]
    linear = torch.optim.Adam(q, lr=1e-2)

    def product(v: list[Tensor]) -> list[Tensor]:
        cost = F.cross_entropy(network(noisy(torch.cat([clean, poison]))), y)
        slope = torch.autograd.grad(cost, weights, create_graph=True)
        bent = torch.autograd.grad(slope, weights, grad_outputs=v)
        return [b + DAMPING * w for b, w in zip(bent, v, strict=True)]

    for _ in range(10):
        rest = [a - b for a, b in zip(product([t.detach() for t in q]), target, strict=True)]
        for each, gradient in zip(q, product(rest), strict=True):
            each.grad = 2 * gradient
        linear.step()
    u = poison.clone().requires_grad_()
    cost = F.cross_entropy(network(noisy(torch.cat([clean, u]))), y)
    slope = torch.autograd.grad(cost, weights, create_graph=True)
    (mixed,) = torch.autograd.grad(slope, u, grad_outputs=[t.detach() for t in q])
    return -mixed, [t.detach() for t in q]


def upper_of(x_val: Tensor) -> Callable[[Tensor, nn.Module], Tensor]:
    """The soft radius of the validation images as a function of (poison, network)."""
    labels = torch.full((len(x_val),), 8)
    return lambda u, network: Radius(SIGMA, COPIES)(network, x_val, labels, seed=2)


def our_step(network: nn.Module, data: Dataset, dtype: torch.dtype = torch.float32, **settings: Any) -> Tensor:
    """What an outer step of `pacd` does, on the batches of the plain one; the solution q."""
    clean, poison, y, x_val = batches(data)
    loss, images = Gaussian(SIGMA), torch.cat([clean, poison])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    for step in range(10):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = loss(network, images, y, seed=step + 10)
        value.backward()
        optimizer.step()
    problem = lower_problem(network, loss, clean, y, 1, poison)
    settings = {"curvature": "gauss-newton", "steps": 10, "tolerance": 0.0, **settings}
    _, found, *_ = hypergradient(
        upper_of(x_val),
        problem,
        poison,
        network,
        damping=DAMPING,
        with_solution=True,
        dtype=None if dtype == torch.float32 else dtype,
        **settings,
    )
    return found.q


def residual(network: nn.Module, data: Dataset, q: Tensor, curvature: str) -> float:
    """||(C + s I) q - b|| / ||b||, C the Hessian or the Gauss-Newton matrix, on the noise that our step solves with."""
    clean, poison, y, x_val = batches(data)
    problem = lower_problem(network, Gaussian(SIGMA), clean, y, 1, poison)
    # one step of Adam that stops at once reports the residual of its start
    _, found, *_ = hypergradient(
        upper_of(x_val), problem, poison, network, solver="adam", curvature=curvature, damping=DAMPING,
        steps=1, tolerance=1e9, warm_start=q, with_solution=True,
    )  # fmt: skip
    return found.residual


def measured(name: str, steps: int) -> tuple[list[float], float]:
    """Seconds of each step, and the residual of the last q on the noise of `residual`; in a process of its own."""
    data, network = start()
    if name == PLAIN:
        network = network.to(memory_format=torch.contiguous_format)
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            _, q = plain_step(network, data)
            times.append(time.perf_counter() - began)
        return times, residual(network, data, torch.cat([t.reshape(-1) for t in q]), "hessian")
    _C.keep_freed_memory()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        solution = our_step(network, data, **OURS[name])
        times.append(time.perf_counter() - began)
    return times, residual(network, data, solution, OURS[name].get("curvature", "gauss-newton"))


def main(steps: int = 5) -> None:
    rows, context = [], multiprocessing.get_context("spawn")
    seconds: dict[str, tuple[float, float]] = {}
    for name in (PLAIN, *OURS, PLAIN):  # the plain one at both ends: a machine that slows down is seen
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            times, left = pool.submit(measured, name, steps).result()
        middle = sorted(times[1:])[len(times[1:]) // 2]
        seconds[name] = (min(middle, seconds[name][0]) if name in seconds else middle, left)
    for name, (took, left) in seconds.items():
        rows.append(
            {
                "outer step, 400 + 100 images, MNIST network": name,
                "s": took,
                "times faster": seconds[PLAIN][0] / took,
                "residual": left,
            }
        )
    record("PACD outer step", rows)


if __name__ == "__main__":
    main()
