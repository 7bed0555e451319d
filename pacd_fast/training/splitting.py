"""A batch split over processes: its rows and their share, gradients added up, batch norm over all of it."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

from pacd_fast import ops
from pacd_fast.ranks import Ranks

__all__ = ["Split"]


class Split:
    """How processes share every batch: each takes consecutive rows, and the noise of an image is that of its row.

    A loss that is a mean over images is the sum over processes of share * (the loss of their rows).

    Raises ValueError for a network with dropout, whose masks are drawn for a whole batch.
    """

    def __init__(self, ranks: Ranks, model: nn.Module) -> None:
        self.ranks, self.alone, self.device = ranks, ranks.size == 1, next(model.parameters()).device
        if ranks.size > 1 and any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules()):
            raise ValueError("dropout is drawn for a whole batch: a network with dropout is for one process")

    def rows(self, *counts: int) -> tuple[list[slice], float]:
        """This process's rows of batches of so many images that make up one, and which share of them it has.

        Where there are fewer images than processes some get the first row, whose share is 0: all take part in the sums
        of batch norm.
        """
        rank, size = self.ranks.rank, self.ranks.size
        mine = [slice(count * rank // size, count * (rank + 1) // size) for count in counts]
        length = sum(each.stop - each.start for each in mine)
        if length == 0:
            mine = [slice(0, int(i == 0)) for i in range(len(counts))]
        return mine, length / sum(counts)

    def numbered(self, *rows: slice) -> dict[str, Tensor]:
        """The argument of a loss that says which rows these are; none for a process that is alone."""
        if self.alone:
            return {}
        return {"image_ids": torch.cat([torch.arange(each.start, each.stop, device=self.device) for each in rows])}

    def add_up(self, parameters: Iterable[nn.Parameter], value: Tensor) -> Tensor:
        """The gradients become the sums of everyone's; the sum of the values."""
        if self.alone:
            return value
        slopes = [p.grad for p in parameters if p.grad is not None]
        total = self.ranks.summed_tensor(torch.cat([value.view(1), *(slope.flatten() for slope in slopes)]))
        for slope, part in zip(slopes, total[1:].split([slope.numel() for slope in slopes]), strict=True):
            slope.copy_(part.view(slope.shape))
        return total[0].to(value.dtype)

    @contextlib.contextmanager
    def batch_norm(self, model: nn.Module, share: float) -> Iterator[None]:
        """Batch norm in training mode takes the statistics of the whole batch meanwhile, as one process does.

        share: this process's, of which only matters whether it is 0.
        """
        kind, others = nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm  # which does so itself
        norms = [] if self.alone else [m for m in model.modules() if isinstance(m, kind) and not isinstance(m, others)]
        for norm in norms:
            norm.forward = functools.partial(self._normalised, norm, float(share > 0))
        try:
            yield
        finally:
            for norm in norms:
                del norm.forward

    def _normalised(self, norm: Any, counts: float, x: Tensor) -> Tensor:
        if not (norm.training or norm.running_mean is None):
            return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        way = _in_steps if ops.transformed(x, norm.weight, norm.bias) else _Norm.apply
        y, middle, variance, count = way(x, norm.weight, norm.bias, norm.eps, counts, self.ranks)
        if norm.training and norm.track_running_stats:
            with torch.no_grad():
                norm.num_batches_tracked.add_(1)
                weight = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
                norm.running_mean.lerp_(middle.detach().to(norm.running_mean.dtype), weight)
                unbiased = variance.detach() * (count / (count - 1).clamp(min=1))
                norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), weight)
        return y


