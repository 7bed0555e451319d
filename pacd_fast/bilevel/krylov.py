"""Krylov methods for C q = b: conjugate gradients, MINRES, GMRES."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Iterate", "Product", "cg", "gmres", "minres"]

Product: TypeAlias = Callable[[Tensor], Tensor]
"""A matrix times a vector: [n] -> [n]."""


@dataclass(frozen=True)
class Iterate:
    """What a solver ended with.

    q: [n]; residual: ||A q - b|| / ||b||, of a Krylov method as its recursion has it; norm: about ||A||, from below, or
    0;
    singular: A is, and q solves A q = b in the least squares only.
    """

    q: Tensor
    residual: float
    norm: float = 0.0
    singular: bool = False


def cg(a: Product, b: Tensor, q: Tensor, steps: int, tolerance: float, precondition: Product | None = None) -> Iterate:
    """Conjugate gradients; stops at a direction of no positive curvature, where they would go astray."""
    q, r = _begin(a, b, q)
    z = r if precondition is None else precondition(r)
    p, rz, size, norm = z, r.dot(z), b.norm(), 0.0
    for _ in range(steps):
        if float(r.norm() / size) <= tolerance:
            break
        ap = a(p)
        curvature = p.dot(ap)
        if not bool(curvature > 0):
            if not bool(torch.isfinite(curvature)):
                return Iterate(q, math.inf)
            break
        rate = rz / curvature
        if precondition is None:
            norm = max(norm, 1 / float(rate))
        q, r = q + rate * p, r - rate * ap
        z = r if precondition is None else precondition(r)
        rz, before = r.dot(z), rz
        p = z + (rz / before) * p
    return Iterate(q, float(r.norm() / size), norm)


def minres(
    a: Product, b: Tensor, q: Tensor, steps: int, tolerance: float, precondition: Product | None = None
) -> Iterate:
    """MINRES (Paige and Saunders 1975): the least residual over the Krylov space, for indefinite matrices too.

    With a preconditioner M it is the least in the norm r . M r; the stopping test sees the residual itself.
    """
    q, r = _begin(a, b, q)
    z = r if precondition is None else precondition(r)
    beta = r.norm() if precondition is None else _root(r.dot(z))
    size, phi, residual = torch.stack([b.norm(), beta, r.norm()]).tolist()
    residual = residual / size
    if residual <= tolerance:
        return Iterate(q, residual)
    p, p_before = r / beta, torch.zeros_like(b)  # Lanczos vectors: p of residuals, v = M p of solutions
    v = p if precondition is None else z / beta
    if precondition is None:
        r = p  # not needed again: a vector less while products run, as below
    del z
    d1, d2 = torch.zeros_like(b), torch.zeros_like(b)
    c, s, c_old, s_old, beta_k = 1.0, 0.0, 1.0, 0.0, 0.0
    norm, singular = 0.0, False
    epsilon_a = torch.finfo(b.dtype).eps ** 0.75
    for _ in range(steps):
        w = a(v)
        along = v.dot(w)
        w = w - along * p - beta_k * p_before
        z = w if precondition is None else precondition(w)
        across = w.norm() if precondition is None else _root(w.dot(z))
        alpha, beta_next = torch.stack([along, across]).tolist()  # the one wait of a step
        # the new column of the tridiagonal matrix, by the two last rotations and a new one
        epsilon, bar = s_old * beta_k, c_old * beta_k
        delta, gamma_bar = c * bar + s * alpha, -s * bar + c * alpha
        gamma = math.hypot(gamma_bar, beta_next)
        norm = max(norm, math.hypot(alpha, beta_k, beta_next))
        if math.hypot(gamma_bar, c * beta_next) <= epsilon_a * norm:  # ||A r|| <= epsilon ||A|| ||r||
            singular = residual > math.sqrt(torch.finfo(b.dtype).eps)
            break
        c_old, s_old, c, s = c, s, gamma_bar / gamma, beta_next / gamma
        d1, d2 = (v - delta * d1 - epsilon * d2) / gamma, d1
        q = q + c * phi * d1
        phi = -s * phi
        if precondition is None:
            residual = abs(phi) / size
        if beta_next == 0:
            break
        p_before, p, beta_k = p, w / beta_next, beta_next
        v = p
        if precondition is not None:
            v, r = z / beta_next, s * s * r + c * phi * p
            residual = float(r.norm()) / size
        del w, z
        if residual <= tolerance:
            break
    if singular and precondition is None:  # the part of q along the residual is in the null space: leave it out
        r = b - a(q)
        q, residual = q - (r.dot(q) / r.dot(r)) * r, float(r.norm()) / size
    return Iterate(q, residual, norm if precondition is None else 0.0, singular)


def gmres(
    a: Product, b: Tensor, q: Tensor, steps: int, tolerance: float, precondition: Product | None = None
) -> Iterate:
    """GMRES (Saad and Schultz 1986), preconditioned from the right: the least residual for any matrix.

    It keeps a vector a step.
    """
    q, r = _begin(a, b, q)
    size, beta = float(b.norm()), float(r.norm())
    if beta / size <= tolerance:
        return Iterate(q, beta / size)
    basis, right = [r / beta], [beta]
    columns: list[list[float]] = []
    rotations: list[tuple[float, float]] = []
    norm = 0.0
    for _ in range(steps):
        w = a(basis[-1] if precondition is None else precondition(basis[-1]))
        column = []
        for each in basis:
            column.append(float(each.dot(w)))
            w = w - column[-1] * each
        column.append(float(w.norm()))
        norm, beta = max(norm, math.hypot(*column)), column[-1]
        for i, (c, s) in enumerate(rotations):
            column[i], column[i + 1] = c * column[i] + s * column[i + 1], -s * column[i] + c * column[i + 1]
        length = math.hypot(column[-2], column[-1])
        if not length > torch.finfo(b.dtype).eps * norm:  # the new direction adds nothing: A is singular, or not finite
            break
        c, s = column[-2] / length, column[-1] / length
        rotations.append((c, s))
        columns.append([*column[:-2], length])
        right[-1:] = [c * right[-1], -s * right[-1]]
        if abs(right[-1]) / size <= tolerance or beta <= torch.finfo(b.dtype).eps * norm:
            break
        basis.append(w / beta)
    weights = [0.0] * len(columns)
    for i in reversed(range(len(columns))):
        known = sum(columns[j][i] * weights[j] for j in range(i + 1, len(columns)))
        weights[i] = (right[i] - known) / columns[i][i]
    move = sum((y * each for y, each in zip(weights, basis, strict=False)), torch.zeros_like(b))
    q = q + (move if precondition is None else precondition(move))
    return Iterate(q, abs(right[-1]) / size, norm if precondition is None else 0.0)


def _begin(a: Product, b: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Where to begin, with its residual: at q, unless that is far worse than 0, as where b nearly vanished since."""
    if not bool(q.any()):
        return q, b.clone()
    r = b - a(q)
    near = r.norm() <= 10 * b.norm()  # not so where q is not finite
    return torch.where(near, q, 0), torch.where(near, r, b)


def _root(square: Tensor) -> Tensor:
    """The norm of a residual in the preconditioner's inner product."""
    if not bool(square >= 0):
        raise ValueError("the preconditioner is not positive definite: minres needs r . M r > 0; or give gmres")
    return square.sqrt()
