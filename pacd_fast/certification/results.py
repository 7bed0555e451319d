"""The results file of a certification: one row per image, written as it goes, resumed, read and merged."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pacd_fast.arguments import writable
from pacd_fast.files import AnotherRun

if TYPE_CHECKING:
    from pacd_fast.certification.vote import Certificate

ABSTAIN = -1

COLUMNS = (
    "idx", "label", "predict", "radius", "correct", "p_lower", "count",
    "n0", "n", "alpha", "sigma", "seed", "dtype", "model", "data", "time",
)  # fmt: skip

# What certify.py of locuslab/smoothing writes; radii there are rounded to three digits, up as well as down.
LOCUSLAB_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Run:
    """What makes two certifications the same one. dtype: "float32" or "bfloat16"; model, data: name@fingerprint."""

    n0: int
    n: int
    alpha: float
    sigma: float
    seed: int
    dtype: str
    model: str
    data: str

    def __post_init__(self) -> None:
        for name in ("dtype", "model", "data"):
            text = getattr(self, name)
            # A tab or line break would break the row, a quote the readers of CSV.
            if not text or any(c in '\t"' or not c.isprintable() for c in text):
                raise ValueError(f"{name} must be printable text without tabs and double quotes, got {text!r}")

    def _fields(self) -> list[str]:
        """The run's columns as text; repr of a float reads back as the same double."""
        n0, n, seed = (str(int(value)) for value in (self.n0, self.n, self.seed))
        alpha, sigma = (repr(float(value)) for value in (self.alpha, self.sigma))
        return [n0, n, alpha, sigma, seed, self.dtype, self.model, self.data]


RUN_COLUMNS = tuple(field.name for field in dataclasses.fields(Run))


@dataclass(frozen=True)
class Row:
    """The certificate of one image.

    idx: its index in the split; predict: the class, or ABSTAIN (-1); radius: l2, 0 where abstained; p_lower: the lower
    bound on the probability of the selected class, and count its votes among n (both None in locuslab's files);
    time: seconds.
    """

    idx: int
    label: int
    predict: int
    radius: float
    p_lower: float | None
    count: int | None
    time: float

    @classmethod
    def of(cls, certificate: Certificate, idx: int, label: int) -> Row:
        """The row of a certificate."""
        votes = int(certificate.counts[certificate.selected])
        return cls(
            idx, label, certificate.prediction, certificate.radius, certificate.p_lower, votes, certificate.seconds
        )

    @property
    def correct(self) -> bool:
        return self.predict == self.label


def round_down(value: float, decimals: int) -> str:
    """The largest decimal number with so many places that is not above the exact value of the double.

    Read back as a double it is not above value either, because value is itself a double.
    """
    rounded = Decimal(float(value)).quantize(Decimal(1).scaleb(-decimals), ROUND_FLOOR)
    return f"{rounded:f}"  # str would write 0E-9


class ResultsFile:
    """Appends rows to a results file, continuing the one that is there.

    path: the file; created with its header where it does not exist. run: must equal the run of the rows in it.
    A last line without its line break (the process was killed while writing) is cut off; nothing else is ever changed.
    Each row is one write to the end of the file, so a kill leaves whole lines and at most one torn one.
    The file is locked against a second process that writes to it.

    Attributes: ``done``, the set of idx that are in the file; ``run``; ``path``.
    Raises ValueError where the file holds something else or another run, or is being written; FileNotFoundError where
    its folder does not exist.

        with ResultsFile("results.tsv", run) as results:
            if idx not in results.done:
                results.append(Row(...))
    """

    def __init__(self, path: PathLike, run: Run) -> None:
        self.path = writable(path)
        self.run = run
        self._file = io.FileIO(self.path, "a")  # unbuffered: one row is one write
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"{path} is being written by another process; choose another --out") from error
            rows, existing, whole = parse(self.path, ours=True)
            if existing is not None:
                check_same_run(str(path), existing, run, "choose another --out or delete it")
            self.done = {row.idx for row in rows}
            self._file.truncate(whole)
            if whole == 0:
                self._write("\t".join(COLUMNS) + "\n")
        except BaseException:
            self._file.close()
            raise

    def append(self, row: Row) -> None:
        """Write one row. Raises ValueError for a row that is impossible or whose idx is in the file already."""
        if row.p_lower is None or row.count is None:
            raise ValueError(f"image {row.idx}: p_lower and count are missing")
        if row.idx in self.done:
            raise ValueError(f"image {row.idx} is in {self.path} already")
        if problem := _impossible(row, self.run.n):
            raise ValueError(f"image {row.idx}: {problem}")
        fields = [
            *(str(int(value)) for value in (row.idx, row.label, row.predict)),
            round_down(row.radius, 6),
            str(int(row.correct)),
            round_down(row.p_lower, 9),
            str(int(row.count)),
            *self.run._fields(),
            f"{row.time:.6f}",
        ]
        self._write("\t".join(fields) + "\n")
        self.done.add(int(row.idx))

    def _write(self, line: str) -> None:
        data = line.encode()
        if self._file.write(data) != len(data):
            raise OSError(f"{self.path}: the line was not written whole; is the disk full?")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def peek(path: PathLike) -> Run | None:
    """The run of the rows in a results file; None where there is no file or no row yet. Errors as in ResultsFile."""
    if not Path(path).exists():
        return None
    return parse(Path(path), ours=True)[1]


