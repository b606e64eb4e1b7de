"""Many trajectories at once: the same store as one by one, and nothing taken of a batch that does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore import Column, Field
from trajstore.errors import QueueFullError, SchemaError


def rollouts(rng: np.random.Generator, count: int) -> tuple[np.ndarray, dict[str, Any]]:
    lengths = rng.integers(1, 9, count)
    steps = int(lengths.sum())
    return lengths, {
        "obs": {"state": rng.standard_normal((steps + count, 3)).astype(np.float32)},
        "action": rng.integers(0, 5, steps),
        "reward": rng.standard_normal(steps),
    }


def one_by_one(lengths: np.ndarray, fields: dict[str, Any]) -> list[dict[str, Any]]:
    stops = np.cumsum(lengths)
    return [
        {
            "obs": {"state": fields["obs"]["state"][a + i : b + i + 1]},
            "action": fields["action"][a:b],
            "reward": fields["reward"][a:b],
        }
        for i, (a, b) in enumerate(zip(stops - lengths, stops))
    ]


def test_a_batch_is_what_its_trajectories_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    with trajstore.create(tmp_path / "many") as many, trajstore.create(tmp_path / "one") as one:
        for first in range(0, 900, 300):
            lengths, fields = rollouts(rng, 300)
            ids = many.append_many(fields, lengths=lengths, env=np.arange(300), seed=first)
            assert ids.tolist() == list(range(first, first + 300))
            for i, trajectory in enumerate(one_by_one(lengths, fields)):
                one.append(trajectory, env=i, seed=first)
    a, b = trajstore.open(tmp_path / "many"), trajstore.open(tmp_path / "one")
    assert len(a) == len(b) == 900
    for name in ("id", "env", "seed"):
        np.testing.assert_array_equal(a.table[name], b.table[name])
    for i in (0, 1, 299, 300, 555, 899):
        for path in ("obs/state", "action", "reward"):
            np.testing.assert_array_equal(a[i][path], b[i][path])
    np.testing.assert_array_equal(a.lengths, b.lengths)
    assert a.schema.clocks[str(a.fields["obs/state"].clock)].relation == "last_row_extra"


def test_one_step_trajectories_keep_their_last_observation(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s") as writer:
        writer.append_many({"obs": np.arange(6), "reward": np.arange(3.0)}, lengths=[1, 1, 1])
    ds = trajstore.open(tmp_path / "s")
    assert [ds[i]["obs"][:].tolist() for i in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_a_stored_seed_is_taken_once(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s", unique="seed") as writer:
        first = writer.append_many({"x": np.arange(6)}, lengths=[1, 2, 3], seed=np.array([5, 6, 7]))
        second = writer.append_many({"x": np.arange(10)}, lengths=[1, 2, 3, 4], seed=np.array([8, 6, 9, 8]))
        third = writer.append_many({"x": np.arange(2)}, lengths=[1, 1], seed=np.array([5, 8]))
    assert (first.tolist(), second.tolist(), third.tolist()) == ([0, 1, 2], [3, -1, 4, -1], [-1, -1])
    ds = trajstore.open(tmp_path / "s")
    assert ds.table["seed"].tolist() == [5, 6, 7, 8, 9]
    assert ds[3]["x"][:].tolist() == [0]
    assert ds[4]["x"][:].tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("fields", "lengths", "columns", "says"),
    [
        ({"x": np.arange(5)}, [2, 2], {}, "5 rows, expected 4"),
        ({"x": np.arange(4.0)}, [2, 2], {}, "dtype float64, expected int64"),
        ({"x": np.zeros((4, 2), int)}, [2, 2], {}, "rows of shape"),
        ({"x": np.arange(2)}, [2, 0], {}, "no step"),
        ({"x": np.arange(4), "y": np.arange(4)}, [2, 2], {}, "unknown field or column 'y'"),
        ({}, [2, 2], {}, "'x' is missing"),
        ({"x": np.arange(4)}, [2, 2], {"k": np.arange(3)}, "shape"),
        ({"x": np.arange(4)}, [[2, 2]], {}, "not a list of counts"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_whole(
    tmp_path: Path, fields: Any, lengths: Any, columns: Any, says: str
) -> None:
    with trajstore.create(tmp_path / "s") as writer:
        writer.append_many({"x": np.arange(3)}, lengths=[1, 2])
        with pytest.raises(SchemaError, match=says):
            writer.append_many(fields, lengths=lengths, **columns)
        writer.append_many({"x": np.arange(3)}, lengths=[3])
    ds = trajstore.open(tmp_path / "s")
    assert [ds[i]["x"][:].tolist() for i in range(3)] == [[0], [1, 2], [0, 1, 2]]


def test_a_full_queue_refuses_the_whole_batch(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s", on_full="error", queue_bytes=1, commit_every=None) as writer:
        writer._ingest.budget.acquire(1, lambda: 0.0)
        with pytest.raises(QueueFullError):
            writer.append_many({"x": np.arange(4)}, lengths=[2, 2])
        writer._ingest.budget.release(1)
        assert len(writer) == 0


def test_parts_lie_under_a_plain_group(tmp_path: Path) -> None:
    root = tmp_path / "run"
    writers = [trajstore.create(root, part=f"rank{i}") for i in (0, 2, 10)]
    for i, writer in enumerate(writers):
        writer.append({"x": np.full(3, i)}, rank=i)
    writers[0].commit()
    assert len(trajstore.open(root)) == 1  # those that have committed nothing yet hold nothing
    for writer in writers:
        writer.close()
    assert trajstore.open(root).table["rank"].tolist() == [0, 1, 2]
    with trajstore.create(root, part="rank2", resume=True) as writer:
        assert len(writer) == 1
    with pytest.raises(trajstore.TrajstoreError, match="exists"):
        trajstore.create(root, part="rank2")
    with pytest.raises(trajstore.TrajstoreError, match="cannot hold parts"):
        trajstore.create(root / "rank2", part="inner")


def test_what_is_declared_later_counts(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s", fields={"x": Field("float32")}) as writer:
        with pytest.raises(SchemaError, match="'x' is declared"):
            writer.declare(fields={"x": Field("float64")})
        writer.declare(fields={"y": Field("uint8", (2,), clock="slow")}, columns={"level": Column("int8", default=-1)})
        writer.append({"x": [1.0, 2.0], "y": np.ones((1, 2), np.uint8)})
        with pytest.raises(SchemaError, match="'x' is declared"):
            writer.declare(fields={"x": Field("float16")})
        with pytest.raises(SchemaError, match="is new"):
            writer.declare(columns={"score": Column("float32")})
        writer.declare(columns={"score": Column("float32", default=0.5)})
        lengths = {"steps": [3, 1], "slow": [1, 2]}
        writer.append_many(
            {"x": np.zeros(4, np.float32), "y": np.zeros((3, 2), np.uint8)}, lengths=lengths, score=np.float32(2)
        )
    ds = trajstore.open(tmp_path / "s")
    assert ds.table["level"].tolist() == [-1, -1, -1]
    assert ds.table["score"].tolist() == [0.5, 2, 2]
    assert [len(ds[i]["y"]) for i in range(3)] == [1, 1, 2]
    assert ds.fields["x"].dtype == "float32"


def test_rows_without_lengths_are_refused_and_not_dropped(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s") as writer:
        assert len(writer.append_many({"x": np.zeros((0, 2))}, lengths=[])) == 0
        with pytest.raises(SchemaError, match="'x' has rows"):
            writer.append_many({"x": np.zeros((10, 2))}, lengths=[])
