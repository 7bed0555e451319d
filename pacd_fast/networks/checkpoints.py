"""Classifiers as files: ours in safetensors, plain state_dicts, locuslab's; reading them never runs code."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pacd_fast.files import replaced
from pacd_fast.networks.models import BUILT_IN, CIFAR10_MEAN, CIFAR10_STD, behind_normalize, build

_LOCUSLAB_NAMES = {"cifar_resnet20": "resnet20", "cifar_resnet110": "resnet110"}

# What torch.load raises on bytes that are no checkpoint: found by feeding it damaged and random files.
_UNREADABLE = (
    pickle.UnpicklingError, EOFError, LookupError, ValueError, RuntimeError, AssertionError,
    TypeError, AttributeError, ArithmeticError, struct.error,
)  # fmt: skip

_T = TypeVar("_T")


@dataclass(frozen=True)
class Checkpoint:
    """A classifier read from a file: the model in eval mode on the CPU, and what the file says about it.

    sigma: the noise it was trained with; data: what it was trained on; both None where the file does not say.
    fingerprint: see `fingerprint`. metadata: everything else the file says, as strings.
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
    path = Path(path)
    missing = {"architecture", "num_classes", "in_channels", "image_size"} - metadata.keys()
    if missing:
        raise ValueError(f"a checkpoint's metadata needs {', '.join(sorted(missing))}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    # Copies, because safetensors refuses tensors that share memory (tied weights).
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    with replaced(path) as temporary, open(temporary, "wb") as file:
        file.write(safetensors.torch.save(state, dict(metadata)))
        file.flush()
        os.fsync(file.fileno())


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
    What it does say must agree with what is given. Prefixes of DataParallel and torch.compile are removed, with or
    without a normalisation layer in front; mean and std are for files that have such a layer, or none, but no numbers.

    Reading never executes code: torch.load runs with weights_only=True, and a file that names a user's own network
    (package.module:function) loads only where arch is given as well.

    Raises FileNotFoundError where there is no file, ValueError (one line, with what to do) for everything else.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if not path.is_file() or path.stat().st_size == 0:
        raise ValueError(f"{path}: the checkpoint is {'empty' if path.is_file() else 'not a file'}")
    state, metadata, locuslab_name = _read(path)

    arch = _LOCUSLAB_NAMES.get(arch, arch) if arch else None
    stored_arch = metadata.get("architecture")
    if arch is None and stored_arch is not None and ":" in stored_arch:
        raise ValueError(
            f"{path}: it holds the network {stored_arch}, code that a file may not choose to run; "
            f"allow it with arch={stored_arch!r} (command line: --model {stored_arch})"
        )
    arch = _agreed(path, "architecture", arch, stored_arch)
    if arch is None and locuslab_name is not None:
        if locuslab_name not in _LOCUSLAB_NAMES:
            raise ValueError(
                f"{path}: it holds the network {locuslab_name!r}, which is not built in; give arch (command line: "
                "--model) as package.module:function, with mean and std"
            )
        arch = _LOCUSLAB_NAMES[locuslab_name]
    if arch is None:
        raise ValueError(
            f"{path}: it does not say which network it holds; give arch (command line: --model): "
            f"{', '.join(BUILT_IN)} or package.module:function"
        )
    num_classes = _agreed(path, "num_classes", num_classes, _integer(path, metadata, "num_classes"))
    in_channels = _agreed(path, "in_channels", in_channels, _integer(path, metadata, "in_channels"))
    image_size = _agreed(path, "image_size", image_size, _size(path, metadata))
    if locuslab_name in _LOCUSLAB_NAMES:
        num_classes, in_channels, image_size = num_classes or 10, in_channels or 3, image_size or (32, 32)
    if num_classes is None:
        raise ValueError(f"{path}: it does not say how many classes it has; give num_classes")

    network = build(arch, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    weights, normalised, stored_mean_std = _unwrap(path, state, network)
    if stored_mean_std is not None:
        if mean is not None or std is not None:
            raise ValueError(f"{path}: it holds its own normalisation; leave mean and std out")
        mean, std = stored_mean_std
    elif normalised and mean is None and std is None:
        if locuslab_name not in _LOCUSLAB_NAMES:
            raise ValueError(f"{path}: its normalisation layer holds no numbers; give its mean and std")
        mean, std = CIFAR10_MEAN, CIFAR10_STD
    _load_weights(path, network, weights, arch)
    model = behind_normalize(network, in_channels, mean, std).eval()
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
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str], str | None]:
    """The tensors of a file, its metadata and, for locuslab's files, the name that stands under "arch"."""
    with open(path, "rb") as file:
        start = file.read(9)
    # A safetensors file is the length of a JSON object in 8 bytes, then that object.
    if start[8:] == b"{":
        try:
            with safetensors.safe_open(path, framework="pt", device="cpu") as tensors:
                names = tensors.keys()
                return {name: tensors.get_tensor(name) for name in names}, dict(tensors.metadata() or {}), None
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({_first_line(error)})") from error
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(
            f"{path}: not a checkpoint of tensors ({_first_line(error)}); "
            "save one with torch.save(model.state_dict(), ...) or as safetensors"
        ) from error
    locuslab_name = None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        locuslab_name = content["arch"] if isinstance(content.get("arch"), str) else None
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: holds {'no tensors' if content == {} else type(content).__name__}, not a state_dict")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: not a state_dict: {name!r} is {type(tensor).__name__}, not a tensor")
    return dict(content), {}, locuslab_name


