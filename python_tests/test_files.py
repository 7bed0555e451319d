"""Files: what is no regular file is refused, what is written is whole or not there, and has one writer."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import test_metapoison
import test_pacd_promises
import test_training
import torch
from forks import Fork

from pacd_fast import files
from pacd_fast.arguments import NotANumber, number, one_line, whole_number
from pacd_fast.poisoning import Ball, Pacd, metapoison, pacd

CPU = torch.device("cpu")


def irregular(folder: Path) -> dict[str, Path]:
    """One of each kind of thing that is no file, by what it is called."""
    fifo, sock, link = folder / "fifo", folder / "sock", folder / "link"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(sock))
    link.symlink_to("/dev/zero")
    return {"a FIFO": fifo, "a socket": sock, "a device": Path("/dev/full"), "a folder": folder, "a device ": link}


def test_what_is_no_file_is_refused_without_opening_it(tmp_path):
    for kind, path in irregular(tmp_path).items():
        with pytest.raises(ValueError, match=f"is {kind.strip()}, not a results file"):
            files.opened(path, "results file")
        with pytest.raises(ValueError, match=f"is {kind.strip()}; give the name of a file"):
            with files.replaced(path):
                pytest.fail("it was going to be replaced")
        with pytest.raises(ValueError, match=f"is {kind.strip()}; give the name of a file"):
            files.append_line(path, "x")
        with pytest.raises(ValueError, match="give the name of a file"):
            files.new_file(path, force=True)
    with pytest.raises(FileNotFoundError, match="absent: no such results file"):
        files.opened(tmp_path / "absent", "results file")
    with pytest.raises(FileNotFoundError, match="the folder .* does not exist"):
        files.new_file(tmp_path / "no" / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "link", "sock"]


def test_a_link_is_read_and_written_through(tmp_path):
    (tmp_path / "there").mkdir()
    target, link, dangling = tmp_path / "there" / "a", tmp_path / "a", tmp_path / "b"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "there" / "b")
    for path in (link, dangling):
        with files.replaced(path) as temporary:
            temporary.write_text("new")
        assert path.is_symlink() and path.read_text() == "new"
        with files.opened(path) as file:
            assert file.read() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["a", "b"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyError), files.replaced(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB, where one may be made."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be made here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_named(small_disk):
    path = small_disk / "a"
    path.write_text("old")
    with pytest.raises(OSError, match="the disk is full") as caught, files.replaced(path) as temporary:
        temporary.write_bytes(bytes(2**20))
    assert caught.value.filename == str(path)
    with pytest.raises(OSError, match="cannot be written") as caught:
        files.write(path, {}, {"x": torch.zeros(2**20)})
    assert caught.value.filename == str(path)
    assert path.read_text() == "old" and list(small_disk.iterdir()) == [path]


def test_one_writer_at_a_time(tmp_path):
    path, log = tmp_path / "out", tmp_path.with_name(f"{tmp_path.name}.log")

    def hold() -> None:
        with files.locked(path):
            print("held", flush=True)
            time.sleep(600)

    holder = Fork(hold, log)
    while holder.running() and not holder.said():
        time.sleep(0.002)
    with pytest.raises(ValueError, match="is being written by another process"), files.locked(path):
        pytest.fail("two writers")
    holder.kill()
    with files.locked(path):  # a kill leaves no lock
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_written_over(tmp_path):
    path = tmp_path / "out"
    assert files.new_file(path) == path
    files.partial(path).touch()
    with pytest.raises(ValueError, match="give --resume to go on"):
        files.new_file(path)
    assert files.new_file(path, resume=True) == files.new_file(path, force=True) == path
    path.touch()
    assert files.new_file(path, resume=True) == path  # a run that was to write it anew
    files.partial(path).unlink()
    for resume in (False, True):
        with pytest.raises(ValueError, match="exists already"):
            files.new_file(path, resume=resume)
    assert files.new_file(path, force=True) == path


def test_metrics_of_something_else_are_left_alone(tmp_path):
    path = tmp_path / "metrics"
    path.write_text("mine\n")
    with pytest.raises(ValueError, match="no file of metrics"):
        files.keep_lines(path, 0)
    assert path.read_text() == "mine\n"
    path.write_text('{"epoch": 0}\n{"epoch": 1}\n')
    files.keep_lines(path, 1)
    files.append_line(path, "more")
    assert path.read_text() == '{"epoch": 0}\nmore\n'


def test_text_and_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"[" * 10**6)
    with pytest.raises(ValueError, match="is not a table"):
        files.read_json(path, "table")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="it is not text"):
        files.read_json(path, "table")
    path.write_bytes(bytes(100))
    with pytest.raises(ValueError, match="larger than 0 MiB"):
        files.read_text(path, "table", 99)
    path.write_text(json.dumps({"a": 1}))
    assert files.read_json(path, "table") == {"a": 1}


class Allocate:
    def __reduce__(self):
        return bytearray, (10**11,)


def test_tensors_that_unpack_to_more_than_they_are(tmp_path):
    path = tmp_path / "bomb.pt"
    path.write_bytes(pickle.dumps(Allocate(), protocol=2))
    with pytest.raises(ValueError, match="bytearray"):
        files.load_tensors(path, "checkpoint")
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in whole.infolist():
            packed.writestr(part.filename, whole.read(part))
    with pytest.raises(ValueError, match="it is compressed"):
        files.load_tensors(path, "checkpoint")
    assert files.load_tensors(tmp_path / "whole.pt", "checkpoint")["a"].shape == (10**6,)


class Touch:
    """Makes a file when it is unpickled by a loader that calls what it is told to."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["fit", "pacd", "metapoison"])
