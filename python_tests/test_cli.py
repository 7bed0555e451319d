"""The command line as a user runs it: train, certify, kill, resume, shards, summary, plot, bad input of all kinds."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Fork

from pacd_fast.cli import main, parser
from pacd_fast.networks import build, load_checkpoint, save_checkpoint

# Certifies in the tests: enough samples that a wrong stream, batch or seed shows, few enough for seconds.
CERTIFY = ["certify", "--data", "mnist5k", "--sigma", "0.5", "--n", "2000", "--count", "10", "--seed", "7"]
CERTIFY += ["--device", "cpu"]  # whose bits depend on no batch size


# A user's own network, as a module beside the data.
NETWORK = """from torch import nn

def net(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear({}, num_classes))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    torch.manual_seed(1)
    metadata = {
        "architecture": "mnist-cnn",
        "num_classes": "10",
        "in_channels": "1",
        "image_size": "28x28",
        "sigma": "0.5",
    }
    save_checkpoint(path, build("mnist-cnn", num_classes=10, in_channels=1, image_size=(28, 28)), metadata)
    return path


def rows(path: Path) -> list[list[str]]:
    """A results file without its last column, the time."""
    return [line.split("\t")[:-1] for line in path.read_text().splitlines()]


def weights(path: Path) -> str:
    return load_checkpoint(path).fingerprint


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    running = Fork(lambda: main(["info"]), tmp_path / "log", out=writer)
    os.close(writer)
    while running.running():
        time.sleep(0.002)
    assert running.code == 141 and running.said() == ""


