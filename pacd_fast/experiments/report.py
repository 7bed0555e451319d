"""A page that shows results files, audits, label flips and poison together: curves, tables, images, what was run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pacd_fast.certification import ABSTAIN, Results, largest_radius, read_results, rounded, summarize
from pacd_fast.data import Dataset, as_float
from pacd_fast.experiments import page, plots
from pacd_fast.experiments.record import machine
from pacd_fast.files import opened, read_json, reason
from pacd_fast.labelflips import ATTACKED, CONDITIONAL, UNDEFENDED, flips_cells, is_flip_file, read_flips
from pacd_fast.poisoning import Audited, Poison, audit_rows, victims_table

__all__ = ["report"]


def report(
    files: Mapping[str, str | Path], data: Dataset | None = None, title: str | None = None, images: int = 8
) -> str:
    """The page as text.

    files: by the names that curves get: results files, files of label flips, .json of audits, .npz of poison.
    data: the images that were certified or poisoned, for their pictures.  images: how many a group.
    Raises FileNotFoundError and ValueError, one line that names the file.
    """
    certified: dict[str, Results] = {}
    flips, audits, poisons = {}, {}, {}
    for name, path in files.items():
        if Path(path).suffix == ".npz":
            poisons[name] = Poison.load(path)
        elif Path(path).suffix == ".json":
            audits[name] = _audit(path)
        elif is_flip_file(path):
            flips[name] = read_flips([path])
        elif _is_predictions(path):
            raise ValueError(
                f"{path} holds predictions, which have no radius and which a report does not show; pacd-fast certify "
                "writes what it shows"
            )
        else:
            certified[name] = read_results(path)
    parts = [page.note(f"Written {date.today()} on {machine()}, from {', '.join(map(str, files.values()))}.")]
    if certified:
        parts += _certified(certified)
        for name, results in certified.items():
            parts += _examples(name, results, data, images)
    for name, found in audits.items():
        parts += [page.heading(f"Audit: {name}"), *found]
    if flips:
        parts += _flips(flips)
    for name, poison in poisons.items():
        parts += _poison(name, poison, data, images)
    if certified:
        parts += [page.heading("What was run"), _runs(certified)]
    return page.page(title or "Certified robustness", parts)


def _is_predictions(path: str | Path) -> bool:
    """Whether a file was written by `predict_dataset`, by its columns."""
    with opened(path, "results file") as file:
        names = file.readline(2**16).rstrip().split(b"\t")
    return names[:6] == [b"idx", b"label", b"predict", b"correct", b"samples", b"votes"]


def _certified(certified: Mapping[str, Results]) -> list[str]:
    """Table, curves, and the distribution of the bounds on p_A."""
    largest = max(float(each.radius[each.correct].max(initial=0.0)) for each in certified.values())
    step = 0.25 * max(1.0, math.ceil(largest / 1.5))
    radii = [step * i for i in range(1, int(largest / step) + 1)]
    rows, warned = [], dict[str, list[str]]()
    for name, results in certified.items():
        found = summarize(results, radii)
        if found.warning is not None:
            warned.setdefault(found.warning, []).append(name)
        quantiles = found.p_lower_quantiles or {}
        row = {"": name, "images": found.images, "ACR": rounded(found.acr, 4), "ACA, %": f"{100 * found.aca:.2f}"}
        row |= {"clean accuracy, %": f"{100 * found.clean_accuracy:.2f}", "abstained": found.abstentions}
        row |= {f"at {r:g}, %": f"{100 * a:.1f}" for r, a in zip(radii, found.certified_accuracy, strict=True)}
        rows.append(row | ({"median p_A": rounded(quantiles[0.5], 4)} if 0.5 in quantiles else {}))
    parts = [page.heading("Certificates"), page.table(rows)]
    parts.append(page.note("ACR: average certified radius, 0 where wrong or abstained; ACA: share with a radius."))
    curves, limits = {}, set()
    for name, results in certified.items():
        radius, height = plots.steps(results)
        curves[name] = _stairs(radius, height, after=False)
        if (run := results.run) is not None:
            limits.add(largest_radius(run.sigma, run.n, run.alpha))
    marks = {"largest radius that n can certify": limits} if limits else {}
    parts.append(page.heading("Certified accuracy", 3))
    parts += [page.note(f"{', '.join(names)}: {warning}.") for warning, names in warned.items()]
    parts.append(page.chart(curves, "l2 radius", "certified accuracy", marks=marks))
    bounds = {}
    for name, results in certified.items():
        if results.p_lower is not None:
            p = np.sort(results.p_lower)
            share = np.arange(1, len(p) + 1) / len(p)
            bounds[name] = _stairs(np.array([0, *p, 1.0]), np.array([0, *share, 1.0]), after=True)
    if bounds:
        parts.append(page.heading("Lower bounds on p_A: share of images at or below", 3))
        parts.append(page.chart(bounds, "lower bound on p_A", "share of images", marks={"abstains below": [0.5]}))
    return parts


def _stairs(x: np.ndarray, y: np.ndarray, after: bool) -> tuple[np.ndarray, np.ndarray]:
    """A polyline along steps: y[i] holds up to x[i], or after it."""
    x, y = np.repeat(x, 2), np.repeat(y, 2)
    return (x[1:], y[:-1]) if after else (x[:-1], y[1:])


def _examples(name: str, results: Results, data: Dataset | None, count: int) -> list[str]:
    """The images with the smallest and largest radii, and those it abstains on."""
    parts = [page.heading(f"Images: {name}")]
    held = _split_of(results, data)
    if isinstance(held, str):
        return [*parts, page.note(held)]
    pictures, names = held
    right = np.flatnonzero(results.correct & (results.radius > 0))
    right = right[np.argsort(results.radius[right], kind="stable")]
    groups = {
        "smallest radii": right[:count],
        "largest radii": right[::-1][:count],
        "abstained": np.flatnonzero(results.predict == ABSTAIN)[:count],
        "wrong, with a certificate": np.flatnonzero(~results.correct & (results.predict != ABSTAIN))[:count],
    }

    def said(row: int) -> str:
        label, predict = (names[i] if i < len(names) else str(i) for i in (results.label[row], results.predict[row]))
        abstained = results.predict[row] == ABSTAIN
        what = "abstains" if abstained else f"as {predict}, radius {rounded(results.radius[row], 3)}"
        return f"{results.idx[row]}: {label} {what}"

    for what, rows in groups.items():
        if len(rows):
            parts.append(page.heading(what, 3))
            parts.append(page.images([(pictures[int(results.idx[row])], said(row)) for row in rows]))
    return parts


def _split_of(results: Results, data: Dataset | None) -> tuple[torch.Tensor, Sequence[str]] | str:
    """The images that a results file numbers and the classes' names, or why they cannot be shown."""
    if data is None:
        return "With --data (and --data-dir) the page shows images."
    if results.run is None:
        return "The file does not say which images it is of."
    for split in ("test", "train", "val"):
        if len(getattr(data, f"x_{split}")) and data.tag(split) == results.run.data:
            images = data.split(split)[0]
            if int(results.idx.max()) < len(images):
                return images, data.class_names
    return f"They are of {results.run.data}, and the data that were given are {data.name}@{data.fingerprint}."


