"""Deleting through a live writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import trajstore
from trajstore.engine.identity import Identity
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import NotFoundError
from trajstore.format.intervals import IntervalSet


def numbers(path: Path) -> list[int]:
    return [int(t["action"][0]) for t in trajstore.open(path)]


def test_deleted_trajectories_are_gone_with_the_next_commit(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with trajstore.create(path) as writer:
        for number in range(5):
            writer.append({"action": np.full(3, number)}, seed=number)
        writer.commit()
        writer.append({"action": np.full(3, 5)}, seed=5)
        writer.delete([1, 5])
        writer.delete(1)
        assert numbers(path) == [0, 1, 2, 3, 4]
        writer.commit()
        assert numbers(path) == [0, 2, 3, 4]
        for wrong in (6, -1):
            with pytest.raises(NotFoundError, match="no trajectory of the id"):
                writer.delete(wrong)
    with trajstore.create(path, resume=True) as writer:
        assert list(writer.remaining_seeds(range(7), 9)) == [6]
        assert writer.append({"action": np.full(3, 6)}, seed=6) == 6
        writer.delete(range(2, 4))
        writer.delete([6])
    assert numbers(path) == [0, 4]
    assert [t.id for t in trajstore.open(path)] == [0, 4]
    with trajstore.create(path, resume=True) as writer:
        writer.delete([4, 0])
        writer.append({"action": np.full(3, 7)}, seed=7)
    assert numbers(path) == [7]


def test_deleting_one_at_a_time_reads_no_more_than_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    with trajstore.create(path) as writer:
        writer.append_many({"action": np.arange(3000)}, lengths=np.ones(3000, np.int64))
    read: list[int] = []
    column = Snapshot.column

    def counting(self: Snapshot, name: str, rows: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        read.append(len(rows))
        return column(self, name, rows)

    monkeypatch.setattr(Snapshot, "column", counting)
    with trajstore.create(path, resume=True, commit_every=None) as writer:
        for number in range(0, 600, 2):
            writer.delete(number)
    assert sum(read) == 300
    monkeypatch.undo()
    assert numbers(path) == [*range(1, 600, 2), *range(600, 3000)]


class Jumbled:
    """A table whose ids are in no order, as merging leaves them."""

    place = "here"

    def __init__(self) -> None:
        self.ids = np.random.default_rng(0).permutation(1000)[:700]
        self.read = 0

    def column(self, name: str, rows: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        self.read += len(rows)
        return self.ids[rows]


def test_ids_in_no_order_are_read_once() -> None:
    table = Jumbled()
    identity = Identity(table, IntervalSet.span(0, 700))  # type: ignore[arg-type]
    for row, number in enumerate(table.ids.tolist()):
        assert identity.rows_of(np.array([number])).tolist() == [row]
    assert identity.rows_of(table.ids[::-1]).tolist() == list(range(700))[::-1]
    assert table.read <= 700 + 700 + 700
    missing = np.setdiff1d(np.arange(1000), table.ids)[[0]]
    with pytest.raises(NotFoundError, match=f"no trajectory of the id {missing[0]}"):
        identity.rows_of(missing)
