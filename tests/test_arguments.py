"""Declarations and arguments that mean nothing: refused where they are given, before anything is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore.checkpoint import Checkpoints
from trajstore.collect.seeds import split_seeds
from trajstore.errors import SchemaError
from trajstore.exporters.flat import export_flat
from trajstore.format.layout import Codec
from trajstore.operations.compact import compact
from trajstore.operations.delete import delete
from trajstore.operations.merge import merge


@pytest.mark.parametrize(
    "given",
    [
        *({"commit_every": every} for every in ("10", 0, -1, float("nan"))),
        *({name: value} for name in ("commit_trajectories", "commit_bytes") for value in ("x", 0, -1, 1.5)),
        *({name: value} for name in ("queue_bytes", "threads") for value in ("1G", -1, 2.5)),
        *({name: [1]} for name in ("fields", "clocks", "columns")),
        *({"fields": {"x": "float32"}}, {"clocks": {"x": 5}}, {"columns": {"x": "int64"}}),
        *(
            {"fields": {name: trajstore.Field("float32")}}
            for name in ("zarr.json", "a/zarr.json", "tmp.a", "ZARR.json")
        ),
        *({"columns": {name: trajstore.Column("int64")}} for name in ("zarr.json", "tmp.a")),
        *({"part": "tmp.0"}, {"part": "zarr.json"}),
    ],
    ids=str,
)
def test_a_store_is_not_made(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(SchemaError):
        trajstore.create(tmp_path / "s", **given)
    assert not (tmp_path / "s").exists()


def test_a_timer_that_never_ends_is_none(tmp_path: Path) -> None:
    for every in (float("inf"), 1e300):
        with trajstore.create(tmp_path / "s", commit_every=every, commit_trajectories=1, resume=True) as writer:
            writer.append({"x": [1]})
    assert len(trajstore.open(tmp_path / "s")) == 2


@pytest.mark.parametrize(
    ("dtype", "default"),
    [("int8", 300), ("int64", float("nan")), ("int64", 1.5), ("int64", "1"), ("bool", 1), ("float32", True)],
)
def test_a_default_that_its_column_cannot_hold(dtype: str, default: Any) -> None:
    with pytest.raises(SchemaError, match="cannot have the default"):
        trajstore.Column(dtype, default)
    assert trajstore.Column("int8", np.int64(3)).default == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [5, "ab", None, (1.5,), ([1],), (-1,)])
def test_what_is_no_shape(shape: Any) -> None:
    with pytest.raises(SchemaError, match="cannot have the shape"):
        trajstore.Field("float32", shape)


@pytest.mark.parametrize("rate", [0, -1, "2", 1.5])
def test_what_is_no_rate(rate: Any) -> None:
    with pytest.raises(SchemaError, match="ticks a step"):
        trajstore.Clock("rate", rate=rate)


def test_one_file_of_a_configuration_may_be_its_path_alone(tmp_path: Path) -> None:
    policy = tmp_path / "policy.pt"
    policy.write_bytes(b"weights")
    trajstore.create(tmp_path / "s", files=str(policy)).close()
    trajstore.create(tmp_path / "s", files=[policy], resume=True).close()


def test_a_name_that_is_taken_says_by_what(tmp_path: Path) -> None:
    field, column = {"env": trajstore.Field("int64")}, {"env": trajstore.Column("int64")}
    with pytest.raises(SchemaError, match="'env' is both a field and a column"):
        trajstore.create(tmp_path / "s", fields=field, columns=column)
    with trajstore.create(tmp_path / "s") as writer, pytest.raises(SchemaError, match="seeds come from a range"):
        next(writer.seeds([3, 4]))  # type: ignore[arg-type]


def test_an_array_with_masked_values_is_refused(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s") as writer, pytest.raises(SchemaError, match="'x' is a masked array"):
        writer.append({"x": np.ma.array([1.0, 2.0], mask=[False, True])})


def test_tensors_that_numpy_cannot_hold_are_named(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    ones = torch.ones(3)
    with trajstore.create(tmp_path / "s") as writer:
        for value in (torch.ones(3, device="meta"), ones.to(torch.float8_e4m3fn), [ones.to(torch.bfloat16)] * 2):
            with pytest.raises(SchemaError, match="field 'x'"):
                writer.append({"x": value})
        writer.append({"x": [ones, ones]})
    assert trajstore.open(tmp_path / "s")[0]["x"].shape == (2, 3)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with trajstore.create(tmp_path / "store") as writer:
        for seed in range(3):
            writer.append({"obs": np.full((4, 2), seed, np.float32)}, seed=seed)
    return tmp_path / "store"


@pytest.mark.parametrize("value", [b"bytes", Path("a/path")])
def test_a_value_that_is_no_column_says_what_would_be(store: Path, value: Any) -> None:
    with trajstore.create(store.parent / "s") as writer, pytest.raises(SchemaError, match="neither a column nor a"):
        writer.append({"obs": np.zeros((4, 2), np.float32)}, note=value)


def test_one_field_may_be_given_by_its_name_alone(store: Path) -> None:
    (batch,) = trajstore.open(store).batches(3, fields="obs")
    assert batch["obs"].shape == (3, 4, 2)
    assert export_flat(trajstore.open(store), store.parent / "flat.npz", fields="obs").trajectories == 3


def test_a_store_is_not_written_inside_one_that_is_read(store: Path) -> None:
    before = sorted(store.rglob("*"))
    with pytest.raises(SchemaError, match="lies inside"):
        merge(store, store / "inside")
    assert sorted(store.rglob("*")) == before


def test_a_shard_of_more_chunks_than_can_be_indexed_is_refused(store: Path) -> None:
    with pytest.raises(SchemaError, match="hold more than 65536 chunks"):
        compact(store, store.parent / "compact", shard_bytes=10**18)


def test_a_batch_that_the_samples_cannot_fill(store: Path) -> None:
    pytest.importorskip("torch")
    from trajstore.torch import Loader, StepDataset

    samples = StepDataset(trajstore.open(store))
    with pytest.raises(SchemaError, match="12 samples do not fill one batch of 13"):
        Loader(samples, batch_size=13)
    assert [len(batch["obs"]) for batch in Loader(samples, batch_size=13, drop_last=False)] == [12]


def test_what_takes_no_state_is_refused(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "c") as ckpts:
        ckpts.save(1, {"weights": np.ones(3)})
        for into in (5, "weights"):
            with pytest.raises(SchemaError, match="takes no state"):
                ckpts.restore(into=into)
        weights = np.zeros(3)
        ckpts.restore(into={"weights": weights})
    assert weights.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("clock", "good", "bad"),
    [(trajstore.Clock("rate", 2), 8, (7, 4, 0)), (trajstore.Clock("last_row_extra"), 5, (4, 6, 0))],
    ids=str,
)
def test_rows_that_break_the_relation_of_their_clock(
    tmp_path: Path, clock: trajstore.Clock, good: int, bad: tuple[int, ...]
) -> None:
    fields = {"depth": trajstore.Field("float32", clock="depth")}
    clocks = {"steps": trajstore.Clock("main"), "depth": clock}

    def steps(rows: int) -> dict[str, Any]:
        return {"action": np.zeros(4, np.int64), "depth": np.zeros(rows, np.float32)}

    with trajstore.create(tmp_path / "s", fields=fields, clocks=clocks) as writer:
        for rows in bad:
            with pytest.raises(SchemaError, match=rf"'depth' has {rows} rows beside 4 steps, expected {good}"):
                writer.append(steps(rows))
        writer.append(steps(good))
    with trajstore.create(tmp_path / "s", resume=True) as writer:  # what was declared is in the store
        for rows in bad:
            with pytest.raises(SchemaError, match="beside 4 steps"):
                writer.append(steps(rows))
            with pytest.raises(SchemaError, match="beside 4 steps"):
                writer.append_many(steps(rows), lengths={"steps": [4], "depth": [rows]})
        assert len(writer) == 1
        writer.split_clock("depth")  # the way out that the error names
        writer.append(steps(bad[0]))
    assert [len(one["depth"]) for one in trajstore.open(tmp_path / "s")] == [good, bad[0]]


def test_one_clock_is_the_main_one(tmp_path: Path) -> None:
    for clocks in ({"steps": trajstore.Clock("rate", 2)}, {"depth": trajstore.Clock("main")}):
        with pytest.raises(SchemaError, match="'steps' is the main clock"):
            trajstore.create(tmp_path / "s", clocks=clocks)


LOOP: dict[str, Any] = {}
LOOP["again"] = LOOP


@pytest.mark.parametrize(
    "key", [slice(None, None, 0), slice(1, "a"), slice(1.5, None), None, "obs", 1.5, [1, [2]], True, {}, ...], ids=str
)
def test_what_indexes_no_dataset(store: Path, key: Any) -> None:
    dataset = trajstore.open(store)
    with pytest.raises(SchemaError):
        dataset[key]
    if isinstance(key, slice):
        for rows in (dataset[0]["obs"], dataset.steps["obs"]):
            with pytest.raises(SchemaError):
                rows[key]


@pytest.mark.parametrize("key", ["obs", 1.5])
def test_what_indexes_no_rows(store: Path, key: Any) -> None:
    dataset = trajstore.open(store)
    for rows in (dataset[0]["obs"], dataset.steps["obs"]):
        with pytest.raises(SchemaError, match="chosen by integers"):
            rows[key]


@pytest.mark.parametrize(
    "call",
    [
        *(lambda ds, size=size: list(ds.batches(size)) for size in ("8", 1.5, 0, True)),
        *(lambda ds, fields=fields: list(ds.batches(2, fields=fields)) for fields in (5, [5])),
        *(lambda ds, first=first: ds.split(first=first) for first in ("1", 1.5, -1, 4)),
        *(lambda ds, parts=parts: ds.split(parts=parts) for parts in ("1", 0, 10**7)),
        *(lambda ds, shares=shares: ds.split(fractions=shares) for shares in (5, {"a": "b"}, {"a": float("nan")}, {})),
        *(lambda ds, size=size: trajstore.open(ds.snapshots[0].place, cache_bytes=size) for size in ("1G", -1)),
    ],
)
def test_what_a_dataset_cannot_do(store: Path, call: Any) -> None:
    with pytest.raises(SchemaError):
        call(trajstore.open(store))


def test_texts_make_no_batches(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s") as writer:
        writer.append({"x": [1.0]}, level="maze")
    with pytest.raises(SchemaError, match="'level' holds string, which makes no batch"):
        next(trajstore.open(tmp_path / "s").batches(1, fields="level"))


@pytest.mark.parametrize(
    "given",
    [
        *({"files": files} for files in (5, [5], [None])),
        *({"target": target} for target in ("10", -1, 1.5, True)),
        {"threads": 10**9},
        {"config": LOOP},
    ],
    ids=lambda given: "config" if "config" in given else str(given),
)
def test_what_nothing_is_collected_with(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(SchemaError):
        trajstore.create(tmp_path / "s", **given)


def test_settings_of_a_codec_are_numbers() -> None:
    for given in ({"clevel": "x"}, {"clevel": 10}, {"clevel": -1}, {"blocksize": "1M"}, {"blocksize": -1}):
        with pytest.raises(SchemaError, match="a whole number"):
            Codec("lz4", **given)


def test_what_a_writer_cannot_do_changes_nothing(store: Path) -> None:
    with trajstore.create(store, resume=True) as writer:
        for state in ([1], 5, "a", None, LOOP):
            with pytest.raises(SchemaError, match="the writer's state"):
                writer.state = state  # type: ignore[assignment]
        for ids in (0.0, [0.5], [True], "0", None, [[0]], 2**70, ["a"]):
            with pytest.raises(SchemaError, match="ids are whole numbers"):
                writer.delete(ids)  # type: ignore[arg-type]
        for seeds in (1.5, None, "a"):
            with pytest.raises(SchemaError):
                writer.mark_attempted(seeds)  # type: ignore[arg-type]
        for count in ("a", -1):
            with pytest.raises(SchemaError, match="a whole number"):
                writer.remaining_seeds(range(10), count)  # type: ignore[arg-type]
        with pytest.raises(SchemaError, match="contains itself"):
            writer.append({"obs": np.zeros((4, 2), np.float32), "more": LOOP}, seed=9)
        with pytest.raises(SchemaError, match="names are strings"):
            writer.append({"obs": {5: np.zeros((4, 2), np.float32)}}, seed=9)
    assert (len(trajstore.open(store)), len(writer.attempted)) == (3, 3)
    for ids in ([0.5], 0.0, [True], "0"):
        with pytest.raises(SchemaError, match="ids are whole numbers"):
            delete(store, ids=ids)  # type: ignore[arg-type]
    assert len(trajstore.open(store)) == 3


def test_seeds_are_shared_out_of_a_range() -> None:
    for given in ((5, 0, 1), (range(5), "a", 1), (range(5), 1, 1), (range(5), 0, 0), (range(5), -1, 2)):
        with pytest.raises(SchemaError):
            split_seeds(*given)  # type: ignore[arg-type]
