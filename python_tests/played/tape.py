"""A CUDA graph without a card: the operators that a function calls, run again on the memory that they had.

As in a graph, Python is not run again: what it computed, and which tensors it took, stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("item", "_local_scalar_dense", "nonzero", "equal", "is_nonzero")  # which a graph cannot hold


class Tape(TorchDispatchMode):
    """Runs a function and remembers; attributes: replays, how often it was run again."""

    def __init__(self, run: Callable[[], Tensor]):
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0
        with self:
            self.result = run()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS:
            raise RuntimeError(f"{func.overloadpacket.__name__} in a graph")
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found

    def replay(self) -> Tensor:
        self.replays += 1
        with torch.inference_mode():  # what the model made is written over
            for func, args, kwargs, before in self.calls:
                for there, again in zip(tree_leaves(before), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(there, Tensor) and there.data_ptr() != again.data_ptr():
                        there.copy_(again)
        return self.result
