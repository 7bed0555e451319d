"""Images and labels as callers have them, in tensors, NumPy arrays or loaders, as the tensors that we work on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset


def as_float(images: Tensor) -> Tensor:
    """uint8 0..255 or floating 0..1, any shape -> float32 in [0, 1].

    Plain torch: ``images.float() / 255`` for uint8, which are the bits of torchvision's ToTensor, on every device.
    Raises ValueError for another dtype.
    """
    if images.dtype == torch.uint8:
        if images.device.type == "cpu":
            return images.to(torch.float32).div_(255)
        # CUDA's div_ by a number multiplies by its rounded inverse, which in float32 misses 126 of the 256 quotients by
        # an ULP.  In float64 an ULP is no matter: x / 255 repeats the 8 bits of x for ever, far from a tie of float32.
        return images.to(torch.float64).div_(255).to(torch.float32)
    if images.is_floating_point():
        return images.to(torch.float32)
    raise ValueError(_no_images(images.dtype))


def as_images(images: Tensor | np.ndarray) -> Tensor:
    """The images [N, ...] of a caller as a floating tensor, in pixels as a classifier takes them.

    The one rule for 8 bits: uint8 is 0..255 and is divided by 255 (see `as_float`); floats stay as they are, in their
    dtype.  Raises ValueError for other dtypes, and for what is neither a tensor nor a NumPy array.
    """
    tensor = _tensor("images", images)
    if tensor.dim() < 2:
        raise ValueError(f"images must be [N, ...], not {tuple(tensor.shape)}: give images[None] for one")
    return tensor if tensor.is_floating_point() else as_float(tensor)


def labelled(data: Any) -> tuple[Tensor, Tensor]:
    """Images uint8 or floating [N, ...] and int64 labels [N] on the CPU or where they are.

    data: a pair (images, labels) of tensors or NumPy arrays; a DataLoader, or any iterable of such pairs, which is read
    once, whole, and in its order; or a torch.utils.data.Dataset.  The labels may be any integers.

    Reading a loader leaves torch's generator as it was, so that one that shuffles by it gives the same order again.

    Raises ValueError, one line that says what to give.
    """
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor | np.ndarray):
        return _pair(*data)
    images, labels = _loaded(data, _labelled_batch)
    return images, labels


def images_of(data: Any) -> Tensor:
    """The images alone of what `labelled` takes, or of a loader that gives them without labels: floating [N, ...].

    Raises ValueError as `labelled` does.
    """
    if isinstance(data, tuple | list) and data and isinstance(data[0], Tensor | np.ndarray):
        if len(data) == 2 and np.shape(data[0]) != np.shape(data[1]):
            return labelled(data)[0]
        raise ValueError(f"images must be one tensor [N, ...], not {len(data)} in a list: give torch.stack(images)")
    return _loaded(data, _images_batch)[0]


def _loaded(data: Any, read: Callable[[Any], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What `read` makes of a loader's batches, the images first, put together."""
    if isinstance(data, TorchDataset) and hasattr(data, "__len__"):
        data = DataLoader(data, batch_size=256)
    if not isinstance(data, Iterable) or isinstance(data, Tensor | np.ndarray | str | dict):
        raise ValueError(f"data must be (images, labels) or a DataLoader, not {type(data).__name__}")
    found: list[tuple[Tensor, ...]] = []
    with torch.random.fork_rng(devices=[]):
        try:
            for batch in data:
                found.append(read(batch))
        except TypeError as error:  # images without ToTensor cannot be put together
            raise ValueError(f"the loader gives no tensors: {str(error).partition(chr(10))[0]}") from error
    if not found:
        raise ValueError("the loader gives no batch")
    if len({(images.dtype, images.shape[1:]) for images, *_ in found}) > 1:
        raise ValueError("the loader's batches hold images of several dtypes or shapes")
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _labelled_batch(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError("a loader must give batches (images, labels)")
    return _pair(*batch)


def _images_batch(batch: Any) -> tuple[Tensor]:
    """Of images alone, of [images], as a TensorDataset gives them, or of (images, labels)."""
    if not isinstance(batch, tuple | list):
        return (as_images(batch),)
    return (as_images(batch[0]) if len(batch) == 1 else _labelled_batch(batch)[0],)


def _pair(images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    x = _tensor("images", images)
    y = _tensor("labels", np.asarray(labels) if isinstance(labels, list | tuple) else labels)
    if not (x.dtype == torch.uint8 or x.is_floating_point()):
        raise ValueError(_no_images(x.dtype))
    if y.dim() == 2 and y.shape[1] == 1:
        y = y.flatten()
    if x.dim() < 2 or y.shape != x.shape[:1] or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(
            "data must be images [N, ...] and whole-number labels [N], not "
            f"{tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"
        )
    return x, y.to(torch.int64)


def _tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        if values.layout != torch.strided or values.is_quantized or values.device.type == "meta":
            raise ValueError(f"{name} must be a dense tensor with values in it")
        return values
    if not isinstance(values, np.ndarray):
        raise ValueError(f"{name} must be a tensor or a NumPy array, not {type(values).__name__}")
    if values.dtype.kind not in "biufc":
        raise ValueError(f"{name} must hold numbers, not {values.dtype}")
    if not values.flags.writeable or not values.dtype.isnative or any(stride < 0 for stride in values.strides):
        values = values.astype(values.dtype.newbyteorder("="), order="C")
    try:
        return torch.from_numpy(values)
    except TypeError as error:  # longdouble, say
        raise ValueError(f"{name} cannot be {values.dtype}") from error


def _no_images(dtype: torch.dtype) -> str:
    return f"images must be uint8 (0 to 255, divided by 255) or floating, not {dtype}: give images.to(torch.uint8), say"
