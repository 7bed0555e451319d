"""Classifiers come back from files unchanged, and bad files are refused in one line."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pacd_fast.networks import build, fingerprint, load_checkpoint, save_checkpoint

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


TINY = f"{__name__}:tiny"


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def scrambled(model: nn.Module) -> nn.Module:
    """The model with random buffers too, so that a lost running mean is seen."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model


@pytest.mark.parametrize("mean", [None, (0.4914, 0.4822, 0.4465)])
def test_safetensors_round_trip(tmp_path, mean):
    path = tmp_path / "model.safetensors"
    model = scrambled(build("resnet20", **CIFAR, mean=mean, std=mean and (0.2, 0.3, 0.4)))
    metadata = {**METADATA, "architecture": "resnet20", "in_channels": "3", "image_size": "32x32"}
    save_checkpoint(path, model, {**metadata, "sigma": "0.5", "data": "cifar10-train@0123456789ab", "epochs": "3"})
    checkpoint = load_checkpoint(path)
    assert same(model, checkpoint.model)
    assert not any(module.training for module in checkpoint.model.modules())
    assert (checkpoint.arch, checkpoint.num_classes, checkpoint.in_channels) == ("resnet20", 10, 3)
    assert (checkpoint.image_size, checkpoint.sigma, checkpoint.data) == ((32, 32), 0.5, "cifar10-train@0123456789ab")
    assert checkpoint.metadata["epochs"] == "3"
    assert checkpoint.fingerprint == fingerprint(model)
    assert list(tmp_path.iterdir()) == [path]
    # What the caller knows must agree with what the file says.
    assert load_checkpoint(path, **CIFAR).num_classes == 10
    with pytest.raises(ValueError, match="its num_classes is 10, and 7 was asked for"):
        load_checkpoint(path, num_classes=7)


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, build("mnist-cnn", **MNIST), METADATA)
    before = path.read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, build("mnist-cnn", **MNIST), METADATA)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_save_refuses(tmp_path):
    model = build("mnist-cnn", **MNIST)
    with pytest.raises(ValueError, match="needs architecture, image_size"):
        save_checkpoint(tmp_path / "m", model, {"num_classes": "10", "in_channels": "1"})
    with pytest.raises(FileNotFoundError, match="does not exist"):
        save_checkpoint(tmp_path / "absent" / "m", model, METADATA)
    with pytest.raises(ValueError, match="is a folder"):
        save_checkpoint(tmp_path, model, METADATA)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_plain_state_dict(tmp_path, prefix, legacy):
    model = scrambled(build("mnist-cnn", **MNIST))
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    checkpoint = load_checkpoint(tmp_path / "m.pt", arch="mnist-cnn", **MNIST)
    assert same(model, checkpoint.model)
    assert checkpoint.sigma is None
    assert checkpoint.data is None
    with_mean = load_checkpoint(tmp_path / "m.pt", arch="mnist-cnn", **MNIST, mean=(0.1,), std=(0.2,))
    x = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(with_mean.model(x), model.eval()((x - 0.1) / 0.2))


@pytest.mark.parametrize("prefix", ["1.", "1.module.", "module.1."])
def test_locuslab_checkpoint(tmp_path, prefix):
    """The normalisation layer there has no state, so its constants are the known ones of CIFAR-10."""
    model = scrambled(build("resnet20", **CIFAR))
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    content = {"epoch": 90, "arch": "cifar_resnet20", "state_dict": state, "optimizer": {"state": {}, "lr": 0.1}}
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pth.tar")
    assert (checkpoint.arch, checkpoint.num_classes, checkpoint.image_size) == ("resnet20", 10, (32, 32))
    assert same(model, checkpoint.model[1])
    assert checkpoint.model[0].mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    assert checkpoint.model[0].std.tolist() == pytest.approx([0.2023, 0.1994, 0.2010])
    # The same tensors as a plain state_dict do not say how they were normalised.
    torch.save(state, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="give its mean and std"):
        load_checkpoint(tmp_path / "plain.pt", arch="resnet20", **CIFAR)
    given = load_checkpoint(tmp_path / "plain.pt", arch="cifar_resnet20", **CIFAR, mean=(0, 0, 0), std=(1, 1, 1))
    assert same(model, given.model[1])


