"""Training base classifiers: losses with one signature, loss(model, x, y, seed=...) -> scalar, and fit()."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pacd_fast import ops
from pacd_fast.datasets import Dataset, as_float

__all__ = ["Gaussian", "Loss", "Standard", "fit", "mix"]

STREAM = 2  # the noise of training; 0 and 1 are certification's


class Loss(Protocol):
    """A training loss: images [B, ...] in [0, 1] and int64 labels [B] to a scalar.

    `seed` decides all its randomness, so that a second evaluation (a Hessian-vector product, say) sees the same noise.
    """

    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, seed: int) -> Tensor: ...


@dataclass(frozen=True)
class Standard:
    """Cross-entropy on the images as they are."""

    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, seed: int) -> Tensor:
        return F.cross_entropy(model(x), y)


@dataclass(frozen=True)
class Gaussian:
    """Gaussian augmentation (Cohen et al. 2019): mean cross-entropy of k noisy copies of every image."""

    sigma: float
    k: int = 1

    def __post_init__(self) -> None:
        _positive("sigma", self.sigma)
        _at_least("k", self.k, 1)

    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, seed: int) -> Tensor:
        noisy = ops.noisy_copies(x, self.sigma, self.k, seed, stream=STREAM, memory_format=_layout(x))
        return F.cross_entropy(model(noisy), y.repeat_interleave(self.k))


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, not {value}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


def _layout(x: Tensor) -> torch.memory_format:
    """channels_last for images: the faster layout of convolutions on the CPU."""
    return torch.channels_last if x.dim() == 4 else torch.contiguous_format


def mix(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several integers (splitmix64, Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state ^ (number & (2**64 - 1))) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ state >> 27) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


def _augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random horizontal flip and random crop after padding 4, each image its own, as is usual for CIFAR-10."""
    batch, _, height, width = x.shape
    flip = torch.rand(batch, generator=generator).to(x.device) < 0.5
    x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
    shift = torch.randint(0, 9, (2, batch), generator=generator).to(x.device)
    rows = shift[0].view(-1, 1, 1) + torch.arange(height, device=x.device).view(1, -1, 1)
    columns = shift[1].view(-1, 1, 1) + torch.arange(width, device=x.device).view(1, 1, -1)
    padded = F.pad(x, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    images = torch.arange(batch, device=x.device).view(-1, 1, 1)
    return padded[images, rows, columns].permute(0, 3, 1, 2)


def fit(
    model: nn.Module,
    data: Dataset | tuple[Tensor, Tensor],
    loss: Loss,
    *,
    epochs: int = 100,
    batch_size: int = 200,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    augment: bool = False,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    metrics: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> nn.Module:
    """Trains the model in place with Adam and returns it, in eval mode.

    Args:
        model: on the device to train on; its 4-d weights go to channels_last there.
        data: a Dataset (its training split) or (images [N, C, H, W] uint8 or float in [0, 1], int64 labels [N]).
        loss: see `Loss`.
        epochs, batch_size, lr, weight_decay: as usual (the papers: 100, 200, 1e-3, 0; the decay is Adam's l2 term); a
            last batch of fewer than batch_size images is used as it is.
        augment: random flip and pad-4 crop.
        seed: of the order, the augmentation and the noise: the same seed is the same run on one device.
        checkpoint: a file that is rewritten after every epoch; with resume, training goes on from it.
        metrics: a file of JSON lines, one per epoch: epoch, loss, accuracy (under the loss's own noise), seconds.
        progress: show a bar with loss, accuracy and time left.

    Raises:
        ValueError: for arguments out of range, a checkpoint of another run, or a loss that is not finite (it names the
            step and the seed that reproduce it; the last checkpoint stands).
    """
    images, labels = data.split("train") if isinstance(data, Dataset) else data
    _check(images, labels, epochs, batch_size, lr, weight_decay)
    device = next(model.parameters()).device
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=lr, weight_decay=weight_decay, fused=device.type in ("cpu", "cuda")
    )
    described = {
        "loss": f"{type(loss).__name__}({_fields(loss)})",
        "images": len(images),
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "augment": augment,
        "seed": seed,
    }
    first = _resumed(Path(checkpoint), model, optimizer, described) if checkpoint is not None and resume else 0
    images, labels = images.to(device), labels.to(device)
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, args, logits: seen.append(logits))
    steps = -(-len(images) // batch_size)
    interval = 0.2 if sys.stderr.isatty() else 10.0
    bar = tqdm(total=epochs * steps, initial=first * steps, unit="step", disable=not progress, mininterval=interval)
    try:
        for epoch in range(first, epochs):
            model.train()
            started, total, right, voted = time.perf_counter(), torch.zeros((), device=device), 0, 0
            generator = torch.Generator().manual_seed(mix(seed, epoch))
            order = torch.randperm(len(images), generator=generator).to(device)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(mix(seed, epoch, 1))  # for dropout and the like
                for step, index in enumerate(order.split(batch_size)):
                    x, y = as_float(images[index]), labels[index]
                    if augment:
                        x = _augmented(x, generator)
                    noise = mix(seed, epoch, 2, step)
                    seen.clear()
                    value = loss(model, x.contiguous(memory_format=_layout(x)), y, seed=noise)
                    if not bool(torch.isfinite(value)):
                        raise ValueError(
                            f"the loss is {float(value.detach())} at epoch {epoch}, step {step} (noise seed {noise}); "
                            "the weights of the last checkpoint are kept; a smaller lr may help"
                        )
                    optimizer.zero_grad(set_to_none=True)
                    value.backward()
                    optimizer.step()
                    total += value.detach() * len(index)
                    if seen and seen[-1].dim() == 2 and len(seen[-1]) % len(y) == 0:
                        votes = seen[-1].detach().argmax(1).view(len(y), -1)
                        right, voted = right + int((votes == y.unsqueeze(1)).sum()), voted + votes.numel()
                    bar.update()
                    if step % 20 == 0:
                        now, accuracy = float(value.detach()), right / max(voted, 1)
                        bar.set_postfix_str(f"epoch {epoch + 1}/{epochs}, loss {now:.4f}, accuracy {accuracy:.2%}")
            seconds = time.perf_counter() - started
            line = {
                "epoch": epoch,
                "loss": float(total) / len(images),
                "accuracy": right / max(voted, 1),
                "seconds": seconds,
            }
            if checkpoint is not None:
                _save(Path(checkpoint), model, optimizer, epoch + 1, described)
            if metrics is not None:
                with open(metrics, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    finally:
        bar.close()
        hook.remove()
    return model.eval()


def _check(images: Tensor, labels: Tensor, epochs: int, batch_size: int, lr: float, weight_decay: float) -> None:
    if images.dim() < 2 or len(images) == 0 or labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"data must be images [N, ...] and int64 labels [N], "
            f"not {tuple(images.shape)} and {labels.dtype} {tuple(labels.shape)}"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"labels must not be negative, found {int(labels.min())}")
    _at_least("epochs", epochs, 1)
    _at_least("batch_size", batch_size, 1)
    _positive("lr", lr)
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be finite and not negative, not {weight_decay}")


def _fields(loss: Any) -> str:
    if not dataclasses.is_dataclass(loss) or isinstance(loss, type):
        return ""
    return ", ".join(f"{field.name}={getattr(loss, field.name)}" for field in dataclasses.fields(loss))


def _save(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, described: dict[str, Any]
) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "run": json.dumps(described),
    }
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _resumed(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, described: dict[str, Any]) -> int:
    """Loads a checkpoint of this very run and returns the next epoch; 0 where there is none yet."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True)
        there = json.loads(state["run"])
    except Exception as error:  # a damaged file fails in many ways, and all mean the same
        raise ValueError(
            f"{path} is not a training checkpoint ({type(error).__name__}); delete it to start again"
        ) from error
    for key, value in described.items():
        if there.get(key) != value:
            raise ValueError(
                f"{path} is of another run: {key} is {there.get(key)} there and {value} here; delete it to start again"
            )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"])
