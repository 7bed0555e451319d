"""2x2 max-pooling with ReLU, with derivatives of every order."""

from __future__ import annotations

import torch
from torch import Tensor

from pacd_fast.ops.libraries import ALL_FLOATS, operators, require, require_device


def max_pool_relu(x: Tensor) -> Tensor:
    """2x2 max-pooling with stride 2, then ReLU: x [N, C, H, W] -> [N, C, H // 2, W // 2], in one pass.

    In plain torch ``relu(max_pool2d(x, 2))``, with the same bits and, by backward passes, dual numbers and vmap,
    derivatives of every order.  For the way back a byte a window is kept, and not x.

    Args:
        x: float32, float64, bfloat16 or float16; quick where it is in channels_last, as the result is, else copied.

    Raises:
        ValueError: for wrong shapes or dtypes.  A window with a NaN gives NaN.
    """
    require_device(x)
    require(
        x.dim() == 4 and min(x.shape[2:]) >= 2 and x.dtype in ALL_FLOATS,
        lambda: f"x must be floating [N, C, H, W] with H, W >= 2, not {x.dtype} {tuple(x.shape)}",
    )
    if torch.compiler.is_compiling():
        return torch.relu(torch.nn.functional.max_pool2d(x, 2))  # the compiler's own fusion, and no break
    if torch.is_inference_mode_enabled():
        return operators.pool_max(x)
    return _Pool.apply(x)[0]


class _Pool(torch.autograd.Function):
    """pool_choose: the pooled numbers, linear in x where the choice is given, and the choice."""

    @staticmethod
    def forward(x):
        return operators.pool_choose(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        (x,), (_, choice) = inputs, output
        ctx.size = tuple(x.shape[2:])
        ctx.mark_non_differentiable(choice)
        ctx.save_for_backward(choice)
        ctx.save_for_forward(choice)

    @staticmethod
    def backward(ctx, grad, _):
        return _Choice.apply(ctx.saved_tensors[0], grad, ctx.size)

    @staticmethod
    def jvp(ctx, tangent):
        return _Choice.apply(ctx.saved_tensors[0], tangent, None), None

    @staticmethod
    def vmap(info, in_dims, x):
        """The stacked dimension goes into that of the images, and out again."""
        found = _Pool.apply(x.movedim(in_dims[0], 0).flatten(0, 1))
        return tuple(t.unflatten(0, (info.batch_size, -1)) for t in found), (0, 0)


class _Choice(torch.autograd.Function):
    """pool_pick(choice, other) or, given a size, pool_spread: linear in other, and each other's transpose."""

    @staticmethod
    def forward(choice, other, size):
        return operators.pool_pick(choice, other) if size is None else operators.pool_spread(choice, other, *size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        choice, other, size = inputs
        ctx.size, ctx.transposed = size, tuple(other.shape[2:]) if size is None else None
        ctx.save_for_backward(choice)
        ctx.save_for_forward(choice)

    @staticmethod
    def backward(ctx, grad):
        return None, _Choice.apply(ctx.saved_tensors[0], grad, ctx.transposed), None

    @staticmethod
    def jvp(ctx, _, tangent, __):
        return _Choice.apply(ctx.saved_tensors[0], tangent, ctx.size)

    @staticmethod
    def vmap(info, in_dims, choice, other, size):
        count = info.batch_size
        moved = [
            (t.unsqueeze(0).expand(count, *t.shape) if d is None else t.movedim(d, 0)).flatten(0, 1)
            for t, d in zip((choice, other), in_dims[:2], strict=True)
        ]
        return _Choice.apply(*moved, size).unflatten(0, (count, -1)), 0


def _last(like: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    shape = (*like.shape[:2], height, width)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


@torch.library.register_fake("pacd_fast::pool_max")
def _(x):
    return _last(x, x.shape[2] // 2, x.shape[3] // 2, x.dtype)


@torch.library.register_fake("pacd_fast::pool_choose")
def _(x):
    return tuple(_last(x, x.shape[2] // 2, x.shape[3] // 2, dtype) for dtype in (x.dtype, torch.uint8))


@torch.library.register_fake("pacd_fast::pool_pick")
def _(choice, other):
    return _last(other, other.shape[2] // 2, other.shape[3] // 2, other.dtype)


@torch.library.register_fake("pacd_fast::pool_spread")
def _(choice, grad, height, width):
    return _last(grad, height, width, grad.dtype)
