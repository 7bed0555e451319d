"""The votes of a base classifier on noisy copies of images, drawn as a planner wants them, at its speed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pacd_fast import ops
from pacd_fast._C import Outcome, Rule, SequentialPlanner
from pacd_fast.certification.batch import Batch, Count, sent
from pacd_fast.certification.classifier import BaseClassifier
from pacd_fast.certification.noise import Copies
from pacd_fast.certification.sharing import Share

AHEAD = {"cpu": 0, "cuda": 2}  # batches that a device may run ahead of the votes that the host has seen


class Sampler:
    """Batches of noisy copies of fixed images through a base classifier: all of one shape, the last ones padded."""

    def __init__(self, classifier: BaseClassifier, copies: Copies):
        self.classifier, self.copies = classifier, copies
        self.rows = classifier.engine.rows

    @contextmanager
    def counting(self, count: Count, slots: int, width: int) -> Iterator[Batch]:
        """Batches of the images, counted in a table [slots, width] of zeros.

        What the last run over the classifier has made, a CUDA graph above all, is used again where all but the images
        is as it was, and nobody else is using it.
        """
        key = (self.copies.noise, self.copies.seed, count, slots, width)
        batch = self.classifier.batches.pop(key, None)
        if batch is None:
            batch = Batch(self.classifier, self.copies, count, slots, width)
        else:
            batch.begin(self.copies)
        try:
            yield batch
        finally:
            self.classifier.batches = {key: batch}

    def decide(
        self, rule: Rule, progress: bool = False, share: Share | None = None
    ) -> Iterator[tuple[int, Outcome, float]]:
        """(image, outcome, seconds) of every image as it is decided; seconds since the one before, shared.

        share: of the work; by default all of it.
        Raises ValueError for a model that returns NaN, naming the image.
        """
        share = Share() if share is None else share
        classes, rows = self.classifier.num_classes, self.rows * share.parts
        planner = SequentialPlanner(rule, self.copies.ids.tolist(), classes, share.source)
        waiting: deque[_Report] = deque()
        ahead, since = AHEAD.get(self.classifier.device.type, 0), time.perf_counter()
        images, each = len(self.copies.images), rule.n0 + rule.n
        slots = rows + 2  # a piece has a row at least, and one slot goes on
        with (
            share.bar(images * each, images, progress) as advance,
            self.counting(ops.tally_votes, slots, classes + 1) as batch,
        ):
            while not planner.done:
                pieces, complete = planner.plan(rows)
                mine = share.mine(pieces, self.rows)
                if len(mine):
                    batch.add(mine.tolist())
                if len(pieces):
                    advance(int(pieces[:, 3].sum()), 0, 0)
                waiting.append(_Report(batch.table, complete))
                while waiting and (len(waiting) > ahead or not len(pieces)):
                    counts = share.total(waiting.popleft().values())
                    planner.report(counts[:, :-1], counts[:, -1])
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


class _Report:
    """Votes and void samples [slots, classes + 1] of a table, which may still be on their way from a card.

    In the table they are zero afterwards.
    """

    def __init__(self, table: Tensor, complete: NDArray[np.int64]):
        slots = sent(complete, table.device)
        self._counts, self._event = table[slots], None
        table.index_fill_(0, slots, 0)
        if table.device.type == "cuda":
            pinned = torch.empty(self._counts.shape, dtype=torch.int64, pin_memory=True)
            self._counts = pinned.copy_(self._counts, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def values(self) -> NDArray[np.int64]:
        if self._event is not None:
            self._event.synchronize()
        return self._counts.numpy()
