"""Training base classifiers: fit(), which takes any loss of losses.py."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pacd_fast import _C, files
from pacd_fast.arguments import at_least, not_negative, positive
from pacd_fast.data import Dataset, as_float, labelled
from pacd_fast.networks import fingerprint
from pacd_fast.randomness import Purpose, mix, seeded
from pacd_fast.ranks import Ranks
from pacd_fast.training.augmentation import augmented, moves_of
from pacd_fast.training.evaluation import check_classifier, check_pixels
from pacd_fast.training.losses import Loss
from pacd_fast.training.splitting import Split, splittable
from pacd_fast.training.watching import Accuracy, Watch

OPTIMIZERS = ("adam", "momentum", "sgd")
LOOKS = {"cuda": 20}  # steps after which the host asks whether a loss was not finite: on a card it would wait


def fit(
    model: nn.Module,
    data: Any,
    loss: Loss,
    *,
    epochs: int = 100,
    batch_size: int = 200,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    optimizer: str = "adam",
    drops: Sequence[int] = (),
    augment: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    microbatch: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    metrics: str | os.PathLike[str] | None = None,
    progress: bool = False,
    after_epoch: Callable[[int, nn.Module], object] | None = None,
    group: Any = None,
) -> nn.Module:
    """Trains the model in place and returns it, in eval mode.

    Args:
        model: on the device to train on; its 4-d weights go to channels_last there.
        data: a Dataset (its training split), (images [N, C, H, W] uint8 or float in [0, 1], labels [N]) as tensors or
            NumPy arrays, or a DataLoader, which is read once (see `data.labelled`); uint8 is divided by 255.
        loss: see `Loss`.
        epochs, batch_size, lr, weight_decay: as usual (the papers: 100, 200, 1e-3, 0; the decay is the optimiser's l2
            term); a last batch of fewer than batch_size images is used as it is.
        optimizer: adam, momentum (SGD with momentum 0.9) or sgd.
        drops: epochs, counted from 0, from which on the rate is a tenth of what it was.
        augment: random flip and pad-4 crop, of images [C, H, W].
        seed: of the order, the augmentation and the noise: the same seed is the same run on one device (on a CPU with
            one number of threads; on CUDA cuDNN is asked for its deterministic algorithms).
        dtype: torch.bfloat16 runs the network under autocast; weights, optimiser and losses stay float32.
        microbatch: images of a batch that go through the network at a time, to save memory; gradients add up to those
            of the batch, but for batch norm, which sees the part.
        checkpoint: a file that is rewritten after every epoch; with resume, training goes on from it.  It must be of
            the same loss, data, settings and network (by what repr prints).
        metrics: a file of JSON lines, one per epoch: epoch, loss, accuracy (under the loss's own noise), seconds.
        progress: show a bar with loss, accuracy and time left.
        after_epoch: called with the epoch, from 0, and the model, which is in training mode.
        group: a torch.distributed process group that trains the model together: all its processes call this with the
            same arguments and weights, and each takes its rows of every batch.  Gradients, statistics of batch norm
            and metrics are those of the whole batch, up to the order of summation, because noise and augmentation
            belong to the image; the loss must be a mean over images that takes image_ids (see `Loss`).  Rank 0 alone
            writes and shows a bar; all read the checkpoint.

    A card is asked every 20 steps whether a loss was finite, which costs no wait a step.
    On the CPU the C library is told to keep freed memory (see `_C.keep_freed_memory`): without it, fresh pages for
    every step's activations cost up to a third of the time.

    Raises:
        ValueError: for arguments out of range, labels that the model has no class for, a checkpoint of another run or
            of more epochs, a loss or weight that is not finite (it names the step and the seed that reproduce it;
            the last checkpoint, whose weights are finite, stands), or, with a group, a loss without image_ids, a
            network with dropout, processes that differ.
    """
    images, labels = data.split("train") if isinstance(data, Dataset) else labelled(data)
    _check(images, labels, epochs, batch_size, lr, weight_decay, dtype, microbatch)
    for drop in drops:
        at_least("drops", drop, 0)
    if augment and images.dim() != 4:
        raise ValueError(f"augment needs images [N, C, H, W], not {tuple(images.shape)}")
    if resume and checkpoint is None:
        raise ValueError("resume needs checkpoint, the file to go on from")
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("the model has no parameters to train")
    device = parameter.device
    if device.type == "cpu":
        _C.keep_freed_memory()
    check_classifier(model, images, labels)
    model.to(memory_format=torch.channels_last)
    method = _optimizer(optimizer, model, lr, weight_decay)
    described = {
        "loss": _named(loss), "data": digest(images, labels), "images": len(images),
        "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "optimizer": optimizer,
        "drops": list(drops), "augment": augment, "seed": seed,
        "dtype": str(dtype), "microbatch": microbatch, "model": _network(model),
    }  # fmt: skip
    first = _resumed(Path(checkpoint), model, method, described) if checkpoint is not None and resume else 0
    if first > epochs:
        raise files.AnotherRun(
            f"{checkpoint} has {first} epochs already, and {epochs} are asked for; delete it to start again"
        )
    ranks = Ranks.of_group(group)
    if ranks.size > 1:
        if not splittable(loss):
            raise ValueError("the loss must take image_ids, the rows' numbers, for a batch to be split over processes")
        ranks.agree(
            {**described, "device": device.type, "epochs": epochs, "done": first, "weights": fingerprint(model)}
        )
    split = Split(ranks, model)
    if ranks.rank:
        checkpoint = metrics = None
    if metrics is not None:
        files.keep_lines(metrics, first)
    run = _Run(
        model, images.to(device), labels.to(device), loss, method, batch_size, microbatch, augment, seed, dtype, epochs,
        split,
    )  # fmt: skip
    interval = 0.2 if sys.stderr.isatty() else 10.0
    total = epochs * run.steps
    hidden = not progress or ranks.rank > 0
    with (
        tqdm(total=total, initial=first * run.steps, unit="step", disable=hidden, mininterval=interval) as bar,
        _Deterministic(),
        Accuracy(model, device) as accuracy,
    ):
        for epoch in range(first, epochs):
            for group in method.param_groups:
                group["lr"] = lr * 0.1 ** sum(epoch >= drop for drop in drops)
            line = run.epoch(epoch, accuracy, bar)
            if metrics is not None:
                files.append_line(metrics, json.dumps(line))
            if checkpoint is not None:
                state = {"model": model.state_dict(), "optimizer": method.state_dict(), "epoch": epoch + 1}
                files.write(Path(checkpoint), described, state)
            if after_epoch is not None:
                after_epoch(epoch, model)
    ranks.everyones("rank 0 has written")
    return model.eval()


@dataclass
class _Run:
    """A training run whose arguments are checked: its epochs, and their steps."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    loss: Any
    optimizer: torch.optim.Optimizer
    batch_size: int
    microbatch: int | None
    augment: bool
    seed: int
    dtype: torch.dtype
    epochs: int
    split: Split

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-len(self.images) // self.batch_size)

    def epoch(self, epoch: int, accuracy: Accuracy, bar: tqdm) -> dict[str, Any]:
        """All steps of an epoch; its line of the metrics."""
        self.model.train()
        accuracy.clear()
        started, device = time.perf_counter(), self.images.device
        total = torch.zeros((), device=device)
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        order = torch.randperm(len(self.images), generator=generator)
        moves = moves_of(order, self.batch_size, self.microbatch, generator).to(device) if self.augment else None
        order, watch = order.to(device), Watch(device)
        loss = self.loss.at_epoch(epoch) if hasattr(self.loss, "at_epoch") else self.loss
        with seeded(device, mix(self.seed, epoch, Purpose.DROPOUT)):
            for step, index in enumerate(order.split(self.batch_size)):
                first = step * self.batch_size
                moved = None if moves is None else moves[:, first : first + len(index)]
                mean = self.step(loss, epoch, step, index, moved, accuracy, watch)
                total += mean * len(index)
                bar.update()
                last = step == self.steps - 1
                if step % LOOKS.get(device.type, 1) == 0 or last:
                    self.look(epoch, watch)
                if last and not bool(torch.stack([p.isfinite().all() for p in self.model.parameters()]).all()):
                    raise ValueError(
                        f"the weights are not finite after epoch {epoch}, step {step} (noise seed "
                        f"{self.noise(epoch, step, 0)}); the last checkpoint stands; a smaller lr may help"
                    )
                if step % 20 == 0:
                    bar.set_postfix_str(
                        f"epoch {epoch + 1}/{self.epochs}, loss {float(mean):.4f}, accuracy {accuracy.share():.2%}"
                    )
        return {
            "epoch": epoch,
            "loss": float(total) / len(self.images),
            "accuracy": accuracy.share(self.split.ranks),
            "seconds": time.perf_counter() - started,
        }

    def noise(self, epoch: int, step: int, part: int) -> int:
        """The seed of a part's noise."""
        return mix(self.seed, epoch, Purpose.NOISE, step, part)

    def step(
        self,
        loss: Loss,
        epoch: int,
        step: int,
        index: Tensor,
        moves: Tensor | None,
        accuracy: Accuracy,
        watch: Watch,
    ) -> Tensor:
        """One step of the optimiser on the images `index`; their mean loss."""
        self.optimizer.zero_grad(set_to_none=True)
        device, size = self.images.device, self.microbatch or self.batch_size
        mean = torch.zeros((), device=device)
        for part, chosen in enumerate(index.split(size)):
            (rows,), share = self.split.rows(len(chosen))
            x, y = as_float(self.images[chosen[rows]]), self.labels[chosen[rows]]
            if moves is not None:
                x = augmented(x, moves[:, part * size : part * size + len(chosen)][:, rows])
            low = torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)
            with low, self.split.batch_norm(self.model, share):
                value = loss(self.model, x, y, seed=self.noise(epoch, step, part), **self.split.numbered(rows))
            value = value * (share * len(chosen) / len(index))
            if self.split.alone:
                self.see(value, epoch, step, part, watch)
            value.backward()
            mean += value.detach()
            accuracy.count(y, share > 0)
        if not self.split.alone:  # all see the same
            mean = self.split.add_up(self.model.parameters(), mean)
            self.see(mean, epoch, step, 0, watch)
        self.optimizer.step()
        return mean

    def see(self, value: Tensor, epoch: int, step: int, part: int, watch: Watch) -> None:
        watch.see(value.detach(), step, part)
        if LOOKS.get(value.device.type, 1) == 1:
            self.look(epoch, watch)  # before the weights see it

    def look(self, epoch: int, watch: Watch) -> None:
        """Raises ValueError where a loss was not finite."""
        found = watch.first()
        if found is not None:
            value, step, part = found
            raise ValueError(
                f"the loss is {value} at epoch {epoch}, step {step} (noise seed {self.noise(epoch, step, part)}); "
                "the last checkpoint stands; a smaller lr may help"
            )