def _in_steps(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, counts: float, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x normalised over everyone's rows (times weight, plus bias), their mean, variance and number; in torch's own
    operators, differentiable any number of times, in forward mode too.

    counts: 1, or 0 where this process's rows do not count.
    """
    values, others = x.to(torch.promote_types(x.dtype, torch.float32)), [0, *range(2, x.dim())]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    elements = values.new_full((1,), x.numel() / x.shape[1])
    sums = _sum(torch.cat([values.sum(others), elements]) * counts, ranks)
    count = sums[-1].detach()
    middle = sums[:-1] / count
    values = values - middle.view(shape)
    variance = _sum(values.square().sum(others) * counts, ranks) / count
    scale = (variance + eps).rsqrt()
    values = values * (scale if weight is None else scale * weight).view(shape)
    return (values if bias is None else values + bias.view(shape)).to(x.dtype), middle, variance, count


class _Norm(Function):
    """The same by torch's own kernels of batch norm, with one exchange of float64 sums each way instead of two."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, counts, ranks):
        wide = torch.promote_types(x.dtype, torch.float32)
        ones = torch.ones(x.shape[1], dtype=wide, device=x.device)
        _, middle, inverse = torch.native_batch_norm(x, ones, None, None, None, True, 0.0, eps)  # one's own rows
        middle, variance = middle.double(), inverse.double().pow(-2) - eps
        own = torch.cat([middle, variance + middle.square(), middle.new_ones(1)])
        *sums, count = ranks.summed_tensor(own * (counts * x.numel() / x.shape[1])).split([len(ones), len(ones), 1])
        middle = sums[0] / count
        variance = (sums[1] / count - middle.square()).clamp(min=0)
        middle, variance = middle.to(wide), variance.to(wide)
        y = F.batch_norm(x, middle, variance, _as(weight, wide), _as(bias, wide), False, 0.0, eps)
        ctx.save_for_backward(x, weight, bias, middle, variance, count)
        ctx.given = eps, counts, ranks
        ctx.mark_non_differentiable(middle, variance, count)
        return y, middle, variance, count

    @staticmethod
    def backward(ctx, slope, *_):
        (x, weight, bias, middle, variance, count), (eps, counts, ranks) = ctx.saved_tensors, ctx.given
        if torch.is_grad_enabled():  # to be differentiated again
            needed = ctx.needs_input_grad[:3]
            given = [tensor if asked else None for tensor, asked in zip((x, weight, bias), needed, strict=True)]
            y = _in_steps(x, weight, bias, eps, counts, ranks)[0]
            found = iter(torch.autograd.grad(y, [t for t in given if t is not None], slope, create_graph=True))
            return *(None if tensor is None else next(found) for tensor in given), None, None, None
        factor = torch.ones_like(middle) if weight is None else weight.to(middle.dtype)
        to_x, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
            slope, x, factor, middle, variance, None, None, False, eps, [True] * 3
        )
        # As if mean and variance were constants; through them every row has its part in every slope.
        sums = ranks.summed_tensor(torch.cat([to_weight, to_bias]).double()) * (counts / count)
        tilt, shift = (-factor * (variance + eps).rsqrt() * sums.to(factor.dtype).view(2, -1)).unbind()
        to_x += F.batch_norm(x, middle, variance, tilt, shift, False, 0.0, eps)
        return to_x, _as(to_weight, weight), _as(to_bias, bias), None, None, None


def _as(tensor: Tensor | None, like: Any) -> Tensor | None:
    """tensor.to(like), None where either is None."""
    return None if tensor is None or like is None else tensor.to(like)


def _sum(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The sum of everyone's, differentiable any number of times: everyone's losses depend on it."""
    value, tangent = forward_ad.unpack_dual(tensor)
    total: Tensor = _Sum.apply(value, ranks)
    if tangent is None:
        return total
    return forward_ad.make_dual(total, _Sum.apply(tangent, ranks))  # a jvp of _Sum would have no graph


class _Sum(Function):
    """all_reduce, whose derivative is all_reduce; everyone's passes take the same way, so that they meet."""

    @staticmethod
    def forward(ctx, tensor, ranks):
        ctx.ranks = ranks
        return ranks.summed_tensor(tensor)

    @staticmethod
    def backward(ctx, slope):
        return _Sum.apply(slope, ctx.ranks), None


def splittable(loss: Any) -> bool:
    """Whether a loss can be told which rows of a batch it sees."""
    parameters = inspect.signature(loss).parameters.values()
    return any(each.name == "image_ids" or each.kind is each.VAR_KEYWORD for each in parameters)
