"""What makes the inner variable an answer, and products with the Jacobians of that condition.

An answer inner*(outer) solves F(outer, inner*) = 0: the gradient of a lower loss vanishes, a map returns its own input,
or a given function is 0.  The implicit function theorem needs (dF / d inner)^T v, for the linear system, and
(dF / d outer)^T q, for its answer's part in the hypergradient.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pacd_fast.bilevel.trees import Arguments, Tree, flat, rebuilt, shaped

__all__ = ["CURVATURES", "Composite", "FixedPoint", "Root", "System", "linearised"]

CURVATURES = ("hessian", "gauss-newton")


@dataclass(frozen=True)
class Composite:
    """A lower loss as a loss of outputs, which Gauss-Newton products need.

    outputs: (outer, inner) -> a tensor or a tree of tensors, the network; loss: (outputs) -> scalar, or
    (outer, outputs) -> scalar where the loss depends on outer as well (targets, weights of examples, of a regulariser);
    convex in the outputs for a positive semi-definite product.  A regulariser of the inner variable is a loss of
    outputs that hold the inner variable.  Called like any lower loss it is their composition.
    """

    outputs: Callable[..., Tree]
    loss: Callable[..., Tensor]

    def __call__(self, outer: Any, inner: Any, **options: Any) -> Tensor:
        return self.of_outputs(outer, self.outputs(outer, inner, **options))

    def of_outputs(self, outer: Any, outputs: Tree) -> Tensor:
        """The loss of these outputs, which may see outer."""
        return self.loss(outer, outputs) if self.sees_outer else self.loss(outputs)

    @functools.cached_property
    def sees_outer(self) -> bool:
        """Whether the loss takes two positional arguments, defaults not counted."""
        try:
            parameters = inspect.signature(self.loss).parameters.values()
        except ValueError:  # some functions written in C have none
            return False
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return sum(p.kind in positional and p.default is p.empty for p in parameters) == 2


@dataclass(frozen=True)
class FixedPoint:
    """inner* = map(outer, inner*); map returns a tree like inner (a step of some iteration, an equilibrium network)."""

    map: Callable[..., Tree]


@dataclass(frozen=True)
class Root:
    """function(outer, inner*) = 0; the function returns a tree like inner, as many equations as unknowns."""

    function: Callable[..., Tree]


class System(Protocol):
    """F linearised at one point.

    symmetric: whether dF / d inner is, a Hessian; value: the lower loss there, None where there is none.
    """

    symmetric: bool
    value: Tensor | None

    def product(self, v: Tensor) -> Tensor:
        """(dF / d inner)^T v: [n] -> [n]."""

    def mixed(self, q: Tensor) -> list[Tensor | None]:
        """(dF / d outer)^T q in the shapes of outer; None where F does not depend on a tensor."""


def linearised(lower: Any, arguments: Arguments, u: list[Tensor], v: list[Tensor], curvature: str | None) -> System:
    """The condition that `lower` stands for at outer = u, inner = v, which require grad.

    lower: a loss, `Composite`, `FixedPoint` or `Root`, or an iterator of them, one for each product.
    """
    if isinstance(lower, Iterator):
        return _Fresh(lower, arguments, u, v, curvature)
    if isinstance(lower, Composite) and curvature != "hessian":
        return _GaussNewton(lower, arguments, u, v)
    if curvature == "gauss-newton":
        raise ValueError("gauss-newton needs a lower loss that is a bilevel.Composite; or give curvature='hessian'")
    if isinstance(lower, (FixedPoint, Root)):
        if curvature is not None:
            raise ValueError(f"curvature is of a lower loss: a {type(lower).__name__} has none, leave it out")
        function = lower.map if isinstance(lower, FixedPoint) else lower.function
        answer = with_graph(arguments.call(function, u, v))
        if [a.shape for a in answer] != [w.shape for w in v]:
            raise ValueError(f"{type(lower).__name__} must return tensors in the shapes of inner")
        if isinstance(lower, FixedPoint):
            answer = [w - a for w, a in zip(v, answer, strict=True)]
        return _Linear(answer, u, v, None)
    value = arguments.call(lower, u, v)
    return _Linear(gradients(value, v, create_graph=True), u, v, value.detach(), symmetric=True)


def with_graph(tree: Tree) -> list[Tensor]:
    """The tensors of what a user's function returned, with their graphs."""
    if isinstance(tree, Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree
    return [leaf for item in items for leaf in with_graph(item)]


def gradients(value: Tensor, at: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """Gradients of a scalar, zeros where it does not depend on a tensor.  Raises ValueError where it is no scalar."""
    if value.numel() != 1:
        raise ValueError(f"a loss must return a scalar, not a tensor of shape {tuple(value.shape)}")
    if not value.requires_grad:
        return [torch.zeros_like(t) for t in at]
    found = torch.autograd.grad(value, at, allow_unused=True, **options)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, at, strict=True)]


def along(
    values: Sequence[Tensor], at: Sequence[Tensor], directions: Sequence[Tensor], keep: bool = True
) -> list[Tensor | None]:
    """d <values, directions> / d at, None where there is no dependence; keep: the graph, for another product."""
    pairs = [(value, direction) for value, direction in zip(values, directions, strict=True) if value.requires_grad]
    if not pairs:
        return [None] * len(at)
    outputs, weights = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, at, grad_outputs=weights, retain_graph=keep, allow_unused=True))


