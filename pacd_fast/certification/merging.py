"""Several results files as one: shards of a run merged, victims pooled, a file that must hold exactly some images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pacd_fast.arguments import writable
from pacd_fast.certification.results import PathLike, parse, read_results
from pacd_fast.certification.rows import Results, Run, check_same_run, columns, joined
from pacd_fast.files import replaced


def exactly(path: PathLike, wanted: int | Sequence[int]) -> Results:
    """What `read_results` finds in a file; ValueError where it holds other images, or more or fewer, than wanted."""
    found = read_results(path)
    count, indices = (wanted, None) if isinstance(wanted, int) else (len(wanted), sorted(wanted))
    if len(found) != count or indices not in (None, sorted(found.idx.tolist())):
        raise ValueError(f"{path} holds {len(found)} images and not the {count} that are wanted; give another --work")
    return found


def pooled(several: Sequence[Results]) -> Results:
    """The certificates of several victims as if they were one, for averages over victims; the run is the first's."""
    return joined(several)


def merge(paths: Sequence[PathLike], out: PathLike) -> int:
    """Merge shards of one run into one file, sorted by idx; returns the number of rows.

    The lines are kept byte for byte, so the result is the file that the run without shards writes, but for the times.
    An image that is in several shards must have the same certificate there, and is written once.
    Raises ValueError where out exists, where the shards belong to different runs, or where two rows disagree.
    """
    out = writable(out)
    if out.exists():
        raise ValueError(f"{out} exists already; choose another --out or delete it")
    lines: dict[int, str] = {}
    first: tuple[Path, Run] | None = None
    for path in map(Path, paths):
        rows, whole = parse(path, ours=True)
        if rows.run is None:
            continue
        if first is None:
            first = path, rows.run
        check_same_run(str(path), rows.run, first[1], f"{first[0]} is no shard of it")
        for idx, line in zip(rows.idx.tolist(), path.read_bytes()[:whole].decode().split("\n")[1:], strict=False):
            known = lines.setdefault(idx, line)
            if known.split("\t")[:-1] != line.split("\t")[:-1]:
                names = columns(rows.run.version)
                column = next(c for c, a, b in zip(names, known.split("\t"), line.split("\t"), strict=True) if a != b)
                raise ValueError(f"{path}: image {idx} has another {column} than in the shards before it")
    if first is None:
        raise ValueError(f"{' '.join(map(str, paths)) or 'no file'}: no certified image in it yet")
    with replaced(out) as temporary:
        header = "\t".join(columns(first[1].version))
        temporary.write_bytes("\n".join([header, *(lines[idx] for idx in sorted(lines)), ""]).encode())
    return len(lines)
