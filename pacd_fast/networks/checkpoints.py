"""Classifiers as files: ours in safetensors, plain state_dicts, locuslab's; reading them never runs code."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from torch import nn

from pacd_fast.arguments import number, one_line, writable
from pacd_fast.files import reason, replaced
from pacd_fast.networks.models import BUILT_IN, CIFAR10_MEAN, CIFAR10_STD, behind_normalize, build, takes
from pacd_fast.networks.weights import Fitted, Stored, check_tensors, fitted, read_weights
from pacd_fast.randomness import seeded

_LOCUSLAB_NAMES = {"cifar_resnet20": "resnet20", "cifar_resnet110": "resnet110"}

_UNTOLD = "{}: it does not say how many classes it has; give num_classes (command line: --num-classes)"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Checkpoint:
    """A classifier read from a file: the model in eval mode on the CPU, and what the file says about it.

    sigma: the noise it was trained with; data: what it was trained on; both None where the file does not say.
    fingerprint: see `fingerprint`. metadata: everything else the file says, as strings. notes: what had to be done to
    make the file fit, such as a prefix that was removed.
    """

    model: nn.Module
    arch: str
    num_classes: int
    in_channels: int | None
    image_size: tuple[int, int] | None
    sigma: float | None
    data: str | None
    metadata: dict[str, str]
    fingerprint: str
    notes: tuple[str, ...] = ()


def fingerprint(model: nn.Module) -> str:
    """The first 12 hex digits of SHA-256 over names, dtypes, shapes and bytes of the state dict, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def save_checkpoint(path: str | os.PathLike[str], model: nn.Module, metadata: Mapping[str, str]) -> None:
    """Write the model's state dict and the metadata as safetensors; the file appears whole or not at all.

    metadata must hold architecture (a name that `build` takes), num_classes, in_channels and image_size ("28x28");
    sigma (a number) and data are read back by `load_checkpoint`, any further key is kept. Normalisation needs no key:
    its mean and std are buffers of the model.
    Raises ValueError for missing metadata, FileNotFoundError where the folder does not exist.
    """
    path = writable(path)
    missing = {"architecture", "num_classes", "in_channels", "image_size"} - metadata.keys()
    if missing:
        raise ValueError(f"a checkpoint's metadata needs {', '.join(sorted(missing))}")
    # Copies, because safetensors refuses tensors that share memory (tied weights).
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    with replaced(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(state, dict(metadata)))


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Checkpoint:
    """Read a classifier: our safetensors, a state_dict, or locuslab/smoothing's {"arch", "state_dict"}.

    What the file does not say has to be given: a plain state_dict says nothing, locuslab's CIFAR checkpoints say all.
    How many classes there are is seen in the weights of a built-in network, and in the logits of a user's that need not
    be told, where the images' size is known.
    What it does say must agree with what is given.  The state_dict may lie under "state_dict", "model_state_dict",
    "model" or "net"; prefixes of wrappers (module., _orig_mod., model., net. and the like) are removed; the counters of
    batch norm, which old files do not have, are set to 0.  `notes` says what was done.

    A network behind a normalisation loads from files with or without that layer: mean and std are for files that have
    no numbers for it, or no such layer.  A user's own network may be such a wrapper as well, with constants of its own:
    the weights of the bare network then go into it.

    Reading never executes code: torch.load runs with weights_only=True, and a file that names a user's own network
    (package.module:function) loads only where arch is given as well.  torch's generator stays as it is.

    Raises FileNotFoundError where there is no file, ValueError (one line, with what to do) for everything else: weights
    of another kind than the network's (whole numbers, complex, quantised, sparse, without values) among it.
    """
    path = Path(path)
    stored = read_weights(path)
    metadata = stored.metadata
    arch = _architecture(path, arch, stored)
    num_classes = _agreed(path, "num_classes", num_classes, _integer(path, metadata, "num_classes"))
    in_channels = _agreed(path, "in_channels", in_channels, _integer(path, metadata, "in_channels"))
    image_size = _agreed(path, "image_size", image_size, _size(path, metadata))
    locuslab = stored.arch in _LOCUSLAB_NAMES
    if locuslab:
        num_classes, in_channels, image_size = num_classes or 10, in_channels or 3, image_size or (32, 32)
    if arch in BUILT_IN and num_classes is None:
        bias = _found(path, stored, _empty(path, arch, 2, in_channels, image_size), arch).weights[_last(arch)]
        num_classes = len(bias) if bias.dim() == 1 else None
    if arch in BUILT_IN and num_classes is None:
        raise ValueError(_UNTOLD.format(path))
    network = _empty(path, arch, num_classes, in_channels, image_size)
    found = _found(path, stored, network, arch)
    if found.mean_std is not None:
        if mean is not None or std is not None:
            raise ValueError(f"{path}: it holds its own normalisation; leave mean and std out")
        mean, std = found.mean_std
    elif found.normalised and mean is None and std is None:
        if not locuslab:
            raise ValueError(f"{path}: its normalisation layer holds no numbers; give its mean and std")
        mean, std = CIFAR10_MEAN, CIFAR10_STD
    part = network.get_submodule(found.place)
    check_tensors(path, found.weights, part, arch)
    if arch in BUILT_IN:
        part.to_empty(device="cpu")
    try:
        part.load_state_dict(found.weights)
    except (RuntimeError, NotImplementedError) as error:  # numbers that torch cannot convert
        raise ValueError(f"{path}: does not fit {arch}: {reason(error)}") from error
    model = behind_normalize(network, in_channels, mean, std).eval()
    if num_classes is None:
        num_classes = _logits(path, model, in_channels, image_size)
    return Checkpoint(
        model=model,
        arch=arch,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        sigma=_number(path, metadata, "sigma"),
        data=metadata.get("data"),
        metadata=metadata,
        fingerprint=fingerprint(model),
        notes=(*stored.notes, *found.notes),
    )