def filled(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Zeros in the place of None."""
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, like, strict=True)]


class _Linear:
    """F as a graph: a product is one backward pass through it."""

    def __init__(
        self, f: list[Tensor], u: list[Tensor], v: list[Tensor], value: Tensor | None, symmetric: bool = False
    ) -> None:
        self.f, self.u, self.v, self.value, self.symmetric = f, u, v, value, symmetric

    def product(self, v: Tensor) -> Tensor:
        return flat(filled(along(self.f, self.v, shaped(v, self.v)), self.v))

    def mixed(self, q: Tensor) -> list[Tensor | None]:
        return along(self.f, self.u, shaped(q, self.v))


class _GaussNewton:
    """v -> J^T (d^2 loss / d outputs^2) J v, J the derivative of the outputs in inner."""

    symmetric = True

    def __init__(self, lower: Composite, arguments: Arguments, u: list[Tensor], v: list[Tensor]) -> None:
        self.lower, self.arguments, self.u, self.v = lower, arguments, u, v
        self.outer = Arguments(arguments.trees[0])
        outputs = arguments.call(lower.outputs, u, v)
        self.form = rebuilt(outputs, [each.detach() for each in with_graph(outputs)])  # their tree, without their graph
        self.value, self.slope = self._sloped(self._of_inner_dtype(outputs))

    def _of_inner_dtype(self, outputs: Tree) -> list[Tensor]:
        """What the network said in low precision goes on in the solver's."""
        return [each.to(self.v[0].dtype) for each in with_graph(outputs)]

    def _sloped(self, outputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The loss of these outputs, and its gradient there with a graph to whatever the outputs depend on."""
        # views: one output may be computed from another, and the loss's gradient must not take that way as well
        points = [each.view_as(each) if each.requires_grad else each.detach().requires_grad_() for each in outputs]
        tree = rebuilt(self.form, points)
        loss = self.outer.call(lambda outer: self.lower.of_outputs(outer, tree), self.u)
        return loss.detach(), gradients(loss, points, create_graph=True)

    def _tangent(self, v: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs and their derivatives along v, by dual numbers: for residual networks several times faster than
        the backward pass of a backward pass, whose convolutions are slow on a CPU."""
        _load_dual_numbers()
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(w.detach(), d) for w, d in zip(self.v, v, strict=True)]
            said = self._of_inner_dtype(self.arguments.call(self.lower.outputs, self.u, duals))
            pairs = [forward_ad.unpack_dual(each) for each in said]
        return [p.primal for p in pairs], filled([p.tangent for p in pairs], [p.primal for p in pairs])

    def product(self, v: Tensor) -> Tensor:
        with torch.no_grad():
            _, pushed = self._tangent(shaped(v, self.v))
        return flat(filled(along(self.slope, self.v, pushed), self.v))  # pushed held: the network's bend has no part

    def mixed(self, q: Tensor) -> list[Tensor | None]:
        """d <d loss(outputs) / d inner, q> / d outer = d <d loss / d outputs, J q> / d outer."""
        normalises = _normalises(self.slope)
        del self.slope  # the graph of the products: from here on there is another one
        if normalises:
            return linearised(self.lower, self.arguments, self.u, self.v, "hessian").mixed(q)
        values, pushed = self._tangent(shaped(q, self.v))
        _, slope = self._sloped(values)
        total = sum((s * p).sum() for s, p in zip(slope, pushed, strict=True))
        if not (isinstance(total, Tensor) and total.requires_grad):  # nothing depends on outer
            return [None] * len(self.u)
        return list(torch.autograd.grad(total, self.u, allow_unused=True))


@functools.cache
def _load_dual_numbers() -> None:
    """Makes a first one: with it torch loads rules of its own, by its torch.jit.script, of which it warns the user."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", r".*torch\.jit\.script.*deprecated")
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def _normalises(values: Sequence[Tensor]) -> bool:
    """Whether batch, instance or layer norm is in a graph.

    Derivatives of their tangents are wrong in torch, which takes their statistics for constants (torch 2.15; see
    https://github.com/pytorch/pytorch/issues/196699).
    """
    waiting = [value.grad_fn for value in values if value.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if "BatchNorm" in node.name() or "LayerNorm" in node.name():
            return True
        new = {before for before, _ in node.next_functions if before is not None} - seen
        seen |= new
        waiting += new
    return False


class _Fresh:
    """Another lower for every product: minibatches.  `value` is that of the last one."""

    def __init__(
        self, lowers: Iterator[Any], arguments: Arguments, u: list[Tensor], v: list[Tensor], curvature: str | None
    ) -> None:
        self.lowers, self.arguments, self.u, self.v, self.curvature = lowers, arguments, u, v, curvature
        self.used = 0
        self.waiting: System | None = self._next()
        self.symmetric, self.value = self.waiting.symmetric, self.waiting.value

    def _next(self) -> System:
        try:
            lower = next(self.lowers)
        except StopIteration:
            raise ValueError(
                f"lower ran out of losses after {self.used}: each product takes one, the mixed derivative one more; "
                "give a generator, or itertools.cycle of a list"
            ) from None
        self.used += 1
        with torch.enable_grad():
            return linearised(lower, self.arguments, self.u, self.v, self.curvature)

    def _now(self) -> System:
        system, self.waiting = self.waiting or self._next(), None
        self.value = system.value
        return system

    def product(self, v: Tensor) -> Tensor:
        return self._now().product(v)

    def mixed(self, q: Tensor) -> list[Tensor | None]:
        return self._now().mixed(q)
