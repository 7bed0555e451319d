"""Batches of noisy copies, counted: piece by piece the same, and the same from a graph, here a stand-in for CUDA's."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from played.tape import Tape
from torch import Tensor, nn

import pacd_fast
from pacd_fast import ops
from pacd_fast.certification import batch as batches
from pacd_fast.certification.batch import Batch
from pacd_fast.certification.classifier import BaseClassifier
from pacd_fast.certification.noise import Noise
from pacd_fast.certification.vote import Sampler, certify_each, sampler_of
from pacd_fast.randomness import Stream

IMAGES = torch.rand(7, 3, 6, 5, generator=torch.Generator().manual_seed(3))
ROWS = 48


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))


def sampler(model: Any = None, kind: str = "lattice", rows: int = ROWS) -> Sampler:
    law = Noise.of(kind, 0.5)
    return sampler_of(network() if model is None else model, IMAGES, 3, law, 11, 100, rows=rows, compile=False)


@pytest.fixture
def tapes(monkeypatch) -> Iterator[list[Tape]]:
    """Graphs are made on the CPU, of a tape."""
    made: list[Tape] = []

    def capture(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        made.append(Tape(run))
        return made[-1].replay

    monkeypatch.setitem(batches.CAPTURES, "cpu", capture)
    yield made


PIECES = [(2, 1, 0, 9, 1), (0, 0, 40, 1, 0), (6, 1, 2**32 - 9, 9, 4), (2, 0, 3, 20, 1), (1, 1, 5, 5, 3)]


@pytest.mark.parametrize("taped", [False, True])
@pytest.mark.parametrize("kind", ["lattice", "float"])
def test_a_batch_counts_what_its_pieces_hold(kind, taped, request):
    if taped:
        request.getfixturevalue("tapes")
    each = sampler(kind=kind)
    expected = torch.zeros(6, 4, dtype=torch.int64)
    for image, stream, first, count, slot in PIECES:
        x, ids = IMAGES[image : image + 1], torch.tensor([image])
        if kind == "lattice":
            noisy, _ = ops.lattice_copies(x, 0.5, count, 11, step=1 / 255, first=first, stream=stream, image_ids=ids)
        else:
            noisy = ops.noisy_copies(x, 0.5, count, 11, first=first, stream=stream, image_ids=ids)
        padded = torch.cat([noisy, torch.zeros(ROWS - count, 3, 6, 5)]).to(memory_format=torch.channels_last)
        expected[slot] += torch.bincount(each.classifier(padded)[:count].argmax(1), minlength=4)
    with each.counting(ops.tally_votes, 6, 4) as batch:
        for _ in range(2):
            batch.add(PIECES)
            batch.add(PIECES[:2])
        assert not each.classifier.notes
        assert torch.equal(batch.table[[3, 4]], 2 * expected[[3, 4]]) and not batch.table[[2, 5]].any()
        assert batch.table.sum() == 2 * sum(piece[3] for piece in (*PIECES, *PIECES[:2]))
        batch.begin(each.copies)
        batch.add(PIECES)
        assert torch.equal(batch.table, expected)


def test_void_rows_are_counted_in_the_last_column(tapes, monkeypatch):
    from pacd_fast.certification.noise import Copies

    draw = Copies.draw
    monkeypatch.setattr(Copies, "draw", lambda self, out, rows: draw(self, out, rows) | (rows[:, 2] % 3 == 0))
    each = sampler()
    with each.counting(ops.tally_votes, 6, 4) as batch:
        batch.add([(2, 1, 0, 9, 1), (3, 1, 4, 7, 0)])
        assert tapes and batch.table[:, 3].tolist() == [2, 3, 0, 0, 0, 0]
        assert batch.table.sum(1).tolist() == [7, 9, 0, 0, 0, 0]


def certificates(kind: str, **more: object) -> list[Tensor]:
    options = {"num_classes": 3, "sigma": 0.5, "seed": 5, "noise": kind, "batch_size": ROWS, "n": 2000} | more
    hard = pacd_fast.certify(network(), IMAGES, **options)
    soft = pacd_fast.soft_certify(network(), IMAGES, **(options | {"n": 300}))
    found = pacd_fast.predict(network(), IMAGES, **(options | {"n0": 10}))
    return [hard.counts, hard.radius, hard.prediction, soft.mean, soft.radius, found.counts, found.samples]


@pytest.mark.parametrize("kind", ["lattice", "float"])
def test_certificates_from_a_graph_are_the_eager_ones(kind, monkeypatch, request):
    """With room for all images of a batch, for most, and for one."""
    plain = certificates(kind)
    tapes = request.getfixturevalue("tapes")
    shown, run = [], Batch._run
    monkeypatch.setattr(Batch, "_run", lambda self, copies: shown.append(len(copies.images)) or run(self, copies))
    for room in (32, 2, 1):
        monkeypatch.setattr(batches, "IMAGES", room)
        tapes.clear()
        shown.clear()
        found = certificates(kind)
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
        assert len(tapes) == 3 and all(tape.replays > 3 for tape in tapes)
        assert shown.count(room) == 2 * 3  # one is captured, and one is what it is held against
        assert (len(shown) == 2 * 3) == (room == 32) and min(shown) == room


def other(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A graph that has read its plan when it was captured."""
    logits = run().clone()
    return lambda: logits


