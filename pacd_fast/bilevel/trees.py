"""Tensors in tuples, lists, dicts and modules as flat lists of leaves, and functions called at other values of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["Arguments", "Tree", "flat", "leaves", "rebuilt", "shaped"]

Tree: TypeAlias = Any
"""A floating-point tensor; a tuple, list or dict of trees; or a module, which stands for its trainable parameters."""


def leaves(tree: Tree, name: str) -> list[Tensor]:
    """The tensors of a tree in its own order; `name` is what an error calls it.

    Raises ValueError for a leaf that is no floating-point tensor, or where there is none at all.
    """
    found = list(_walk(tree, name))
    if not found:
        raise ValueError(f"{name} holds no tensor: give tensors, or a module with parameters that require grad")
    return found


def _walk(tree: Tree, name: str) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        if not tree.is_floating_point():
            raise ValueError(f"{name} holds a tensor of {tree.dtype}: give floating-point tensors")
        yield tree
    elif isinstance(tree, nn.Module):
        yield from trainable(tree).values()
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _walk(item, name)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _walk(item, name)
    else:
        raise ValueError(
            f"{name} holds a {type(tree).__name__}: give tensors, or tuples, lists, dicts, modules of them"
        )


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters that require grad, by name; a shared one once."""
    return {name: each for name, each in module.named_parameters() if each.requires_grad}


def rebuilt(tree: Tree, values: Sequence[Tensor]) -> Tree:
    """A tree of the same form with these leaves; in the place of a module a dict of its parameters by name."""
    return _filled(tree, iter(values), lambda module, each: {name: next(each) for name in trainable(module)})


def _filled(tree: Tree, values: Iterator[Tensor], module: Callable[[nn.Module, Iterator[Tensor]], Any]) -> Tree:
    if isinstance(tree, Tensor):
        return next(values)
    if isinstance(tree, nn.Module):
        return module(tree, values)
    if isinstance(tree, dict):
        return type(tree)((key, _filled(item, values, module)) for key, item in tree.items())
    items = [_filled(item, values, module) for item in tree]
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements of some tensors as one vector [n]."""
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])


def shaped(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `flat`: parts of a vector [n] in the shapes of `like`."""
    if len(like) == 1:
        return [vector.view(like[0].shape)]
    return [part.view(t.shape) for part, t in zip(vector.split([t.numel() for t in like]), like, strict=True)]


class _Carrier(nn.Module):
    """A function as a module that holds other modules, so that torch.func.functional_call can replace their tensors."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.held = nn.ModuleList(modules)
        self.function: Callable[..., Any] | None = None

    def forward(self, *arguments: Any, **options: Any) -> Any:
        assert self.function is not None
        return self.function(*arguments, **options)


class Arguments:
    """The trees that a loss is called with, and the loss's value at other values of their leaves.

    A module in a tree is handed on as it is, with its parameters replaced while the function runs, in the mode (train
    or eval) that it had at first; its buffers (batch norm's running statistics) are copies, and stay as they are.
    """

    def __init__(self, *trees: Tree, options: dict[str, Any] | None = None, dtype: torch.dtype | None = None) -> None:
        """options: keyword arguments of every call; dtype: of matrix products and convolutions (autocast)."""
        self.trees, self.options, self.dtype = trees, options or {}, dtype
        modules = [module for tree in trees for module in _modules(tree)]
        self.names = {id(module): list(trainable(module)) for module in modules}
        if len(self.names) < len(modules):
            raise ValueError("one module stands in two places: its parameters cannot be both outer and inner")
        self.places = [f"held.{i}.{name}" for i, module in enumerate(modules) for name in self.names[id(module)]]
        self.carrier = _Carrier(modules) if modules else None
        self.modes = [(part, part.training) for module in modules for part in module.modules()]

    def call(self, function: Callable[..., Any], *values: Sequence[Tensor]) -> Any:
        """function(*trees) with the leaves of each tree replaced by these values."""
        replaced: list[Tensor] = []

        def kept(module: nn.Module, each: Iterator[Tensor]) -> nn.Module:
            replaced.extend(next(each) for _ in self.names[id(module)])
            return module

        arguments = tuple(_filled(tree, iter(of_it), kept) for tree, of_it in zip(self.trees, values, strict=True))
        with self._precision(values[0][0].device), self._modes():
            if self.carrier is None:
                return function(*arguments, **self.options)
            state = {name: buffer.clone() for name, buffer in self.carrier.named_buffers()}
            state |= dict(zip(self.places, replaced, strict=True))
            self.carrier.function = function
            return torch.func.functional_call(self.carrier, state, arguments, self.options)

    def _precision(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if self.dtype is None:
            return contextlib.nullcontext()
        # without autocast's cache, whose casts would outlive the graph that they belong to
        return torch.autocast(device.type, self.dtype, cache_enabled=False)

    @contextlib.contextmanager
    def _modes(self) -> Iterator[None]:
        """A backward pass may come when the module is in eval mode, and the loss was trained in the other."""
        now = [part.training for part, _ in self.modes]
        try:
            for part, mode in self.modes:
                part.training = mode
            yield
        finally:
            for (part, _), mode in zip(self.modes, now, strict=True):
                part.training = mode


def _modules(tree: Tree) -> Iterator[nn.Module]:
    if isinstance(tree, nn.Module):
        yield tree
    elif isinstance(tree, (dict, tuple, list)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _modules(item)
