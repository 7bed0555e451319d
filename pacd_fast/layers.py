"""Layers that torch leaves slow on a CPU; anywhere else they are torch's own, and always the same functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pacd_fast import ops

__all__ = ["convolution", "max_pool_relu"]


def max_pool_relu(x: Tensor) -> Tensor:
    """2x2 max-pooling, then ReLU: the same numbers as the other way round, from a quarter of the ReLUs.

    The default layout keeps torch's operators; in channels_last on a CPU they are slow (benchmarks/bench_ops.py).
    """
    if x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last):
        return ops.max_pool_relu(x)
    return F.relu(F.max_pool2d(x, 2))


def convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """layer(x), with a quicker way back to images of one channel on a CPU, for which torch is slow.

    Quick for square filters of 3, 5 or 7 and plain steps (no stride, padding, dilation or groups) of an nn.Conv2d
    without hooks; any other layer, and any other x, is torch's affair.
    """
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    fits = x.device.type == "cpu" and x.dim() == 4 and x.shape[1] == 1 and x.requires_grad
    fits = fits and x.dtype in ops.FLOATS and dtype in ops.FLOATS and (autocast or layer.weight.dtype == dtype)
    if fits and _is_plain(layer) and not _foreign(x, layer.weight, layer.bias):
        bias = None if layer.bias is None else layer.bias.to(dtype)
        found: Tensor = _Narrow.apply(x.to(dtype), layer.weight.to(dtype), bias)
        return found
    result: Tensor = layer(x)
    return result


def _is_plain(layer: nn.Conv2d) -> bool:
    """A convolution of one channel, and nothing more: no steps but of 1, no hook (spectral_norm is one)."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    square = layer.kernel_size in ((3, 3), (5, 5), (7, 7)) and layer.in_channels == layer.groups == 1
    steps = layer.stride == layer.dilation == (1, 1) and layer.padding in ((0, 0), "valid")
    return type(layer) is nn.Conv2d and square and steps and not any(hooks)


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.outputs = len(weight)
        return F.conv2d(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        to_x, *to_layer = ctx.needs_input_grad
        quick = to_x and not torch.is_grad_enabled() and not _foreign(grad)  # else it is to be differentiated again
        found = [None] * 3
        if any(to_layer) or not quick:
            wanted = [to_x and not quick, *to_layer]
            found = list(
                torch.ops.aten.convolution_backward(
                    grad, x, weight, [ctx.outputs], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, wanted
                )
            )
        if quick:
            found[0] = torch.ops.pacd_fast.narrow_grad(grad, weight.float(), *x.shape[2:]).to(x.dtype)
        return tuple(found)


def _foreign(*tensors: Tensor | None) -> bool:
    """Whether a compiler, torch.func or forward mode looks on: these know torch's operators, and not ours."""
    return torch.compiler.is_compiling() or ops.transformed(*tensors)
