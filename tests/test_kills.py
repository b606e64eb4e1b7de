"""The README's table of kills: its row for this library, on a small scale."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_nothing_is_lost_repeated_or_skipped_by_kills() -> None:
    if not (ROOT / "bench" / "kills.py").is_file():
        pytest.skip("the bench is not part of this distribution")
    command = [sys.executable, "-m", "bench.kills", "--only", "Trajstore", "--kills", "3", "--episodes", "60", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    (row,) = json.loads(done.stdout)
    assert row == {
        "way": "trajstore", "kills": 3, "episodes": 60, "live": 0, "unreadable": 0, "lost": 0, "missing": 0, "twice": 0,
    }  # fmt: skip
