"""Networks have the papers' shapes; checkpoints come back unchanged, and bad ones are refused in one line."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from pacd_fast import models

MNIST = {"num_classes": 10, "in_channels": 1, "image_size": (28, 28)}
CIFAR = {"num_classes": 10, "in_channels": 3, "image_size": (32, 32)}
METADATA = {"architecture": "mnist-cnn", "num_classes": "10", "in_channels": "1", "image_size": "28x28"}


def tiny(num_classes: int) -> nn.Module:
    """A user's own network, found by the tests as python module:function."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, num_classes))


def with_a_part_named_module(num_classes: int) -> nn.Module:
    network = nn.Module()
    network.module = nn.Linear(16, num_classes)
    return network


def not_a_module(num_classes: int) -> int:
    return num_classes


def no_keyword(classes: int) -> nn.Module:
    return tiny(classes)


TINY = f"{__name__}:tiny"


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def scrambled(model: nn.Module) -> nn.Module:
    """The model with random buffers too, so that a lost running mean is seen."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model


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
    assert parameters(models.build(name, **shape)) == expected


@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (32, 32)), (2, (16, 21))])
@pytest.mark.parametrize("name", ["mnist-cnn", "convnet", "resnet20"])
def test_any_image_shape(name, channels, size):
    model = models.build(name, num_classes=7, in_channels=channels, image_size=size).eval()
    x = torch.rand(2, channels, *size)
    logits = model(x)
    assert logits.shape == (2, 7)
    # One image does not depend on the others in its batch, nor on the memory format.
    torch.testing.assert_close(logits[1:], model(x[1:]))
    torch.testing.assert_close(logits, model(x.contiguous(memory_format=torch.channels_last)))


def test_resnet_has_the_parameter_names_of_locuslab_and_the_depth():
    names = models.build("resnet20", **CIFAR).state_dict().keys()
    expected = {"conv1.weight", "bn1.running_mean", "layer1.2.conv2.weight", "layer3.2.bn2.bias", "fc.bias"}
    expected |= {"layer2.0.downsample.0.weight", "layer2.0.downsample.1.running_var", "layer3.0.downsample.1.weight"}
    assert expected <= names
    assert not [n for n in names if n.startswith(("layer1.0.downsample", "layer2.1.downsample"))]
    convolutions = [n for n in names if re.fullmatch(r"conv1.weight|layer.\.\d+\.conv\d.weight", n)]
    assert len(convolutions) + 1 == 20


def test_mnist_cnn_dropout_only_where_asked_for():
    x = torch.rand(4, 1, 28, 28)
    plain, dropping = models.MnistCNN(10, 1, (28, 28)), models.MnistCNN(10, 1, (28, 28), dropout=0.5)
    assert torch.equal(plain(x), plain(x))
    assert not torch.equal(dropping(x), dropping(x))


def test_normalize():
    x = torch.rand(2, 3, 4, 5)
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(models.Normalize(mean, std)(x), expected)
    for bad in [((0.1,), (1.0, 1.0)), ((), ()), ((0.1,), (0.0,)), ((float("nan"),), (1.0,))]:
        with pytest.raises(ValueError, match="mean"):
            models.Normalize(*bad)


def test_build_with_normalisation():
    model = models.build("mnist-cnn", **MNIST, mean=(0.13,), std=(0.31,))
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
        models.build(name, **{**MNIST, **change})
    assert "\n" not in str(caught.value)


def test_build_user_network():
    assert models.build(TINY, num_classes=3)(torch.rand(2, 4, 4)).shape == (2, 3)


@pytest.mark.parametrize("mean", [None, (0.4914, 0.4822, 0.4465)])
def test_safetensors_round_trip(tmp_path, mean):
    path = tmp_path / "model.safetensors"
    model = scrambled(models.build("resnet20", **CIFAR, mean=mean, std=mean and (0.2, 0.3, 0.4)))
    metadata = {**METADATA, "architecture": "resnet20", "in_channels": "3", "image_size": "32x32"}
    models.save_checkpoint(
        path, model, {**metadata, "sigma": "0.5", "data": "cifar10-train@0123456789ab", "epochs": "3"}
    )
    checkpoint = models.load_checkpoint(path)
    assert same(model, checkpoint.model)
    assert not any(module.training for module in checkpoint.model.modules())
    assert (checkpoint.arch, checkpoint.num_classes, checkpoint.in_channels) == ("resnet20", 10, 3)
    assert (checkpoint.image_size, checkpoint.sigma, checkpoint.data) == ((32, 32), 0.5, "cifar10-train@0123456789ab")
    assert checkpoint.metadata["epochs"] == "3"
    assert checkpoint.fingerprint == models.fingerprint(model)
    assert list(tmp_path.iterdir()) == [path]
    # What the caller knows must agree with what the file says.
    assert models.load_checkpoint(path, **CIFAR).num_classes == 10
    with pytest.raises(ValueError, match="its num_classes is 10, and 7 was asked for"):
        models.load_checkpoint(path, num_classes=7)


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "model.safetensors"
    models.save_checkpoint(path, models.build("mnist-cnn", **MNIST), METADATA)
    before = path.read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(OSError, match="No space"):
        models.save_checkpoint(path, models.build("mnist-cnn", **MNIST), METADATA)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_save_refuses(tmp_path):
    model = models.build("mnist-cnn", **MNIST)
    with pytest.raises(ValueError, match="needs architecture, image_size"):
        models.save_checkpoint(tmp_path / "m", model, {"num_classes": "10", "in_channels": "1"})
    with pytest.raises(FileNotFoundError, match="does not exist"):
        models.save_checkpoint(tmp_path / "absent" / "m", model, METADATA)
    with pytest.raises(ValueError, match="is a folder"):
        models.save_checkpoint(tmp_path, model, METADATA)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_plain_state_dict(tmp_path, prefix, legacy):
    model = scrambled(models.build("mnist-cnn", **MNIST))
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    checkpoint = models.load_checkpoint(tmp_path / "m.pt", arch="mnist-cnn", **MNIST)
    assert same(model, checkpoint.model)
    assert checkpoint.sigma is None
    assert checkpoint.data is None
    with_mean = models.load_checkpoint(tmp_path / "m.pt", arch="mnist-cnn", **MNIST, mean=(0.1,), std=(0.2,))
    x = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(with_mean.model(x), model.eval()((x - 0.1) / 0.2))


@pytest.mark.parametrize("prefix", ["1.", "1.module.", "module.1."])
def test_locuslab_checkpoint(tmp_path, prefix):
    """The normalisation layer there has no state, so its constants are the known ones of CIFAR-10."""
    model = scrambled(models.build("resnet20", **CIFAR))
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    content = {"epoch": 90, "arch": "cifar_resnet20", "state_dict": state, "optimizer": {"state": {}, "lr": 0.1}}
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    checkpoint = models.load_checkpoint(tmp_path / "checkpoint.pth.tar")
    assert (checkpoint.arch, checkpoint.num_classes, checkpoint.image_size) == ("resnet20", 10, (32, 32))
    assert same(model, checkpoint.model[1])
    assert checkpoint.model[0].mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    assert checkpoint.model[0].std.tolist() == pytest.approx([0.2023, 0.1994, 0.2010])
    # The same tensors as a plain state_dict do not say how they were normalised.
    torch.save(state, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="give its mean and std"):
        models.load_checkpoint(tmp_path / "plain.pt", arch="resnet20", **CIFAR)
    given = models.load_checkpoint(tmp_path / "plain.pt", arch="cifar_resnet20", **CIFAR, mean=(0, 0, 0), std=(1, 1, 1))
    assert same(model, given.model[1])


def test_locuslab_checkpoint_of_a_network_that_is_not_built_in(tmp_path):
    model = scrambled(tiny(3))
    state = {"1.module." + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({"arch": "resnet50", "state_dict": state}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="holds the network 'resnet50', which is not built in; give arch"):
        models.load_checkpoint(tmp_path / "m.pt", num_classes=3)
    checkpoint = models.load_checkpoint(tmp_path / "m.pt", arch=TINY, num_classes=3, mean=(0.1,), std=(0.2,))
    assert same(model, checkpoint.model[1])


def test_prefixes_of_a_users_own_sequential_are_not_taken_for_wrappers(tmp_path):
    model = scrambled(tiny(3))
    assert set(model.state_dict()) == {"1.weight", "1.bias"}
    torch.save(model.state_dict(), tmp_path / "m.pt")
    checkpoint = models.load_checkpoint(tmp_path / "m.pt", arch=TINY, num_classes=3)
    assert same(model, checkpoint.model)
    model = scrambled(with_a_part_named_module(3))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    checkpoint = models.load_checkpoint(tmp_path / "m.pt", arch=f"{__name__}:with_a_part_named_module", num_classes=3)
    assert same(model, checkpoint.model)


def test_a_file_may_not_choose_code_to_run(tmp_path):
    path = tmp_path / "m.safetensors"
    models.save_checkpoint(path, tiny(3), {**METADATA, "num_classes": "3", "architecture": TINY})
    with pytest.raises(ValueError, match="a file may not choose to run"):
        models.load_checkpoint(path)
    assert models.load_checkpoint(path, arch=TINY).num_classes == 3


class _Bomb:
    def __reduce__(self):
        return Path.touch, (Path(_Bomb.target),)


def test_pickled_code_is_not_executed(tmp_path):
    _Bomb.target = str(tmp_path / "executed")
    for content in (_Bomb(), {"state_dict": {"a": _Bomb()}}):
        torch.save(content, tmp_path / "m.pt")
        with pytest.raises(ValueError, match="not a checkpoint of tensors") as caught:
            models.load_checkpoint(tmp_path / "m.pt", arch="mnist-cnn", **MNIST)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def bytes_of(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"garbage, not a model", "not a checkpoint of tensors"),
        (b"\x05\0\0\0\0\0\0\0{}", "not a readable safetensors file"),
        (pickle.dumps([1, 2], protocol=2), "not a checkpoint of tensors"),
        (bytes_of(models.build("mnist-cnn", **MNIST).state_dict())[:-2000], "not a checkpoint of tensors"),
        (bytes_of({}), "holds no tensors"),
        (bytes_of([torch.ones(2)]), "holds list, not a state_dict"),
        (bytes_of({"net": {"conv1.weight": torch.ones(2)}}), "'net' is dict, not a tensor"),
        (bytes_of({"conv1.weight": torch.ones(2)}), "it lacks conv1.bias and 6 more"),
        (bytes_of({**models.build("mnist-cnn", **MNIST).state_dict(), "x": torch.ones(2)}), "it has unexpected x"),
        (
            bytes_of(models.build("mnist-cnn", **{**MNIST, "image_size": (32, 32)}).state_dict()),
            "fc1.weight is [500, 1250] there and [500, 800] here",
        ),
        (bytes_of({"0.scale": torch.ones(1), "1.conv1.weight": torch.ones(1)}), "unexpected 0.scale"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "bad.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        models.load_checkpoint(path, arch="mnist-cnn", **MNIST)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_asked_for(tmp_path):
    path = tmp_path / "m.pt"
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        models.load_checkpoint(path)
    with pytest.raises(ValueError, match="not a file"):
        models.load_checkpoint(tmp_path)
    torch.save(models.build("mnist-cnn", **MNIST).state_dict(), path)
    with pytest.raises(ValueError, match="does not say which network it holds"):
        models.load_checkpoint(path, **MNIST)
    with pytest.raises(ValueError, match="does not say how many classes"):
        models.load_checkpoint(path, arch="mnist-cnn")
    with pytest.raises(ValueError, match="needs the number of channels"):
        models.load_checkpoint(path, arch="mnist-cnn", num_classes=10)


@pytest.mark.parametrize(("key", "text"), [("num_classes", "ten"), ("image_size", "28"), ("sigma", "half")])
def test_bad_metadata(tmp_path, key, text):
    save_file(models.build("mnist-cnn", **MNIST).state_dict(), tmp_path / "m", {**METADATA, key: text})
    with pytest.raises(ValueError, match=f"its metadata has {key} '{text}'"):
        models.load_checkpoint(tmp_path / "m")


def test_fingerprint_sees_names_dtypes_shapes_and_bytes():
    base = tiny(3)
    changed = tiny(3)
    changed.load_state_dict(base.state_dict())
    assert models.fingerprint(base) == models.fingerprint(changed)
    assert re.fullmatch("[0-9a-f]{12}", models.fingerprint(base))
    renamed = nn.Sequential(nn.Identity(), nn.Flatten(), base[1])
    reshaped = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    reshaped[1].weight = nn.Parameter(base[1].weight.detach().reshape(6, 8))
    reshaped[1].bias = base[1].bias
    with torch.no_grad():
        changed[1].bias[2] = torch.nextafter(changed[1].bias[2], torch.tensor(9.0))
    prints = {models.fingerprint(model) for model in (base, changed, renamed, reshaped)}
    prints.add(models.fingerprint(base.to(torch.bfloat16)))
    assert len(prints) == 5


def test_batch_norm_in_eval_mode_is_part_of_the_convolution():
    """The same numbers as convolution, then batch norm, with the same gradients for images and parameters."""
    network = models.build("resnet20", num_classes=4, in_channels=3, image_size=(8, 8)).double().train()
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
    network = models.build(name, num_classes=5, in_channels=1, image_size=(28, 28)).double()
    x = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    plain = torch.autograd.grad(network(x).sin().sum(), list(network.parameters()))
    network.to(memory_format=torch.channels_last)
    ours = torch.autograd.grad(network(x).sin().sum(), list(network.parameters()))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
