"""The results file of a certification: one row per image, written as it is decided, resumed, sorted, read."""

from __future__ import annotations

import fcntl
import io
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from pacd_fast.arguments import writable
from pacd_fast.certification.rows import Results, Row, Run, check_row, check_same_run, columns, joined, read_rows
from pacd_fast.files import replaced

PathLike = str | os.PathLike[str]


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
        self._made = not os.path.lexists(self.path)
        self._file = self._opened()
        try:
            there, whole = parse(self.path, ours=True)
            if there.run is not None:
                check_same_run(str(path), there.run, run, "choose another --out or delete it")
            self.done = set(there.idx.tolist())
            header = "\t".join(columns(run.version)) + "\n"
            if there.run is None:
                whole = 0  # a header alone may be of another version
            self._file.truncate(whole)
            if whole == 0:
                self._write(header)
        except BaseException:
            self._file.close()
            raise

    def _opened(self) -> io.FileIO:
        """The file, locked: the very one that is at the path, for another process may have just removed its own."""
        while True:
            file = io.FileIO(self.path, "a+")  # unbuffered: one row is one write
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    return file
            except FileNotFoundError:
                pass
            except BlockingIOError as error:
                file.close()
                raise ValueError(f"{self.path} is being written by another process; choose another --out") from error
            file.close()

    def append(self, row: Row) -> None:
        """Write one row. Raises ValueError for a row that is impossible or whose idx is in the file already."""
        if row.idx in self.done:
            raise ValueError(f"image {row.idx} is in {self.path} already")
        check_row(row, self.run)
        self._write(row.text(self.run) + "\n")
        self.done.add(int(row.idx))

    def take(self, path: Path) -> None:
        """Writes the rows of another file of this run that are not in this one, byte for byte, on to the disk.

        Raises ValueError for another run.
        """
        there, whole = parse(path, ours=True)
        if there.run is None:
            return
        check_same_run(str(path), there.run, self.run, f"{self.path} is of another; delete one")
        lines = path.read_bytes()[:whole].decode().split("\n")[1:]
        new = {i: line for i, line in zip(there.idx.tolist(), lines, strict=False) if i not in self.done}
        self._write("".join(f"{line}\n" for line in new.values()))
        os.fsync(self._file)
        self.done.update(new)

    def sort(self) -> None:
        """Puts the rows in the order of idx; what a run writes does not depend on the order of its decisions."""
        self._file.seek(0)
        header, *lines = self._file.readall().decode().splitlines(keepends=True)
        ordered = sorted(lines, key=lambda line: int(line.partition("\t")[0]))
        if ordered != lines:
            with replaced(self.path) as temporary:
                temporary.write_text("".join([header, *ordered]), encoding="utf-8")

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
        if kind is not None and self._made and not self.done:  # a failure leaves no file that says nothing
            self.path.unlink(missing_ok=True)
        self.close()


def peek(path: PathLike) -> Run | None:
    """The run of the rows in a results file; None where there is no file or no row yet. Errors as in ResultsFile."""
    return parse(Path(path), ours=True)[0].run if Path(path).exists() else None


def read_results(paths: PathLike | Sequence[PathLike], *, progress: bool = False) -> Results:
    """Read one results file, or several that are shards of one certification; ours and locuslab's.

    A torn last line of ours is left out: the file may be growing while it is read.  progress: a bar if it takes long.
    Raises FileNotFoundError for a missing file, and ValueError (with file and line) for an unknown header, a malformed
    row, files of different runs, an image that occurs twice, or no rows at all.
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    parts = [(path, part) for path in files if len(part := parse(path, progress=progress)[0])]
    if not parts:
        raise ValueError(f"{' '.join(map(str, files)) or 'no file'}: no certified image in it yet")
    first_path, first = parts[0]
    seen: dict[int, Path] = {}
    for path, part in parts:
        if (first.run is None) != (part.run is None):
            raise ValueError(f"{path} and {first_path} differ in format; they are no shards of one certification")
        if first.run is not None and part.run is not None:
            check_same_run(str(path), part.run, first.run, f"{first_path} is no shard of it")
        here = part.idx.tolist()
        if len(parts) > 1:
            for idx in here:
                if idx in seen:
                    raise ValueError(f"image {idx} is both in {seen[idx]} and in {path}; merge them first")
            seen.update(dict.fromkeys(here, path))
    return joined([part for _, part in parts])


def parse(path: Path, *, ours: bool = False, progress: bool = False) -> tuple[Results, int]:
    """The rows of a file (their run is None without rows, or in locuslab's format), and the bytes of its whole lines.

    ours: refuse locuslab's format, and take an empty file or a torn header for a new file.
    """
    try:
        raw = path.read_bytes()
    except IsADirectoryError as error:
        raise ValueError(f"{path} is a folder, not a results file") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such results file") from error
    headers = {"\t".join(columns(version)): version for version in (2, 1, 0)}
    if ours and b"\n" not in raw and any(header.encode().startswith(raw) for header in headers):
        return read_rows(str(path), [], 2), 0
    if not raw:
        raise ValueError(f"{path} is empty")
    whole = raw.rfind(b"\n") + 1
    try:
        lines = raw.decode().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a results file: it is not text") from error
    version = headers.get(lines[0].rstrip("\r"))
    if version is None or (ours and version == 0):
        advice = "; choose another --out" if ours else ""
        raise ValueError(f"{path} is not a results file: its first line is {lines[0][:60]!r}{advice}")
    # After the last line break comes nothing, or a torn line. In locuslab's files (edited by hand, maybe) it counts.
    if version or not lines[-1]:
        lines.pop()
    found = read_rows(str(path), lines[1:], version, progress)
    if len(set(found.idx.tolist())) < len(found):
        seen: set[int] = set()
        for number, idx in enumerate(found.idx.tolist(), start=2):
            if idx in seen:
                raise ValueError(f"{path}, line {number}: image {idx} is in the file twice")
            seen.add(idx)
    return found, whole
