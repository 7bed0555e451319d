"""PACD: clean-label poison that lowers the certified radius of a class (Mehra et al. 2021, algorithms 1 and 2).

The upper loss is the soft certified radius of validation images, the lower one the victim's own training loss.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pacd_fast import _C, files
from pacd_fast.bilevel import Composite, SolverWarning, hypergradient
from pacd_fast.data import Dataset, as_float, random_subset
from pacd_fast.poisoning.pacd_settings import Pacd
from pacd_fast.poisoning.poison import Poison
from pacd_fast.randomness import Purpose, mix, seeded
from pacd_fast.ranks import Ranks
from pacd_fast.training import SmoothAdv, Split, eval_mode, network_for, splittable


def lower_problem(
    network: nn.Module, loss: Any, clean: Tensor, y: Tensor, seed: int, poison: Tensor, *, rows: slice = slice(None),
    weight: float = 1.0, **numbered: Tensor,
) -> Composite:  # fmt: skip
    """A training loss as (poison batch, network) -> scalar.

    The batch is the clean images and after them the poison; labels y [clean + poison].  SmoothAdv's perturbation is
    found at the network's weights and then held (Mehra et al. 2021, 4.3).  Every evaluation draws the same dropout.

    Of a batch that processes share, clean and y are one's, `rows` its poison, numbered its image_ids (see `Loss`);
    weight: a factor of the loss.
    """
    shift = torch.zeros((), device=clean.device)
    if isinstance(loss, SmoothAdv):
        shift = loss.perturbation(network, torch.cat([clean, poison.detach()[rows]]), y, seed=seed, **numbered)

    def outputs(u: Tensor, network: nn.Module) -> Tensor:
        with seeded(clean.device, mix(seed, Purpose.PACD_PROBLEM_DROPOUT)):
            logits: Tensor = network(loss.inputs(torch.cat([clean, u[rows]]) + shift, seed=seed, **numbered))
        return logits

    return Composite(outputs, lambda logits: weight * loss.of_logits(logits, y))


def pacd(
    data: Dataset,
    attack: Pacd,
    *,
    device: torch.device | str = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    metrics: str | os.PathLike[str] | None = None,
    progress: bool = False,
    max_seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    group: Any = None,
) -> Poison:
    """Crafts poison for a class against victims that train with `attack.loss`.

    Args:
        data: with a validation split (`load_dataset(validation=...)`), whose images of the target class the upper
            loss sees.
        attack: see `Pacd`.
        checkpoint: a file that is rewritten every half minute and after every epoch; with resume, crafting goes on
            from it, to the same poison.
        metrics: a file of JSON lines, one per outer step: epoch, upper, lower, residual, products, seconds.
        max_seconds: stop crafting after the outer step in which so much time has passed; clock: in whose seconds,
            time.process_time say.
        group: a torch.distributed process group that crafts together: all its processes call this with the same
            arguments, take their rows of every batch of the lower and the upper loss, and get the poison of one
            process, up to the order of summation.  The losses must be means over images that take image_ids.  Rank 0
            alone writes and shows a bar, and its clock counts; all read the checkpoint.

    The poison's settings count `restarts_nan`, how often the upper or lower cost was not finite and the weights were
    re-initialised (as the authors do), and `unsolved`, how many linear systems ended no better than q = 0 (the authors'
    Adam often does, and still finds a direction that helps).  Every lower step draws its noise anew, SmoothAdv's too,
    for which the authors fix one noise per training image.

    Raises:
        ValueError: for a class that is not there, fewer images than a batch, numbers out of range, a checkpoint of
            another run, costs that are never finite; with a group, losses without image_ids, a network with dropout,
            processes that differ.
    """
    recipe = attack.recipe
    attack.ball.check(data)
    if not hasattr(attack.loss, "inputs"):
        raise ValueError(
            f"{attack.loss} has no inputs and of_logits: give a loss of pacd_fast.training, or one like them"
        )
    chosen = choose(data, attack.target_class, attack.fraction, attack.targets, attack.seed)
    if attack.targets is None:
        x_val, y_val = data.split("val")
        upper_images = x_val[y_val == attack.target_class], y_val[y_val == attack.target_class]
    else:
        upper_images = data.x_test[list(attack.targets)], data.y_test[list(attack.targets)]
    if len(upper_images[0]) == 0:
        raise ValueError(f"no validation image is of class {attack.target_class}: hold out more with --validation")
    if len(chosen) < recipe.poison_batch:
        raise ValueError(
            f"there are {len(chosen)} images to poison, fewer than a poison batch of {recipe.poison_batch}: give a "
            "smaller --poison-batch or a larger --fraction"
        )
    if len(data.x_train) - len(chosen) < recipe.clean_batch:
        raise ValueError(
            f"there are {len(data.x_train) - len(chosen)} clean images, fewer than a clean batch of "
            f"{recipe.clean_batch}: give a smaller --clean-batch"
        )
    settings = attack.settings()
    held = {"train_images": len(data.x_train), "validation": len(data.x_val)}
    ball = {"epsilon": attack.ball.epsilon, "norm": attack.ball.norm}
    described = {**settings, **held, "data": f"{data.name}@{data.fingerprint}", **ball}
    ranks = Ranks.of_group(group)
    if ranks.size > 1 and not (splittable(attack.loss) and splittable(attack.cost)):
        raise ValueError("the losses must take image_ids, the rows' numbers, for batches to be split over processes")
    crafting = _Crafting(data, chosen, upper_images, attack, torch.device(device), ranks)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and resume:
        crafting.resume(path, described)
    ranks.agree({**described, "device": crafting.device.type, "done": crafting.outer_steps})
    if ranks.rank:
        path = metrics = None
    crafting.run(path, described, None if metrics is None else Path(metrics), progress, max_seconds, clock)
    ranks.everyones("rank 0 has written")
    settings |= {name: getattr(crafting, name) for name in ("restarts_nan", "unsolved", "outer_steps")}
    settings["seconds"] = round(crafting.seconds, 1)
    kind = "pacd" if attack.sigma is not None else "standard"
    return Poison.craft(kind, data, chosen, crafting.u, attack.ball, settings)


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


class _Crafting:
    """A run: everything that changes while crafting, its file, and its outer steps.

    All randomness is a function of (seed, epoch, step).
    """

    NUMBERS = ("epoch", "step", "starts", "restarts_nan", "unsolved", "outer_steps", "seconds")
    TENSORS = ("u", "first", "second", "visits")

    def __init__(
        self,
        data: Dataset,
        chosen: Tensor,
        upper_images: tuple[Tensor, Tensor],
        attack: Pacd,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self.data, self.attack, self.upper, self.device, self.ranks = data, attack, attack.cost, device, ranks
        self.recipe, self.seed = attack.recipe, attack.seed
        self.low = None if self.recipe.dtype == "float32" else getattr(torch, self.recipe.dtype)
        self.x_train, self.y_train = data.x_train.to(device), data.y_train.to(device)
        self.x_upper, self.y_upper = as_float(upper_images[0]).to(device), upper_images[1].to(device)
        self.base = as_float(data.x_train[chosen]).to(device)
        self.labels = data.y_train[chosen].to(device)
        rest = torch.ones(len(data.x_train), dtype=torch.bool)
        rest[chosen] = False
        self.clean = rest.nonzero().flatten()
        self.u = self.base.clone()
        self.first, self.second = torch.zeros_like(self.u), torch.zeros_like(self.u)  # Adam's moments, image by image
        self.visits = torch.zeros(len(chosen), dtype=torch.int64, device=device)
        self.epoch = self.step = self.starts = self.restarts_nan = self.unsolved = self.outer_steps = 0
        self.seconds = 0.0
        self.restart()
        if device.type == "cpu":
            _C.keep_freed_memory()

    def restart(self) -> None:
        """New weights, a new optimiser, no solution of the linear system."""
        with seeded(torch.device("cpu"), mix(self.seed, Purpose.PACD_WEIGHTS, self.starts)):
            network = network_for(self.attack.model, self.data)
        self.starts += 1
        self.network = network.to(self.device, memory_format=torch.channels_last).train()
        self.split = Split(self.ranks, self.network)
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=self.recipe.lower_lr, fused=fused)
        self.q: Tensor | None = None

    def save(self, path: Path, described: dict[str, Any]) -> None:
        content = {name: getattr(self, name) for name in (*self.NUMBERS, *self.TENSORS, "q")}
        content |= {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        files.write(path, described, content)

    def resume(self, path: Path, described: dict[str, Any]) -> None:
        """Goes on from a checkpoint of this very run; from the start where there is none yet."""
        content = files.read(path, described, "crafting", self.device)
        if content is None:
            return
        with files.taken_up(path):
            for name in self.NUMBERS:
                setattr(self, name, type(getattr(self, name))(content[name]))
            for name in self.TENSORS:
                getattr(self, name).copy_(content[name])
            self.q = content["q"]
            weights, moments = content["network"], content["optimizer"]
        files.restore(path, self.network, weights, self.optimizer, moments)

    def run(
        self,
        path: Path | None,
        described: dict[str, Any],
        metrics: Path | None,
        progress: bool,
        max_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        """Outer steps until the epochs or the seconds are over; the state goes to `path` now and then."""
        steps = len(self.base) // self.recipe.poison_batch
        total, done = self.recipe.epochs * steps, self.epoch * steps + self.step
        saved = time.monotonic()
        if metrics is not None:
            files.keep_lines(metrics, self.outer_steps)
        hidden = not progress or self.ranks.rank > 0
        with tqdm(total=total, initial=done, unit="step", disable=hidden, mininterval=1.0) as bar:
            while self.epoch < self.recipe.epochs and self.seconds < max_seconds:
                if self.step == 0 and self.epoch % self.recipe.restart == 0 and self.epoch > 0:
                    self.restart()
                while self.step < steps and self.seconds < max_seconds:
                    started = clock()
                    with seeded(self.device, mix(self.seed, Purpose.PACD_DROPOUT, self.epoch, self.step)):
                        line = self.outer_step()
                    self.step += 1
                    self.seconds += self.ranks.everyones(clock() - started)[0]
                    self.outer_steps += 1
                    bar.update()
                    bar.set_postfix_str(
                        f"radius {line['upper']:.3f}, loss {line['lower']:.3f}, residual {line['residual']:.2f}"
                        if line["upper"] is not None else "not finite: weights are re-initialised"
                    )  # fmt: skip
                    if metrics is not None:
                        residual = line["residual"] if math.isfinite(line["residual"]) else None  # JSON has no inf
                        content = {**line, "residual": residual, "seconds": round(self.seconds, 3)}
                        files.append_line(metrics, json.dumps(content))
                    if path is not None and time.monotonic() - saved > 30 and self.step < steps:
                        self.save(path, described)
                        saved = time.monotonic()
                if self.step == steps:
                    self.step, self.epoch = 0, self.epoch + 1
                if path is not None:
                    self.save(path, described)
                    saved = time.monotonic()

    def outer_step(self) -> dict[str, Any]:
        """One batch of poison: lower steps on the weights, the hypergradient, a step of the poison."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(mix(self.seed, Purpose.PACD_ORDER, self.epoch))
        order = torch.randperm(len(self.base), generator=generator)
        here = order.split(recipe.poison_batch)[self.step].to(self.device)
        draw = torch.Generator().manual_seed(mix(self.seed, Purpose.PACD_BATCHES, self.epoch, self.step))
        *batches, x_y = self._clean_batches(draw, recipe.lower_steps + 1)
        u, labels = self.u[here], self.labels[here]
        loss = self.attack.loss
        if hasattr(loss, "at_epoch"):
            loss = loss.at_epoch(self.epoch % recipe.restart)
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for lower_step, (x, y) in enumerate(batches):
            rows, numbered, share = self._mine(x, u)
            noise = mix(self.seed, Purpose.PACD_LOWER_NOISE, self.epoch, self.step, lower_step)
            batch = torch.cat([x[rows[0]], u[rows[1]]]), torch.cat([y[rows[0]], labels[rows[1]]])
            low = torch.autocast(self.device.type, self.low, enabled=self.low is not None)
            with low, self.split.batch_norm(self.network, share):
                value = share * loss(self.network, *batch, seed=noise, **numbered)
            self.optimizer.zero_grad(set_to_none=True)
            value.backward()
            finite = finite & self.split.add_up(self.network.parameters(), value.detach()).isfinite()
            self.optimizer.step()
        if not bool(finite):
            return self._not_finite()
        x, y = x_y
        rows, numbered, share = self._mine(x, u)
        noise = mix(self.seed, Purpose.PACD_PROBLEM_NOISE, self.epoch, self.step)
        problem = lower_problem(
            self.network, loss, x[rows[0]], torch.cat([y[rows[0]], labels[rows[1]]]), noise, u,
            rows=rows[1], weight=share * self.ranks.size, **numbered,
        )  # fmt: skip
        with warnings.catch_warnings(), self.split.batch_norm(self.network, share):
            warnings.simplefilter("ignore", SolverWarning)  # counted below, and reported with the poison
            gradient, found, upper, lower = hypergradient(
                self._cost(draw),
                problem,
                u,
                self.network,
                solver=recipe.solver,
                curvature=recipe.curvature,
                damping=recipe.damping,
                steps=recipe.solver_steps,
                tolerance=recipe.tolerance,
                warm_start=self.q,
                with_solution=True,
                group=self.ranks.group(),
                dtype=self.low,
                **recipe.solver_options(),
            )
        up, low, sound = torch.stack([upper, lower, torch.isfinite(gradient).all().to(upper.dtype)]).tolist()
        if not (math.isfinite(up) and math.isfinite(low)):
            return self._not_finite()
        self.unsolved += found.diverged
        if sound:
            self.q = found.q
            self._move(here, gradient)
        else:  # the solver ran away: leave this step out, and begin the next system from 0
            self.q = None
        return {
            "epoch": self.epoch, "upper": up, "lower": low, "residual": found.residual,
            "products": found.products,
        }  # fmt: skip

    def _cost(self, draw: torch.Generator) -> Callable[[Tensor, nn.Module], Tensor]:
        """The upper loss on validation images that `draw` chooses."""
        count = min(self.recipe.upper_batch, len(self.x_upper))
        chosen = torch.randperm(len(self.x_upper), generator=draw)[:count].to(self.device)
        x, y = self.x_upper[chosen], self.y_upper[chosen]
        seed = mix(self.seed, Purpose.PACD_UPPER_NOISE, self.epoch, self.step)
        (rows,), share = self.split.rows(len(x))
        x, y, numbered, weight = x[rows], y[rows], self.split.numbered(rows), share * self.ranks.size

        def cost(u: Tensor, network: nn.Module) -> Tensor:
            with eval_mode(network):  # as a victim is certified
                return weight * self.upper(network, x, y, seed=seed, **numbered)

        return cost

    def _mine(self, clean: Tensor, poison: Tensor) -> tuple[list[slice], dict[str, Tensor], float]:
        """This process's rows of a lower-level batch: of its clean images, of its poison; their numbers and share."""
        rows, share = self.split.rows(len(clean), len(poison))
        after = slice(rows[1].start + len(clean), rows[1].stop + len(clean))
        return rows, self.split.numbered(rows[0], after), share

    def _clean_batches(self, draw: torch.Generator, count: int) -> list[tuple[Tensor, Tensor]]:
        """So many batches of clean images, drawn on the host and brought over together."""
        size = self.recipe.clean_batch
        drawn = [self.clean[torch.randperm(len(self.clean), generator=draw)[:size]] for _ in range(count)]
        return [(as_float(self.x_train[index]), self.y_train[index]) for index in torch.stack(drawn).to(self.device)]

    def _not_finite(self) -> dict[str, Any]:
        self.restarts_nan += 1
        if self.restarts_nan > 20:
            raise ValueError(
                "the training loss or the radius is not finite again and again: give a smaller --lower-lr, or look at "
                "the data"
            )
        self.restart()
        return {"epoch": self.epoch, "upper": None, "lower": None, "residual": math.inf, "products": 0}

    def _move(self, here: Tensor, gradient: Tensor) -> None:
        """Adam on these images, each with moments of its own, and back into the ball."""
        self.visits[here] += 1
        t = self.visits[here].view(-1, *[1] * (gradient.dim() - 1)).float()
        self.first[here] = first = 0.9 * self.first[here] + 0.1 * gradient
        self.second[here] = second = 0.999 * self.second[here] + 0.001 * gradient.square()
        step = (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        self.u[here] = self.attack.ball.project(self.u[here] - self.recipe.outer_lr * step, self.base[here])
