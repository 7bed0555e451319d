"""Rows of results files: which columns there are, what a run is, rows as text and back, checked against themselves.

To add a column: name it in FORMATS, fill it in `Row.of`, read it in `Results`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from tqdm import tqdm

from pacd_fast.certification.noise import KINDS
from pacd_fast.certification.question import LARGEST_N
from pacd_fast.certification.vote import Certificate
from pacd_fast.files import AnotherRun
from pacd_fast.ops import FLOATS

ABSTAIN = -1
_DTYPES = tuple(str(each).removeprefix("torch.") for each in FLOATS)


@dataclass(frozen=True)
class Run:
    """What makes two certifications the same one.

    dtype: "float32" or "bfloat16"; model, data: name@fingerprint; noise, step: `Noise.kind` and `Noise.lattice`;
    target, sides, futility: see `Question`; rows, compiled, machine: see `Engine`.  The first version of the file had
    none of these last: noise in floats, all n samples, machine "".
    """

    n0: int
    n: int
    alpha: float
    sigma: float
    seed: int
    dtype: str
    model: str
    data: str
    noise: str = "float"
    step: str = "-"
    target: str = "full"
    sides: int = 1
    futility: float = 0.0
    rows: int = 0
    compiled: int = 0
    machine: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            text = getattr(self, field.name)
            # A tab or line break would break the row, a quote the readers of CSV.
            bad = isinstance(text, str) and any(c in '\t"' or not c.isprintable() for c in text)
            if bad or (text == "" and field.name != "machine"):
                raise ValueError(f"{field.name} must be printable text without tabs and double quotes, got {text!r}")
        for name, fits, what in (
            ("n0", 1 <= self.n0 <= LARGEST_N, "in [1, 2^31)"),
            ("n", 1 <= self.n <= LARGEST_N, "in [1, 2^31)"),
            ("alpha", 0 < self.alpha < 1, "in (0, 1)"),
            ("sigma", 0 < self.sigma < np.inf, "positive and finite"),
            ("seed", 0 <= self.seed < 2**64, "in [0, 2^64)"),
            ("dtype", self.dtype in _DTYPES, f"one of {', '.join(_DTYPES)}"),
            ("noise", self.noise in KINDS, f"one of {', '.join(KINDS)}"),
            ("sides", self.sides in (1, 2), "1 or 2"),
            ("futility", 0 <= self.futility <= 0.5, "in [0, 1/2]"),
            ("rows", self.rows >= 0, "at least 0"),
            ("compiled", self.compiled in (0, 1), "0 or 1"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {what}, not {getattr(self, name)!r}")

    @property
    def version(self) -> int:
        return 2 if self.machine else 1


RUN_COLUMNS = tuple(field.name for field in dataclasses.fields(Run))
_TYPES: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
_READ = {field.name: _TYPES[str(field.type)] for field in dataclasses.fields(Run)}

# Columns before those of the run, those of the run, and those behind; by version.  0 is what certify.py of
# locuslab/smoothing writes; radii there are rounded to three digits, up as well as down.
_FIRST = ("idx", "label", "predict", "radius", "correct")
FORMATS: dict[int, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    0: (_FIRST, (), ("time",)),
    1: ((*_FIRST, "p_lower", "count"), RUN_COLUMNS[:8], ("time",)),
    2: (
        (*_FIRST, "p_lower", "count", "samples", "voids", "rival_upper"),
        RUN_COLUMNS,
        ("selection", "votes", "time"),
    ),
}


def columns(version: int) -> tuple[str, ...]:
    """Names of a format's columns."""
    return tuple(name for part in FORMATS[version] for name in part)


