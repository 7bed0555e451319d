"""`pacd-fast verify` passes every honest file and catches tampered ones; votes are drawn again."""

import pytest

from pacd_fast.certification import verify
from pacd_fast.cli import main

MODES = {
    "full": [],
    "no futility": ["--futility", "0"],
    "radii": ["--radii", "0.1", "0.3", "0.5"],
    "tolerance": ["--tolerance", "0.1"],
    "two sides": ["--sides", "2"],
    "two sides, radii": ["--sides", "2", "--radii", "0.2", "0.4"],
    "float": ["--noise", "float"],
}


CERTIFY = ["certify", "--data", "mnist5k", "--count", "6", "--n", "1000", "--seed", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verified")
    model = folder / "m.safetensors"
    train = ["train", "--model", "convnet", "--data", "mnist5k", "--train-images", "300", "--epochs", "1"]
    assert main([*train, "--sigma", "0.5", "--method", "gaussian", "--out", str(model)]) == 0
    for name, flags in MODES.items():
        assert main([*CERTIFY, "--checkpoint", str(model), *flags, "--out", str(folder / f"{name}.tsv")]) == 0
    return folder, model


@pytest.mark.parametrize("mode", MODES)
def test_honest_files_pass(files, mode):
    folder, _ = files
    assert verify(folder / f"{mode}.tsv") == (6, [])


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_was_cut_is_resumed(files, tmp_path, mode):
    """A kill leaves whole rows in the order of their decision and a torn one; the end is the file without a kill."""
    folder, model = files
    whole = (folder / f"{mode}.tsv").read_text().splitlines(keepends=True)
    out = tmp_path / "r.tsv"
    out.write_text("".join([whole[0], whole[4], whole[2], whole[1][:50]]))
    assert main([*CERTIFY, "--checkpoint", str(model), *MODES[mode], "--out", str(out)]) == 0
    assert [line.rsplit("\t", 1)[0] for line in out.read_text().splitlines()] == [
        line.rsplit("\t", 1)[0] for line in whole
    ]


def test_votes_are_drawn_again(files, capsys):
    folder, model = files
    again = ["--checkpoint", str(model), "--device", "cpu"]
    for mode in ("full", "radii", "two sides"):
        arguments = [
            "verify",
            str(folder / f"{mode}.tsv"),
            "--checkpoint",
            str(model),
            "--images",
            "2",
            "--device",
            "cpu",
        ]
        assert main(arguments) == 0
        assert "2 rows have the votes of noise drawn again" in capsys.readouterr().out
    changed = folder / "moved.tsv"  # votes and bounds agree with one another, and are of another image's noise
    lines = (folder / "full.tsv").read_text().splitlines()
    first, second = (line.split("\t") for line in lines[1:3])
    second[0], first[0] = first[0], second[0]
    second[1], first[1] = first[1], second[1]
    for fields in (first, second):
        fields[4] = str(int(fields[1] == fields[2]))
    changed.write_text("\n".join([lines[0], *("\t".join(f) for f in (first, second)), ""]))
    assert main(["verify", str(changed)]) == 0
    assert main(["verify", str(changed), *again, "--images", "2"]) == 1
    assert "from its noise" in capsys.readouterr().err
    assert main(["verify", str(folder / "full.tsv"), "--checkpoint", str(model), "--images", "7"]) == 2
    assert (
        main(["verify", str(folder / "full.tsv"), "--checkpoint", str(model), "--data", "mnist5k", "--split", "train"])
        == 2
    )


def column(name, change):
    """A tampering: the text of a column of the first certified row changed."""

    def tamper(text: str) -> str:
        header, *lines = text.splitlines()
        names = header.split("\t")
        at = next(i for i, line in enumerate(lines) if line.split("\t")[names.index("predict")] != "-1")
        fields = lines[at].split("\t")
        fields[names.index(name)] = change(fields[names.index(name)])
        lines[at] = "\t".join(fields)
        return "\n".join([header, *lines, ""])

    return tamper


def everywhere(name, value):
    """A tampering: a column of the run changed in every row."""

    def tamper(text: str) -> str:
        header, *lines = text.splitlines()
        at = header.split("\t").index(name)
        rows = [line.split("\t") for line in lines]
        return "\n".join([header, *("\t".join([*row[:at], value, *row[at + 1 :]]) for row in rows), ""])

    return tamper


def up(text):
    return f"{float(text) + 1e-6:.{len(text.partition('.')[2])}f}"


def one_more(text):
    """A vote moved from the last class to the first."""
    first, *rest = text.split(" ")
    label, count = first.split(":")
    return " ".join([f"{label}:{int(count) + 1}", *rest])


TAMPERED = {
    "radius up": ("full", column("radius", up)),
    "radius doubled": ("full", column("radius", lambda t: f"{2 * float(t):.6f}")),
    "radius down": ("full", column("radius", lambda t: f"{0.5 * float(t):.6f}")),
    "radius with more digits": ("full", column("radius", lambda t: t + "1")),
    "p_lower up": ("full", column("p_lower", up)),
    "p_lower 1": ("full", column("p_lower", lambda t: "1.000000000")),
    "another class": ("full", column("predict", lambda t: str((int(t) + 1) % 10))),
    "abstains": ("full", column("predict", lambda t: "-1")),
    "count up": ("full", column("count", lambda t: str(int(t) + 1))),
    "count down": ("full", column("count", lambda t: str(int(t) - 1))),
    "samples fewer": ("full", column("samples", lambda t: "999")),
    "samples of no look": ("radii", column("samples", lambda t: str(int(t) + 1))),
    "void samples": ("full", column("voids", lambda t: "1")),
    "void samples in floats": ("float", column("voids", lambda t: "1")),
    "rival bound down": ("two sides", column("rival_upper", lambda t: f"{0.5 * float(t):.9f}")),
    "rival bound in one side": ("full", column("rival_upper", lambda t: "0.5")),
    "a vote more": ("full", column("votes", one_more)),
    "all votes for it": ("full", column("votes", lambda t: "3:1000")),
    "no votes": ("full", column("votes", lambda t: "-")),
    "votes twice": ("full", column("votes", lambda t: f"{t} {t}")),
    "selection votes more": ("full", column("selection", one_more)),
    "no selection": ("full", column("selection", lambda t: "-")),
    "selection of another class": (
        "full",
        column("selection", lambda t: "8:100" if t[0] == "9" else "9:100"),
    ),
    "n": ("full", everywhere("n", "10000")),
    "n0": ("full", everywhere("n0", "10")),
    "alpha": ("full", everywhere("alpha", "0.05")),
    "sigma": ("full", everywhere("sigma", "1.0")),
    "sides": ("two sides", everywhere("sides", "1")),
    "target": ("full", everywhere("target", "radii 0.1 0.3")),
    "targets": ("radii", everywhere("target", "radii 0.2 0.4 0.6")),
    "full instead of radii": ("radii", everywhere("target", "full")),
    "tolerance": ("tolerance", everywhere("target", "tolerance 0.2")),
    "no such target": ("full", everywhere("target", "all")),
    "a step too coarse": ("full", everywhere("step", "0.25")),
    "a row cut": ("full", lambda text: text[:-40].rsplit("\t", 3)[0] + "\n"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_tampered_files_are_caught(files, tmp_path, what):
    folder, _ = files
    mode, tamper = TAMPERED[what]
    honest = (folder / f"{mode}.tsv").read_text()
    path = tmp_path / "t.tsv"
    path.write_text(tamper(honest))
    assert path.read_text() != honest
    assert main(["verify", str(path)]) in (1, 2)
