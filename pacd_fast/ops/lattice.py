"""Gaussian noise that stays Gaussian in floating point: copies of images, rounded exactly to a lattice."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pacd_fast.ops.libraries import operators, require
from pacd_fast.ops.noise import require_counters, require_images, require_out, result_layout

STEP = 1 / 255
"""The step of 8-bit images in [0, 1]."""

LIMIT = 2.0**22
"""|x - offset| / step + 7 sigma / step must be below it: cells are counted exactly in float32."""


def lattice_step(sigma: float, step: float = STEP) -> float:
    """The step to draw noise of this sigma on: `step`, divided by the smallest power of two that makes it <= sigma / 4.

    A coarser lattice hides what the noise does, and the model would see few different images; the certificate holds for
    any step.

    Raises:
        ValueError: for a sigma or step that is not positive and finite.
    """
    require(math.isfinite(sigma) and sigma > 0, lambda: f"sigma must be positive and finite, not {sigma}")
    require(math.isfinite(step) and step > 0, lambda: f"step must be positive and finite, not {step}")
    while sigma < 4 * step:
        step /= 2
    return step


def _numbers(values: float | Sequence[float] | Tensor, name: str, x: Tensor) -> list[float] | Tensor:
    """One number, or one per channel: a list, or where looking at them would cost a wait or a graph break, a tensor."""
    if not isinstance(values, Tensor):
        values = list(values) if isinstance(values, Sequence) else [values]
    elif values.device.type == "cpu" and not torch.compiler.is_compiling():
        values = values.flatten().tolist()
    else:
        values = values.flatten().to(x.device, torch.float64)
    require(
        len(values) == 1 or (x.dim() >= 2 and len(values) == x.shape[1]),
        lambda: f"{name} must be a number, or one per channel of x {tuple(x.shape)}",
    )
    return values


def _lattice(
    x: Tensor, step: float | Sequence[float] | Tensor, offset: float | Sequence[float] | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Step and offset as float64 tensors of one size on x's device."""
    steps, offsets = _numbers(step, "step", x), _numbers(0.0 if offset is None else offset, "offset", x)
    if isinstance(steps, list):
        bad = [each for each in steps if not 2.0**-100 < each < 2.0**100]
        require(not bad, lambda: f"step must be positive (above 2^-100 and below 2^100), not {bad[0]}")
    if isinstance(offsets, list):
        odd = [each for each in offsets if not math.isfinite(each)]
        require(not odd, lambda: f"offset must be finite, not {odd[0]}")
    tensors = [
        torch.tensor(values, dtype=torch.float64, device=x.device) if isinstance(values, list) else values
        for values in (steps, offsets)
    ]
    if len(steps) != len(offsets):
        tensors = [each.contiguous() for each in torch.broadcast_tensors(*tensors)]
    return tensors[0], tensors[1]


def _require_range(x: Tensor, sigma: float, steps: Tensor, offsets: Tensor) -> None:
    rows = x.unsqueeze(0) if len(steps) == 1 else x.movedim(1, 0).flatten(1).unbind()
    for row, step, offset in zip(rows, steps.tolist(), offsets.tolist(), strict=True):
        low, high = torch.aminmax(row)
        reach, spread = max(abs(float(low) - offset), abs(float(high) - offset)) / step, 7 * sigma / step
        require(
            reach + spread < LIMIT,
            lambda reach=reach, spread=spread: (  # type: ignore[misc]
                f"|x - offset| / step + 7 sigma / step must be below 2^22 = {LIMIT:.0f}, "
                f"not {reach:.6g} + {spread:.6g}: give a larger step (or finite images)"
            ),
        )


