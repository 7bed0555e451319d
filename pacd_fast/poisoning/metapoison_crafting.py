"""MetaPoison: training images perturbed so that networks trained on them misclassify chosen test images.

Huang et al. 2020: the perturbation descends the target loss of many surrogate networks, each looked ahead a few SGD
steps, at all stages of their training at once.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pacd_fast import _C, files
from pacd_fast.arguments import writable
from pacd_fast.bilevel import unrolled
from pacd_fast.data import Dataset, as_float
from pacd_fast.poisoning.metapoison_settings import MetaPoison, adversarial_loss, margin
from pacd_fast.poisoning.poison import Poison
from pacd_fast.randomness import Purpose, mix, seeded
from pacd_fast.ranks import Ranks
from pacd_fast.training import eval_mode, layout, network_for


@dataclass(frozen=True)
class Step:
    """A crafting step in numbers, averaged over surrogates and batches: the target loss before and after unrolling, the
    targets' margin before, the share of targets taken for the adversarial class, the clean training loss; `lost`:
    surrogates that gave no finite gradient and started again; seconds.
    """

    step: int
    before: float
    after: float
    margin: float
    success: float
    training_loss: float
    lost: int
    seconds: float


def metapoison(
    data: Dataset,
    attack: MetaPoison,
    *,
    device: torch.device | str = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = False,
    after_step: Callable[[int, Poison], object] | None = None,
    group: Any = None,
) -> Poison:
    """Crafts poison (Algorithm 1 of the paper).

    In a crafting step every surrogate passes an epoch.  For every batch that holds poison, the target loss after
    `unroll` SGD steps on the poisoned batch is differentiated with respect to the perturbation; then the weights
    advance on the clean batch.  The gradients, averaged over surrogates, make one Adam step; then the images are
    projected.

    Batch norm uses the batch's own statistics in unrolled steps, as in training, without leaving a trace; running
    statistics advance on clean batches alone, and the targets are seen with them, as a victim's user would see them.
    A surrogate whose loss or gradient is not finite gives none, starts again from other weights and is counted.

    Surrogates of a process run in turn: stacked under torch.func.vmap they take as long on a CPU (1.02 times, eight
    convnets, by benchmarks/bench_metapoison.py) and the memory of all their graphs at once.

    Args:
        device: where the surrogates are; on the CPU the same settings are the same bits, and on CUDA under
            torch.use_deterministic_algorithms (which needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment).
        checkpoint: a file that is rewritten after every pretrained surrogate and crafting step; with resume, the run
            goes on from it and ends with the bits of an uninterrupted one.
        after_step: called with the step's number, from 0, and the poison as it is then; after a kill, once more.
        group: a torch.distributed process group that crafts together: all its processes call this with the same
            arguments, share the surrogates, and get the same poison.  Gradients are added in float64, in whatever
            order: the float32 sum is that of one process, unless it lies within 2^-52 of a tie, relative to the sum of
            the gradients' sizes.  Rank 0 alone writes, calls after_step and shows a bar; all read the checkpoint.

    Returns:
        The poison, with the attack's settings, target_labels, target_classes, and `history`: a `Step` a crafting step.

    Raises:
        ValueError: for settings that do not fit the data, a checkpoint of another run, or processes of a group that
            differ, naming rank and difference.
    """
    device, ranks = torch.device(device), Ranks.of_group(group)
    attack.ball.check(data)
    index, labels = attack.chosen(data)
    crafting = _Crafting(data, attack, index, device, ranks)
    about = {**attack.settings(), "target_labels": labels, "poisons": len(index)}

    def poison() -> Poison:
        history = [dataclasses.asdict(step) for step in crafting.history]
        return Poison.craft("metapoison", data, index, crafting.u, attack.ball, {**about, "history": history})

    path = None if checkpoint is None else writable(checkpoint)
    if path is not None and resume:
        crafting.resume(path)
    there = sorted(crafting.there)
    ranks.agree(
        {**crafting.described(), "device": device.type, "surrogates there": there, "step": len(crafting.history)}
    )
    if device.type == "cpu":
        _C.keep_freed_memory()
    begun = [attack.start(number) for number in range(ranks.rank, attack.surrogates, ranks.size)]
    work = [*begun, *[len(begun) * crafting.weight] * attack.steps]  # in clean epochs
    progress = progress and ranks.rank == 0
    if progress:
        epochs = sum(map(attack.start, range(attack.surrogates)))
        print(
            f"{_counted(attack.surrogates, 'surrogate')}, pretrained for {_counted(epochs, 'epoch')} in all, then "
            f"{_counted(attack.steps, 'crafting step')} of an epoch each",
            file=sys.stderr,
        )
    bar = tqdm(
        total=sum(work), initial=sum(work[: len(crafting.surrogates) + len(crafting.history)]), disable=not progress,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        bar_format="{l_bar}{bar}| {elapsed}, left {remaining}{postfix}",
    )  # fmt: skip
    with bar:
        crafting.passed = bar.update
        for first in range(0, attack.surrogates, ranks.size):  # one for each process
            if set(range(first, min(first + ranks.size, attack.surrogates))) <= crafting.there:
                continue
            if (number := first + ranks.rank) < attack.surrogates and number not in crafting.there:
                bar.set_description_str(f"surrogate {number + 1} of {attack.surrogates}")
                surrogate = crafting.fresh(number)
                for _ in range(attack.start(number)):
                    crafting.epoch(surrogate, None)
                crafting.surrogates.append(surrogate)
            if path is not None:
                crafting.save(path)
        crafting.surrogates.sort(key=lambda surrogate: surrogate.number)
        for number in range(len(crafting.history), attack.steps):
            bar.set_description_str(f"step {number + 1} of {attack.steps}")
            now = crafting.step()
            bar.set_postfix_str(
                f"target loss {now.before:.3f}, unrolled {now.after:.3f}, margin {now.margin:.2f}, "
                f"success {now.success:.0%}" + (f", {now.lost} lost" if now.lost else ""),
                refresh=False,
            )
            if after_step is not None and ranks.rank == 0:
                after_step(now.step, poison())
            if path is not None:  # last: a kill before it repeats the step, and what comes after it, with the same bits
                crafting.save(path)
    ranks.everyones("rank 0 has written")
    return poison()


@dataclass
class _Surrogate:
    """A network on its way through training: its number, how often it started again, epochs passed."""

    number: int
    generation: int
    epoch: int
    model: nn.Module
    optimizer: torch.optim.Optimizer


class _Crafting:
    """The state of a run: the perturbed images u [P, ...], Adam's, this process's surrogates, and the history.

    there: numbers of the surrogates of all processes that a checkpoint has.
    """

    def __init__(
        self, data: Dataset, attack: MetaPoison, index: Tensor, device: torch.device, ranks: Ranks | None = None
    ) -> None:
        self.data, self.attack, self.device = data, attack, device
        self.ranks = Ranks() if ranks is None else ranks
        self.images, self.labels = data.x_train.to(device), data.y_train.to(device)
        self.targets = as_float(data.x_test[list(attack.target_index)]).to(device)
        self.targets = self.targets.contiguous(memory_format=layout(self.targets))
        self.base = as_float(data.x_train[index]).to(device)
        self.row = torch.full((len(data.x_train),), -1)  # of an image among the poisons, on the CPU
        self.row[index.cpu()] = torch.arange(len(index))
        generator = torch.Generator().manual_seed(mix(attack.seed, Purpose.PERTURBATION_START))
        self.u = attack.ball.fill(self.base.cpu(), generator).to(device).requires_grad_()
        self.adam = torch.optim.Adam([self.u], lr=attack.craft_rate(0))
        self.surrogates: list[_Surrogate] = []
        self.there: set[int] = set()
        self.history: list[Step] = []
        # What an epoch with look-ahead takes in clean ones, for the time left; with 2 steps: resnet20 12, mnist-cnn 6.
        self.weight = 1 + 5 * attack.unroll
        self.passed: Callable[[float], object] = lambda epochs: None

    def fresh(self, number: int, generation: int = 0) -> _Surrogate:
        """A surrogate with new weights, which its number and generation decide."""
        with seeded(torch.device("cpu"), mix(self.attack.seed, Purpose.SURROGATE_WEIGHTS, number, generation)):
            model = network_for(self.attack.model, self.data)
        model = model.to(self.device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=self.attack.lr, momentum=self.attack.momentum)
        return _Surrogate(number, generation, 0, model, optimizer)

    def step(self) -> Step:
        """One crafting step: an epoch of every surrogate, and a step of Adam."""
        started, number = time.perf_counter(), len(self.history)
        total = torch.zeros_like(self.base, dtype=torch.float64)  # in which the order does not matter
        sums = torch.zeros(6, dtype=torch.float64)  # of the numbers, and how many surrogates gave some
        for place, surrogate in enumerate(self.surrogates):
            if surrogate.epoch == self.attack.epochs:
                surrogate = self.surrogates[place] = self.fresh(surrogate.number, surrogate.generation + 1)
            gradient, numbers = self.epoch(surrogate, self.u.detach())
            if not all(math.isfinite(value) for value in numbers) or not bool(torch.isfinite(gradient).all()):
                self.surrogates[place] = self.fresh(surrogate.number, surrogate.generation + 1)
                continue
            total += gradient
            sums += torch.tensor([*numbers, 1.0], dtype=torch.float64)
        total, sums = self.ranks.summed_tensor(total), self.ranks.summed_tensor(sums)
        if (given := int(sums[5])) == 0:
            raise ValueError(f"no surrogate has a finite gradient in crafting step {number}: give a smaller lr")
        for group in self.adam.param_groups:
            group["lr"] = self.attack.craft_rate(number)
        self.u.grad = (total / given).to(self.u.dtype)
        self.adam.step()
        with torch.no_grad():
            self.u.copy_(self.attack.ball.project(self.u, self.base))
        before, after, margins, success, training = (sums[:5] / given).tolist()
        lost, seconds = self.attack.surrogates - given, time.perf_counter() - started
        self.history.append(Step(number, before, after, margins, success, training, lost, seconds))
        return self.history[-1]

    def epoch(self, surrogate: _Surrogate, u: Tensor | None) -> tuple[Tensor, list[float]]:
        """An epoch of clean training.

        With the poison u, its meta-gradient as well, [P, ...], and means over batches: target loss before and after
        unrolling, margin, success, training loss.
        """
        attack, model = self.attack, surrogate.model
        rate = attack.rate(surrogate.epoch)
        for group in surrogate.optimizer.param_groups:
            group["lr"] = rate
        seed = (surrogate.number, surrogate.generation, surrogate.epoch)
        order = torch.randperm(
            len(self.images), generator=torch.Generator().manual_seed(mix(attack.seed, Purpose.SURROGATE_ORDER, *seed))
        )
        gradient = torch.zeros_like(self.base)
        sums, batches, looked = torch.zeros(5, device=self.device), 0, 0
        model.train()
        with seeded(self.device, mix(attack.seed, Purpose.SURROGATE_DROPOUT, *seed)):
            for index, poisoned, clean, at in self._batches(order):
                x, y = as_float(self.images[index]), self.labels[index]
                x = x.contiguous(memory_format=layout(x))
                if u is not None and len(at):
                    meta, values = self._look_ahead(model, x[clean], torch.cat([y[clean], y[poisoned]]), u[at], rate)
                    gradient[at] += meta
                    sums[:4] += values
                    looked += 1
                surrogate.optimizer.zero_grad(set_to_none=True)
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                surrogate.optimizer.step()
                sums[4] += loss.detach()
                batches += 1
        surrogate.epoch += 1
        self.passed(1 if u is None else self.weight)
        sums[:4] /= max(looked, 1)
        sums[4] /= batches
        return gradient, sums.tolist()

    def _batches(self, order: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """By batch of an epoch: its images, the places of the poisons and of the others, and which poisons those are.

        On the device, all moved at once, so that no batch waits for it.
        """
        rows, size = self.row[order], self.attack.batch_size
        batches = -(-len(order) // size)

        def moved(values: Tensor, places: Tensor) -> tuple[Tensor, ...]:
            return values.to(self.device).split(torch.bincount(places // size, minlength=batches).tolist())

        poisoned, clean = (rows >= 0).nonzero().flatten(), (rows < 0).nonzero().flatten()
        return zip(
            order.to(self.device).split(size),
            moved(poisoned % size, poisoned), moved(clean % size, clean), moved(rows[poisoned], poisoned),
            strict=True,
        )  # fmt: skip

    def _look_ahead(self, model: nn.Module, clean: Tensor, y: Tensor, u: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """The meta-gradient of a batch's poisons u, and (target loss before, after, margin, success).

        clean: the other images of the batch; y: the labels of those, then of the poisons.
        """
        attack, others = self.attack, len(clean)
        batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        share = len(u) / len(y)
        logits_seen = []

        def lower(u: Tensor, model: nn.Module) -> Tensor:
            u = u.contiguous(memory_format=layout(u))
            if batch_norm:
                return F.cross_entropy(model(torch.cat([clean, u])), y)
            # The same number from two passes: what does not depend on u is not differentiated twice in the first step.
            poisoned = share * F.cross_entropy(model(u), y[others:])
            return poisoned + (1 - share) * F.cross_entropy(model(clean), y[:others]) if others else poisoned

        def upper(u: Tensor, model: nn.Module) -> Tensor:
            with eval_mode(model):
                logits = model(self.targets)
            logits_seen.append(logits.detach())
            return adversarial_loss(logits, attack.adversarial_class, attack.objective, attack.confidence)

        found = unrolled(upper, lower, u, model, steps=attack.unroll, lr=rate, checkpoint=attack.recompute)
        assert isinstance(found.gradient, Tensor)
        before = margin(logits_seen[0], attack.adversarial_class)
        success = (before < 0).float().mean()
        return found.gradient, torch.stack([found.before, found.after, before.mean(), success])

    def described(self) -> dict[str, Any]:
        ball = {"epsilon": self.attack.ball.epsilon, "norm": self.attack.ball.norm}
        data = {"data": self.data.fingerprint, "train_images": len(self.images)}
        return {**self.attack.settings(), **ball, **data}

    def save(self, path: Path) -> None:
        """Rank 0 writes what all have."""
        mine = [
            {
                "number": s.number,
                "generation": s.generation,
                "epoch": s.epoch,
                "model": s.model.state_dict(),
                "optimizer": s.optimizer.state_dict(),
            }
            for s in self.surrogates
        ]
        surrogates = [each for theirs in self.ranks.gathered(mine) for each in theirs]
        if self.ranks.rank:
            return
        state = {
            "u": self.u.detach(),
            "adam": self.adam.state_dict(),
            "history": [dataclasses.asdict(step) for step in self.history],
            "surrogates": sorted(surrogates, key=lambda each: each["number"]),
        }
        files.write(path, self.described(), state)

    def resume(self, path: Path) -> None:
        """Takes up the state in a file, where there is one.  Raises ValueError where it is not of this run."""
        state = files.read(path, self.described(), "crafting", self.device)
        if state is None:
            return
        with files.taken_up(path), torch.no_grad():
            self.u.copy_(state["u"])
            self.adam.load_state_dict(state["adam"])
            self.history = [Step(**step) for step in state["history"]]
            for each in state["surrogates"]:
                self.there.add(each["number"])
                if each["number"] % self.ranks.size != self.ranks.rank:
                    continue
                surrogate = self.fresh(each["number"], each["generation"])
                surrogate.epoch = each["epoch"]
                surrogate.model.load_state_dict(each["model"])
                surrogate.optimizer.load_state_dict(each["optimizer"])
                self.surrogates.append(surrogate)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