class _Deterministic:
    """cuDNN's deterministic algorithms for a while."""

    def __enter__(self) -> None:
        self._before = torch.backends.cudnn.deterministic
        torch.backends.cudnn.deterministic = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        torch.backends.cudnn.deterministic = self._before


def _optimizer(name: str, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay, fused=fused)
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}: give {', '.join(OPTIMIZERS)}")
    momentum = 0.9 if name == "momentum" else 0.0
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused)


def _check(
    images: Tensor,
    labels: Tensor,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    dtype: torch.dtype,
    microbatch: int | None,
) -> None:
    if len(images) == 0:
        raise ValueError("there are no images to train on")
    at_least("epochs", epochs, 1)
    at_least("batch_size", batch_size, 1)
    at_least("microbatch", batch_size if microbatch is None else microbatch, 1)
    positive("lr", lr)
    not_negative("weight_decay", weight_decay)
    check_pixels(images)
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype}")


def digest(images: Tensor, labels: Tensor) -> str:
    """The first 12 hex digits of SHA-256 over dtype, shape and content of images and labels."""
    found = hashlib.sha256()
    for part in (images, labels):
        found.update(f"{part.dtype} {tuple(part.shape)}".encode())
        found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:12]


def _named(loss: Any) -> str:
    """Gaussian(sigma=0.5, k=1): a loss and its numbers; of others than dataclasses, those that are plain attributes."""
    if dataclasses.is_dataclass(loss) and not isinstance(loss, type):
        fields = {field.name: getattr(loss, field.name) for field in dataclasses.fields(loss)}
        name = type(loss).__name__
    else:
        plain = (bool, int, float, str)
        fields = {key: value for key, value in getattr(loss, "__dict__", {}).items() if isinstance(value, plain)}
        kind = loss if hasattr(loss, "__qualname__") else type(loss)
        name = f"{kind.__module__}.{kind.__qualname__}"
    return f"{name}({', '.join(f'{key}={value}' for key, value in fields.items())})"


def _network(model: nn.Module) -> str:
    """A network's class and a digest of what it prints, which has its layers and their numbers."""
    return f"{type(model).__qualname__}@{hashlib.sha256(repr(model).encode()).hexdigest()[:12]}"


def _resumed(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, described: dict[str, Any]) -> int:
    """Loads a checkpoint of this very run and returns the next epoch; 0 where there is none yet."""
    state = files.read(path, described, "training", next(model.parameters()).device)
    if state is None:
        return 0
    with files.taken_up(path):
        epoch, weights, moments = int(state["epoch"]), state["model"], state["optimizer"]
    files.restore(path, model, weights, optimizer, moments)
    return epoch
