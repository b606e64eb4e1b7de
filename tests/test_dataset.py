"""The dataset: every way of slicing it gives what NumPy gives on the rows that went in."""

from __future__ import annotations

import multiprocessing
import pickle

import numpy as np
import pytest

import trajstore
from trajstore.errors import CorruptionError, MissingDependencyError, NotFoundError, SchemaError


def trajectory(i):
    rng = np.random.default_rng(i)
    n = int(rng.integers(1, 60))
    return {
        "obs": (rng.integers(0, 256, (n, 3, 8, 8)) / 255).astype(np.float16),
        "action": rng.integers(0, 9, n),
        "state": {"q": rng.standard_normal((n + 1, 4)), "v": rng.standard_normal((n + 1, 4)).astype(np.float32)},
    }


def columns(i):
    return {"seed": 1000 + i, "success": i % 3 == 0, "score": i / 7, "task": f"task {i % 4}"}


COUNT = 700


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Two sessions, so that the table and the rows have gaps."""
    path = tmp_path_factory.mktemp("dataset") / "run.zarr"
    for part in (range(300), range(300, COUNT)):
        with trajstore.create(path, resume=True) as writer:
            for i in part:
                writer.append(trajectory(i), **columns(i))
    return path


@pytest.fixture
def ds(path):
    return trajstore.open(path)


@pytest.fixture(scope="module")
def expected():
    return [trajectory(i) for i in range(COUNT)]


@pytest.mark.parametrize(
    "key",
    [
        slice(None),
        slice(2, 5),
        slice(-3, None),
        slice(None, None, 2),
        slice(None, None, -1),
        slice(5, 2),
        0,
        -1,
        [0, -1, 0],
        np.array([[0, 1], [1, 0]]),
        (slice(1, 4), 0),
        (0, slice(None), 2),
        ([0, 1], slice(None), 3),
        (Ellipsis, 2),
        [],
    ],
    ids=str,
)
def test_rows_slice_as_numpy_does(ds, expected, key):
    i = 13
    assert len(expected[i]["action"]) >= 6
    got, wanted = ds[i]["obs"][key], expected[i]["obs"][np.array([], int) if isinstance(key, list) and not key else key]
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert got.tobytes() == wanted.tobytes()


def test_a_mask_selects_rows(ds, expected):
    mask = expected[13]["action"] > 4
    assert ds[13]["action"][mask].tolist() == expected[13]["action"][mask].tolist()


def test_rows_know_their_shape_without_reading(ds, expected):
    rows = ds[299]["state/q"]
    assert (rows.shape, rows.dtype, rows.ndim) == (expected[299]["state"]["q"].shape, np.float64, 2)
    assert rows.nbytes == expected[299]["state"]["q"].nbytes
    assert np.array_equal(np.asarray(rows), expected[299]["state"]["q"])
    with pytest.raises(NotFoundError, match=r"has .* rows here"):
        rows[1000]
    for key in (1.5, "a", [0.5]):
        with pytest.raises(SchemaError, match="rows are chosen by integers"):
            rows[key]


def test_a_trajectory_is_a_mapping(ds, expected):
    one = ds[301]
    assert list(one) == ["obs", "action", "state/q", "state/v", "task", "id", "seed", "success", "score"]
    assert len(one) == len(expected[301]["action"])
    assert one["state"]["v"].shape == one["state/v"].shape
    assert one["task"] == "task 1" and one["seed"] == 1301 and one.columns["success"] == np.False_
    assert one.load(["action", "task"])["action"].tolist() == expected[301]["action"].tolist()
    with pytest.raises(NotFoundError, match="no field or column 'rewards'"):
        one["rewards"]
    assert one == ds[301] and one != ds[300]


@pytest.mark.parametrize(
    "key",
    [slice(290, 310), slice(None, None, 7), [3, 600, 3], -1 * np.arange(1, 5), np.arange(COUNT) % 100 == 5],
    ids=str,
)
def test_views_are_datasets(ds, expected, key):
    numbers = np.arange(COUNT)[key]
    view = ds[key]
    assert len(view) == len(numbers)
    assert view.table["seed"].tolist() == (1000 + numbers).tolist()
    assert view.lengths.tolist() == [len(expected[i]["action"]) for i in numbers]
    for k, i in enumerate(numbers.tolist()):
        assert view[k]["obs"][:].tobytes() == expected[i]["obs"].tobytes()
    assert view[1:][0]["seed"] == 1000 + numbers[1]


@pytest.mark.parametrize("key", [COUNT, -COUNT - 1, [0, COUNT], "1", 1.5, np.zeros(3, bool)])
def test_what_is_no_index(ds, key):
    with pytest.raises((NotFoundError, SchemaError)):
        ds[key]


def test_where(ds, expected):
    lengths = np.array([len(t["action"]) for t in expected])
    numbers = np.arange(COUNT)
    view = ds.where("success and length > 20 and score < 90")
    assert (
        view.table["seed"].tolist()
        == (1000 + numbers[(numbers % 3 == 0) & (lengths > 20) & (numbers / 7 < 90)]).tolist()
    )
    assert len(ds.where("task == 'task 2'")) == COUNT // 4
    assert len(view.where("seed == -1")) == 0
    with pytest.raises(NotFoundError, match="succes"):
        ds.where("succes")


def test_steps_are_all_rows_end_to_end(ds, expected):
    whole = np.concatenate([t["obs"] for t in expected])
    assert ds.steps["obs"].shape == whole.shape
    for key in (slice(100, 3000), slice(-50, None), slice(0, None, 501), [5, 0, -1, 5], 77):
        assert ds.steps["obs"][key].tobytes() == whole[key].tobytes()
    assert np.array_equal(ds[290:310].steps["state/q"], np.concatenate([t["state"]["q"] for t in expected[290:310]]))


def test_take_and_read_gather_at_once(ds, expected):
    rng = np.random.default_rng(1)
    numbers = rng.integers(0, COUNT, 500)
    steps = np.array([rng.integers(0, len(expected[i]["action"])) for i in numbers])
    got = ds.take("obs", numbers, steps)
    assert got.tobytes() == np.stack([expected[i]["obs"][s] for i, s in zip(numbers, steps)]).tobytes()
    assert ds.read("action", np.array([5, 2])).tolist() == [*expected[5]["action"], *expected[2]["action"]]
    with pytest.raises(NotFoundError, match="trajectory 3 has no row 1000"):
        ds.take("obs", np.array([3]), np.array([1000]))
    assert ds.take("obs", [5, 2], [0, 1]).tobytes() == ds.take("obs", np.array([5, 2]), np.array([0, 1])).tobytes()
    assert ds.read("action", [5, 2]).tolist() == [*expected[5]["action"], *expected[2]["action"]]
    assert len(ds.take("obs", [], [])) == len(ds.read("obs", [])) == 0
    for wrong in ([0.5], [[1]], "a", 1):
        with pytest.raises(SchemaError, match="chosen by integers"):
            ds.read("obs", wrong)
    with pytest.raises(SchemaError, match="2 trajectories and 1 steps"):
        ds.take("obs", [0, 1], [0])
    with pytest.raises(NotFoundError, match="beyond the"):
        ds.take("obs", [COUNT], [0])


def test_batches_are_grouped_by_length(ds, expected):
    seen = []
    lengths = []
    for batch in ds.batches(4, fields=["obs", "action"]):
        assert batch["obs"].shape[:2] == batch["action"].shape and len(batch.index) <= 4
        for k, i in enumerate(batch.index):
            assert batch["obs"][k].tobytes() == expected[i]["obs"].tobytes()
            seen.append(int(i))
        lengths.append(batch["action"].shape[1])
    assert sorted(seen) == list(range(COUNT)) and lengths == sorted(lengths)
    assert all(len(batch.index) == 4 for batch in ds.batches(4, fields=["action"], drop_last=True))


def test_a_dataset_pickles_small(ds, expected):
    view = ds.where("success")
    view[0]["obs"][:]
    data = pickle.dumps(view)
    assert len(data) < 60_000
    again = pickle.loads(data)
    assert len(again) == len(view) and again[5]["obs"][:].tobytes() == view[5]["obs"][:].tobytes()


def _read(ds, i, queue):
    queue.put(ds[i]["obs"][:].tobytes())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read(ds, expected, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    ds[0]["obs"][:]
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_read, args=(ds, 400, queue))
    child.start()
    assert queue.get(timeout=60) == expected[400]["obs"].tobytes()
    child.join()


def test_several_stores_read_as_one(tmp_path):
    for rank in (0, 2, 10):
        with trajstore.create(tmp_path / "run", part=f"rank{rank}") as writer:
            for i in range(5):
                writer.append({"x": np.full(i + 1, 100 * rank + i)}, seed=100 * rank + i)
    ds = trajstore.open(tmp_path / "run")
    wanted = [100 * rank + i for rank in (0, 2, 10) for i in range(5)]
    assert ds.table["seed"].tolist() == wanted
    assert [t["x"][0] for t in ds] == wanted
    assert ds.steps["x"][:].tolist() == [v for v in wanted for _ in range(v % 100 + 1)]
    assert ds[[12, 3, 7]].table["seed"].tolist() == [wanted[12], wanted[3], wanted[7]]
    assert ds.take("x", np.array([14, 0, 6]), np.array([4, 0, 1])).tolist() == [1004, 0, 201]
    both = trajstore.open([tmp_path / "run" / "rank10", tmp_path / "run" / "rank0"])
    assert both.table["seed"].tolist() == wanted[10:] + wanted[:5]
    with trajstore.create(tmp_path / "run", part="rank3") as writer:
        writer.append({"x": np.zeros(2, np.int64)}, seed=300)
    assert len(ds.refresh()) == 16
    assert len(ds[3:5].refresh()) == 2


def test_a_lost_shard_is_damage_not_zeros(tmp_path):
    with trajstore.create(tmp_path / "s") as writer:
        for i in range(10):
            writer.append(trajectory(i))
    files = list((tmp_path / "s" / "steps" / "obs").glob("c.*"))
    kept = files[0].read_bytes()
    files[0].unlink()
    with pytest.raises(CorruptionError, match="missing"):
        trajstore.open(tmp_path / "s")[0]["obs"][:]
    files[0].write_bytes(kept[: len(kept) // 2])
    with pytest.raises(CorruptionError, match="lost its end"):
        trajstore.open(tmp_path / "s")[0]["obs"][:]
    flipped = bytearray(kept)
    flipped[100] ^= 1
    files[0].write_bytes(bytes(flipped))
    with pytest.raises(CorruptionError, match="crc32c"):
        trajstore.open(tmp_path / "s")[0]["obs"][:]


def test_trajectories_in_a_shard_that_no_seal_knows_are_damage(path):
    ds = trajstore.open(path)
    snapshot = ds.snapshots[0]
    snapshot.manifest.tails.pop("clocks/steps")
    with pytest.raises(CorruptionError, match="neither a seal nor a tail"):
        _ = ds.lengths


def test_pandas_dask_and_xarray(ds, expected):
    pandas = pytest.importorskip("pandas")
    frame = ds.table.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and frame["task"][5] == "task 1" and len(frame) == COUNT
    pytest.importorskip("dask.array")
    pytest.importorskip("xarray")
    whole = np.concatenate([t["obs"] for t in expected[:50]])
    assert np.array_equal(ds[:50].steps["obs"].to_dask().compute(), whole)
    found = ds[:50].to_xarray()
    assert set(found.dims) == {"steps", "obs_1", "obs_2", "obs_3"}
    mine = found["obs"].where(found["trajectory"] == 7, drop=True)
    assert mine.shape[0] == len(expected[7]["action"])
    with pytest.raises(NotFoundError, match="no clock 'step'"):
        ds.to_xarray("step")
    assert found["step"].values.max() == max(len(t["action"]) for t in expected[:50]) - 1


def test_awkward(ds, expected):
    awkward = pytest.importorskip("awkward")
    ragged = ds[:20].steps["state/q"].to_awkward()
    assert awkward.num(ragged).tolist() == [len(t["state"]["q"]) for t in expected[:20]]
    assert np.array_equal(ragged[7].to_numpy(), expected[7]["state"]["q"])


def test_what_is_not_installed_is_named(ds, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match=r"trajstore\[pandas\]"):
        ds.table.to_pandas()
