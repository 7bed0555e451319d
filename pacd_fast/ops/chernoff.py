"""The tail bound of linear votes under random label flips."""

from __future__ import annotations

import torch
from torch import Tensor

from pacd_fast.ops.libraries import operators, require, require_device


def _require_votes(alpha: Tensor, y: Tensor, classes: int, q: float) -> None:
    require_device(alpha)
    require(
        alpha.dtype == torch.float64 and alpha.dim() == 2,
        lambda: f"alpha must be float64 [m, n], not {alpha.dtype} {tuple(alpha.shape)}",
    )
    require(
        y.dtype == torch.int64 and y.shape == alpha.shape[1:] and y.device == alpha.device,
        lambda: f"y must be int64 [{alpha.shape[1]}] on {alpha.device}, not {y.dtype} {tuple(y.shape)} on {y.device}",
    )
    require(
        1e-300 <= q < (classes - 1) / classes,
        lambda: f"q must be in (0, {classes - 1}/{classes}) for {classes} classes, not {q}",
    )
    if y.device.type == "cpu" and not torch.compiler.is_compiling() and y.numel() > 0:
        low, high = y.aminmax()
        require(
            0 <= int(low) and int(high) < classes,
            lambda: f"labels must be 0 to {classes - 1}, not {int(low)} to {int(high)}",
        )


def chernoff_newton(alpha: Tensor, y: Tensor, q: float) -> tuple[Tensor, Tensor]:
    """Chernoff's bound on a linear vote under random label flips, optimised: (t [m], log_tail [m]).

    Flip each label of y with probability q; the base classifier says 1 where ``alpha @ y >= 1/2``.  The probability
    that it does not say what it says most often, ``1[t >= 0]``, is at most exp(log_tail).  In plain torch, for t > 0,
    ``log_tail = t / 2 + log((1 - q) * exp(-t * alpha * y) + q * exp(-t * alpha * (1 - y))).sum(-1)`` at the t that
    minimises it, and the same formula for t < 0 (Rosenfeld et al. 2020, equation 6).

    log_tail is rounded up: never below the formula's exact value at the returned t, which is a bound for every t, and
    within 1e-12 relative of the optimum where it says more than 1/2.  It can exceed 0 by its rounding allowance (1e-15)
    where nothing can be said.  A double is enough for every q.  Results do not depend on batch, threads or device.  No
    gradient.

    Args:
        alpha: float64 [m, n]: the influence of each label on each test point; a row with NaN or infinity gives NaN.
        y: int64 [n] of 0 and 1 (checked on the CPU; on CUDA anything but 1 counts as 0).
        q: in (0, 1/2), at least 1e-300.

    Raises:
        ValueError: for anything outside these ranges.
    """
    _require_votes(alpha, y, 2, q)
    return operators.chernoff_newton(alpha.detach().contiguous(), y.contiguous(), float(q))


def chernoff_newton_pairs(alpha: Tensor, y: Tensor, pairs: Tensor, q: float, classes: int) -> tuple[Tensor, Tensor]:
    """`chernoff_newton` for pairs of K classes: (t [m, P], log_tail [m, P]).

    A label stays with probability 1 - q and else becomes one of the K - 1 others, all alike.  For the pair (c, d) the
    vote is ``D = (alpha * ((y == c).double() - (y == d).double())).sum(-1)``.  Where t >= 0, P(D <= 0) <=
    exp(log_tail); where t <= 0, P(D >= 0) <= exp(log_tail).  Rounding as for `chernoff_newton`.

    Args:
        alpha: float64 [m, n].
        y: int64 [n], 0 to classes - 1.
        pairs: int64 [m, P, 2] of two different classes each: any P pairs for every row, in one launch.
        q: in (0, (classes - 1) / classes), at least 1e-300.

    Raises:
        ValueError: for anything outside these ranges.
    """
    require(classes >= 2, lambda: f"classes must be at least 2, not {classes}")
    _require_votes(alpha, y, classes, q)
    require(
        pairs.dtype == torch.int64 and pairs.dim() == 3 and pairs.shape[0] == alpha.shape[0] and pairs.shape[2] == 2,
        lambda: f"pairs must be int64 [{alpha.shape[0]}, P, 2], not {pairs.dtype} {tuple(pairs.shape)}",
    )
    require(pairs.device == alpha.device, "pairs must be on the device of alpha")
    if pairs.device.type == "cpu" and not torch.compiler.is_compiling() and pairs.numel() > 0:
        low, high = pairs.aminmax()
        require(0 <= int(low) and int(high) < classes, lambda: f"pairs must hold classes 0 to {classes - 1}")
        require(bool((pairs[..., 0] != pairs[..., 1]).all()), "a pair must be two different classes")
    return operators.chernoff_newton_pairs(
        alpha.detach().contiguous(), y.contiguous(), pairs.contiguous(), float(q), classes
    )


@torch.library.register_fake("pacd_fast::chernoff_newton")
def _(alpha, y, q):
    return alpha.new_empty(alpha.shape[:1]), alpha.new_empty(alpha.shape[:1])


@torch.library.register_fake("pacd_fast::chernoff_newton_pairs")
def _(alpha, y, pairs, q, classes):
    return alpha.new_empty(pairs.shape[:2]), alpha.new_empty(pairs.shape[:2])