def test_locuslab_checkpoint_of_a_network_that_is_not_built_in(tmp_path):
    model = scrambled(tiny(3))
    state = {"1.module." + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({"arch": "resnet50", "state_dict": state}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="holds the network 'resnet50', which is not built in; give arch"):
        load_checkpoint(tmp_path / "m.pt", num_classes=3)
    checkpoint = load_checkpoint(tmp_path / "m.pt", arch=TINY, num_classes=3, mean=(0.1,), std=(0.2,))
    assert same(model, checkpoint.model[1])


def test_prefixes_of_a_users_own_sequential_are_not_taken_for_wrappers(tmp_path):
    model = scrambled(tiny(3))
    assert set(model.state_dict()) == {"1.weight", "1.bias"}
    torch.save(model.state_dict(), tmp_path / "m.pt")
    checkpoint = load_checkpoint(tmp_path / "m.pt", arch=TINY, num_classes=3)
    assert same(model, checkpoint.model)
    model = scrambled(with_a_part_named_module(3))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    checkpoint = load_checkpoint(tmp_path / "m.pt", arch=f"{__name__}:with_a_part_named_module", num_classes=3)
    assert same(model, checkpoint.model)


def test_a_file_may_not_choose_code_to_run(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, tiny(3), {**METADATA, "num_classes": "3", "architecture": TINY})
    with pytest.raises(ValueError, match="a file may not choose to run"):
        load_checkpoint(path)
    assert load_checkpoint(path, arch=TINY).num_classes == 3


@pytest.mark.parametrize("prefix", ["module.", "model.", "net.", "model.module.", "anything."])
def test_prefixes_are_removed_and_named(tmp_path, prefix):
    model = scrambled(build("resnet20", **CIFAR))
    torch.save({prefix + name: tensor for name, tensor in model.state_dict().items()}, tmp_path / "m.pt")
    checkpoint = load_checkpoint(tmp_path / "m.pt", arch="resnet20", **CIFAR)
    assert same(model, checkpoint.model) and checkpoint.notes == (f"the prefix {prefix!r} was removed",)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net"])
def test_keys_of_training_scripts(tmp_path, key):
    model = scrambled(build("mnist-cnn", **MNIST))
    torch.save({key: model.state_dict(), "epoch": 3}, tmp_path / "m.pt")
    checkpoint = load_checkpoint(tmp_path / "m.pt", arch="mnist-cnn", **MNIST)
    assert same(model, checkpoint.model) and checkpoint.notes == (f"the weights lie under {key!r}",)


def test_counters_that_old_files_do_not_have(tmp_path):
    model = scrambled(build("resnet20", **CIFAR))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "m.pt")
    checkpoint = load_checkpoint(tmp_path / "m.pt", arch="resnet20", **CIFAR)
    assert same(model, checkpoint.model) and "num_batches_tracked" in checkpoint.notes[0]
    del state["bn1.running_mean"]  # which is no counter
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"it lacks bn1\.running_mean"):
        load_checkpoint(tmp_path / "m.pt", arch="resnet20", **CIFAR)


