"""The report: one page, in which what is true of the files is said, and which a browser shows at any width."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from pacd_fast.certification import (
    Certify,
    Noise,
    ResultsFile,
    Row,
    Run,
    predict_dataset,
    read_results,
    summarize,
)
from pacd_fast.cli import main
from pacd_fast.data import load_dataset
from pacd_fast.experiments import page, report
from pacd_fast.labelflips import CONDITIONAL
from pacd_fast.networks import Checkpoint
from pacd_fast.poisoning import Ball, watermark

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Files of every kind that a report takes."""
    folder, draw = tmp_path_factory.mktemp("report"), np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (120, 28, 28)).astype(np.uint8), np.arange(120) % 10
    arrays = {"x_train": images[:80], "y_train": labels[:80], "x_test": images[80:], "y_test": labels[80:]}
    np.savez(folder / "data.npz", **arrays)
    data = load_dataset(str(folder / "data.npz"))
    for name, sigma in (("first", 0.5), ("second", 0.25)):
        run = Run(100, 1000, 0.001, sigma, 7, "float32", "mnist-cnn@0123456789ab", data.tag("test"))
        with ResultsFile(folder / f"{name}.tsv", run) as file:
            for i in range(40):
                label, kind = int(data.y_test[i]), i % 5
                predict = -1 if kind == 0 else (label + 1) % 10 if kind == 1 else label
                radius = 0.0 if kind == 0 else float(draw.uniform(0.1, 1)) * sigma
                file.append(Row(i, label, predict, radius, 0.4 if kind == 0 else 0.9, 950, 0.5))
    features = {"X_train": draw.normal(size=(60, 4)), "X_test": draw.normal(size=(10, 4))}
    np.savez(folder / "f.npz", **features, y_train=np.arange(60) % 2, y_test=np.arange(10) % 2)
    assert main(["labelflip", "--data", str(folder / "f.npz"), "--q", "0.1", "--out", str(folder / "flips.tsv")]) == 0
    held = load_dataset(str(folder / "data.npz"), validation=10)
    watermark(held, target_class=8, ball=Ball(0.1), fraction=1.0, opacity=0.1, seed=0).save(folder / "poison.npz")
    figures = {name: [0.5, 0.6] for name in ("acr", "aca", "accuracy", "others_acr", "others_aca", "distortion")}
    content = {"measured": {"clean": figures, "<b>p": {**figures, "acr": [0.25, 0.3]}}, "audit": {"sigma": 0.5}}
    long = {"epsilon": 0.1, "upper": "Radius()", **{f"setting_{i}": i / 7 for i in range(25)}, "path": "x" * 200}
    (folder / "audit.json").write_text(json.dumps({**content, "poisons": {"p": long}}))
    return folder


def made(folder: Path, out: Path, *more: str) -> str:
    files = ["one=" + str(folder / "first.tsv"), *(str(folder / name) for name in
             ("second.tsv", "flips.tsv", "poison.npz", "audit.json"))]  # fmt: skip
    assert main(["report", *files, "--data", str(folder / "data.npz"), "--images", "3", "--out", str(out), *more]) == 0
    return out.read_text(encoding="utf-8")


def test_what_the_page_says(folder, tmp_path, capsys):
    text = made(folder, tmp_path / "r.html", "--title", "<Mine>")
    assert "<title>&lt;Mine&gt;</title>" in text and "<b>p" not in text and html.escape("<b>p") in text
    assert not re.search(r"https?:|<script|<link|@import|url\(", text), "the page asks for something from outside"
    found = summarize(read_results(folder / "first.tsv"))
    (row,) = re.findall(r"<tr><td>one</td><td>40</td><td>([0-9.]+)</td>", text)
    assert 0 <= found.acr - float(row) < 1e-4
    assert "50.0%" in text  # by which the audit's radius falls
    assert text.count("<td>data-test@") == 2 and text.count("<td>float32</td>") == 2
    # 3 images of each of four groups and two files, and 3 of three kinds of the poison
    assert text.count("<img ") == 2 * 4 * 3 + 3 * 3
    results_, data = read_results(folder / "first.tsv"), load_dataset(str(folder / "data.npz"))
    right = np.flatnonzero(results_.correct)
    smallest = int(results_.idx[right[results_.radius[right].argmin()]])
    assert page._png(data.x_test[smallest]) in text.partition("smallest radii")[2].partition("</figure>")[0]
    before = (tmp_path / "r.html").read_bytes()
    assert main(["report", str(folder / "first.tsv"), "--out", str(tmp_path / "r.html")]) == 2
    assert "--force" in capsys.readouterr().err and (tmp_path / "r.html").read_bytes() == before
    assert main(["report", str(folder / "first.tsv"), "--out", str(tmp_path / "r.html"), "--force"]) == 0
    assert "With --data" in (tmp_path / "r.html").read_text()


def test_what_certificates_do_not_promise_is_said_beside_their_curves(folder, tmp_path):
    flips, floats, lattice = tmp_path / "paper.tsv", folder / "first.tsv", tmp_path / "lattice.tsv"
    law = Noise.of("lattice", 0.5)
    run = Run(100, 1000, 0.001, 0.5, 7, "float32", "m@0", "d@0", noise=law.kind, step=law.lattice, machine="cpu")
    with ResultsFile(lattice, run) as file:
        file.append(Row(0, 1, 1, 0.3, 0.9, 950, 0.5, 1000))
    text = report.report({"one": lattice, "flips": folder / "flips.tsv"})
    assert "floating point" not in text and "conditional" not in text
    words = ["labelflip", "--data", str(folder / "f.npz"), "--q", "0.1", "--l2", "paper", "--out", str(flips)]
    assert main(words) == 0
    text = report.report({"one": lattice, "two": floats, "flips": flips})
    warning = summarize(read_results(floats)).warning
    assert warning is not None
    before, _, after = text.partition("<h3>Certified accuracy</h3>")
    assert warning not in before and after.startswith(f'\n<p class="note">two: {warning}.</p>\n<div class="chart">')
    before, _, after = text.partition(f'<p class="note">{CONDITIONAL}.</p>\n<div class="chart">')
    assert "<li>" in after and "</svg>exact, q = 0.1 (conditional)</li>" in after.partition("</ul>")[0]