@dataclass(frozen=True)
class Row:
    """The certificate of one image.

    idx: its index in the split; predict: the class, or ABSTAIN (-1); radius: l2, 0 where abstained; p_lower: the lower
    bound on the probability of the selected class, and count its votes; samples, voids, rival_upper: see
    `Certificates`; selection, votes: "class:count ..." of the selection samples and of those that the certificate rests
    on; time: seconds.
    """

    idx: int
    label: int
    predict: int
    radius: float
    p_lower: float
    count: int
    time: float
    samples: int = 0
    voids: int = 0
    rival_upper: float = 1.0
    selection: str = ""
    votes: str = ""

    @classmethod
    def of(cls, found: Certificate, idx: int, label: int) -> Row:
        """The row of a certificate."""
        return cls(
            idx=idx, label=label, predict=found.prediction, radius=found.radius, p_lower=found.p_lower,
            count=int(found.counts[found.selected]), time=found.seconds, samples=found.samples, voids=found.voids,
            rival_upper=found.rival_upper, selection=sparse(found.selection_counts.tolist()),
            votes=sparse(found.counts.tolist()),
        )  # fmt: skip

    @property
    def correct(self) -> bool:
        return self.predict == self.label

    def text(self, run: Run) -> str:
        """The line of the file, without its end.  Bounds are rounded outward, other numbers read back as the same."""
        values: dict[str, str] = {}
        for name in ("idx", "label", "predict", "correct", "count", "samples", "voids"):
            values[name] = str(int(getattr(self, name)))
        values |= {name: getattr(self, name) for name in ("selection", "votes")}
        values |= {"radius": rounded(self.radius, 6), "p_lower": rounded(self.p_lower, 9)}
        values |= {"rival_upper": rounded(self.rival_upper, 9, up=True), "time": f"{self.time:.6f}"}
        values |= {name: value_text(getattr(run, name)) for name in RUN_COLUMNS}
        return "\t".join(values[name] for name in columns(run.version))


def value_text(value: Any) -> str:
    """A value of a run as text; repr of a float reads back as the same double."""
    return value if isinstance(value, str) else repr(float(value)) if isinstance(value, float) else str(int(value))


def rounded(value: float, decimals: int, up: bool = False) -> str:
    """The largest decimal number with so many places that is not above the exact value of the double; or the smallest
    that is not below.

    Read back as a double it is on that side too, because value is itself a double.
    """
    way = ROUND_CEILING if up else ROUND_FLOOR
    return f"{Decimal(float(value)).quantize(Decimal(1).scaleb(-decimals), way):f}"  # str would write 0E-9


def sparse(counts: Sequence[int]) -> str:
    """Votes as "class:count ...", classes without votes left out; "-" for none."""
    return " ".join(f"{label}:{count}" for label, count in enumerate(counts) if count) or "-"


def dense(text: str, classes: int | None = None) -> NDArray[np.int64]:
    """The counts that `sparse` wrote, for so many classes or as many as are named.  Raises ValueError."""
    pairs = [part.split(":") for part in text.split(" ")] if text != "-" else []
    if not all(len(pair) == 2 and all(each.isdecimal() and each.isascii() for each in pair) for pair in pairs):
        raise ValueError(f"votes {text[:40]!r} are not class:count ...")
    labels, counts = [int(label) for label, _ in pairs], [int(count) for _, count in pairs]
    if sorted(set(labels)) != labels or max(labels, default=0) >= 2**24 or max(counts, default=0) >= 2**31:
        raise ValueError(f"votes {text[:40]!r} are not class:count with rising classes")
    found = np.zeros(classes if classes is not None else max(labels, default=0) + 1, dtype=np.int64)
    if labels and labels[-1] >= len(found):
        raise ValueError(f"votes {text[:40]!r} are for more than {len(found)} classes")
    found[labels] = counts
    return found


@dataclass(frozen=True, eq=False)
class Results:
    """The rows of one certification as arrays [N], in the order of the files.

    idx, label, predict: int64; radius, time: float64; correct: bool; p_lower (float64), count (int64) and run are
    None for locuslab's files; samples, voids (int64), rival_upper (float64), selection and votes (text) for those of
    the first version too.
    """

    idx: NDArray[np.int64]
    label: NDArray[np.int64]
    predict: NDArray[np.int64]
    radius: NDArray[np.float64]
    correct: NDArray[np.bool_]
    time: NDArray[np.float64]
    p_lower: NDArray[np.float64] | None = None
    count: NDArray[np.int64] | None = None
    samples: NDArray[np.int64] | None = None
    voids: NDArray[np.int64] | None = None
    rival_upper: NDArray[np.float64] | None = None
    selection: NDArray[np.object_] | None = None
    votes: NDArray[np.object_] | None = None
    run: Run | None = None

    def __len__(self) -> int:
        return len(self.idx)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The columns that are there, by name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}

    def take(self, rows: NDArray[Any] | slice) -> Results:
        """Some rows."""
        arrays: dict[str, Any] = {name: value[rows] for name, value in self.arrays().items()}
        return Results(**arrays, run=self.run)

    def of_class(self, target_class: int) -> Results:
        """The rows with this label. Raises ValueError where there is none."""
        keep = self.label == target_class
        if not keep.any():
            raise ValueError(f"no image of class {target_class} among {len(self)} certified ones")
        return self.take(keep)


