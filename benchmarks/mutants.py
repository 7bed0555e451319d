"""Mutation runs, `make mutants`: one defect after the other is put into a copy of the code, and the tests must see it.

mutants.toml lists defects by hand: name, file, old and new text (once in the file), the tests to run, and, where nobody
could see the change, in one line why it is `equivalent`.  More are generated for the modules of its [generated] tables:
comparisons, operators, constants, conditions and calls changed one at a time, a fixed choice of so many a module.

Mutation tools import the package anew for every mutant, which is ten seconds of torch, and know nothing of compiled
sources.  Here torch is loaded once, and a process is forked for every mutant.  C++ is built again, in the copy.

What has been found is kept in build/mutants/found.json, by the content of mutant, file and tests: a run that was
stopped goes on, and one after a change repeats what the change concerns.  Every selection of tests runs once without a
defect first.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "mutants"
TREE = WORK / "tree"
SOUND = WORK / "sound"  # the extension modules as they are built without a defect
PLANTED = WORK / "planted"  # which compiled source had the last defect
NO_TEST = 5  # pytest's exit code where a selection is empty: nothing sees anything
LOADED = ("torch", "torch.func", "torch._dynamo", "numpy", "scipy.stats", "scipy.special", "mpmath", "pytest", "tqdm",
          "safetensors.torch", "hypothesis", "sklearn.linear_model", "matplotlib.figure")  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A change of one place in a file, and the tests that should see it; at: the offset of `old`."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    equivalent: str = ""
    at: int = -1
    kind: str = "hand"

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/")

    @property
    def place(self) -> str:
        """Its row in the table: the module for one that was generated, the folder for one of the list."""
        return self.file if self.kind == "generated" else "/".join(Path(self.file).parts[:2])

    def text(self) -> str:
        """The file with the defect in.  Raises ValueError where the old text is not there exactly once."""
        text = (ROOT / self.file).read_text(encoding="utf-8")
        if self.at >= 0:
            return text[: self.at] + self.new + text[self.at + len(self.old) :]
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} has {text.count(self.old)} times, not once: {self.old!r}")
        return text.replace(self.old, self.new)

    def key(self) -> str:
        """A digest of all that the outcome depends on, the rest of the code aside."""
        return digest(self.text(), self.tests, *(path.read_text(encoding="utf-8") for path in test_files(self.tests)))


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def test_files(tests: str) -> list[Path]:
    paths = [ROOT / "python_tests" / word.partition("::")[0] for word in tests.split() if word.startswith("test_")]
    return [path for path in paths if path.suffix == ".py"]


def by_hand() -> tuple[list[Mutant], dict[str, dict[str, Any]]]:
    """The list in mutants.toml, and the modules for which mutants are generated."""
    if sys.version_info < (3, 11):
        raise SystemExit("make mutants needs Python 3.11 or later, which reads TOML")
    tomllib = importlib.import_module("tomllib")
    content = tomllib.loads((ROOT / "benchmarks" / "mutants.toml").read_text(encoding="utf-8"))
    listed = [Mutant(**each) for each in content["mutant"]]
    if len({each.name for each in listed}) < len(listed):
        raise SystemExit("mutants.toml: two mutants have one name")
    return listed, content["generated"]


SWAPS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*",
    ast.And: "or", ast.Or: "and",
}  # fmt: skip


def generated(file: str, tests: str, most: int, equivalent: dict[str, str]) -> list[Mutant]:
    """`most` of the small changes of a module that a walk over its syntax tree finds; equivalent: reasons by name."""
    text = (ROOT / file).read_text(encoding="utf-8")
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    raw, found = text.encode(), []

    def place(node: Any) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def change(start: int, end: int, new: str, line: int) -> None:
        old = raw[start:end].decode()
        where = text.splitlines()[line - 1].strip()[:70]  # not the line's number, which other changes move
        name = f"{Path(file).stem}: {' '.join(old.split())[:40]} -> {' '.join(new.split())[:20]} in {where}"
        mutant = Mutant(name, file, old, new, tests, at=len(raw[:start].decode()), kind="generated")
        with contextlib.suppress(SyntaxError):  # a bracket between two operands
            ast.parse(mutant.text())
            found.append(mutant)

    def between(left: Any, right: Any, operator: Any) -> None:
        start, end = place(left)[1], place(right)[0]
        gap, new = raw[start:end].decode(), SWAPS[type(operator)]
        word = gap.strip("() \n")
        if word and "#" not in gap:
            change(start, end, gap.replace(word, new), left.end_lineno)

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
            between(node.left, node.comparators[0], node.ops[0])
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
            between(node.left, node.right, node.op)
        elif isinstance(node, ast.BoolOp):
            between(node.values[0], node.values[1], node.op)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            change(place(node)[0], place(node.operand)[0], "", node.lineno)
        elif isinstance(node, ast.If):
            start, end = place(node.test)
            change(start, end, "False", node.lineno)
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            start, end = place(node)
            new = repr(not node.value) if isinstance(node.value, bool) else f"({node.value!r} + 1)"
            change(start, end, new, node.lineno)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            start, end = place(node)
            change(start, end, "None", node.lineno)
    unique = list({each.name: each for each in found}.values())
    random.Random(file).shuffle(unique)
    chosen = unique[:most]
    return [Mutant(**{**vars(each), "equivalent": equivalent.get(each.name, "")}) for each in chosen]


def copy_tree() -> None:
    """What tests need, with the extension modules that stand beside the installed package."""
    shutil.rmtree(TREE, ignore_errors=True)
    for name in ("pacd_fast", "python_tests", "benchmarks", "csrc", "cmake"):
        shutil.copytree(ROOT / name, TREE / name, ignore=shutil.ignore_patterns("__pycache__", "figures"))
    for name in ("pyproject.toml", "README.md", "Makefile", "CMakeLists.txt"):
        shutil.copy(ROOT / name, TREE / name)
    if PLANTED.exists():  # what was built last has the defect in, and the copy is as old as its original
        (TREE / PLANTED.read_text(encoding="utf-8")).touch()
    cmake = TREE / "CMakeLists.txt"  # the same bits in a third of the time: contraction is off, fma is written out
    cmake.write_text(cmake.read_text(encoding="utf-8").replace("PACD_CXX_FLAGS -O3", "PACD_CXX_FLAGS -O1"))
    spec = importlib.util.find_spec("pacd_fast")  # found, not imported: a process loads one library of operators
    assert spec is not None and spec.submodule_search_locations is not None
    for folder in spec.submodule_search_locations:
        copy_modules(Path(folder), TREE / "pacd_fast")


def build() -> None:
    """The extension modules of the copy, as they are now.  Raises CalledProcessError where they do not compile."""
    folder = WORK / "objects"
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if not (folder / "build.ninja").exists():
        pybind = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], check=True, capture_output=True)
        configure = ["cmake", "-G", "Ninja", "-S", str(TREE), "-B", str(folder), "-DPACD_CUDA=OFF"]
        configure += ["-DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF"]  # defined, so that pybind11 adds none of its own
        configure += [f"-Dpybind11_DIR={pybind.stdout.decode().strip()}", f"-DPython_EXECUTABLE={sys.executable}"]
        subprocess.run([*configure, "-DSKBUILD_PROJECT_VERSION=0.1.0"], env=environment, **quiet)  # type: ignore[call-overload]
    subprocess.run(["ninja", "-C", str(folder)], env=environment, **quiet)  # type: ignore[call-overload]
    copy_modules(folder, TREE / "pacd_fast")


def copy_modules(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for path in source.glob("*.so"):
        shutil.copy(path, target / path.name)


def run_tests(tests: str, log: Path, limit: float = 600.0) -> tuple[str, float]:
    """("passed", "failed" or "hung" for `limit` seconds), and seconds; in a fork that imports the copy's package."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(output, stream)
            os.chdir(TREE)
            sys.meta_path[:] = [each for each in sys.meta_path if type(each).__name__ != "ScikitBuildRedirectingFinder"]
            sys.path[:] = [str(TREE), *(each for each in sys.path if Path(each or ".").resolve() != ROOT)]
            package = importlib.import_module("pacd_fast")
            assert Path(package.__file__ or "").is_relative_to(TREE), package.__file__
            pytest = importlib.import_module("pytest")
            words = [f"python_tests/{word}" if word.startswith("test_") else word for word in arguments(tests)]
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not cuda", *words]))
        finally:
            os._exit(code)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > limit:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hung", time.monotonic() - started
        time.sleep(0.02)
    seconds = time.monotonic() - started
    passed = os.WIFEXITED(status) and os.WEXITSTATUS(status) in (0, NO_TEST)
    return "passed" if passed else "failed", seconds


