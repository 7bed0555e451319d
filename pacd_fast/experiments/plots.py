"""Pictures from results files, fit for a paper."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pacd_fast.arguments import writable
from pacd_fast.certification import Results, largest_radius, summarize
from pacd_fast.data import as_float
from pacd_fast.files import replaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pacd_fast.data import Dataset
    from pacd_fast.poisoning import Poison

# Okabe and Ito's palette, told apart by colour-blind readers; after it come other dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", "-.")


def _figure(out_path: str | os.PathLike[str], size: tuple[float, float]) -> Figure:
    """An empty figure for a file, inches.

    Raises ValueError for an unknown ending, FileNotFoundError where the folder does not exist.
    """
    # Imported here because it takes long, and without pyplot, so that no window system or global state is touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    out_path = writable(out_path)
    figure = Figure(figsize=size, layout="constrained")
    if out_path.suffix[1:].lower() not in FigureCanvasAgg(figure).get_supported_filetypes():
        raise ValueError(f"{out_path}: unknown kind of picture {out_path.suffix!r}; name it .png, .pdf or .svg")
    return figure


def _save(figure: Figure, out_path: str | os.PathLike[str], dpi: int) -> None:
    """Puts the picture into its file, whole or not at all."""
    with replaced(out_path) as temporary:
        figure.savefig(temporary, dpi=dpi, format=Path(out_path).suffix[1:].lower())


def certified_accuracy(
    results: Mapping[str, Results], out_path: str | os.PathLike[str], title: str | None = None
) -> None:
    """Draw certified accuracy against radius, one line per name, and the distribution of the bounds on p_A.

    The curve is exact: at r, the fraction of images with the right class and a radius of at least r. A dotted line
    marks the largest radius that (n, alpha, sigma) can certify, sigma * Phi^-1(alpha^(1/n)), where the file says them.
    The second panel is drawn where a file has p_lower: the fraction of images whose bound is at most p.
    out_path: its ending chooses the format (.png, .pdf, .svg).
    Raises ValueError for no results or an unknown ending, FileNotFoundError where the folder does not exist.
    """
    out_path = Path(out_path)
    if not results:
        raise ValueError("no results to draw")
    with_bounds = {name: result.p_lower for name, result in results.items() if result.p_lower is not None}
    figure = _figure(out_path, (7.2 if with_bounds else 4.8, 3.2))

    styles = {
        name: (COLOURS[i % len(COLOURS)], _DASHES[i // len(COLOURS) % len(_DASHES)]) for i, name in enumerate(results)
    }
    if with_bounds:
        curves, bounds = figure.subplots(1, 2, width_ratios=(2.1, 1))
        _draw_bounds(bounds, with_bounds, styles)
    else:
        curves = figure.subplots()
    _draw_curves(figure, curves, results, styles)
    if title is not None:
        figure.suptitle(title, fontsize=11)
    _save(figure, out_path, 200)


def flip_curves(
    curves: Mapping[str, tuple[np.ndarray, float]],
    training_points: int,
    out_path: str | os.PathLike[str],
    *,
    constant: float,
    attacked: np.ndarray | None = None,
    title: str | None = None,
) -> None:
    """Draw certified accuracy against label flips: figures 1 to 4 of Rosenfeld et al. 2020.

    curves: per name the flips certified for the test points that are right, and the share of those (the non-robust
    accuracy, dashed in the colour of its curve, where the curve starts). training_points: the axis at the top is in
    percent of them. constant: the accuracy of the best constant classifier, which no flips can change (black, dotted).
    attacked: for an undefended classifier, per test point the flips it survived under attack, -1 where it is wrong
    (black, an upper bound on its robustness).
    Raises ValueError for nothing to draw or an unknown ending, FileNotFoundError where the folder does not exist.
    """
    out_path = Path(out_path)
    if not curves:
        raise ValueError("no label-flip certificates to draw")
    figure = _figure(out_path, (5.6, 3.6))
    axes = figure.subplots()
    right = 1.0
    for i, (name, (flips, accuracy)) in enumerate(curves.items()):
        colour, dash = COLOURS[i % (len(COLOURS) - 1)], _DASHES[i // (len(COLOURS) - 1) % len(_DASHES)]
        steps, heights = flip_steps(flips, accuracy)
        right = max(right, float(steps[-1]))
        axes.plot(steps, heights, dash, color=colour, drawstyle="steps-pre", linewidth=1.4, label=name)
        axes.axhline(accuracy, color=colour, linestyle=(0, (4, 4)), linewidth=0.8, alpha=0.7)
    if attacked is not None:
        correct = attacked >= 0
        steps, heights = flip_steps(attacked[correct], float(correct.mean()))
        axes.plot(steps, heights, color="black", drawstyle="steps-pre", linewidth=1.2, label="undefended, attacked")
    axes.axhline(constant, color="black", linestyle=":", linewidth=1.1, label="constant classifier")
    axes.set_xlim(0, right * 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("label flips")
    axes.set_ylabel("certified accuracy")
    percent = 100 / training_points
    share = axes.secondary_xaxis(
        "top", functions=(lambda r: np.asarray(r) * percent, lambda p: np.asarray(p) / percent)
    )
    share.set_xlabel("percent of the training labels")
    axes.grid(alpha=0.25, linewidth=0.6)
    _legend(figure, axes, 7, title="dashed: non-robust accuracy")
    if title is not None:
        figure.suptitle(title, fontsize=11)
    _save(figure, out_path, 200)


def poison(
    poison: Poison, data: Dataset, out_path: str | os.PathLike[str], *, images: int = 8, title: str | None = None
) -> None:
    """Draw some images three times: as they were, with their poison, and the difference, amplified to full contrast.

    The images are those with the largest perturbations (l2), all of which lie in the ball.  Above them stand the test
    images that the poison is aimed at, where its settings name a target_index.
    Raises ValueError for no poison or an unknown ending, FileNotFoundError where the folder does not exist.
    """
    out_path = Path(out_path)
    if len(poison.index) == 0:
        raise ValueError("the poison changes no image: there is nothing to draw")
    base, poisoned = as_float(data.x_train[poison.index]), as_float(poison.images)
    size = (poisoned - base).flatten(1).norm(dim=1)
    shown = size.argsort(descending=True, stable=True)[:images]
    delta = (poisoned - base)[shown]
    scale = float(delta.abs().max()) or 1.0
    rows = {
        "base": base[shown],
        "poison": poisoned[shown],
        f"difference, x{0.5 / scale:.2g}": 0.5 + 0.5 * delta / scale,
    }
    if poison.settings.get("target_index"):
        rows = {"target": as_float(data.x_test[poison.settings["target_index"][:images]]), **rows}
    figure = _figure(out_path, (1.0 * len(shown) + 1.0, 0.4 + 1.0 * len(rows)))
    axes = figure.subplots(len(rows), len(shown), squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for place in line[len(pictures) :]:
            place.axis("off")
        for place, picture in zip(line, pictures, strict=False):
            place.imshow(picture.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            place.set_xticks([])
            place.set_yticks([])
        line[0].set_ylabel(name, fontsize=8)
    label = f"{poison.attack}: {len(poison.index)} images, {poison.ball.norm} epsilon {poison.ball.epsilon:.3g}"
    figure.suptitle(label if title is None else title, fontsize=10)
    _save(figure, out_path, 150)


def bars(
    groups: Mapping[str, Mapping[str, Sequence[float]]],
    out_path: str | os.PathLike[str],
    ylabel: str,
    xlabel: str,
    title: str | None = None,
) -> None:
    """Draw means over victims as bars, with standard deviations (of one victim none) and every victim as a dot.

    A group per name, in it a bar per training set.

    Raises ValueError for nothing to draw or an unknown ending, FileNotFoundError where the folder does not exist.
    """
    out_path = Path(out_path)
    if not groups:
        raise ValueError("nothing to draw")
    kinds = list(dict.fromkeys(kind for group in groups.values() for kind in group))
    longest = max(len(line) for name in groups for line in name.splitlines())
    width = max(0.35 * len(kinds), 0.09 * longest) * len(groups) + 1.5
    figure = _figure(out_path, (max(4.0, width), 3.2))
    axes, width = figure.subplots(), 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        places = [g + (i - (len(kinds) - 1) / 2) * width for g, group in enumerate(groups.values()) if kind in group]
        values = [np.asarray(group[kind], dtype=float) for group in groups.values() if kind in group]
        spread = [float(v.std(ddof=1)) if len(v) > 1 else math.nan for v in values]
        means = [float(v.mean()) for v in values]
        axes.bar(places, means, 0.92 * width, yerr=spread, capsize=2, color=COLOURS[i % len(COLOURS)], label=kind)
        for place, v in zip(places, values, strict=True):
            x = place + width * ((np.arange(len(v)) + 0.5) / len(v) - 0.5) * 0.7
            axes.scatter(x, v, 12, "white", edgecolors="black", linewidths=0.6, zorder=3)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25, linewidth=0.6, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(kinds) > 1:
        axes.legend(fontsize=8, frameon=False, ncols=min(len(kinds), 2), loc="lower left", bbox_to_anchor=(0, 1.0))
    if title is not None:
        figure.suptitle(title, fontsize=11)
    _save(figure, out_path, 200)


def flip_steps(flips: np.ndarray, accuracy: float) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the step curve: up to steps[i] flips, a share heights[i] is right and certified."""
    steps = np.sort(np.asarray(flips, dtype=float))
    heights = accuracy * np.arange(len(steps), 0, -1) / max(len(steps), 1)
    return np.concatenate([[0.0], steps, steps[-1:]]), np.concatenate(
        [[accuracy], heights, [0.0] if len(steps) else []]
    )