@dataclass(frozen=True, eq=False)
class Results:
    """The rows of one certification as arrays [N], in the order of the files.

    idx, label, predict: int64; radius, time: float64; correct: bool; p_lower (float64), count (int64) and run are
    None for locuslab's files.
    """

    idx: NDArray[np.int64]
    label: NDArray[np.int64]
    predict: NDArray[np.int64]
    radius: NDArray[np.float64]
    correct: NDArray[np.bool_]
    time: NDArray[np.float64]
    p_lower: NDArray[np.float64] | None
    count: NDArray[np.int64] | None
    run: Run | None

    def __len__(self) -> int:
        return len(self.idx)

    def of_class(self, target_class: int) -> Results:
        """The rows with this label. Raises ValueError where there is none."""
        keep = self.label == target_class
        if not keep.any():
            raise ValueError(f"no image of class {target_class} among {len(self)} certified ones")
        arrays = {
            field.name: value[keep]
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), np.ndarray)
        }
        return dataclasses.replace(self, **arrays)


def read_results(paths: PathLike | Sequence[PathLike]) -> Results:
    """Read one results file, or several that are shards of one certification; ours and locuslab's.

    A torn last line of ours is left out: the file may be growing while it is read.
    Raises FileNotFoundError for a missing file, and ValueError (with file and line) for an unknown header, a malformed
    row, files of different runs, an image that occurs twice, or no rows at all.
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    rows: list[Row] = []
    seen: dict[int, Path] = {}
    runs: list[tuple[Path, Run | None]] = []
    for path in files:
        part, run, _ = parse(path)
        for row in part:
            if row.idx in seen:
                raise ValueError(f"image {row.idx} is both in {seen[row.idx]} and in {path}; merge them first")
        seen.update((row.idx, path) for row in part)
        rows += part
        if part:
            runs.append((path, run))
    if not rows:
        raise ValueError(f"{' '.join(map(str, files)) or 'no file'}: no certified image in it yet")
    first_path, first = runs[0]
    for path, run in runs[1:]:
        if (first is None) != (run is None):
            raise ValueError(f"{path} and {first_path} differ in format; they are no shards of one certification")
        if first is not None and run is not None:
            check_same_run(str(path), run, first, f"{first_path} is no shard of it")
    return Results(
        idx=np.array([row.idx for row in rows], dtype=np.int64),
        label=np.array([row.label for row in rows], dtype=np.int64),
        predict=np.array([row.predict for row in rows], dtype=np.int64),
        radius=np.array([row.radius for row in rows], dtype=np.float64),
        correct=np.array([row.correct for row in rows], dtype=np.bool_),
        time=np.array([row.time for row in rows], dtype=np.float64),
        p_lower=None if first is None else np.array([row.p_lower for row in rows], dtype=np.float64),
        count=None if first is None else np.array([row.count for row in rows], dtype=np.int64),
        run=first,
    )


def check_same_run(where: str, there: Run, here: Run, advice: str) -> None:
    for column in RUN_COLUMNS:
        a, b = getattr(there, column), getattr(here, column)
        if a != b:
            raise AnotherRun(f"{where} is another run: {column} is {a} there and {b} here; {advice}")


def parse(path: Path, *, ours: bool = False) -> tuple[list[Row], Run | None, int]:
    """The rows of a file, their run (None without rows or in locuslab's format), and the bytes of its whole lines.

    ours: refuse locuslab's format, and take an empty file or a torn header for a new file.
    """
    try:
        raw = path.read_bytes()
    except IsADirectoryError as error:
        raise ValueError(f"{path} is a folder, not a results file") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such results file") from error
    header = "\t".join(COLUMNS) + "\n"
    if ours and b"\n" not in raw and header.encode().startswith(raw):
        return [], None, 0
    if not raw:
        raise ValueError(f"{path} is empty")
    whole = raw.rfind(b"\n") + 1
    try:
        lines = raw.decode().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a results file: it is not text") from error
    columns = tuple(lines[0].rstrip("\r").split("\t"))
    if columns != COLUMNS and (ours or columns != LOCUSLAB_COLUMNS):
        advice = "; choose another --out" if ours else ""
        raise ValueError(f"{path} is not a results file: its first line is {lines[0][:60]!r}{advice}")
    # After the last line break comes nothing, or a torn line. In locuslab's files (edited by hand, maybe) it counts.
    if columns == COLUMNS or not lines[-1]:
        lines.pop()

    rows: list[Row] = []
    run: Run | None = None
    seen: set[int] = set()
    for number, line in enumerate(lines[1:], start=2):
        where = f"{path}, line {number}"
        fields = line.rstrip("\r").split("\t")
        if len(fields) != len(columns):
            raise ValueError(f"{where}: {len(fields)} columns instead of {len(columns)}")
        row, row_run = _parse_row(where, dict(zip(columns, fields, strict=True)))
        if row.idx in seen:
            raise ValueError(f"{where}: image {row.idx} is in the file twice")
        seen.add(row.idx)
        rows.append(row)
        if row_run is not None:
            run = row_run if run is None else run
            check_same_run(where, row_run, run, "the rows above it are of one run")
    return rows, run, whole


def _parse_row(where: str, fields: Mapping[str, str]) -> tuple[Row, Run | None]:
    try:
        ours = "n" in fields
        row = Row(
            idx=int(fields["idx"]),
            label=int(fields["label"]),
            predict=int(fields["predict"]),
            radius=float(fields["radius"]),
            p_lower=float(fields["p_lower"]) if ours else None,
            count=int(fields["count"]) if ours else None,
            time=_seconds(fields["time"]),
        )
        run = None
        if ours:
            run = Run(
                n0=int(fields["n0"]),
                n=int(fields["n"]),
                alpha=float(fields["alpha"]),
                sigma=float(fields["sigma"]),
                seed=int(fields["seed"]),
                dtype=fields["dtype"],
                model=fields["model"],
                data=fields["data"],
            )
    except ValueError as error:
        raise ValueError(f"{where}: malformed row ({error})") from error
    problem = _impossible(row, run.n if run else None)
    if problem is None and fields["correct"] != str(int(row.correct)):
        problem = f"correct is {fields['correct']} for label {row.label} and prediction {row.predict}"
    if problem:
        raise ValueError(f"{where}: malformed row ({problem})")
    return row, run


def _impossible(row: Row, n: int | None) -> str | None:
    """What is impossible about a row, or None."""
    if row.idx < 0 or row.label < 0 or row.predict < ABSTAIN:
        return f"idx {row.idx}, label {row.label} or prediction {row.predict} is negative"
    if not (math.isfinite(row.radius) and row.radius >= 0):
        return f"radius {row.radius} is not a finite number from 0"
    if row.predict == ABSTAIN and row.radius > 0:
        return f"abstained with radius {row.radius}"
    if row.p_lower is not None and not 0 <= row.p_lower <= 1:
        return f"p_lower {row.p_lower} is not in [0, 1]"
    if row.count is not None and n is not None and not 0 <= row.count <= n:
        return f"count {row.count} is not in 0..{n}"
    return None


def _seconds(text: str) -> float:
    """Seconds, written as a number or, by locuslab, as a timedelta: "17.5", "0:00:17.5", "1 day, 2:03:04"."""
    days, _, clock = text.rpartition(" day, ") if " day, " in text else text.rpartition(" days, ")
    seconds = 0.0
    for part in clock.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds + 86400 * int(days or 0)
