"""Meta-gradients of a batch by 8 surrogates: one after another, as MetaPoison runs them, or stacked under vmap."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import medians, record
from pacd_fast import _C
from pacd_fast.bilevel import unrolled
from pacd_fast.networks import build

NAME = "surrogates in turn or stacked"
SURROGATES, BATCH, POISONS, STEPS, RATE = 8, 125, 12, 2, 0.05


def main() -> None:
    _C.keep_freed_memory()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = [measured(device) for device in devices]
    record(NAME, rows, devices[-1])


def measured(device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    shape = {"num_classes": 10, "in_channels": 3, "image_size": (32, 32)}
    networks = [build("convnet", **shape).to(device) for _ in range(SURROGATES)]
    plain = networks[0]
    names = [name for name, _ in plain.named_parameters()]
    x, y = torch.rand(BATCH, 3, 32, 32, device=device), torch.randint(10, (BATCH,), device=device)
    u, target = x[:POISONS].clone(), torch.rand(1, 3, 32, 32, device=device)

    def run(weights: tuple[Tensor, ...], images: Tensor) -> Tensor:
        return torch.func.functional_call(plain, dict(zip(names, weights, strict=True)), (images,))

    def lower(u: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        poisoned = F.cross_entropy(run(weights, u), y[:POISONS])
        return (
            POISONS * poisoned + (BATCH - POISONS) * F.cross_entropy(run(weights, x[POISONS:]), y[POISONS:])
        ) / BATCH

    def upper(u: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(run(weights, target), y[:1])

    def in_turn() -> Tensor:
        total = torch.zeros_like(u)
        for network in networks:
            total += unrolled(upper, lower, u, tuple(network.parameters()), steps=STEPS, lr=RATE).gradient
        return total

    stacked = tuple(torch.stack(each).detach() for each in zip(*(n.parameters() for n in networks), strict=True))

    def looked_ahead(u: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        for _ in range(STEPS):
            slopes = torch.func.grad(lower, argnums=1)(u, weights)
            weights = tuple(w - RATE * g for w, g in zip(weights, slopes, strict=True))
        return upper(u, weights)

    batched = torch.func.vmap(torch.func.grad(looked_ahead), in_dims=(None, 0))

    def at_once() -> Tensor:
        return batched(u, stacked).sum(0)

    torch.testing.assert_close(in_turn(), at_once(), rtol=1e-3, atol=1e-7)
    seconds = medians({"in turn": in_turn, "stacked": at_once}, rounds=5, warmup=1)
    return {
        "device": device,
        "surrogates": SURROGATES,
        "unrolled steps": STEPS,
        "in turn, ms": 1e3 * seconds["in turn"],
        "stacked (vmap), ms": 1e3 * seconds["stacked"],
        "stacked / in turn": seconds["stacked"] / seconds["in turn"],
    }


if __name__ == "__main__":
    main()
