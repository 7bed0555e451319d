"""Convolutions that torch leaves slow on a CPU, as they are; `networks.layers` decides where they are taken."""

from __future__ import annotations

import torch
from torch import Tensor

from pacd_fast.ops.libraries import operators


def narrow_grad(grad: Tensor, filters: Tensor, height: int, width: int) -> Tensor:
    """The gradient of ``conv2d(x, filters)`` (stride 1, no padding) for images x of one channel; on the CPU alone.

    In plain torch ``conv_transpose2d(grad.float(), filters)``.

    Args:
        grad: float32, bfloat16 or float16 [N, C, H - k + 1, W - k + 1].
        filters: float32 [C, 1, k, k], k = 3, 5 or 7; height, width: H and W.

    Returns float32 [N, 1, H, W].  Raises RuntimeError for other shapes or dtypes; no gradient of its own.
    """
    return operators.narrow_grad(grad, filters, height, width)


def convolve3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor:
    """``conv2d(x, weight, bias, padding=1)`` by Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray 2016).

    On the CPU alone; quick with AVX-512.  Relative to the largest of a 4x4 neighbourhood it errs by half of what
    oneDNN's does; an infinity there may give NaN.

    Args:
        x: float32 [N, C, H, W], quick in channels_last; weight: float32 [K, C, 3, 3], C and K multiples of 16;
            bias: float32 [K].
        transposed: x is [N, K, H, W] and the result [N, C, H, W], the gradient with respect to images.

    Returns float32 in channels_last.  Raises RuntimeError for other shapes or dtypes; no gradient of its own.
    """
    return operators.convolve3x3(x, weight, bias, transposed)


@torch.library.register_fake("pacd_fast::narrow_grad")
def _(grad, filters, height, width):
    return grad.new_empty((grad.shape[0], 1, height, width), dtype=torch.float32)


@torch.library.register_fake("pacd_fast::convolve3x3")
def _(x, weight, bias, transposed):
    shape = (x.shape[0], weight.shape[1 if transposed else 0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
