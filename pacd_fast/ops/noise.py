"""Gaussian copies of images, by counter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pacd_fast.ops.libraries import FLOATS, operators, require, require_device, transformed


def _channel_numbers(values: Sequence[float] | Tensor | None, name: str, x: Tensor) -> Tensor | None:
    if values is None:
        return None
    tensor = torch.as_tensor(values, dtype=torch.float32, device=x.device).flatten()
    require(
        x.dim() >= 2 and tensor.numel() == x.shape[1],
        lambda: f"{name} needs one number per channel of x {tuple(x.shape)}",
    )
    return tensor


def require_images(x: Tensor, sigma: float) -> None:
    require_device(x)
    require(
        x.dim() >= 1 and x.dtype in FLOATS,
        lambda: f"x must be float32, bfloat16 or float16 [B, ...], not {x.dtype} {tuple(x.shape)}",
    )
    require(math.isfinite(sigma) and sigma >= 0, lambda: f"sigma must be finite and not negative, not {sigma}")


def require_counters(
    x: Tensor, copies: int, seed: int, first: int, stream: int, image_ids: Tensor | None, bits: int = 16
) -> None:
    """The numbers that noise is a function of; `bits` of them for the stream."""
    require(copies >= 1, lambda: f"copies must be at least 1, not {copies}")
    require(0 <= seed < 2**63, lambda: f"seed must be in [0, 2^63), not {seed}")
    require(
        first >= 0 and first + copies <= 2**32,
        lambda: f"samples are numbered 0 to 2^32 - 1, not {first} to {first + copies - 1}",
    )
    require(0 <= stream < 2**bits, lambda: f"stream must be in [0, 2^{bits}), not {stream}")
    if image_ids is not None:
        require(
            image_ids.dtype == torch.int64 and image_ids.shape == x.shape[:1] and image_ids.device == x.device,
            lambda: f"image_ids must be int64 [{x.shape[0]}] on {x.device}",
        )


def require_out(
    out: Tensor, x: Tensor, copies: int, dtype: torch.dtype | None, memory_format: torch.memory_format | None
) -> None:
    require(dtype is None and memory_format is None, "out has its own dtype and memory_format")
    require(
        out.dtype in FLOATS and out.device == x.device and out.shape == (x.shape[0] * copies, *x.shape[1:]),
        lambda: f"out must be {(len(x) * copies, *x.shape[1:])} on {x.device}, not {tuple(out.shape)} on {out.device}",
    )
    require(
        out.is_contiguous() or (out.dim() == 4 and out.is_contiguous(memory_format=torch.channels_last)),
        "out must be contiguous or channels_last",
    )


def result_layout(
    x: Tensor, dtype: torch.dtype | None, memory_format: torch.memory_format | None
) -> tuple[torch.dtype, bool]:
    """dtype of the copies of x, and whether they are channels_last."""
    dtype = x.dtype if dtype is None else dtype
    require(dtype in FLOATS, lambda: f"dtype must be float32, bfloat16 or float16, not {dtype}")
    last = memory_format == torch.channels_last
    require(
        last or memory_format in (None, torch.contiguous_format),
        lambda: f"memory_format must be contiguous or channels_last, not {memory_format}",
    )
    require(not last or x.dim() == 4, "channels_last needs x [B, C, H, W]")
    return dtype, last


def noisy_copies(
    x: Tensor,
    sigma: float,
    copies: int = 1,
    seed: int = 0,
    *,
    first: int = 0,
    image_ids: Tensor | None = None,
    stream: int = 0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Gaussian copies of images: x [B, ...] -> [B * copies, ...], the copies of one image adjacent.

    In plain torch ``x.repeat_interleave(copies, 0) + sigma * torch.randn(...)``, then ``(. - mean) * (1 / std)`` per
    channel where they are given.  The noise is a pure function of (seed, stream, image id, sample, element): copy j of
    image b is sample ``first + j`` of image ``image_ids[b]``, whatever the batch, device, layout or number of threads.

    Args:
        x: float32, bfloat16 or float16 [B, ...], any strides; computed in float32.
        sigma: standard deviation, in the units of x, not negative; used as the nearest float32.
        copies: copies per image, at least 1.
        seed: in [0, 2^63); first: number of the first sample, samples are numbered in [0, 2^32); stream: in [0, 2^16),
            0 and 1 are certification's selection and estimation.
        image_ids: int64 [B] in [0, 2^48), by default 0, 1, ..., B - 1.
        dtype: of the result, float32, bfloat16 or float16; by default that of x.
        memory_format: torch.contiguous_format (default) or torch.channels_last.
        mean, std: one number per channel (dimension 1), together or not at all.
        out: [B * copies, ...], contiguous or channels_last: written and returned instead of a new tensor; then dtype
            and memory_format are its own, and there is no gradient.

    The gradient with respect to x is the sum over copies (divided by std).  A draw reaches 6.76 sigma at most: a 32-bit
    uniform in Box-Muller (generator: Philox4x32-10, Salmon et al. 2011).

    Raises:
        ValueError: for anything outside these ranges.
    """
    require_images(x, sigma)
    require_counters(x, copies, seed, first, stream, image_ids)
    require((mean is None) == (std is None), "mean and std come together")
    shift, spread = _channel_numbers(mean, "mean", x), _channel_numbers(std, "std", x)
    pixels = x if x.dtype == torch.float32 else x.float()
    if out is not None:
        require_out(out, x, copies, dtype, memory_format)
        if out.numel() > 0:
            operators.noisy_copies_(out, pixels, image_ids, float(sigma), seed, first, stream, shift, spread)
        return out
    dtype, last = result_layout(x, dtype, memory_format)
    if x.numel() == 0:
        return x.new_empty((x.shape[0] * copies, *x.shape[1:]), dtype=dtype)
    numbers = (image_ids, float(sigma), copies, seed, first, stream, dtype, last, shift, spread)
    if not transformed(x):
        return operators.noisy_copies(pixels, *numbers)
    plain = pixels if spread is None else pixels / spread.reshape(1, -1, *[1] * (x.dim() - 2))
    slope = (plain - plain.detach()).repeat_interleave(copies, 0)  # 0, with x's derivative
    noisy = operators.noisy_copies(pixels.detach(), *numbers) + slope.to(dtype)
    return noisy.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@torch.library.register_fake("pacd_fast::noisy_copies_")
def _(out, x, image_ids, sigma, seed, first, stream, mean, std, rows=None):
    return None


@torch.library.register_fake("pacd_fast::noisy_copies")
def _(x, image_ids, sigma, copies, seed, first, stream, dtype, channels_last, mean, std):
    shape = (x.shape[0] * copies, *x.shape[1:])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)


def _noisy_copies_setup(ctx, inputs, output):
    x, _, _, copies, *_, std = inputs
    ctx.copies, ctx.shape, ctx.std = copies, x.shape, std


def _noisy_copies_backward(ctx, grad):
    summed = grad.float().reshape(ctx.shape[0], ctx.copies, *ctx.shape[1:]).sum(1)
    if ctx.std is not None:
        summed = summed * (1 / ctx.std).reshape(1, -1, *[1] * (len(ctx.shape) - 2))
    return summed, *[None] * 10


torch.library.register_autograd("pacd_fast::noisy_copies", _noisy_copies_backward, setup_context=_noisy_copies_setup)
