"""Files: only regular ones are read, they are written whole or not at all, by one run at a time, and runs go on from
them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from pacd_fast.arguments import one_line, readable, writable

__all__ = [
    "AnotherRun",
    "append_line",
    "check_expansion",
    "claimed",
    "keep_lines",
    "load_tensors",
    "locked",
    "new_file",
    "opened",
    "partial",
    "read",
    "read_json",
    "read_text",
    "reason",
    "replaced",
    "restore",
    "taken_up",
    "write",
]

_MOST_TIMES = 200  # that unpacking may make data larger; images reach 50, and a trap 1000
_UNSUSPICIOUS = 2**28  # bytes that anything may unpack to
_DISK = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "it grew too large"}


class AnotherRun(ValueError):
    """A file that is there belongs to a run with other settings."""


def opened(path: str | os.PathLike[str], kind: str = "file") -> BinaryIO:
    """A regular file, or a link to one, open to read bytes; devices, FIFOs and folders are refused, never opened.

    kind: what it should be, in messages.  Raises FileNotFoundError, ValueError or OSError.
    """
    path = readable(path, kind)
    # Should it become a FIFO between the look and the open, then the open does not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return open(descriptor, "rb")


def read_text(path: str | os.PathLike[str], kind: str = "file", limit: int = 2**26) -> str:
    """All of a text file of at most `limit` bytes.  Raises as `opened`, and ValueError for what is no UTF-8."""
    with opened(path, kind) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ValueError(f"{path} is larger than {limit >> 20} MiB, too large for a {kind}")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a {kind}: it is not text") from error


def read_json(path: str | os.PathLike[str], kind: str) -> Any:
    """The value of a JSON file.  Raises as `read_text`."""
    try:
        return json.loads(read_text(path, kind))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a {kind}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What went wrong in a few words: the first sentence of an error, and its name but for a ValueError."""
    text = re.split(r"\n|(?<=[a-z0-9)\]'\"])\. ", str(error).strip(), maxsplit=1)[0]
    if type(error) is ValueError and text:
        return one_line(text, 160)
    return f"{type(error).__name__}: {one_line(text, 120)}" if text else type(error).__name__


def check_expansion(path: str | os.PathLike[str], packed: int, unpacked: int) -> None:
    """Raises ValueError where bytes of a compressed file would unpack to a trap, or to more than the free memory."""
    if unpacked > max(_UNSUSPICIOUS, _MOST_TIMES * packed):
        raise ValueError(
            f"{path}: {packed} compressed bytes are to become {unpacked}, more than {_MOST_TIMES} times as many: "
            "no images are like that; if they are yours, save them without compression"
        )
    if unpacked > (free := _free_memory()):
        raise ValueError(f"{path}: its arrays take {unpacked >> 20} MiB, and {free >> 20} MiB of memory are free")


