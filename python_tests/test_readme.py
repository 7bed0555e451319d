"""What the pages show a reader to type: Python examples run, commands exist; their tables are the results file's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.report import shown
from pacd_fast.cli import parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
RESULTS = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_python_examples_run(page, capsys):
    code = "\n".join(blocks(page, "python"))
    exec(compile(code.replace("n=100_000", "n=1_000"), str(page), "exec"), {})
    assert capsys.readouterr().out or not code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_commands_parse(page):
    """Those in blocks, and those in the text."""
    text = page.read_text(encoding="utf-8")
    lines = [line.split("#")[0] for block in blocks(page, "sh") for line in block.splitlines()]
    lines += re.findall(r"`(pacd-fast [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    commands = [part.split()[1:] for line in lines for part in line.split(";") if part.strip().startswith("pacd-fast")]
    if page == PAGES[0]:
        assert {"train", "certify", "summary", "plot", "merge", "info", "selftest"} <= {each[0] for each in commands}
    for command in commands:
        try:
            parser().parse_args(command)
        except SystemExit:
            pytest.fail(f"a command of {page} does not parse: pacd-fast {' '.join(command)}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_tables_are_those_of_the_results_file(page):
    tables = re.findall(
        r"<!-- results: (.*?) -->\n(.*?)<!-- end -->", page.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert tables
    for name, table in tables:
        assert table.strip() == shown(RESULTS[name]), f"{name}: run python -m benchmarks.report"
    if page == PAGES[1]:
        assert {name for name, _ in tables} == set(RESULTS), "a table of results.json is not on the page"


def test_pictures_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page}: {target}"
