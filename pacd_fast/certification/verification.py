"""A results file checked by a third party: every row from its own votes, and some from noise that is drawn again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from pacd_fast._C import FullCertificates, Rule
from pacd_fast.certification.classifier import machine
from pacd_fast.certification.noise import Noise
from pacd_fast.certification.question import Question
from pacd_fast.certification.results import PathLike, parse
from pacd_fast.certification.rows import ABSTAIN, Results, Row, Run, columns, dense, rounded
from pacd_fast.certification.vote import certificates, sampler_of
from pacd_fast.data import Dataset
from pacd_fast.networks import Checkpoint


def verify(path: PathLike) -> tuple[int, list[str]]:
    """Recomputes prediction, bounds and radius of every row from its votes, n, alpha, sigma and noise.

    Returns the number of rows and a sentence for each that says something else.  A file of the first version has the
    selected class's votes alone: that this class was selected cannot be checked there.
    Raises ValueError for a file that is none, or is malformed.
    """
    rows, _ = parse(Path(path), ours=True)
    if rows.run is None:
        raise ValueError(f"{path}: no certified image in it yet")
    run = rows.run
    noise = Noise.read(run.noise, run.sigma, run.step)
    question = Question.read(noise.sigma, run.n0, run.n, run.alpha, run.target, run.sides, run.futility)
    rule = question.rule(noise.sigma)
    problems = []
    for i in range(len(rows)):
        problem = _problem(rows, i, run, rule) if run.version == 2 else _old_problem(rows, i, run, noise.sigma)
        if problem is not None:
            problems.append(f"image {rows.idx[i]}: {problem}")
    return len(rows), problems


def _problem(rows: Results, i: int, run: Run, rule: Rule) -> str | None:
    """What a row claims beyond its votes; None if nothing."""
    row = {name: column[i] for name, column in rows.arrays().items()}
    try:
        classes = max(2, len(dense(row["selection"])), len(dense(row["votes"])), int(row["predict"]) + 1)
        selection, votes = dense(row["selection"], classes), dense(row["votes"], classes)
        outcome = rule.issue(selection, votes, int(row["voids"]))
    except ValueError as error:
        return str(error)
    missing = run.n0 - int(selection.sum())
    if missing < 0 or (missing and run.noise == "float"):
        return f"{selection.sum()} selection votes of {run.n0}"
    if row["voids"] and run.noise == "float":
        return "noise in floats has no void samples"
    counted, samples = int(votes.sum()) + int(row["voids"]), int(row["samples"])
    if samples not in rule.looks or samples < counted or (run.target == "full" and samples != counted):
        return f"{samples} samples for votes of {counted}"
    texts = rounded(outcome.p_lower, 9), rounded(outcome.radius, 6), rounded(outcome.rival_upper, 9, up=True)
    expected = dict(zip(("p_lower", "radius", "rival_upper"), map(float, texts), strict=True))
    expected |= {"predict": outcome.prediction, "count": int(votes[outcome.selected])}
    for name, value in expected.items():
        if value != row[name]:
            return f"{name} is {row[name]} in the file, and {value} from its votes"
    return None


def _old_problem(rows: Results, i: int, run: Run, sigma: float) -> str | None:
    """The same for a row of the first version, which has a count alone."""
    assert rows.p_lower is not None and rows.count is not None
    outcome = FullCertificates(run.n0, run.n, run.alpha, sigma, 1, 0.0).issue(
        [run.n0, 0], [int(rows.count[i]), run.n - int(rows.count[i])], 0
    )
    for name, value, there in (
        ("p_lower", float(rounded(outcome.p_lower, 9)), rows.p_lower[i]),
        ("radius", float(rounded(outcome.radius, 6)), rows.radius[i]),
        ("abstention", outcome.prediction == ABSTAIN, rows.predict[i] == ABSTAIN),
    ):
        if value != there:
            return f"{name} is {there} in the file, and {value} from its votes"
    return None


def redraw(
    path: PathLike,
    checkpoint: Checkpoint,
    data: Dataset,
    split: str,
    images: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Iterator[tuple[int, str | None]]:
    """Draws the noise of some images again and certifies them: (image, what differs from its row, or None).

    Raises ValueError for a file of another model, other data, or another machine (device, torch's version), whose
    network rounds in another way; for images that are not in it; and for a file of the first version, which does not
    say how it was made.
    """
    rows, _ = parse(Path(path), ours=True)
    run = rows.run
    if run is None or run.version == 1:
        raise ValueError(f"{path} does not say how its votes were drawn; only its own numbers can be checked")
    here = {
        "model": f"{checkpoint.arch}@{checkpoint.fingerprint}",
        "data": data.tag(split),
        "machine": machine(torch.device(device)),
    }
    for name, value in here.items():
        if (there := getattr(run, name)) != value:
            raise ValueError(f"{path}: {name} is {there} in the file and {value} here: votes can differ by rounding")
    texts = Path(path).read_text("utf-8").split("\n")[1 : len(rows) + 1]
    lines = dict(zip(rows.idx.tolist(), texts, strict=True))
    if unknown := [idx for idx in images if idx not in lines]:
        raise ValueError(f"{path}: image {unknown[0]} is not in it")
    noise = Noise.read(run.noise, run.sigma, run.step)
    question = Question.read(noise.sigma, run.n0, run.n, run.alpha, run.target, run.sides, run.futility)
    pixels, labels = data.split(split)
    ids = torch.tensor(list(images), dtype=torch.int64)
    sampler = sampler_of(
        checkpoint.model.to(device), pixels[ids], checkpoint.num_classes, noise, run.seed,
        question.n0 + question.likely, dtype=getattr(torch, run.dtype), rows=run.rows, compile=bool(run.compiled),
        image_ids=ids,
    )  # fmt: skip
    for certificate in certificates(sampler, question, progress):
        idx = int(ids[certificate.index])
        there, here_line = lines[idx].split("\t"), Row.of(certificate, idx, int(labels[idx])).text(run).split("\t")
        differ = [each for each in zip(columns(run.version), there, here_line, strict=True) if each[1] != each[2]]
        differ = [each for each in differ if each[0] != "time"]
        yield idx, f"{differ[0][0]} is {differ[0][1]} in the file and {differ[0][2]} from its noise" if differ else None