def test_a_state_file_runs_no_code(tmp_path, kind):
    checkpoint, touched = tmp_path / "c.partial", tmp_path / "touched"
    torch.save({"run": "{}", "epoch": Touch(touched)}, checkpoint)
    with pytest.raises(ValueError, match="checkpoint"):
        if kind == "fit":
            test_training.fit(
                test_training.small_network(), test_training.small_data(), test_training.Standard(),
                checkpoint=checkpoint, resume=True,
            )  # fmt: skip
        elif kind == "pacd":
            loss = test_pacd_promises.Watched(0.3)
            plan = Pacd(loss, 1, Ball(0.1), model="test_pacd_promises:tiny", recipe=test_pacd_promises.RECIPE)
            pacd(test_pacd_promises.small(), plan, checkpoint=checkpoint, resume=True)
        else:
            metapoison(test_metapoison.small(), test_metapoison.attack(), checkpoint=checkpoint, resume=True)
    assert not touched.exists()


def test_expansion():
    files.check_expansion("a", 10, 2**28)
    files.check_expansion("a", 2**24, 200 * 2**24)
    with pytest.raises(ValueError, match="more than 200 times"):
        files.check_expansion("a", 2**24, 201 * 2**24)
    with pytest.raises(ValueError, match="of memory are free"):
        files.check_expansion("a", 2**60, 2**60)


def test_a_damaged_state_is_the_files_fault(tmp_path):
    path = tmp_path / "state"
    assert files.read(path, {}, "training", CPU) is None
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="is not a training checkpoint"):
        files.read(path, {}, "training", CPU)
    torch.save({"run": "[1]"}, path)
    with pytest.raises(ValueError, match="is not a training checkpoint"):
        files.read(path, {"a": 1}, "training", CPU)
    files.write(path, {"a": 1}, {"x": torch.ones(2)})
    with pytest.raises(files.AnotherRun, match="a is 1 there and 2 here"):
        files.read(path, {"a": 2}, "training", CPU)
    with pytest.raises(files.AnotherRun, match="does not fit this run"), files.taken_up(path):
        torch.zeros(3).copy_(files.read(path, {"a": 1}, "training", CPU)["x"])
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        files.read(path, {}, "training", CPU)


def test_numbers_of_a_command_line():
    assert [whole_number(text) for text in ("100000", "100_000", "1e5", "-1", "9223372036854775807")] == [
        100000, 100000, 100000, -1, 2**63 - 1,
    ]  # fmt: skip
    for text in ("1e", "", "half", "1.5", "inf", "nan", "１２", "9" * 41, "1e19", "9223372036854775808"):
        with pytest.raises(NotANumber):
            whole_number(text)
    assert number("16/255") == 16 / 255 and number("1e-3") == 1e-3
    for text in ("1/0", "x", "1/2/3", "０.５", "1" * 100):
        with pytest.raises(NotANumber):
            number(text)


def test_one_line():
    assert one_line("a\n b\x1b[31m red\x1b[0m \x07") == "a b red ?"
    assert one_line("one two three", 8) == "one two ..."
    assert one_line("x" * 20, 8) == "xxxxxxxx ..."
