"""An .npz is looked at before it is unpacked: traps cost neither memory nor time, real data sets load."""

from __future__ import annotations

import resource
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Fork

from pacd_fast.data import load_dataset, open_npz


def header(shape, dtype="|u1", fortran=False, version=(1, 0)) -> bytes:
    text = f"{{'descr': {dtype!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    size = 10 if version == (1, 0) else 12
    text += b" " * (-(size + len(text) + 1) % 64) + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(text)) + text


def archive(path: Path, method=zipfile.ZIP_DEFLATED, **parts: bytes | tuple[bytes, int]) -> str:
    """An .npz of raw parts; (start, zeros): bytes and so many zeros after them, written piece by piece."""
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in parts.items():
            start, zeros = content if isinstance(content, tuple) else (content, 0)
            with file.open(f"{name}.npy", "w", force_zip64=True) as part:
                part.write(start)
                for _ in range(zeros >> 20):
                    part.write(bytes(2**20))
    return str(path)


LABELS = header((4,), "<i8") + bytes(32)


@pytest.fixture(scope="module")
def trap(tmp_path_factory) -> str:
    """256 MiB of zeros in 256 KiB."""
    path = tmp_path_factory.mktemp("trap") / "trap.npz"
    return archive(path, x_train=(header((4, 1, 2**13, 2**13)), 2**28), y_train=LABELS, x_test=LABELS, y_test=LABELS)


def load(path: str, log: Path) -> tuple[str, int]:
    """What a process of its own prints about a file, and the KiB that it took."""

    def function() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            load_dataset(path)
        except ValueError as error:
            print(error)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    *said, memory = Fork(function, log).ended().splitlines()
    return "\n".join(said), int(memory)


def test_a_trap_is_not_unpacked(trap, tmp_path):
    said, memory = load(trap, tmp_path / "log")
    assert "more than 200 times as many" in said and memory < 2**14


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (header((10**9, 10**9)) + bytes(10), "x_train says shape (1000000000, 1000000000) of uint8, and has 10 bytes"),
        (header((-1, -10)) + bytes(10), "says shape (-1, -10)"),
        (header((4, 8, 8), "|O") + bytes(10), "holds object, not numbers"),
        (header((10**12,), "<U0"), "holds <U0, not numbers"),
        (header((4, 8, 8), [("a", "<i4")]), "not numbers"),
        (header((4, 8, 8))[:20], "not a readable .npz file"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + bytes(100), "not a readable .npz file"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**14 - 12) + b"(" * 2**14, "not a readable .npz file"),
        (header((4, 8, 8), version=(3, 0)), "version 3.0"),
        (b"", "not a readable .npz file"),
        (bytes(1000), "not a readable .npz file"),
    ],
)
def test_headers_that_lie(tmp_path, part, message):
    path = archive(tmp_path / "a.npz", x_train=part, y_train=LABELS, x_test=part, y_test=LABELS)
    with pytest.raises(ValueError) as caught:
        load_dataset(path)
    assert message in str(caught.value) and str(caught.value).startswith(path) and "\n" not in str(caught.value)


def test_sizes_that_lie_in_the_directory(tmp_path):
    """The directory of the archive says that a part is large, and there is not so much in it."""
    path = tmp_path / "a.npz"
    small = header((4, 8, 8)) + bytes(256)
    archive(path, zipfile.ZIP_STORED, x_train=small, y_train=LABELS, x_test=small, y_test=LABELS)
    raw = bytearray(path.read_bytes())
    at = raw.find(b"PK\x01\x02")
    raw[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"not a readable \.npz"):
        load_dataset(str(path))


def test_other_compressions_are_refused(tmp_path):
    path = archive(tmp_path / "a.npz", zipfile.ZIP_LZMA, x_train=LABELS, y_train=LABELS, x_test=LABELS, y_test=LABELS)
    with pytest.raises(ValueError, match="compressed in a way"):
        load_dataset(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back(tmp_path, save):
    rng = np.random.default_rng(0)
    arrays = {
        "c": rng.random((3, 4, 5)),
        "fortran": np.asfortranarray(rng.random((3, 4, 5), dtype=np.float32)),
        "big": np.arange(6, dtype=">i4").reshape(2, 3),
        "text": np.array("NCHW"),
        "empty": np.zeros((0, 7)),
        "large": rng.integers(0, 256, 3 * 2**20, dtype=np.uint8),
    }
    save(tmp_path / "a.npz", **arrays)
    with open_npz(tmp_path / "a.npz") as file:
        file.look([*arrays, "absent"])
        assert set(file.declared) == set(arrays)
        for name, array in arrays.items():
            found = file.read(name)
            assert found.dtype == array.dtype.newbyteorder("=") and np.array_equal(found, array)


def test_a_file_as_large_as_cifar10_loads(tmp_path):
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    many = {"x_train": np.tile(digits, (5000, 1, 1, 1)), "y_train": np.arange(50000) % 10}
    np.savez(tmp_path / "cifar10.npz", **many, x_test=digits, y_test=np.arange(10))
    started = time.process_time()
    data = load_dataset(str(tmp_path / "cifar10.npz"))
    assert len(data.x_train) == 50000 and time.process_time() - started < 10
    assert torch.equal(data.x_train[49999], torch.from_numpy(digits[9].transpose(2, 0, 1)))


def test_a_file_that_is_mostly_blank_loads(tmp_path):
    """Compressed 700 times, and small enough to need no reason."""
    images = np.zeros((1000, 28, 28), np.uint8)
    images[:, 3, 3] = 200
    np.savez_compressed(
        tmp_path / "a.npz", x_train=images, y_train=np.arange(1000) % 2, x_test=images, y_test=np.arange(1000) % 2
    )
    assert len(load_dataset(str(tmp_path / "a.npz")).x_test) == 1000
