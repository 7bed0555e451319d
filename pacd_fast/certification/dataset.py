"""Certifying images of a data set into a results file: which images, under which run, resumed where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import secrets
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pacd_fast.arguments import DTYPES, option, writable
from pacd_fast.certification.classifier import USUAL
from pacd_fast.certification.noise import KINDS, Noise
from pacd_fast.certification.prediction import predictor
from pacd_fast.certification.question import Question
from pacd_fast.certification.rank_files import rank_file, unfinished
from pacd_fast.certification.results import PathLike
from pacd_fast.certification.rows import ABSTAIN, Row, Run, check_same_run, sparse, value_text
from pacd_fast.certification.sharing import SHARES, Share
from pacd_fast.certification.vote import certificates, sampler_of
from pacd_fast.data import Dataset, random_subset
from pacd_fast.files import claimed
from pacd_fast.networks import Checkpoint
from pacd_fast.ranks import Ranks


@dataclass(frozen=True)
class Selection:
    """Which images of a split to certify: of a class, a random choice or a stride and an end; of these a shard.

    Attributes:
        target_class, except_class: only images of this class, or of others.
        images: only these, by index.
        count, choice: a random choice of so many, decided by the seed `choice`; None for all.
        skip, max: those whose index is a multiple of `skip` and below `max`.
        shard: (i, m), every m-th of what is left, from the i-th.
    """

    target_class: int | None = None
    except_class: int | None = None
    images: tuple[int, ...] | None = None
    count: int | None = None
    choice: int = 0
    skip: int = 1
    max: int | None = None
    shard: tuple[int, int] = (0, 1)

    def indices(self, labels: Tensor) -> list[int]:
        """Ascending indices into labels [N].  Raises ValueError, by the command line's names, where none is left."""
        if self.skip < 1:
            raise ValueError(f"--skip must be at least 1, not {self.skip}")
        if self.max is not None and self.max < 1:
            raise ValueError(f"--max must be at least 1, not {self.max}")
        shard, shards = self.shard
        if not 0 <= shard < shards:
            raise ValueError(f"--shard i/m needs 0 <= i < m, not {shard}/{shards}")
        wanted = labels != (-1 if self.except_class is None else self.except_class)
        if self.images is not None:
            if not all(0 <= index < len(labels) for index in self.images):
                raise ValueError(f"--images must be in [0, {len(labels)}), not {' '.join(map(str, self.images))}")
            named = torch.zeros_like(wanted)
            named[list(self.images)] = True
            wanted &= named
        if self.target_class is not None:
            wanted &= labels == self.target_class
        remaining = wanted.nonzero().flatten()
        if self.count is not None:
            if self.skip != 1 or self.max is not None:
                raise ValueError("--count chooses at random and --skip and --max by index: give one or the other")
            if not 1 <= self.count <= len(remaining):
                raise ValueError(f"--count {self.count}: there are {len(remaining)} such images to choose from")
            remaining = remaining[random_subset(remaining, None, self.count, self.choice)]
        chosen = [i for i in remaining.tolist() if i % self.skip == 0 and (self.max is None or i < self.max)]
        if not chosen:
            raise ValueError("no image is left to certify: look at --target-class, --skip and --max")
        return chosen[shard::shards]


_COMPILE: dict[Any, Any] = {"yes": True, "no": False, None: "auto"}


