"""The HDF5 container: frames moved byte for byte, the same dataset, and plain h5py reads it."""

from __future__ import annotations

import os

import numpy as np
import pytest

import trajstore
from trajstore.errors import (
    AlreadyExistsError,
    CorruptionError,
    FormatError,
    SchemaError,
    StateError,
    TrajstoreError,
)
from trajstore.format.schema import Column

h5py = pytest.importorskip("h5py")
pytest.importorskip("hdf5plugin")

from trajstore.exporters.hdf5 import export_hdf5  # noqa: E402


def trajectory(i):
    rng = np.random.default_rng(i)
    n = int(rng.integers(1, 90))
    return {
        "frames": (rng.integers(0, 256, (n, 3, 16, 16)) / 255).astype(np.float16),
        "noise": rng.integers(0, 256, (n, 4000), np.uint8),
        "obs": rng.standard_normal((n + 1, 5)),
        "action": rng.integers(0, 9, n),
        "done": rng.integers(0, 2, n).astype(bool),
        "goal": None if i % 7 == 3 else rng.standard_normal((n, 2)).astype(np.float32),
        "empty": np.zeros((n, 0), np.float32),
        "task": f"pick {i}",
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("hdf5") / "run.zarr"
    for session in range(2):
        with trajstore.create(path, resume=True, config={"env": "x"}) as writer:
            for i in range(60):
                writer.append(trajectory(60 * session + i), seed=60 * session + i, score=i / 3)
    return path


def assert_holds(ds, numbers):
    assert len(ds) == len(numbers)
    assert ds.table["seed"].tolist() == list(numbers)
    for got, i in zip(ds, numbers):
        for name, rows in trajectory(i).items():
            if rows is None or isinstance(rows, str):
                assert got[name] == rows
            else:
                assert got[name].dtype == rows.dtype and got[name][:].tobytes() == rows.tobytes(), name


def test_the_same_dataset_comes_back(store, tmp_path):
    done = export_hdf5(trajstore.open(store), tmp_path / "run.h5")
    assert done.trajectories == 120 and done.encoded == 0 and done.moved > 100
    ds = trajstore.open(tmp_path / "run.h5")
    assert_holds(ds, range(120))
    assert ds.snapshots[0].manifest.config["values"] == {"env": "x"}
    assert [p.name for p in tmp_path.iterdir()] == ["run.h5"]


def test_frames_are_the_bytes_of_the_store(store, tmp_path):
    export_hdf5(trajstore.open(store)[:60], tmp_path / "run.h5")
    before = trajstore.open(store).snapshots[0].reader("steps/noise")
    after = trajstore.open(tmp_path / "run.h5").snapshots[0].reader("steps/noise")
    chunks = np.arange(50)
    assert dict(before.frames(chunks)) == dict(after.frames(chunks))


def test_plain_h5py_reads_it(store, tmp_path):
    export_hdf5(trajstore.open(store), tmp_path / "run.h5")
    with h5py.File(tmp_path / "run.h5") as file:
        rows = file["trajectories/seed"][:]
        assert rows.tolist() == list(range(120))
        for i in (0, 59, 60, 119):
            start, stop = file["clocks/steps"][i]
            assert np.array_equal(file["steps/noise"][start:stop], trajectory(i)["noise"])
            frames = (file["steps/frames"][start:stop] / 255).astype(np.float16)
            assert frames.tobytes() == trajectory(i)["frames"].tobytes()
            assert file["steps/frames"].attrs["rule"] == "divide"


@pytest.mark.parametrize("key", [slice(50, 70), slice(None, None, 9), [119, 3, 60]], ids=str)
def test_a_selection(store, tmp_path, key):
    export_hdf5(trajstore.open(store)[key], tmp_path / "some.h5")
    assert_holds(trajstore.open(tmp_path / "some.h5"), np.arange(120)[key].tolist())


def test_several_stores_become_one_file(tmp_path):
    for rank in range(3):
        with trajstore.create(tmp_path / "run", part=f"rank{rank}", profile="fast") as writer:
            for i in range(10 * rank, 10 * rank + 10):
                one = trajectory(i)
                if rank == 1:
                    one["frames"] = one["frames"] + np.float16(0.001)  # not packed there
                writer.append(one, seed=i, score=0.0)
    done = export_hdf5(trajstore.open(tmp_path / "run"), tmp_path / "all.h5")
    assert done.encoded > 0
    ds = trajstore.open(tmp_path / "all.h5")
    assert_holds(ds[:10], range(10))
    assert_holds(ds[20:], range(20, 30))
    assert ds[15]["frames"][:].tobytes() == (trajectory(15)["frames"] + np.float16(0.001)).tobytes()
    assert ds.table["id"].tolist() == list(range(30))


def test_it_is_sealed(store, tmp_path):
    path = tmp_path / "run.h5"
    export_hdf5(trajstore.open(store)[:5], path)
    with pytest.raises(AlreadyExistsError):
        export_hdf5(trajstore.open(store), path)
    with pytest.raises((StateError, AlreadyExistsError)):
        trajstore.create(path, resume=True)


def test_damage_is_found(store, tmp_path):
    path = tmp_path / "run.h5"
    export_hdf5(trajstore.open(store), path)
    with h5py.File(path) as file:
        at = file["steps/noise"].id.get_chunk_info(3).byte_offset
    data = bytearray(path.read_bytes())
    data[at + 100] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptionError):
        trajstore.open(path).steps["noise"][:]
    path.write_bytes(bytes(data[: len(data) // 2]))
    with pytest.raises((CorruptionError, FormatError)):
        trajstore.open(path)[100]["noise"][:]


def everything(ds):
    return [(one["obs"][:].tobytes(), one["action"][:].tobytes(), one["task"], int(one["seed"])) for one in ds]


def test_whatever_is_damaged_is_one_error_or_reads_the_same(tmp_path):
    with trajstore.create(tmp_path / "run.zarr") as writer:
        for i in range(4):
            one = trajectory(i)
            writer.append({name: one[name] for name in ("obs", "action", "task")}, seed=i)
    ds = trajstore.open(tmp_path / "run.zarr")
    export_hdf5(ds, tmp_path / "run.h5")
    good, wanted = (tmp_path / "run.h5").read_bytes(), everything(ds)
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.h5"
    for trial in range(40):
        data = bytearray(good)
        if trial % 4:
            for at in rng.integers(len(data), size=trial % 4):
                data[at] ^= 1 << int(rng.integers(8))
        else:
            data = data[: int(rng.integers(len(data)))]
        path.write_bytes(data)
        try:
            found = everything(trajstore.open(path))
        except TrajstoreError as error:
            found = str(error)
        assert found == wanted or "damaged.h5" in found


def test_stores_that_differ_become_one_file_where_a_merge_would(tmp_path):
    with trajstore.create(tmp_path / "run", part="a") as writer:
        writer.append({"x": np.arange(3), "y": np.arange(4.0)}, score=0.5)
    with trajstore.create(tmp_path / "run", part="b") as writer:
        writer.append({"x": np.arange(5), "z": np.arange(5.0)}, seed=3)
    with pytest.raises(SchemaError, match=r"column 'seed' .* has no default"):
        export_hdf5(trajstore.open(tmp_path / "run"), tmp_path / "no.h5")
    with trajstore.create(tmp_path / "run", part="b", resume=True) as writer:
        writer.append({"x": np.arange(2), "z": np.arange(2.0)}, seed=4)
    with trajstore.create(tmp_path / "other", columns={"seed": Column("int64", -1)}) as writer:
        writer.append({"x": np.arange(3), "y": np.arange(4.0)}, score=0.5)
    ds = trajstore.open([tmp_path / "other", tmp_path / "run" / "b"])
    export_hdf5(ds, tmp_path / "all.h5")
    back = trajstore.open(tmp_path / "all.h5")
    assert [len(one["x"]) for one in back] == [3, 5, 2] and back.table["seed"].tolist() == [-1, 3, 4]
    assert np.array_equal(back.table["score"], [0.5, np.nan, np.nan], equal_nan=True)
    assert back[0]["z"] is None and back[1]["y"] is None
    assert back[0]["y"][:].tolist() == [0, 1, 2, 3] and back[2]["z"][:].tolist() == [0, 1]
    assert back.schema.clocks[back.fields["y"].clock].relation == "last_row_extra"


def test_a_foreign_file_is_named(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.arange(3)
    with pytest.raises(FormatError, match="not one that trajstore wrote"):
        trajstore.open(tmp_path / "other.h5")
    assert os.listdir(tmp_path) == ["other.h5"]


def test_a_store_without_any_array_is_refused(tmp_path):
    trajstore.create(tmp_path / "s").close()
    with pytest.raises(SchemaError, match="nothing was ever appended to"):
        export_hdf5(trajstore.open(tmp_path / "s"), tmp_path / "s.h5")
    assert not (tmp_path / "s.h5").exists()