def _architecture(path: Path, given: str | None, stored: Stored) -> str:
    """The network's name, as `build` takes it: what is given and what the file says must agree."""
    given = _LOCUSLAB_NAMES.get(given, given) if given else None
    named = stored.metadata.get("architecture")
    if given is None and named is not None and ":" in named:
        raise ValueError(
            f"{path}: it holds the network {named}, code that a file may not choose to run; "
            f"allow it with arch={named!r} (command line: --model {named})"
        )
    if stored.arch is not None and (given is None or ":" not in given):  # a user's network may be anybody's
        named = _LOCUSLAB_NAMES.get(stored.arch, stored.arch)
        if given is None and named not in BUILT_IN:
            raise ValueError(
                f"{path}: it holds the network {one_line(stored.arch, 60)!r}, which is not built in; give arch "
                "(command line: --model) as package.module:function, with mean and std"
            )
    arch = _agreed(path, "architecture", given, named)
    if arch is None:
        raise ValueError(
            f"{path}: it does not say which network it holds; give arch (command line: --model): "
            f"{', '.join(BUILT_IN)} or package.module:function"
        )
    return arch


def _empty(
    path: Path, arch: str, num_classes: int | None, in_channels: int | None, image_size: tuple[int, int] | None
) -> nn.Module:
    """The network; a built-in one without memory for its weights, for a file may ask for any size."""
    if arch not in BUILT_IN:
        with seeded(torch.device("cpu"), 0):
            return build(arch, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    try:
        with torch.device("meta"):
            return build(arch, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path}: {arch} cannot have {num_classes} classes, {in_channels} channels and images of size {image_size}"
        ) from error


def _found(path: Path, stored: Stored, network: nn.Module, arch: str) -> Fitted:
    """The tensors under the network's names; where they are another built-in network's, the error says which."""
    try:
        return fitted(path, stored.state, network, arch)
    except ValueError as error:
        for other in BUILT_IN:
            try:
                fitted(path, stored.state, _empty(path, other, 2, 3, (32, 32)), other)
            except ValueError:
                continue
            raise ValueError(f"{error}; its names are those of {other}: give --model {other}") from error
        raise ValueError(f"{error}; give the network that was saved") from error


def _logits(path: Path, model: nn.Module, in_channels: int | None, image_size: tuple[int, int] | None) -> int:
    """How many logits a user's network gives for such images: its classes."""
    if in_channels is None or image_size is None:
        raise ValueError(_UNTOLD.format(path))
    shape = (in_channels, *image_size)
    with torch.inference_mode(), seeded(torch.device("cpu"), 0), takes(shape):
        logits = model(torch.zeros(2, *shape))
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise ValueError(_UNTOLD.format(path))
    return logits.shape[1]


def _last(arch: str) -> str:
    """The bias of the logits of a built-in network."""
    return "fc2.bias" if arch == "mnist-cnn" else "fc.bias"


def _agreed(path: Path, what: str, given: _T | None, stored: _T | None) -> _T | None:
    if given is not None and stored is not None and given != stored:
        raise ValueError(f"{path}: its {what} is {one_line(stored, 60)}, and {given} was asked for")
    return stored if given is None else given


def _integer(path: Path, metadata: Mapping[str, str], key: str) -> int | None:
    text = metadata.get(key)
    if text is not None and not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{path}: its metadata has {key} {one_line(text, 40)!r}, not a number")
    return None if text is None else int(text)


def _number(path: Path, metadata: Mapping[str, str], key: str) -> float | None:
    text = metadata.get(key)
    try:
        return None if text is None else number(text)
    except ValueError as error:
        raise ValueError(f"{path}: its metadata has {key} {one_line(text, 40)!r}, not a number") from error


def _size(path: Path, metadata: Mapping[str, str]) -> tuple[int, int] | None:
    text = metadata.get("image_size")
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
    if match is None:
        raise ValueError(f"{path}: its metadata has image_size {one_line(text, 40)!r}, not of the form 28x28")
    return int(match[1]), int(match[2])
