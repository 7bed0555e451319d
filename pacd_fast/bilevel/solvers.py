"""Linear systems C q = b that are known by products with C alone: the solvers, and how well a system was solved."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pacd_fast.arguments import at_least, not_negative
from pacd_fast.bilevel.krylov import Iterate, Product, cg, gmres, minres

__all__ = ["SOLVERS", "Product", "Solved", "Solver", "SolverWarning", "WarmStart", "solve"]

Solver: TypeAlias = Callable[[Product, Tensor], Tensor]
"""A user's own: (product, b [n]) -> q [n]."""


class SolverWarning(RuntimeWarning):
    """The linear system was not solved to the tolerance, or is singular: the answer is approximate, or worse."""


@dataclass(frozen=True)
class Solved:
    """The answer of a linear system.

    q: [n]; residual: ||C q - b|| / ||b||, damping and rounding counted; products: matrix-vector products spent; steps:
    at most; tolerance: the residual that was asked for; singular: C is, and b is not in its range.
    """

    q: Tensor
    residual: float
    products: int
    steps: int
    tolerance: float = 0.0
    singular: bool = False

    @property
    def diverged(self) -> bool:
        """No better than q = 0, or not finite."""
        return not self.residual < 1.0 - 1e-6

    @property
    def converged(self) -> bool:
        """As good as was asked for; with a tolerance of 0, which asks for all the steps, better than q = 0."""
        return self.residual <= self.tolerance or (self.tolerance == 0 and not self.diverged)

    def warn(self, solver: str, stacklevel: int) -> None:
        """SolverWarning, unless it converged."""
        if self.converged:
            return
        if self.singular:
            message = (
                f"the linear system is singular to rounding, without a solution (residual {self.residual:.3g}): the "
                "answer is that of least squares and least norm; give lower a regulariser, or damping"
            )
        else:
            message = (
                f"{solver} did not solve the linear system: residual {self.residual:.3g}, not {self.tolerance:.3g}, "
                f"after {self.products} products; give more steps, a larger tolerance, a preconditioner, damping or "
                "float64"
            )
        warnings.warn(message, SolverWarning, stacklevel=stacklevel + 1)


class WarmStart:
    """Where a linear system begins: at the answer of the last one that was given this object.

    solved: that answer and its residual, None before the first.  After `backward()` through `implicit` it is where the
    residual can be read.
    """

    def __init__(self) -> None:
        self.solved: Solved | None = None


class _Counted:
    """C + damping I, which counts its products."""

    def __init__(self, product: Product, damping: float) -> None:
        self.product, self.damping, self.calls = product, damping, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        return self.product(v) + self.damping * v if self.damping else self.product(v)


