"""A writer paused between any two operations while another takes over, though the locks lie; children that outlive."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trajstore
from tests.campaign import share, zombies
from tests.campaign.disk import Disk, Tapped
from tests.campaign.workload import State, open_writer, recover, rows_of, trajectory
from trajstore.errors import ConflictError
from trajstore.format.layout import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.mark.parametrize("part", range(4))
def test_no_acknowledged_commit_is_lost_to_a_writer_that_wakes(part: int) -> None:
    """At no pair of points. The root never goes back to an older commit either, so snapshots are monotone."""
    pairs = share.mine(zombies.pairs())[part::4]
    counts = zombies.some(pairs)
    share.count("zombies", counts)
    assert counts["schedules"] == len(pairs) > 500
    assert counts["refused"] > 300 and counts["commits acknowledged"] > 1000


def test_nor_to_one_that_wakes_late() -> None:
    counts = zombies.campaign(60, share.NUMBER)
    share.count("zombies", counts)
    assert counts["refused"] > 20


def test_a_claim_so_old_that_its_number_is_free_again_is_refused() -> None:
    first, _ = zombies.play(22, 1 << 30, zombies.LONG)
    assert isinstance(first.refused, ConflictError)


def test_sessions_that_all_die_before_they_show_their_first_commit_do_not_close_the_store() -> None:
    class Killed(BaseException):
        pass

    def tap(name: str, arguments: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        if name == "rename" and arguments[1] == ROOT:
            raise Killed
        return call()

    disk = Disk()
    for _ in range(5):
        with pytest.raises(Killed):
            open_writer(Tapped(disk.storage(), tap), resume=True)  # type: ignore[arg-type]
        disk.locks.clear()
    with open_writer(disk.storage(), resume=True) as writer:
        writer.append(trajectory(1), seed=1)
    assert recover(disk.storage()) == State((rows_of(1),))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_that_outlives_its_killed_parent_does_not_hold_the_lock(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:  # the collector, and its environment worker
        writer = trajstore.create(tmp_path / "store", commit_every=None)
        writer.append(trajectory(1), seed=1)
        writer.commit()
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        os.write(writing, b"%d\n" % child)
        time.sleep(60)
        os._exit(0)
    child = int(os.read(reading, 100))
    try:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        os.kill(child, 0)
        with trajstore.create(tmp_path / "store", resume=True) as writer:
            writer.append(trajectory(2), seed=2)
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(reading)
        os.close(writing)
    assert recover(trajstore.media.storage.LocalStorage(tmp_path / "store")) == State((rows_of(1), rows_of(2)))


def test_a_stopped_process_finds_itself_fenced(tmp_path: Path) -> None:
    """SIGSTOP, a takeover past a lock that does not hold, SIGCONT: the sleeper is refused and nothing is lost."""
    place = tmp_path / "store"
    reading, writing = os.pipe()
    sleeper = os.fork()
    if sleeper == 0:
        code = 1
        try:
            writer = open_writer(trajstore.media.storage.LocalStorage(place))
            os.unlink(place / "__trajstore/lock")  # as good as a lock that lies
            for seed in range(4000):
                writer.append(trajectory(seed), seed=seed)
                writer.commit()
                os.write(writing, b"%d\n" % seed)
                time.sleep(0.002)
        except ConflictError:
            code = 42
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    while not os.read(reading, 1000).count(b"\n"):
        pass
    time.sleep(0.05)
    os.kill(sleeper, signal.SIGSTOP)
    os.waitpid(sleeper, os.WUNTRACED)
    with trajstore.create(place, resume=True, handle_signals=False) as writer:
        for seed in range(5000, 5008):
            writer.append(trajectory(seed), seed=seed)
            writer.commit()
    os.kill(sleeper, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(sleeper, 0)[1]) == 42
    acknowledged = [int(line) for line in os.read(reading, 1 << 16).split()]
    os.close(reading)
    found = recover(trajstore.media.storage.LocalStorage(place))
    assert isinstance(found, State)
    seeds = [rows[0] for rows in found.trajectories]
    assert {*acknowledged, *range(5000, 5008)} <= set(seeds)
    assert len(seeds) == len(set(seeds)) and all(rows == rows_of(rows[0]) for rows in found.trajectories)