def joined(parts: Sequence[Results]) -> Results:
    """Several of one format and run as one."""
    names = parts[0].arrays()
    arrays: dict[str, Any] = {name: np.concatenate([part.arrays()[name] for part in parts]) for name in names}
    return Results(**arrays, run=parts[0].run)


def read_rows(where: str, lines: Sequence[str], version: int, progress: bool = False) -> Results:
    """The rows of lines that follow the header.  Raises ValueError, with the line's number, for what is wrong."""
    first, run_columns, last = FORMATS[version]
    count = len(first) + len(run_columns) + len(last)
    run, text = None, "\t"
    heads: list[str] = []  # texts, because lists of a million rows keep the garbage collector busy
    tails: list[str] = []
    bar = tqdm(lines, desc=where, unit="row", disable=not progress, delay=1, leave=False)
    for number, line in enumerate(bar, start=2):
        line = line.rstrip("\r")
        head, found, tail = line.partition(text)
        if run is None or not found or head.count("\t") + 1 != len(first) or tail.count("\t") + 1 != len(last):
            fields = line.split("\t")
            if len(fields) != count:
                raise ValueError(f"{where}, line {number}: {len(fields)} columns instead of {count}")
            here = fields[len(first) : len(first) + len(run_columns)]
            if run_columns:
                this = _read_run(f"{where}, line {number}", dict(zip(run_columns, here, strict=True)))
                if run is not None:
                    check_same_run(f"{where}, line {number}", this, run, "the rows above it are of one run")
                else:
                    run, text = this, "\t".join(["", *here, ""])
            head, tail = "\t".join(fields[: len(first)]), "\t".join(fields[count - len(last) :])
        heads.append(head)
        tails.append(tail)
    texts: dict[str, Sequence[str]] = {}
    for names, parts in ((first, heads), (last, tails)):
        fields = "\t".join(parts).split("\t") if parts else []
        texts |= {name: fields[i :: len(names)] for i, name in enumerate(names)}
    results = _columns(where, texts, run)
    for bad, message in _wrong(results):
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(f"{where}, line {row + 2}: malformed row ({message(row)})")
    return dataclasses.replace(results, correct=results.correct.astype(np.bool_))


def check_row(row: Row, run: Run) -> None:
    """Raises ValueError for a row that is impossible."""
    fields = {name: np.array([getattr(row, name)]) for name in Results.__dataclass_fields__ if name != "run"}
    for bad, message in _wrong(Results(**fields, run=run)):
        if bad.any():
            raise ValueError(f"image {row.idx}: {message(0)}")


def check_same_run(where: str, there: Run, here: Run, advice: str) -> None:
    """Raises AnotherRun, which names the first column that differs."""
    for column in RUN_COLUMNS:
        a, b = getattr(there, column), getattr(here, column)
        if a != b:
            raise AnotherRun(f"{where} is another run: {column} is {a} there and {b} here; {advice}")


def _read_run(where: str, fields: dict[str, str]) -> Run:
    try:
        values = {name: _READ[name](text) for name, text in fields.items()}
        if any(value_text(values[name]) != text for name, text in fields.items() if _READ[name] is int):
            raise ValueError("a whole number is written in another way than ours")
        return Run(**values)
    except ValueError as error:
        raise ValueError(f"{where}: malformed row ({error})") from error


def _columns(where: str, texts: dict[str, Sequence[str]], run: Run | None) -> Results:
    """Texts by column as arrays."""
    arrays: dict[str, Any] = {}
    for name, column in texts.items():
        try:
            arrays[name] = _array(name, column)
        except (ValueError, OverflowError):
            for number, text in enumerate(column, start=2):
                try:
                    _array(name, [text])
                except (ValueError, OverflowError) as error:
                    raise ValueError(f"{where}, line {number}: malformed row ({error})") from error
            raise
    return Results(**arrays, run=run)


