"""Hypergradients and unrolled steps as a user of each library writes them, around one upper and one lower loss.

Every function here is what stands in that user's file: benchmarks/bench_bilevel.py counts its lines and times it.  The
linear system's solution is heard by listening in (`solution`), never while the clock runs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from pacd_fast import bilevel


@dataclass(frozen=True)
class Problem:
    """upper, lower: (outer, inner) -> scalar, outer a tensor, inner a tuple; composite: lower, for Gauss-Newton."""

    upper: Callable[..., Tensor]
    lower: Callable[..., Tensor]
    composite: bilevel.Composite
    outer: Tensor
    inner: tuple[Tensor, ...]


def ours_hessian(p: Problem, products: int) -> Tensor:
    return bilevel.hypergradient(p.upper, p.lower, p.outer, p.inner, steps=products, tolerance=0.0)


def ours_gauss_newton(p: Problem, products: int) -> Tensor:
    return bilevel.hypergradient(p.upper, p.composite, p.outer, p.inner, steps=products, tolerance=0.0)


def ours_bfloat16(p: Problem, products: int) -> Tensor:
    return bilevel.hypergradient(
        p.upper, p.composite, p.outer, p.inner, steps=products, tolerance=0.0, dtype=torch.bfloat16
    )


def ours_implicit(p: Problem, products: int) -> Tensor:
    outer = p.outer.clone().requires_grad_()
    p.upper(outer, bilevel.implicit(p.lower, outer, p.inner, steps=products, tolerance=0.0)).backward()
    return outer.grad


def plain(p: Problem, products: int) -> Tensor:
    outer = p.outer.clone().requires_grad_()
    inner = [w.detach().requires_grad_() for w in p.inner]
    direct, *b = torch.autograd.grad(p.upper(outer, tuple(inner)), [outer, *inner], allow_unused=True)
    slopes = torch.autograd.grad(p.lower(outer, tuple(inner)), inner, create_graph=True)
    q, r = [torch.zeros_like(w) for w in b], b
    direction, rr = r, sum((w * w).sum() for w in r)
    for _ in range(products):
        image = torch.autograd.grad(slopes, inner, direction, retain_graph=True)
        rate = rr / sum((d * w).sum() for d, w in zip(direction, image, strict=True))
        q = [w + rate * d for w, d in zip(q, direction, strict=True)]
        r = [w - rate * d for w, d in zip(r, image, strict=True)]
        rr, before = sum((w * w).sum() for w in r), rr
        direction = [w + rr / before * d for w, d in zip(r, direction, strict=True)]
    (mixed,) = torch.autograd.grad(slopes, outer, q)
    return -mixed if direct is None else direct - mixed


def with_torchopt(p: Problem, products: int) -> Tensor:
    import torchopt

    slope = torch.func.grad(lambda w, u: p.lower(u, w))
    solver = torchopt.linear_solve.solve_cg(maxiter=products, rtol=0.0)

    @torchopt.diff.implicit.custom_root(slope, argnums=1, solve=solver)
    def fitted(w: tuple[Tensor, ...], u: Tensor) -> tuple[Tensor, ...]:
        return w

    outer = p.outer.clone().requires_grad_()
    p.upper(outer, fitted(p.inner, outer)).backward()
    return outer.grad


def with_betty(p: Problem, products: int) -> Tensor:
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    class Upper(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return p.upper(self.module[0], tuple(self.lower.module))

    class Lower(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return p.lower(self.upper.module[0], tuple(self.module))

    outer, inner = nn.ParameterList([p.outer.clone()]), nn.ParameterList(w.clone() for w in p.inner)
    upper = Upper("upper", Config(), outer, torch.optim.SGD(outer.parameters(), lr=1.0), None, [(p.outer,)])
    config = Config(type="cg", cg_iterations=products, retain_graph=True)
    lower = Lower("lower", config, inner, torch.optim.SGD(inner.parameters(), lr=0.0), None, [(p.outer,)])
    Engine([upper, lower], EngineConfig(train_iters=1), {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}).run()
    return p.outer - outer[0].detach()


def with_hypergrad(p: Problem, products: int) -> Tensor:
    from hypergrad.approx_hypergrad import conjugate_gradient

    def lower(w: tuple[Tensor, ...], u: tuple[Tensor]) -> Tensor:
        return p.lower(u[0], w)

    def upper(w: tuple[Tensor, ...], u: tuple[Tensor]) -> Tensor:
        return p.upper(u[0], w)

    return conjugate_gradient(lower, upper, p.inner, (p.outer,), num_iters=products, lr=1.0)[0]


IMPLICIT = {
    "ours, MINRES, Hessian (the default of a plain loss)": ours_hessian,
    "ours, MINRES, Gauss-Newton (the default of a Composite)": ours_gauss_newton,
    "ours, the same in bfloat16": ours_bfloat16,
    "ours, implicit(...) and backward()": ours_implicit,
    "plain torch, conjugate gradients": plain,
    "torchopt custom_root, solve_cg": with_torchopt,
    "betty ImplicitProblem, cg": with_betty,
    "hypergrad (moskomule) conjugate_gradient": with_hypergrad,
}


def unrolled_by_us(p: Problem, steps: int) -> Tensor:
    return bilevel.unrolled(p.upper, p.lower, p.outer, p.inner, steps=steps, lr=0.05).gradient


def unrolled_in_chunks(p: Problem, steps: int) -> Tensor:
    return bilevel.unrolled(p.upper, p.lower, p.outer, p.inner, steps=steps, lr=0.05, checkpoint=True).gradient


def unrolled_plainly(p: Problem, steps: int) -> Tensor:
    outer, inner = p.outer.clone().requires_grad_(), tuple(w.detach().requires_grad_() for w in p.inner)
    for _ in range(steps):
        slopes = torch.autograd.grad(p.lower(outer, inner), inner, create_graph=True)
        inner = tuple(w - 0.05 * g for w, g in zip(inner, slopes, strict=True))
    return torch.autograd.grad(p.upper(outer, inner), outer)[0]


def unrolled_by_higher(p: Problem, steps: int) -> Tensor:
    import higher

    outer, inner = p.outer.clone().requires_grad_(), [w.detach().requires_grad_() for w in p.inner]
    optimizer = higher.get_diff_optim(torch.optim.SGD(inner, lr=0.05), inner)
    for _ in range(steps):
        inner = optimizer.step(p.lower(outer, tuple(inner)), params=inner)
    return torch.autograd.grad(p.upper(outer, tuple(inner)), outer)[0]


def unrolled_by_torchopt(p: Problem, steps: int) -> Tensor:
    import torchopt

    module, outer = nn.ParameterList(w.clone() for w in p.inner), p.outer.clone().requires_grad_()
    optimizer = torchopt.MetaSGD(module, lr=0.05)
    for _ in range(steps):
        optimizer.step(p.lower(outer, tuple(module)))
    return torch.autograd.grad(p.upper(outer, tuple(module)), outer)[0]


UNROLLING = {
    "ours": unrolled_by_us,
    "ours, checkpoint=True": unrolled_in_chunks,
    "plain torch": unrolled_plainly,
    "higher get_diff_optim": unrolled_by_higher,
    "torchopt MetaSGD": unrolled_by_torchopt,
}
NOT_INSTALLED = {"prolearner's hypertorch": "not on PyPI, where that name is a library for hypergraphs"}
PACKAGES = {"torchopt": "torchopt", "betty": "betty-ml", "hypergrad": "hypergrad", "higher": "higher"}


def version(name: str) -> str:
    """Of the library that a contender's name begins with; raises ImportError where it is not there."""
    package = PACKAGES.get(name.split()[0])
    if package is None:
        return "-" if name.startswith("ours") else torch.__version__
    importlib.import_module(name.split()[0])
    return importlib.metadata.version(package)


