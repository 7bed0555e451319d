"""The file of label-flip certificates, a row per test point and certificate: written as it goes, resumed, checked."""

from __future__ import annotations

import fcntl
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from pacd_fast.arguments import writable
from pacd_fast.files import AnotherRun
from pacd_fast.labelflips.rules import exact_flips, kl_flips

__all__ = [
    "ATTACKED",
    "COLUMNS",
    "KINDS",
    "NOISELESS",
    "UNDEFENDED",
    "FlipFile",
    "Row",
    "Run",
    "is_flip_file",
    "read_rows",
]

ATTACKED, UNDEFENDED = "attacked", "undefended"
KINDS = ("kl", "exact", "whitebox", ATTACKED, "ridge", UNDEFENDED)  # in the order of tables
NOISELESS = ("ridge", UNDEFENDED)
COLUMNS = (
    "idx", "label", "predict", "correct", "flips", "log_tail", "certificate", "q", "l2", "conditional",
    "classes", "n", "majority", "intercept", "data",
)  # fmt: skip
_HEADER = "\t".join(COLUMNS) + "\n"
Group = tuple["Run", str, float, float, bool]  # run, certificate, q, l2, conditional
Point = tuple[int, int, int, float]  # label, predict, flips, log_tail


@dataclass(frozen=True)
class Run:
    """What all rows of a file have in common.

    Attributes:
        classes: K.
        n: the number of training labels.
        majority: the most frequent training label, what the best constant classifier says.
        intercept: whether the classifier has one.
        data: name@fingerprint of features and labels.
    """

    classes: int
    n: int
    majority: int
    intercept: bool
    data: str

    def fields(self) -> list[str]:
        return [str(self.classes), str(self.n), str(self.majority), str(int(self.intercept)), self.data]


@dataclass(frozen=True)
class Row:
    """One test point and certificate.

    Attributes:
        idx: the point's number in the test set.
        label, predict: classes.
        flips: how many label changes cannot change the prediction; ``attacked`` and ``undefended``: the most changes
            with which the attack did not succeed, an upper bound.
        log_tail: as in `FlipCertificates`; NaN for the two attacks.
        certificate: kl, exact, whitebox, ridge, attacked or undefended.
        q: label noise; 0 for ridge and undefended.
        l2: the ridge parameter; 0 for undefended.
        conditional: as in `FlipCertificates`.
    """

    idx: int
    label: int
    predict: int
    flips: int
    log_tail: float
    certificate: str
    q: float
    l2: float
    conditional: bool = False

    def fields(self) -> list[str]:
        whole = [self.idx, self.label, self.predict, self.label == self.predict, self.flips]
        numbers = [repr(float(self.log_tail)), self.certificate, repr(float(self.q)), repr(float(self.l2))]
        return [*(str(int(v)) for v in whole), *numbers, str(int(self.conditional))]