def uncounted(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A graph of the logits, whose counts are lost."""
    tape = Tape(run)
    tape.calls = [call for call in tape.calls if "add_votes" not in call[0].name()]
    return tape.replay


@pytest.mark.parametrize("capture", [other, uncounted])
def test_a_graph_that_counts_otherwise_is_not_used(capture, monkeypatch):
    plain = pacd_fast.certify(network(), IMAGES, num_classes=3, sigma=0.5, seed=11, n=500, batch_size=ROWS)
    monkeypatch.setitem(batches.CAPTURES, "cpu", capture)
    classifier = BaseClassifier(network(), IMAGES, 3, rows=ROWS, compile=False)
    rule = pacd_fast._C.FullCertificates(100, 500, 0.001, 0.5)
    found = {image: outcome.counts.tolist() for image, outcome, _ in sampler(classifier).decide(rule)}
    assert classifier.notes == ["no CUDA graph: it counts otherwise"]
    assert [found[image] for image in range(len(IMAGES))] == plain.counts.tolist()


def test_a_model_that_looks_at_its_numbers_is_run_eagerly(tapes):
    def looks(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] * float(x.mean() < 9)

    def blind(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3]

    rule, counts = pacd_fast._C.FullCertificates(100, 500, 0.001, 0.5), []
    for model, notes in ((looks, ["no CUDA graph: item in a graph"]), (blind, [])):
        classifier = BaseClassifier(model, IMAGES, 3, rows=ROWS)
        counts.append({image: outcome.counts.tolist() for image, outcome, _ in sampler(classifier).decide(rule)})
        assert classifier.notes == notes
    assert counts[0] == counts[1] and len(counts[0]) == len(IMAGES) and len(tapes) == 1


def test_the_throw_away_samples_are_of_their_own_stream(monkeypatch):
    seen = []

    def capture(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        return Tape(run).replay

    monkeypatch.setitem(batches.CAPTURES, "cpu", capture)
    write = Batch._write
    monkeypatch.setattr(Batch, "_write", lambda self, pieces: seen.append(list(pieces)) or write(self, seen[-1]))
    with sampler().counting(ops.tally_votes, 6, 4) as batch:
        assert not batch.table.any()
    assert len(seen) == 2
    for (_, stream, first, count, slot), (_, other_stream, other_first, other_count, other_slot) in zip(
        *seen, strict=True
    ):
        assert stream == other_stream == Stream.TUNING and count == other_count == 1
        assert first != other_first and slot != other_slot
    assert len(seen[0]) == batches.IMAGES


def test_a_graph_is_made_once_for_all_calls_of_an_object(tapes):
    smooth = pacd_fast.Smooth(network(), 3, 0.5, seed=1)
    found = [smooth.certify(image, 100, 2000, 0.001, 64) for image in IMAGES]
    assert len(tapes) == 1 and tapes[0].replays > len(IMAGES)
    plain = pacd_fast.certify(network(), IMAGES, num_classes=3, sigma=0.5, seed=1, n=2000, batch_size=64)
    assert found == list(zip(plain.prediction.tolist(), plain.radius.tolist(), strict=True))


def test_a_run_leaves_no_memory_behind(tapes, monkeypatch):
    """Not even until the garbage is collected: on a card it would be that of a whole pass."""
    left, init = [], Batch.__init__
    monkeypatch.setattr(Batch, "__init__", lambda self, *args: left.append(weakref.ref(self)) or init(self, *args))
    gc.disable()
    try:
        certificates("lattice")
        assert len(left) == len(tapes) == 3 and all(each() is None for each in left)
    finally:
        gc.enable()


@pytest.mark.parametrize("taped", [False, True])
def test_runs_over_one_classifier_do_not_share_counts(taped, request):
    """Two at the same time, and one that was left in the middle."""
    if taped:
        request.getfixturevalue("tapes")
    classifier = BaseClassifier(network(), IMAGES, 3, rows=ROWS, compile=False)
    options = {"num_classes": 3, "sigma": 0.5, "seed": 5, "n": 1000}
    plain = {each.index: each.counts.tolist() for each in certify_each(network(), IMAGES, batch_size=ROWS, **options)}
    rule = pacd_fast._C.FullCertificates(100, 1000, 0.001, 0.5)

    def run() -> Iterator[tuple[int, list[int]]]:
        copies = sampler_of(classifier, IMAGES, 3, Noise.of("lattice", 0.5), 5, 100).copies
        for image, outcome, _ in Sampler(classifier, copies).decide(rule):
            yield image, outcome.counts.tolist()

    left = run()
    next(left)
    left.close()
    together = [pair for pairs in zip(run(), run(), strict=True) for pair in pairs]
    assert dict(together[::2]) == dict(together[1::2]) == plain
