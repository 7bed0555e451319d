"""The results file of several ranks: rank 0's, beside it a file of every other one until they are one."""

from __future__ import annotations

import dataclasses
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pacd_fast.arguments import writable
from pacd_fast.certification.results import PathLike, ResultsFile, parse
from pacd_fast.certification.rows import Run
from pacd_fast.ranks import Ranks

PATIENCE = 20.0  # seconds until a network's file system shows what another machine wrote


def part(out: PathLike, rank: int) -> Path:
    """The file of a rank's rows."""
    path = Path(out)
    return path if rank == 0 else path.with_name(f"{path.name}.rank{rank}")


def parts(out: PathLike) -> list[Path]:
    """The files of ranks beside `out` that are there, of a run that did not end."""
    path = Path(out)
    pattern = re.compile(re.escape(path.name) + r"\.rank[1-9][0-9]*")
    return sorted(each for each in path.parent.iterdir() if pattern.fullmatch(each.name))


def unfinished(out: PathLike, ranks: Ranks) -> tuple[Run | None, set[int], int]:
    """What is there already, the same for all: its run, the idx of its images, and a seed for where there is none.

    Rank 0 looks at all files that it sees, the others at their own: theirs may be on another machine's disk.
    """
    writable(out)
    files = [Path(out), *parts(out)] if ranks.rank == 0 else [part(out, ranks.rank)]
    there = [parse(path, ours=True)[0] for path in files if path.exists()]
    runs = [dataclasses.asdict(each.run) for each in there if each.run is not None]
    idx = sorted({i for each in there for i in each.idx.tolist()})
    said = ranks.everyones({"runs": runs, "idx": idx, "seed": secrets.randbits(63)})
    run = next((run for one in said for run in one["runs"]), None)
    done = {i for one in said for i in one["idx"]}
    return None if run is None else Run(**run), done, said[0]["seed"]


@contextmanager
def rank_file(out: PathLike, run: Run, ranks: Ranks, *, writes: bool) -> Iterator[ResultsFile | None]:
    """Where this rank's rows go; at the end they are all in `out`, sorted by idx.

    writes: whether ranks above 0 have rows at all; they get None where not.
    Raises ValueError where the rows of a rank cannot be seen by rank 0 in the end, and as `ResultsFile` does.
    """
    if ranks.rank == 0:
        with ResultsFile(out, run) as file:
            _take(file, parts(out))
            ranks.everyones("rank 0 has taken what was there")
            yield file
            problem = _gather(file, ranks.to_first(None)[1:])
            if problem is not None:
                raise ValueError(problem)
        return
    ranks.everyones(None)
    if not writes:
        yield None
        ranks.to_first(None)
        return
    with ResultsFile(part(out, ranks.rank), run) as file:
        yield file
        count = len(file.done)
    ranks.to_first({"path": str(file.path.absolute()), "host": socket.gethostname(), "rows": count})


def _take(file: ResultsFile, files: list[Path]) -> None:
    for path in files:
        file.take(path)
    for path in files:
        path.unlink(missing_ok=True)


def _gather(file: ResultsFile, said: list[dict[str, Any] | None], patience: float = PATIENCE) -> str | None:
    """Takes the other ranks' rows; what is wrong where some cannot be seen."""
    written = {rank: one for rank, one in enumerate(said, start=1) if one is not None}
    until = time.monotonic() + patience
    while unseen := [rank for rank, one in written.items() if not _seen(part(file.path, rank), one["rows"])]:
        if time.monotonic() > until:
            break
        time.sleep(0.2)
    seen = [part(file.path, rank) for rank in written if rank not in unseen]
    for path in seen:
        file.take(path)
    file.sort()
    for path in seen:
        path.unlink(missing_ok=True)
    if not unseen:
        return None
    rank, one = unseen[0], written[unseen[0]]
    more = f" (and those of {len(unseen) - 1} more ranks)" if len(unseen) > 1 else ""
    return (
        f"{one['rows']} rows of rank {rank} are in {one['path']} on {one['host']}, which rank 0 on "
        f"{socket.gethostname()} cannot see: the ranks' --out is not on the same file system; copy that file{more} to "
        f"{part(file.path, rank)} and run the same command there, or merge it with {file.path}"
    )


def _seen(path: Path, rows: int) -> bool:
    return path.exists() and len(parse(path, ours=True)[0]) >= rows
