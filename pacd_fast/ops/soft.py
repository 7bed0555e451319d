"""The soft smoothed classifier and its certified radius, with derivatives of every order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pacd_fast.ops.libraries import ALL_FLOATS, operators, require, require_device, transformed


def _soft_arguments(logits: Tensor, beta: float) -> Tensor:
    require_device(logits)
    require(
        logits.dim() == 3 and min(logits.shape[1], logits.shape[2] - 1) >= 1 and logits.dtype in ALL_FLOATS,
        lambda: f"logits must be floating [B, k, C] with k >= 1 and C >= 2, not {logits.dtype} {tuple(logits.shape)}",
    )
    require(math.isfinite(beta) and beta > 0, lambda: f"beta must be positive and finite, not {beta}")
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def soft_smooth(logits: Tensor, beta: float = 1.0) -> Tensor:
    """The soft smoothed classifier: logits [B, k, C] of k noisy copies -> probabilities [B, C], in one pass.

    In plain torch ``softmax(beta * logits, 2).mean(1)``.  Differentiable as often as wanted.

    Args:
        logits: float32 or float64; bfloat16 and float16 are computed, and returned, in float32.
        beta: inverse temperature, positive.

    Raises:
        ValueError: for wrong shapes, dtypes or numbers.  An image with a NaN gets NaN.
    """
    values = _soft_arguments(logits, beta)
    return _plain_smooth(values, beta) if transformed(values) else operators.soft_smooth(values, float(beta))


def _plain_smooth(logits: Tensor, beta: float) -> Tensor:
    return torch.softmax(beta * logits, 2).mean(1)


def soft_radius(logits: Tensor, labels: Tensor, *, beta: float, sigma: float, squeeze: float = 0.001) -> Tensor:
    """The certified radius of the soft smoothed classifier: logits [B, k, C], labels [B] -> [B], in one pass.

    With p1 >= p2 the two largest of ``soft_smooth(logits, beta)`` and a = squeeze, ``sigma / 2 * (ndtri((1 - 2 * a) *
    p1 + a) - ndtri((1 - 2 * a) * p2 + a))`` where the likeliest class is the label, 0 where it is not (PACD, Mehra et
    al. 2021, as its authors ran it; with squeeze = 0 the radius in MACER, Zhai et al. 2020).  Differentiable as often
    as wanted.

    Args:
        logits: float32 or float64 [B, k, C]; bfloat16 and float16 are computed, and returned, in float32.
        labels: int64 [B] in [0, C).  On CUDA, under torch.compile and torch.func, one outside is a wrong prediction.
        beta: inverse temperature, positive; sigma: the copies' noise level, positive.
        squeeze: in [0, 1/2), keeps Phi^-1 finite.  With 0 the radius is infinite where all classes but one underflow,
            and the gradient there is 0.

    Raises:
        ValueError: for wrong shapes, dtypes or numbers.  An image with a NaN gets NaN.
    """
    values = _soft_arguments(logits, beta)
    require(
        labels.dtype == torch.int64 and labels.shape == logits.shape[:1] and labels.device == logits.device,
        lambda: (
            f"labels must be int64 [{logits.shape[0]}] on {logits.device}, "
            f"not {labels.dtype} {tuple(labels.shape)} on {labels.device}"
        ),
    )
    require(math.isfinite(sigma) and sigma > 0, lambda: f"sigma must be positive and finite, not {sigma}")
    require(0 <= squeeze < 0.5, lambda: f"squeeze must be in [0, 1/2), not {squeeze}")
    arguments = (values, labels, float(beta), float(sigma), float(squeeze))
    if torch.compiler.is_compiling():
        return operators.soft_radius(*arguments)[0]
    if transformed(values):
        return _plain_radius(*arguments)
    try:
        return operators.soft_radius(*arguments)[0]
    except RuntimeError:  # on the CPU the kernel looks at the labels, which is quicker than a pass of its own here
        outside = bool(((labels < 0) | (labels >= logits.shape[2])).any())
        require(not outside, lambda: f"labels must be in [0, {logits.shape[2]}), the classes of logits")
        raise


def _farthest(logits: Tensor) -> int:
    """Where the slope of Phi^-1 overflows, and the kernel takes 0."""
    return 12 if logits.dtype == torch.float32 else 37


def _plain_radius(logits: Tensor, labels: Tensor, beta: float, sigma: float, squeeze: float) -> Tensor:
    p, which = _plain_smooth(logits, beta).topk(2, 1)
    scaled = (1 - 2 * squeeze) * p + squeeze
    constant = torch.special.ndtri(scaled.detach())
    steep = ~(constant.abs() < _farthest(logits))
    z = torch.where(steep, constant, torch.special.ndtri(torch.where(steep, 0.5, scaled)))
    radius = torch.where(which[:, 0] == labels, sigma / 2 * (z[:, 0] - z[:, 1]), 0.0)
    return torch.where(p.isnan().any(1), math.nan, radius)


# Shapes without data, for the compiler.


@torch.library.register_fake("pacd_fast::soft_smooth")
def _(logits, beta):
    return logits.new_empty((logits.shape[0], logits.shape[2]))


@torch.library.register_fake("pacd_fast::soft_smooth_backward")
def _(grad, logits, beta):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("pacd_fast::soft_radius")
def _(logits, labels, beta, sigma, squeeze):
    return logits.new_empty(logits.shape[:1]), logits.new_empty((logits.shape[0], logits.shape[2]))


@torch.library.register_fake("pacd_fast::soft_radius_backward")
def _(grad, logits, mean, labels, beta, sigma, squeeze):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


# First derivatives are fused operators; theirs are plain torch, which is differentiable in its turn.


def _soft_smooth_setup(ctx, inputs, output):
    logits, ctx.beta = inputs
    ctx.save_for_backward(logits)


def _soft_smooth_backward(ctx, grad):
    return operators.soft_smooth_backward(grad, ctx.saved_tensors[0], ctx.beta), None


def _soft_smooth_backward_setup(ctx, inputs, output):
    grad, logits, ctx.beta = inputs
    ctx.save_for_backward(grad, logits)


def _smooth_second_order(grad: Tensor, logits: Tensor, beta: float, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of <G, cotangent>, G = beta / k * p * (grad - <p, grad>), with respect to grad and logits."""
    p, slopes = torch.softmax(beta * logits, 2), grad.unsqueeze(1)
    scale = beta / logits.shape[1]
    inner, along = (p * slopes).sum(2, keepdim=True), (p * cotangent).sum(2, keepdim=True)
    to_grad = scale * (p * (cotangent - along)).sum(1)
    to_p = cotangent * (slopes - inner) - along * slopes
    return to_grad, scale * beta * p * (to_p - (p * to_p).sum(2, keepdim=True))