class FlipFile:
    """Appends rows to a file of certificates, going on where it ends.

    A last line without its line break (the process was killed while writing) is cut off; nothing else is changed.  The
    file is locked against a second process that writes to it.

    Attributes:
        done: the (certificate, q, idx) that are in the file.
        path: the file.

    Raises:
        AnotherRun: where the file's rows have another run or ridge parameter, with what differs.
        ValueError: where it holds something else, or is being written.
        FileNotFoundError: where its folder does not exist.
    """

    def __init__(self, path: str | Path, run: Run) -> None:
        self.path, self.run = Path(path), run
        self._new = not writable(path).exists()
        self._file = io.FileIO(self.path, "a")  # unbuffered: what `append` was given is one write
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"{path} is being written by another process; choose another --out") from error
            raw = self.path.read_bytes()
            torn = b"\n" not in raw and _HEADER.encode().startswith(raw)
            whole = raw.rfind(b"\n") + 1
            groups = {} if torn or raw[:whole] == _HEADER.encode() else _parse(self.path, raw)
            self._l2: dict[tuple[str, float], tuple[float, bool]] = {}
            self.done: set[tuple[str, float, int]] = set()
            for (there, certificate, q, l2, conditional), rows in groups.items():
                for name in ("data", "n", "classes", "majority", "intercept"):
                    if getattr(there, name) != getattr(run, name):
                        raise AnotherRun(
                            f"{path} is another run: {name} is {getattr(there, name)} there and {getattr(run, name)} "
                            "here; choose another --out or delete it"
                        )
                self._l2[certificate, q] = l2, conditional
                self.done.update((certificate, q, idx) for idx in rows)
            self._file.truncate(whole)
            if torn:
                self._write(_HEADER)
        except BaseException:
            self._file.close()
            if self._new:
                self.path.unlink(missing_ok=True)
            raise

    def same_l2(self, certificate: str, q: float, l2: float, conditional: bool) -> None:
        """Raises AnotherRun where the file's rows of this certificate and q have another ridge parameter."""
        there = self._l2.setdefault((certificate, float(q)), (l2, conditional))
        if there != (l2, conditional):
            raise AnotherRun(
                f"{self.path} is another run: l2 of {certificate} at q = {q:g} is {there[0]} there and {l2} here; "
                "choose another --out or delete it"
            )

    def append(self, rows: Iterable[Row]) -> None:
        """Writes rows whose (certificate, q, idx) is not in the file, at once; the others must be left out."""
        lines = []
        for row in rows:
            key = row.certificate, float(row.q), int(row.idx)
            if key in self.done:
                raise ValueError(f"{row.certificate} of point {row.idx} at q = {row.q:g} is already in {self.path}")
            self.same_l2(row.certificate, row.q, float(row.l2), row.conditional)
            self.done.add(key)
            lines.append("\t".join([*row.fields(), *self.run.fields()]) + "\n")
        if lines:
            self._write("".join(lines))

    def _write(self, text: str) -> None:
        data = text.encode()
        try:
            written = self._file.write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if written != len(data):
            raise OSError(f"{self.path}: not everything was written; is the disk full?")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> FlipFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._new and not self.done:  # stopped before the first row: nothing is left of it
            self.path.unlink(missing_ok=True)
        self.close()


def is_flip_file(path: str | Path) -> bool:
    """Whether a file starts with our header."""
    try:
        if not Path(path).is_file():
            return False
        with open(path, "rb") as file:
            return file.readline(len(_HEADER) + 1) == _HEADER.encode()
    except OSError:
        return False


_WHOLE = re.compile(r"[0-9]{1,18}", re.ASCII)
_LONGEST_TABLES = 300_000  # flips, all curves together: a few seconds, whatever a file claims


def _parse(path: Path, raw: bytes) -> dict[Group, dict[int, Point]]:
    """The checked rows of a file by what they have in common; an unfinished last line is left out."""
    header, torn = raw.startswith(_HEADER.encode()), _HEADER.encode().startswith(raw)
    if raw.startswith("\t".join(COLUMNS[:7]).encode()) and not header and not torn:
        raise ValueError(f"{path} is a file of an earlier version, without all columns: run labelflip again")
    if not header:
        raise ValueError(f"{path} is not a file of label-flip certificates (its header is not {' '.join(COLUMNS)})")
    try:
        lines = raw[: raw.rfind(b"\n")].decode("utf-8").split("\n")[1:]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a file of label-flip certificates: it is not text") from error
    if not lines:
        raise ValueError(f"{path} has a header and no certificate yet")
    names: dict[tuple[str, ...], Group] = {}
    groups: dict[Group, dict[int, Point]] = {}
    where: dict[Group, list[int]] = {}
    for number, line in enumerate(lines, 2):
        fields = line.split("\t")
        try:
            if len(fields) != len(COLUMNS):
                raise ValueError(f"{len(fields)} columns instead of {len(COLUMNS)}")
            common = tuple(fields[6:])
            if common not in names:
                names[common] = _group(dict(zip(COLUMNS[6:], common, strict=True)))
            group = names[common]
            idx, point = _point(fields[:6], group)
            if groups.setdefault(group, {}).setdefault(idx, point) is not point:
                raise ValueError(f"a second row of point {idx}")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        where.setdefault(group, []).append(number)
    work = _LONGEST_TABLES
    for group, points in groups.items():
        work -= max(point[2] for point in points.values())
        if (bad := _inconsistent(group, points, tight=work >= 0)) is not None:
            raise ValueError(
                f"{path}, line {where[group][bad]}: its flips are not those of its log_tail, q, classes and n"
            )
    return groups