def _array(name: str, column: Sequence[str]) -> NDArray[Any]:
    if name in ("selection", "votes"):
        return np.array([*column, None], dtype=object)[:-1]
    if name == "time":
        try:
            return np.fromiter(map(float, column), np.float64, len(column))
        except ValueError:
            return np.fromiter(map(_seconds, column), np.float64, len(column))
    together = "".join(column)
    if not together.isascii() or "_" in together or " " in together:
        raise ValueError(f"{name} is {column[0]!r}, not a number as we write it")
    if name in ("radius", "p_lower", "rival_upper"):
        return np.fromiter(map(float, column), np.float64, len(column))
    return np.fromiter(map(int, column), np.int64, len(column))


def _wrong(rows: Results) -> Iterator[tuple[NDArray[np.bool_], Callable[[int], str]]]:
    """What can be wrong about rows: which are, and the sentence about one of them."""
    r, run = rows, rows.run
    yield (
        (r.idx < 0) | (r.label < 0) | (r.predict < ABSTAIN),
        lambda i: f"idx {r.idx[i]}, label {r.label[i]} or prediction {r.predict[i]} is negative",
    )
    yield (
        ~(np.isfinite(r.radius) & (r.radius >= 0)),
        lambda i: f"radius {r.radius[i]} is not a finite number from 0",
    )
    yield (r.predict == ABSTAIN) & (r.radius > 0), lambda i: f"abstained with radius {r.radius[i]}"
    yield (
        r.correct.astype(np.int64) != (r.predict == r.label),
        lambda i: f"correct is {int(r.correct[i])} for label {r.label[i]} and prediction {r.predict[i]}",
    )
    yield ~(r.time >= 0), lambda i: f"time {r.time[i]} is not a number from 0"
    if run is None or r.p_lower is None or r.count is None:
        yield r.radius > 1e6, lambda i: f"radius {r.radius[i]} is beyond any noise level"
        return
    p, count = r.p_lower, r.count
    yield ~((p >= 0) & (p <= 1)), lambda i: f"p_lower {p[i]} is not in [0, 1]"
    yield (count < 0) | (count > run.n), lambda i: f"count {count[i]} is not in 0..{run.n}"
    drawn = np.full(len(rows), run.n) if r.samples is None or run.version < 2 else r.samples
    yield (drawn < 1) | (drawn > run.n), lambda i: f"samples {drawn[i]} is not in 1..{run.n}"
    if run.version == 2 and r.voids is not None:
        voids = r.voids
        yield (voids < 0) | (voids > drawn), lambda i: f"voids {voids[i]} is not in 0..{drawn[i]}"
    if run.target == "full" and run.alpha <= 0.5:  # a bound that is wrong more often than not lies above the share
        yield p > count / drawn + 1e-9, lambda i: f"p_lower {p[i]} is above {count[i]} votes of {drawn[i]}"
    z = ndtri(np.minimum(p + 1e-9, 1.0))  # the text is up to 1e-9 below the bound
    if run.sides == 2 and r.rival_upper is not None:
        q = r.rival_upper
        yield ~((q >= 0) & (q <= 1)), lambda i: f"rival_upper {q[i]} is not in [0, 1]"
        with np.errstate(invalid="ignore"):
            z = 0.5 * (z - ndtri(np.maximum(np.minimum(q, 1 - p) - 1e-9, 0.0)))
    with np.errstate(over="ignore"):
        sigma = max(float(run.sigma), float(np.float32(run.sigma)))  # the noise has the second; the first was asked for
        most = sigma * np.maximum(z, 0.0)
    yield (
        r.radius * (1 - 1e-9) - 1e-9 > most,
        lambda i: f"radius {r.radius[i]} is more than p_lower {p[i]} is worth",
    )


def _seconds(text: str) -> float:
    """Seconds, written as a number or, by locuslab, as a timedelta: "17.5", "0:00:17.5", "1 day, 2:03:04"."""
    try:
        return float(text)
    except ValueError:
        pass
    days, _, clock = text.rpartition(" day, ") if " day, " in text else text.rpartition(" days, ")
    seconds = 0.0
    for part in clock.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds + 86400 * int(days or 0)
