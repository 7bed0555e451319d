"""Layers that torch leaves slow on a CPU; anywhere else they are torch's own, and always the same functions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pacd_fast import ops


def max_pool_relu(x: Tensor) -> Tensor:
    """2x2 max-pooling, then ReLU: the same numbers as the other way round, from a quarter of the ReLUs.

    The default layout keeps torch's operators; in channels_last on a CPU they are slow (benchmarks/bench_ops.py).
    """
    if x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last):
        return ops.max_pool_relu(x)
    return F.relu(F.max_pool2d(x, 2))


def convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """layer(x), as quick as `conv2d` where it is an nn.Conv2d and nothing more: no hook, groups or dilation."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    watched = (
        any(hooks) or nn.modules.module._has_any_global_hook() or "forward" in vars(layer)
    )  # by spectral_norm, say
    plain = type(layer) is nn.Conv2d and layer.groups == 1 and layer.dilation == (1, 1) and not watched
    if plain and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        if (found := _quickly(x, layer.weight, layer.bias, layer.stride, layer.padding)) is not None:
            return found
    result: Tensor = layer(x)
    return result


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...] = (1, 1), padding: tuple[int, ...] = (0, 0)
) -> Tensor:
    """torch's conv2d up to rounding, on a CPU quicker for two kinds of plain steps (no stride, dilation or groups).

    Images of one channel under filters of 3, 5 or 7 without padding: the way back, also in bfloat16 and float16.
    16 to 64 channels, in sixteens, under padded filters of 3: both ways, in float32 and channels_last, with AVX-512.
    Of these the rounding is that of the largest among 4x4 neighbours, and an infinity there may give NaN.
    Anything else goes to torch.
    """
    found = _quickly(x, weight, bias, stride, padding)
    return F.conv2d(x, weight, bias, stride, padding) if found is None else found


def _quickly(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor | None:
    """What `conv2d` has for these; None where torch's is to be taken, for its speed or its error messages."""
    if not isinstance(x, Tensor) or _foreign(x, weight, bias):  # torch.fx has stand-ins
        return None
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    given = [x, weight] if bias is None else [x, weight, bias]
    fits = x.dim() == 4 and tuple(stride) == (1, 1) and all(tensor.device.type == "cpu" for tensor in given)
    fits = fits and dtype in ops.FLOATS
    fits = fits and all(tensor.dtype in ops.FLOATS if autocast else tensor.dtype == dtype for tensor in given)
    if not fits or not (_narrow(x, weight, padding) or _padded(x, weight, padding, dtype)):
        return None
    found: Tensor = _Quick.apply(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return found


def _narrow(x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> bool:
    square = weight.shape[2:] in ((3, 3), (5, 5), (7, 7)) and x.shape[1] == weight.shape[1] == 1
    return square and tuple(padding) == (0, 0) and x.requires_grad


def _padded(x: Tensor, weight: Tensor, padding: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether convolve3x3 is quicker than torch: from 8x8 pixels on, and as long as the filters fit into a cache."""
    channels = all(count in (16, 32, 48, 64) for count in weight.shape[:2]) and x.shape[1] == weight.shape[1]
    if dtype != torch.float32 or weight.shape[2:] != (3, 3) or tuple(padding) != (1, 1) or not channels:
        return False
    large = x.shape[2] * x.shape[3] >= 64 and x.is_contiguous(memory_format=torch.channels_last)
    return large and torch.backends.cpu.get_cpu_capability() == "AVX512"


class _Quick(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.narrow = weight.shape[1] == 1
        return F.conv2d(x, weight, bias) if ctx.narrow else ops.convolve3x3(x, weight, bias, False)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        to_x, *to_layer = (_is_asked_for(ctx, i) for i in range(3))
        quick = to_x and not torch.is_grad_enabled() and not _foreign(grad)  # else it is to be differentiated again
        found, padding = [None] * 3, [0, 0] if ctx.narrow else [1, 1]
        if any(to_layer) or not quick:
            wanted = [to_x and not quick, *to_layer]
            found = list(
                torch.ops.aten.convolution_backward(
                    grad, x, weight, [len(weight)], [1, 1], padding, [1, 1], False, [0, 0], 1, wanted
                )
            )
        if quick and ctx.narrow:
            found[0] = ops.narrow_grad(grad, weight.float(), *x.shape[2:]).to(x.dtype)
        elif quick:
            found[0] = ops.convolve3x3(grad, weight, None, True)
        return tuple(found)


def _is_asked_for(ctx: Any, i: int) -> bool:
    """Whether the gradient of input i is asked for; an attack wants that of images alone, though the weights learn."""
    if not ctx.needs_input_grad[i]:
        return False
    try:
        asked: bool = torch._C._will_engine_execute_node(ctx.next_functions[i][0])
    except (RuntimeError, AttributeError):  # a leaf that torch.autograd.grad names; a torch without this function
        return True
    return asked


def _foreign(*tensors: Tensor | None) -> bool:
    """Whether a compiler, a tracer, torch.func or forward mode is active: they know torch's operators, and not ours."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or ops.transformed(*tensors)
