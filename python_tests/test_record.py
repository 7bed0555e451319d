"""What measured tables say of themselves."""

from __future__ import annotations

import json
import shutil
import subprocess
from datetime import date
from importlib.metadata import version

import pytest

from pacd_fast.experiments import record


@pytest.fixture
def uncached():
    record.commit.cache_clear()
    yield
    record.commit.cache_clear()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_table_says_at_which_commit_it_was_measured(tmp_path, monkeypatch, uncached):
    def git(*words: str) -> str:
        known = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        line = ["git", "-C", str(tmp_path), *known, *words]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()

    def measured() -> str:
        record.commit.cache_clear()
        record.write_table(tmp_path / "results.json", "speed", [{"seconds": 1}])
        return str(json.loads((tmp_path / "results.json").read_text())["speed"]["commit"])

    package = tmp_path / "pacd_fast" / "experiments"
    package.mkdir(parents=True)
    (package / "record.py").write_text("1\n")
    monkeypatch.setattr(record, "__file__", str(package / "record.py"))
    assert measured() == version("pacd_fast")  # no repository
    git("init", "-q")
    assert measured() == version("pacd_fast")  # somebody else's
    git("add", "pacd_fast")
    git("commit", "-qm", "first")
    assert measured() == git("rev-parse", "--short", "HEAD")  # results.json may differ, it is no code
    (package / "record.py").write_text("2\n")
    assert measured() == git("rev-parse", "--short", "HEAD") + "+"
    before = record.commit()
    git("commit", "-qam", "second")
    assert record.commit() == before  # what runs was loaded before
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measured() == version("pacd_fast")  # no git


def test_a_table_says_where_and_when(tmp_path):
    record.add_row(tmp_path / "r.json", "speed", ["name"], {"name": "a", "x": 1})
    (table,) = json.loads((tmp_path / "r.json").read_text()).values()
    assert table["machine"] == record.machine() and table["date"] == str(date.today())
    assert table["commit"] == record.commit() and table["rows"] == [{"name": "a", "x": 1}]
