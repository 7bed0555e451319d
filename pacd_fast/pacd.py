"""PACD: clean-label poison that lowers the certified radius of a class (Mehra et al. 2021, algorithms 1 and 2).

The upper loss is the soft certified radius of validation images, the lower one the victim's own training loss.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from pacd_fast import _C, models, unfinished
from pacd_fast.bilevel import Composite, SolverWarning, hypergradient
from pacd_fast.datasets import Dataset, as_float, random_subset
from pacd_fast.losses import Gaussian, Loss, SmoothAdv, eval_mode
from pacd_fast.pacd_settings import PRESETS, Accuracy, Preset, Radius, Recipe, Upper
from pacd_fast.poison import Ball, Poison
from pacd_fast.training import keep_lines, mix, seeded

__all__ = ["PRESETS", "Accuracy", "Preset", "Radius", "Recipe", "Upper", "choose", "lower_problem", "pacd"]

clock = time.monotonic  # what max_seconds counts; benchmarks/bench_solvers.py takes the processor's time


class _Spoken(Exception):
    """The network's logits, on their way out of a loss that asked for them."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def lower_problem(
    network: nn.Module, loss: Loss, clean: Tensor, y: Tensor, seed: int, poison: Tensor
) -> tuple[Composite, tuple[Tensor, ...]]:
    """A training loss as (poison batch, weights) -> scalar, and the weights of the network as they are.

    The batch is the clean images and after them the poison; labels y [clean + poison].  SmoothAdv's perturbation is
    found at these weights and then held (Mehra et al. 2021, 4.3).  Every evaluation draws the same dropout, and leaves
    batch norm's running statistics as they are.
    """
    names = [name for name, _ in network.named_parameters()]
    weights = tuple(p.detach() for p in network.parameters())
    shift = torch.zeros((), device=clean.device)
    if isinstance(loss, SmoothAdv):
        shift = loss.perturbation(network, torch.cat([clean, poison.detach()]), y, seed=seed)
        loss = Gaussian(loss.sigma, loss.k)

    def batch(u: Tensor) -> Tensor:
        return torch.cat([clean, u]) + shift

    def outputs(u: Any, inner: Sequence[Tensor]) -> Tensor:
        u = u if isinstance(u, Tensor) else u[0]

        def model(x: Tensor) -> Tensor:
            buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
            raise _Spoken(functional_call(network, {**dict(zip(names, inner, strict=True)), **buffers}, (x,)))

        try:
            with seeded(clean.device, mix(seed, 17)):
                loss(model, batch(u), y, seed=seed)
        except _Spoken as found:  # what the loss does with the logits is `of_outputs`' business
            return found.logits
        raise ValueError(f"{loss} did not call the model")

    def of_outputs(logits: Tensor) -> Tensor:
        # The loss of these logits: the network is replaced by what it said.
        return loss(lambda x: logits, torch.cat([clean, poison.detach()]), y, seed=seed)

    return Composite(outputs, of_outputs), weights


