"""The compiled libraries: finding and loading them, and the checks that every operator begins with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

import pacd_fast

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SOFT_FLOATS = (*FLOATS, torch.float64)
REBUILD = "build it with: pip install --no-build-isolation --force-reinstall --no-deps ."


def _library(name: str) -> Path | None:
    """The path of a compiled library; an editable install has it beside another entry of the package's path."""
    for folder in pacd_fast.__path__:
        path = Path(folder) / f"{name}.so"
        if path.exists():
            return path
    spec = importlib.util.find_spec("pacd_fast._C")
    if spec is not None and spec.origin is not None and (path := Path(spec.origin).parent / f"{name}.so").exists():
        return path
    return None


def _load(name: str) -> None:
    path = _library(name)
    if path is None:
        raise ImportError(f"pacd_fast's library {name}.so is not in {list(pacd_fast.__path__)}; {REBUILD}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"pacd_fast's library {path} does not load beside torch {torch.__version__} ({error}); {REBUILD}"
        ) from error


def _load_cuda() -> str:
    """Loads the CUDA operators; returns "loaded", or the reason why they are not there."""
    if torch.version.cuda is None:
        return f"not loaded: torch {torch.__version__} has no CUDA"
    if _library("pacd_ops_cuda") is None:
        return f"not built: no nvcc was found when pacd_fast was built; with nvcc on PATH, {REBUILD}"
    _load("pacd_ops_cuda")
    return "loaded"


_load("pacd_ops")
cuda_library: str = _load_cuda()
"""Either "loaded" or the reason why there are no CUDA operators."""

operators = torch.ops.pacd_fast


def require(condition: bool, message: str | Callable[[], str]) -> None:
    """A message with numbers in it is a function: it costs nothing where all is well, and compiles where they vary."""
    if not condition:
        raise ValueError(message if isinstance(message, str) else message())


def require_device(x: Tensor) -> None:
    if x.device.type == "cuda" and cuda_library != "loaded":
        raise ValueError(f"the CUDA operators are {cuda_library}")
    require(x.device.type in ("cpu", "cuda", "meta"), lambda: f"expected a CPU or CUDA tensor, not one on {x.device}")


def transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func or forward mode looks on: these know torch's operators, and not ours."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
