"""Disks that fail: through the storage port, by system calls that strace fails, by real full disks, and memory."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trajstore
from tests.campaign import faults
from tests.campaign.disk import Disk, Tapped
from tests.campaign.workload import State, open_writer, recover, rows_of, tiny_shards, trajectory
from trajstore.errors import StorageError
from trajstore.media.storage import LocalStorage

ROOM = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("part", range(4))
def test_every_operation_fails_once(part: int) -> None:
    """Whatever fails: the error surfaces, what was acknowledged is there, and the store can be gone on with."""
    silent = failed = 0
    for at in range(1 + part, faults.length() + 1, 4):
        _, calls = faults.play(at, faults.ERRORS[at % len(faults.ERRORS)], "after" if at % 3 == 0 else "before")
        failed += calls > 0
        silent += not calls
    assert failed > silent, "only what is done on the side (removing an old name, say) may fail unnoticed"


@pytest.mark.parametrize("seed", range(4))
def test_operations_fail_in_every_way(seed: int) -> None:
    counts = faults.campaign(100, seed)
    print(dict(counts))
    assert counts["faults"] == 100 and counts["calls that failed"] > 50


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

COLLECTOR = textwrap.dedent(
    """
    import os, sys
    sys.path.insert(0, {room!r})
    from tests.campaign.workload import open_writer, tiny_shards, trajectory
    from trajstore.errors import TrajstoreError
    from trajstore.media.storage import LocalStorage
    with tiny_shards():
        writer = open_writer(LocalStorage(sys.argv[1]), resume=True)
        failed = 0
        for seed in range(int(sys.argv[2]), int(sys.argv[2]) + 4):
            writer.append(trajectory(seed), seed=seed)
            try:
                writer.commit()
                os.write(1, b"%d\\n" % seed)
            except TrajstoreError as error:
                failed += 1
                os.write(2, str(error).encode() + b"\\n")
        writer.close()
        os.write(1, b"closed\\n")
    """
)


def collect(place: Path, first: int, *before: str) -> tuple[list[int], subprocess.CompletedProcess[str]]:
    command = [*before, sys.executable, "-c", COLLECTOR.format(room=str(ROOM)), str(place), str(first)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ)
    lines = done.stdout.split()
    acknowledged = [int(line) for line in lines if line.isdigit()]
    return (list(range(first, first + 4)) if "closed" in lines else acknowledged), done


def check(place: Path, acknowledged: list[int]) -> None:
    with tiny_shards():
        found = recover(LocalStorage(place))
    seeds = [rows[0] for rows in found.trajectories] if isinstance(found, State) else []
    assert set(acknowledged) <= set(seeds)
    assert all(rows == rows_of(rows[0]) for rows in getattr(found, "trajectories", ()))


def strace_works() -> bool:
    if shutil.which("strace") is None:
        return False
    done = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.skipif(not strace_works(), reason="strace is not installed, or may not trace here")
@pytest.mark.parametrize(
    ("call", "error", "when"),
    [
        ("fdatasync", "EIO", "3"),
        ("fdatasync", "ENOSPC", "7+"),
        ("fsync", "EIO", "2"),
        ("fsync", "EIO", "6+"),
        ("rename", "EIO", "2"),
        ("link,linkat", "ENOSPC", "3"),
        ("writev", "ENOSPC", "4"),
        ("writev", "EDQUOT", "9+"),
        ("copy_file_range", "EIO", "2"),
        ("mkdir", "ENOSPC", "4"),
        ("flock", "ENOLCK", "1"),
    ],
)
def test_system_calls_that_fail(tmp_path: Path, call: str, error: str, when: str) -> None:
    place = tmp_path / "store"
    first, _ = collect(place, 0)
    assert first == [0, 1, 2, 3]
    inject = f"inject={call}:error={error}:when={when}"
    second, done = collect(place, 10, "strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject)
    check(place, first + second)
    third, _ = collect(place, 20)
    assert third == [20, 21, 22, 23], done.stderr
    check(place, first + second + third)


@pytest.mark.skipif(not strace_works(), reason="strace is not installed, or may not trace here")
@pytest.mark.parametrize(
    ("call", "when"), [("fdatasync", 5), ("rename", 4), ("link,linkat", 3), ("fsync", 6), ("writev", 8)]
)
def test_processes_killed_at_a_system_call(tmp_path: Path, call: str, when: int) -> None:
    place = tmp_path / "store"
    inject = f"inject={call}:signal=KILL:when={when}"
    first, done = collect(place, 0, "strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject)
    assert done.returncode != 0
    if first:
        check(place, first)
    second, done = collect(place, 10)
    assert second == [10, 11, 12, 13], done.stderr
    check(place, first + second)


@pytest.mark.parametrize("limit", [0, 100, 900, 4000])
def test_a_disk_that_is_full_after_so_many_bytes_of_a_file(tmp_path: Path, limit: int) -> None:
    """RLIMIT_FSIZE: every file beyond the limit fails as on a full disk (SIGXFSZ ignored, as Python does)."""
    place = tmp_path / "store"
    first, _ = collect(place, 0)
    command = [sys.executable, "-c", COLLECTOR.format(room=str(ROOM)), str(place), "10"]

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, preexec_fn=restrict)
    assert "Traceback" not in done.stderr or "StorageError" in done.stderr, done.stderr
    second = [int(line) for line in done.stdout.split() if line.isdigit()]
    check(place, first + second)
    third, done = collect(place, 20)
    assert third == [20, 21, 22, 23], done.stderr
    check(place, first + second + third)


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
        (arraywriter, "encode_frame"),
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
