"""What README shows a reader to type: its Python examples run, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pacd_fast.__main__ import parser

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_python_examples_run(capsys):
    code = "\n".join(blocks("python"))
    assert "pacd_fast.certify(" in code
    exec(compile(code.replace("n=100_000", "n=1_000"), str(README), "exec"), {})
    assert capsys.readouterr().out


def test_the_commands_parse():
    lines = [line.split("#")[0] for block in blocks("sh") for line in block.splitlines()]
    commands = [part.split()[1:] for line in lines for part in line.split(";") if part.strip().startswith("pacd-fast")]
    assert {"train", "certify", "summary", "plot", "merge", "info", "selftest"} <= {command[0] for command in commands}
    for command in commands:
        try:
            parser().parse_args(command)
        except SystemExit:
            pytest.fail(f"README's command does not parse: pacd-fast {' '.join(command)}")
