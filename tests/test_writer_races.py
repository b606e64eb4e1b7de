"""Moments of a writer that only luck would meet, each arranged here on purpose."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from tests.campaign.disk import Disk, Tapped
from tests.campaign.workload import State, open_writer, recover, rows_of, tiny_shards, trajectory
from trajstore.engine import signals
from trajstore.engine.appender import Appender
from trajstore.engine.budget import Budget
from trajstore.engine.buffers import Buffers
from trajstore.engine.encoders import Job, finish
from trajstore.errors import StateError, StorageError
from trajstore.format.layout import ArrayLayout, Codec
from trajstore.media.storage import LocalStorage

PATIENCE = 20.0


class Later:
    """An executor whose jobs run when the test says so."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def submit(self, function: Callable[..., None], *arguments: Any) -> Job:
        self.jobs.append(Job(function, *arguments))
        return self.jobs[-1]

    def run(self) -> None:
        while self.jobs:
            self.jobs.pop(0).run()


class Target:
    """Notes what it is given to encode."""

    def __init__(self) -> None:
        self.layout = ArrayLayout("steps/x", np.dtype("int64"), (), 2, 4, Codec(), "steps")
        self.rows: dict[int, int] = {}

    def encode(self, rows: np.ndarray[Any, Any], first: int) -> None:
        self.rows.update(enumerate(rows.tolist(), first))


def test_a_buffer_is_not_filled_again_while_its_last_rows_wait_for_room() -> None:
    """A commit's part of a run ended while the caller waited to hand over the rest: the buffer was free too early."""
    later, target = Later(), Target()

    class Slow(Budget):
        def acquire(self, amount: int, clock: Callable[[], float]) -> None:
            later.run()  # what a full queue waits for
            super().acquire(amount, clock)

    appender = Appender(
        target,  # type: ignore[arg-type]
        np.dtype("int64"),
        0,
        encoders=later,  # type: ignore[arg-type]
        budget=Slow(1 << 20),
        buffers=Buffers(later),  # type: ignore[arg-type]
        clock=time.monotonic,
    )
    appender.write(np.array([0, 1, 2]))
    appender.freeze()
    appender.write(np.array([3]))  # the run is full; the part that was frozen is encoded meanwhile
    appender.write(np.array([40, 50, 60]))
    later.run()
    assert target.rows == {0: 0, 1: 1, 2: 2, 3: 3}


class Meanwhile:
    """A lock, at the first release of which something happens."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.then = then

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        then, self.then = self.then, lambda: None
        then()


def test_a_chunk_that_fails_while_another_is_tried_again_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    later, target = Later(), Target()

    def short(*_: object) -> None:
        raise MemoryError("no memory for a moment")

    appender = Appender(
        target,  # type: ignore[arg-type]
        np.dtype("int64"),
        0,
        encoders=later,  # type: ignore[arg-type]
        budget=Budget(1 << 20),
        buffers=Buffers(later),  # type: ignore[arg-type]
        clock=time.monotonic,
    )
    appender.write(np.arange(4))
    appender.write(np.arange(4, 8))
    with monkeypatch.context() as patched:
        patched.setattr(target, "encode", short)
        later.jobs.pop(0).run()
        monkeypatch.setattr(appender, "_guard", Meanwhile(later.jobs.pop(0).run))
        waited_for = appender.freeze()
    later.run()
    with pytest.raises(MemoryError):
        finish(waited_for)
    waited_for = appender.freeze()
    later.run()
    finish(waited_for)
    finish(appender.freeze())
    assert target.rows == {row: row for row in range(8)}


def frames(value: float, count: int) -> np.ndarray[Any, Any]:
    return np.full((count, 8, 8), value, np.float16)


def test_rows_appended_during_the_commit_that_unpacks_their_field_are_moved_too(tmp_path: Path) -> None:
    with tiny_shards():
        writer = trajstore.create(tmp_path / "store", commit_every=None, threads=1)
        kept = [frames(np.float16(value / 255), 3) for value in (10, 20, 30, 40, 50, 60)]
        first = kept[0].copy()
        first[0, 0, 0] = 0
        writer.append({"image": first})
        writer.commit()
        check, odd = writer._session.check, frames(0.1235, 5)

        def appending() -> None:
            """The commit has made its cut; rows that fit follow, then such as do not."""
            writer._session.check = check  # type: ignore[method-assign]
            for rows in kept[1:]:
                writer.append({"image": rows})
            writer.append({"image": odd})
            appender = writer._ingest._appenders["steps/image"]
            deadline = time.monotonic() + PATIENCE
            while appender.replaced is None and time.monotonic() < deadline:
                time.sleep(0.001)

        writer.append({"image": kept[1]})
        writer._session.check = appending  # type: ignore[method-assign]
        writer.commit()
        writer.append({"image": odd})
        writer.close()
        dataset = trajstore.open(tmp_path / "store")
        expected = [first, kept[1], *kept[1:], odd, odd]
        assert len(dataset) == len(expected)
        for found, rows in zip(dataset, expected):
            assert np.array_equal(found["image"], rows)


def test_a_field_that_leaves_its_clock_does_not_wait_for_a_commit_that_waits_for_it(tmp_path: Path) -> None:
    writer = trajstore.create(tmp_path / "store", commit_every=None, handle_signals=False)
    writer.append({"a": np.arange(3), "b": np.arange(3)})
    inside, going_on = threading.Event(), threading.Event()

    def commit_first() -> None:
        with writer._committer._committing:  # as the timer's thread does, before it takes the other lock
            inside.set()
            going_on.wait(0.2)
            writer._committer.commit()

    committer = threading.Thread(target=commit_first, daemon=True)
    committer.start()
    assert inside.wait(PATIENCE)
    splitter = threading.Thread(target=lambda: writer.append({"a": np.arange(3), "b": None}), daemon=True)
    splitter.start()
    splitter.join(PATIENCE)
    committer.join(PATIENCE)
    assert not splitter.is_alive() and not committer.is_alive(), "each waits for the other"
    writer.close()
    assert trajstore.open(tmp_path / "store")[1]["b"] is None or len(trajstore.open(tmp_path / "store")) == 2


def test_memory_that_is_short_for_a_moment_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that could not be encoded is encoded by the next commit."""
    from trajstore.engine import arraywriter

    encode, failures = arraywriter.encode_frames, iter([True, False, True])

    def short(*arguments: Any) -> list[bytes]:
        if next(failures, False):
            raise MemoryError("no memory for a moment")
        return encode(*arguments)

    disk = Disk()
    with tiny_shards():
        writer = open_writer(disk.storage())
        for seed in range(5):
            writer.append(trajectory(seed), seed=seed)
        writer.commit()
        monkeypatch.setattr(arraywriter, "encode_frames", short)
        for seed in range(5, 11):
            writer.append(trajectory(seed), seed=seed)
        for _ in range(4):
            try:
                writer.commit()
            except (MemoryError, StateError):
                continue
            break
        writer.close()
        assert recover(disk.storage()) == State(tuple(rows_of(seed) for seed in range(11)))


