"""Collectors killed and signalled at random moments, held to a log of what they were acknowledged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign import kills, share

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
ROOM = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("part", range(4))
def test_collectors_are_ended(part: int) -> None:
    """In a process that has done nothing else: forks of one that has threads may hang."""
    counts = alone(f"from tests.campaign.kills import campaign; found = campaign(18, {4 * share.NUMBER + part})")
    ended = sum(count for what, count in counts.items() if what.startswith("SIG") and "(" in what)
    share.count("kills", {"ended": ended, "SIGINT sent again": counts.get("SIGINT sent again", 0)})
    assert ended == 18


def alone(code: str) -> dict[str, int]:
    command = [sys.executable, "-c", f"{code}; import json; print(json.dumps(found))"]
    done = subprocess.run(command, cwd=ROOM, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


# In this order the job without h5py gets those that need none.
JOBS = (
    "export of HDF5", "export of routes", "merge",
    "import of HDF5", "import of routes", "split",
    "verify", "compact", "repair",
)  # fmt: skip


@pytest.mark.parametrize("job", share.mine(JOBS))
def test_work_on_whole_stores_is_killed(job: str) -> None:
    """Imports, exports, verifications, merges: the destination is whole or not there, and a second run works."""
    if "HDF5" in job:
        pytest.importorskip("h5py")
        pytest.importorskip("hdf5plugin")
    counts = alone(f"from tests.campaign.transfers import campaign; found = campaign(8, 0, ({job!r},))")
    share.count("work killed", counts)
    assert counts.get(f"{job}: killed", 0) + counts.get(f"{job}: ended first", 0) == 8


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
