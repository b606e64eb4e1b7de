"""Merging: what is in the new store, which files it shares, what it says of itself, and what is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore.errors import AlreadyExistsError, CorruptionError, NotFoundError, SchemaError, StorageError
from trajstore.format import encoding
from trajstore.format.schema import Clock, Column
from trajstore.media import shardfile
from trajstore.media.storage import LocalStorage
from trajstore.operations import plan
from trajstore.operations.delete import delete
from trajstore.operations.merge import blueprint, choose, gather_sources, merge, plan_merge
from trajstore.operations.tasks import connected
from trajstore.operations.verify import verify

DATA = Path(__file__).parent / "data"
SMALL = {"_SHARD_ROWS": 16, "_NARROW_ROWS": 4, "_TABLE_CHUNK_ROWS": 4, "_TABLE_SHARD_ROWS": 32}
REAL = {name: getattr(encoding, name) for name in SMALL}
Model = list[dict[str, Any]]


@pytest.fixture(autouse=True, scope="module")
def small_shards() -> Iterator[pytest.MonkeyPatch]:
    """Shards of 16 rows, so that a few trajectories fill several."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(encoding, name, value)
        yield patch


def rollout(seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    steps = int(draw.integers(1, 9))
    return {
        "obs": {"image": draw.integers(0, 256, (steps + 1, 4, 4, 3), dtype=np.uint8)},
        "action": draw.normal(size=(steps, 2)).astype(np.float32),
        "reward": draw.normal(size=steps),
        "task": f"task {seed}",
    }


def collect(path: Any, seeds: Any, **options: Any) -> Model:
    """A store of one rollout for each seed; what it must hold."""
    model = []
    with trajstore.create(path, handle_signals=False, commit_every=None, **options) as writer:
        for seed in seeds:
            data = rollout(seed)
            note = None if seed % 3 else {"seed": seed}
            columns = {"seed": seed, "success": seed % 2 == 0, "score": float(seed % 5), "note": note}
            writer.append(data, **columns)
            model.append(
                {
                    "obs/image": data["obs"]["image"],
                    **{name: data[name] for name in ("action", "reward", "task")},
                    **columns,
                }
            )
    return model


def assert_holds(dataset: trajstore.Dataset, model: Model) -> None:
    assert len(dataset) == len(model)
    for trajectory, expected in zip(dataset, model):
        for name, value in expected.items():
            found = trajectory[name]
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(found[:], value)
                assert found.dtype == value.dtype
            else:
                assert found == value, name


def shards(path: Path) -> dict[str, os.stat_result]:
    return {str(file.relative_to(path)): file.stat() for file in sorted(path.rglob("c.*"))}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, small_shards: pytest.MonkeyPatch) -> tuple[Path, list[Model]]:
    """Stores rank_0, 1, 2 and 10 of a folder, each collected in two sessions; nothing changes them."""
    folder = tmp_path_factory.mktemp("merge") / "ranks"
    models = []
    for rank in (0, 1, 2, 10):
        path = folder / f"rank_{rank}"
        first = collect(path, range(100 * rank, 100 * rank + 12))
        models.append(first + collect(path, range(100 * rank + 12, 100 * rank + 21), resume=True))
    return folder, models


# -- what is in it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"link": False}, {"rewrite": True}, {"rewrite": True, "codec": "small"}])
def test_a_merge_holds_what_its_sources_hold(
    ranks: tuple[Path, list[Model]], tmp_path: Path, options: dict[str, Any]
) -> None:
    folder, models = ranks
    before = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in shards(folder).items()}
    merged = merge(folder, tmp_path / "all", **options)
    assert_holds(merged, [expected for model in models for expected in model])
    assert merged.table["id"].tolist() == list(range(84))
    assert verify(tmp_path / "all", deep=True).ok
    assert before == {name: (stat.st_size, stat.st_mtime_ns) for name, stat in shards(folder).items()}
    assert os.listdir(tmp_path) == ["all"], "nothing is left beside it"


def test_files_are_linked_copied_or_made_as_planned(ranks: tuple[Path, list[Model]], tmp_path: Path) -> None:
    planned = plan_merge(ranks[0])
    fields = planned.summary()["fields"]
    assert fields["obs/image"]["linked_shards"] > 10 and fields["action"]["linked_shards"] > 5
    planned.write(tmp_path / "linked")
    there = {stat.st_ino for stat in shards(ranks[0]).values()}
    shared = [name for name, stat in shards(tmp_path / "linked").items() if stat.st_ino in there]
    assert len(shared) == planned.summary()["linked_shards"] == len(planned.plan.linked)
    planned.write(tmp_path / "copied", link=False)
    assert {stat.st_nlink for stat in shards(tmp_path / "copied").values()} == {1}
    same = {name: (tmp_path / "copied" / name).read_bytes() for name in shared}
    assert same == {name: (tmp_path / "linked" / name).read_bytes() for name in shared}


