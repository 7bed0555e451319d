"""The votes of a model on noisy copies of images, drawn as a loop plans them, at the model's speed."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pacd_fast import ops
from pacd_fast._C import Certification, keep_freed_memory

ROWS = 64  # a model runs on a multiple of this many rows, padded: very small batches take other code paths, other bits

Model: TypeAlias = nn.Module | Callable[[Tensor], Tensor]
Piece: TypeAlias = tuple[int, int, int, int]
"""Samples [first, first + count) of an image on a stream: (image, stream, first, count)."""
Tally: TypeAlias = Callable[[Tensor, Tensor, Tensor], object]


class Sampler:
    """Counts a model's votes on noisy copies of images: images share batches, every batch is full but the last."""

    def __init__(
        self,
        model: Model,
        images: Tensor,
        num_classes: int,
        sigma: float,
        seed: int,
        dtype: torch.dtype | None = None,
        batch_size: int | None = None,
        image_ids: Tensor | None = None,
    ):
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, not {num_classes}")
        if images.dim() < 2 or not images.is_floating_point():
            raise ValueError(f"images must be float [N, ...], not {images.dtype} {tuple(images.shape)}")
        if not bool(torch.isfinite(images).all()):
            raise ValueError("images hold NaN or infinity")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be positive, not {batch_size}")
        if image_ids is None:
            image_ids = torch.arange(len(images))
        if image_ids.dtype != torch.int64 or image_ids.shape != images.shape[:1]:
            raise ValueError(f"image_ids must be int64 [{len(images)}], not {image_ids.dtype} {tuple(image_ids.shape)}")
        if len(image_ids) and not 0 <= int(image_ids.min()) <= int(image_ids.max()) < 2**48:
            raise ValueError("image_ids must be in [0, 2^48)")
        first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.device = images.device if first is None else first.device
        self.dtype = dtype or (images.dtype if first is None else first.dtype)
        if self.dtype == torch.float64:
            self.dtype = torch.float32
        if images.dtype == torch.float64 and not torch.equal(images.float().double(), images):
            raise ValueError("float64 images are certified in float32, which does not hold these: give images.float()")
        if self.dtype not in ops.FLOATS:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, not {self.dtype}")
        self.sigma = float(torch.tensor(sigma, dtype=torch.float32))  # what the noise really has
        self.seed, self.num_classes = seed, num_classes
        self.images = images.to(self.device, torch.float32)
        self.image_ids = image_ids.to(self.device)
        half = self.dtype != torch.float32
        last = images.dim() == 4 and (half or self.device.type == "cpu")
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        if self.device.type == "cpu":
            keep_freed_memory()  # fresh pages for every batch cost up to as much as the network
        self.model = self._fixed(model)
        self.given_batch_size = batch_size
        self._buffer: Tensor | None = None

    def _fixed(self, model: Model) -> Model:
        """The base classifier as one fixed function; the caller's module is left alone."""
        if not isinstance(model, nn.Module):
            return model
        model = copy.deepcopy(model).eval().requires_grad_(False)
        return model.to(self.device, self.dtype, memory_format=self.memory_format)

    def _rows(self, rows: int) -> Tensor:
        """A reused buffer: fresh pages for every batch would cost more than the noise.

        With one channel both layouts are the same memory, but convolutions look at the strides.
        """
        if self._buffer is None or len(self._buffer) < rows:
            self._buffer = torch.empty(
                (rows, *self.images.shape[1:]), dtype=self.dtype, device=self.device, memory_format=self.memory_format
            ).zero_()
        return self._buffer[:rows]

    @torch.inference_mode()
    def logits(self, pieces: list[Piece]) -> tuple[Tensor, Tensor]:
        """The model's logits for some pieces, row after row, [rows, num_classes]; and the row of `counts` of each."""
        rows = sum(piece[3] for piece in pieces)
        batch = self._rows(-(-rows // ROWS) * ROWS)
        where, start = torch.empty(rows, dtype=torch.int64), 0
        for image, stream, first, count in pieces:
            ops.noisy_copies(
                self.images[image : image + 1],
                self.sigma,
                count,
                self.seed,
                first=first,
                image_ids=self.image_ids[image : image + 1],
                stream=stream,
                out=batch[start : start + count],
            )
            where[start : start + count] = stream * len(self.images) + image
            start += count
        where = where.to(self.device)  # before the model: behind it, the copy would wait for the whole pass
        logits = self.model(batch)
        if not isinstance(logits, Tensor) or logits.shape != (len(batch), self.num_classes):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the model must return logits [{len(batch)}, {self.num_classes}], not {found}")
        logits = logits[:rows] if logits.dtype in ops.FLOATS else logits[:rows].float()
        return logits, where

    def run(
        self,
        loop: Certification,
        samples: int,
        progress: bool,
        tally: Tally = ops.tally_votes,
        columns: int | None = None,
    ) -> Iterator[tuple[int, Tensor, Tensor, float]]:
        """Draws what `loop` plans; yields (image, selection votes, estimation votes, seconds) of finished images.

        tally(counts, logits, image_index) adds what a batch says to int64 [.., columns]; votes for classes by default.
        """
        images = len(self.images)
        counts = torch.zeros(2 * images, columns or self.num_classes, dtype=torch.int64, device=self.device)
        sizes = _BatchSizes(self.given_batch_size, self.device)
        done, since = 0, time.perf_counter()
        interval = 0.2 if sys.stderr.isatty() else 10.0  # a log file needs no animation
        bar = tqdm(
            total=images * samples,
            unit="sample",
            unit_scale=True,
            disable=not progress,
            smoothing=0.1,
            mininterval=interval,
        )
        try:
            while pieces := loop.plan(sizes.size):
                started, parts = time.perf_counter(), None
                try:
                    tally(counts, *self.logits(pieces))
                except torch.OutOfMemoryError:
                    self._buffer = None
                    if (smaller := sizes.out_of_memory()) is None:
                        raise
                    parts = _split(pieces, smaller)
                for part in parts or ():  # out here the error has let go of the batch's activations
                    tally(counts, *self.logits(part))
                rows = sum(piece[3] for piece in pieces)
                if sizes.trying:
                    if self.device.type == "cuda":
                        torch.cuda.synchronize(self.device)
                    sizes.took(rows, time.perf_counter() - started)
                bar.update(rows)
                if loop.planned > done:
                    selection = counts[done : loop.planned].cpu()
                    estimation = counts[images + done : images + loop.planned].cpu()
                    now = time.perf_counter()
                    seconds = (now - since) / (loop.planned - done)
                    first, done, since = done, loop.planned, now
                    rate = done / max(bar.format_dict["elapsed"], 1e-9)
                    bar.set_postfix_str(f"{done}/{images} images, {rate:.2f} images/s", refresh=False)
                    for i, index in enumerate(range(first, done)):
                        yield index, selection[i], estimation[i], seconds
        finally:
            bar.close()


class _BatchSizes:
    """The size of the next batch: the given one, or a few in turn, timed on real samples, and then the fastest."""

    ROUNDS = 4  # the first at a size is warming up

    def __init__(self, given: int | None, device: torch.device):
        first, count = (64, 5) if device.type == "cpu" else (512, 6)
        self._candidates = [given] if given is not None else [first << i for i in range(count)]
        self._costs: dict[int, list[float]] = {size: [] for size in self._candidates}
        self.trying = given is None
        self.size = self._candidates[0]

    def took(self, rows: int, seconds: float) -> None:
        """What the last batch cost; a batch at the end that was not full says nothing."""
        if rows != self.size:
            return
        self._costs[self.size].append(seconds / rows)
        while self._candidates and len(self._costs[self._candidates[0]]) == self.ROUNDS:
            tried = self._candidates.pop(0)
            if self._best(tried) > 1.3 * min(self._best(size) for size, costs in self._costs.items() if costs):
                self._candidates.clear()  # it only gets slower
        self.trying = bool(self._candidates)
        self.size = (
            self._candidates[0] if self.trying else min((s for s, c in self._costs.items() if c), key=self._best)
        )

    def _best(self, size: int) -> float:
        return min(self._costs[size][1:], default=math.inf)

    def out_of_memory(self) -> int | None:
        """The size to go on with after the device ran out of memory; None where none is smaller."""
        smaller = [size for size, costs in self._costs.items() if costs and size < self.size]
        if not smaller:
            return None
        self._candidates, self.trying, self.size = [], False, min(smaller, key=self._best)
        return self.size


def _split(pieces: list[Piece], rows: int) -> Iterator[list[Piece]]:
    """The same samples in batches of at most `rows`."""
    for image, stream, first, count in pieces:
        for start in range(0, count, rows):
            yield [(image, stream, first + start, min(rows, count - start))]
