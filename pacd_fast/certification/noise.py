"""The noise that a certificate is about: on a lattice, where certificates hold in floating point, or in floats."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pacd_fast import ops
from pacd_fast.arguments import positive

Numbers: TypeAlias = float | Sequence[float] | NDArray[Any] | Tensor

KINDS = ("lattice", "float")


@dataclass(frozen=True)
class Noise:
    """Which noise: its law, and nothing of the images.  Another distribution is another kind here.

    Attributes:
        kind: "lattice", x + sigma Z rounded exactly to a lattice (`ops.lattice_copies`), or "float", x + sigma z in
            floats (`ops.noisy_copies`), whose certificates can be refuted in floating point.
        sigma: a float32 number.
        step, offset: of the lattice, one number or one per channel; empty for floats.
    """

    kind: str
    sigma: float
    step: tuple[float, ...] = ()
    offset: tuple[float, ...] = ()

    @classmethod
    def of(cls, kind: str, sigma: float, step: Numbers | None = None, offset: Numbers | None = None) -> Noise:
        """Noise by what a caller says; sigma is rounded to float32, the step made small enough for it (`lattice_step`).

        Raises ValueError.
        """
        positive("sigma", sigma)
        sigma = float(torch.tensor(sigma, dtype=torch.float32))  # what the noise really has
        positive("sigma as a float32 number", sigma)
        if kind not in KINDS:
            raise ValueError(f"noise must be one of {', '.join(KINDS)}, not {kind!r}")
        if kind == "float":
            if step is not None or offset is not None:
                raise ValueError("step and offset are of lattice noise: leave them out for noise in floats")
            return cls(kind, sigma)
        steps = tuple(ops.lattice_step(sigma, each) for each in _tuple(ops.STEP if step is None else step))
        return cls(kind, sigma, steps, _tuple(0.0 if offset is None else offset))

    @property
    def lattice(self) -> str:
        """Step and offset as the results file has them; "-" for floats."""
        if self.kind == "float":
            return "-"
        texts = [",".join(map(repr, values)) for values in (self.step, self.offset)]
        return texts[0] if self.offset == (0.0,) else "+".join(texts)

    @classmethod
    def read(cls, kind: str, sigma: float, lattice: str) -> Noise:
        """The noise that a results file names; the step is taken as it stands.  Raises ValueError."""
        if kind == "float":
            return cls.of(kind, sigma)
        steps, _, offsets = lattice.partition("+")
        step, offset = (tuple(map(float, text.split(","))) for text in (steps, offsets or "0.0"))
        found = cls.of(kind, sigma, step, offset)
        if found.step != step:
            raise ValueError(f"step {steps} is too coarse for sigma {sigma}")
        return found


def _tuple(values: Numbers) -> tuple[float, ...]:
    if isinstance(values, Tensor):
        values = values.flatten().tolist()
    return tuple(np.asarray(values, dtype=np.float64).ravel().tolist())


class Copies:
    """Noisy copies of fixed images, sample by sample.

    images: float32 [N, ...]; ids: int64 [N], which noise each gets; seed: see `randomness`.
    check: the images must lie on the lattice.  Raises ValueError for images that the lattice cannot hold.
    """

    def __init__(self, noise: Noise, images: Tensor, ids: Tensor, seed: int, check: bool = False):
        self.noise, self.images, self.ids, self.seed = noise, images, ids, seed
        self._lattice: tuple[Tensor, ...] = ()
        if noise.kind == "lattice":
            self._lattice = ops.lattice_of(images, noise.sigma, noise.step, noise.offset)
            if check:
                ops.require_on_lattice(images, noise.step, noise.offset)
        elif check:
            raise ValueError("check=True asks whether images lie on the lattice, and noise in floats has none")

    def to(self, device: torch.device) -> Copies:
        """The same on another device; what was checked is not checked again."""
        moved = copy.copy(self)
        moved.images, moved.ids = self.images.to(device), self.ids.to(device)
        moved._lattice = tuple(each.to(device) for each in self._lattice)
        return moved

    def some(self, index: Tensor) -> Copies:
        """The same of some of the images: int64 [K], on their device."""
        found = copy.copy(self)
        found.images, found.ids = self.images[index], self.ids[index]
        return found

    def room(self, count: int) -> Copies:
        """The same of so many images of zeros, to be written over."""
        found = copy.copy(self)
        found.images = self.images.new_zeros(count, *self.images.shape[1:])
        found.ids = torch.arange(count, device=self.ids.device)
        return found

    def draw(self, out: Tensor, rows: Tensor) -> Tensor | None:
        """The samples int64 [R, 3] of (image, stream, sample) in out [R, ...]; bool [R], which are void, or None.

        All tensors are on one device, which nobody waits for.
        """
        x, ids, sigma = self.images, self.ids, self.noise.sigma
        if self.noise.kind == "float":
            ops.operators.noisy_copies_(out, x, ids, sigma, self.seed, 0, 0, None, None, rows)
            return None
        found: Tensor = ops.operators.lattice_copies_(out, x, ids, sigma, *self._lattice, self.seed, 0, 0, rows)
        return found
