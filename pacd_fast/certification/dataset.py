"""Certifying images of a data set into a results file: which images, under which run, resumed where it stopped."""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pacd_fast.certification.results import PathLike, ResultsFile, Row, Run, peek
from pacd_fast.certification.vote import certify_each, check_arguments
from pacd_fast.data import Dataset, as_float, random_subset
from pacd_fast.networks import Checkpoint


@dataclass(frozen=True)
class Selection:
    """Which images of a split to certify: of a class, a random choice or a stride and an end; of these a shard.

    Attributes:
        target_class, except_class: only images of this class, or of others.
        images: only these, by index.
        count, choice: a random choice of so many, decided by the seed `choice`; None for all.
        skip, max: those whose index `skip` divides, below `max`.
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


def certify_dataset(
    checkpoint: Checkpoint,
    data: Dataset,
    split: str,
    chosen: Sequence[int],
    out: PathLike,
    *,
    sigma: float | None = None,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    seed: int | None = None,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    progress: bool = False,
) -> None:
    """Certifies images of a split into a results file; those that are in it already are left as they are.

    Args:
        chosen: indices into the split; an image's noise belongs to its index.
        sigma: by default what the checkpoint was trained with.
        seed: by default that of the file where it is there, else from the operating system's entropy.
        the rest: see `certify`.

    Raises ValueError and OSError, each one line that says what to do, AnotherRun for a file of other settings.
    """
    images, labels = data.split(split)
    sigma = sigma if sigma is not None else checkpoint.sigma or None  # 0: trained without noise
    if sigma is None:
        raise ValueError("the checkpoint does not say which noise it was trained with: give --sigma")
    existing = peek(out) if Path(out).exists() else None
    seed = seed if seed is not None else existing.seed if existing else secrets.randbits(63)
    model = f"{checkpoint.arch}@{checkpoint.fingerprint}"
    run = Run(n0=n0, n=n, alpha=alpha, sigma=sigma, seed=seed, dtype=dtype, model=model, data=data.tag(split))
    check_arguments(n0, n, alpha, sigma, seed)
    with ResultsFile(out, run) as file:
        todo = torch.tensor([i for i in chosen if i not in file.done], dtype=torch.int64)
        if len(todo) < len(chosen) and progress:
            print(
                f"{out}: {len(chosen) - len(todo)} of {len(chosen)} images are there, {len(todo)} to go",
                file=sys.stderr,
            )
        certificates = certify_each(
            checkpoint.model.to(device),
            as_float(images[todo]),
            num_classes=checkpoint.num_classes,
            sigma=sigma,
            n0=n0,
            n=n,
            alpha=alpha,
            seed=seed,
            dtype=getattr(torch, dtype),
            batch_size=batch_size,
            image_ids=todo,
            progress=progress,
        )
        with contextlib.closing(certificates):
            for certificate in certificates:
                idx = int(todo[certificate.index])
                file.append(Row.of(certificate, idx, int(labels[idx])))
