"""The gradient of an upper loss through the minimiser of a lower one, by the implicit function theorem.

For inner* = argmin lower(outer, .), d upper / d outer = grad_outer upper - (d^2 lower / d outer d inner) q, where
H q = grad_inner upper and H is the Hessian of lower in inner (Mehra et al. 2021, appendices B and C).  The linear
system is solved with products H v alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pacd_fast.unrolling import unrolled

__all__ = ["CURVATURES", "SOLVERS", "Composite", "Solved", "SolverWarning", "hypergradient", "solve", "unrolled"]

Product = Callable[[Tensor], Tensor]
"""A symmetric matrix times a vector: [n] -> [n]."""


class SolverWarning(RuntimeWarning):
    """The linear system was not solved: the answer is no better than q = 0, or not finite."""


@dataclass(frozen=True)
class Composite:
    """A lower loss as loss(outputs(outer, inner)), which Gauss-Newton products need.

    outputs: (outer, inner) -> Tensor, the network; loss: that Tensor -> scalar, convex in it for a positive
    semi-definite product.  Called like any lower loss it is their composition.
    """

    outputs: Callable[..., Tensor]
    loss: Callable[[Tensor], Tensor]

    def __call__(self, outer: Any, inner: Any, **seed: int) -> Tensor:
        return self.loss(self.outputs(outer, inner, **seed))


@dataclass(frozen=True)
class Solved:
    """q: [n], the solution; residual: ||A q - b|| / ||b||; products: matrix-vector products spent; steps: at most."""

    q: Tensor
    residual: float
    products: int
    steps: int

    @property
    def diverged(self) -> bool:
        """No better than q = 0, or not finite."""
        return not self.residual < 1.0 - 1e-6


class _Counted:
    """A product that counts its calls."""

    def __init__(self, product: Product) -> None:
        self.product, self.calls = product, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        return self.product(v)


def _adam(a: _Counted, b: Tensor, q: Tensor, steps: int, tolerance: float, lr: float = 1e-2) -> tuple[Tensor, float]:
    """Adam on ||A q - b||^2, as PACD's authors do it: two products a step."""
    m, v = torch.zeros_like(q), torch.zeros_like(q)
    size, residual = b.norm(), math.inf
    for step in range(1, steps + 1):
        r = a(q) - b
        residual = float(r.norm() / size)
        if residual <= tolerance or not math.isfinite(residual):
            return q, residual
        g = 2 * a(r)
        m.lerp_(g, 0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        q = q - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return q, float((a(q) - b).norm() / size)


def _cg(
    a: _Counted,
    b: Tensor,
    q: Tensor,
    steps: int,
    tolerance: float,
    precondition: Product = lambda r: r,
) -> tuple[Tensor, float]:
    """Conjugate gradients; stops at a direction of no positive curvature, where they would go astray."""
    r = b - a(q) if bool(q.any()) else b.clone()
    z = precondition(r)
    p, rz, size = z, r.dot(z), b.norm()
    for _ in range(steps):
        if float(r.norm() / size) <= tolerance:
            break
        ap = a(p)
        curvature = p.dot(ap)
        if not bool(curvature > 0):
            if not bool(torch.isfinite(curvature)):
                return q, math.inf
            break
        rate = rz / curvature
        q, r = q + rate * p, r - rate * ap
        z = precondition(r)
        rz, before = r.dot(z), rz
        p = z + (rz / before) * p
    return q, float(r.norm() / size)


def _minres(a: _Counted, b: Tensor, q: Tensor, steps: int, tolerance: float) -> tuple[Tensor, float]:
    """MINRES (Paige and Saunders 1975): the least residual over the Krylov space, for indefinite matrices too."""
    r = b - a(q) if bool(q.any()) else b.clone()
    size, beta = b.norm(), r.norm()
    residual = beta
    if float(residual / size) <= tolerance:
        return q, float(residual / size)
    v, before = r / beta, torch.zeros_like(b)
    d1, d2 = torch.zeros_like(b), torch.zeros_like(b)
    c, s, c_old, s_old, beta_k = 1.0, 0.0, 1.0, 0.0, 0.0
    phi = float(beta)
    for _ in range(steps):
        w = a(v)
        alpha = float(v.dot(w))
        w = w - alpha * v - beta_k * before
        beta_next = float(w.norm())
        # the new column of the tridiagonal matrix, by the two last rotations and a new one
        epsilon, bar = s_old * beta_k, c_old * beta_k
        delta, gamma_bar = c * bar + s * alpha, -s * bar + c * alpha
        gamma = math.hypot(gamma_bar, beta_next)
        if gamma == 0:
            break
        c_old, s_old, c, s = c, s, gamma_bar / gamma, beta_next / gamma
        d1, d2 = (v - delta * d1 - epsilon * d2) / gamma, d1
        q = q + c * phi * d1
        phi = -s * phi
        residual = abs(phi)
        if residual / float(size) <= tolerance or beta_next == 0:
            break
        before, v, beta_k = v, w / beta_next, beta_next
    return q, float(residual / size)


def _neumann(
    a: _Counted, b: Tensor, q: Tensor, steps: int, tolerance: float, lr: float | None = None
) -> tuple[Tensor, float]:
    """The Neumann series, q <- q + lr (b - A q); lr by default 0.9 / the largest eigenvalue, by 8 power iterations."""
    size = b.norm()
    if lr is None:
        v = torch.randn(b.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(b)
        largest = v.norm()
        for _ in range(8):
            v = a(v / largest)
            largest = v.norm()
        lr = float(0.9 / largest)
    for _ in range(steps):
        r = b - a(q)
        if float(r.norm() / size) <= tolerance:
            return q, float(r.norm() / size)
        q = q + lr * r
    return q, float((b - a(q)).norm() / size)


def _nystrom(
    a: _Counted, b: Tensor, q: Tensor, steps: int, tolerance: float, rank: int = 10, damping: float = 0.0
) -> tuple[Tensor, float]:
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
        return _cg(a, b, q, steps, tolerance)
    factor = (image @ vectors[:, keep]) / values[keep].sqrt()
    basis, singular, _ = torch.linalg.svd(factor, full_matrices=False)
    eigenvalues = (singular**2 - shift).clamp(min=0) + damping
    eigenvalues = eigenvalues.clamp(min=1e-6 * float(eigenvalues.max()))
    least = eigenvalues[-1]

    def precondition(r: Tensor) -> Tensor:
        along = basis.T @ r
        return r + basis @ ((least / eigenvalues - 1) * along)

    return _cg(a, b, q, steps, tolerance, precondition)


SOLVERS: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "adam": _adam,
    "cg": _cg,
    "minres": _minres,
    "neumann": _neumann,
    "nystrom": _nystrom,
}
CURVATURES = ("hessian", "gauss-newton")


def solve(
    product: Product,
    b: Tensor,
    *,
    solver: str = "cg",
    steps: int = 10,
    tolerance: float = 1e-3,
    damping: float = 0.0,
    warm_start: Tensor | None = None,
    **options: Any,
) -> Solved:
    """q with (C + damping I) q ~ b, where product(v) = C v and C is symmetric.

    Args:
        product: [n] -> [n]; b: [n].
        solver: adam (option lr=1e-2; two products a step), cg (for a positive semi-definite C), minres (any symmetric
            C), neumann (option lr), nystrom (option rank=10; conjugate gradients, preconditioned).
        steps: at most so many; tolerance: stops at this relative residual; from 1 on, at the start.
        warm_start: [n], where to begin; by default 0.

    Where b is 0 the answer is 0.  An answer that is no better than 0 has `diverged` set; it is not repaired.

    Raises:
        ValueError: for an unknown solver, steps < 1, damping < 0, or a tolerance out of range.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}: give {', '.join(SOLVERS)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping must be finite and not negative, not {damping}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, not {tolerance}")
    if not bool(b.any()):
        return Solved(torch.zeros_like(b), 0.0, 0, 0)
    damped = _Counted(lambda v: product(v) + damping * v)
    if solver == "nystrom":
        options["damping"] = damping
    start = torch.zeros_like(b) if warm_start is None else warm_start
    with torch.no_grad():
        q, residual = SOLVERS[solver](damped, b, start, steps, tolerance, **options)
    if not bool(torch.isfinite(q).all()):
        residual = math.inf
    return Solved(q, residual, damped.calls, steps)


def _tuple(tensors: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _shaped(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in like]), like, strict=True)]


def _gradients(value: Tensor, at: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """Gradients, zeros where the value does not depend on a tensor."""
    if not value.requires_grad:
        return [torch.zeros_like(t) for t in at]
    found = torch.autograd.grad(value, at, allow_unused=True, **options)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, at, strict=True)]


def _along(values: Sequence[Tensor], at: Sequence[Tensor], directions: Sequence[Tensor]) -> list[Tensor]:
    """d <values, directions> / d at, zeros where there is no dependence."""
    pairs = [(value, direction) for value, direction in zip(values, directions, strict=True) if value.requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in at]
    outputs, weights = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, at, grad_outputs=weights, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, at, strict=True)]


def _tangent(outputs: Callable[[tuple[Tensor, ...]], Tensor], inner: Sequence[Tensor], v: Sequence[Tensor]) -> Any:
    """outputs(inner) and its derivative along v, by dual numbers: for residual networks several times faster than the
    backward pass of a backward pass, whose convolutions are slow on a CPU."""
    with forward_ad.dual_level():
        dual = outputs(tuple(forward_ad.make_dual(p.detach(), w) for p, w in zip(inner, v, strict=True)))
        value, tangent = forward_ad.unpack_dual(dual)
    return value, torch.zeros_like(value) if tangent is None else tangent


def _gauss_newton(
    lower: Composite, outputs: Callable[[tuple[Tensor, ...]], Tensor], value: Tensor, inner: tuple[Tensor, ...]
) -> Product:
    """v -> J^T (d^2 loss / d outputs^2) J v, J the derivative of the outputs in inner; value: outputs(inner)."""
    leaf = value.detach().requires_grad_()
    (slope,) = torch.autograd.grad(lower.loss(leaf), leaf, create_graph=True)

    def product(v: Tensor) -> Tensor:
        with torch.no_grad():
            _, pushed = _tangent(outputs, inner, _shaped(v, inner))
        (bent,) = _along([slope], [leaf], [pushed])
        return _flat(_along([value], inner, [bent]))

    return product


def _mixed(
    lower: Composite, outputs: Callable[[tuple[Tensor, ...]], Tensor], inner: Sequence[Tensor], outer: Sequence[Tensor],
    q: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    """d <d loss(outputs) / d inner, q> / d outer = d <d loss / d outputs, J q> / d outer."""
    value, pushed = _tangent(outputs, inner, q)
    if not value.requires_grad:  # the outputs do not depend on outer
        return [torch.zeros_like(t) for t in outer]
    (slope,) = torch.autograd.grad(lower.loss(value), value, create_graph=True)
    return _gradients((slope * pushed).sum(), outer)


def hypergradient(
    upper: Callable[..., Tensor],
    lower: Callable[..., Tensor],
    outer: Any,
    inner: Any,
    *,
    solver: str = "cg",
    curvature: str = "gauss-newton",
    damping: float = 1e-3,
    steps: int = 10,
    tolerance: float = 1e-3,
    warm_start: Tensor | None = None,
    seed: int | None = None,
    with_solution: bool = False,
    **options: Any,
) -> Any:
    """d upper(outer, inner*(outer)) / d outer at inner, taken for the minimiser of lower(outer, .).

    Args:
        upper, lower: (outer, inner) -> scalar; for a network, inner are its parameters and the pass is
            torch.func.functional_call.  With `seed` they are called with seed=seed besides: every product must see the
            same noise, or the linear system is another one each time.
        outer, inner: a tensor or a sequence of tensors, as the losses take them.
        solver, steps, tolerance, warm_start, options: see `solve`.
        curvature: "hessian" of lower, exact but indefinite away from a minimum (then take minres), or "gauss-newton",
            positive semi-definite, for a lower that is a `Composite`, whose outputs must have forward-mode derivatives
            (torch's own operators have).
        damping: added to the curvature's diagonal.
        with_solution: return (gradient, Solved, upper's value, lower's value); Solved.q is the next warm start.

    Returns the gradient, in the form of `outer`.  Warns with SolverWarning where the linear system was not solved:
    give more steps or damping, or another solver.

    Raises:
        ValueError: see `solve`; unknown curvature; gauss-newton for a lower that is no `Composite`.
    """
    if curvature not in CURVATURES:
        raise ValueError(f"unknown curvature {curvature!r}: give {' or '.join(CURVATURES)}")
    if curvature == "gauss-newton" and not isinstance(lower, Composite):
        raise ValueError("gauss-newton needs a lower loss that is a bilevel.Composite; or give curvature='hessian'")
    outers = tuple(t.detach().requires_grad_() for t in _tuple(outer))
    inners = tuple(t.detach().requires_grad_() for t in _tuple(inner))
    u = outers[0] if isinstance(outer, Tensor) else outers
    v = inners[0] if isinstance(inner, Tensor) else inners

    noise = {} if seed is None else {"seed": seed}
    composite = lower if isinstance(lower, Composite) and curvature == "gauss-newton" else None

    def outputs(at: tuple[Tensor, ...]) -> Tensor:
        assert composite is not None
        return composite.outputs(u, at[0] if isinstance(inner, Tensor) else at, **noise)

    with torch.enable_grad():
        cost = upper(u, v, **noise)
        direct = _gradients(cost, (*outers, *inners))
        b = _flat(direct[len(outers) :])
        if composite is not None:
            value = outputs(inners)
            training = composite.loss(value.detach())
            product = _gauss_newton(composite, outputs, value, inners)
        else:
            training = lower(u, v, **noise)
            slope = _gradients(training, inners, create_graph=True)

            def product(w: Tensor) -> Tensor:
                return _flat(_along(slope, inners, _shaped(w, inners)))

        found = solve(
            product,
            b,
            solver=solver,
            steps=steps,
            tolerance=tolerance,
            damping=damping,
            warm_start=warm_start,
            **options,
        )
        if found.diverged:
            warnings.warn(
                f"{solver} did not solve the linear system: residual {found.residual:.3g} after {steps} steps; give "
                "more steps or damping, minres for the Hessian, or cg with gauss-newton",
                SolverWarning,
                stacklevel=2,
            )
        answer = _shaped(found.q, inners)
        if composite is not None:
            mixed = _mixed(composite, outputs, inners, outers, answer)
        else:
            mixed = _along(slope, outers, answer)
    gradient = tuple((g - m).detach() for g, m in zip(direct, mixed, strict=False))
    result = gradient[0] if isinstance(outer, Tensor) else gradient
    return (result, found, cost.detach(), training.detach()) if with_solution else result