def _soft_smooth_double_backward(ctx, cotangent):
    grad, logits = ctx.saved_tensors
    return *_smooth_second_order(grad, logits, ctx.beta, cotangent), None


def _soft_radius_setup(ctx, inputs, output):
    logits, labels, *ctx.numbers = inputs
    ctx.save_for_backward(logits, output[1], labels)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _soft_radius_backward(ctx, grad, _):
    if grad is None:
        return None, None, None, None, None
    return operators.soft_radius_backward(grad, *ctx.saved_tensors, *ctx.numbers), *[None] * 4


def _soft_radius_backward_setup(ctx, inputs, output):
    grad, logits, mean, labels, *ctx.numbers = inputs
    ctx.save_for_backward(grad, logits, mean, labels)


def _soft_radius_double_backward(ctx, cotangent):
    """Of G = soft_smooth_backward(slopes(grad, mean), logits), mean = soft_smooth(logits), through all three."""
    (grad, logits, mean, labels), (beta, sigma, squeeze) = ctx.saved_tensors, ctx.numbers
    if torch.is_grad_enabled():  # a third derivative goes through the mean too
        mean = _plain_smooth(logits, beta)
    p, which = mean.topk(2, 1)
    right, keep = which[:, :1] == labels.unsqueeze(1), 1 - 2 * squeeze
    z = torch.special.ndtri(keep * p + squeeze)
    safe = right & (z.abs() < _farthest(logits))
    z = torch.where(safe, z, 0.0)
    sign = z.new_tensor([sigma / 2, -sigma / 2])
    slope = torch.where(safe, sign * keep * math.sqrt(2 * math.pi) * torch.exp(z * z / 2), 0.0)  # d radius / dp
    slopes = torch.zeros_like(mean).scatter(1, which, slope * grad.unsqueeze(1))
    to_slopes, to_logits = _smooth_second_order(slopes, logits, beta, cotangent)
    to_slope = to_slopes.gather(1, which)
    # d slope / dp = slope^2 * z / (sigma / 2), of the slope's own sign; in float64, because slope^2 overflows float32
    # where a loss has masked the image, and inf * 0 is no 0
    curvature = torch.where(safe, slope.double().square() * z / sign, 0.0)
    to_mean = torch.zeros_like(mean).scatter(1, which, (curvature * to_slope * grad.unsqueeze(1)).to(mean.dtype))
    return (slope * to_slope).sum(1), to_logits + operators.soft_smooth_backward(to_mean, logits, beta), *[None] * 5


for _name, _setup, _backward in (
    ("soft_smooth", _soft_smooth_setup, _soft_smooth_backward),
    ("soft_smooth_backward", _soft_smooth_backward_setup, _soft_smooth_double_backward),
    ("soft_radius", _soft_radius_setup, _soft_radius_backward),
    ("soft_radius_backward", _soft_radius_backward_setup, _soft_radius_double_backward),
):
    torch.library.register_autograd(f"pacd_fast::{_name}", _backward, setup_context=_setup)