def pacd(
    data: Dataset,
    loss: Loss,
    *,
    target_class: int,
    epsilon: float,
    norm: str = "linf",
    upper: Upper | None = None,
    fraction: float = 1.0,
    targets: Sequence[int] | None = None,
    model: str = "mnist-cnn",
    recipe: Recipe | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    metrics: str | os.PathLike[str] | None = None,
    progress: bool = False,
    max_seconds: float = math.inf,
) -> Poison:
    """Crafts poison for a class against victims that train with `loss`.

    Args:
        data: with a validation split (`datasets.load(validation=...)`), whose images of the target class the upper
            loss sees.
        loss: the lower-level problem, any loss of losses.py.
        target_class: the class whose radius is to fall; its training images are changed.
        epsilon, norm: see `poison.Ball`.
        upper: by default Radius(loss.sigma), for a loss without sigma Accuracy().
        fraction: of the class's training images to change; a random choice.
        targets: test images of the target class to attack alone; the training images of the class nearest to any of
            them (in l2) are changed, `fraction` of *all* training images (D.6).
        model: what `models.build` takes.
        seed: decides everything else.
        checkpoint: a file that is rewritten every half minute and after every epoch; with resume, crafting goes on
            from it, to the same poison.
        metrics: a file of JSON lines, one per outer step: epoch, upper, lower, residual, products, seconds.
        max_seconds: stop crafting after the outer step in which so much time has passed.

    The poison's settings count `restarts_nan`, how often the upper or lower cost was not finite and the weights began
    anew (as the authors do), and `unsolved`, how many linear systems ended no better than q = 0 (the authors'
    Adam often does, and still finds a direction that helps).  Every lower step draws its noise anew, SmoothAdv's too,
    for which the authors fix one noise per training image.

    Raises:
        ValueError: for a class that is not there, fewer images than a batch, numbers out of range, a checkpoint of
            another run, or costs that are never finite.
    """
    recipe = recipe or Recipe()
    ball = Ball(epsilon, norm)
    ball.check(data)
    sigma = getattr(loss, "sigma", None)
    if upper is None:
        upper = Accuracy() if sigma is None else Radius(sigma)
    chosen = choose(data, target_class, fraction, targets, seed)
    rest = torch.ones(len(data.x_train), dtype=torch.bool)
    rest[chosen] = False
    clean = rest.nonzero().flatten()
    if targets is None:
        x_val, y_val = data.split("val")
        x_upper, y_upper = x_val[y_val == target_class], y_val[y_val == target_class]
    else:
        x_upper, y_upper = data.x_test[list(targets)], data.y_test[list(targets)]
    if len(x_upper) == 0:
        raise ValueError(f"no validation image is of class {target_class}: hold out more with --validation")
    if len(chosen) < recipe.poison_batch:
        raise ValueError(
            f"there are {len(chosen)} images to poison, fewer than a poison batch of {recipe.poison_batch}: give a "
            "smaller --poison-batch or a larger --fraction"
        )
    if len(clean) < recipe.clean_batch:
        raise ValueError(
            f"there are {len(clean)} clean images, fewer than a clean batch of {recipe.clean_batch}: give a smaller "
            "--clean-batch"
        )
    settings = {
        "target_class": target_class, "loss": str(loss), "upper": getattr(upper, "__qualname__", str(upper)),
        "model": model, "seed": seed,
        "fraction": fraction, "targets": None if targets is None else list(targets), "sigma": sigma,
        **dataclasses.asdict(recipe),
    }  # fmt: skip
    held = {"train_images": len(data.x_train), "validation": len(data.x_val)}
    run = {**settings, **held, "data": f"{data.name}@{data.fingerprint}", "epsilon": epsilon, "norm": norm}
    state = _State(data, chosen, model, recipe, seed, torch.device(device), run)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and resume:
        state.load(path)
    loop = _Loop(data, clean, x_upper, y_upper, loss, upper, ball, recipe, seed, state)
    loop.run(path, None if metrics is None else Path(metrics), progress, max_seconds)
    settings |= {"restarts_nan": state.restarts_nan, "unsolved": state.unsolved, "outer_steps": state.outer_steps}
    settings["seconds"] = round(state.seconds, 1)
    return Poison.craft("pacd" if sigma is not None else "standard", data, chosen, state.u, ball, settings)


