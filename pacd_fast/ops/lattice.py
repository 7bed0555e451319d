"""Gaussian noise that stays Gaussian in floating point: copies of images, rounded exactly to a lattice."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pacd_fast.ops.libraries import FLOATS, operators, require, require_device
from pacd_fast.randomness import FURTHER_DIGITS

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


def _numbers(values: float | Sequence[float] | Tensor, name: str, x: Tensor) -> Tensor:
    """float64 on x's device, one number or one per channel."""
    tensor = torch.as_tensor(values, dtype=torch.float64, device=x.device).flatten()
    require(
        tensor.numel() == 1 or (x.dim() >= 2 and tensor.numel() == x.shape[1]),
        lambda: f"{name} must be a number, or one per channel of x {tuple(x.shape)}",
    )
    return tensor


def _lattice(x: Tensor, step: float | Sequence[float] | Tensor, offset: float | Sequence[float] | Tensor | None):
    """Step and offset as float64 tensors of one size."""
    steps, offsets = _numbers(step, "step", x), _numbers(0.0 if offset is None else offset, "offset", x)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        for each in steps.tolist():
            require(
                2.0**-100 < each < 2.0**100,
                lambda each=each: f"step must be positive (above 2^-100 and below 2^100), not {each}",
            )
        for each in offsets.tolist():
            require(math.isfinite(each), lambda each=each: f"offset must be finite, not {each}")
    steps, offsets = torch.broadcast_tensors(steps, offsets)
    return steps.contiguous(), offsets.contiguous()


