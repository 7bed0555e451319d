"""The curve is the certified accuracy at every radius, and a picture of it is written in each format."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from pacd_fast import largest_radius
from pacd_fast.certification import Results, Run, summarize
from pacd_fast.experiments import plots

RUN = Run(100, 100_000, 0.001, 0.5, 1, "float32", "mnist-cnn@0123456789ab", "mnist5k-test@c0b26e9ecbbb")


def results(radius, correct, run=RUN):
    radius, correct = np.asarray(radius, dtype=float), np.asarray(correct, dtype=bool)
    n = len(radius)
    return Results(
        idx=np.arange(n),
        label=np.zeros(n, dtype=np.int64),
        predict=np.where(correct, 0, 1),
        radius=radius,
        correct=correct,
        time=np.zeros(n),
        p_lower=None if run is None else np.linspace(0.3, 0.99, n),
        count=None if run is None else np.zeros(n, dtype=np.int64),
        run=run,
    )


def many(seed=0, run=RUN):
    generator = np.random.default_rng(seed)
    return results(np.minimum(generator.gamma(4, 0.2, 300), 1.9), generator.random(300) < 0.8, run)


def step_before(x, corners, heights):
    """What drawstyle steps-pre draws at x > 0."""
    i = np.searchsorted(corners, x, side="left")
    return np.where(i < len(corners), heights[np.minimum(i, len(heights) - 1)], 0.0)


@pytest.mark.parametrize(
    "result", [many(), results([0.5, 0.5, 0.5, 1.0], [1, 1, 0, 1]), results([0.0, 0.0], [1, 0]), results([1.0], [0])]
)
def test_the_curve_is_the_certified_accuracy_at_every_radius(result):
    corners, heights = plots.steps(result)
    assert len(corners) == len(heights)
    assert heights[-1] == 0
    radii = np.unique(np.concatenate([result.radius, result.radius + 1e-9, np.linspace(0.001, 3, 77)]))
    radii = radii[radii > 0]
    expected = summarize(result, radii.tolist()).certified_accuracy
    assert step_before(radii, corners, heights).tolist() == list(expected)
    assert heights[0] == summarize(result).clean_accuracy


def test_largest_radius():
    # With mpmath: 0.5 * sqrt(2) * erfinv(2 * mpf("0.001") ** (mpf(1) / 100000) - 1).
    assert largest_radius(0.5, 100_000, 0.001) == pytest.approx(1.9057282816949759, abs=1e-9)
    assert largest_radius(0.5, 5, 0.001) == 0


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_writes_a_picture(tmp_path, ending):
    path = tmp_path / f"curve.{ending}"
    plots.certified_accuracy({"ours": many(), "published": many(1, None)}, path, title="MNIST")
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[ending]
    assert path.read_bytes().startswith(start)
    assert "matplotlib.pyplot" not in sys.modules or sys.modules["matplotlib.pyplot"].get_fignums() == []


def drawn(monkeypatch, tmp_path, *args, **kwargs):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: figures.append(figure))
    plots.certified_accuracy(*args, tmp_path / "curve.png", **kwargs)
    return figures[0]


def test_what_is_in_the_picture(monkeypatch, tmp_path):
    figure = drawn(monkeypatch, tmp_path, {"ours": many(), "published": many(1, None)}, title="MNIST")
    curves, bounds = figure.axes
    labels = [text.get_text() for text in curves.get_legend().get_texts()]
    assert labels[0] == f"ours (ACR {summarize(many()).acr:.3f})"
    assert labels[1].startswith("published (ACR ")
    assert labels[2] == "largest radius at this n"
    assert curves.lines[0].get_drawstyle() == "steps-pre"  # what step_before models
    assert np.array_equal(curves.lines[0].get_xydata(), np.stack(plots.steps(many()), axis=1))
    assert len(bounds.lines) == 2  # one distribution, and the line at 1/2
    assert bounds.lines[0].get_xdata()[1] == pytest.approx(0.3)
    assert figure.get_suptitle() == "MNIST"
    limit = [line for line in curves.lines if line.get_linestyle() == ":" and len(line.get_xdata()) == 2]
    assert [line.get_xdata()[0] for line in limit] == [largest_radius(RUN.sigma, RUN.n, RUN.alpha)]
    assert curves.get_xlim()[1] >= largest_radius(RUN.sigma, RUN.n, RUN.alpha)


def test_without_bounds_there_is_one_panel(monkeypatch, tmp_path):
    figure = drawn(monkeypatch, tmp_path, {"published": many(1, None)})
    assert len(figure.axes) == 1
    assert len(figure.axes[0].get_legend().get_texts()) == 1


def test_many_lines_are_told_apart(monkeypatch, tmp_path):
    figure = drawn(monkeypatch, tmp_path, {f"run {i}": many(i, None) for i in range(13)})
    axes = figure.axes[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 13
    figure.canvas.draw()
    assert axes.get_legend() is None and len(figure.legends[0].get_texts()) == 13
    legend, size = figure.legends[0].get_window_extent(), figure.bbox
    assert legend.x0 >= axes.get_window_extent().x1, "the legend lies over the lines"
    assert legend.x1 <= size.x1 and legend.y0 >= size.y0, "the legend leaves the picture"


def test_all_wrong_is_drawn_too(tmp_path):
    plots.certified_accuracy({"wrong": results([1.0, 2.0], [0, 0])}, tmp_path / "a.png")
    assert imread(tmp_path / "a.png").std() > 0


def test_refuses(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        plots.certified_accuracy({}, tmp_path / "a.png")
    for name in ("curve", "curve.tsv"):
        with pytest.raises(ValueError, match="unknown kind of picture"):
            plots.certified_accuracy({"a": many()}, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        plots.certified_accuracy({"a": many()}, tmp_path / "absent" / "a.png")


def test_panels(monkeypatch, tmp_path):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *given, **named: saved.append(self))
    lines = {"clean": ([1, 2], [0.5, 0.6]), "poison": ([1, 2, 3], [0.4, 0.3, 0.1])}
    panels = [plots.Panel("a", "epoch", "loss", lines), plots.Panel("b", "epoch", "rate", {"poison": ([1], [0.2])})]
    plots.panels(panels, tmp_path / "a.png", columns=2)
    left, right = saved[0].axes
    assert [line.get_label() for line in left.lines] == ["clean", "poison"] and left.get_xlabel() == "epoch"
    assert left.lines[1].get_ydata().tolist() == [0.4, 0.3, 0.1]
    assert left.lines[1].get_color() == right.lines[0].get_color() != left.lines[0].get_color()
    with pytest.raises(ValueError, match="no panels"):
        plots.panels([], tmp_path / "a.png")
    with pytest.raises(ValueError, match="unknown kind of picture"):
        plots.panels(panels, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        plots.panels(panels, tmp_path / "absent" / "a.png")
