"""Batches of noisy copies through a base classifier into a table of counts; on a card one CUDA graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pacd_fast.certification.classifier import PASSES, BaseClassifier
from pacd_fast.certification.noise import Copies
from pacd_fast.randomness import Stream

Pieces: TypeAlias = Iterable[tuple[int, int, int, int, int]]
"""Samples [first, first + count) of an image on a stream, counted in a slot: (image, stream, first, count, slot)."""

Count: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], object]
"""Adds what logits [rows, classes] say to a table [slots, width], given each row's slot, -1 for none, and whether it is
void: (table, logits, slots, void).  It must not wait for the device."""

IMAGES = 32  # that a graph has room for; a batch with pieces of more of them is not replayed


class Batch:
    """Noisy copies of images through a classifier, counted in a table: int64 [slots, width], on its device.

    On a card [noise, model, counts] is one CUDA graph, where it can be captured and counts throw-away samples as the
    eager way does, logits and table bit for bit; else a note says why not.  To be used from one thread.
    """

    def __init__(self, classifier: BaseClassifier, copies: Copies, count: Count, slots: int, width: int):
        self._count, self.rows, self.device = count, classifier.rows, classifier.device
        self._classifier = weakref.proxy(classifier)  # which keeps the batch: a circle would keep a card's memory
        self.table = torch.zeros(slots, width, dtype=torch.int64, device=self.device)
        self._input = classifier.empty()
        self._plan = torch.zeros(4 * self.rows, dtype=torch.int64, device=self.device)  # (image, stream, sample), slot
        self._sound = torch.zeros(self.rows, dtype=torch.bool, device=self.device)
        self._room = copies.room(IMAGES if self.device.type in CAPTURES else 0)  # what a graph reads
        self._replay = self._captured()
        self.begin(copies)

    def begin(self, copies: Copies) -> None:
        """From now on of these images, with the same noise; the table is zero."""
        self._copies = self._some = copies
        self._shown: list[int] = []
        self.table.zero_()

    def add(self, pieces: Pieces) -> None:
        """Draws and counts some pieces, at most `rows` samples.  The host does not wait for the device."""
        chosen = self._write(pieces)
        replay = self._replay if len(chosen) <= IMAGES else None
        if chosen != self._shown:
            self._shown = chosen
            index = sent(np.resize(chosen, len(chosen) if replay is None else IMAGES), self.device)
            if replay is None:
                self._some = self._copies.some(index)
            else:
                torch.index_select(self._copies.images, 0, index, out=self._room.images)
                torch.index_select(self._copies.ids, 0, index, out=self._room.ids)
        if replay is None:
            self._run(self._some)
        else:
            replay()

    def _write(self, pieces: Pieces) -> list[int]:
        """Plans some pieces; their images, of which a row has the place.  Rows of the padding are thrown away."""
        plan, places, start = np.zeros(4 * self.rows, dtype=np.int64), dict[int, int](), 0
        rows, slots = plan[: -self.rows].reshape(-1, 3), plan[-self.rows :]
        rows[:, 1], slots[:] = Stream.TUNING, -1
        for image, stream, first, count, slot in pieces:
            stop = start + count
            rows[start:stop, 0] = places.setdefault(image, len(places))
            rows[start:stop, 1] = stream
            rows[start:stop, 2] = np.arange(first, first + count)
            slots[start:stop] = slot
            start = stop
        self._plan.copy_(sendable(plan, self.device), non_blocking=True)
        return list(places)

    def _run(self, copies: Copies) -> Tensor:
        """The planned rows of some images, counted; their logits."""
        void = copies.draw(self._input, self._plan[: -self.rows].view(-1, 3))
        logits = self._classifier(self._input)
        self._count(self.table, logits, self._plan[-self.rows :], self._sound if void is None else void)
        return logits

    def _captured(self) -> Callable[[], Tensor] | None:
        """The run over the room's images as one graph; None where there are no graphs, or it would count otherwise."""
        capture = CAPTURES.get(self.device.type)
        if capture is None:
            return None
        parts, slots = min(IMAGES, self.rows), len(self.table)

        def throw_away(first: int) -> None:
            self._write(
                (i, Stream.TUNING, i + first, self.rows // parts, (i + first) % (slots + 1) - 1) for i in range(parts)
            )
            self.table.zero_()

        try:
            throw_away(0)
            replay = capture(lambda: self._run(self._room), self.device)
            throw_away(1)  # another plan than the one that was captured
            logits, table = self._run(self._room).clone(), self.table.clone()
            self.table.zero_()
            if not torch.equal(replay(), logits) or not torch.equal(self.table, table):
                raise RuntimeError("it counts otherwise")
        except (RuntimeError, ValueError) as error:  # a model that waits for the card, too little memory, ...
            said = str(error.__cause__ or error).strip().partition("\n")[0]
            self._classifier.notes.append(f"no CUDA graph: {said}")
            return None
        return replay


def sendable(values: NDArray[np.int64], device: torch.device) -> Tensor:
    """values where a device can read them while the host goes on; their memory is not used again before it has."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def sent(values: NDArray[np.int64], device: torch.device) -> Tensor:
    """values on their way to a device."""
    return sendable(values, device).to(device, non_blocking=True)


def _graph(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """run, with all that it does on a card, as one CUDA graph: it reads and writes what it does now.

    What it returns is overwritten by the next replay.
    """
    with torch.cuda.device(device):
        graph, aside, main = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(main)
        with torch.cuda.stream(aside):
            for _ in range(PASSES):
                run()
        main.wait_stream(aside)
        with torch.cuda.graph(graph):
            found = run()

    def replay() -> Tensor:
        graph.replay()
        return found

    return replay


CAPTURES = {"cuda": _graph}
"""By a device's type, what makes a graph of a function of memory that stays."""