def _adam(a: Product, b: Tensor, q: Tensor, steps: int, tolerance: float, lr: float = 1e-2) -> Iterate:
    """Adam on ||A q - b||^2, as PACD's authors do it: two products a step."""
    m, v = torch.zeros_like(q), torch.zeros_like(q)
    size, residual = b.norm(), math.inf
    for step in range(1, steps + 1):
        r = a(q) - b
        residual = float(r.norm() / size)
        if residual <= tolerance or not math.isfinite(residual):
            return Iterate(q, residual)
        g = 2 * a(r)
        m.lerp_(g, 0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        q = q - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return Iterate(q, float((a(q) - b).norm() / size))


def _neumann(
    a: Product,
    b: Tensor,
    q: Tensor,
    steps: int,
    tolerance: float,
    lr: float | None = None,
    precondition: Product | None = None,
) -> Iterate:
    """The Neumann series, q <- q + lr M (b - A q), M the preconditioner.

    lr is by default 0.9 / the largest eigenvalue of M A, by 8 power iterations.
    """
    size = b.norm()
    if lr is None:
        v = torch.randn(b.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(b)
        largest = v.norm()
        for _ in range(8):
            v = a(v / largest)
            v = v if precondition is None else precondition(v)
            largest = v.norm()
        lr = float(0.9 / largest)
    for _ in range(steps):
        r = b - a(q)
        if float(r.norm() / size) <= tolerance:
            return Iterate(q, float(r.norm() / size))
        q = q + lr * (r if precondition is None else precondition(r))
    return Iterate(q, float((b - a(q)).norm() / size))


def _nystrom(
    a: Product, b: Tensor, q: Tensor, steps: int, tolerance: float, rank: int = 10, damping: float = 0.0
) -> Iterate:
    """Conjugate gradients behind a randomised Nystrom preconditioner (Frangella, Tropp, Udell 2023): rank products."""
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(len(b), rank, generator=generator, dtype=torch.float64).to(b)
    sketch = torch.linalg.qr(sketch).Q
    image = torch.stack([a(column) - damping * column for column in sketch.T], dim=1)
    shift = torch.finfo(b.dtype).eps * float(image.norm()) * math.sqrt(len(b))
    image = image + shift * sketch
    small = sketch.T @ image
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    keep = values > max(float(values.max()), 0.0) * 1e-6  # directions of negative curvature are no use
    if not bool(keep.any()):
        return cg(a, b, q, steps, tolerance)
    factor = (image @ vectors[:, keep]) / values[keep].sqrt()
    basis, singular, _ = torch.linalg.svd(factor, full_matrices=False)
    eigenvalues = (singular**2 - shift).clamp(min=0) + damping
    eigenvalues = eigenvalues.clamp(min=1e-6 * float(eigenvalues.max()))
    least = eigenvalues[-1]

    def precondition(r: Tensor) -> Tensor:
        along = basis.T @ r
        return r + basis @ ((least / eigenvalues - 1) * along)

    return cg(a, b, q, steps, tolerance, precondition)


SOLVERS: dict[str, Callable[..., Iterate]] = {
    "adam": _adam,
    "cg": cg,
    "gmres": gmres,
    "minres": minres,
    "neumann": _neumann,
    "nystrom": _nystrom,
}
SYMMETRIC_ONLY = ("adam", "cg", "minres", "nystrom")
ONE_MATRIX_ONLY = ("cg", "gmres", "minres", "nystrom")
PRECONDITIONED = ("cg", "gmres", "minres", "neumann")


def solve(
    product: Product,
    b: Tensor,
    *,
    solver: str | Solver = "minres",
    steps: int = 100,
    tolerance: float | None = None,
    damping: float = 0.0,
    preconditioner: Product | None = None,
    warm_start: Tensor | WarmStart | None = None,
    **options: Any,
) -> Solved:
    """q with (C + damping I) q ~ b, where product(v) = C v.

    Args:
        product: [n] -> [n]; b: [n].
        solver: "minres" (any symmetric C; Paige and Saunders 1975), "cg" (positive semi-definite C), "nystrom" (the
            same, preconditioned; option rank=10), "neumann" (option lr; its C may differ from product to product),
            "adam" (symmetric C; option lr=1e-2; two products a step), "gmres" (any C; keeps a vector a step); or a
            function (product, b) -> q.
        steps: at most so many; tolerance: stops at this relative residual, by default the square root of the dtype's
            epsilon (3.5e-4 in float32, 1.5e-8 in float64); 0 takes all the steps; from 1 on, stops at the start.
        preconditioner: r -> about C^-1 r, [n] -> [n], symmetric and positive definite for minres and cg; also gmres and
            neumann.
        warm_start: [n], where to begin, by default 0; or a `WarmStart`, which remembers the answer.

    Where b is 0 the answer is 0.  Of a singular system without solution minres finds the answer of least squares and
    least norm (Liu, Milzarek, Roosta 2023), and says `singular`.  An answer that is no better than 0 has `diverged`
    set; it is not repaired, and `solve` itself does not warn.

    Raises:
        ValueError: for an unknown solver or option, steps < 1, damping < 0, or a tolerance out of range.
    """
    check(solver, steps, tolerance, damping, preconditioner)
    if tolerance is None:
        tolerance = math.sqrt(torch.finfo(b.dtype).eps)
    if preconditioner is not None:
        options["precondition"] = preconditioner
    start = _start(warm_start, b)
    largest = float(b.abs().max()) if len(b) else 0.0
    if largest == 0:
        return Solved(torch.zeros_like(b), 0.0, 0, 0, tolerance)
    damped = _Counted(product, damping)
    if solver == "nystrom":
        options["damping"] = damping
    scale = 1.0
    with torch.no_grad():
        if callable(solver):
            q = solver(damped, b, **options)
            products = damped.calls
            found = Iterate(q, float((damped(q) - b).norm() / b.norm()))
        else:
            scale = 1.0 if solver == "adam" else _scale(largest, b.dtype)  # adam's steps have a size of their own
            b = scale * b
            try:
                found = SOLVERS[solver](damped, b, scale * start, steps, tolerance, **options)
            except TypeError as error:
                if "unexpected keyword argument" not in str(error):
                    raise
                raise ValueError(f"{solver}: {error}") from None
            products = damped.calls
        rounding = torch.finfo(b.dtype).eps * found.norm * float(found.q.norm() / b.norm())
        found = dataclasses.replace(found, q=found.q / scale)
    residual = max(found.residual, rounding) if bool(torch.isfinite(found.q).all()) else math.inf
    solved = Solved(found.q, residual, products, steps, tolerance, found.singular)
    if isinstance(warm_start, WarmStart):
        warm_start.solved = solved
    return solved


def _scale(largest: float, dtype: torch.dtype) -> float:
    """The power of two that brings a vector of this largest element near 1 where its squares may vanish or overflow."""
    exponent = -math.frexp(largest)[1]
    if abs(exponent) <= 30:
        return 1.0
    most = max(-math.frexp(torch.finfo(dtype).tiny)[1] - 26, 0)  # itself no overflow
    return 2.0 ** max(min(exponent, most), -most)


def check(
    solver: str | Solver, steps: int, tolerance: float | None, damping: float, preconditioner: Product | None
) -> None:
    """Raises the ValueErrors of `solve`."""
    if not callable(solver) and solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}: give {', '.join(SOLVERS)}, or a function (product, b) -> q")
    at_least("steps", steps, 1)
    if isinstance(damping, Tensor):
        raise ValueError(
            "damping is a number, not a tensor: it steadies the solver and has no gradient; a regulariser whose weight "
            "is in outer belongs into lower"
        )
    not_negative("damping", damping)
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, not {tolerance}")
    if preconditioner is not None and solver not in PRECONDITIONED:
        raise ValueError(f"{solver} takes no preconditioner: give {', '.join(PRECONDITIONED)}, or none")


def _start(warm_start: Tensor | WarmStart | None, b: Tensor) -> Tensor:
    if isinstance(warm_start, WarmStart):
        known = warm_start.solved
        warm_start = None if known is None or known.diverged else known.q
    if warm_start is None:
        return torch.zeros_like(b)
    if warm_start.shape != b.shape:
        raise ValueError(f"warm_start must have shape {tuple(b.shape)}, not {tuple(warm_start.shape)}")
    return warm_start
