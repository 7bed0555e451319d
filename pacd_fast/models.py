"""The papers' networks, the normalisation layer in front of them, and the checkpoints that keep both."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
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
from torch.nn import functional as F

from pacd_fast import layers

BUILT_IN = ("mnist-cnn", "convnet", "resnet20", "resnet56", "resnet110")

# The constants that locuslab/smoothing normalises CIFAR-10 with; its checkpoints do not store them.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2023, 0.1994, 0.2010)

_LOCUSLAB_NAMES = {"cifar_resnet20": "resnet20", "cifar_resnet110": "resnet110"}

# What torch.load raises on bytes that are no checkpoint: found by feeding it damaged and random files.
_UNREADABLE = (
    pickle.UnpicklingError, EOFError, LookupError, ValueError, RuntimeError, AssertionError,
    TypeError, AttributeError, ArithmeticError, struct.error,
)  # fmt: skip

_T = TypeVar("_T")


class Normalize(nn.Module):
    """(x - mean) / std per channel, as the first layer of a classifier.

    It sits inside the model so that noise is added, and a radius certified, in pixel units (Cohen et al. 2019).

    mean, std: one number per channel. x: floating [B, C, ...]; the result has its shape and dtype.
    Plain torch: ``(x - mean.view(1, C, 1, 1)) / std.view(1, C, 1, 1)``.
    Raises ValueError where the lengths differ, a number is not finite or a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or len(mean) == 0:
            raise ValueError(f"mean and std need one number per channel each, got {len(mean)} and {len(std)}")
        if not all(math.isfinite(m) for m in mean) or not all(math.isfinite(s) and s > 0 for s in std):
            raise ValueError(f"mean must be finite and std positive, got mean {tuple(mean)} and std {tuple(std)}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return (x - self.mean.view(shape)) / self.std.view(shape)


class MnistCNN(nn.Module):
    """The MNIST network of the PACD paper, appendix E.2.

    5x5 convolution with 20 filters, ReLU, 2x2 max-pooling; the same with 50 filters; 500 units with ReLU; logits.
    Convolutions are not padded. The paper's text has a dropout after the second pooling and the authors' code has
    none, so it is a keyword and off by default.

    x: floating [B, in_channels, *image_size] in [0, 1]; the result: logits [B, num_classes].
    Raises ValueError for images smaller than 16 x 16, of which nothing is left after the two poolings.
    """

    def __init__(self, num_classes: int, in_channels: int, image_size: tuple[int, int], dropout: float = 0.0) -> None:
        super().__init__()
        height, width = (((size - 4) // 2 - 4) // 2 for size in image_size)
        if height < 1 or width < 1:
            raise ValueError(f"mnist-cnn needs images of at least 16x16, got {image_size[0]}x{image_size[1]}")
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.dropout = nn.Dropout(dropout)
        self.fc1 = nn.Linear(50 * height * width, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = layers.max_pool_relu(self.conv2(layers.max_pool_relu(layers.convolution(self.conv1, x))))
        x = self.dropout(x).flatten(1)
        logits: Tensor = self.fc2(F.relu(self.fc1(x)))
        return logits


class ConvNet(nn.Module):
    """Five 3x3 convolutions, as small as attacks that train many networks on a CPU want it; no batch norm.

    Filters: width, 2 width, 2 width, 4 width, 4 width, all padded by 1, each with ReLU; 2x2 max-pooling after the
    first, the third and the fifth; a linear layer gives the logits.

    x: floating [B, in_channels, *image_size] in [0, 1]; the result: logits [B, num_classes].
    Raises ValueError for images smaller than 8 x 8, of which nothing is left after the three poolings.
    """

    def __init__(self, num_classes: int, in_channels: int, image_size: tuple[int, int], width: int = 8) -> None:
        super().__init__()
        height, width_left = (size // 8 for size in image_size)
        if height < 1 or width_left < 1:
            raise ValueError(f"convnet needs images of at least 8x8, got {image_size[0]}x{image_size[1]}")
        filters = [in_channels, width, 2 * width, 2 * width, 4 * width, 4 * width]
        pairs = zip(filters, filters[1:], strict=False)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)
        self.fc = nn.Linear(4 * width * height * width_left, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for i, convolution in enumerate(self.convolutions):
            x = layers.max_pool_relu(convolution(x)) if i in (0, 2, 4) else F.relu(convolution(x))
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def _convolved(convolution: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """norm(convolution(x)); in eval mode, where norm is affine, as one convolution with scaled filters.

    The same function up to rounding, with the same derivatives.  Batch norm in eval mode was a fifth of a pass.
    """
    if norm.training:
        result: Tensor = norm(convolution(x))
        return result
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.float() * torch.rsqrt(norm.running_var.float() + norm.eps)
    shift = norm.bias.float() - norm.running_mean.float() * scale
    filters = (convolution.weight.float() * scale.view(-1, 1, 1, 1)).to(convolution.weight.dtype)
    return F.conv2d(x, filters, shift.to(filters.dtype), convolution.stride, convolution.padding)


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to their input: ``relu(x' + bn2(conv2(relu(bn1(conv1(x))))))``.

    x' is x, or a strided 1x1 convolution of it where the shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(_convolved(self.conv1, self.bn1, x), inplace=True)
        y = _convolved(self.conv2, self.bn2, y)
        y += x if isinstance(self.downsample, nn.Identity) else _convolved(self.downsample[0], self.downsample[1], x)
        return F.relu(y, inplace=True)


class ResNet(nn.Module):
    """The residual network for CIFAR of He et al. 2016, section 4.2: depth 6n + 2, three stages of 16, 32, 64 filters.

    The shortcut across a change of shape is a 1x1 convolution with batch norm, not the parameter-free padding of the
    original: this is the network, with the parameter names, of locuslab/smoothing's ``cifar_resnet20`` and
    ``cifar_resnet110``, which the randomized-smoothing papers report.

    x: floating [B, in_channels, H, W] in [0, 1] (any H and W); the result: logits [B, num_classes].
    Raises ValueError where depth is not 6n + 2.
    """

    def __init__(self, depth: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(f"a CIFAR ResNet has depth 6n + 2 (8, 14, 20, ...), got {depth}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            first = _ResidualBlock(inputs, outputs, stride)
            return nn.Sequential(first, *(_ResidualBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

        self.layer1 = stage(16, 16, 1)
        self.layer2 = stage(16, 32, 2)
        self.layer3 = stage(32, 64, 2)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(_convolved(self.conv1, self.bn1, x), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int | None = None,
    image_size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """A freshly initialised classifier: images [B, in_channels, *image_size] in [0, 1] -> logits [B, num_classes].

    name: one of BUILT_IN, or ``package.module:function`` for a network of the user's own; the function (or class) is
    called with the keyword num_classes and returns an nn.Module. That imports and runs the user's code.
    in_channels, image_size (H, W): needed for a built-in network, unused for a user's.
    mean, std: with both given the result is ``nn.Sequential(Normalize(mean, std), network)``, else the bare network.

    Raises ValueError for an unknown name, a function that cannot be imported or called, or a result of another type.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    network: nn.Module
    if ":" in name:
        network = _user_network(name, num_classes)
    elif name not in BUILT_IN:
        raise ValueError(f"unknown model {name!r}: give {', '.join(BUILT_IN)} or package.module:function")
    elif in_channels is None or image_size is None:
        raise ValueError(f"{name} needs the number of channels and the size of the images (in_channels, image_size)")
    elif name == "mnist-cnn":
        network = MnistCNN(num_classes, in_channels, image_size)
    elif name == "convnet":
        network = ConvNet(num_classes, in_channels, image_size)
    else:
        network = ResNet(int(name.removeprefix("resnet")), num_classes, in_channels)
    return _behind_normalize(network, in_channels, mean, std)


def _behind_normalize(
    network: nn.Module, in_channels: int | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> nn.Module:
    if mean is None and std is None:
        return network
    if mean is None or std is None:
        raise ValueError("normalisation needs both mean and std, got only one of them")
    if in_channels is not None and len(mean) != in_channels:
        raise ValueError(f"mean and std have {len(mean)} channels and the images {in_channels}")
    return nn.Sequential(Normalize(mean, std), network)


def _user_network(name: str, num_classes: int) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise ValueError(f"model {name!r} is not of the form package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"model {name}: cannot import {module_name} ({error}); add its folder to PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"model {name}: {module_name} has no function {function_name}")
    try:
        inspect.signature(function).bind(num_classes=num_classes)
    except TypeError as error:
        raise ValueError(f"model {name}: it must be callable as {function_name}(num_classes=...): {error}") from error
    network = function(num_classes=num_classes)
    if not isinstance(network, nn.Module):
        raise ValueError(f"model {name}: it returned {type(network).__name__}, not a torch.nn.Module")
    return network


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(safetensors.torch.save(state, dict(metadata)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    model = _behind_normalize(network, in_channels, mean, std).eval()
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
