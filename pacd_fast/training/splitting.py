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
        values, others = x.to(torch.promote_types(x.dtype, torch.float32)), [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        elements = values.new_full((1,), x.numel() / x.shape[1])
        sums = self._sum(torch.cat([values.sum(others), elements]) * counts)
        count = sums[-1].detach()
        middle = sums[:-1] / count
        values = values - middle.view(shape)
        variance = self._sum(values.square().sum(others) * counts) / count
        if norm.training and norm.track_running_stats:
            with torch.no_grad():
                norm.num_batches_tracked.add_(1)
                weight = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
                norm.running_mean.lerp_(middle.detach().to(norm.running_mean.dtype), weight)
                unbiased = variance.detach() * (count / (count - 1).clamp(min=1))
                norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), weight)
        scale = (variance + norm.eps).rsqrt()
        if norm.affine:
            scale = scale * norm.weight
        values = values * scale.view(shape)
        return (values if not norm.affine else values + norm.bias.view(shape)).to(x.dtype)

    def _sum(self, tensor: Tensor) -> Tensor:
        """The sum of everyone's, differentiable any number of times: everyone's losses depend on it."""
        value, tangent = forward_ad.unpack_dual(tensor)
        total: Tensor = _Sum.apply(value, self.ranks)
        if tangent is None:
            return total
        return forward_ad.make_dual(total, _Sum.apply(tangent, self.ranks))  # a jvp of _Sum would have no graph


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