def _audit(path: str | Path) -> list[str]:
    content = read_json(path, "file of an audit")
    try:
        if not content:
            raise ValueError("it is empty")
        if "measured" in content:
            found = {name: Audited(**each) for name, each in content["measured"].items()}
            parts = [page.table([{"" if k == "data" else k: v for k, v in row.items()} for row in audit_rows(found)])]
            asked = {**content["audit"], **{f"poison {name}": said for name, said in content["poisons"].items()}}
            return [
                *parts,
                page.heading("its settings", 3),
                _settings(asked),
            ]
        return [part for name, each in content.items() for part in
                (page.heading(name, 3), page.preformatted(victims_table(each)))]  # fmt: skip
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{path} is not a file of an audit ({reason(error)})") from error


def _flips(flips: Mapping[str, Sequence[Any]]) -> list[str]:
    """By data set: the table and the curves."""
    parts = []
    named = [
        (curve, f"{name}: {curve.name}" if len(flips) > 1 else curve.name)
        for name, curves in flips.items()
        for curve in curves
    ]
    for data in dict.fromkeys(curve.data for curve, _ in named):
        here = [(curve, name) for curve, name in named if curve.data == data]
        lines = {}
        for curve, name in here:
            if curve.certificate not in (ATTACKED, UNDEFENDED):
                lines[name] = _stairs(*plots.flip_steps(curve.flips[curve.correct], curve.accuracy(0)), after=False)
        parts.append(page.heading(f"Label flips: {data}"))
        rows = [{"": name, **flips_cells(curve)} for curve, name in here]
        said = ("data", "certificate", "q")  # by the heading and the names
        parts.append(page.table([{k: v for k, v in row.items() if k not in said} for row in rows]))
        parts.append(page.note("Under a number: the share of points that are right, whatever so many flips do."))
        if any(curve.conditional for curve, _ in here):
            parts.append(page.note(f"{CONDITIONAL}."))
        if lines:
            parts.append(page.chart(lines, "label flips", "certified accuracy"))
    return parts


