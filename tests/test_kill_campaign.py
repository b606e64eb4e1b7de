"""Collectors killed and signalled at random moments, held to a log of what they were acknowledged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign import kills

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
ROOM = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("seed", range(4))
def test_sixty_collectors_are_ended(seed: int) -> None:
    """In a process that has done nothing else: forks of one that has threads may hang."""
    code = f"from tests.campaign import kills; print(dict(kills.campaign(15, {seed})))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOM, capture_output=True, text=True, timeout=300, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "SIGKILL" in done.stdout and "acknowledged" in done.stdout


def test_a_loss_would_be_seen(tmp_path: Path) -> None:
    collection = kills.Collection(tmp_path / "store", 0)
    with kills.trajstore.create(tmp_path / "store") as writer:
        writer.append(kills.trajectory(0), seed=0)
        writer.append(kills.trajectory(1), seed=1)
    collection._check(b"0\n1\n= 2\n", 9)
    for log in (b"5\n", b"= 3\n"):
        with pytest.raises(kills.Violation, match="lost"):
            collection._check(log, 9)
        collection.acknowledged, collection.least = set(), 0
