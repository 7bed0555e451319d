"""Hostile files of all kinds, a few; see fuzz.py, which runs longer by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_nothing_gets_through():
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "--inputs", "60"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    count = int(found.stdout.split(" inputs")[0].split()[-1])
    assert count == 60