@dataclass(frozen=True)
class Certify:
    """How to certify: the flags of the command line; see `pacd_fast.certify` for what each is.

    sigma: by default what the checkpoint was trained with; seed, noise, batch_size and compile: by default those of the
    file where it is there, else from the operating system's entropy, lattice, chosen and "auto".
    """

    sigma: float | None = option(None, "noise level; by default what the checkpoint was trained with")
    n0: int = option(100, "selection samples per image")
    n: int = option(100_000, "estimation samples per image, at most")
    alpha: float = option(0.001, "failure probability of each certificate")
    radii: tuple[float, ...] | None = option(
        None, "the largest of these radii that is certified, with no more samples than that takes", metavar="R"
    )
    tolerance: float | None = option(None, "stop when the radius is known within so much", metavar="T")
    sides: int = option(1, "2: also bound the rivals' probability", choices=(1, 2))
    futility: float = option(1e-6, "share of certificates that may be lost to giving up early; 0 draws all n")
    noise: str | None = option(None, "lattice (the default) holds in floating point, float does not", choices=KINDS)
    step: tuple[float, ...] | None = option(
        None, "of the lattice, a number or one per channel; by default 1/255", metavar="H"
    )
    offset: tuple[float, ...] | None = option(None, "of the lattice, likewise; by default 0", metavar="O")
    check: bool = option(False, "refuse images that are not on the lattice")
    seed: int | None = option(None, "of the noise; by default from the operating system's entropy")
    dtype: str = option("float32", "the certificate is for the model in it", choices=DTYPES)
    batch_size: int | None = option(None, "rows a forward pass; measured where it is not given")
    compile: str | bool | None = option(
        None, "torch.compile; auto (the default): where it pays", choices=("auto", "yes", "no", "max-autotune")
    )

    def law(self, sigma: float, existing: Run | None) -> Noise:
        """The noise to draw: that of the file where nothing else is asked for."""
        if existing is not None and self.noise in (None, existing.noise) and self.step is None and self.offset is None:
            return Noise.read(existing.noise, sigma, existing.step)
        return Noise.of(self.noise or "lattice", sigma, self.step, self.offset)


def sigma_of(given: float | None, checkpoint: Checkpoint) -> float:
    """The noise level that is given, or else what the checkpoint was trained with.  Raises ValueError for neither."""
    sigma = given if given is not None else checkpoint.sigma or None  # 0: trained without noise
    if sigma is None:
        raise ValueError("the checkpoint does not say which noise it was trained with: give --sigma")
    return sigma


def certify_dataset(
    checkpoint: Checkpoint,
    data: Dataset,
    split: str,
    chosen: Sequence[int],
    out: PathLike,
    settings: Certify | None = None,
    *,
    shards: int = 1,
    ranks: Ranks | None = None,
    share: str = "images",
    device: torch.device | str = "cpu",
    progress: bool = False,
    **more: Any,
) -> None:
    """Certifies images of a split into a results file; those that are in it already are left as they are.

    Args:
        chosen: indices into the split; an image's noise belongs to its index.
        settings, more: how, and what is different from that.
        shards: of how many runs this is one: then nothing that is measured decides how the model is run, so that their
            files can be merged.
        ranks: the processes that do it together, each of which calls this; rank 0 writes `out` in the end, and until
            then the others' rows are in files beside it.
        share: "images" are handed out to the ranks as they ask, or they share the "samples" of every image.

    Raises ValueError and OSError, each one line that says what to do, AnotherRun for a file of other settings.
    """
    asked = dataclasses.replace(settings or Certify(), **more)
    out = writable(out)
    images, labels = data.split(split)
    sigma = sigma_of(asked.sigma, checkpoint)
    ranks = Ranks() if ranks is None else ranks
    if share not in SHARES:
        raise ValueError(f"share must be {' or '.join(SHARES)}, not {share!r}")
    existing, done, entropy = unfinished(out, ranks)
    law = asked.law(sigma, existing)
    question = Question.of(
        law.sigma, asked.n0, asked.n, asked.alpha, asked.radii, asked.tolerance, asked.sides, asked.futility
    )
    seed = asked.seed if asked.seed is not None else existing.seed if existing else entropy
    if existing is not None and existing.version == 1:
        question = dataclasses.replace(question, futility=0.0)
    run = Run(
        n0=question.n0, n=question.n, alpha=question.alpha, sigma=sigma, seed=seed, dtype=asked.dtype,
        model=f"{checkpoint.arch}@{checkpoint.fingerprint}", data=data.tag(split), noise=law.kind, step=law.lattice,
        target=question.target, sides=question.sides, futility=question.futility,
    )  # fmt: skip
    rows = asked.batch_size
    compiled: Any = _COMPILE.get(asked.compile, asked.compile)
    if shards > 1 or ranks.size > 1:
        rows = rows if rows is not None else existing.rows or None if existing else None
        rows = rows if rows is not None else USUAL[torch.device(device).type]
        compiled = False if compiled == "auto" and not (existing and existing.compiled) else compiled
    if existing is not None:
        here = dataclasses.replace(existing, **{name: getattr(run, name) for name in ("rows", "compiled", "machine")})
        check_same_run(str(out), here, run, "choose another --out or delete it")
        rows = rows if rows is not None else existing.rows or None
        compiled = bool(existing.compiled) if compiled == "auto" else compiled
    todo = torch.tensor([i for i in chosen if i not in done], dtype=torch.int64)
    say = progress and ranks.rank == 0
    if len(todo) < len(chosen) and say:
        print(f"{out}: {len(chosen) - len(todo)} of {len(chosen)} images are there, {len(todo)} to go", file=sys.stderr)
    sampler = sampler_of(
        checkpoint.model.to(device), images[todo], checkpoint.num_classes, law, seed, question.n0 + question.likely,
        dtype=getattr(torch, asked.dtype), rows=rows, compile=compiled, check=asked.check, image_ids=todo,
    )  # fmt: skip
    notes = sampler.classifier.notes
    for note in notes if say else ():
        print(note, file=sys.stderr)
    known = len(notes)
    engine = dataclasses.asdict(sampler.classifier.engine)
    if existing is None or existing.version == 2:
        run = dataclasses.replace(run, **engine)
    ranks.agree(
        {
            **dataclasses.asdict(run),
            **engine,
            "images": zlib.crc32(str(list(chosen)).encode()),
        }
    )
    with rank_file(out, run, ranks, writes=share == "images") as file:
        work = SHARES[share](ranks, len(todo)) if ranks.size > 1 else Share()
        with contextlib.closing(certificates(sampler, question, progress, work)) as found:
            for certificate in found:
                idx = int(todo[certificate.index])
                if file is not None:
                    file.append(Row.of(certificate, idx, int(labels[idx])))
    for note in notes[known:] if say else ():
        print(note, file=sys.stderr)