@pytest.fixture(scope="module")
def certified(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("results") / "results.tsv"
    assert main([*CERTIFY, "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    return out


@pytest.mark.slow  # the demo does it
def test_train_then_certify_then_summary_then_plot(tmp_path, capsys):
    model, out, curve = tmp_path / "model.safetensors", tmp_path / "results.tsv", tmp_path / "curve.png"
    metrics = tmp_path / "metrics.jsonl"
    train = [
        "train",
        "--model",
        "mnist-cnn",
        "--data",
        "mnist5k",
        "--method",
        "gaussian",
        "--sigma",
        "0.25",
        "--epochs",
        "2",
        "--device",
        "cpu",
    ]
    assert main([*train, "--metrics", str(metrics), "--out", str(model)]) == 0
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1] and lines[1]["loss"] < lines[0]["loss"]
    # sigma comes from the checkpoint
    assert main(["certify", "--checkpoint", str(model), "--n", "1000", "--count", "20", "--out", str(out)]) == 0
    assert len({row[1] for row in rows(out)[1:]}) > 5  # classes: a model that knows one only is seen
    capsys.readouterr()
    assert main(["summary", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    assert found["images"] == 20 and found["clean_accuracy"] > 0.7 and found["acr"] > 0.2
    assert found["run"]["sigma"] == 0.25
    assert main(["summary", str(out)]) == 0 and "ACR" in capsys.readouterr().out
    assert main(["plot", str(out), "--out", str(curve)]) == 0 and curve.read_bytes()[:4] == b"\x89PNG"
    # the same seed trains the same model, another another
    again, other = tmp_path / "again.safetensors", tmp_path / "other.safetensors"
    assert main([*train, "--out", str(again)]) == 0 and weights(again) == weights(model)
    assert main([*train, "--seed", "1", "--out", str(other)]) == 0 and weights(other) != weights(model)


@pytest.mark.parametrize("batch_size, threads", [("64", 1), ("1000", 2)])
def test_batch_size_and_threads_change_no_result(certified, checkpoint, tmp_path, batch_size, threads):
    out, before = tmp_path / "results.tsv", torch.get_num_threads()
    options = ["--checkpoint", str(checkpoint), "--out", str(out), "--batch-size", batch_size]
    torch.set_num_threads(threads)
    try:
        assert main([*CERTIFY, *options]) == 0
    finally:
        torch.set_num_threads(before)
    header, *found = rows(out)
    column = header.index("rows")
    assert {row.pop(column) for row in found} == {batch_size}
    assert [row[:column] + row[column + 1 :] for row in rows(certified)[1:]] == found


def test_killed_twice_and_resumed(certified, checkpoint, tmp_path):
    out = tmp_path / "results.tsv"
    arguments = [*CERTIFY, "--checkpoint", str(checkpoint), "--out", str(out)]
    for stop in (3, 7):
        running = Fork(lambda: main(arguments), tmp_path / "log")
        while running.running() and (not out.exists() or out.read_bytes().count(b"\n") < stop):
            time.sleep(0.001)
        running.kill()
        assert len(rows(out)) < len(rows(certified)), "it was too quick to be killed"
    assert main(arguments) == 0
    assert rows(out) == rows(certified)
    # once more: all is there, nothing is drawn, nothing is changed
    before = out.read_bytes()
    assert main(arguments) == 0
    assert out.read_bytes() == before


def test_a_torn_line_is_drawn_again(certified, checkpoint, tmp_path):
    out = tmp_path / "results.tsv"
    out.write_bytes(certified.read_bytes()[:-30])
    assert main([*CERTIFY, "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    assert rows(out) == rows(certified)


def test_resume_takes_the_seed_of_the_file(checkpoint, tmp_path):
    out = tmp_path / "results.tsv"
    arguments = ["certify", "--checkpoint", str(checkpoint), "--n", "100", "--skip", "250", "--out", str(out)]
    assert main([*arguments, "--max", "400"]) == 0
    assert main(arguments) == 0
    table = rows(out)
    assert [row[0] for row in table[1:]] == ["0", "250", "500", "750"]
    assert len({row[table[0].index("seed")] for row in table[1:]}) == 1


def test_two_shards_merge_into_the_whole(certified, checkpoint, tmp_path, capsys):
    shards = [tmp_path / f"{i}.tsv" for i in range(2)]
    for i, shard in enumerate(shards):
        assert main([*CERTIFY, "--checkpoint", str(checkpoint), "--shard", f"{i}/2", "--out", str(shard)]) == 0
    merged = tmp_path / "merged.tsv"
    assert main(["merge", *map(str, shards), "--out", str(merged)]) == 0
    assert rows(merged) == rows(certified)
    assert main(["summary", str(merged)]) == 0


def test_target_class_and_count(checkpoint, tmp_path):
    out = tmp_path / "results.tsv"
    arguments = ["certify", "--checkpoint", str(checkpoint), "--n", "50", "--target-class", "8", "--count", "7"]
    assert main([*arguments, "--out", str(out)]) == 0
    table = rows(out)
    assert len(table) == 8 and {row[1] for row in table[1:]} == {"8"}


def test_a_users_network_and_npz(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mynet.py").write_text(NETWORK.format(75))
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (40, 5, 5, 3), dtype=np.uint8)
    labels = (images.mean((1, 2, 3)) > 127).astype(np.int64)
    np.savez(tmp_path / "data.npz", x_train=images, y_train=labels, x_test=images[:6], y_test=labels[:6])
    train = [
        "train",
        "--model",
        "mynet:net",
        "--data",
        "data.npz",
        "--method",
        "standard",
        "--epochs",
        "3",
        "--out",
        "m.safetensors",
    ]
    assert main(train) == 0
    certify = ["certify", "--checkpoint", "m.safetensors", "--model", "mynet:net", "--data", "data.npz", "--n", "100"]
    assert main([*certify, "--sigma", "0.1", "--out", "r.tsv"]) == 0
    assert len(rows(tmp_path / "r.tsv")) == 7
    assert main([*certify, "--out", "r2.tsv"]) == 2, "a model trained without noise has no sigma of its own"


def test_locuslab_files_are_read(tmp_path, capsys):
    file = tmp_path / "sigma_0.25"
    file.write_text(
        "idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.71\t1\t0:00:15.1\n20\t7\t-1\t0.0\t0\t0:00:15.2\n40\t8\t1\t0.2\t0\t0:00:15\n"
    )
    assert main(["summary", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["sigma_0.25"]
    assert (
        found["acr"] == pytest.approx(0.71 / 3) and found["abstentions"] == 1 and found["aca"] == pytest.approx(1 / 3)
    )
    assert main(["plot", str(file), "--out", str(tmp_path / "curve.png")]) == 0


def test_info_says_what_is_there(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "SIMD", "threads", "CUDA library", "certify uses"):
        assert word in out


def test_train_resumes_after_a_kill(tmp_path, capsys):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "model.safetensors"
    train = ["train", "--data", "mnist5k", "--train-images", "1000", "--sigma", "0.5", "--epochs", "4"]
    train += ["--batch-size", "50", "--device", "cpu"]
    assert main([*train, "--out", str(whole)]) == 0
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "pacd_fast", *train, "--out", str(out)]
    running = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    partial = tmp_path / "model.safetensors.partial"
    while running.poll() is None and not partial.exists():
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL and partial.exists() and not out.exists()
    assert main([*train, "--lr", "0.01", "--resume", "--out", str(out)]) == 2
    assert "is of another run: lr" in capsys.readouterr().err
    assert main([*train, "--resume", "--out", str(out)]) == 0
    assert weights(out) == weights(whole) and not partial.exists()


CERTIFY_BAD = {
    "sigma must be positive": ["--sigma", "0"],
    "alpha must be in": ["--alpha", "0"],
    "n = 5 is too small": ["--n", "5"],
    "n0 and n must be positive": ["--n0", "0"],
    "--skip": ["--skip", "0"],
    "--max": ["--max", "0"],
    "--shard must be": ["--shard", "half"],
    "--shard i/m": ["--shard", "2/2"],
    "has no class '11'": ["--target-class", "11"],
    "--count 101: there are 100": ["--target-class", "1", "--count", "101"],
    "--count chooses at random": ["--skip", "100"],
    "no CUDA device|CUDA operators": ["--device", "cuda"],
    "unknown device": ["--device", "toaster"],
    "unknown data": ["--data", "imagenet"],
    "give --data-dir|--data-dir": ["--data", "mnist"],
    "no validation images": ["--split", "val"],
    "n is 2000 there and 1000 here": ["--n", "1000"],
    "seed is 7 there and 8 here": ["--seed", "8"],
    "dtype is float32 there": ["--dtype", "bfloat16"],
    "batch_size": ["--batch-size", "0"],
}


@pytest.mark.parametrize("message", CERTIFY_BAD)
def test_bad_certify_is_one_line_and_changes_nothing(message, certified, checkpoint, tmp_path, capsys):
    out = tmp_path / "results.tsv"
    out.write_bytes(b"".join(certified.read_bytes().splitlines(keepends=True)[:4]))
    before = out.read_bytes()
    code = main([*CERTIFY, "--checkpoint", str(checkpoint), "--out", str(out), *CERTIFY_BAD[message]])
    if message == "no CUDA device|CUDA operators" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and any(part in error for part in message.split("|")), error
    assert out.read_bytes() == before


def test_another_model_is_another_run(certified, tmp_path, capsys):
    other, out = tmp_path / "other.safetensors", tmp_path / "results.tsv"
    metadata = {"architecture": "mnist-cnn", "num_classes": "10", "in_channels": "1", "image_size": "28x28"}
    save_checkpoint(other, build("mnist-cnn", num_classes=10, in_channels=1, image_size=(28, 28)), metadata)
    out.write_bytes(certified.read_bytes())
    assert main([*CERTIFY, "--checkpoint", str(other), "--out", str(out)]) == 2
    assert "model is mnist-cnn@" in capsys.readouterr().err and out.read_bytes() == certified.read_bytes()


def test_unreadable_files_are_one_line(checkpoint, tmp_path, capsys):
    empty, garbage = tmp_path / "empty.tsv", tmp_path / "garbage.npz"
    empty.write_bytes(b"")
    garbage.write_bytes(os.urandom(2000))
    out = str(tmp_path / "out.tsv")
    for arguments in (
        ["summary", str(empty)],
        ["summary", str(tmp_path / "missing.tsv")],
        ["plot", str(garbage), "--out", out + ".png"],
        ["plot", str(empty), "--out", out + ".png"],
        ["merge", str(empty), "--out", out],
        ["certify", "--checkpoint", str(empty), "--out", out],
        ["certify", "--checkpoint", str(garbage), "--out", out],
        ["certify", "--checkpoint", str(tmp_path / "missing.pt"), "--out", out],
        ["certify", "--checkpoint", str(checkpoint), "--data", str(garbage), "--out", out],
        ["certify", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "no" / "folder.tsv")],
        ["train", "--sigma", "-1", "--out", out],
        ["train", "--epochs", "0", "--out", out],
        ["train", "--model", "nothing", "--out", out],
        ["train", "--model", "json:nothing", "--out", out],
        ["train", "--seed", "-1", "--out", out],
        ["train", "--out", str(tmp_path / "no" / "model.safetensors")],
        ["selftest", "--draws", "3"],
    ):
        assert main(arguments) == 2, arguments
        captured = capsys.readouterr()
        assert len(captured.err.strip().splitlines()) == 1 and captured.err.startswith(f"pacd-fast {arguments[0]}: "), (
            captured.err
        )
    assert not Path(out).exists() and not Path(out + ".png").exists()


def test_memory_does_not_grow_with_n(tmp_path):
    """The peak of a process of its own up to n = 10^4, and up to n = 10^6."""
    generator = np.random.default_rng(0)
    images, labels = generator.random((2, 4, 4), dtype=np.float32), np.array([0, 1])
    np.savez(tmp_path / "data.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    (tmp_path / "small.py").write_text(NETWORK.format(16))
    train = "train --model small:net --data data.npz --epochs 1 --out m.safetensors"
    certify = "certify --checkpoint m.safetensors --model small:net --data data.npz --batch-size 1000"
    code = (
        "import resource; from pacd_fast.cli import main\n"
        f"assert main({train!r}.split()) == 0\n"
        "for n in ('1000', '10000', '1000000'):\n"
        f"    assert main([*{certify!r}.split(), '--n', n, '--out', n + '.tsv']) == 0\n"
        "    print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    _, small, large = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak "))
    assert large < small * 1.05 + 8192  # KiB


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from parsers(sub)


def test_every_help_can_be_printed():
    found = list(parsers(parser()))
    assert len(found) > 25
    for each in found:
        text = each.format_help()
        assert "usage: pacd-fast" in text and "(default: None)" not in text
    (evaluate,) = [each for each in found if each.prog == "pacd-fast evaluate"]
    assert "(default: 0)" in evaluate.format_help()


def test_shards_without_a_seed_are_refused_before_they_are_drawn(checkpoint, tmp_path, capsys):
    out = tmp_path / "0.tsv"
    command = ["certify", "--checkpoint", str(checkpoint), "--data", "mnist5k", "--shard", "0/2", "--out", str(out)]
    assert main(command) == 2 and "give them the same --seed" in capsys.readouterr().err and not out.exists()


def test_flags_that_do_not_fit_the_files_are_refused(certified, capsys):
    assert main(["summary", str(certified), "--flips", "1"]) == 2
    assert main(["summary", str(certified), "--json", "--over-seeds"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