def _draw_curves(
    figure: Figure, axes: Axes, results: Mapping[str, Results], styles: Mapping[str, tuple[str, str]]
) -> None:
    limits: dict[float, str] = {}
    right = 0.0
    for name, result in results.items():
        colour, dash = styles[name]
        radii, accuracy = steps(result)
        right = max(right, radii[-1])
        label = f"{name} (ACR {summarize(result).acr:.3f})"
        axes.plot(radii, accuracy, dash, color=colour, drawstyle="steps-pre", linewidth=1.4, label=label)
        if result.run is not None:
            limit = largest_radius(result.run.sigma, result.run.n, result.run.alpha)
            limits[limit] = colour if limit not in limits else "0.4"  # grey where several lines share it
    for limit, colour in limits.items():
        right = max(right, limit)
        axes.axvline(limit, color=colour, linestyle=":", linewidth=1.1)
    if limits:
        axes.plot([], [], ":", color="0.4", linewidth=1.1, label="largest radius at this n")
    axes.set_xlim(0, right * 1.03 if right > 0 else 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(r"$\ell_2$ radius")
    axes.set_ylabel("certified accuracy")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, axes, 8, loc="lower left")


def _legend(figure: Figure, axes: Axes, size: int, **more: Any) -> None:
    """In the axes where it is short; a long one would lie over the lines, and stands to the right of everything."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) <= 5:
        axes.legend(fontsize=size, title_fontsize=size, frameon=True, framealpha=0.9, edgecolor="none", **more)
        return
    width, height = figure.get_size_inches()
    lines = len(names) + 2 * ("title" in more)
    figure.set_size_inches(width + 0.6 + 0.075 * max(map(len, names)), max(height, 0.4 + 0.18 * lines))
    more["loc"] = "outside right upper"
    figure.legend(handles, names, fontsize=size, title_fontsize=size, frameon=False, **more)


def _draw_bounds(axes: Axes, bounds: Mapping[str, np.ndarray], styles: Mapping[str, tuple[str, str]]) -> None:
    for name, p_lower in bounds.items():
        colour, dash = styles[name]
        p = np.sort(p_lower)
        fractions = np.arange(1, len(p) + 1) / len(p)
        axes.plot([0, *p, 1], [0, *fractions, 1], dash, color=colour, drawstyle="steps-post", linewidth=1.4)
    axes.axvline(0.5, color="0.4", linestyle=":", linewidth=1.1)
    axes.text(0.48, 0.98, "abstains", ha="right", va="top", fontsize=8, color="0.4")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(r"lower bound on $p_A$")
    axes.set_ylabel("fraction of images at or below")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def steps(result: Results) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the exact step curve: between radii[i - 1] (excluded) and radii[i] its height is accuracy[i]."""
    radii = np.sort(result.radius[result.correct])
    heights = np.arange(len(radii), -1, -1) / len(result)
    return np.concatenate([[0.0], radii, [radii.max(initial=0.0)]]), np.concatenate([heights[:1], heights])


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a title, the axes' labels, and lines by name, each (x, y)."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]


def panels(given: Sequence[Panel], out_path: str | os.PathLike[str], columns: int = 3) -> None:
    """Draw panels side by side, `columns` a row, with points where the numbers are; one name has one colour throughout.

    Raises ValueError for nothing to draw or an unknown ending, FileNotFoundError where the folder does not exist.
    """
    if not given:
        raise ValueError("no panels to draw")
    width = min(columns, len(given))
    height = -(-len(given) // width)
    figure = _figure(out_path, (3.1 * width, 2.5 * height))
    names = list(dict.fromkeys(name for panel in given for name in panel.lines))
    for axes, panel in zip(figure.subplots(height, width, squeeze=False).flat, given, strict=False):
        for name, (x, y) in panel.lines.items():
            i = names.index(name)
            colour, dash = COLOURS[i % len(COLOURS)], _DASHES[i // len(COLOURS) % len(_DASHES)]
            axes.plot(x, y, dash, color=colour, marker=".", markersize=4, linewidth=1.2, label=name)
        axes.set_title(panel.title, fontsize=9)
        axes.set_xlabel(panel.x_label, fontsize=8)
        axes.set_ylabel(panel.y_label, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=6, frameon=True, framealpha=0.9, edgecolor="none")
    _save(figure, out_path, 200)
