"""Disks that fail: through the storage port, by system calls that strace fails, by real full disks, and memory."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trajstore
from tests.campaign import calls, faults, share
from tests.campaign.disk import Disk, Tapped
from tests.campaign.workload import State, open_writer, recover, rows_of, tiny_shards, trajectory
from trajstore.errors import StorageError

ROOM = Path(__file__).resolve().parent.parent
FAULTS = 5000  # in the three shares together


@pytest.mark.parametrize("part", range(4))
def test_operations_fail_in_every_way(part: int) -> None:
    """Whatever fails: the error surfaces, what was acknowledged is there, and the store can be gone on with."""
    counts = faults.some(share.mine(faults.plays()[: FAULTS + 10])[part::4])
    share.count("faults", {"faults": counts["faults"]})
    assert counts["faults"] >= FAULTS // share.SHARES // 4
    assert counts["calls that failed"] > counts["faults"] // 2, "only what is done on the side may fail unnoticed"


@pytest.mark.parametrize("name", ["make_folder", "list"])
def test_arrays_that_could_be_opened_in_part_only_are_not_named(name: str) -> None:
    """The first append failed midway; the commit after it named a field that had no array."""
    for at in range(8):
        disk, left = Disk(), [-1]

        def tap(operation: str, arguments: tuple[Any, ...], call: Callable[[], Any], left: list[int] = left) -> Any:
            if operation == name:
                left[0] -= 1
                if left[0] == 0:
                    raise StorageError("Input/output error", errno=errno.EIO)
            return call()

        storage: Any = Tapped(disk.storage(), tap)
        writer = open_writer(storage)
        left[0] = at + 1
        try:
            writer.append(trajectory(0), seed=0)
        except StorageError:
            left[0] = -1
            writer.commit()
            assert recover(disk.storage()) == State()
            writer.append(trajectory(0), seed=0)
        left[0] = -1
        writer.close()
        assert recover(disk.storage()) == State((rows_of(0),))


# -- the real thing ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not calls.strace_works(), reason="strace is not installed, or may not trace here")
@pytest.mark.parametrize("part", range(2))
def test_system_calls_that_fail_or_kill(part: int) -> None:
    counts = calls.alone("strace", 50, 2 * share.NUMBER + part)
    share.count("system calls", counts)
    assert counts["sites"] == 50 and counts["killed"] and counts["failed"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_disks_that_are_full_after_so_many_bytes_of_a_file() -> None:
    counts = calls.alone("full", 22, share.NUMBER)
    share.count("full disks", counts)
    assert counts["sizes"] == 22


def tmpfs_works() -> bool:
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
    return (
        shutil.which("unshare") is not None
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


@pytest.mark.skipif(not tmpfs_works(), reason="no user namespaces here, in which to mount a small tmpfs")
@pytest.mark.parametrize("size", ["56k", "80k", "128k"])
def test_a_small_disk_fills_up(tmp_path: Path, size: str) -> None:
    """Until it is full commits are made; then each says so, and all that were made are there."""
    script = tmp_path / "fill.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path.insert(0, {str(ROOM)!r})
            from tests.campaign.workload import State, open_writer, recover, rows_of, tiny_shards, trajectory
            from trajstore.errors import StorageError
            from trajstore.media.storage import LocalStorage
            made, seed, failed = [], 0, 0
            with tiny_shards():
                try:
                    writer = open_writer(LocalStorage("/mnt/store"))
                except StorageError as error:
                    assert "full" in str(error), error
                    print("full at once")
                    sys.exit()
                while failed < 5:
                    writer.append(trajectory(seed), seed=seed)
                    try:
                        writer.commit()
                        made = list(range(seed + 1))
                    except StorageError as error:
                        assert "full" in str(error), error
                        failed += 1
                    seed += 1
                try:
                    writer.close()
                except StorageError:
                    pass
                found = [rows[0] for rows in recover(LocalStorage("/mnt/store")).trajectories]
                assert found[: len(made)] == made, (found, made)
                print("made", len(made))
            """
        )
    )
    command = f"mount -t tmpfs -o size={size} none /mnt && {sys.executable} {script}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and ("made" in done.stdout or "full" in done.stdout), done.stderr


def test_memory_errors_anywhere_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th allocation of the places that allocate most fails; the next commit has it all."""
    from trajstore.engine import appender, arraywriter, ingest
    from trajstore.media import shard

    for module, name in (
        (arraywriter, "encode_frames"),
        (shard, "crc32"),
        (appender, "_Run"),
        (ingest, "Manifest"),
    ):
        original = getattr(module, name)
        for at in (0, 1, 3, 7):
            calls = iter(range(1 << 30))

            def short(*arguments: object, calls=calls, at=at, original=original, **options: object):  # type: ignore[no-untyped-def]
                if next(calls) == at:
                    raise MemoryError("no memory for a moment")
                return original(*arguments, **options)

            disk = Disk()
            with tiny_shards(), monkeypatch.context() as patched:
                writer = open_writer(disk.storage())
                patched.setattr(module, name, short)
                taken = []
                for seed in range(9):
                    for _ in range(3):
                        try:
                            writer.append(trajectory(seed), seed=seed)
                            taken.append(seed)
                            break
                        except MemoryError:
                            continue
                    if seed % 3 == 2:
                        for _ in range(3):
                            try:
                                writer.commit()
                                break
                            except MemoryError:
                                continue
                writer.close()
                assert recover(disk.storage()) == State(tuple(rows_of(seed) for seed in taken)), (name, at)
                assert taken == list(range(9))


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    place = tmp_path / "store"
    place.mkdir(mode=0o555)
    with pytest.raises(StorageError, match="permissions"):
        trajstore.create(place)
