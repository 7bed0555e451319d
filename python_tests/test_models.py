"""Networks have the papers' shapes and derivatives; bad ones are refused in one line."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pacd_fast.networks import MnistCNN, Normalize, build

MNIST = {"num_classes": 10, "in_channels": 1, "image_size": (28, 28)}
CIFAR = {"num_classes": 10, "in_channels": 3, "image_size": (32, 32)}


def tiny(num_classes: int) -> nn.Module:
    """A user's own network, found by the tests as python module:function."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, num_classes))


def not_a_module(num_classes: int) -> int:
    return num_classes


def no_keyword(classes: int) -> nn.Module:
    return tiny(classes)


TINY = f"{__name__}:tiny"


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        # By hand: 20*25+20, 50*20*25+50, 800*500+500, 500*10+10.
        ("mnist-cnn", MNIST, 520 + 25_050 + 400_500 + 5_010),
        # By hand, 9 weights a pair of filters: 8*3*9+8, 16*8*9+16, 16*16*9+16, 32*16*9+32, 32*32*9+32, 10*32*16+10.
        ("convnet", CIFAR, 224 + 1_168 + 2_320 + 4_640 + 9_248 + 5_130),
        # He et al. report 0.27M, 0.85M and 1.7M; two projection shortcuts add 16*32+64 and 32*64+128.
        ("resnet20", CIFAR, 269_722 + 576 + 2_176),
        ("resnet56", CIFAR, 853_018 + 576 + 2_176),
        ("resnet110", CIFAR, 1_727_962 + 576 + 2_176),
    ],
)
def test_parameter_counts(name, shape, expected):
    assert parameters(build(name, **shape)) == expected


@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (32, 32)), (2, (16, 21))])
@pytest.mark.parametrize("name", ["mnist-cnn", "convnet", "resnet20"])
def test_any_image_shape(name, channels, size):
    model = build(name, num_classes=7, in_channels=channels, image_size=size).eval()
    x = torch.rand(2, channels, *size)
    logits = model(x)
    assert logits.shape == (2, 7)
    # One image does not depend on the others in its batch, nor on the memory format.
    torch.testing.assert_close(logits[1:], model(x[1:]))
    torch.testing.assert_close(logits, model(x.contiguous(memory_format=torch.channels_last)))


def test_resnet_has_the_parameter_names_of_locuslab_and_the_depth():
    names = build("resnet20", **CIFAR).state_dict().keys()
    expected = {"conv1.weight", "bn1.running_mean", "layer1.2.conv2.weight", "layer3.2.bn2.bias", "fc.bias"}
    expected |= {"layer2.0.downsample.0.weight", "layer2.0.downsample.1.running_var", "layer3.0.downsample.1.weight"}
    assert expected <= names
    assert not [n for n in names if n.startswith(("layer1.0.downsample", "layer2.1.downsample"))]
    convolutions = [n for n in names if re.fullmatch(r"conv1.weight|layer.\.\d+\.conv\d.weight", n)]
    assert len(convolutions) + 1 == 20


def test_mnist_cnn_dropout_only_where_asked_for():
    x = torch.rand(4, 1, 28, 28)
    plain, dropping = MnistCNN(10, 1, (28, 28)), MnistCNN(10, 1, (28, 28), dropout=0.5)
    assert torch.equal(plain(x), plain(x))
    assert not torch.equal(dropping(x), dropping(x))


def test_normalize():
    x = torch.rand(2, 3, 4, 5)
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(Normalize(mean, std)(x), expected)
    for bad in [((0.1,), (1.0, 1.0)), ((), ()), ((0.1,), (0.0,)), ((float("nan"),), (1.0,))]:
        with pytest.raises(ValueError, match="mean"):
            Normalize(*bad)


def test_build_with_normalisation():
    model = build("mnist-cnn", **MNIST, mean=(0.13,), std=(0.31,))
    x = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(model(x), model[1]((x - 0.13) / 0.31))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("alexnet", {}, "unknown model 'alexnet'"),
        ("mnist-cnn", {"image_size": (15, 28)}, "at least 16x16, got 15x28"),
        ("convnet", {"image_size": (32, 7)}, "at least 8x8, got 32x7"),
        ("mnist-cnn", {"num_classes": 1}, "num_classes must be at least 2"),
        ("mnist-cnn", {"in_channels": None}, "needs the number of channels"),
        ("mnist-cnn", {"mean": (0.5,)}, "both mean and std"),
        ("mnist-cnn", {"mean": (0.5, 0.5), "std": (1.0, 1.0)}, "2 channels and the images 1"),
        ("no_such_package:net", {}, "cannot import no_such_package"),
        (f"{__name__}:absent", {}, "has no function absent"),
        (f"{__name__}:TINY", {}, "has no function TINY"),
        (f"{__name__}:not_a_module", {}, "returned int, not a torch.nn.Module"),
        (f"{__name__}:no_keyword", {}, "callable as no_keyword"),
        (":tiny", {}, "not of the form"),
        ("a b:tiny", {}, "not of the form"),
    ],
)
def test_build_refuses(name, change, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        build(name, **{**MNIST, **change})
    assert "\n" not in str(caught.value)


def test_build_user_network():
    assert build(TINY, num_classes=3)(torch.rand(2, 4, 4)).shape == (2, 3)


def test_batch_norm_in_eval_mode_is_part_of_the_convolution():
    """The same numbers as convolution, then batch norm, with the same gradients for images and parameters."""
    network = build("resnet20", num_classes=4, in_channels=3, image_size=(8, 8)).double().train()
    x = torch.rand(6, 3, 8, 8, dtype=torch.float64)
    network(x)
    block = network.layer2[0].eval()
    y = torch.rand(2, 16, 8, 8, dtype=torch.float64, requires_grad=True)
    apart = F.relu(block.bn1(block.conv1(y)))
    apart = F.relu(block.bn2(block.conv2(apart)) + block.downsample(y))
    values = [y, *block.parameters()]
    torch.testing.assert_close(block(y), apart, rtol=1e-6, atol=1e-6)  # the filters are scaled in float32
    for ours, plain in zip(
        torch.autograd.grad(block(y).sum(), values), torch.autograd.grad(apart.sum(), values), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mnist-cnn", "convnet"])
def test_pooling_in_either_layout_is_the_same_function(name):
    """channels_last takes the package's operator, the default layout torch's."""
    network = build(name, num_classes=5, in_channels=1, image_size=(28, 28)).double()
    x = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    plain = torch.autograd.grad(network(x).sin().sum(), list(network.parameters()))
    network.to(memory_format=torch.channels_last)
    ours = torch.autograd.grad(network(x).sin().sum(), list(network.parameters()))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
