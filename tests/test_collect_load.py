"""Under load: slow disks, full queues, many environments, short episodes; all of it there, and memory bounded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore.media.storage import LocalStorage, Piece

HOUSE = Path(__file__).resolve().parent.parent


class SlowDisk(LocalStorage):
    """A folder on a disk that takes its time over every file and every sync."""

    def write(
        self, key: str, pieces: Sequence[Piece], *, base: tuple[str, int] | None = None, sync: bool = True
    ) -> None:
        time.sleep(0.002)
        super().write(key, pieces, base=base, sync=sync)

    def sync_folder(self, folder: str) -> None:
        time.sleep(0.002)
        super().sync_folder(folder)


def check(path: Path, num_envs: int, steps: int) -> None:
    """Each environment counts its steps: all of them are there, in order, once."""
    ds = trajstore.open(path)
    assert int(ds.lengths.sum()) == num_envs * steps
    counted, envs = ds.read("count"), np.repeat(ds.table["env"], ds.lengths)
    for env in range(0, num_envs, max(num_envs // 50, 1)):
        np.testing.assert_array_equal(counted[envs == env], np.arange(steps))
    assert int(counted.sum()) == num_envs * steps * (steps - 1) // 2


def test_four_thousand_environments_of_five_fields(tmp_path: Path) -> None:
    num_envs, steps, rng = 4096, 60, np.random.default_rng(0)
    with (
        trajstore.create(tmp_path / "s", profile="fast") as writer,
        trajstore.Recorder(writer, num_envs, memory_bytes=8 << 20) as recorder,
    ):
        for t in range(steps):
            recorder.step(
                obs=rng.standard_normal((num_envs, 6), np.float32),
                action=rng.integers(0, 4, num_envs),
                reward=rng.standard_normal(num_envs),
                value=rng.standard_normal(num_envs, np.float32),
                count=np.full(num_envs, t),
                terminated=rng.random(num_envs) < 0.1,
            )
        stats = recorder.stats
    assert stats["ring_bytes"] + stats["unfinished_peak_bytes"] <= 3 * (8 << 20)
    check(tmp_path / "s", num_envs, steps)


def test_ten_thousand_episodes_that_end_at_once(tmp_path: Path) -> None:
    num_envs = 10_000
    with (
        trajstore.create(tmp_path / "s", profile="fast") as writer,
        trajstore.Recorder(writer, num_envs) as recorder,
    ):
        for t in range(9):
            recorder.step(count=np.full(num_envs, t), terminated=np.full(num_envs, t % 3 == 2))
    assert len(trajstore.open(tmp_path / "s")) == 3 * num_envs
    check(tmp_path / "s", num_envs, 9)


@pytest.mark.parametrize("on_full", ["wait", "error"])
def test_a_slow_disk_and_a_full_queue(tmp_path: Path, on_full: str) -> None:
    num_envs, steps, rng = 64, 150, np.random.default_rng(1)
    store: Any = SlowDisk(tmp_path / "s")
    with (
        trajstore.create(store, queue_bytes=4096, commit_every=0.05, on_full=on_full) as writer,
        trajstore.Recorder(writer, num_envs, memory_bytes=64 << 10) as recorder,
    ):
        for t in range(steps):
            recorder.step(
                obs=rng.standard_normal((num_envs, 8)),
                count=np.full(num_envs, t),
                terminated=rng.random(num_envs) < 0.03,
            )
        writer.commit()
        assert writer.stats["queue_peak_bytes"] < 1 << 20
        assert recorder.stats["unfinished_peak_bytes"] < 256 << 10
    check(tmp_path / "s", num_envs, steps)


def test_hours_of_small_steps(tmp_path: Path) -> None:
    """Two environments whose episodes hardly ever end, far beyond what memory may hold."""
    steps, rng = 30_000, np.random.default_rng(2)
    with (
        trajstore.create(tmp_path / "s", profile="fast", commit_every=0.2) as writer,
        trajstore.Recorder(writer, 2, memory_bytes=128 << 10) as recorder,
    ):
        frame = rng.integers(0, 255, (2, 16), "uint8")
        for t in range(steps):
            recorder.step(obs=frame, count=np.full(2, t), terminated=np.array([False, t % 11_000 == 0]))
        stats = recorder.stats
    assert stats["unfinished_peak_bytes"] <= 256 << 10
    assert stats["spilled_bytes"] > 0
    check(tmp_path / "s", 2, steps)


RECORDER = """
import sys, numpy as np, trajstore
writer = trajstore.create(sys.argv[1], commit_every=None)
recorder = trajstore.Recorder(writer, 8)
t = 0
while True:
    recorder.step(count=np.full(8, t), terminated=np.full(8, t % 10 == 9))
    t += 1
    if t == 100:
        print("ready", flush=True)
    if t > 100:
        import time
        time.sleep(0.01)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_commits_the_episodes_that_have_ended(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", RECORDER, str(tmp_path / "s")],
        env={**os.environ, "PYTHONPATH": str(HOUSE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.wait(60) != 0
    process.stdout.close()
    ds = trajstore.open(tmp_path / "s")
    assert (ds.lengths == 10).sum() >= 80
    assert ds.lengths.max() == 10  # what is shorter was cut off when the process ended