class Scaled(nn.Module):
    """A user's normalisation, with a constant of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.tensor([2.0]))

    def forward(self, x):
        return x * self.factor


def behind_scaling() -> nn.Module:
    """It takes no num_classes."""
    return nn.Sequential(Scaled(), build("mnist-cnn", **MNIST))


def test_a_users_wrapper_takes_the_weights_of_the_bare_network(tmp_path):
    bare, wrapped = scrambled(build("mnist-cnn", **MNIST)), f"{__name__}:behind_scaling"
    whole = behind_scaling()
    whole[1].load_state_dict(bare.state_dict())
    whole[0].factor.fill_(3)
    torch.save(bare.state_dict(), tmp_path / "bare.pt")
    torch.save({f"module.{k}": v for k, v in whole.state_dict().items()}, tmp_path / "whole.pt")
    x = torch.rand(2, 1, 28, 28)
    found = load_checkpoint(tmp_path / "bare.pt", arch=wrapped, num_classes=10).model
    torch.testing.assert_close(found(x), bare.eval()(2 * x))
    found = load_checkpoint(tmp_path / "whole.pt", arch=wrapped, num_classes=10).model
    torch.testing.assert_close(found(x), bare(3 * x))
    torch.save({"0.factor": torch.ones(1)}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"it lacks 1\.conv1\.bias"):
        load_checkpoint(tmp_path / "part.pt", arch=wrapped, num_classes=10)


BIAS = "conv1.bias"


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("int64", lambda t: t.long()),
        ("int8", lambda t: t.to(torch.int8)),
        ("bool", lambda t: t > 0),
        ("complex64", lambda t: t.to(torch.complex64)),
        ("quantised", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
        ("sparse", lambda t: t.to_sparse()),
        ("without values", lambda t: t.to("meta")),
    ],
)
def test_weights_of_another_kind_are_not_cast(tmp_path, kind, change):
    state = build("mnist-cnn", **MNIST).state_dict()
    torch.save({**state, BIAS: change(state[BIAS])}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=f"conv1.bias is {kind} there") as caught:
        load_checkpoint(tmp_path / "m.pt", arch="mnist-cnn", **MNIST)
    assert "\n" not in str(caught.value)


def test_other_floats_are_taken(tmp_path):
    state = build("mnist-cnn", **MNIST).state_dict()
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        torch.save({**state, BIAS: state[BIAS].to(dtype)}, tmp_path / "m.pt")
        found = load_checkpoint(tmp_path / "m.pt", arch="mnist-cnn", **MNIST).model.conv1.bias
        assert torch.equal(found, state[BIAS].to(dtype).float())


@pytest.mark.parametrize("change", [{"num_classes": "999999999"}, {"image_size": "999999999x999999999"}])
def test_metadata_that_ask_for_all_memory(tmp_path, change):
    save_file(build("mnist-cnn", **MNIST).state_dict(), tmp_path / "m", {**METADATA, **change})
    with pytest.raises(ValueError, match="does not fit mnist-cnn|mnist-cnn cannot have"):
        load_checkpoint(tmp_path / "m")


def test_loading_leaves_the_generator_alone(tmp_path):
    torch.save(build("mnist-cnn", **MNIST).state_dict(), tmp_path / "m.pt")
    torch.save(tiny(3).state_dict(), tmp_path / "t.pt")
    before = torch.get_rng_state()
    load_checkpoint(tmp_path / "m.pt", arch="mnist-cnn", **MNIST)
    load_checkpoint(tmp_path / "t.pt", arch=TINY, num_classes=3)
    assert torch.equal(torch.get_rng_state(), before)


class _Bomb:
    def __reduce__(self):
        return Path.touch, (Path(_Bomb.target),)


def test_pickled_code_is_not_executed(tmp_path):
    _Bomb.target = str(tmp_path / "executed")
    for content in (_Bomb(), {"state_dict": {"a": _Bomb()}}):
        torch.save(content, tmp_path / "m.pt")
        with pytest.raises(ValueError, match="it holds a .*, and making one could run code") as caught:
            load_checkpoint(tmp_path / "m.pt", arch="mnist-cnn", **MNIST)
        assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
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
        (bytes_of(build("mnist-cnn", **MNIST).state_dict())[:-2000], "not a checkpoint of tensors"),
        (bytes_of({}), "holds no tensors"),
        (bytes_of([torch.ones(2)]), "holds list, not a state_dict"),
        (bytes_of({"other": {"conv1.weight": torch.ones(2)}}), "'other' is dict, not a tensor"),
        (bytes_of({"conv1.weight": torch.ones(2)}), "it lacks conv1.bias, conv2.bias, conv2.weight and 4 more"),
        (bytes_of({**build("mnist-cnn", **MNIST).state_dict(), "x": torch.ones(2)}), "it has unexpected x"),
        (
            bytes_of(build("mnist-cnn", **{**MNIST, "image_size": (32, 32)}).state_dict()),
            "fc1.weight is [500, 1250] there and [500, 800] here",
        ),
        (
            bytes_of(
                {"0.scale": torch.ones(1), **{f"1.{k}": v for k, v in build("mnist-cnn", **MNIST).state_dict().items()}}
            ),
            "unexpected 0.scale",
        ),
        (bytes_of({"\x1b[31mred\n": torch.ones(1)}), "and has unexpected red; "),
        (bytes_of(build("resnet20", **CIFAR).state_dict()), "those of resnet20: give --model resnet20"),
        (
            bytes_of({"arch": "cifar_resnet110", "state_dict": build("mnist-cnn", **MNIST).state_dict()}),
            "its architecture is resnet110, and mnist-cnn was asked for",
        ),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "bad.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_checkpoint(path, arch="mnist-cnn", **MNIST)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_asked_for(tmp_path):
    path = tmp_path / "m.pt"
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match="is a folder, not a checkpoint"):
        load_checkpoint(tmp_path)
    torch.save(build("mnist-cnn", **MNIST).state_dict(), path)
    with pytest.raises(ValueError, match="does not say which network it holds"):
        load_checkpoint(path, **MNIST)
    with pytest.raises(ValueError, match="nothing says how many classes tiny is to have; give num_classes"):
        load_checkpoint(path, arch=TINY)
    with pytest.raises(ValueError, match="cannot import no_such_package"):  # which comes first
        load_checkpoint(path, arch="no_such_package:net")
    assert load_checkpoint(path, arch="mnist-cnn", in_channels=1, image_size=(28, 28)).num_classes == 10  # as the file
    with pytest.raises(ValueError, match="needs the number of channels"):
        load_checkpoint(path, arch="mnist-cnn", num_classes=10)


def untold() -> nn.Module:
    return tiny(3)


def test_a_users_network_that_is_not_told_shows_its_classes(tmp_path):
    torch.save(tiny(3).state_dict(), tmp_path / "m.pt")
    arch = f"{__name__}:untold"
    assert load_checkpoint(tmp_path / "m.pt", arch=arch, in_channels=1, image_size=(4, 4)).num_classes == 3
    with pytest.raises(ValueError, match=r"does not take images \(1, 5, 5\): .*mat1"):
        load_checkpoint(tmp_path / "m.pt", arch=arch, in_channels=1, image_size=(5, 5))
    with pytest.raises(ValueError, match="does not say how many classes"):
        load_checkpoint(tmp_path / "m.pt", arch=arch)


@pytest.mark.parametrize("given", [{}, {"num_classes": 10}])
def test_a_misfit_says_whose_names_they_are(tmp_path, given):
    torch.save(build("resnet20", **CIFAR).state_dict(), tmp_path / "m.pt")
    with pytest.raises(ValueError, match="its names are those of resnet20: give --model resnet20"):
        load_checkpoint(tmp_path / "m.pt", arch="mnist-cnn", in_channels=3, image_size=(32, 32), **given)


@pytest.mark.parametrize(("key", "text"), [("num_classes", "ten"), ("image_size", "28"), ("sigma", "half")])
def test_bad_metadata(tmp_path, key, text):
    save_file(build("mnist-cnn", **MNIST).state_dict(), tmp_path / "m", {**METADATA, key: text})
    with pytest.raises(ValueError, match=f"its metadata has {key} '{text}'"):
        load_checkpoint(tmp_path / "m")


def test_fingerprint_sees_names_dtypes_shapes_and_bytes():
    base = tiny(3)
    changed = tiny(3)
    changed.load_state_dict(base.state_dict())
    assert fingerprint(base) == fingerprint(changed)
    assert re.fullmatch("[0-9a-f]{12}", fingerprint(base))
    renamed = nn.Sequential(nn.Identity(), nn.Flatten(), base[1])
    reshaped = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    reshaped[1].weight = nn.Parameter(base[1].weight.detach().reshape(6, 8))
    reshaped[1].bias = base[1].bias
    with torch.no_grad():
        changed[1].bias[2] = torch.nextafter(changed[1].bias[2], torch.tensor(9.0))
    prints = {fingerprint(model) for model in (base, changed, renamed, reshaped)}
    prints.add(fingerprint(base.to(torch.bfloat16)))
    assert len(prints) == 5
