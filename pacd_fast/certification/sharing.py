"""How processes share the work of a certification: images as they ask for them, or the samples of every image."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pacd_fast.ranks import Ranks

Advance: TypeAlias = Callable[[int, int, int], None]
"""Told how many samples were drawn, how many need not be drawn any more, and how many images were decided."""

TELLING = 0.5  # seconds between what a rank tells the bar; more where they are more than 50


class Share:
    """All of the work, of a process that is alone.

    Attributes:
        source: what gives the next image to start, or a negative number; None for all, in order.
        parts, part: batches are planned for so many processes at once, of which this is one.
    """

    source: Callable[[], int] | None = None
    parts, part = 1, 0

    def mine(self, pieces: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
        """This one's rows of a batch's pieces [m, 5], at most `rows`; see `Pieces`."""
        return pieces

    def total(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Votes and void samples [slots, classes + 1] of all together."""
        return counts

    def bar(self, samples: int, images: int, progress: bool) -> AbstractContextManager[Advance]:
        """The progress bar of the run, where it is to be shown."""
        return _bar(samples, images, progress)


class SharedImages(Share):
    """Images are handed out, one by one, to those who ask; rank 0's bar is everyone's."""

    def __init__(self, ranks: Ranks, images: int):
        self.ranks, self._images, self._name = ranks, images, ranks.name()
        self._pause = max(TELLING, ranks.size / 100)  # the store hears of the bar 300 times a second at most
        self.source = self._next

    def _next(self) -> int:
        taken = self.ranks.take(self._name)
        return taken if taken < self._images else -1

    @contextmanager
    def bar(self, samples: int, images: int, progress: bool) -> Iterator[Advance]:
        told, pending = time.monotonic(), np.zeros(3, dtype=np.int64)
        shown = np.zeros(3, dtype=np.int64)
        names = [f"{self._name}/{what}" for what in ("drawn", "spared", "decided")]
        showing = progress and self.ranks.rank == 0
        with _bar(samples, images, showing) as show:

            def tell() -> None:
                nonlocal told, shown
                sums = [self.ranks.add(name, int(amount)) for name, amount in zip(names, pending, strict=True)]
                pending[:] = 0
                if showing:
                    show(*(np.array(sums) - shown).tolist())
                    shown = np.array(sums)
                told = time.monotonic()

            def advance(drawn: int, spared: int, decided: int) -> None:
                pending[:] += (drawn, spared, decided)
                if time.monotonic() - told > self._pause:
                    tell()

            yield advance
            tell()
            ended = self.ranks.add(f"{self._name}/ended", 1)
            while showing and ended < self.ranks.size:
                time.sleep(TELLING / 5)
                ended = self.ranks.add(f"{self._name}/ended", 0)
                tell()


class SharedSamples(Share):
    """Every batch is drawn by all together, each its rows, and the votes are added up: for few images and large n.

    All of them plan the same batches and come to the same outcomes.
    """

    def __init__(self, ranks: Ranks, images: int):
        self._ranks, self.parts, self.part = ranks, ranks.size, ranks.rank

    def mine(self, pieces: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
        ends = pieces[:, 3].cumsum()
        starts = ends - pieces[:, 3]
        skipped = (self.part * rows - starts).clip(0, pieces[:, 3])
        left = (ends - (self.part + 1) * rows).clip(0, pieces[:, 3])
        found = pieces.copy()
        found[:, 2] += skipped
        found[:, 3] -= skipped + left
        return found[found[:, 3] > 0]

    def total(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._ranks.summed(counts) if len(counts) else counts

    def bar(self, samples: int, images: int, progress: bool) -> AbstractContextManager[Advance]:
        return _bar(samples, images, progress and self.part == 0)


SHARES = {"images": SharedImages, "samples": SharedSamples}


@contextmanager
def _bar(samples: int, images: int, progress: bool) -> Iterator[Advance]:
    done = 0
    with sampler_bar(samples, progress) as bar:

        def advance(drawn: int, spared: int, decided: int) -> None:
            nonlocal done
            done += decided
            bar.total -= spared
            if decided:
                bar.set_postfix_str(f"{done}/{images} images", refresh=False)
            bar.update(drawn)

        yield advance


@contextmanager
def sampler_bar(samples: int, progress: bool) -> Iterator[Any]:
    """A progress bar of so many samples, with rate and time left, or none."""
    interval = 0.2 if sys.stderr.isatty() else 10.0  # a log file needs no animation
    with tqdm(
        total=samples,
        unit="sample",
        unit_scale=True,
        disable=not (progress and samples),
        smoothing=0.1,
        mininterval=interval,
    ) as bar:
        yield bar