def test_nothing_is_taken_by_a_writer_that_is_being_closed(tmp_path: Path) -> None:
    """An append by another thread is stored or refused, and never taken and dropped."""
    for _ in range(5):
        disk = Disk()
        taken: list[int] = []

        def slow(name: str, arguments: tuple[Any, ...], call: Callable[[], Any]) -> Any:
            time.sleep(0.0005)
            return call()

        storage: Any = Tapped(disk.storage(), slow)
        writer = open_writer(storage)

        def appending(writer: trajstore.Writer = writer, taken: list[int] = taken) -> None:
            for seed in range(100_000):
                try:
                    writer.append(trajectory(seed), seed=seed)
                except StateError:
                    return
                taken.append(seed)

        thread = threading.Thread(target=appending)
        thread.start()
        while len(taken) < 50:
            time.sleep(0.001)
        writer.close()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        found = recover(disk.storage())
        assert isinstance(found, State) and [rows[0] for rows in found.trajectories] == taken


# -- signals -----------------------------------------------------------------------------------------------------------


class Interrupting:
    """A lock of the writer's during whose acquiring and releasing a signal arrives."""

    def __init__(self, inner: Any, at: str) -> None:
        self.inner = inner
        self.at = at

    def acquire(self, *arguments: Any, **options: Any) -> Any:
        taken = self.inner.acquire(*arguments, **options)
        self._send("acquire")
        return taken

    def release(self) -> None:
        self._send("before release")
        self.inner.release()
        self._send("release")

    def _send(self, at: str) -> None:
        if at == self.at:
            self.at = ""
            os.kill(os.getpid(), signal.SIGTERM)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.mark.parametrize("at", ["acquire", "before release", "release"])
@pytest.mark.parametrize("which", ["_lock", "_committing"])
def test_a_signal_at_the_borders_of_a_lock_does_not_wait_for_ever(tmp_path: Path, which: str, at: str) -> None:
    arrived: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: arrived.append(number))
    try:
        writer = trajstore.create(tmp_path / "store", commit_every=None)
        writer.append(trajectory(0), seed=0)
        lock = getattr(writer._committer, which)
        lock._lock = Interrupting(lock._lock, at)
        writer.append(trajectory(1), seed=1)
        writer.commit()
        assert arrived == [signal.SIGTERM]
        writer.close()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert recover(LocalStorage(tmp_path / "store")) == State((rows_of(0), rows_of(1)))


