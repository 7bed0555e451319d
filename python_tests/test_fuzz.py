"""Hostile files of all kinds, as many as there is time for; see fuzz.py, which runs longer by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_nothing_gets_through():
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "--inputs", "200", "--seconds", "6"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    count = int(found.stdout.split(" inputs")[0].split()[-1])
    assert count >= 10, "hardly anything was tried"