def choose(data: Dataset, target_class: int, fraction: float, targets: Sequence[int] | None, seed: int) -> Tensor:
    """Which training images are poisoned: ascending int64 [P]."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], not {fraction}")
    there = (data.y_train == target_class).nonzero().flatten()
    if not 0 <= target_class < data.num_classes or len(there) == 0:
        raise ValueError(f"no training image of {data.name} is of class {target_class}")
    if targets is None:
        if fraction == 1:
            return there
        return random_subset(data.y_train, target_class, max(1, round(fraction * len(there))), seed % 2**32)
    for index in targets:
        if not 0 <= index < len(data.x_test):
            raise ValueError(f"target {index} is no test image: there are {len(data.x_test)}")
        if int(data.y_test[index]) != target_class:
            raise ValueError(f"test image {index} is of class {int(data.y_test[index])}, not {target_class}")
    count = round(fraction * len(data.x_train))
    if not 1 <= count <= len(there):
        raise ValueError(
            f"fraction {fraction:g} of {len(data.x_train)} images is {count}, and the class has {len(there)}"
        )
    far = torch.cdist(as_float(data.x_train[there]).flatten(1), as_float(data.x_test[list(targets)]).flatten(1))
    return there[far.amin(1).argsort(stable=True)[:count]].sort().values


class _State:
    """Everything that changes while crafting, and its file."""

    def __init__(
        self,
        data: Dataset,
        chosen: Tensor,
        model: str,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        run: dict[str, Any],
    ) -> None:
        self.chosen, self.device, self.run, self.recipe, self.seed = chosen, device, run, recipe, seed
        self.base = as_float(data.x_train[chosen]).to(device)
        self.labels = data.y_train[chosen].to(device)
        self.u = self.base.clone()
        self.first, self.second = torch.zeros_like(self.u), torch.zeros_like(self.u)  # Adam's moments, image by image
        self.visits = torch.zeros(len(chosen), dtype=torch.int64, device=device)
        cifar = data.name == "cifar10"
        self.build = lambda: models.build(
            model,
            num_classes=data.num_classes,
            in_channels=data.in_channels,
            image_size=data.image_size,
            mean=models.CIFAR10_MEAN if cifar else None,
            std=models.CIFAR10_STD if cifar else None,
        )
        self.epoch = self.step = self.starts = self.restarts_nan = self.unsolved = self.outer_steps = 0
        self.seconds = 0.0
        self.restart()

    def restart(self) -> None:
        """New weights, a new optimiser, no solution of the linear system."""
        with seeded(torch.device("cpu"), mix(self.seed, 11, self.starts)):
            network = self.build()
        self.starts += 1
        self.network = network.to(self.device, memory_format=torch.channels_last).train()
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=self.recipe.lower_lr, fused=fused)
        self.q: Tensor | None = None

    NUMBERS = ("epoch", "step", "starts", "restarts_nan", "unsolved", "outer_steps", "seconds")
    TENSORS = ("u", "first", "second", "visits")

    def save(self, path: Path) -> None:
        content = {name: getattr(self, name) for name in (*self.NUMBERS, *self.TENSORS, "q")}
        content |= {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        unfinished.write(path, self.run, content)

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint of this very run; from the start where there is none yet."""
        content = unfinished.read(path, self.run, "crafting", self.device)
        if content is None:
            return
        for name in (*self.NUMBERS, *self.TENSORS, "q"):
            setattr(self, name, content[name])
        unfinished.restore(path, self.network, content["network"], self.optimizer, content["optimizer"])


