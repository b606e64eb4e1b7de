"""A writer that many threads use at once: what was taken is stored, once, and what it says is true."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

import trajstore
from tests.campaign.disk import Disk
from tests.campaign.workload import tiny_shards
from trajstore.dataset import open as open_dataset
from trajstore.errors import StateError

PATIENCE = 60.0


def together(*calls: Callable[[], None]) -> list[BaseException]:
    """Make these calls in threads that begin at one moment; what they raised."""
    raised: list[BaseException] = []
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], None]) -> None:
        try:
            barrier.wait(PATIENCE)
            call()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread waits for ever"
    return raised


def test_all_calls_from_many_threads_at_once() -> None:
    """Eight append, one by one and many at once, with fields that come late and go; others commit, delete, declare, ask
    and set; all of them until the store is closed under their hands."""
    disk = Disk()
    with tiny_shards():
        storage: Any = disk.storage()
        writer = trajstore.create(
            storage, unique="seed", commit_every=0.01, commit_trajectories=7, handle_signals=False
        )
        taken: dict[int, int] = {}  # id by seed
        deleted: set[int] = set()
        marked: set[int] = set()
        enough = threading.Event()

        def until_closed(call: Callable[[int], None]) -> Callable[[], None]:
            def run() -> None:
                for turn in range(10**9):
                    try:
                        call(turn)
                    except StateError:
                        return  # it is closed

            return run

        def appending(first: int) -> Callable[[int], None]:
            def append(turn: int) -> None:
                seed = first + 16 * turn
                late = np.full(2, seed) if turn % 5 == 3 else None
                split = None if turn % 11 == 7 else np.full(2, seed)
                number = writer.append({"x": np.full(2, seed), "late": late, "split": split}, seed=seed)
                assert number is not None
                taken[seed] = number
                again = writer.append({"x": np.zeros(2, np.int64), "late": None, "split": None}, seed=seed)
                assert again is None
                if len(taken) > 150 and turn > 7:  # "late" came, and "split" left its clock
                    enough.set()

            return append

        def appending_many(first: int) -> Callable[[int], None]:
            def append(turn: int) -> None:
                seeds = first + 16 * (3 * turn + np.arange(3))
                rows = np.repeat(seeds, 2)
                numbers = writer.append_many(
                    {"x": rows, "split": rows}, lengths={"steps": [2, 2, 2], "split": [2, 2, 2]}, seed=seeds
                )
                taken.update(zip(seeds.tolist(), numbers.tolist()))

            return append

        def delete(turn: int) -> None:
            chosen = [number for number in list(taken.values()) if number % 10 == 3 and number not in deleted]
            writer.delete(chosen[:2])
            deleted.update(chosen[:2])

        def ask(turn: int) -> None:
            completed = writer.completed
            assert not completed - writer.attempted
            assert len(writer) >= writer.committed and writer.steps >= 0
            writer.remaining_seeds(range(1000), 5)
            assert writer.stats["commits"] >= 1
            writer.target = 10_000 + turn
            writer.state["turn"] = turn
            writer.mark_attempted(100_001 + 2 * turn)
            marked.add(100_001 + 2 * turn)

        def close() -> None:
            assert enough.wait(PATIENCE)
            writer.close()

        # The first trajectory decides the clocks: "split" shares one with "x", and leaves it later.
        assert writer.append({"x": np.zeros(2, np.int64), "late": None, "split": np.zeros(2, np.int64)}, seed=0) == 0
        taken[0] = 0
        raised = together(
            *(until_closed(appending(first)) for first in range(1, 7)),
            *(until_closed(appending_many(first)) for first in (7, 8)),
            until_closed(lambda turn: writer.commit() and None),
            until_closed(delete),
            until_closed(ask),
            until_closed(
                lambda turn: (
                    writer.declare(columns={"score": trajstore.Column("float32", default=turn)})
                    if turn == 0
                    else writer.split_clock("split")
                )
            ),
            close,
            close,
        )
        assert raised == []
        ds = open_dataset(disk.storage())
        snapshot = ds.snapshots[0]
        found = dict(zip(ds.table["seed"].tolist(), ds.table["id"].tolist()))
        assert len(found) == len(ds) == len(set(found.values()))
        assert found == {seed: number for seed, number in taken.items() if number not in deleted}
        assert set(snapshot.set("completed")) == set(taken)
        assert set(snapshot.set("attempted")) == set(taken) | marked
        assert snapshot.manifest.counts["trajectories"] == len(taken) == writer.committed
        for trajectory in ds:
            seed = trajectory["seed"]
            assert all(
                rows is None or rows[:].tolist() == [seed] * 2
                for rows in (trajectory[name] for name in ("x", "late", "split"))
            )


def test_sources_that_come_and_go_at_once_are_all_asked() -> None:
    """One that was attached while another left was forgotten, and what it held was not in the next commit."""
    asked: list[int] = []

    class Held:
        def __init__(self, number: int) -> None:
            self.number = number

        def flush(self, timeout: float | None = None) -> bool:
            asked.append(self.number)
            return True

        def close(self) -> None: ...

        def abandon(self) -> None: ...

    with trajstore.create(Disk().storage(), commit_every=None, handle_signals=False) as writer:  # type: ignore[arg-type]

        def come_and_go(first: int) -> Callable[[], None]:
            def run() -> None:
                for number in range(first, first + 100):
                    passing = Held(-1)
                    writer.attach(passing)
                    writer.attach(Held(number))
                    writer.detach(passing)

            return run

        assert together(*(come_and_go(first) for first in range(0, 800, 100))) == []
        writer.commit()
    assert sorted(asked) == list(range(800))
