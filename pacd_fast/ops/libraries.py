"""The compiled libraries: finding and loading them, and the checks that every operator begins with.

With PACD_CUDA_SYNC=1 in the environment every CUDA kernel is waited for, and an error says in which one it happened.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

import pacd_fast

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ALL_FLOATS = (*FLOATS, torch.float64)
DRIVERS = {12: 525, 13: 580}  # the first driver for each major version of CUDA
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


def _load(name: str) -> Path:
    path = _library(name)
    if path is None:
        raise ImportError(f"pacd_fast's library {name}.so is not in {list(pacd_fast.__path__)}; {REBUILD}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"pacd_fast's library {path} does not load beside torch {torch.__version__} ({error}); {REBUILD}"
        ) from error
    return path


def driver_problem(driver: int, runtime: int) -> str | None:
    """Why a driver cannot run a library, from the CUDA version that it supports and that of the library's runtime, each
    as 1000 * major + 10 * minor; None where it can, or where there is no driver (0) and so no card."""
    has, needs = driver // 1000, runtime // 1000
    if driver == 0 or has >= needs:
        return None
    remedy = f"a driver >= {DRIVERS[needs]}" if needs in DRIVERS else "a newer driver"
    return (
        f"not usable: the driver supports CUDA {has}.{driver % 1000 // 10} and the library needs {needs}.0; "
        f"install {remedy} or build with nvcc {has}.x"
    )


def cuda_versions(path: Path) -> tuple[int, int]:
    """The CUDA versions of (the driver, the library's runtime), as `driver_problem` takes them."""
    library = ctypes.CDLL(str(path))
    try:
        return library.pacd_cuda_driver(), library.pacd_cuda_runtime()
    except AttributeError as error:
        raise ImportError(f"pacd_fast's library {path} is of an older version ({error}); {REBUILD}") from error


def _load_cuda() -> str:
    """Loads the CUDA operators; returns "loaded", or the reason why they are not there."""
    if torch.version.cuda is None:
        return f"not loaded: torch {torch.__version__} has no CUDA"
    if _library("pacd_ops_cuda") is None:
        return f"not built: no nvcc 12 or later was found when pacd_fast was built; with one on PATH, {REBUILD}"
    return driver_problem(*cuda_versions(_load("pacd_ops_cuda"))) or "loaded"


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