def predict_dataset(
    checkpoint: Checkpoint,
    data: Dataset,
    split: str,
    chosen: Sequence[int],
    out: PathLike,
    settings: Certify,
    *,
    force: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[int, int, float]:
    """Predictions of the smoothed classifier for images of a split, in a new file, a line each as they are decided.

    force: write it anew where it is there already, from the first decision on.
    Returns how many are right, on how many it abstains, and the mean number of samples.
    Raises ValueError and OSError as `certify_dataset` does; ValueError where there is such a file.
    """
    with claimed(out, force=force) as path:
        return _predict_dataset(checkpoint, data, split, chosen, path, settings, device, progress)


def _predict_dataset(
    checkpoint: Checkpoint,
    data: Dataset,
    split: str,
    chosen: Sequence[int],
    out: Path,
    settings: Certify,
    device: torch.device | str,
    progress: bool,
) -> tuple[int, int, float]:
    images, labels = data.split(split)
    law = settings.law(sigma_of(settings.sigma, checkpoint), None)
    seed = secrets.randbits(63) if settings.seed is None else settings.seed
    ids = torch.tensor(list(chosen), dtype=torch.int64)
    sampler, rule = predictor(
        checkpoint.model.to(device), images[ids], checkpoint.num_classes, law, seed, settings.n0, settings.n,
        settings.alpha, settings.futility, dtype=getattr(torch, settings.dtype), rows=settings.batch_size,
        compile=_COMPILE.get(settings.compile, settings.compile or "auto"), check=settings.check, image_ids=ids,
    )  # fmt: skip
    run = {
        "n0": settings.n0, "n": settings.n, "alpha": settings.alpha, "sigma": law.sigma, "seed": seed,
        "noise": law.kind, "step": law.lattice, "dtype": settings.dtype,
        "model": f"{checkpoint.arch}@{checkpoint.fingerprint}", "data": data.tag(split),
        **dataclasses.asdict(sampler.classifier.engine),
    }  # fmt: skip
    right, abstained, samples = 0, 0, 0
    decided = sampler.decide(rule, progress)
    first = next(decided)  # where the model gives NaN, the file stays as it is
    with open(out, "w", encoding="utf-8", buffering=1) as file:
        file.write("\t".join(["idx", "label", "predict", "correct", "samples", "votes", *run]) + "\n")
        for index, outcome, _ in itertools.chain([first], decided):
            idx = int(ids[index])
            label, predicted = int(labels[idx]), outcome.prediction
            right, abstained = right + (label == predicted), abstained + (predicted == ABSTAIN)
            samples += outcome.samples
            row = (idx, label, predicted, int(label == predicted), outcome.samples)
            texts = [*map(str, row), sparse(outcome.counts.tolist()), *map(value_text, run.values())]
            file.write("\t".join(texts) + "\n")
    return right, abstained, samples / len(ids)