@pytest.mark.parametrize("call", ["mark_attempted", "append", "commit", "attempted", "split_clock"])
def test_a_signal_inside_any_call_is_heard_when_it_ends(tmp_path: Path, call: str) -> None:
    arrived: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: arrived.append(number))
    try:
        with trajstore.create(tmp_path / "store", commit_every=None) as writer:
            writer.append({"x": np.arange(3), "y": np.arange(3)}, seed=0)
            with writer._lock:
                os.kill(os.getpid(), signal.SIGTERM)
                assert arrived == [] and signals.deferred
                calls: dict[str, Callable[[], Any]] = {
                    "mark_attempted": lambda: writer.mark_attempted(7),
                    "append": lambda: writer.append({"x": np.arange(3), "y": np.arange(3)}, seed=1),
                    "commit": lambda: None,
                    "attempted": lambda: writer.attempted,
                    "split_clock": lambda: None,
                }
                calls[call]()
            if call == "commit":
                writer.commit()
            elif call == "split_clock":
                writer.split_clock("y")
            assert arrived == [signal.SIGTERM] and not signals.deferred
    finally:
        signal.signal(signal.SIGTERM, before)


# -- failures that were reported wrongly -------------------------------------------------------------------------------


def test_a_temporary_name_that_cannot_be_removed_is_no_conflict() -> None:
    """The shard has its name: that its other name stays makes no difference."""
    disk = Disk()
    broken: set[str] = set()

    def tap(name: str, arguments: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        if name in broken:
            raise StorageError("Input/output error", errno=5)
        return call()

    storage: Any = Tapped(disk.storage(), tap)
    writer = open_writer(storage)
    broken.add("remove")
    for seed in range(3):
        writer.append(trajectory(seed), seed=seed)
        writer.commit()
    broken.clear()
    writer.close()
    assert recover(disk.storage()) == State(tuple(rows_of(seed) for seed in range(3)))


def test_a_full_disk_is_told_before_any_commit_is_asked_for() -> None:
    """Else all that comes would wait in memory for a commit that nobody makes."""
    disk = Disk()
    full = threading.Event()

    def tap(name: str, arguments: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        if name in ("write", "append") and full.is_set():
            raise StorageError("No space left on device", errno=28)
        return call()

    storage: Any = Tapped(disk.storage(), tap)
    taken = 0

    def append_for_ever() -> None:
        nonlocal taken
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            writer.append(trajectory(taken), seed=taken)
            taken += 1

    with tiny_shards():
        writer = trajstore.create(storage, commit_every=None, handle_signals=False, queue_bytes=1 << 10)
        full.set()
        with pytest.raises(StorageError, match="No space"):
            append_for_ever()
        full.clear()
        writer.commit()
        writer.append(trajectory(taken), seed=taken)
        writer.close()
        assert recover(disk.storage()) == State(tuple(rows_of(seed) for seed in range(taken + 1)))


def test_of_two_threads_that_close_one_does_and_the_other_waits() -> None:
    disk = Disk()
    inside, going_on = threading.Event(), threading.Event()
    armed = threading.Event()

    def tap(name: str, arguments: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        if name == "rename" and armed.is_set() and not inside.is_set():
            inside.set()
            assert going_on.wait(PATIENCE)
        return call()

    storage: Any = Tapped(disk.storage(), tap)
    writer = trajstore.create(storage, commit_every=None, handle_signals=False)
    writer.append(trajectory(0), seed=0)
    armed.set()
    errors: list[BaseException] = []
    closed: list[int] = []

    def close() -> None:
        try:
            writer.close()
            closed.append(writer.committed)
        except BaseException as error:
            errors.append(error)

    first = threading.Thread(target=close)
    first.start()
    assert inside.wait(PATIENCE)
    others = [threading.Thread(target=close) for _ in range(3)]
    for other in others:
        other.start()
    assert closed == [] and all(other.is_alive() for other in others)
    going_on.set()
    for thread in (first, *others):
        thread.join(PATIENCE)
    assert errors == [] and closed == [1] * 4
    assert recover(disk.storage()) == State((rows_of(0),))


def test_a_commit_that_fails_behind_another_error_is_told() -> None:
    disk = Disk()
    full = threading.Event()

    def tap(name: str, arguments: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        if name == "write" and full.is_set():
            raise StorageError("No space left on device", errno=28)
        return call()

    def collect() -> None:
        storage: Any = Tapped(disk.storage(), tap)
        with open_writer(storage) as writer:
            writer.append(trajectory(0), seed=0)
            writer.commit()
            writer.append(trajectory(1), seed=1)
            full.set()
            raise KeyError("the simulator broke")

    with pytest.raises(KeyError), pytest.warns(UserWarning, match="1 trajectories are not stored: No space"):
        collect()
    assert recover(disk.storage()) == State((rows_of(0),))


def test_a_commit_is_made_though_the_arrays_own_metadata_cannot_be() -> None:
    """They may lag; the commit is durable, and the caller must not be told otherwise."""
    disk = Disk()

    def tap(name: str, arguments: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        if name == "rename" and str(arguments[1]).endswith("/zarr.json"):
            raise StorageError("Input/output error", errno=5)
        return call()

    storage: Any = Tapped(disk.storage(), tap)
    writer = open_writer(storage)
    writer.append(trajectory(0), seed=0)
    assert writer.commit() == 2
    assert recover(disk.storage()) == State((rows_of(0),))
    writer.abandon()