@dataclass
class _Loop:
    """Crafting, an outer step at a time; all randomness is a function of (seed, epoch, step)."""

    data: Dataset
    clean: Tensor
    x_upper: Tensor
    y_upper: Tensor
    loss: Loss
    upper: Upper
    ball: Ball
    recipe: Recipe
    seed: int
    state: _State

    def __post_init__(self) -> None:
        device = self.state.device
        self.x_train, self.y_train = self.data.x_train.to(device), self.data.y_train.to(device)
        self.x_upper, self.y_upper = as_float(self.x_upper).to(device), self.y_upper.to(device)
        if device.type == "cpu":
            _C.keep_freed_memory()

    def run(self, path: Path | None, metrics: Path | None, progress: bool, max_seconds: float) -> None:
        state, recipe = self.state, self.recipe
        steps = len(state.chosen) // recipe.poison_batch
        bar = tqdm(
            total=recipe.epochs * steps,
            initial=state.epoch * steps + state.step,
            unit="step",
            disable=not progress,
            mininterval=1.0,
        )
        saved = time.monotonic()
        if metrics is not None:
            keep_lines(metrics, state.outer_steps)
        try:
            while state.epoch < recipe.epochs and state.seconds < max_seconds:
                if state.step == 0 and state.epoch % recipe.restart == 0 and state.epoch > 0:
                    state.restart()
                while state.step < steps and state.seconds < max_seconds:
                    started = clock()
                    with seeded(state.device, mix(self.seed, 18, state.epoch, state.step)):  # for dropout
                        line = self._outer_step()
                    state.step += 1
                    state.seconds += clock() - started
                    state.outer_steps += 1
                    bar.update()
                    bar.set_postfix_str(
                        f"radius {line['upper']:.3f}, loss {line['lower']:.3f}, residual {line['residual']:.2f}"
                        if line["upper"] is not None else "not finite: weights begin anew"
                    )  # fmt: skip
                    if metrics is not None:
                        residual = line["residual"] if math.isfinite(line["residual"]) else None  # JSON has no inf
                        with open(metrics, "a", encoding="utf-8") as file:
                            content = {**line, "residual": residual, "seconds": round(state.seconds, 3)}
                            file.write(json.dumps(content) + "\n")
                    if path is not None and time.monotonic() - saved > 30 and state.step < steps:
                        state.save(path)
                        saved = time.monotonic()
                if state.step == steps:
                    state.step, state.epoch = 0, state.epoch + 1
                if path is not None:
                    state.save(path)
                    saved = time.monotonic()
        finally:
            bar.close()

    def _outer_step(self) -> dict[str, Any]:
        """One batch of poison: lower steps on the weights, the hypergradient, a step of the poison."""
        state, recipe = self.state, self.recipe
        generator = torch.Generator().manual_seed(mix(self.seed, 12, state.epoch))
        here = torch.randperm(len(state.chosen), generator=generator).split(recipe.poison_batch)[state.step]
        draw = torch.Generator().manual_seed(mix(self.seed, 13, state.epoch, state.step))
        u, labels = state.u[here], state.labels[here]
        current = self.loss.at_epoch(state.epoch % recipe.restart) if hasattr(self.loss, "at_epoch") else self.loss
        lower = math.nan
        for lower_step in range(recipe.lower_steps):
            x, y = self._clean(draw)
            noise = mix(self.seed, 14, state.epoch, state.step, lower_step)
            value = current(state.network, torch.cat([x, u]), torch.cat([y, labels]), seed=noise)
            lower = float(value.detach())
            if not math.isfinite(lower):
                return self._anew()
            state.optimizer.zero_grad(set_to_none=True)
            value.backward()
            state.optimizer.step()
        x, y = self._clean(draw)
        noise = mix(self.seed, 15, state.epoch, state.step)
        problem, weights = lower_problem(state.network, current, x, torch.cat([y, labels]), noise, u)
        count = min(recipe.upper_batch, len(self.x_upper))
        chosen = torch.randperm(len(self.x_upper), generator=draw)[:count].to(state.device)
        x_upper, y_upper = self.x_upper[chosen], self.y_upper[chosen]
        names = [name for name, _ in state.network.named_parameters()]

        def cost(outer: Tensor, inner: Sequence[Tensor]) -> Tensor:
            with eval_mode(state.network):  # as a victim is certified
                return self.upper(
                    lambda images: functional_call(state.network, dict(zip(names, inner, strict=True)), (images,)),
                    x_upper,
                    y_upper,
                    seed=mix(self.seed, 16, state.epoch, state.step),
                )

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SolverWarning)  # counted below, and reported with the poison
            gradient, found, upper, lower_value = hypergradient(
                cost,
                problem,
                u,
                weights,
                solver=recipe.solver,
                curvature=recipe.curvature,
                damping=recipe.damping,
                steps=recipe.solver_steps,
                tolerance=recipe.tolerance,
                warm_start=state.q,
                with_solution=True,
                **recipe.solver_options(),
            )
        if not (math.isfinite(float(upper)) and math.isfinite(float(lower_value))):
            return self._anew()
        state.unsolved += found.diverged
        if bool(torch.isfinite(gradient).all()):
            state.q = found.q
            self._move(here.to(state.device), gradient)
        else:  # the solver ran away: leave this step out, and begin the next system from 0
            state.q = None
        return {
            "epoch": state.epoch, "upper": float(upper), "lower": float(lower_value), "residual": found.residual,
            "products": found.products,
        }  # fmt: skip

    def _clean(self, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        index = self.clean[torch.randperm(len(self.clean), generator=draw)[: self.recipe.clean_batch]]
        index = index.to(self.state.device)
        return as_float(self.x_train[index]), self.y_train[index]

    def _anew(self) -> dict[str, Any]:
        state = self.state
        state.restarts_nan += 1
        if state.restarts_nan > 20:
            raise ValueError(
                "the training loss or the radius is not finite again and again: give a smaller --lower-lr, or look at "
                "the data"
            )
        state.restart()
        return {"epoch": state.epoch, "upper": None, "lower": None, "residual": math.inf, "products": 0}

    def _move(self, here: Tensor, gradient: Tensor) -> None:
        """Adam on these images, each with moments of its own, and back into the ball."""
        state = self.state
        state.visits[here] += 1
        t = state.visits[here].view(-1, *[1] * (gradient.dim() - 1)).float()
        state.first[here] = first = 0.9 * state.first[here] + 0.1 * gradient
        state.second[here] = second = 0.999 * state.second[here] + 0.001 * gradient.square()
        step = (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        state.u[here] = self.ball.project(state.u[here] - self.recipe.outer_lr * step, state.base[here])