def _unwrap(
    path: Path, state: dict[str, Tensor], network: nn.Module
) -> tuple[dict[str, Tensor], bool, tuple[list[float], list[float]] | None]:
    """The network's own tensors, whether a normalisation layer stands before it, and that layer's mean and std.

    Which prefixes belong to wrappers is decided by the names that the network itself expects, never guessed.
    """
    expected = network.state_dict().keys()
    if state.keys() == expected:
        return state, False, None
    wrapper = re.compile(r"^(?:(?:module|_orig_mod)\.)*([01]\.)?(?:(?:module|_orig_mod)\.)*")
    bare = {wrapper.sub(r"\1", name): tensor for name, tensor in state.items()}
    inner = {name[2:]: tensor for name, tensor in bare.items() if name.startswith("1.")}
    before = {name[2:]: tensor for name, tensor in bare.items() if name.startswith("0.")}
    if bare.keys() == expected or len(inner) + len(before) < len(bare):
        return bare, False, None
    if not before:
        return inner, True, None
    if before.keys() != {"mean", "std"} or any(t.dim() != 1 or not t.is_floating_point() for t in before.values()):
        raise ValueError(f"{path}: does not fit the network, nor Normalize before it: unexpected {_some(before, '0.')}")
    return inner, True, (before["mean"].tolist(), before["std"].tolist())


def _load_weights(path: Path, network: nn.Module, weights: dict[str, Tensor], arch: str) -> None:
    expected = network.state_dict()
    missing, unexpected = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or unexpected:
        difference = " and ".join(
            f"{word} {_some(names)}" for word, names in (("lacks", missing), ("has unexpected", unexpected)) if names
        )
        raise ValueError(f"{path}: does not fit {arch}: it {difference}; give the network that was saved")
    for name, tensor in expected.items():
        there, here = list(weights[name].shape), list(tensor.shape)
        if there != here:
            raise ValueError(
                f"{path}: does not fit {arch}: {name} is {there} there and {here} here; "
                "check the network, num_classes, in_channels and image_size"
            )
    network.load_state_dict(weights)


def _agreed(path: Path, what: str, given: _T | None, stored: _T | None) -> _T | None:
    if given is not None and stored is not None and given != stored:
        raise ValueError(f"{path}: its {what} is {stored}, and {given} was asked for")
    return stored if given is None else given


def _integer(path: Path, metadata: Mapping[str, str], key: str) -> int | None:
    text = metadata.get(key)
    if text is not None and not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{path}: its metadata has {key} {text!r}, not a number")
    return None if text is None else int(text)


def _number(path: Path, metadata: Mapping[str, str], key: str) -> float | None:
    text = metadata.get(key)
    try:
        return None if text is None else float(text)
    except ValueError as error:
        raise ValueError(f"{path}: its metadata has {key} {text!r}, not a number") from error


def _size(path: Path, metadata: Mapping[str, str]) -> tuple[int, int] | None:
    text = metadata.get("image_size")
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
    if match is None:
        raise ValueError(f"{path}: its metadata has image_size {text!r}, not of the form 28x28")
    return int(match[1]), int(match[2])


def _some(names: Any, prefix: str = "") -> str:
    first, *rest = sorted(names)
    return f"{prefix}{first}" + (f" and {len(rest)} more" if rest else "")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