def test_files_are_copied_where_the_disk_makes_no_links(
    ranks: tuple[Path, list[Model]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise StorageError("no links on this disk", errno=18)

    monkeypatch.setattr(LocalStorage, "link_from", refuse)
    assert_holds(merge(ranks[0], tmp_path / "all"), [expected for model in ranks[1] for expected in model])


@pytest.mark.parametrize("order", ["source", "-seed"])
def test_chunks_that_keep_their_borders_are_moved(
    ranks: tuple[Path, list[Model]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    model = sorted((e for model in ranks[1] for e in model), key=lambda e: e["seed"] * (-1 if order == "-seed" else 1))
    encoded: list[int] = []
    encode = shardfile.encode_frame
    monkeypatch.setattr(shardfile, "encode_frame", lambda rows, codec: encoded.append(1) or encode(rows, codec))
    monkeypatch.setattr(plan, "_LONG", 1)
    counts = []
    for name, codec in (("moved", None), ("encoded", "balanced")):
        encoded.clear()
        assert_holds(merge(ranks[0], tmp_path / name, order=order, rewrite=True, codec=codec), model)
        assert verify(tmp_path / name, deep=True).ok
        counts.append(len(encoded))
    assert counts[0] < (0.75 if order == "source" else 1) * counts[1]


def test_a_merged_store_goes_on_and_is_merged_again(ranks: tuple[Path, list[Model]], tmp_path: Path) -> None:
    merge(ranks[0], tmp_path / "all")
    model = [expected for model in ranks[1] for expected in model]
    model += collect(tmp_path / "all", range(2000, 2012), resume=True)
    more = collect(tmp_path / "more", range(3000, 3005))
    merged = merge([tmp_path / "all", tmp_path / "more"], tmp_path / "again")
    assert_holds(trajstore.open(tmp_path / "all"), model)
    assert_holds(merged, model + more)
    assert verify(tmp_path / "again", deep=True).ok
    origins = merged.snapshots[0].manifest.attributes["trajstore_sources"]
    places = [Path(origins[number]["place"]).name for number in merged.table["source"]]
    assert (
        places == ["rank_0"] * 21 + ["rank_1"] * 21 + ["rank_2"] * 21 + ["rank_10"] * 21 + ["all"] * 12 + ["more"] * 5
    )
    ids = [*list(range(21)) * 4, *range(84, 96), *range(5)]
    assert merged.table["source_id"].tolist() == ids


def test_plain_zarr_reads_every_trajectory(ranks: tuple[Path, list[Model]], tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    merge(ranks[0], tmp_path / "all")
    group = zarr.open_group(tmp_path / "all", mode="r")
    pairs = group["clocks/steps"][:]
    for (start, stop), expected in zip(pairs.tolist(), (e for model in ranks[1] for e in model)):
        np.testing.assert_array_equal(group["steps/action"][start:stop], expected["action"])


def test_small_sources_with_too_many_gaps_are_packed(tmp_path: Path) -> None:
    model = []
    for number in range(12):
        model += collect(tmp_path / "parts" / f"p{number}", [number])
    planned = plan_merge(tmp_path / "parts")
    assert planned.summary()["linked_shards"] == 0
    merged = planned.write(tmp_path / "all")
    assert_holds(merged, model)
    pairs = merged.pairs("steps")
    assert pairs[-1, 1] == merged.lengths.sum(), "no gaps"


def test_coinrun_halves_make_the_whole(tmp_path: Path) -> None:
    with np.load(DATA / "coinrun_routes.npz", allow_pickle=True) as routes:
        keys = [key for key in routes.files if routes[key].dtype == object and key != "meta"]
        data = {key: list(routes[key]) for key in keys if isinstance(routes[key][0], np.ndarray)}
    count = len(next(iter(data.values())))
    for name, chosen in (("a", range(count // 2)), ("b", range(count // 2, count))):
        with trajstore.create(tmp_path / "halves" / name, handle_signals=False) as writer:
            for number in chosen:
                writer.append({key: data[key][number] for key in data})
    merged = merge(tmp_path / "halves", tmp_path / "whole")
    assert len(merged) == count
    for number, trajectory in enumerate(merged):
        for key in data:
            np.testing.assert_array_equal(trajectory[key][:], data[key][number])


def test_a_source_that_is_being_written_is_taken_as_its_snapshot_has_it(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "live", handle_signals=False, commit_every=None) as writer:
        rows = np.arange(100, dtype=np.int32)
        for number in range(6):
            writer.append({"x": rows[: 9 + number], "reward": rows[: 9 + number] / 2}, seed=number)
        writer.commit()
        before = trajstore.open(tmp_path / "live")
        for number in range(6, 8):
            writer.append({"x": rows[:3], "reward": rows[:3] / 2}, seed=number)
        writer.commit()
        sizes = {name: stat.st_size for name, stat in shards(tmp_path / "live").items()}
        planned = blueprint(before)
        longer = [link for link in planned.plan.linked if link.shard.length < sizes[link.layout.shard_key(link.source)]]
        assert longer, "the tail has grown since"
        merged = planned.write(tmp_path / "merged")
    assert merged.table["seed"].tolist() == list(range(6))
    for number, trajectory in enumerate(merged):
        np.testing.assert_array_equal(trajectory["x"][:], rows[: 9 + number])
    for link in longer:
        assert shards(tmp_path / "merged")[link.layout.shard_key(link.number)].st_size == link.shard.length
    assert verify(tmp_path / "merged", deep=True).ok
    assert len(trajstore.open(tmp_path / "live")) == 8


def test_an_empty_selection_makes_an_empty_store(ranks: tuple[Path, list[Model]], tmp_path: Path) -> None:
    merged = merge(ranks[0], tmp_path / "none", where="score > 100")
    assert len(merged) == 0 and verify(tmp_path / "none").ok
    collect(tmp_path / "none", range(3), resume=True)
    assert len(trajstore.open(tmp_path / "none")) == 3


# -- order, choice -----------------------------------------------------------------------------------------------------


def test_ranks_interleave_in_numeric_order(ranks: tuple[Path, list[Model]], tmp_path: Path) -> None:
    merged = merge(ranks[0], tmp_path / "all", order="interleave")
    assert_holds(merged, [model[number] for number in range(21) for model in ranks[1]])


def test_orders_by_column_and_by_chance(ranks: tuple[Path, list[Model]], tmp_path: Path) -> None:
    model = [expected for model in ranks[1] for expected in model]
    ascending = sorted(model, key=lambda expected: expected["score"])
    assert_holds(merge(ranks[0], tmp_path / "up", order="score"), ascending)
    assert_holds(merge(str(ranks[0] / "rank_*"), tmp_path / "down", order="-seed"), model[::-1])
    one = merge(ranks[0], tmp_path / "one", order="shuffle", seed=3, rewrite=True)
    assert_holds(merge(ranks[0], tmp_path / "two", order="shuffle", seed=3), [trajectory_of(t) for t in one])
    assert sorted(one.table["seed"]) == sorted(e["seed"] for e in model)
    assert one.table["seed"].tolist() != [e["seed"] for e in model]
    with pytest.raises(NotFoundError, match="no order and no column"):
        merge(ranks[0], tmp_path / "no", order="height")


def trajectory_of(trajectory: trajstore.Trajectory) -> dict[str, Any]:
    return {**trajectory.load(), "seed": trajectory["seed"]}


def test_duplicates_are_dropped_by_rule(tmp_path: Path) -> None:
    scores = [3.0, float("nan"), 5.0, 5.0, 1.0, float("nan")]
    seeds = [7, 7, 7, 8, 8, 9]
    with trajstore.create(tmp_path / "s", handle_signals=False) as writer:
        for seed, score in zip(seeds, scores):
            writer.append({"x": np.zeros(3)}, seed=seed, score=score)

    def kept(rule: str) -> list[int]:
        chosen = choose(gather_sources(tmp_path / "s"), dedupe="seed", keep=rule)
        ids: list[int] = chosen.table["id"].tolist()
        return ids

    assert kept("first") == [0, 3, 5]
    assert kept("last") == [2, 4, 5]
    assert kept("max:score") == kept("best:score") == [2, 3, 5]
    assert kept("min:score") == [0, 4, 5]
    with pytest.raises(SchemaError, match="no rule"):
        kept("any")


def test_a_filter_chooses(ranks: tuple[Path, list[Model]], tmp_path: Path) -> None:
    merged = merge(ranks[0], tmp_path / "some", where="success & (score >= 2)")
    model = [e for model in ranks[1] for e in model if e["success"] and e["score"] >= 2]
    assert_holds(merged, model)


def test_a_trajectory_twice_needs_rows_twice(ranks: tuple[Path, list[Model]], tmp_path: Path) -> None:
    twice = trajstore.open(ranks[0])[[3, 3, 40]]
    with pytest.raises(SchemaError, match="rewrite=True"):
        merge(twice, tmp_path / "no")
    merged = merge(twice, tmp_path / "yes", rewrite=True)
    model = [expected for model in ranks[1] for expected in model]
    assert_holds(merged, [model[3], model[3], model[40]])
    assert verify(tmp_path / "yes", deep=True).ok


# -- schemas -----------------------------------------------------------------------------------------------------------


def test_fields_and_columns_that_only_some_have(tmp_path: Path) -> None:
    rows = np.arange(4.0)
    with trajstore.create(tmp_path / "a", handle_signals=False, columns={"k": Column("int64", 5)}) as writer:
        writer.append({"x": rows, "extra": rows[:2]}, score=1.0, hits=3)
    with trajstore.create(tmp_path / "b", handle_signals=False) as writer:
        writer.append({"x": rows + 1})
    with pytest.raises(SchemaError, match=r"column 'hits' \(int64\) is missing in .*b.*fill=\{'hits'"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "no")
    merged = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c", fill={"hits": -1})
    assert merged.table["k"].tolist() == [5, 5] and merged.table["hits"].tolist() == [3, -1]
    assert merged.table["score"][0] == 1.0 and np.isnan(merged.table["score"][1])
    assert merged[1]["extra"] is None
    np.testing.assert_array_equal(merged[0]["extra"][:], rows[:2])
    np.testing.assert_array_equal(merged[1]["x"][:], rows + 1)
    assert not (tmp_path / "no").exists()
    with pytest.raises(SchemaError, match="fill names 'hats'"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "no", fill={"hits": 0, "hats": 1})


def test_every_conflict_is_named(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "a", handle_signals=False) as writer:
        writer.append({"x": np.zeros((3, 2)), "y": np.zeros(3)}, k=1)
    with trajstore.create(tmp_path / "b", handle_signals=False) as writer:
        writer.append({"x": np.zeros((3, 4)), "y": np.zeros(3, np.float32)}, k=1.0)
    with pytest.raises(SchemaError) as caught:
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    for part in (
        r"'x' is float64 (2,)",
        "float64 (4,)",
        "'y' is float64 ()",
        "float32 ()",
        "'k' is int64",
        "float64 in",
    ):
        assert part in str(caught.value)


def test_clocks_that_one_source_has_split(tmp_path: Path) -> None:
    rows = np.arange(6.0)
    with trajstore.create(tmp_path / "a", handle_signals=False) as writer:
        writer.append({"action": rows[:4], "reward": rows[:4]})
    with trajstore.create(tmp_path / "b", handle_signals=False) as writer:
        writer.append({"action": rows[:4], "reward": rows[:4]})
        writer.split_clock("reward")
        writer.append({"action": rows[:4], "reward": rows[:6]})
    merged = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert [len(t["reward"]) for t in merged] == [4, 4, 6] and merged.lengths.tolist() == [4, 4, 4]
    assert merged.schema.fields["action"].clock == "steps"
    assert merged.schema.clocks[str(merged.schema.fields["reward"].clock)] == Clock("none")


def test_packed_and_plain_floats_come_together(tmp_path: Path) -> None:
    images = (np.arange(4 * 64 * 3).reshape(4, 64, 3) % 256 / 255).astype(np.float16)
    noise = np.random.default_rng(0).normal(size=(4, 64, 3)).astype(np.float16)
    for name, first in (("packed", images), ("plain", noise)):
        with trajstore.create(tmp_path / name, handle_signals=False) as writer:
            writer.append({"frame": first, "action": np.zeros(4)})
    assert {
        s.manifest.schema.fields["frame"].rule.kind
        for s in trajstore.open([tmp_path / "packed", tmp_path / "plain"]).snapshots
    } == {"divide", "plain"}
    merged = merge([tmp_path / "packed", tmp_path / "plain"], tmp_path / "both")
    np.testing.assert_array_equal(merged[0]["frame"][:], images)
    np.testing.assert_array_equal(merged[1]["frame"][:], noise)
    again = merge([tmp_path / "packed", tmp_path / "packed"], tmp_path / "twice")
    assert again.schema.fields["frame"].rule.kind == "divide"
    np.testing.assert_array_equal(again[1]["frame"][:], images)


# -- what it says of itself --------------------------------------------------------------------------------------------


def test_progress_is_united_and_configurations_compared(tmp_path: Path) -> None:
    for rank in range(2):
        with trajstore.create(
            tmp_path / "r", part=f"rank{rank}", target=10, unique="seed", config={"lr": 0.1, "env": {"rank": rank}},
            handle_signals=False,
        ) as writer:  # fmt: skip
            for seed in range(rank, 8, 2):
                if seed == 4:
                    writer.mark_attempted(seed)
                else:
                    writer.append({"x": np.zeros(2)}, seed=seed)
    with trajstore.create(
        tmp_path / "r",
        part="rank2",
        config={"lr": 0.1, "env": {"rank": 0}},
        target=1,
        unique="seed",
        handle_signals=False,
    ) as writer:
        writer.mark_attempted([20, 21])  # and nothing came of it
    planned = plan_merge(tmp_path / "r")
    assert any("configurations differ in env.rank: 0 in" in note for note in planned.summary()["notes"])
    planned.write(tmp_path / "m")
    with trajstore.create(tmp_path / "m", resume=True, config={"lr": 0.1, "env": {}}, handle_signals=False) as writer:
        assert writer.target == 21
        assert list(writer.attempted) == [*range(8), 20, 21] and list(writer.completed) == [0, 1, 2, 3, 5, 6, 7]
        assert writer.append({"x": np.zeros(2)}, seed=3) is None


def test_deleted_trajectories_are_left_out(ranks: tuple[Path, list[Model]], tmp_path: Path) -> None:
    shutil.copytree(ranks[0], tmp_path / "ranks")
    delete(tmp_path / "ranks" / "rank_1", where="score == 2")
    models = [ranks[1][0], [e for e in ranks[1][1] if e["score"] != 2], *ranks[1][2:]]
    assert_holds(merge(tmp_path / "ranks", tmp_path / "all"), [expected for model in models for expected in model])


# -- refusals, kills ---------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(ranks: tuple[Path, list[Model]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "folder", ranks[0]):
        with pytest.raises(AlreadyExistsError, match="nothing was touched"):
            merge(ranks[0], path)
    (tmp_path / "empty").mkdir()
    assert len(merge(ranks[0], tmp_path / "empty")) == 84
    with pytest.raises(NotFoundError):
        merge(tmp_path / "nowhere_*", tmp_path / "new")


def test_a_missing_shard_stops_the_merge(ranks: tuple[Path, list[Model]], tmp_path: Path) -> None:
    shutil.copytree(ranks[0], tmp_path / "ranks")
    planned = plan_merge(tmp_path / "ranks").plan
    link = planned.linked[2]
    source = planned.snapshots[link.part]
    os.remove(source.storage.describe(source.manifest.arrays[link.array][0].shard_key(link.source)))
    with pytest.raises(CorruptionError, match="is missing"):
        merge(tmp_path / "ranks", tmp_path / "all")
    assert os.listdir(tmp_path) == ["ranks"]


def test_a_hundred_stores_of_ten_thousand_are_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in REAL.items():
        monkeypatch.setattr(encoding, name, value)
    with trajstore.create(tmp_path / "s", handle_signals=False, profile="fast") as writer:
        for number in range(10_000):
            writer.append({"x": np.zeros((3, 2), np.float32), "reward": np.zeros(3)}, seed=number)
    summary = plan_merge([tmp_path / "s"] * 100, order="interleave").summary()
    assert summary["trajectories"] == 1_000_000 and summary["steps"] == 3_000_000


# -- Dask --------------------------------------------------------------------------------------------------------------


def test_the_scheduler_that_is_set_is_used(ranks: tuple[Path, list[Model]], tmp_path: Path) -> None:
    dask = pytest.importorskip("dask")
    model = [expected for model in ranks[1] for expected in model]
    counts: list[tuple[int, int]] = []
    with dask.config.set(scheduler="synchronous"):
        merged = merge(ranks[0], tmp_path / "a", rewrite=True, report=lambda done, all_: counts.append((done, all_)))
    assert_holds(merged, model)
    assert counts[0][0] == 0 and counts[-1][0] == counts[-1][1] == len(counts) - 1


def test_a_scheduler_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    for address in ("nowhere", "tcp://127.0.0.1:1"):
        with pytest.raises(NotFoundError, match="no Dask scheduler answers"), connected(address):
            pass


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the cluster whose worker is killed
def test_a_cluster_that_loses_a_worker_finishes(ranks: tuple[Path, list[Model]], tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    model = [expected for model in ranks[1] for expected in model]
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        killed: list[int] = []

        def kill_one(done: int, total: int) -> None:
            if done >= 3 and not killed:
                killed.append(next(iter(cluster.workers.values())).pid)
                os.kill(killed[0], 9)

        merged = merge(ranks[0], tmp_path / "all", rewrite=True, client=client, report=kill_one)
        assert killed
    assert_holds(merged, model)
    assert verify(tmp_path / "all", deep=True).ok
