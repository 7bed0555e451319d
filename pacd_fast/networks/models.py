"""The papers' networks, and the normalisation layer in front of them."""

from __future__ import annotations

import importlib
import inspect
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pacd_fast.files import reason
from pacd_fast.networks import layers

BUILT_IN = ("mnist-cnn", "convnet", "resnet20", "resnet56", "resnet110")

# The constants that locuslab/smoothing normalises CIFAR-10 with; its checkpoints do not store them.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2023, 0.1994, 0.2010)


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


def _convolved(convolution: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(convolution(x)); in eval mode, where norm is affine, as one convolution with scaled filters.

    The same function up to rounding, with the same derivatives.  Batch norm in eval mode was a fifth of a pass.  A norm
    that was folded already is nn.Identity.
    """
    if norm.training or not isinstance(norm, nn.BatchNorm2d):
        result: Tensor = norm(layers.convolution(convolution, x))
        return result
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.float() * torch.rsqrt(norm.running_var.float() + norm.eps)
    shift = norm.bias.float() - norm.running_mean.float() * scale
    filters = (convolution.weight.float() * scale.view(-1, 1, 1, 1)).to(convolution.weight.dtype)
    return layers.conv2d(x, filters, shift.to(filters.dtype), convolution.stride, convolution.padding)


class ResidualBlock(nn.Module):
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

    def pairs(self) -> list[tuple[str, str]]:
        """Names of convolutions and the batch norms that follow them."""
        pairs = [("conv1", "bn1"), ("conv2", "bn2")]
        return pairs if isinstance(self.downsample, nn.Identity) else [*pairs, ("downsample.0", "downsample.1")]

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
            first = ResidualBlock(inputs, outputs, stride)
            return nn.Sequential(first, *(ResidualBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

        self.layer1 = stage(16, 16, 1)
        self.layer2 = stage(16, 32, 2)
        self.layer3 = stage(32, 64, 2)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def pairs(self) -> list[tuple[str, str]]:
        """Names of convolutions and the batch norms that follow them, those of the blocks aside."""
        return [("conv1", "bn1")]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(_convolved(self.conv1, self.bn1, x), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def build(
    name: str,
    *,
    num_classes: int | None,
    in_channels: int | None = None,
    image_size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """A freshly initialised classifier: images [B, in_channels, *image_size] in [0, 1] -> logits [B, num_classes].

    name: one of BUILT_IN, or ``package.module:function`` for a network of the user's own; the function (or class) is
    called with the keyword num_classes where it takes it, else without arguments, and returns an nn.Module. That
    imports and runs the user's code.
    num_classes: None for a user's network that does not have to be told.
    in_channels, image_size (H, W): needed for a built-in network, unused for a user's.
    mean, std: with both given the result is ``nn.Sequential(Normalize(mean, std), network)``, else the bare network.

    Raises ValueError for an unknown name, a function that cannot be imported or called, or a result of another type.
    """
    if num_classes is not None and num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    network: nn.Module
    if ":" in name:
        network = _user_network(name, num_classes)
    elif name not in BUILT_IN:
        raise ValueError(f"unknown model {name!r}: give {', '.join(BUILT_IN)} or package.module:function")
    elif num_classes is None:
        raise ValueError(f"{name} needs the number of classes (num_classes)")
    elif in_channels is None or image_size is None:
        raise ValueError(f"{name} needs the number of channels and the size of the images (in_channels, image_size)")
    elif name == "mnist-cnn":
        network = MnistCNN(num_classes, in_channels, image_size)
    elif name == "convnet":
        network = ConvNet(num_classes, in_channels, image_size)
    else:
        network = ResNet(int(name.removeprefix("resnet")), num_classes, in_channels)
    return behind_normalize(network, in_channels, mean, std)


def behind_normalize(
    network: nn.Module, in_channels: int | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> nn.Module:
    if mean is None and std is None:
        return network
    if mean is None or std is None:
        raise ValueError("normalisation needs both mean and std, got only one of them")
    if in_channels is not None and len(mean) != in_channels:
        raise ValueError(f"mean and std have {len(mean)} channels and the images {in_channels}")
    return nn.Sequential(Normalize(mean, std), network)


def _user_network(name: str, num_classes: int | None) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise ValueError(f"model {name!r} is not of the form package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"model {name}: cannot import {module_name} ({error}); add its folder to PYTHONPATH"
        ) from error
    except Exception as error:
        raise ValueError(f"model {name}: {module_name} cannot be imported: {_failure(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"model {name}: {module_name} has no function {function_name}")
    told = _takes(function, num_classes=num_classes or 2)
    if num_classes is None and told and not _takes(function):
        raise ValueError(
            f"model {name}: nothing says how many classes {function_name} is to have; give num_classes (command line: "
            "--num-classes)"
        )
    try:
        network = function(num_classes=num_classes) if told and num_classes is not None else function()
    except TypeError as error:
        raise ValueError(
            f"model {name}: it must be callable as {function_name}(num_classes=...) or {function_name}(): "
            f"{_failure(error)}"
        ) from error
    except Exception as error:
        raise ValueError(f"model {name}: {function_name} failed: {_failure(error)}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"model {name}: it returned {type(network).__name__}, not a torch.nn.Module")
    return network


def _takes(function: Callable[..., object], **keywords: int) -> bool:
    """Whether it can be called with these keywords alone; one that does not say what it takes is taken to."""
    try:
        inspect.signature(function).bind(**keywords)
    except TypeError:
        return False
    except ValueError:
        pass
    return True


@contextmanager
def takes(shape: Sequence[int]) -> Iterator[None]:
    """Around a first pass of images of this shape [C, H, W]: where they do not fit the network, a ValueError says so.

    An error of the memory stays what it is.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, IndexError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"the model does not take images {tuple(shape)}: {first}") from error


def _failure(error: BaseException) -> str:
    """What a user's code raised, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return reason(error) + where