def lattice_of(
    x: Tensor, sigma: float, step: float | Sequence[float] | Tensor, offset: float | Sequence[float] | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Step and offset as the operators take them, float64 [1] or [channels] on x's device, checked once for all of x.

    Raises ValueError as `lattice_copies` does; on CUDA it waits for x.
    """
    steps, offsets = _lattice(x, step, offset)
    if x.numel():
        _require_range(x, sigma, steps, offsets)
    return steps, offsets


def require_on_lattice(
    x: Tensor, step: float | Sequence[float] | Tensor, offset: float | Sequence[float] | Tensor | None = None
) -> None:
    """Raises ValueError where a pixel is farther than a hundredth of a step from the lattice.

    The certificate needs no pixel to lie on the lattice; this is for who claims that they do, and gave another step.
    """
    steps, offsets = _lattice(x, step, offset)
    shape = (1, -1, *[1] * (x.dim() - 2)) if len(steps) > 1 else (1,)
    a = (x.double() - offsets.reshape(shape)) / steps.reshape(shape)
    distance = float((a - a.round()).abs().max()) if a.numel() else 0.0
    require(
        distance <= 0.01,
        lambda: (
            f"a pixel lies {distance:.3g} steps from the lattice of step {steps.tolist()} and offset "
            f"{offsets.tolist()}: give the data's own step and offset"
        ),
    )


def lattice_copies(
    x: Tensor,
    sigma: float,
    copies: int = 1,
    seed: int = 0,
    *,
    step: float | Sequence[float] | Tensor,
    offset: float | Sequence[float] | Tensor | None = None,
    first: int = 0,
    image_ids: Tensor | None = None,
    stream: int = 0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gaussian copies of images on a lattice: x [B, ...] -> [B * copies, ...] and which of them are void.

    ``offset + step * round((x + sigma * Z - offset) / step)`` with Z an exact normal number for every element, rounded
    once to dtype: a function of x + sigma Z in real numbers.  So a theorem about Gaussian noise (Cohen et al. 2019)
    holds for the model behind it as it stands, which it does not for noise in floats: there x + sigma * z tells where x
    was (Voracek and Hein 2023).  x need not lie on the lattice.  Z is a function of (seed, stream, image id, sample,
    element), whatever the batch, device, layout or number of threads, and is read from as many random digits as decide
    the rounding, 32 or 64 for each uniform number of Box-Muller.  A copy with an element that 64 do not decide is void:
    whatever it would have said must count against the certificate (a miss in Clopper-Pearson, a vote for the runner-up,
    0 in a mean), and then the certificate is valid.  The probability of a void element is about 2e-14 sigma / step
    where sigma >= step: 5e-12 for sigma = 1 and step = 1/255.

    Args:
        x: float32, bfloat16 or float16 [B, ...], any strides; |x - offset| / step + 7 sigma / step < 2^22.  Where that
            is not checked (on CUDA, under torch.compile) the copies of an image beyond it, or with a NaN, are void.
        sigma: standard deviation, in the units of x, not negative; used as the nearest float32.  `lattice_step` has the
            step that suits it.
        copies, seed, first, image_ids: as for `noisy_copies`.
        step, offset: of the lattice, a number or one per channel (dimension 1); offset 0 by default.  For images
            normalised as ``(x - mean) / std`` these are 1 / 255 / std and -mean / std.
        stream: in [0, 2^15); stream + 2^15 has the further digits.
        dtype: of the result, float32, bfloat16 or float16; by default that of x.
        memory_format: torch.contiguous_format (default) or torch.channels_last.
        out: [B * copies, ...], contiguous or channels_last: written and returned instead of a new tensor; then dtype
            and memory_format are its own.

    Returns:
        The copies, those of one image adjacent; and bool [B * copies], True where a copy is void.

    There is no gradient: a step function has the derivative 0 wherever it has one, and a straight-through sum over
    copies is not its derivative.  Train with `noisy_copies`.

    Raises:
        ValueError: for anything outside these ranges.
    """
    require_images(x, sigma)
    require_counters(x, copies, seed, first, stream, image_ids, bits=15)
    steps, offsets = _lattice(x, step, offset)
    pixels = x.detach() if x.dtype == torch.float32 else x.detach().float()
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel() > 0:
        _require_range(pixels, sigma, steps, offsets)
    numbers = (image_ids, float(sigma), steps, offsets)
    if out is not None:
        require_out(out, x, copies, dtype, memory_format)
        if out.numel() == 0:
            return out, out.new_zeros(out.shape[:1], dtype=torch.bool)
        return out, operators.lattice_copies_(out, pixels, *numbers, seed, first, stream)
    dtype, last = result_layout(x, dtype, memory_format)
    if x.numel() == 0:
        rows = x.shape[0] * copies
        return x.new_empty((rows, *x.shape[1:]), dtype=dtype), x.new_zeros((rows,), dtype=torch.bool)
    return operators.lattice_copies(pixels, *numbers, copies, seed, first, stream, dtype, last)


@torch.library.register_fake("pacd_fast::lattice_copies_")
def _(out, x, image_ids, sigma, step, offset, seed, first, stream, rows=None):
    return out.new_empty(out.shape[:1], dtype=torch.bool)


@torch.library.register_fake("pacd_fast::lattice_copies")
def _(x, image_ids, sigma, step, offset, copies, seed, first, stream, dtype, channels_last):
    shape = (x.shape[0] * copies, *x.shape[1:])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    samples = torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)
    return samples, x.new_empty(shape[:1], dtype=torch.bool)