def _free_memory() -> int:
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        return int(re.search(r"^MemAvailable: *(\d+) kB", text, re.MULTILINE)[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        return 2**63


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write what is to stand at path: it gets there at the end, at once, or not at all after an error.

    A link stays, and its target is replaced; what is there must be a regular file.  Access rights stay as they were.
    An OSError about the disk names path.  Raises as `writable`.
    """
    path = Path(path)
    target = Path(os.path.realpath(writable(path)))
    mode = target.stat().st_mode & 0o7777 if target.exists() else None
    if mode is not None and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    temporary = target.with_name(f".{target.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            if mode is not None:
                os.fchmod(descriptor, mode)
            yield temporary
            os.fsync(descriptor)  # else a crash may leave an empty file at path
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
    except OSError as error:
        if error.filename not in (None, str(temporary), temporary):
            raise
        text = _DISK.get(error.errno or 0, error.strerror or str(error))
        raise OSError(error.errno, f"cannot be written: {text}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the right to write path; ValueError where another process has it.

    The lock is a file beside it, `.name.lock`, for path itself is replaced while it is written.  A kill leaves the file
    and not the lock.
    """
    target = Path(os.path.realpath(writable(path)))
    lock = target.with_name(f".{target.name[:100]}.lock")
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                break
        except BlockingIOError as error:
            os.close(descriptor)
            raise ValueError(f"{path} is being written by another process; choose another --out") from error
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its owner has just gone, and the file with it
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def partial(path: str | os.PathLike[str]) -> Path:
    """Where an unfinished run keeps its state: beside its result."""
    path = Path(path)
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def claimed(path: str | os.PathLike[str], *, force: bool = False, resume: bool = False) -> Iterator[Path]:
    """`new_file`, and nobody else writes it meanwhile."""
    with locked(path):
        yield new_file(path, force=force, resume=resume)


def new_file(path: str | os.PathLike[str], *, force: bool = False, resume: bool = False) -> Path:
    """The path of a result that is to be written and that is not there yet; with force it may be.

    resume: a run goes on, so that the unfinished state of an earlier one may be there too.
    Raises ValueError, and as `writable`.
    """
    path = writable(path)
    if path.exists() and not force and not (resume and partial(path).exists()):
        raise ValueError(f"{path} exists already: choose another name, or give --force to write it anew")
    if partial(path).exists() and not force and not resume:
        raise ValueError(
            f"{partial(path)} is there, of a run that was interrupted: give --resume to go on, --force to start again"
        )
    return path


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Adds a line to a text file that is there or is made."""
    with open(writable(path), "a", encoding="utf-8") as file:
        file.write(line + "\n")


def keep_lines(path: str | os.PathLike[str], epochs: int) -> None:
    """Leaves the lines of the first epochs in a metrics file: a run that starts or goes on writes the others again."""
    path = writable(path)
    lines = read_text(path, "file of metrics", 2**30).splitlines() if path.exists() else []
    if lines and not lines[0].startswith('{"epoch"'):
        raise ValueError(f"{path} is there and no file of metrics; give another name")
    with replaced(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines[:epochs]), encoding="utf-8")


def load_tensors(path: str | os.PathLike[str], kind: str, device: torch.device | str = "cpu") -> Any:
    """What torch.save wrote, where it is tensors and plain values: nothing in the file is run, or unpacked to more.

    Raises as `opened`, and for other content whatever torch.load does, or ValueError.
    """
    with opened(path, kind) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as parts:
                if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                    raise ValueError("it is compressed, as torch.save does not do it")
        file.seek(0)
        # The one thing that torch lets a file call which takes memory for nothing: bytearray(10**11).
        end = b""
        while block := file.read(2**20):
            if b"bytearray" in end + block:
                raise ValueError("it holds a bytearray, which is no tensor")
            end = block[-8:]
        file.seek(0)
        return torch.load(file, weights_only=True, map_location=device)


def write(path: str | os.PathLike[str], run: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Saves tensors and plain values, and what describes the run (JSON values); replaces the file at once."""
    with replaced(path) as temporary:
        try:
            torch.save({**state, "run": json.dumps(run)}, temporary)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(reason(error)) from error


def read(
    path: str | os.PathLike[str], run: Mapping[str, Any], kind: str, device: torch.device
) -> dict[str, Any] | None:
    """What `write` saved for this very run; None where there is no file.

    kind: what the file is called in messages, such as "training".
    Raises ValueError for a damaged file, and AnotherRun, naming the first thing that differs.
    """
    if not os.path.lexists(path):
        return None
    path = readable(path, f"{kind} checkpoint")
    try:
        state: dict[str, Any] = load_tensors(path, f"{kind} checkpoint", device)
        there, here = json.loads(state["run"]), json.loads(json.dumps(run))
        different = next((key for key, value in here.items() if there.get(key) != value), None)
    except Exception as error:  # a damaged file fails in many ways, and all mean the same
        raise ValueError(f"{path} is not a {kind} checkpoint ({reason(error)}); delete it to start again") from error
    if different is not None:
        raise AnotherRun(
            f"{path} is of another run: {different} is {there.get(different)} there and {here[different]} here; "
            "delete it to start again"
        )
    return state


@contextlib.contextmanager
def taken_up(path: str | os.PathLike[str]) -> Iterator[None]:
    """For taking up a state that `read` returned: what goes wrong then is the file's fault, and said so."""
    try:
        yield
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise AnotherRun(f"{path} does not fit this run ({reason(error)}); delete it to start again") from error


def restore(path: Path, network: nn.Module, weights: Any, optimizer: torch.optim.Optimizer, moments: Any) -> None:
    """Puts what a file holds into a network and its optimiser; AnotherRun where they are others."""
    try:
        network.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise AnotherRun(f"{path} is of another network; delete it to start again") from error
