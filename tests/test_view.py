"""Foreign HDF5 files, sliced where they lie."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import trajstore
from trajstore.errors import FormatError, NotFoundError, TrajstoreError

h5py = pytest.importorskip("h5py")

from trajstore.importers.flat import import_d4rl  # noqa: E402
from trajstore.importers.minari import import_minari  # noqa: E402
from trajstore.importers.robomimic import import_robomimic  # noqa: E402
from trajstore.view import view  # noqa: E402


@pytest.fixture(scope="module")
def ds(tmp_path_factory):
    path = tmp_path_factory.mktemp("view") / "run.zarr"
    with trajstore.create(path) as writer:
        for i in range(12):
            rng = np.random.default_rng(i)
            n = i + 3
            writer.append(
                {
                    "obs": rng.standard_normal((n + 1, 4)),
                    "action": rng.standard_normal((n, 2)),
                    "reward": np.arange(n, dtype=np.float32),
                    "terminated": np.arange(n) == n - 1,
                },
                seed=i,
            )
    return trajstore.open(path)


def written(kind, ds, folder):
    from trajstore.exporters.flat import export_d4rl
    from trajstore.exporters.minari import export_minari
    from trajstore.exporters.robomimic import export_robomimic

    if kind == "minari":
        export_minari(ds, folder / "m")
        return folder / "m" / "data" / "main_data.hdf5"
    {"robomimic": export_robomimic, "d4rl": export_d4rl}[kind](ds, folder / "f.hdf5")
    return folder / "f.hdf5"


@pytest.mark.parametrize("kind", ["robomimic", "minari", "d4rl"])
def test_rows_are_read_in_place(kind, ds, tmp_path):
    with view(written(kind, ds, tmp_path)) as found:
        assert len(found) == 12 and found.lengths.tolist() == ds.lengths.tolist()
        for got, wanted in zip(found, ds):
            actions, expected = got["actions"], wanted["action"][:]
            assert actions.shape == expected.shape and actions.dtype == expected.dtype
            for key in (slice(None), slice(1, 3), slice(-2, None), slice(None, None, 2), slice(None, None, -1), 0, -1):
                assert np.array_equal(actions[key], expected[key])
            assert np.array_equal(np.asarray(actions), expected) and actions[1, 0] == expected[1, 0]
        assert np.array_equal(pickle.loads(pickle.dumps(found))[11]["actions"], ds[11]["action"])
        with pytest.raises(NotFoundError, match="no trajectory 12"):
            found[12]
        with pytest.raises(NotFoundError, match="no field 'act'"):
            found[0]["act"]
        with pytest.raises(NotFoundError, match="no row 99"):
            found[0]["actions"][99]


@pytest.mark.parametrize("kind", ["robomimic", "minari", "d4rl"])
def test_whatever_is_damaged_is_one_error(kind, ds, tmp_path):
    file = written(kind, ds[:3], tmp_path)
    take_in = {"robomimic": import_robomimic, "minari": import_minari, "d4rl": import_d4rl}[kind]
    good = file.read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(16):
        data = bytearray(good)
        if trial % 4:
            for at in rng.integers(len(data), size=trial % 4):
                data[at] ^= 1 << int(rng.integers(8))
        else:
            data = data[: int(rng.integers(len(data)))]
        file.write_bytes(data)
        try:
            with view(file) as found:
                assert all(np.asarray(rows[:]).shape == rows.shape for one in found for rows in one.values())
        except TrajstoreError as error:
            damage = str(error)
        else:
            continue
        assert str(file) in damage
        try:
            take_in(file, tmp_path / f"{trial}.zarr")
        except TrajstoreError:
            assert not (tmp_path / f"{trial}.zarr").exists()


def test_what_is_none_of_these(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = np.arange(3)
    with pytest.raises(FormatError, match="holds no trajectories"):
        view(tmp_path / "x.h5")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(FormatError, match="is no HDF5 file"):
        view(tmp_path / "text.h5")
    with pytest.raises(NotFoundError, match="nowhere"):
        view(tmp_path / "nowhere.h5")
