"""The votes of a base classifier on noisy copies of images, drawn as a planner wants them, at its speed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pacd_fast import ops
from pacd_fast._C import Outcome, Rule, SequentialPlanner
from pacd_fast.certification.classifier import BaseClassifier
from pacd_fast.certification.noise import Copies
from pacd_fast.certification.sharing import Share

Pieces: TypeAlias = Iterable[tuple[int, int, int, int, int]]
"""Samples [first, first + count) of an image on a stream, counted in a slot: (image, stream, first, count, slot)."""

AHEAD = {"cpu": 0, "cuda": 2}  # batches that a device may run ahead of the votes that the host has seen


class Sampler:
    """Batches of noisy copies of fixed images through a base classifier: all of one shape, the last ones padded."""

    def __init__(self, classifier: BaseClassifier, copies: Copies):
        self.classifier, self.copies = classifier, copies
        self.rows = classifier.engine.rows
        self._batch, self._pass = classifier.batch_and_pass()

    def logits(self, pieces: Pieces) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [rows, classes] of the classifier on some pieces, row after row; each row's slot; which rows are void.

        Slots are int64 [rows], -1 for rows of the padding and for void ones; void slots int64 [rows], -1 for rows that
        are not void.  All three are on the classifier's device, and the host does not wait for it; the logits are
        overwritten by the next call.
        """
        device, start = self.classifier.device, 0
        where = torch.full((self.rows,), -1, pin_memory=device.type == "cuda")
        void = torch.zeros(self.rows, dtype=torch.bool, device=device)
        for image, stream, first, count, slot in pieces:
            lost = self.copies.draw(self._batch[start : start + count], image, stream, first)
            if lost is not None:
                void[start : start + count] = lost
            where[start : start + count] = slot
            start += count
        where = where.to(device, non_blocking=True)
        return self._pass(), where.masked_fill(void, -1), where.masked_fill(~void, -1)

    def decide(
        self, rule: Rule, progress: bool = False, share: Share | None = None
    ) -> Iterator[tuple[int, Outcome, float]]:
        """(image, outcome, seconds) of every image as it is decided; seconds since the one before, shared.

        share: of the work; by default all of it.
        Raises ValueError for a model that returns NaN, naming the image.
        """
        share = Share() if share is None else share
        planner = SequentialPlanner(rule, self.copies.ids.tolist(), self.classifier.num_classes, share.source)
        rows = self.rows * share.parts
        votes = _Votes(rows, self.classifier)
        waiting: deque[_Report] = deque()
        ahead, since = AHEAD.get(self.classifier.device.type, 0), time.perf_counter()
        images, each = len(self.copies.images), rule.n0 + rule.n
        with share.bar(images * each, images, progress) as advance:
            while not planner.done:
                pieces, complete = planner.plan(rows)
                mine = share.mine(pieces, self.rows)
                if len(mine):
                    logits, where, lost = self.logits(mine.tolist())
                    votes.add(logits, where, lost)
                if len(pieces):
                    advance(int(pieces[:, 3].sum()), 0, 0)
                waiting.append(votes.report(complete))
                while waiting and (len(waiting) > ahead or not len(pieces)):
                    planner.report(*share.total(*waiting.popleft().values()))
                    if not len(pieces):
                        break
                finished, now = planner.finished(), time.perf_counter()
                for image, outcome in finished:
                    advance(0, rule.n - outcome.samples, 1)
                    yield image, outcome, (now - since) / len(finished)
                if finished:
                    since = now
        if planner.failure:  # the images that were on their way with it are decided by now
            raise ValueError(planner.failure)


class _Votes:
    """Votes and void samples by slot, on the device."""

    def __init__(self, rows: int, classifier: BaseClassifier):
        slots, device = rows + 2, classifier.device  # a piece has a row at least, and one slot goes on
        self._votes = torch.zeros(slots, classifier.num_classes, dtype=torch.int64, device=device)
        self._voids = torch.zeros(slots, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, where: Tensor, lost: Tensor) -> None:
        ops.tally_votes(self._votes, logits, where)
        self._voids.index_add_(0, lost.clamp(min=0), (lost >= 0).long())

    def report(self, complete: NDArray[np.int64]) -> _Report:
        """The rows of some slots, on their way to the host; they are zero afterwards."""
        wanted, device = torch.from_numpy(complete), self._votes.device
        slots = (wanted.pin_memory() if device.type == "cuda" else wanted).to(device, non_blocking=True)
        found = _Report(self._votes[slots], self._voids[slots])
        self._votes.index_fill_(0, slots, 0)
        self._voids.index_fill_(0, slots, 0)
        return found


class _Report:
    """Votes [slots, classes] and void samples [slots] that may still be on their way from a card."""

    def __init__(self, votes: Tensor, voids: Tensor):
        self._event = None
        if votes.device.type == "cuda":
            votes, voids = (
                torch.empty(each.shape, dtype=each.dtype, pin_memory=True).copy_(each, non_blocking=True)
                for each in (votes, voids)
            )
            self._event = torch.cuda.Event()
            self._event.record()
        self._tensors = votes, voids

    def values(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self._event is not None:
            self._event.synchronize()
        votes, voids = (each.numpy() for each in self._tensors)
        return votes, voids
