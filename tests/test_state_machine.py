"""Hypothesis against a model: whatever is done in whatever order, a store holds what a list in memory would."""

from __future__ import annotations

import importlib.util
import itertools
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import trajstore
from tests.campaign import share
from tests.campaign.disk import ABOVE, STORE, Disk, MemoryStorage
from tests.campaign.images import Replay
from tests.campaign.workload import State, open_writer, recover, room, rows_of, state_of, tiny_shards, trajectory
from trajstore.errors import AlreadyExistsError, LockedError, NotFoundError
from trajstore.operations.compact import compact
from trajstore.operations.merge import merge
from trajstore.operations.split import split
from trajstore.operations.verify import verify

HDF5 = all(importlib.util.find_spec(name) is not None for name in ("h5py", "hdf5plugin"))
steps = 0


class StoreMachine(RuleBasedStateMachine):
    """A writer, a reader that holds an old snapshot, and power failures."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny = tiny_shards()
        self.tiny.__enter__()
        self.disk = Disk()
        self.writer: trajstore.Writer | None = None
        self.committed: list[tuple[int, int]] = []  # (id, seed)
        self.buffered: list[tuple[int, int]] = []
        self.gone: set[int] = set()  # seeds that may not come back
        self.attempted: set[int] = set()
        self.attempted_then: set[int] = set()
        self.state = self.state_then = 0
        self.next_seed = 0
        self.places = itertools.count()
        self.held: tuple[trajstore.Dataset, State] | None = None

    def teardown(self) -> None:
        if self.writer is not None:
            self.writer.abandon()
        self.tiny.__exit__(None, None, None)

    # -- the writer ----------------------------------------------------------------------------------------------------

    @initialize()
    def create(self) -> None:
        self.writer = open_writer(self.disk.storage(), unique="seed")
        self._made_durable()

    def _made_durable(self) -> None:
        self.committed += self.buffered
        self.buffered = []
        self.attempted_then = set(self.attempted)
        self.state_then = self.state

    def _dropped(self) -> None:
        self.buffered = []
        self.attempted = set(self.attempted_then)
        self.state = self.state_then
        self.writer = None

    @precondition(lambda self: self.writer is not None)
    @rule(count=st.integers(1, 6))
    def append(self, count: int) -> None:
        assert self.writer is not None
        for _ in range(count):
            seed, self.next_seed = self.next_seed, self.next_seed + 1
            number = self.writer.append(trajectory(seed), seed=seed)
            assert number is not None
            self.buffered.append((number, seed))
            self.attempted.add(seed)

    @precondition(lambda self: self.writer is not None)
    @rule(count=st.integers(1, 5))
    def append_many(self, count: int) -> None:
        assert self.writer is not None
        seeds = np.arange(self.next_seed, self.next_seed + count)
        self.next_seed += count
        rows = [trajectory(int(seed))["x"] for seed in seeds]
        numbers = self.writer.append_many({"x": np.concatenate(rows)}, lengths=[len(row) for row in rows], seed=seeds)
        self.buffered += list(zip(numbers.tolist(), seeds.tolist()))
        self.attempted |= set(seeds.tolist())

    @precondition(lambda self: self.writer is not None and (self.committed or self.buffered))
    @rule(data=st.data())
    def append_again(self, data: st.DataObject) -> None:
        assert self.writer is not None
        _, seed = data.draw(st.sampled_from(self.committed + self.buffered))
        assert self.writer.append(trajectory(seed), seed=seed) is None

    @precondition(lambda self: self.writer is not None)
    @rule(number=st.integers(0, 40))
    def mark_attempted(self, number: int) -> None:
        assert self.writer is not None
        self.writer.mark_attempted(1000 + number)
        self.attempted.add(1000 + number)

    @precondition(lambda self: self.writer is not None)
    @rule(value=st.integers(0, 99))
    def set_state(self, value: int) -> None:
        assert self.writer is not None
        self.writer.state["value"] = self.state = value

    @precondition(lambda self: self.writer is not None and self.committed)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        assert self.writer is not None
        chosen = data.draw(st.sampled_from(self.committed))
        self.writer.delete(chosen[0])
        self.writer.commit()
        self.committed.remove(chosen)
        self._made_durable()

    @precondition(lambda self: self.writer is not None)
    @rule()
    def commit(self) -> None:
        assert self.writer is not None
        self.writer.commit()
        self._made_durable()

    @precondition(lambda self: self.writer is not None)
    @rule()
    def close(self) -> None:
        assert self.writer is not None
        self.writer.close()
        self._made_durable()
        self.writer = None

    @precondition(lambda self: self.writer is not None)
    @rule()
    def second_writer(self) -> None:
        with pytest.raises(LockedError):
            open_writer(self.disk.storage(), resume=True)
        with pytest.raises(AlreadyExistsError):
            open_writer(self.disk.storage())

    @precondition(lambda self: self.writer is None)
    @rule()
    def resume(self) -> None:
        self.writer = open_writer(self.disk.storage(), resume=True)
        assert len(self.writer) >= len(self.committed)
        assert set(_all(self.writer.attempted)) == self.attempted
        assert self.writer.state.get("value", 0) == self.state

    # -- what happens to it --------------------------------------------------------------------------------------------

    @rule()
    def killed(self) -> None:
        if self.writer is not None:
            self.writer.abandon()
            self._dropped()

    @rule(data=st.data())
    def power_failure(self, data: st.DataObject) -> None:
        """Between two calls: any image of what is not synced."""
        if self.writer is not None:
            self.writer.abandon()
            self._dropped()
        *_, point = Replay(self.disk).points(getattr(self, "start", None))
        # One draw: how many the image itself needs depends on the order in which the writer's threads ran.
        draw = random.Random(data.draw(st.integers(0, 2**32)))
        image = next(iter(point.some(1, draw)))
        self.disk, self.start = image.disk(), image.disk()
        self.held = None

    # -- the reader ----------------------------------------------------------------------------------------------------

    @rule()
    def hold(self) -> None:
        dataset = trajstore.open(self.disk.storage())
        self.held = dataset, state_of(dataset)

    @precondition(lambda self: self.held is not None)
    @rule()
    def look_again(self) -> None:
        """A snapshot never changes, and a refresh is the present."""
        assert self.held is not None
        dataset, before = self.held
        assert state_of(dataset) == before
        dataset = dataset.refresh()
        assert state_of(dataset) == self._expected()
        self.held = dataset, self._expected()

    @precondition(lambda self: self.committed)
    @rule(data=st.data())
    def slices(self, data: st.DataObject) -> None:
        dataset = trajstore.open(self.disk.storage())
        seeds = [seed for _, seed in self.committed]
        start, stop = sorted((data.draw(st.integers(0, len(seeds))), data.draw(st.integers(0, len(seeds)))))
        assert dataset[start:stop].table["seed"].tolist() == seeds[start:stop]
        wanted = data.draw(st.sampled_from(seeds))
        found = dataset.where(f"seed == {wanted}")
        assert len(found) == 1 and found[0]["x"][:].tobytes() == rows_of(wanted)[1]
        with pytest.raises(NotFoundError):
            dataset[len(seeds)]

    def _expected(self) -> State:
        return State(tuple(rows_of(seed) for _, seed in self.committed))

    # -- whole stores --------------------------------------------------------------------------------------------------

    def _elsewhere(self) -> MemoryStorage:
        root = MemoryStorage(self.disk, f"made{next(self.places)}")
        root.make_root()
        return root

    @precondition(lambda self: self.committed)
    @rule(rewrite=st.booleans())
    def merged(self, rewrite: bool) -> None:
        root = self._elsewhere()
        merge([self.disk.storage()], (root, "new"), rewrite=rewrite)
        self._made(root.child("new"))

    @precondition(lambda self: len(self.committed) > 1)
    @rule(data=st.data())
    def split_in_two(self, data: st.DataObject) -> None:
        root, first = self._elsewhere(), data.draw(st.integers(1, len(self.committed) - 1))
        split(self.disk.storage(), (root, "new"), first=first)
        parts = [recover(root.child(f"new/{name}")) for name in ("first", "rest")]
        assert all(isinstance(part, State) for part in parts)
        assert State(parts[0].trajectories + parts[1].trajectories) == self._expected()  # type: ignore[union-attr]
        root.remove("")

    @precondition(lambda self: self.committed)
    @rule()
    def compacted(self) -> None:
        root = self._elsewhere()
        compact(self.disk.storage(), (root, "new"))
        self._made(root.child("new"))

    @precondition(lambda self: self.writer is None and self.committed)
    @rule()
    def replaced_by_a_compact_one(self) -> None:
        """What goes on is the new store."""
        root = self._elsewhere()
        compact(self.disk.storage(), (root, "new"))
        assert recover(root.child("new")) == self._expected()
        names = self.disk.folders
        made = self.disk.resolve(f"{root.root}/new")
        folder = self.disk.resolve(root.root)
        self.disk.names((ABOVE, STORE, made), (folder, "new", 0))
        self.disk.log.append(("syncdir", ABOVE))
        self.disk.log.append(("syncdir", folder))
        assert names[ABOVE][STORE] == made
        table = trajstore.open(self.disk.storage()).table
        self.committed = list(zip(table["id"].tolist(), table["seed"].tolist())) if self.committed else []
        self.held = None

    @rule(deep=st.booleans())
    def verified(self, deep: bool) -> None:
        assert verify(self.disk.storage(), deep=deep).ok

    @precondition(lambda self: HDF5 and self.committed)
    @rule()
    def through_hdf5(self) -> None:
        from trajstore.exporters.hdf5 import export_hdf5
        from trajstore.importers.hdf5 import import_hdf5

        with room() as folder:
            export_hdf5(trajstore.open(self.disk.storage()), folder / "out.h5")
            assert state_of(trajstore.open(folder / "out.h5")) == self._expected()
            import_hdf5(folder / "out.h5", folder / "back")
            assert state_of(trajstore.open(folder / "back")) == self._expected()

    def _made(self, storage: MemoryStorage) -> None:
        assert recover(storage) == self._expected()
        assert verify(storage, deep=True).ok
        storage.remove("")

    @invariant()
    def readers_see_the_last_commit(self) -> None:
        global steps
        steps += 1
        if self.disk.tree():
            assert recover(self.disk.storage()) == self._expected()


def _all(intervals: Any) -> list[int]:
    return [value for start, stop in intervals.pairs.tolist() for value in range(start, stop)]


@pytest.mark.parametrize("part", range(4))
def test_a_store_holds_what_a_list_would(part: int) -> None:
    global steps
    steps = 0
    machine = seed(4 * share.NUMBER + part)(type("Machine", (StoreMachine,), {}))
    chosen = settings(
        max_examples=36,
        stateful_step_count=30,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)
    share.count("state machine", {"steps": steps})
    assert steps > 600
