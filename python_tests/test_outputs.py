"""What commands write: nothing over what is there, one writer, through links; and what they read, called as asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pacd_fast import files
from pacd_fast.certification import ResultsFile, Row, Run
from pacd_fast.cli import main
from pacd_fast.poisoning import PRESETS, Poison

NETWORK = """from torch import nn

def nothing_yet(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

def never_one(num_classes):
    network = nothing_yet(num_classes)
    network[1].bias.data[1] = -1000
    return network
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data of 120 small images, results of two runs, and an empty log of each kind."""
    folder, draw = tmp_path_factory.mktemp("outputs"), np.random.default_rng(0)
    (folder / "small_net.py").write_text(NETWORK)
    labels = np.arange(150) % 3
    images = (draw.integers(0, 90, (150, 8, 8)) + 50 * labels[:, None, None]).astype(np.uint8)
    arrays = {"x_train": images[:120], "y_train": labels[:120], "x_test": images[120:], "y_test": labels[120:]}
    np.savez(folder / "data.npz", **arrays)
    for name, sigma in (("a", 0.5), ("b", 0.25)):
        with ResultsFile(folder / f"{name}.tsv", Run(100, 1000, 0.001, sigma, 7, "float32", "m@0", "d@0")) as file:
            for i in range(9):
                file.append(Row(i, 1, 1, sigma * (1 + i % 3) / 4, 0.9, 950, 0.5))
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    torch.save(network.state_dict(), folder / "net.pt")
    torch.save({name: value * torch.nan for name, value in network.state_dict().items()}, folder / "nan.pt")
    (folder / "empty.tsv").touch()
    (folder / "started.tsv").write_bytes((folder / "a.tsv").read_bytes().partition(b"\n")[0] + b"\n0\t1")
    return folder


@pytest.fixture
def here(folder, tmp_path, monkeypatch) -> Path:
    """A folder to write to, with the others' files in it, where commands run."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(folder))
    return tmp_path


WRITERS = {
    "train": "train --data data.npz --model small_net:nothing_yet --epochs 1 --device cpu --out out.safetensors",
    "poison": "poison random --data data.npz --target-class 1 --epsilon 0.1 --device cpu --out out.npz",
    "predict": "predict --checkpoint net.pt --model small_net:nothing_yet --data data.npz --sigma 0.5 --n 500 --max 4"
    " --device cpu --out out.tsv",
    "plot": "plot a.tsv --out out.png",
    "report": "report a.tsv --out out.html",
}


@pytest.mark.parametrize("command", list(WRITERS))
def test_nothing_is_overwritten_and_one_writes(command, here, capsys):
    words = WRITERS[command].split()
    out = here / words[-1]
    target = here / "elsewhere"
    out.symlink_to(target)
    with files.locked(target):
        assert main(words) == 2 and "is being written by another process" in capsys.readouterr().err
    assert main(words) == 0 and out.is_symlink() and target.stat().st_size > 100  # through the link
    target.write_bytes(b"hours of work")
    capsys.readouterr()
    assert main(words) == 2 and "give --force" in capsys.readouterr().err
    assert target.read_bytes() == b"hours of work"
    assert main([*words, "--force"]) == 0 and out.is_symlink() and target.stat().st_size > 100
    assert not [path.name for path in here.iterdir() if path.name.startswith(".")], "a lock or a torn file stays"
    out.unlink()
    os.mkfifo(out)
    assert main([*words, "--force"]) == 2 and "is a FIFO" in capsys.readouterr().err
    out.unlink()
    out.symlink_to("/dev/full")
    assert main([*words, "--force"]) == 2 and Path("/dev/full").is_char_device()
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_certify_says_where_its_rows_are(here, capsys):
    words = WRITERS["predict"].replace("predict", "certify", 1).split()
    for said in ("", "out.tsv: 4 of 4 images are there, 0 to go"):
        assert main(words) == 0
        out, err = capsys.readouterr()
        assert out.startswith("out.tsv: 4 images, ") and out.endswith("pacd-fast summary out.tsv shows them\n")
        assert not said or err == f"{said}\n", "no bar of nothing"


def test_a_finished_file_of_a_compiled_model_is_left_as_it_is(here, capsys):
    """There is nothing to run then, so nothing is compiled, and yet it is no other run."""
    words, out = WRITERS["predict"].replace("predict", "certify", 1).split(), Path("out.tsv")
    assert main(words) == 0
    names, *lines = (line.split("\t") for line in out.read_text().splitlines())
    for line in lines:
        line[names.index("compiled")] = "1"
    finished = "".join("\t".join(line) + "\n" for line in (names, *lines))
    out.write_text(finished)
    assert main(words) == 0, capsys.readouterr().err
    assert out.read_text() == finished
    out.write_text(finished.replace("\t0.001\t", "\t0.002\t"))
    assert main(words) == 2 and "alpha is 0.002 there and 0.001 here" in capsys.readouterr().err


def test_what_leaves_no_row_leaves_no_file(here, capsys):
    for command in ("certify", "predict"):
        words = WRITERS["predict"].replace("predict", command, 1).replace("net.pt", "nan.pt").split()
        before = sorted(here.iterdir())
        assert main(words) == 2 and "NaN" in capsys.readouterr().err
        assert sorted(here.iterdir()) == before
    Path("out.tsv").touch()
    assert main([*words, "--force"]) == main(["certify", *words[1:]]) == 2
    assert Path("out.tsv").exists(), "what was there stays"


@pytest.mark.parametrize("command", ["summary {}", "plot {} --out out.png"])
def test_a_torn_last_row_is_said(command, here, capsys):
    assert main(command.format("a.tsv").split()) == 0 and not capsys.readouterr().err
    Path("torn.tsv").write_bytes(Path("a.tsv").read_bytes()[:-3])
    assert main([*command.format("torn.tsv").split(), *["--force"] * ("plot" in command)]) == 0
    assert capsys.readouterr().err == "torn.tsv: its last row is torn, and left out\n"


def test_a_choice_out_of_range_is_named(here, capsys):
    for command in (
        "evaluate --attack 5 --checkpoint net.pt",
        "certify --checkpoint net.pt --out out.tsv",
        "verify a.tsv",
    ):
        with pytest.raises(SystemExit) as caught:
            main([*command.split(), "--choice", "-1"])
        assert caught.value.code == 2
        assert "argument --choice: must be in [0, 2^32), not -1" in capsys.readouterr().err


def run_program(words: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """The program, as a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(folder)} | more
    program = [sys.executable, "-m", "pacd_fast", *words.split()]
    return subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)")
    found = run_program("info", tmp_path)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "\npacd-fast: stopped\n")
    assert run_program("info", tmp_path, RANK="1").stderr == "", "of several processes one says it"


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    gone = f"import os, sys; os.rmdir({str(tmp_path)!r}); sys.argv = ['pacd-fast', 'info']; from pacd_fast import cli"
    found = subprocess.run([sys.executable, "-c", gone], cwd=tmp_path, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "pacd-fast: the folder that it was started in is gone; change to one that is there\n"


KILLED = """
class Killed(nn.Module):
    def forward(self, x):
        import os, signal
        os.kill(os.getpid(), signal.SIGTERM)
        return x

def killed(num_classes):
    return nn.Sequential(*nothing_yet(num_classes), Killed())
"""


def test_terminated_it_says_how_to_go_on_and_leaves_no_lock(here):
    (here / "killed_net.py").write_text(NETWORK + KILLED)
    before = sorted(here.iterdir())
    for name, again in (("certify", "; run the same command again to go on"), ("predict", "")):
        words = WRITERS["predict"].replace("predict", name, 1).replace("small_net:nothing_yet", "killed_net:killed")
        found = run_program(words, here, PYTHONDONTWRITEBYTECODE="1")
        assert found.returncode == 143 and found.stderr.endswith(f"\npacd-fast {name}: stopped{again}\n"), found.stderr
        assert "Traceback" not in found.stderr
        assert sorted(here.iterdir()) == before


def test_the_second_of_several_victims_is_not_overwritten(here, capsys):
    Path("out-1.safetensors").write_text("mine")
    assert main([*WRITERS["train"].split(), "--seeds", "2"]) == 2
    assert "out-1.safetensors exists already" in capsys.readouterr().err
    assert not Path("out-0.safetensors").exists() and Path("out-1.safetensors").read_text() == "mine"
    Path("out.png").write_text("mine")  # the picture beside the poison
    assert main(WRITERS["poison"].split()) == 2 and "out.png exists already" in capsys.readouterr().err


def test_files_without_rows_are_left_out_and_said_to_be(here, capsys):
    assert main(["summary", "a.tsv", "empty.tsv", "b.tsv", "started.tsv"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0].split() == ["a", "b"]
    assert said.err.splitlines() == [
        f"{name}.tsv: no certificates in it yet, left out" for name in ("empty", "started")
    ]
    assert main(["plot", "empty.tsv", "started.tsv", "--out", "o.png"]) == 2
    assert "there is no certificate in any of empty.tsv, started.tsv" in capsys.readouterr().err
    assert main(["summary", "empty.tsv"]) == 2 and "empty.tsv" in capsys.readouterr().err


def test_curves_are_called_as_one_wants(here, capsys):
    Path("x=y.tsv").symlink_to("b.tsv")
    assert main(["summary", "mine=a.tsv", "x=y.tsv", "b.tsv", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["mine", "x=y", "b"]
    assert main(["summary", "one=a.tsv", "one=b.tsv"]) == 2 and "NAME=FILE" in capsys.readouterr().err
    assert main(["summary", "one=absent.tsv"]) == 2 and "absent.tsv" in capsys.readouterr().err


def test_numbers_and_files_in_any_order(here, capsys):
    said = []
    for words in ("--radii 0.25 1/2 a.tsv b.tsv", "a.tsv b.tsv --radii 0.25 0.5", "a.tsv --radii 0.25 0.5 b.tsv"):
        assert main(["summary", *words.split()]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] and "certified at 0.25" in said[0] and "certified at 0.5" in said[0]
    for words in ("--radii a.tsv", "a.tsv --radii x", "a.tsv --radii", "--radii 0.5", "a.tsv --flops 1"):
        with pytest.raises(SystemExit) as ended:
            main(["summary", *words.split()])
        lines = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("pacd-fast")


def test_presets_fit_few_images(here, capsys):
    small = "--model small_net:nothing_yet --epochs 1 --lower-steps 1 --copies 2 --device cpu --target-class 1"
    words = ["poison", "pacd", "--data", "data.npz", *small.split()]
    assert main([*words, "--out", "p.npz"]) == 0
    poison = Poison.load("p.npz")
    assert (poison.settings["validation"], poison.settings["train_images"]) == (15, 105)
    assert len(poison.index) == poison.settings["poison_batch"] == 35 and poison.settings["clean_batch"] == 70
    assert "few images: --poison-batch 35, --clean-batch 70" in capsys.readouterr().err
    assert main([*words, "--validation", "1", "--out", "q.npz"]) == 2
    assert "hold out more with --validation" in capsys.readouterr().err
    assert main([*words, "--poison-batch", "60", "--out", "q.npz"]) == 2 and "--poison-batch" in capsys.readouterr().err
    for preset, sizes in (("mnist", (55_000, 5000)), ("mnist-small", (5000, 5000)), ("cifar10", (55_000, 5000))):
        assert PRESETS[preset].sizes(60_000) == sizes[::-1]
    assert PRESETS["mnist-small"].sizes(4000) == (500, 3500)  # the embedded digits


def test_metapoison_says_what_is_ahead(here, capsys):
    words = (
        "poison metapoison --data data.npz --poison-class 1 --target-index 0 --model small_net:nothing_yet --steps 2"
    )
    words += " --surrogates 3 --epochs 6 --budget 0.1 --unroll 1 --device cpu --out m.npz"
    assert main(words.split()) == 0
    said = capsys.readouterr().err
    one = words.replace("--surrogates 3 --epochs 6", "--surrogates 2 --epochs 2").replace("--steps 2", "--steps 1")
    assert "3 surrogates, pretrained for 6 epochs in all, then 2 crafting steps of an epoch each" in said
    assert "surrogate 1 of 3" in said and "step 1 of 2" in said and "100%" in said and "left 00:00" in said
    assert main([*one.split(), "--force"]) == 0
    said = capsys.readouterr().err
    assert "2 surrogates, pretrained for 1 epoch in all, then 1 crafting step of an epoch each" in said


def test_poison_that_changes_nothing_says_so_and_what_to_do(here, capsys):
    """In a process of its own: what torch warns of when it loads something comes once a process."""
    words = "poison pacd --data data.npz --epochs 1 --lower-steps 1 --copies 2 --device cpu --target-class 1 --model"
    for model, unchanged in (("small_net:never_one", True), ("small_net:nothing_yet", False)):
        command = [sys.executable, "-m", "pacd_fast", *words.split(), model, "--out", f"{unchanged}.npz"]
        path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
        said = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        assert said.returncode == 0 and "Warning" not in said.stderr, said.stderr
        assert ("largest linf distortion 0.0000" in said.stdout) is unchanged
        assert ("nothing changed: the poison is the clean images" in said.stderr) is unchanged
        assert ("more --lower-steps or --epochs" in said.stderr) is unchanged
    assert main([*words.split(), "small_net:nothing_yet", "--max-seconds", "0", "--out", "none.npz"]) == 0
    assert "crafting ended before its first step, give more --max-seconds" in capsys.readouterr().err