def _farthest(x: Tensor, steps: Tensor, offsets: Tensor) -> Tensor:
    """max |x - offset| / step, of one lattice or over all channels; NaN where x has one."""
    rows = x.reshape(x.shape[0], len(steps), -1).movedim(1, 0).flatten(1)
    low, high = rows.aminmax(dim=1)
    return (torch.maximum((high.double() - offsets).abs(), (low.double() - offsets).abs()) / steps).max()


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
    once to dtype: a function of x + sigma Z in real numbers.  So a theorem about Gaussian noise (Cohen et al. 2019) holds
    for the model behind it as it stands, which it does not for float noise: there x + sigma * z tells where x was
    (Voracek and Hein 2023).  x need not lie on the lattice.  Z is a function of (seed, stream, image id, sample, element),
    whatever the batch, device, layout or number of threads, and is read from as many random digits as decide the
    rounding, 32 or 64 for each uniform number of Box-Muller.  A copy with an element that 64 do not decide is void:
    whatever it would have said must count against the certificate (a miss in Clopper-Pearson, a vote for the runner-up,
    0 in a mean), and then the certificate is valid.  The probability of a void element is about 2e-14 sigma / step where
    sigma >= step: 5e-12 for sigma = 1 and step = 1/255.

    Args:
        x: float32, bfloat16 or float16 [B, ...], any strides; |x - offset| / step + 7 sigma / step < 2^22.  Where that is
            not checked (on CUDA, under torch.compile) the copies of an image beyond it, or with a NaN, are void.
        sigma: standard deviation, in the units of x, not negative; used as the nearest float32.  `lattice_step` has the
            step that suits it.
        copies, seed, first, image_ids: as for `noisy_copies`; stream: in [0, 2^15), stream + 2^15 has further digits.
        step, offset: of the lattice, a number or one per channel (dimension 1); offset 0 by default.  For images
            normalised as ``(x - mean) / std`` these are 1 / 255 / std and -mean / std.
        dtype: of the result, float32, bfloat16 or float16; by default that of x.
        memory_format: torch.contiguous_format (default) or torch.channels_last.
        out: [B * copies, ...], contiguous or channels_last: written and returned instead of a new tensor; then dtype
            and memory_format are its own.

    Returns:
        The copies, those of one image adjacent; and bool [B * copies], True where a copy is void.

    There is no gradient: a step function has the derivative 0 wherever it has one, and a straight-through sum over copies
    is not its derivative.  Train with `noisy_copies`.

    Raises:
        ValueError: for anything outside these ranges.
    """
    require_device(x)
    require(
        x.dim() >= 1 and x.dtype in FLOATS,
        lambda: f"x must be float32, bfloat16 or float16 [B, ...], not {x.dtype} {tuple(x.shape)}",
    )
    require(math.isfinite(sigma) and sigma >= 0, lambda: f"sigma must be finite and not negative, not {sigma}")
    require(copies >= 1, lambda: f"copies must be at least 1, not {copies}")
    require(0 <= seed < 2**63, lambda: f"seed must be in [0, 2^63), not {seed}")
    require(
        first >= 0 and first + copies <= 2**32,
        lambda: f"samples are numbered 0 to 2^32 - 1, not {first} to {first + copies - 1}",
    )
    require(0 <= stream < FURTHER_DIGITS, lambda: f"stream must be in [0, 2^15), not {stream}")
    if image_ids is not None:
        require(
            image_ids.dtype == torch.int64 and image_ids.shape == x.shape[:1] and image_ids.device == x.device,
            lambda: f"image_ids must be int64 [{x.shape[0]}] on {x.device}",
        )
    steps, offsets = _lattice(x, step, offset)
    pixels = x.detach() if x.dtype == torch.float32 else x.detach().float()
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel() > 0:
        reach = float(_farthest(pixels, steps, offsets))
        spread = 7 * sigma / float(steps.min())
        require(
            reach + spread < LIMIT,
            lambda: (
                f"|x - offset| / step + 7 sigma / step must be below 2^22 = {LIMIT:.0f}, not {reach:.6g} + {spread:.6g}: "
                f"give a larger step (or finite images)"
            ),
        )
    numbers = (image_ids, float(sigma), steps, offsets)
    if out is not None:
        require(dtype is None and memory_format is None, "out has its own dtype and memory_format")
        require(
            out.dtype in FLOATS and out.device == x.device and out.shape == (x.shape[0] * copies, *x.shape[1:]),
            lambda: (
                f"out must be {(len(x) * copies, *x.shape[1:])} on {x.device}, not {tuple(out.shape)} on {out.device}"
            ),
        )
        require(
            out.is_contiguous() or (out.dim() == 4 and out.is_contiguous(memory_format=torch.channels_last)),
            "out must be contiguous or channels_last",
        )
        if out.numel() == 0:
            return out, out.new_zeros(out.shape[:1], dtype=torch.bool)
        return out, operators.lattice_copies_(out, pixels, *numbers, seed, first, stream)
    dtype = x.dtype if dtype is None else dtype
    require(dtype in FLOATS, lambda: f"dtype must be float32, bfloat16 or float16, not {dtype}")
    last = memory_format == torch.channels_last
    require(
        last or memory_format in (None, torch.contiguous_format),
        lambda: f"memory_format must be contiguous or channels_last, not {memory_format}",
    )
    require(not last or x.dim() == 4, "channels_last needs x [B, C, H, W]")
    if x.numel() == 0:
        rows = x.shape[0] * copies
        return x.new_empty((rows, *x.shape[1:]), dtype=dtype), x.new_zeros((rows,), dtype=torch.bool)
    return operators.lattice_copies(pixels, *numbers, copies, seed, first, stream, dtype, last)


@torch.library.register_fake("pacd_fast::lattice_copies_")
def _(out, x, image_ids, sigma, step, offset, seed, first, stream):
    return out.new_empty(out.shape[:1], dtype=torch.bool)


@torch.library.register_fake("pacd_fast::lattice_copies")
def _(x, image_ids, sigma, step, offset, copies, seed, first, stream, dtype, channels_last):
    shape = (x.shape[0] * copies, *x.shape[1:])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    samples = torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)
    return samples, x.new_empty(shape[:1], dtype=torch.bool)
