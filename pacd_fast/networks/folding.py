"""Batch norm folded into the convolution before it, once: the same function up to rounding, without its passes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from pacd_fast.networks.models import ResidualBlock, ResNet

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norm(model: nn.Module) -> int:
    """Folds every plain convolution that feeds one batch norm alone, in place; how many were.

    The model is in eval mode.  Of our residual networks the pairs are known; of others they are read off the graph that
    torch.fx traces, and where it cannot (control flow on data, say), nothing is folded.
    """
    pairs = list(_known_pairs(model)) or list(_traced_pairs(model))
    for convolution, norm in pairs:
        weight, bias = folded(model.get_submodule(convolution), model.get_submodule(norm))
        layer = model.get_submodule(convolution)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = nn.Parameter(bias, requires_grad=False)
        parent, _, name = norm.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
    return len(pairs)


def folded(convolution: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Filters and bias of norm(convolution(x)), computed in float32 (or float64) and rounded once."""
    wide = torch.promote_types(convolution.weight.dtype, torch.float32)
    mean, variance = norm.running_mean.to(wide), norm.running_var.to(wide)
    scale = torch.rsqrt(variance + norm.eps)
    scale = scale if norm.weight is None else norm.weight.to(wide) * scale
    shift = -mean * scale if norm.bias is None else norm.bias.to(wide) - mean * scale
    if convolution.bias is not None:
        shift = shift + convolution.bias.to(wide) * scale
    filters = convolution.weight.to(wide) * scale.view(-1, *[1] * (convolution.weight.dim() - 1))
    return filters.to(convolution.weight.dtype), shift.to(convolution.weight.dtype)


def _foldable(convolution: nn.Module, norm: nn.Module) -> bool:
    plain = type(convolution) in _CONVOLUTIONS and type(norm) in _NORMS
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in (convolution, norm))
    floats = plain and convolution.weight.is_floating_point() and norm.running_mean is not None
    return floats and not hooked and not norm.training


def _known_pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of a ResNet's convolutions and their batch norms, wherever it is in the model."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, ResNet | ResidualBlock):
            for convolution, norm in module.pairs():
                if _foldable(module.get_submodule(convolution), module.get_submodule(norm)):
                    yield prefix + convolution, prefix + norm


def _traced_pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    try:
        nodes = list(fx.Tracer().trace(model).nodes)
    except Exception:  # whatever a stranger's forward raises for a stand-in: then it is left as it is
        return
    calls = [node for node in nodes if node.op == "call_module"]
    used = [str(node.target) for node in calls]
    for norm in calls:
        (before, *others) = (*norm.args, *norm.kwargs.values()) or (None,)
        if others or not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        names = str(before.target), str(norm.target)
        once = all(used.count(name) == 1 for name in names)
        if once and _foldable(model.get_submodule(names[0]), model.get_submodule(names[1])):
            yield names
