"""The gradient of an upper loss through the answer of a lower problem, by the implicit function theorem.

For inner*(outer) with F(outer, inner*) = 0, d upper / d outer = grad_outer upper - (dF / d outer)^T q, where
(dF / d inner)^T q = grad_inner upper.  Where inner* minimises a lower loss, F is its gradient and dF / d inner its
Hessian (Mehra et al. 2021, appendices B and C).  The linear system is solved with products alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pacd_fast.bilevel.conditions import CURVATURES, FixedPoint, Root, filled, gradients, linearised
from pacd_fast.bilevel.solvers import ONE_MATRIX_ONLY, SYMMETRIC_ONLY, Product, Solved, Solver, WarmStart, check, solve
from pacd_fast.bilevel.trees import Arguments, Tree, flat, leaves, rebuilt

__all__ = ["hypergradient", "implicit"]


def hypergradient(
    upper: Callable[..., Tensor],
    lower: Any,
    outer: Tree,
    inner: Tree,
    *,
    solver: str | Solver | None = None,
    curvature: str | None = None,
    damping: float = 0.0,
    steps: int = 100,
    tolerance: float | None = None,
    preconditioner: Product | None = None,
    warm_start: Tensor | WarmStart | None = None,
    seed: int | None = None,
    group: Any = None,
    dtype: torch.dtype | None = None,
    with_solution: bool = False,
    **options: Any,
) -> Any:
    """d upper(outer, inner*(outer)) / d outer at inner, taken for the answer of the lower problem.

    Args:
        upper: (outer, inner) -> scalar.
        lower: a loss (outer, inner) -> scalar that inner minimises, or a `Composite`, `FixedPoint`, `Root`; or an
            iterable of one of these, minibatches: each product takes the next one, and the mixed derivative one more.
        outer, inner: a floating-point tensor; a tuple, list or dict of such; or a module, which stands for its
            parameters that require grad.  The losses are called with the same forms; a module is handed on with the
            values in place.
        solver, steps, tolerance, preconditioner, warm_start, options: see `solve`.  The default solver is minres; gmres
            for a FixedPoint or Root; neumann for minibatches, since Krylov methods need one matrix.
        curvature: "hessian" of lower (the default for a plain loss), exact, but indefinite away from a minimum; or
            "gauss-newton" (the default for a `Composite`), positive semi-definite; its outputs must have forward-mode
            derivatives (torch's own operators have).
        damping: added to the diagonal: it biases the answer and has no gradient.  The weight of a regulariser is an
            outer variable, or a number, in lower.
        seed: upper and lower are called with seed=seed besides: every product must see the same noise, or the linear
            system is another one each time.
        group: a torch.distributed process group whose ranks hold parts of the data and the same outer and inner: the
            losses are the means of the ranks' losses, the result is the same everywhere.
        dtype: torch.bfloat16 runs the products' matrix multiplications and convolutions in it (autocast), and keeps
            float32 sums; vectors, the right-hand side and the mixed derivative stay as they are.  The residual is taken
            with one product of full precision.
        with_solution: return (gradient, Solved, upper's value, lower's value or None).

    Returns the gradient, in the form of `outer`; in the place of a module stands a dict of its parameters by name.
    Warns with SolverWarning where the linear system was not solved to the tolerance.

    Raises:
        ValueError: see `solve`; for an unknown curvature, or gauss-newton for a lower that is no `Composite`; a solver
            that does not fit the problem; a lower that does not depend on outer; damping where a tensor of outer has no
            part in lower (a regulariser that was left to damping has no gradient).
    """
    u, v = _detached(outer, "outer"), _detached(inner, "inner")
    noise = {} if seed is None else {"seed": seed}
    settings = dict(
        solver=solver, damping=damping, steps=steps, tolerance=tolerance, preconditioner=preconditioner,
        warm_start=warm_start, **options,
    )  # fmt: skip
    problem = _Problem(lower, outer, inner, noise, curvature, settings, group, dtype)
    with torch.enable_grad():
        cost = problem.arguments.call(upper, u, v)
        direct = gradients(cost, [*u, *v])
        b, direct, cost = flat(direct[len(u) :]), direct[: len(u)], cost.detach()
        mixed, found, training = problem.pull_back(u, v, b, [True] * len(u))
    found.warn(problem.solver_name, stacklevel=2)
    mean = _Mean(group)
    gradient = [mean(g).detach() - m.detach() for g, m in zip(direct, mixed, strict=True)]
    result = rebuilt(outer, gradient)
    return (result, found, mean(cost), training) if with_solution else result


def implicit(
    lower: Any,
    outer: Tree,
    inner: Tree,
    *,
    solver: str | Solver | None = None,
    curvature: str | None = None,
    damping: float = 0.0,
    steps: int = 100,
    tolerance: float | None = None,
    preconditioner: Product | None = None,
    warm_start: Tensor | WarmStart | None = None,
    seed: int | None = None,
    group: Any = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Tree:
    """The answer inner of a lower problem as a function of outer that autograd knows.

    The values are those of `inner`, found in any way; `backward()` of whatever is computed from them solves one linear
    system and adds to `.grad` of the tensors of outer that require grad.

    A regulariser's weight that gets better (ridge regression, whose answer has a closed form)::

        >>> import torch
        >>> from pacd_fast import bilevel
        >>> draw = torch.Generator().manual_seed(0)
        >>> x, x_val, truth = (torch.randn(n, 20, generator=draw) for n in (22, 500, 1))
        >>> y, y_val = x @ truth[0] + torch.randn(22, generator=draw), x_val @ truth[0]
        >>> def lower(log_l2, w):
        ...     return (x @ w - y).square().mean() + log_l2.exp() * w.square().sum()
        >>> log_l2 = torch.tensor(-7.0, requires_grad=True)
        >>> optimizer = torch.optim.Adam([log_l2], lr=0.3)
        >>> for step in range(25):
        ...     w = torch.linalg.solve(x.T @ x / 22 + log_l2.detach().exp() * torch.eye(20), x.T @ y / 22)
        ...     loss = (x_val @ bilevel.implicit(lower, log_l2, w) - y_val).square().mean()
        ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
        ...     if step in (0, 24):
        ...         print(f"log_l2 {log_l2.item():.1f}, error of validation {loss.item():.1f}")
        log_l2 -6.7, error of validation 30.9
        log_l2 -4.4, error of validation 5.1

    Args:
        lower, outer, inner and the rest: see `hypergradient`.  `warm_start`, a `WarmStart`, has the residual of the
            last `backward()` in `solved`.  With `group` a rank's part in `.grad` is already the mean over the ranks.

    Returns a tree like `inner`, of tensors of their own; in the place of a module a dict of its parameters by name,
    which torch.func.functional_call takes.

    Raises:
        ValueError: see `hypergradient`; what only the linear system shows is raised by `backward()`.
        RuntimeError: in `backward(create_graph=True)`: it can be differentiated once.
    """
    known, v = leaves(outer, "outer"), leaves(inner, "inner")
    noise = {} if seed is None else {"seed": seed}
    settings = dict(
        solver=solver, damping=damping, steps=steps, tolerance=tolerance, preconditioner=preconditioner,
        warm_start=warm_start, **options,
    )  # fmt: skip
    problem = _Problem(lower, outer, inner, noise, curvature, settings, group, dtype)
    return rebuilt(inner, _Answer.apply(problem, len(known), *known, *[w.detach() for w in v]))


class _Answer(torch.autograd.Function):
    """(outer's tensors, inner's tensors) -> inner's tensors, whose backward pass solves the linear system."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.problem, ctx.count = problem, count
        ctx.save_for_backward(*tensors)
        return tuple(w.clone() for w in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("implicit can be differentiated once: leave create_graph out")
        tensors = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        u, v = tensors[: ctx.count], tensors[ctx.count :]
        wanted = ctx.needs_input_grad[2 : 2 + ctx.count]
        with torch.enable_grad():
            mixed, found, _ = ctx.problem.pull_back(u, v, flat(slopes), wanted)
        found.warn(ctx.problem.solver_name, stacklevel=2)
        parts = [-m.detach() if needed else None for m, needed in zip(mixed, wanted, strict=True)]
        return None, None, *parts, *[None] * len(v)


@dataclass
class _Problem:
    """A lower problem, and how its linear systems are solved; settings: of `solve`."""

    lower: Any
    outer: Tree
    inner: Tree
    noise: dict[str, int]
    curvature: str | None
    settings: dict[str, Any]
    group: Any
    dtype: torch.dtype | None

    def __post_init__(self) -> None:
        if self.curvature is not None and self.curvature not in CURVATURES:
            raise ValueError(f"unknown curvature {self.curvature!r}: give {' or '.join(CURVATURES)}")
        self.minibatches = isinstance(self.lower, Iterable) and not callable(self.lower)
        if not (callable(self.lower) or self.minibatches or isinstance(self.lower, (FixedPoint, Root))):
            raise ValueError(f"lower must be a loss (outer, inner) -> scalar, not a {type(self.lower).__name__}")
        names = ("steps", "tolerance", "damping", "preconditioner")
        check(self.settings["solver"] or "minres", **{name: self.settings[name] for name in names})
        self.arguments = Arguments(self.outer, self.inner, options=self.noise)
        self.solver_name = ""

    def pull_back(
        self, u: list[Tensor], v: list[Tensor], b: Tensor, wanted: Sequence[bool]
    ) -> tuple[list[Tensor], Solved, Tensor | None]:
        """((dF / d outer)^T q, how q was found, the lower loss); q solves (dF / d inner)^T q = b."""
        mean = _Mean(self.group)
        lower = iter(self.lower) if self.minibatches else self.lower
        products = self.arguments
        if self.dtype is not None:
            products = Arguments(self.outer, self.inner, options=self.noise, dtype=self.dtype)
        system = linearised(lower, products, u, v, self.curvature)
        settings = self._fitting(system.symmetric)
        b = mean(b)
        found = solve(lambda w: mean(system.product(w)), b, **settings)
        if self.dtype is not None and found.products:
            system = linearised(lower, self.arguments, u, v, self.curvature)
            with torch.no_grad():
                left = mean(system.product(found.q)) + settings["damping"] * found.q - b
            residual = float(left.norm() / b.norm())
            found = dataclasses.replace(found, residual=residual, products=found.products + 1)
            if isinstance(settings["warm_start"], WarmStart):
                settings["warm_start"].solved = found
        mixed = system.mixed(found.q)
        self._check(mixed, wanted)
        value = None if system.value is None else mean(system.value)
        return [mean(m) for m in filled(mixed, u)], found, value

    def _fitting(self, symmetric: bool) -> dict[str, Any]:
        """The settings of `solve` for such a system.  Raises ValueError for a solver that does not fit."""
        settings = dict(self.settings)
        solver = settings["solver"]
        if solver is None:
            solver = "neumann" if self.minibatches else "minres" if symmetric else "gmres"
        self.solver_name = solver if isinstance(solver, str) else getattr(solver, "__name__", "the given solver")
        if solver in SYMMETRIC_ONLY and not symmetric:
            raise ValueError(
                f"{solver} needs a symmetric system, a lower loss's: give gmres, or neumann for a contraction"
            )
        if solver in ONE_MATRIX_ONLY and self.minibatches:
            raise ValueError(f"{solver} needs the same matrix at every product, minibatches change it: give neumann")
        if solver == "neumann" and isinstance(self.lower, FixedPoint):
            settings.setdefault("lr", 1.0)
        return {**settings, "solver": solver}

    def _check(self, mixed: Sequence[Tensor | None], wanted: Sequence[bool]) -> None:
        missing = [i for i, (m, needed) in enumerate(zip(mixed, wanted, strict=True)) if needed and m is None]
        if len(missing) == sum(wanted):
            raise ValueError(
                "lower does not depend on outer: it must use the outer that it is called with; a tensor taken from "
                "around the function has no gradient"
            )
        if missing and self.settings["damping"]:
            raise ValueError(
                f"tensor {missing[0]} of outer has no part in lower, and damping ({self.settings['damping']:g}) has no "
                "gradient; if it stands for a regulariser, write the regulariser into lower and leave damping 0"
            )


class _Mean:
    """The mean of a tensor over a group's ranks; without a group the tensor itself."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.group is None:
            return tensor
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(tensor, group=self.group)  # gloo has no mean
        return tensor / torch.distributed.get_world_size(self.group)


def _detached(tree: Tree, name: str) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in leaves(tree, name)]
