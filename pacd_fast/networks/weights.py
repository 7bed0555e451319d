"""The tensors in a file of weights, and how their names fit a network: wrappers, prefixes, a layer in front."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from pacd_fast.arguments import one_line
from pacd_fast.files import load_tensors, opened, reason

# What torch.load raises on bytes that are no checkpoint: found by feeding it damaged and random files.
_UNREADABLE = (
    pickle.UnpicklingError, EOFError, LookupError, ValueError, RuntimeError, AssertionError, OSError, MemoryError,
    TypeError, AttributeError, ArithmeticError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
_KEYS = ("state_dict", "model_state_dict", "model", "net")  # under which training scripts put the state dict
_COUNTER = "num_batches_tracked"  # of batch norm, which files of old versions of torch do not have


@dataclass(frozen=True)
class Stored:
    """What a file holds: tensors by name, the strings of a safetensors file, what stands under "arch", and notes."""

    state: dict[str, Tensor]
    metadata: dict[str, str]
    arch: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fitted:
    """The tensors of a file under the names of a network, or of its part `place`.

    normalised: a layer stood in front of them; mean_std: its numbers, where it had any.
    """

    weights: dict[str, Tensor]
    place: str
    normalised: bool
    mean_std: tuple[list[float], list[float]] | None
    notes: tuple[str, ...]


def read_weights(path: Path) -> Stored:
    """The tensors of a safetensors file, or of what torch.save wrote; nothing in it is run.

    Raises FileNotFoundError, and ValueError in one line.
    """
    with opened(path, "checkpoint") as file:
        start = file.read(9)
    if not start:
        raise ValueError(f"{path}: the checkpoint is empty")
    # A safetensors file is the length of a JSON object in 8 bytes, then that object.
    if start[8:] == b"{":
        try:
            with safetensors.safe_open(path, framework="pt", device="cpu") as tensors:
                state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
                return Stored(state, dict(tensors.metadata() or {}))
        except (safetensors.SafetensorError, *_UNREADABLE) as error:
            raise ValueError(f"{path}: not a readable safetensors file ({reason(error)})") from error
    try:
        content: Any = load_tensors(path, "checkpoint")
    except _UNREADABLE as error:
        raise ValueError(
            f"{path}: not a checkpoint of tensors ({_refused(error)}); "
            "save one with torch.save(model.state_dict(), ...) or as safetensors"
        ) from error
    arch, notes = None, []
    while isinstance(content, dict) and (key := next((k for k in _KEYS if isinstance(content.get(k), dict)), None)):
        arch = content["arch"] if isinstance(content.get("arch"), str) else arch
        if len(content) > 1 or key != "state_dict":
            notes.append(f"the weights lie under {key!r}")
        content = content[key]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: holds {'no tensors' if content == {} else type(content).__name__}, not a state_dict")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{path}: not a state_dict: {one_line(repr(name)[:80], 60)} is {type(tensor).__name__}, not a tensor"
            )
    return Stored(dict(content), {}, arch, tuple(notes))


def _refused(error: BaseException) -> str:
    """Why torch did not load a file: what it would have had to call, without its advice to allow that."""
    text = str(error)
    if (named := re.search(r"Unsupported global: GLOBAL (\S+)", text)) is not None:
        return f"it holds a {one_line(named[1], 80)}, and making one could run code"
    if isinstance(error, pickle.UnpicklingError) and "Weights only load failed" in text:
        told = re.search(r"WeightsUnpickler error: *([^\n]+)", text)
        return one_line(told[1] if told else "it is no file of torch.save", 120)
    return reason(error)


def fitted(path: Path, state: Mapping[str, Tensor], network: nn.Module, arch: str) -> Fitted:
    """The tensors under the network's own names.

    Which prefixes belong to wrappers is decided by the names that the network expects, never guessed; the network may
    itself be a wrapper with constants of its own around the one that was saved.

    Raises ValueError, with names that are missing and that are too many, where nothing fits.
    """
    names = dict(state)
    tried, removed = [names], ""
    before: dict[str, Tensor] | None = None
    while (place := _place(names, network)) is None:
        first = {name.partition(".")[0] for name in names}
        if before is None and first in ({"1"}, {"0", "1"}):
            before = {name[2:]: tensor for name, tensor in names.items() if name.startswith("0.")}
            names = {name[2:]: tensor for name, tensor in names.items() if name.startswith("1.")}
        elif len(first) == 1 and all("." in name for name in names):
            removed += f"{next(iter(first))}."
            names = {name.partition(".")[2]: tensor for name, tensor in names.items()}
        else:
            raise ValueError(f"{path}: does not fit {arch}: {_difference(tried, network)}")
        tried.append(names)
    if before and (before.keys() != {"mean", "std"} or any(not _is_constant(each) for each in before.values())):
        raise ValueError(f"{path}: does not fit {arch}, nor Normalize before it: unexpected {_some(before, '0.')}")
    notes = [f"the prefix {one_line(removed, 60)!r} was removed"] if removed else []
    part = network.get_submodule(place)
    counters = [name for name in part.state_dict() if name not in names]
    if counters:
        notes.append(f"{_COUNTER}, which it does not have, was set to 0")
    names |= {name: torch.zeros((), dtype=torch.int64) for name in counters}
    mean_std = (before["mean"].tolist(), before["std"].tolist()) if before else None
    return Fitted(names, place, before is not None, mean_std, tuple(notes))


def _is_constant(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dim() == 1 and _floats(tensor)


def _floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not tensor.is_quantized


def _place(names: Collection[str], network: nn.Module) -> str | None:
    """The part of a network whose tensors have these names and that holds all its parameters; "" is the whole."""
    whole, parameters = list(network.state_dict()), [name for name, _ in network.named_parameters()]
    for place, _ in network.named_modules():
        prefix = f"{place}." if place else ""
        if place and not all(name.startswith(prefix) for name in parameters):
            continue
        expected = {name[len(prefix) :] for name in whole if name.startswith(prefix)}
        if expected >= set(names) and all(name.endswith(_COUNTER) for name in expected.difference(names)):
            return place
    return None


def _difference(tried: list[dict[str, Tensor]], network: nn.Module) -> str:
    expected = network.state_dict().keys()
    names = min((each.keys() for each in tried), key=lambda names: len(names ^ expected))
    missing = {name for name in expected - names if not name.endswith(_COUNTER)}
    words = [("lacks", missing), ("has unexpected", names - expected)]
    return "it " + " and ".join(f"{word} {_some(some)}" for word, some in words if some)


def check_tensors(path: Path, weights: Mapping[str, Tensor], network: nn.Module, arch: str) -> None:
    """Raises ValueError where a tensor has another shape than the network's, or is not of its kind of numbers."""
    for name, here in network.state_dict().items():
        there = weights[name]
        kind = (
            "quantised" if there.is_quantized
            else "sparse" if there.layout != torch.strided
            else "without values" if there.device.type == "meta"
            else str(there.dtype).removeprefix("torch.") if _category(there) != _category(here)
            else None
        )  # fmt: skip
        if kind is not None:
            raise ValueError(f"{path}: does not fit {arch}: {name} is {kind} there, and {here.dtype} here")
        if there.shape != here.shape:
            raise ValueError(
                f"{path}: does not fit {arch}: {name} is {list(there.shape)} there and {list(here.shape)} here; "
                "check the network, num_classes, in_channels and image_size"
            )


def _category(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "floating"
    return "complex" if tensor.is_complex() else "bool" if tensor.dtype == torch.bool else "whole"


def _some(names: Iterable[str], prefix: str = "") -> str:
    """The first three names, and how many more there are."""
    first = sorted(names)
    shown = ", ".join(prefix + one_line(name, 60) for name in first[:3])
    return shown + (f" and {len(first) - 3} more" if len(first) > 3 else "")