def lines(contender: Callable[..., Any]) -> int:
    """Lines of code of its body, without blank ones and imports."""
    body = inspect.getsource(contender).splitlines()[1:]
    code = [line.strip() for line in body if line.strip()]
    return sum(not line.startswith(("import ", "from ", "@")) for line in code)


def solution(contender: Callable[..., Any], p: Problem, products: int) -> Tensor:
    """Runs a contender and returns the q [n] that it ended its linear system with."""
    heard: list[Tensor] = []

    def listening(function: Callable[..., Any], found: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            heard[:] = found(result, arguments, options) or heard
            return result

        return call

    def direction(result: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> list[Tensor] | None:
        return options.get("grad_outputs", arguments[2] if len(arguments) > 2 else None)

    if contender is with_hypergrad:
        module = importlib.import_module("hypergrad.approx_hypergrad")
        solver = module.conjugate_gradient.__wrapped__
        q, _ = solver(lambda w, u: p.lower(u[0], w), lambda w, u: p.upper(u[0], w), p.inner, (p.outer,), products, 1.0)
        heard.extend(q)
    elif contender in (plain, with_betty):  # their last backward pass is along q
        with mock.patch("torch.autograd.grad", listening(torch.autograd.grad, direction)):
            contender(p, products)
    elif contender is with_torchopt:  # whose system has the negative right-hand side
        module = importlib.import_module("torchopt.linear_solve")
        real = module.solve_cg

        def solve_cg(**options: Any) -> Callable[..., Any]:
            return listening(real(**options), lambda result, *_: [-t for t in result])

        with mock.patch.object(module, "solve_cg", solve_cg):
            contender(p, products)
    else:
        module = importlib.import_module("pacd_fast.bilevel.hypergradients")
        with mock.patch.object(module, "solve", listening(module.solve, lambda result, *_: [result.q])):
            contender(p, products)
    return torch.cat([t.detach().reshape(-1) for t in heard])
