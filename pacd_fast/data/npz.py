"""Arrays from .npz files: what a file declares is looked at before anything of it is unpacked."""

from __future__ import annotations

import contextlib
import io
import math
import os
import zipfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pacd_fast.files import check_expansion, opened, reason

# What zipfile, zlib and numpy raise on damaged, encrypted and foreign files: found by feeding them such.
UNREADABLE = (
    ValueError, OSError, EOFError, RuntimeError, AttributeError, TypeError, LookupError, SyntaxError, ArithmeticError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_HEADER = 2**14  # bytes of a part that hold its header, and more than any header of a plain array


@dataclass(frozen=True)
class Declared:
    """What a part of the file says about its array, and where its numbers begin."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    start: int
    part: zipfile.ZipInfo

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Npz:
    """An open .npz file: `declared` by name, and the arrays themselves by `read`."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, size: int) -> None:
        self.path, self.archive, self.size = path, archive, size
        self.declared: dict[str, Declared] = {}

    def look(self, names: Collection[str]) -> None:
        """Fills `declared` with those of these arrays that there are.

        Raises ValueError for objects, and where sizes do not agree or are a trap.
        """
        parts = {part.filename.removesuffix(".npy"): part for part in self.archive.infolist()}
        self.declared = {name: self._declared(name, parts[name]) for name in names if name in parts}
        packed = sum(each.part.compress_size for each in self.declared.values())
        check_expansion(self.path, min(packed, self.size), sum(each.bytes for each in self.declared.values()))

    def _declared(self, name: str, part: zipfile.ZipInfo) -> Declared:
        if part.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is compressed in a way that numpy does not use")
        with self.archive.open(part) as stream:
            head = io.BytesIO(stream.read(_HEADER))
        version = np.lib.format.read_magic(head)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} is of .npy version {version[0]}.{version[1]}, which plain arrays do not need")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(head)
        if dtype.kind not in "biufcU" or dtype.itemsize == 0:
            raise ValueError(f"{name} holds {dtype}, not numbers")
        found = Declared(tuple(int(size) for size in shape), dtype, fortran, head.tell(), part)
        if any(size < 0 for size in found.shape) or found.start + found.bytes != part.file_size:
            raise ValueError(
                f"{name} says shape {found.shape} of {dtype}, and has {part.file_size - found.start} bytes"
            )
        return found

    def read(self, name: str) -> np.ndarray:
        """One of the declared arrays, in this machine's byte order."""
        declared = self.declared[name]
        flat = np.empty(math.prod(declared.shape), declared.dtype)
        into, at = memoryview(flat.view(np.uint8)), 0  # type: ignore[arg-type]
        with self.archive.open(declared.part) as stream:
            stream.read(declared.start)
            while at < len(into):
                block = stream.read(min(2**20, len(into) - at))
                if not block:
                    raise EOFError(f"{name} ends after {at} of {len(into)} bytes")
                into[at : at + len(block)] = block
                at += len(block)
        array = flat.reshape(declared.shape[::-1]).T if declared.fortran else flat.reshape(declared.shape)
        return array.astype(declared.dtype.newbyteorder("="), copy=False)


@contextlib.contextmanager
def open_npz(path: str | os.PathLike[str], kind: str = ".npz file") -> Iterator[Npz]:
    """An .npz file to read arrays of numbers and text from; pickled objects are refused, and so is what is no .npz.

    kind: what the file should be, in messages.
    Raises FileNotFoundError, and ValueError in one line; the reading inside it does as well.
    """
    path = Path(path)
    with opened(path, kind) as raw:
        try:
            with zipfile.ZipFile(raw) as archive:
                yield Npz(path, archive, os.fstat(raw.fileno()).st_size)
        except UNREADABLE as error:
            if isinstance(error, ValueError) and str(error).startswith(str(path)):
                raise  # it says already which file, and what about it
            raise ValueError(f"{path}: not a readable {kind} of plain arrays ({reason(error)})") from error