def _poison(name: str, poison: Poison, data: Dataset | None, count: int) -> list[str]:
    """The poisoned images; with the data, the images as they were and the difference as well."""
    about = f"{poison.attack}: {len(poison.index)} images of {poison.data}, {poison.ball.norm} epsilon "
    parts = [page.heading(f"Poison: {name}"), page.note(about + f"{poison.ball.epsilon:.4g}")]
    shown = range(min(count, len(poison.index)))
    if data is not None:
        validation, kept = poison.settings.get("validation"), poison.settings.get("train_images")
        if isinstance(validation, int) and isinstance(kept, int) and not len(data.x_val):
            data = data.held_out(validation, kept)
        poison.apply(data)
        base = as_float(data.x_train[poison.index])
        change = as_float(poison.images) - base
        shown = change.flatten(1).norm(dim=1).argsort(descending=True, stable=True)[:count].tolist()
        scale = float(change[shown].abs().max()) or 1.0
        groups = {"as they were": base, "poisoned": as_float(poison.images)}
        groups[f"difference, {0.5 / scale:.2g} times"] = 0.5 + 0.5 * change / scale
    else:
        groups = {"poisoned": as_float(poison.images)}
    for what, pictures in groups.items():
        parts.append(page.heading(what, 3))
        parts.append(page.images([(pictures[i], f"{int(poison.index[i])}: {int(poison.labels[i])}") for i in shown]))
    return [*parts, page.heading("its settings", 3), _settings(poison.settings)]


def _settings(values: Mapping[str, Any]) -> str:
    """A line each; what is too long to read, a history say, is left out."""
    said = {
        name: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        for name, value in values.items()
    }
    return page.pairs({name: value for name, value in said.items() if len(str(value)) <= 1000})


def _runs(certified: Mapping[str, Results]) -> str:
    """A row a setting, a column a file: sixteen settings are wider than a page."""
    said: dict[str, dict[str, Any]] = {}
    for name, results in certified.items():
        run = {} if results.run is None else dataclasses.asdict(results.run)
        for key, value in {**run, "seconds": f"{float(results.time.sum()):.1f}"}.items():
            said.setdefault(key, {})[name] = value
    return page.table([{"": key, **{name: row.get(name, "-") for name in certified}} for key, row in said.items()])
