"""A seeded fuzzer of what the commands read and write: python python_tests/fuzz.py --inputs 20000 --seed 1

Every input runs in a process of its own, forked from one that has everything imported, with 1 GiB more memory than that
and 10 seconds of a core.  It must end with 0 or 2, say no more than one line besides notes, run nothing that a file
carries, and leave every file as it was, but for its --out where it ended with 0.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch

from pacd_fast import cli

MEMORY, SECONDS = 2**30, 10
NETWORK = """from torch import nn

def net(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""
HOSTILE = (
    "", "-1", "0", "1e300", "-1e300", "1e400", "nan", "inf", "-inf", "9" * 19, "9" * 400, "1_0", "１２", " 1", "1 ",
    "0x10", "True", "None", "\x00", "\x1b[31m", "é", "%s", "../../x", "a\tb", "a\nb", '"', "float8", "foo", "2", "0.5",
    "[]", "{}",
)  # fmt: skip
VALUES = (
    None, True, -1, 0, 1, 2**63, 10**400, 0.5, -0.5, 1e300, float("nan"), float("inf"), "", "x" * 5000, "8", "cat", [],
    [1], ["a"], [[1]], [10**9], {}, {"a": {"b": 1}},
)  # fmt: skip


class Payload:
    """What a pickle would run."""

    def __reduce__(self):
        return os.system, ("echo ran > PAYLOAD",)


def make(folder: Path) -> None:
    """One good file of every kind."""
    (folder / "nets.py").write_text(NETWORK)
    draw = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = draw.integers(0, 90, (60, 8, 8)) + 50 * labels[:, None, None]
    data = {"x_train": images[:40], "x_test": images[40:], "y_train": labels[:40], "y_test": labels[40:]}
    np.savez_compressed(folder / "data.npz", **{k: v.astype(np.uint8 if k[0] == "x" else int) for k, v in data.items()})
    features = {"X_train": draw.normal(size=(40, 4)), "X_test": draw.normal(size=(6, 4))}
    np.savez(folder / "features.npz", **features, y_train=labels[:40] % 2, y_test=labels[40:46] % 2)
    torch.manual_seed(0)
    torch.save({f"1.{k}": v for k, v in torch.nn.Linear(64, 3).state_dict().items()}, folder / "weights.pt")
    judged = "--checkpoint model.safetensors --model nets:net"
    for command in (
        "train --data data.npz --model nets:net --epochs 1 --out model.safetensors",
        f"certify {judged} --data data.npz --n 60 --n0 20 --seed 1 --out results.tsv",
        "labelflip --data features.npz --q 0.1 --out flips.tsv",
        "poison random --data data.npz --target-class 1 --epsilon 0.1 --out poison.npz",
    ):
        assert cli.main([*command.split(), "--device", "cpu"]) == 0, command
    measured = {key: [0.1, 0.2] for key in ("acr", "aca", "accuracy", "others_acr", "others_aca", "distortion")}
    audit = {
        "audit": {"sigma": 0.5},
        "measured": {"clean": measured, "p": measured},
        "poisons": {"p": {"epsilon": 0.1}},
    }
    (folder / "audit.json").write_text(json.dumps(audit))
    rows = ["idx\tlabel\tpredict\tradius\tcorrect\ttime", *(f"{i}\t1\t1\t0.5\t1\t0:00:01.5" for i in range(5))]
    (folder / "cohen.tsv").write_text("\n".join(rows) + "\n")


# The command of a file of each kind; {} is the file.
COMMANDS = {
    "results.tsv": ["summary {}", "plot {} --out out.png", "merge {} --out out.tsv",
                    "report {} --data data.npz --out out.html"],
    "cohen.tsv": ["summary {}", "plot {} --out out.svg", "report {} --out out.html"],
    "flips.tsv": ["summary {}", "plot {} --out out.png", "report {} --out out.html"],
    "poison.npz": ["train --data data.npz --poison {} --model nets:net --epochs 1 --out out.safetensors --device cpu",
                   "report {} --data data.npz --out out.html"],
    "model.safetensors": ["evaluate --checkpoint {} --model nets:net --data data.npz --device cpu"],
    "weights.pt": ["evaluate --checkpoint {} --model nets:net --data data.npz --device cpu"],
    "data.npz": ["evaluate --checkpoint weights.pt --model nets:net --num-classes 3 --data {} --device cpu",
                 "poison random --data {} --target-class 1 --epsilon 0.1 --out out.npz --device cpu"],
    "features.npz": ["labelflip --data {} --q 0.1 --out out.tsv --device cpu"],
    "audit.json": ["report {} --out out.html"],
}  # fmt: skip


@cache
def bomb(count: int) -> bytes:
    """A zip whose x_test.npy unpacks to count MiB of zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (count * 2**20,)})
    start = packer.compress(head.getvalue()) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    body, size = start + block * count + packer.flush(), len(head.getvalue()) + count * 2**20
    fields = (8, 0, 0, 0, len(body), size, 10)  # method, time, date, crc, sizes, length of the name
    local = struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, *fields, 0) + b"x_test.npy" + body
    central = struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, *fields, 0, 0, 0, 0, 0, 0) + b"x_test.npy"
    return local + central + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, len(central), len(local), 0)


def tampered_json(value: object, draw: random.Random) -> object:
    """The value with something in it replaced, removed or added."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        return rest if draw.random() < 0.2 else {**rest, key: tampered_json(value[key], draw)}
    return draw.choice(VALUES)


def tampered(path: Path, draw: random.Random) -> bytes:
    """Content whose form is right and whose meaning is not."""
    raw = path.read_bytes()
    if path.suffix == ".tsv":
        lines = [line.split("\t") for line in raw.decode().splitlines()]
        for _ in range(draw.choice((1, 1, 1, 3))):
            line = draw.choice(lines[1:] if draw.random() < 0.9 else lines)
            line[draw.randrange(len(line))] = draw.choice(HOSTILE)
        if draw.random() < 0.2:
            lines.insert(draw.randrange(len(lines) + 1), draw.choice(lines))
        return ("\n".join("\t".join(line) for line in lines) + "\n" * draw.choice((0, 1, 1, 1))).encode()
    if path.suffix == ".json":
        return json.dumps(tampered_json(json.loads(raw), draw)).encode()
    if path.suffix == ".safetensors":
        size = int.from_bytes(raw[:8], "little")
        head = json.dumps(tampered_json(json.loads(raw[8 : 8 + size]), draw)).encode()
        return len(head).to_bytes(8, "little") + head + raw[8 + size :]
    if path.suffix == ".pt":
        weights = torch.load(path, weights_only=True)
        name, kinds = draw.choice(list(weights)), (torch.int64, torch.bool, torch.complex64, torch.float16, torch.int8)
        given, into = weights[name], io.BytesIO()
        weights[name] = draw.choice([
            given.to(draw.choice(kinds)), given[:1], given.to_sparse(), given.to("meta"), given * float("nan"), "text",
            {"a": given}, None, 7, [given], given.expand(2, *given.shape),
        ])  # fmt: skip
        wrapped = [weights, {"state_dict": weights}, [weights], {**weights, "arch": draw.choice(HOSTILE)}]
        torch.save(draw.choice(wrapped), into)
        return into.getvalue()
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    name = draw.choice(list(arrays))
    given = arrays[name]
    if name == "about":
        arrays[name] = np.array(json.dumps(tampered_json(json.loads(str(given)), draw)))
    else:
        kinds = (np.float64, np.int8, np.int64, np.complex64, np.bool_, "S3", "U3", np.float16, ">i4", "M8[s]")
        change = [
            lambda: given[:0], lambda: given[::2], lambda: given[..., None], lambda: given.astype(draw.choice(kinds)),
            lambda: given.astype(float) * draw.choice((1e300, float("nan"), -1)), lambda: -given.astype(int),
            lambda: given + 1, lambda: given.ravel()[0], lambda: np.array([Payload()], dtype=object),
            lambda: given[::-1],
        ]  # fmt: skip
        with np.errstate(all="ignore"):
            arrays[name] = draw.choice(change)()
    if draw.random() < 0.1:
        del arrays[name]
    into = io.BytesIO()
    np.savez(into, **arrays)
    return into.getvalue()


def mutated(path: Path, draw: random.Random) -> bytes:
    """Hostile content made of a good file's."""
    raw = path.read_bytes()
    way = draw.choice(("flip", "flip", "cut", "splice", "tamper", "tamper", "tamper", "tamper", "other", "head"))
    if way == "flip":
        changed = bytearray(raw)
        for _ in range(draw.choice((1, 3, 30))):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if way == "cut":
        return raw[: draw.randrange(len(raw))]
    if way == "splice":
        at = draw.randrange(len(raw))
        return raw[:at] + draw.choice((draw.randbytes(50), bytes(300), b"\n" * 9, raw)) + raw[at:]
    if way == "tamper":
        return tampered(path, draw)
    if way == "head":  # a shape that is not there
        shape = draw.choice((b"(10000000000, 8, 8)", b"(-40, 8, 8)", b"(4, 9999999999, 9)", b"(True, 8, 8)"))
        return raw.replace(b"(40, 8, 8)", shape).replace(b"[3,64]", b"[3,640000000000]").replace(b"\t", b"\t\t", 1)
    return draw.choice((
        b"", b"\0" * 1000, draw.randbytes(500), pickle.dumps(Payload()), b"[" * 100_000, b'{"a":' * 50_000,
        b"PK\5\6" + bytes(18), b"\xff" * 8 + b"{}", bomb(3000), "é".encode("utf-16"), b"idx\t" * 100_000,
    ))  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
    """What is there, by name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = f"{path.lstat().st_mode:o} {path.lstat().st_rdev}"
        if path.is_file() and not path.is_symlink():
            kind += hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = kind
    return found


def prepare(folder: Path, good: Path, draw: random.Random) -> tuple[list[str], int | None]:
    """A hostile folder: the command to run in it, and the largest file that it may write (None: any)."""
    name = draw.choice(list(COMMANDS))
    words = draw.choice(COMMANDS[name]).split()
    hostile = folder / f"hostile{Path(name).suffix}"
    way = draw.random()
    if way < 0.8:
        hostile.write_bytes(mutated(good / name, draw))
    elif way < 0.9:  # what is no regular file
        kind = draw.randrange(6)
        if kind == 0:
            os.mkfifo(hostile)
        elif kind == 1:
            hostile.symlink_to(draw.choice(("/dev/zero", "/dev/full", "/dev/stdin", hostile.name, "nowhere", name)))
        elif kind == 2:
            hostile.mkdir()
        elif kind == 3:
            with contextlib.suppress(PermissionError):
                os.mknod(hostile, 0o20666, os.makedev(1, 5))
        elif kind == 4:
            hostile.symlink_to("/proc/self/mem")
    else:  # a good file, and an --out that is not
        hostile.write_bytes((good / name).read_bytes())
    most = None
    if "--out" in words and way >= 0.9:
        out = folder / words[words.index("--out") + 1]
        kind = draw.randrange(6)
        if kind == 0:
            os.mkfifo(out)
        elif kind == 1:
            out.symlink_to(draw.choice(("/dev/full", "/dev/zero", out.name, "no/where")))
        elif kind == 2:
            out.write_bytes(b"precious")
        elif kind == 3:
            out.mkdir()
        elif kind == 4:
            most = draw.choice((0, 10, 1000))
        else:
            words[words.index("--out") + 1] = "absent/" + out.name
    return [word.replace("{}", hostile.name) for word in words], most


def child(folder: Path, words: list[str], most: int | None, said: int) -> None:
    """Runs the command in this process, and ends it."""
    status = 99
    try:
        os.chdir(folder)
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(1, 0)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
        if most is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS,) * 2)
        signal.alarm(12 * SECONDS)  # other processes may hold the cores
        status = cli.main(words)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 98
    except BaseException:
        os.write(2, traceback.format_exc()[-4000:].encode("utf-8", "replace"))
    finally:
        os._exit(status)


def fresh(work: Path, good: Path) -> Path:
    """The folder in which one input is tried."""
    folder = work / "here"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    return folder


def ended(folder: Path, words: list[str], most: int | None) -> tuple[int, str]:
    """The exit code of a command, and what it said on stderr."""
    listen, speak = os.pipe()  # not a file, whose size may be limited
    if (pid := os.fork()) == 0:
        child(folder, words, most, speak)
    os.close(speak)
    with open(listen, encoding="utf-8", errors="replace") as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def trial(work: Path, good: Path, number: int, seed: int) -> str | None:
    """What was wrong with one input; None where it was taken as it should be."""
    draw, folder = random.Random(f"{seed}/{number}"), fresh(work, good)
    words, most = prepare(folder, good, draw)
    before = contents(folder)
    code, said = ended(folder, words, most)
    lines = [line for line in said.splitlines() if line.strip() and "%|" not in line]
    lines = [line for line in lines if line.startswith("pacd-fast ") or not line.startswith("hostile.")]
    after = contents(folder)
    out = words[words.index("--out") + 1] if "--out" in words else None
    allowed = {out, out and Path(out).with_suffix(".png").name} if code == 0 else set()
    changed = {name for name in before | after if before.get(name) != after.get(name)} - allowed
    changed = {name for name in changed if "__pycache__" not in name}
    problem = None
    if code not in (0, 2):
        problem = f"exit code {code}" + (
            ": too slow" if code in (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL) else ""
        )
    elif "Traceback" in said or len(lines) > (1 if code else 0):
        problem = f"{len(lines)} lines on stderr"
    elif code == 2 and not lines:
        problem = "no word"
    elif "PAYLOAD" in after:
        problem = "a payload ran"
    elif changed:
        problem = f"files changed: {sorted(changed)}"
    return problem and f"input {number} of seed {seed}: {' '.join(words)}: {problem}\n{said[-1500:]}"


def fuzz(inputs: int, seconds: float, seed: int, first: int = 0) -> Iterator[str | None]:
    """What was wrong with each input, None where nothing was; as many as there is time for."""
    torch.set_num_threads(1)
    cli.parser = cache(cli.parser)
    in_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=in_memory if in_memory.is_dir() else None) as name:
        work = Path(name).resolve()
        good = work / "good"
        good.mkdir()
        before = Path.cwd()
        os.chdir(good)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make(good)
        os.chdir(before)
        shutil.rmtree(good / "__pycache__", ignore_errors=True)
        gc.freeze()  # else every child copies what it looks through for garbage
        for name, commands in COMMANDS.items():  # what is good is taken, else nothing that follows means anything
            words = commands[-1].replace("{}", name).split()
            code, said = ended(fresh(work, good), words, None)
            assert code == 0, f"{' '.join(words)} ended with {code}: {said}"
        end = time.monotonic() + seconds
        for number in range(first, first + inputs):
            if time.monotonic() > end:
                break
            yield trial(work, good, number, seed)
        gc.unfreeze()


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__)
    for flag, default in (("inputs", 20_000), ("seed", 0), ("first", 0)):
        flags.add_argument(f"--{flag}", type=int, default=default)
    flags.add_argument("--seconds", type=float, default=float("inf"))
    asked = flags.parse_args()
    count, wrong = 0, []
    for problem in fuzz(asked.inputs, asked.seconds, asked.seed, asked.first):
        count += 1
        if problem:
            wrong.append(problem)
            print(problem, end="\n\n", flush=True)
        if count % 500 == 0:  # where to go on
            print(f"--first {asked.first + count}: {len(wrong)} problems so far", flush=True)
    kinds = Counter(text.partition("\n")[0].split(": ", 2)[-1][:60] for text in wrong)
    print(f"{count} inputs, {len(wrong)} problems", *(f"{n} x {kind}" for kind, n in kinds.most_common()), sep="\n")
    sys.exit(bool(wrong))
