"""The base classifier as one fixed function: copied, folded, cast, for batches of one shape, compiled where it pays."""

from __future__ import annotations

import copy
import math
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pacd_fast import ops
from pacd_fast._C import keep_freed_memory
from pacd_fast.arguments import whole
from pacd_fast.networks import fold_batch_norm, takes
from pacd_fast.randomness import Stream

Model: TypeAlias = nn.Module | Callable[[Tensor], Tensor]
Compile: TypeAlias = bool | str

CHOICES = {"cpu": (128, 256, 512), "cuda": (1024, 2048, 4096, 8192)}  # rows that are tried
USUAL = {"cpu": 256, "cuda": 4096}  # rows where trying does not pay
PAYS = 200  # samples to draw for every one of those that are drawn to choose
COMPILING = 60.0  # seconds that compiling is expected to take, and
SAVING = 0.4  # the share of the time that it is expected to save: "auto" decides by these
PASSES = 3  # of a timing; the first is warming up

_chosen: dict[tuple[object, ...], int] = {}
"""Rows by (model's structure, shape, dtype, device): found once in a process."""


@dataclass(frozen=True)
class Engine:
    """What a base classifier's bits depend on besides its weights.

    rows: of a batch; compiled: by torch.compile; machine: device, its float32 rules, torch's version.
    """

    rows: int
    compiled: bool
    machine: str


def machine(device: torch.device) -> str:
    """The device, how it multiplies float32 numbers, and torch's version."""
    version = torch.__version__.partition("+")[0]
    if device.type == "cuda":
        tf32 = "on" if torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32 else "off"
        return f"{torch.cuda.get_device_name(device)}, TF32 {tf32}, torch {version}"
    amx = " AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}{amx}, torch {version}"


