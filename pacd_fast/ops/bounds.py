"""Binomial confidence bounds and normal quantiles, rounded outward."""

from __future__ import annotations

import torch
from torch import Tensor

from pacd_fast.ops.libraries import operators, require, require_device


def _clopper_pearson(k: Tensor, n: Tensor | int, alpha: Tensor | float, upper: bool) -> Tensor:
    require_device(k)
    require(k.dtype == torch.int64, lambda: f"k must be int64, not {k.dtype}")
    n = torch.as_tensor(n, dtype=torch.int64, device=k.device)
    alpha = torch.as_tensor(alpha, dtype=torch.float64, device=k.device)
    k, n, alpha = torch.broadcast_tensors(k, n, alpha)
    if not torch.compiler.is_compiling():
        require(bool(((n >= 1) & (n < 2**31)).all()), "n must be in [1, 2^31)")
        require(bool(((k >= 0) & (k <= n)).all()), "k must be in [0, n]")
        require(bool(((alpha >= 1e-200) & (alpha <= 1 - 2**-20)).all()), "alpha must be in [1e-200, 1 - 2^-20]")
    return operators.clopper_pearson(k.contiguous(), n.contiguous(), alpha.contiguous(), upper)


def clopper_pearson_lower(k: Tensor, n: Tensor | int, alpha: Tensor | float) -> Tensor:
    """The one-sided Clopper-Pearson lower bound of a proportion at level 1 - alpha, rounded down.

    The p with P(Binomial(n, p) >= k) = alpha, ``scipy.stats.beta.ppf(alpha, k, n - k + 1)``; 0 where k = 0.  Never
    above the exact bound and within 2 ULP of it (Clopper and Pearson 1934), the same bits on every device.

    Args:
        k: int64, any shape, 0 <= k <= n; n: 1 <= n < 2^31 and alpha: 1e-200 <= alpha <= 1 - 2^-20, numbers or tensors
            that broadcast with k.  Under torch.compile nothing is checked and a bound outside its range is NaN.

    Returns:
        float64 of the broadcast shape.

    Raises:
        ValueError: for anything outside these ranges.
    """
    return _clopper_pearson(k, n, alpha, False)


def clopper_pearson_upper(k: Tensor, n: Tensor | int, alpha: Tensor | float) -> Tensor:
    """The one-sided Clopper-Pearson upper bound of a proportion at level 1 - alpha, rounded up.

    The p with P(Binomial(n, p) <= k) = alpha, ``scipy.stats.beta.ppf(1 - alpha, k + 1, n - k)``; 1 where k = n.
    Arguments, result and errors as for `clopper_pearson_lower`.
    """
    return _clopper_pearson(k, n, alpha, True)


def normal_quantile(p: Tensor, *, rounding: str = "down") -> Tensor:
    """Phi^-1(p), the standard normal quantile, rounded ``"down"`` or ``"up"``: ``torch.special.ndtri`` as a bound.

    Args:
        p: float64, any shape, in [0, 1]; 0 and 1 give -inf and inf, anything outside NaN.

    Returns:
        float64 of the same shape, never on the wrong side of the exact quantile and within 1 ULP of it for
        p in [1e-280, 1).

    Raises:
        ValueError: for another dtype or rounding.
    """
    require_device(p)
    require(p.dtype == torch.float64, lambda: f"p must be float64, not {p.dtype}")
    require(rounding in ("down", "up"), lambda: f'rounding must be "down" or "up", not {rounding!r}')
    return operators.normal_quantile(p.contiguous(), rounding == "up")


@torch.library.register_fake("pacd_fast::clopper_pearson")
def _(k, n, alpha, upper):
    return k.new_empty(k.shape, dtype=torch.float64)


@torch.library.register_fake("pacd_fast::normal_quantile")
def _(p, up):
    return torch.empty_like(p, memory_format=torch.contiguous_format)
