"""The house stands as it is drawn: imports go down, one door a name, files and functions of a size to read."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import pacd_fast

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pacd_fast"
# From the ground up.  A module imports from floors below its own, from its own folder, and from `_C`.
FLOORS = (
    ("arguments", "randomness", "tables", "memory", "ranks"),
    ("files",),
    ("ops",),
    ("data", "networks"),
    ("certification", "training", "bilevel", "labelflips"),
    ("poisoning",),
    ("experiments",),
    ("cli",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
SOURCES = sorted(PACKAGE.rglob("*.py"))
PYTHON = [*SOURCES, *(ROOT / "python_tests").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
CSRC = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def top(path: Path) -> str:
    """The folder of a file of the package, or the name of a module at the top."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(path: Path) -> list[tuple[str, list[str]]]:
    """(pacd_fast.module, names) of every import of the package in a file, wherever it is written."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pacd_fast":
            found.append((node.module, [alias.name for alias in node.names]))
        elif isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names if alias.name.startswith("pacd_fast.")]
    return found


def targets(path: Path) -> list[tuple[str, str, list[str]]]:
    """(top-level name, module, names): what of the package a file imports; `from pacd_fast import x` is x."""
    found = []
    for module, names in imports(path):
        if module == "pacd_fast":
            found += [(name, f"pacd_fast.{name}", []) for name in names]
        else:
            found.append((module.split(".")[1], module, names))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_down(path):
    here = top(path)
    if here in ("__init__", "__main__"):
        return
    for name, module, _ in targets(path):
        if name in ("_C", here) or name not in FLOOR:  # a name of pacd_fast itself is checked with the doors
            assert name in ("_C", here) or hasattr(pacd_fast, name), (
                f"{name_of(path)}: {module} is no part of the house"
            )
            continue
        assert FLOOR[name] < FLOOR[here], (
            f"{name_of(path)} (floor {FLOOR[here]}) imports {module} (floor {FLOOR[name]})"
        )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_other_folders_are_entered_by_their_door(path):
    """From another folder come names of its __all__, or whole modules that are no door's secret; never _names."""
    here = top(path)
    for name, module, names in targets(path):
        if name == here or name not in FOLDERS:
            assert not any(n.startswith("_") and n != "_C" for n in names if name != here), f"{name_of(path)}: {names}"
            continue
        public = importlib.import_module(f"pacd_fast.{name}").__all__
        if module == f"pacd_fast.{name}":
            modules = [p.stem for p in (PACKAGE / name).glob("*.py")]
            for each in names:
                assert each in public or each in modules, f"{name_of(path)}: {each} is not public in {name}"
        assert not any(each.startswith("_") for each in names), f"{name_of(path)} takes {names} from {module}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_has_a_notice_and_one_door(folder):
    module = importlib.import_module(f"pacd_fast.{folder}")
    assert module.__doc__ and len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert hasattr(module, name)
        assert name != "_" and not (PACKAGE / folder / f"{name}.py").exists(), f"{folder}.{name} hides its own module"
    elsewhere = [other for other in FOLDERS if other != folder]
    for other in elsewhere:
        shared = set(module.__all__) & set(importlib.import_module(f"pacd_fast.{other}").__all__)
        assert not shared, f"{folder} and {other} both export {shared}"


def test_names_that_users_have_stay_where_they_are():
    for name in (
        "certify", "certify_each", "Smooth", "soft_certify", "Certificates", "randomized_smoothing_certificate",
        "LabelFlipCertifier",
    ):  # fmt: skip
        assert name in pacd_fast.__all__
    from pacd_fast import _C, ops  # noqa: F401
    from pacd_fast.bilevel import Composite, hypergradient, unrolled  # noqa: F401
    from pacd_fast.training import Gaussian, Macer, SmoothAdv, Standard, fit  # noqa: F401


def test_reference_is_for_tests_and_benchmarks():
    """`pacd-fast bench`, whose peer it is, aside."""
    for path in SOURCES:
        if name_of(path) == "pacd_fast/certification/timing.py":
            continue
        assert not any("reference" in (module, *names) for _, module, names in targets(path)), name_of(path)


@pytest.mark.parametrize("path", [*PYTHON, *CSRC], ids=name_of)
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_say_what_they_are_for_and_functions_are_short(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert path.stat().st_size == 0 or ast.get_docstring(tree), f"{name_of(path)} does not say what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 80, f"{name_of(path)}: {node.name} has {lines} lines"


def test_the_kernels_know_no_torch():
    folders = [ROOT / "csrc" / name for name in ("math", "kernels")]
    assert all(folder.is_dir() for folder in folders)
    for path in (path for folder in folders for path in folder.rglob("*.h")):
        text = path.read_text(encoding="utf-8")
        assert "torch/" not in text and "operators/" not in text and "pybind11" not in text, name_of(path)


def test_the_readme_is_a_door_and_not_the_house():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    (block,) = re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)
    named = {line.split()[0].rstrip("/") for line in block.splitlines() if line.startswith("  ") and line.strip()}
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    kernels = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    assert named == folders | kernels, "README's map is not the folders"


def test_defects_can_still_be_put_in():
    """Every text that `make mutants` replaces is in its file, once."""
    tomllib = pytest.importorskip("tomllib")
    defects = tomllib.loads((ROOT / "benchmarks/mutants.toml").read_text(encoding="utf-8"))["mutant"]
    assert len(defects) > 100
    gone = [each["name"] for each in defects if (ROOT / each["file"]).read_text("utf-8").count(each["old"]) != 1]
    assert not gone