def _whole(name: str, text: str, least: int, most: int) -> int:
    if not _WHOLE.fullmatch(text) or not least <= int(text) <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, not {text[:40]!r}")
    return int(text)


def _number(name: str, text: str) -> float:
    try:
        if not text.isascii() or "_" in text or text != text.strip():
            raise ValueError
        return float(text)
    except ValueError:
        raise ValueError(f"{name} must be a number, not {text[:40]!r}") from None


def _group(text: dict[str, str]) -> Group:
    """What a row has in common with others, checked."""
    classes = _whole("classes", text["classes"], 2, 2**31)
    n = _whole("n", text["n"], 1, 10**15)
    majority = _whole("majority", text["majority"], 0, classes - 1)
    intercept, conditional = (bool(_whole(name, text[name], 0, 1)) for name in ("intercept", "conditional"))
    certificate, q, l2 = text["certificate"], _number("q", text["q"]), _number("l2", text["l2"])
    if certificate not in KINDS or (certificate == UNDEFENDED and classes != 2):
        raise ValueError(f"certificate must be one of {', '.join(KINDS)}, not {certificate[:40]!r}")
    if not (q == 0 if certificate in NOISELESS else 1e-300 <= q < (classes - 1) / classes):
        raise ValueError(f"q of {certificate} cannot be {q} with {classes} classes")
    if not (math.isfinite(l2) and l2 >= 0):
        raise ValueError(f"l2 must be finite and not negative, not {l2}")
    if not text["data"].isprintable() or not text["data"]:
        raise ValueError("data must be printable text")
    return Run(classes, n, majority, intercept, text["data"]), certificate, q, l2, conditional


def _point(text: Sequence[str], group: Group) -> tuple[int, Point]:
    """idx and the rest of a row, checked against each other."""
    run, certificate = group[0], group[1]
    idx = _whole("idx", text[0], 0, 10**15)
    label, predict = (
        _whole(name, t, 0, run.classes - 1) for name, t in zip(("label", "predict"), text[1:3], strict=True)
    )
    if _whole("correct", text[3], 0, 1) != (label == predict):
        raise ValueError(f"correct is {text[3]}, but label is {label} and predict {predict}")
    flips, tail = _whole("flips", text[4], 0, run.n), _number("log_tail", text[5])
    if certificate in (ATTACKED, UNDEFENDED):
        good = math.isnan(tail)
    else:
        good = tail == -math.inf if certificate == "ridge" else tail <= 0
    if not good:
        raise ValueError(f"log_tail of {certificate} cannot be {text[5][:40]}")
    return idx, (label, predict, flips, tail)


def _inconsistent(group: Group, points: dict[int, Point], tight: bool) -> int | None:
    """The number of the first point whose flips do not follow from its log_tail; None where all do.

    One flip more or less is left to other libraries' logarithms.  tight: compute the tables of the exact rule too.
    """
    run, certificate, q = group[:3]
    if certificate not in ("kl", "exact", "whitebox"):
        return None
    flips, tails = (np.array([point[i] for point in points.values()]) for i in (2, 3))
    most = min(run.n, int(flips.max()) + 2)
    wrong = flips < np.minimum(kl_flips(tails, q, run.classes, run.n), most) - 1  # the closed form is the smallest
    if certificate == "kl":
        wrong |= flips > kl_flips(tails, q, run.classes, run.n) + 1
    elif tight:
        exact = exact_flips(tails, q, run.classes, most)
        wrong |= (flips < exact - 1) | ((certificate == "exact") & (flips > exact + 1))
    return int(np.flatnonzero(wrong)[0]) if wrong.any() else None


def read_rows(path: str | Path) -> dict[Group, dict[int, Point]]:
    """The rows of a file by what they have in common, then by idx; each checked against itself.

    An unfinished last line is left out: the file may be growing.

    Raises:
        ValueError: with file and line, for a file that is not one of ours, a row that contradicts itself, a second row
            of a point, or a file without a row.
        FileNotFoundError: where there is no file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    return _parse(path, path.read_bytes())