class BaseClassifier:
    """logits of batches [rows, ...] of one shape; the caller's module is left alone, unless it is a compiled one.

    A module is copied, put into eval mode, its batch norms folded into the convolutions before them, cast, and for 4-d
    images on the CPU or in half precision put into channels_last.  A module that torch.compile returned is taken as it
    is.  An ambient torch.autocast has no effect.

    Args:
        model: images [rows, ...] -> logits [rows, classes]; it must not look at other images of its batch.
        images: float32 [N, ...] on any device; num_classes: what the model must return.
        dtype: float32, bfloat16 or float16; by default the model's own, and float32 for a float64 model.
        rows: of a batch; by default the fastest of a few where `samples` pays for trying them.
        compile: True, False, "auto" (where `samples` pays for it), or "max-autotune".
        samples: how many are to be drawn at most.

    Attributes: device, dtype, memory_format of the batches; engine; notes, sentences about what was done; batches, what
        the last run over it has made and another may use (`Sampler.counting`).
    Raises ValueError for a model that does not fit, or compile=True where it cannot be.
    """

    def __init__(
        self,
        model: Model,
        images: Tensor,
        num_classes: int,
        *,
        dtype: torch.dtype | None = None,
        rows: int | None = None,
        compile: Compile = "auto",
        samples: int = 0,
    ):
        if compile not in (True, False, "auto", "max-autotune"):
            raise ValueError(f'compile must be True, False, "auto" or "max-autotune", not {compile!r}')
        if rows is not None and (rows := whole("batch_size", rows)) < 1:
            raise ValueError(f"batch_size must be positive, not {rows}")
        first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.device = images.device if first is None else first.device
        own = torch.float32 if first is None else first.dtype
        self.dtype = dtype or (torch.float32 if own == torch.float64 else own)
        if self.dtype not in ops.FLOATS:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, not {self.dtype}")
        if self.device.type == "cpu":
            keep_freed_memory()  # fresh pages for every batch cost up to as much as the network
        self.num_classes, self.shape, self.notes = num_classes, tuple(images.shape[1:]), list[str]()
        self._fits = False  # until the first pass has shown it
        last = images.dim() == 4 and (self.dtype != torch.float32 or self.device.type == "cpu")
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        taken = isinstance(model, nn.Module) and isinstance(model, torch._dynamo.eval_frame.OptimizedModule)
        if (
            isinstance(model, nn.Module)
            and taken
            and (model.training or (first is not None and first.dtype != self.dtype))
        ):
            raise ValueError(f"a compiled model is taken as it is: give it in eval mode and in {self.dtype}")
        self._model: Model = model if taken else self._fixed(model)
        seconds = self._choose(rows, samples, own if first is None else model)
        compiled = taken
        if not taken and compile is not False:  # without images nothing is run, and the answer is what was asked for
            left = seconds / self.rows * samples
            compiled = self._compile(compile, left) if len(images) else compile != "auto"
        self.engine = Engine(self.rows, compiled, machine(self.device))
        self.batches: dict[object, Any] = {}

    def __call__(self, batch: Tensor) -> Tensor:
        """logits [rows, num_classes] of a batch as `empty` makes them."""
        first = nullcontext() if self._fits else takes(self.shape)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False), first:
            logits = self._model(batch)
        self._fits = True
        if not isinstance(logits, Tensor) or logits.shape != (len(batch), self.num_classes):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the model must return logits [{len(batch)}, {self.num_classes}], not {found}")
        if logits.is_complex():
            raise ValueError(f"the model must return real logits, not {logits.dtype}")
        return logits if logits.is_floating_point() else logits.double()

    def empty(self, rows: int | None = None) -> Tensor:
        """A batch to be filled: zeros [rows, ...] of the right dtype, device and layout."""
        shape = (rows or self.rows, *self.shape)
        return torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=self.memory_format).zero_()

    def _fixed(self, model: Model) -> Model:
        if not isinstance(model, nn.Module):
            return model
        model = copy.deepcopy(model).eval().requires_grad_(False)
        fold_batch_norm(model)
        return model.to(self.device, self.dtype, memory_format=self.memory_format)

    def _noise(self, rows: int) -> Tensor:
        """Throw-away images."""
        batch = self.empty(rows)
        return ops.noisy_copies(torch.zeros_like(batch[:1]).float(), 1.0, rows, stream=Stream.TUNING, out=batch)

    def _seconds(self, rows: int) -> float:
        """Of a pass; the best of a few."""
        batch, best = self._noise(rows), math.inf
        for _ in range(PASSES):
            started = time.perf_counter()
            self(batch)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            best = min(best, time.perf_counter() - started)
        return best

    def _choose(self, rows: int | None, samples: int, model: object) -> float:
        """Sets the rows of a batch; how long a pass takes, as far as anything depends on it."""
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        key = (repr(model), self.shape, self.dtype, str(self.device))
        cost = PAYS * PASSES * sum(CHOICES[kind])
        self.rows = rows or _chosen.get(key) or min(USUAL[kind], max(64, samples))
        if rows is None and key not in _chosen and samples > cost:
            times = dict(self._times(CHOICES[kind]))
            self.rows = _chosen[key] = min(times, key=lambda each: times[each] / each)
            return times[self.rows]
        return self._seconds(self.rows) if samples > cost / 10 else 0.0

    def _times(self, choices: tuple[int, ...]) -> Iterator[tuple[int, float]]:
        for rows in choices:
            try:
                yield rows, self._seconds(rows)
            except torch.OutOfMemoryError:
                if rows == choices[0]:
                    raise
                return

    def _compile(self, compile: Compile, seconds: float) -> bool:
        """Compiles where it is wanted; whether the compiled function is used."""
        if compile == "auto" and (not isinstance(self._model, nn.Module) or seconds * SAVING < COMPILING):
            return False
        eager, layout = self._model, self.memory_format
        if len(self.shape) == 3 and self.shape[0] == 1:
            self.memory_format = torch.contiguous_format  # the same memory; inductor asserts these strides
        batch = self._noise(self.rows)
        expected, before = self(batch), self._seconds(self.rows) if compile == "auto" else math.inf
        started = time.perf_counter()
        try:
            with _compiling() as breaks:
                self._model = _compiled(eager, "max-autotune-no-cudagraphs" if compile == "max-autotune" else None)
                found = self(batch)
        except Exception as error:  # whatever the compiler stumbles over
            problem: str | None = str(error).strip().partition("\n")[0]
        else:
            problem = _difference(expected, found)
        took = time.perf_counter() - started
        if problem is None and compile == "auto" and self._seconds(self.rows) > before:
            problem = "the compiled model is slower"
        if problem is not None:
            self._model, self.memory_format = eager, layout
            if compile != "auto":
                raise ValueError(
                    f"the model cannot be compiled here ({problem}): it takes a C++ compiler (g++ or clang), "
                    "or on a card Triton; or leave compile off"
                )
            self.notes.append(f"not compiled: {problem}")
            return False
        self.notes.append(f"compiled in {took:.0f} s")
        if breaks:
            text = f"torch.compile broke the model's graph {sum(breaks.values())} times: {next(iter(breaks))}"
            warnings.warn(text, stacklevel=2)
        return True


def _compiled(model: Model, mode: str | None) -> Model:
    """model by torch.compile, its weights frozen; a function with a code object of its own, whose cache is its own."""

    def run(batch: Tensor) -> Any:
        return model(batch)

    run = types.FunctionType(run.__code__.replace(co_name="base_classifier"), run.__globals__, closure=run.__closure__)
    return torch.compile(run, dynamic=False, mode=mode)


@contextmanager
def _compiling() -> Iterator[dict[str, int]]:
    """Inductor with weights as constants; the graph breaks that happen inside."""
    from torch._dynamo.utils import counters
    from torch._inductor import config

    before, breaks = dict(counters["graph_break"]), dict[str, int]()
    with config.patch(freezing=True):
        yield breaks
    for reason, count in counters["graph_break"].items():
        if count > before.get(reason, 0):
            breaks[reason.partition("\n")[0]] = count - before.get(reason, 0)


def _difference(expected: Tensor, found: Tensor) -> str | None:
    """What is wrong with a compiled model's logits; None where they are those of the other up to rounding."""
    spread = float((expected.max(1).values - expected.min(1).values).float().mean())
    most = float((expected.float() - found.float()).abs().max())
    allowed = (0.15 if expected.dtype != torch.float32 else 0.002) * max(spread, 1e-3)
    return None if most <= allowed else f"its logits differ by {most:.3g} from the eager ones"
