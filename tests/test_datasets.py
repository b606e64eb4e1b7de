"""Splits, deletions, compactions, moves, derived columns and fields, and the lazy views that do the same."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore.engine.order import shuffled
from trajstore.engine.partition import partition
from trajstore.errors import AlreadyExistsError, ConflictError, CorruptionError, LockedError, NotFoundError, SchemaError
from trajstore.format import encoding
from trajstore.media.storage import LocalStorage
from trajstore.operations import move as moving
from trajstore.operations.compact import compact, plan_compact
from trajstore.operations.delete import delete, undelete
from trajstore.operations.derive import Advantages, ReturnsToGo, add_column, add_field, backward, each
from trajstore.operations.merge import merge
from trajstore.operations.move import move, remove_store
from trajstore.operations.split import plan_split, split
from trajstore.operations.verify import verify

COUNT = 40


@pytest.fixture(autouse=True, scope="module")
def small_shards() -> Iterator[pytest.MonkeyPatch]:
    sizes = {"_SHARD_ROWS": 16, "_NARROW_ROWS": 4, "_TABLE_CHUNK_ROWS": 4, "_TABLE_SHARD_ROWS": 32}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(encoding, name, value)
        yield patch


def steps_of(seed: int) -> int:
    return 1 + 5 * seed % 7


def rows_of(seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    steps = steps_of(seed)
    return {
        "image": draw.integers(1, 256, (steps, 8, 8), dtype=np.uint8),
        "reward": draw.normal(size=steps),
        "value": draw.normal(size=steps + 1),
        "done": np.arange(steps) == steps - 1 if seed % 2 else np.zeros(steps, np.bool_),
    }


def fill(path: Path, seeds: Any, **options: Any) -> None:
    with trajstore.create(path, handle_signals=False, commit_every=None, **options) as writer:
        for seed in seeds:
            writer.append(rows_of(seed), seed=seed, group=seed % 3, good=seed % 4 == 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small_shards: pytest.MonkeyPatch) -> Path:
    """A store of 40 trajectories, which nothing changes."""
    path = tmp_path_factory.mktemp("datasets") / "store"
    fill(path, range(COUNT))
    return path


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    shutil.copytree(made, tmp_path / "store")
    return tmp_path / "store"


def seeds_of(dataset: trajstore.Dataset) -> list[int]:
    """The seeds, after every row of each was compared."""
    for trajectory in dataset:
        for name, rows in rows_of(int(trajectory["seed"])).items():
            np.testing.assert_array_equal(trajectory[name][:], rows)
    seeds: list[int] = dataset.table["seed"].tolist()
    return seeds


# -- parts -------------------------------------------------------------------------------------------------------------


def test_every_trajectory_falls_into_one_part() -> None:
    values = np.array([3, 1, 3, 2, 1, 3, -4])
    assert {name: part.tolist() for name, part in partition(7, by=("k", values)).items()} == {
        "k.-4": [6], "k.1": [1, 4], "k.2": [3], "k.3": [0, 2, 5],
    }  # fmt: skip
    for rule in (
        {"first": 3},
        {"fractions": {"a": 0.5, "b": 0.2}},
        {"parts": 4},
        {"fractions": {"a": 1 / 3, "b": 2 / 3}},
    ):
        for seed in (None, 1):
            parts = partition(10, **rule, seed=seed)  # type: ignore[arg-type]
            assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(10))
    assert [len(part) for part in partition(10, parts=4).values()] == [3, 3, 2, 2], "the remainder goes to low ranks"
    assert list(partition(10, fractions={"a": 0.5, "b": 0.2})) == ["a", "b", "rest"]
    assert partition(5, first=2, seed=7)["first"].tolist() == sorted(shuffled(5, 7)[:2].tolist())
    bools = partition(2, by=("good", np.array([True, False])))
    assert list(bools) == ["good.false", "good.true"]


@pytest.mark.parametrize(
    "rule",
    [
        *({}, {"first": 1, "parts": 2}, {"first": 11}, {"first": -1}, {"parts": 0}, {"fractions": {}}),
        *({"fractions": {"a": 0.9, "b": 0.2}}, {"fractions": {"a": 0.0}}, {"fractions": {"rest": 0.5}}),
        *({"mask": np.ones(9, bool)}, {"mask": np.ones(10)}),  # neither is one bool a trajectory
    ],
)
def test_rules_that_cannot_be_followed(rule: dict[str, Any]) -> None:
    with pytest.raises(SchemaError):
        partition(10, **rule)


@pytest.mark.parametrize(
    "rule",
    [
        *({"first": 11}, {"fractions": {"train": 0.8, "test": 0.2}, "seed": 3}, {"where": "good"}),
        *({"by": "group"}, {"parts": 3}, {"mask": np.arange(COUNT) % 5 == 0}),
    ],
    ids=lambda rule: next(iter(rule)),
)
def test_a_split_writes_what_the_lazy_split_reads(made: Path, tmp_path: Path, rule: dict[str, Any]) -> None:
    dataset = trajstore.open(made)
    lazy = dataset.split(**rule)
    written = split(made, tmp_path / "parts", **rule)
    assert sorted(os.listdir(tmp_path / "parts")) == sorted([*lazy, "__trajstore"])
    assert sorted(seed for part in written.values() for seed in seeds_of(part)) == list(range(COUNT))
    for name, view in lazy.items():
        assert seeds_of(view) == seeds_of(written[name])
        assert written[name].table["id"].tolist() == view.table["id"].tolist(), "ids are kept"
    assert verify(tmp_path / "parts", deep=True).ok
    assert len(trajstore.open(tmp_path / "parts")) == COUNT
    assert os.listdir(tmp_path) == ["parts"]


@pytest.mark.parametrize("strict", [False, True])
def test_a_strict_part_holds_no_other_rows(made: Path, tmp_path: Path, strict: bool) -> None:
    planned = plan_split(made, first=COUNT // 2, strict=strict)
    assert planned["first"].summary()["linked_shards"] > 3
    split(made, tmp_path / "parts", first=COUNT // 2, strict=strict)
    part = trajstore.open(tmp_path / "parts" / "first")
    reader = part.snapshots[0].reader("steps/image")
    reader._strict = False
    chunks = [number for number in range(64) if reader.has_chunk(number)]
    size = reader.layout.chunk_rows
    reader.rows = 64 * size
    foreign = 0
    pairs = part.pairs("steps")
    for number in chunks:
        rows = np.arange(number * size, (number + 1) * size)
        named = ((rows[:, None] >= pairs[:, 0]) & (rows[:, None] < pairs[:, 1])).any(axis=1)
        foreign += int(reader.take(rows)[~named].any(axis=(1, 2)).sum())
    assert (foreign == 0) == strict, "pixels are never 0, and gaps are"


def test_splits_are_refused_as_merges_are(made: Path, tmp_path: Path) -> None:
    with pytest.raises(AlreadyExistsError):
        split(made, made, first=3)
    with pytest.raises(SchemaError, match="exactly one rule"):
        split(made, tmp_path / "parts")
    with pytest.raises(SchemaError, match="cannot name a part"):
        split(made, tmp_path / "parts", fractions={"a/b": 0.5})
    assert not os.listdir(tmp_path)


# -- views -------------------------------------------------------------------------------------------------------------


def test_datasets_added_read_as_one(made: Path, tmp_path: Path) -> None:
    fill(tmp_path / "more", range(100, 110))
    one, other = trajstore.open(made), trajstore.open(tmp_path / "more")
    both = one[::2] + other + one.where("group == 1")
    expected = [*range(0, COUNT, 2), *range(100, 110), *range(1, COUNT, 3)]
    assert seeds_of(both) == expected
    assert seeds_of(both[::-1].where("seed < 9")) == [seed for seed in expected[::-1] if seed < 9]
    assert seeds_of(pickle.loads(pickle.dumps(both))) == expected
    assert both.lengths.tolist() == [steps_of(seed) for seed in expected]
    np.testing.assert_array_equal(both.read("reward"), np.concatenate([rows_of(seed)["reward"] for seed in expected]))
    assert len(both.refresh()) == len(expected)
    assert seeds_of(merge(both[:30], tmp_path / "merged")) == expected[:30]


def test_a_column_that_a_part_lacks_reads_as_its_filling(made: Path, tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "plain", handle_signals=False) as writer:
        writer.append(rows_of(7), seed=7, score=1.5)
    both = trajstore.open(made) + trajstore.open(tmp_path / "plain")
    assert np.isnan(both.table["score"][:COUNT]).all() and both.table["score"][-1] == 1.5
    with pytest.raises(SchemaError, match="no column 'group'"):
        both.column("group")


# -- deletions ---------------------------------------------------------------------------------------------------------


def test_deleted_trajectories_come_back(store: Path) -> None:
    assert delete(store, where="group == 1") == 13
    assert delete(store, ids=[0, 3]) == 2
    left = [seed for seed in range(COUNT) if seed % 3 != 1 and seed not in (0, 3)]
    dataset = trajstore.open(store)
    assert seeds_of(dataset) == left and dataset.snapshots[0].manifest.features == ["deleted"]
    assert seeds_of(dataset.deleted) == [seed for seed in range(COUNT) if seed not in left]
    assert delete(store, where="group == 1") == 0
    with pytest.raises(NotFoundError, match="no trajectory 3, 400"):
        delete(store, ids=[3, 400])
    assert undelete(store, ids=[3]) == 1 and undelete(store, where="seed < 10") == 4
    assert undelete(store, everything=True) == 10
    assert seeds_of(trajstore.open(store)) == list(range(COUNT))
    for bad in ({}, {"where": "good", "ids": [1]}):
        with pytest.raises(SchemaError):
            delete(store, **bad)  # type: ignore[arg-type]
    assert verify(store, deep=True).ok


def test_deletion_and_collecting_take_turns(store: Path) -> None:
    with trajstore.create(store, resume=True, handle_signals=False), pytest.raises(LockedError):
        delete(store, ids=[1])
    delete(store, ids=[1])
    fill(store, [50], resume=True)
    assert seeds_of(trajstore.open(store)) == [0, *range(2, COUNT), 50]


def test_many_scattered_deletions(tmp_path: Path, small_shards: pytest.MonkeyPatch) -> None:
    with trajstore.create(tmp_path / "s", handle_signals=False) as writer:
        for seed in range(2500):
            writer.append({"x": np.zeros(1, np.int8)}, seed=seed)
    assert delete(tmp_path / "s", where="seed % 2 == 1") == 1250
    dataset = trajstore.open(tmp_path / "s")
    assert dataset.table["seed"].tolist() == list(range(0, 2500, 2))
    assert dataset.snapshots[0].manifest.features == ["deleted", "sets"]


# -- compaction --------------------------------------------------------------------------------------------------------


def test_a_compacted_store_has_no_gaps_and_no_deleted_rows(store: Path, tmp_path: Path) -> None:
    fill(store, range(COUNT, COUNT + 5), resume=True)
    delete(store, where="good")
    left = [seed for seed in range(COUNT + 5) if seed % 4]
    compacted = compact(store, tmp_path / "cold", shard_bytes=4096, chunk_bytes=512)
    assert seeds_of(compacted) == left and compacted.table["id"].tolist() == left
    assert compacted.pairs("steps")[-1, 1] == compacted.lengths.sum() == compacted.steps["reward"].shape[0]
    assert len(compacted.deleted) == 0 and verify(tmp_path / "cold", deep=True).ok
    layout = compacted.snapshots[0].manifest.arrays["steps/image"][0]
    assert (layout.chunk_rows, layout.shard_rows, layout.codec.clevel) == (8, 64, encoding.PROFILES["small"].clevel)
    fill(tmp_path / "cold", [77], resume=True)
    assert trajstore.open(tmp_path / "cold").table["id"][-1] == COUNT + 5, "ids go on"
    with pytest.raises(SchemaError, match="chunks of 9"):
        plan_compact(store, chunk_bytes=9, shard_bytes=3)


def test_compacted_stores_are_merged_by_links(made: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        compact(made, tmp_path / "cold" / name, shard_bytes=2048, chunk_bytes=512)
    merged = merge(tmp_path / "cold", tmp_path / "all")
    assert seeds_of(merged) == [*range(COUNT), *range(COUNT)]
    shared = [f for f in (tmp_path / "all" / "steps" / "image").glob("c.*") if f.stat().st_nlink == 2]
    assert shared


# -- derived columns and fields ----------------------------------------------------------------------------------------


def test_columns_are_added(store: Path) -> None:
    delete(store, ids=[4])
    live = [seed for seed in range(COUNT) if seed != 4]
    add_column(store, "short", "length < 4")
    add_column(store, "ratio", "seed / length")
    add_column(store, "total", lambda t: float(t["reward"][:].sum()), default=float("nan"))
    add_column(store, "rank", np.arange(COUNT - 1, dtype=np.int32))
    dataset = trajstore.open(store)
    assert seeds_of(dataset) == live
    assert dataset.table["short"].tolist() == [steps_of(seed) < 4 for seed in live]
    np.testing.assert_allclose(dataset.table["ratio"], [seed / steps_of(seed) for seed in live])
    np.testing.assert_allclose(dataset.table["total"], [rows_of(seed)["reward"].sum() for seed in live])
    assert dataset.columns["rank"].dtype == "int32" and dataset.table["rank"].tolist() == list(range(COUNT - 1))
    undelete(store, ids=[4])
    assert bool(trajstore.open(store)[4]["short"]) == (steps_of(4) < 4), "deleted ones have values too"
    with trajstore.create(store, resume=True, handle_signals=False) as writer:
        writer.append(rows_of(90), seed=90, group=0, good=True, short=True, ratio=1.0, rank=3)
    assert np.isnan(trajstore.open(store)[-1]["total"])
    assert verify(store, deep=True).ok


@pytest.mark.parametrize(
    ("name", "values", "error", "message"),
    [
        ("group", "length > 1", AlreadyExistsError, "'group'"),
        ("reward", "length > 1", AlreadyExistsError, "'reward'"),
        ("new", [1, 2], SchemaError, "takes"),
        ("new", ["a"] * COUNT, SchemaError, "numbers or bools"),
        ("new", "height > 1", NotFoundError, "'height'"),
        ("a b", "length > 1", SchemaError, "cannot name a column"),
    ],
)
def test_columns_that_are_refused(store: Path, name: str, values: Any, error: type[Exception], message: str) -> None:
    before = trajstore.open(store).snapshots[0].manifest.commit.number
    with pytest.raises(error, match=message):
        add_column(store, name, values)
    with pytest.raises(SchemaError, match="cannot hold"):
        add_column(store, "small", np.arange(COUNT) + 1000, dtype="int8")
    for values in (np.full(COUNT, np.nan), np.full(COUNT, 0.5), np.full(COUNT, 1e20)):
        with pytest.raises(SchemaError, match="column 'whole' has values that int64 cannot hold"):
            add_column(store, "whole", values, dtype="int64")
    assert trajstore.open(store).snapshots[0].manifest.commit.number == before


def slow_returns(rewards: np.ndarray[Any, Any], discount: float) -> np.ndarray[Any, Any]:
    out = np.zeros_like(rewards)
    later = 0.0
    for t in reversed(range(len(rewards))):
        later = out[t] = rewards[t] + discount * later
    return out


def slow_advantages(rows: dict[str, Any], gamma: float, lam: float) -> np.ndarray[Any, Any]:
    out = np.zeros(len(rows["reward"]))
    later = 0.0
    for t in reversed(range(len(out))):
        goes_on = 0.0 if rows["done"][t] else 1.0
        delta = rows["reward"][t] + gamma * goes_on * rows["value"][t + 1] - rows["value"][t]
        later = out[t] = delta + gamma * lam * goes_on * later
    return out


def test_fields_are_derived(store: Path) -> None:
    fill(store, range(COUNT, COUNT + 4), resume=True)
    delete(store, ids=[7])
    add_field(store, "to_go", ReturnsToGo(discount=0.9), like="reward")
    add_field(store, "stats/gae", Advantages(terminated="done", discount=0.97, decay=0.9), like="reward")
    add_field(store, "mean", each(lambda t: t["image"][:].mean(axis=(1, 2))), like="image", dtype="float32")
    undelete(store, everything=True)
    dataset = trajstore.open(store)
    assert seeds_of(dataset) == list(range(COUNT + 4))
    for seed, trajectory in enumerate(dataset):
        rows = rows_of(seed)
        np.testing.assert_allclose(trajectory["to_go"][:], slow_returns(rows["reward"], 0.9))
        np.testing.assert_allclose(trajectory["stats/gae"][:], slow_advantages(rows, 0.97, 0.9))
        np.testing.assert_array_equal(trajectory["mean"][:], rows["image"].mean(axis=(1, 2)).astype(np.float32))
    assert dataset.fields["to_go"].clock == "steps" and verify(store, deep=True).ok
    with trajstore.create(store, resume=True, handle_signals=False) as writer:
        late = rows_of(99)
        late |= {"to_go": late["reward"], "stats": {"gae": late["reward"]}, "mean": None}
        writer.append(late, seed=99, group=0, good=True)
    last = trajstore.open(store)[-1]
    assert last["mean"] is None and len(last["to_go"]) == steps_of(99)
    with pytest.raises(NotFoundError, match="no field 'nope'"):
        add_field(store, "other", ReturnsToGo("nope"), like="nope")
    with pytest.raises(SchemaError, match="computed with the shape"):
        add_field(store, "other", lambda dataset, numbers: np.zeros(3), like="reward", dtype="float64", shape=())
    bright = each(lambda t: np.full(len(t["reward"]), 300.5))
    with pytest.raises(SchemaError, match="field 'other' has values that uint8 cannot hold"):
        add_field(store, "other", bright, like="reward", dtype="uint8")
    with pytest.raises(SchemaError, match="cannot be computed as bfloat16"):
        add_field(store, "other", bright, like="reward", dtype="bfloat16")


def test_backward_sums_stay_within_their_runs() -> None:
    counts = np.array([1, 0, 4, 2])
    values = np.arange(7.0)
    expected = np.concatenate([slow_returns(part, 0.5) for part in np.split(values, [1, 1, 5])])
    np.testing.assert_allclose(backward(values, counts, np.full(7, 0.5)), expected)
    wide = np.stack((values, -values), axis=1).astype(np.float32)
    np.testing.assert_allclose(backward(wide, counts, np.full(7, 0.5)), np.stack((expected, -expected), axis=1))
    assert backward(np.zeros(0), np.zeros(0, np.int64), np.zeros(0)).shape == (0,)


# -- moves -------------------------------------------------------------------------------------------------------------


def test_a_move_removes_what_it_has_verified(store: Path, tmp_path: Path) -> None:
    fill(tmp_path / "other", range(100, 105))
    moved = move([store, tmp_path / "other"], tmp_path / "all")
    assert seeds_of(moved) == [*range(COUNT), *range(100, 105)]
    assert os.listdir(tmp_path) == ["all"]
    assert verify(tmp_path / "all", deep=True).ok


def test_a_move_that_was_killed_goes_on(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "other", range(100, 105))
    sources = [store, tmp_path / "other"]
    removed: list[str] = []

    def die(snapshot: Any) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(snapshot.place)
        remove_store(snapshot)

    monkeypatch.setattr(moving, "remove_store", die)
    with pytest.raises(KeyboardInterrupt):
        move(sources, tmp_path / "all")
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["all", "other"]
    with pytest.raises(AlreadyExistsError):
        merge(sources[1], tmp_path / "all")
    assert seeds_of(move(sources, tmp_path / "all")) == [*range(COUNT), *range(100, 105)]
    assert os.listdir(tmp_path) == ["all"]


def test_moves_that_would_lose_something_are_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="leaves some out"):
        move(store, tmp_path / "all", where="good")
    with pytest.raises(SchemaError, match="not a selection"):
        move(trajstore.open(store)[:3], tmp_path / "all")
    delete(store, ids=[1])
    with pytest.raises(SchemaError, match="compact it first"):
        move(store, tmp_path / "all")
    undelete(store, everything=True)
    (tmp_path / "all").mkdir()
    fill(tmp_path / "all" / "x", [1])
    with pytest.raises(AlreadyExistsError, match="is not in it"):
        move(store, tmp_path / "all")
    snapshot = trajstore.open(store).snapshots[0]
    fill(store, [70], resume=True)
    with pytest.raises(ConflictError, match="written to since"):
        remove_store(snapshot)
    assert len(trajstore.open(store)) == COUNT + 1


def test_a_move_whose_result_does_not_verify_removes_nothing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = moving.merge

    def damaging(sources: Any, destination: Path, **options: Any) -> trajstore.Dataset:
        merged = original(sources, destination, link=False, **options)
        shard = next((destination / "steps" / "image").glob("c.*"))
        data = bytearray(shard.read_bytes())
        data[3] ^= 1
        shard.write_bytes(data)
        return merged

    monkeypatch.setattr(moving, "merge", damaging)
    with pytest.raises(CorruptionError, match="no source was removed"):
        move(store, tmp_path / "all")
    assert seeds_of(trajstore.open(store)) == list(range(COUNT))


def test_two_at_once_do_not_build_the_same_destination(made: Path, tmp_path: Path) -> None:
    from trajstore.operations.assembly import Scaffold

    with Scaffold((LocalStorage(tmp_path), "all")), pytest.raises(LockedError):
        merge(made, tmp_path / "all")
    assert seeds_of(merge(made, tmp_path / "all")) == list(range(COUNT))