def test_predictions_are_not_results(folder, tmp_path, capsys):
    data, network = load_dataset(str(folder / "data.npz")), torch.nn.Sequential(torch.nn.Flatten())
    network.append(torch.nn.Linear(784, 10)).eval()
    checkpoint = Checkpoint(network, "mine", 10, 1, (28, 28), None, None, {}, "0")
    settings = Certify(sigma=0.5, n0=10, n=20, seed=0, compile="no")
    predict_dataset(checkpoint, data, "test", [0, 1], tmp_path / "pred.tsv", settings)
    assert main(["report", str(tmp_path / "pred.tsv"), "--out", str(tmp_path / "o.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pred.tsv holds predictions" in line and "pacd-fast certify writes" in line
    assert not (tmp_path / "o.html").exists()


def test_images_of_other_data_are_not_shown(folder):
    other = load_dataset(str(folder / "data.npz"), validation=10)
    assert "<img " in report.report({"a": folder / "first.tsv"}, other)  # the test images are the same
    del other.__dict__["fingerprint"]
    object.__setattr__(other, "x_test", other.x_test.flip(0))
    assert "the data that were given are data@" in report.report({"a": folder / "first.tsv"}, other)


def test_an_image_is_a_png_with_its_pixels():
    import base64
    import io

    from matplotlib.image import imread

    for channels in (1, 3):
        image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
        (uri,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page.images([(image, "a")]))
        pixels = imread(io.BytesIO(base64.b64decode(uri)), format="png")
        assert np.array_equal((pixels * 255).round().reshape(5, 7, channels), image.permute(1, 2, 0).numpy())


def test_a_curve_of_many_points_is_short_and_right():
    x = np.sort(np.random.default_rng(0).uniform(0, 2, 200_000))
    text = page.chart({"a": (x, np.linspace(1, 0, len(x)))}, "radius", "accuracy", marks={"limit": [2.5]})
    assert len(text) < 80_000
    points = np.array([point.split() for point in re.findall(r'd="M([^"H]*L[^"]*)"', text)[0].split("L")], dtype=float)
    right = page._WIDTH - 8
    radius = (points[:, 0] - page._LEFT) / (right - page._LEFT) * 2.5
    height = 1 - (points[:, 1] - 8) / (page._HEIGHT - page._BOTTOM - 8)
    assert np.abs(height - (1 - radius / 2)).max() < 0.01


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"measured": 3}', '{"measured": {"a": {"acr": []}}}', '{"a": 1}', "x"]
)
def test_an_audit_that_is_none(tmp_path, content, capsys):
    (tmp_path / "audit.json").write_text(content)
    assert main(["report", str(tmp_path / "audit.json"), "--out", str(tmp_path / "o.html")]) == 2
    assert "is not a file of an audit" in capsys.readouterr().err


def test_a_browser_shows_it_without_a_word_and_at_any_width(folder, tmp_path):
    if CHROMIUM is None:
        pytest.skip("NO BROWSER: the report's page was not looked at; install chromium (Debian: apt install chromium)")
    text = made(folder, tmp_path / "r.html")
    frames = "".join(f'<iframe width="{w}" height="900" srcdoc="{html.escape(text)}"></iframe>' for w in (1280, 400))
    (tmp_path / "both.html").write_text(
        f"<!doctype html><body>{frames}<script>onload = () => {{ console.error('I am listening');"
        "for (const f of document.querySelectorAll('iframe')) { const d = f.contentDocument;"
        "const lost = [...d.images].filter(i => !i.complete || !i.naturalWidth).length;"
        "const p = document.createElement('p'); const e = d.documentElement;"
        "const small = [...d.querySelectorAll('svg text')].filter(t => t.getBoundingClientRect().height < 9).length;"
        "const values = [...d.querySelectorAll('h3')].filter(h => h.textContent == 'its settings')"
        ".flatMap(h => [...h.nextElementSibling.querySelectorAll('td')]);"
        "const hidden = values.filter(v => v.getBoundingClientRect().right > e.clientWidth"
        " || getComputedStyle(v).textAlign == 'right').length + (values.length < 10 ? 'too few' : '');"
        "const over = [...d.querySelectorAll('.chart')].filter(c => { const a = c.children[0].getBoundingClientRect(),"
        "b = c.children[1].getBoundingClientRect(); return b.left < a.right - 1 && b.top < a.bottom - 1; }).length;"
        "p.textContent = `width ${e.clientWidth} of ${e.scrollWidth}, lost ${lost}, small ${small}, over ${over}, `"
        "+ `hidden ${hidden}`;"
        "document.body.append(p); } }</script>",
        encoding="utf-8",
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=9999"]
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{tmp_path}/both.html"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    assert len(said) == 1 and "I am listening" in said[0], said
    widths = re.findall(r"<p>width (\d+) of (\d+), lost 0, small 0, over 0, hidden 0</p>", shown.stdout)
    assert len(widths) == 2, re.findall(r"<p>width.*?</p>", shown.stdout)
    assert all(inner == outer for inner, outer in widths), "it is wider than the window"