def arguments(tests: str) -> list[str]:
    """Words of a selection; everything after -k is one expression."""
    before, flag, expression = tests.partition(" -k ")
    return [*before.split(), *(["-k", expression] if flag else [])]


def failing(log: Path) -> str:
    """The test that saw it."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            return line.split()[1].removeprefix("python_tests/")
    return "the interpreter stopped"


@contextlib.contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """The defect in the copy for a while."""
    target = TREE / mutant.file
    before = target.read_text(encoding="utf-8")
    if mutant.compiled:
        PLANTED.write_text(mutant.file, encoding="utf-8")
    target.write_text(mutant.text(), encoding="utf-8")
    try:
        yield
    finally:
        target.write_text(before, encoding="utf-8")
        if mutant.compiled:
            copy_modules(SOUND, TREE / "pacd_fast")


def outcome(mutant: Mutant, found: dict[str, Any]) -> dict[str, Any]:
    log = WORK / "log.txt"
    clean = "clean " + digest(mutant.tests, *(p.read_text(encoding="utf-8") for p in test_files(mutant.tests)))
    if clean not in found:
        status, seconds = run_tests(mutant.tests, log)
        if status != "passed":
            raise SystemExit(f"without a defect, {mutant.tests} {status}: see {log}")
        found[clean] = {"seconds": round(seconds, 1)}
    with planted(mutant):
        if mutant.compiled:
            try:
                build()
            except subprocess.CalledProcessError as error:
                raise SystemExit(f"{mutant.name} does not compile: {error.stderr.decode()[-800:]}") from error
        status, seconds = run_tests(mutant.tests, log, 60.0 + 10.0 * found[clean]["seconds"])
    by = "" if status == "passed" else "a limit of time" if status == "hung" else failing(log)
    return {"name": mutant.name, "seen": status != "passed", "by": by, "seconds": round(seconds, 1)}


def table(mutants: list[Mutant], found: dict[str, Any]) -> list[dict[str, Any]]:
    """By list and place: mutants, caught, equivalent, missed, and the share caught of all that are not equivalent."""
    rows = []
    for kind in ("hand", "generated"):
        several = [each for each in mutants if each.kind == kind]
        for place in (*sorted({each.place for each in several}), "all"):
            here = [each for each in several if place in (each.place, "all") and each.key() in found]
            caught = sum(found[each.key()]["seen"] for each in here)
            same = sum(bool(each.equivalent) and not found[each.key()]["seen"] for each in here)
            rest = len(here) - same
            rows.append({
                "list": kind, "code": place, "mutants": len(here), "caught": caught, "equivalent": same,
                "missed": rest - caught, "caught of the rest": f"{caught / rest:.0%}" if rest else "-",
            })  # fmt: skip
    return rows


def described(mutants: list[Mutant], found: dict[str, Any]) -> str:
    """Every mutant and what saw it."""
    lines = ["| defect | where | seen by |", "|---|---|---|"]
    for each in mutants:
        result = found.get(each.key())
        said = "not run" if result is None else f"`{result['by']}`" if result["seen"] else "**missed**"
        if result is not None and not result["seen"] and each.equivalent:
            said = f"equivalent: {each.equivalent}"
        lines.append("| " + " | ".join(text.replace("|", "or") for text in (each.name, f"`{each.file}`", said)) + " |")
    return "\n".join(lines)


def as_text(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(mutants: list[Mutant], found: dict[str, Any]) -> None:
    """Puts the table into results.json and benchmarks/README.md, and the mutants into mutants.md."""
    page, mark = ROOT / "benchmarks" / "mutants.md", "<!-- mutants -->\n"
    text = page.read_text(encoding="utf-8").partition(mark)[0]
    page.write_text(text + mark + described(mutants, found) + "\n", encoding="utf-8")
    sys.path.insert(0, str(ROOT))
    importlib.import_module("benchmarks.report").record("mutants", table(mutants, found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="parts of names or files; by default all")
    parser.add_argument("--hand", action="store_true", help="leave the generated ones out")
    parser.add_argument("--seconds", type=float, default=7200, help="start no mutant after so long; run again to go on")
    text = "every mutant and what saw it, of what has been found, without a run"
    parser.add_argument("--list", action="store_true", help=text)
    text = "put what has been found into benchmarks/README.md and mutants.md, without a run"
    parser.add_argument("--write", action="store_true", help=text)
    options = parser.parse_args()
    mutants, modules = by_hand()
    for file, each in {} if options.hand else modules.items():
        mutants += generated(file, each["tests"], each["most"], each.get("equivalent", {}))
    if options.only:
        mutants = [each for each in mutants if any(part in f"{each.name} {each.file}" for part in options.only)]
    for each in mutants:
        each.text()
    WORK.mkdir(parents=True, exist_ok=True)
    state = WORK / "found.json"
    found = json.loads(state.read_text(encoding="utf-8")) if state.exists() else {}
    if options.write:
        write(mutants, found)
        return 0
    if not options.list:
        wanted = [(key, each) for each in mutants if (key := each.key()) not in found]
        search(sorted(wanted, key=lambda pair: pair[1].compiled), found, state, options.seconds)
    if options.list:
        print(described(mutants, found) + "\n")
    print(as_text(table(mutants, found)))
    missed = [m for m in mutants if (r := found.get(m.key())) is not None and not r["seen"] and not m.equivalent]
    for each in missed:
        print(f"missed: {each.name} ({each.file}; {each.tests})")
    waiting = sum(each.key() not in found for each in mutants)
    if waiting:
        print(f"{waiting} have not been run: run it again to go on")
    return 0


def search(wanted: list[tuple[str, Mutant]], found: dict[str, Any], state: Path, seconds: float) -> None:
    """Runs them one by one, and keeps every outcome as it is found."""
    if not wanted:
        return
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    started = time.monotonic()
    copy_tree()
    for name in LOADED:
        importlib.import_module(name)
    if any(each.compiled for _, each in wanted):
        build()  # so that what has no defect is built in the same way
        copy_modules(TREE / "pacd_fast", SOUND)
    for number, (key, each) in enumerate(wanted, 1):
        if time.monotonic() - started > seconds:
            return
        result = outcome(each, found)
        found[key] = result
        state.write_text(json.dumps(found, indent=1), encoding="utf-8")
        said = result["by"] or ("equivalent" if each.equivalent else "MISSED")
        print(f"{number}/{len(wanted)} {result['seconds']:5.1f} s  {each.name}: {said}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
