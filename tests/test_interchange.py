"""The neighbours' formats: out and back, and through their own readers."""

from __future__ import annotations

import importlib
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore.errors import AlreadyExistsError, CorruptionError, SchemaError

h5py = pytest.importorskip("h5py")


def trajectory(i, final=True):
    rng = np.random.default_rng(i)
    n = int(rng.integers(1, 40))
    extra = int(final)
    return {
        "obs": {
            "image": rng.integers(0, 256, (n + extra, 6, 6, 3), np.uint8),
            "q": rng.standard_normal((n + extra, 4)).astype(np.float32),
        },
        "action": rng.standard_normal((n, 2)).astype(np.float32),
        "reward": rng.standard_normal(n).astype(np.float32),
        "terminated": np.arange(n) == (n - 1 if i % 2 else n),
        "truncated": np.arange(n) == (n if i % 2 else n - 1),
        "value": rng.standard_normal(n),
    }


COUNT = 12


def make(path, final=True):
    with trajstore.create(path, config={"env_args": {"env_name": "Reach"}}) as writer:
        for i in range(COUNT):
            writer.append(trajectory(i, final), seed=100 + i, success=bool(i % 2))
    return trajstore.open(path)


@pytest.fixture(scope="module")
def ds(tmp_path_factory):
    return make(tmp_path_factory.mktemp("interchange") / "run.zarr")


@pytest.fixture(scope="module")
def without_final(tmp_path_factory):
    return make(tmp_path_factory.mktemp("interchange") / "run.zarr", final=False)


def same(got, wanted):
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.dtype == wanted.dtype and got.shape == wanted.shape and got.tobytes() == wanted.tobytes()


class TestMinari:
    def test_there_and_back(self, ds, tmp_path):
        from trajstore.exporters.minari import export_minari
        from trajstore.importers.minari import import_minari

        done = export_minari(ds, tmp_path / "reach-v0")
        assert done.trajectories == COUNT and done.warnings == ("columns left out: success",)
        assert import_minari(tmp_path / "reach-v0", tmp_path / "back").steps == ds.lengths.sum()
        back = trajstore.open(tmp_path / "back")
        for got, wanted in zip(back, ds):
            same(got["observations/image"], wanted["obs/image"])
            same(got["actions"], wanted["action"])
            same(got["terminations"], wanted["terminated"])
            same(got["truncations"], wanted["truncated"])
            same(got["infos/value"], wanted["value"])
            assert got["seed"] == wanted["seed"]

    def test_minari_loads_it(self, ds, tmp_path):
        minari = pytest.importorskip("minari")
        from trajstore.exporters.minari import export_minari

        export_minari(ds, tmp_path / "reach-v0")
        loaded = minari.MinariDataset(tmp_path / "reach-v0" / "data")
        assert loaded.total_episodes == COUNT and loaded.total_steps == ds.lengths.sum()
        for episode, wanted in zip(loaded.iterate_episodes(), ds):
            same(episode.observations["image"], wanted["obs/image"])
            same(episode.actions, wanted["action"])
            same(episode.rewards, wanted["reward"])

    def test_a_final_observation_is_needed_or_asked_for(self, without_final, tmp_path):
        from trajstore.exporters.minari import export_minari

        with pytest.raises(SchemaError, match="final_observation='repeat'"):
            export_minari(without_final, tmp_path / "x")
        done = export_minari(without_final, tmp_path / "x", final_observation="repeat")
        assert "there was no final observation: the last one was written twice" in done.warnings


class TestRobomimic:
    def test_there_and_back(self, ds, tmp_path):
        from trajstore.exporters.robomimic import export_robomimic
        from trajstore.importers.robomimic import import_robomimic

        done = export_robomimic(ds, tmp_path / "demo.hdf5", masks={"train": range(9), "valid": [9, 10, 11]})
        assert done.warnings == ()
        with h5py.File(tmp_path / "demo.hdf5") as file:
            assert file["data"].attrs["total"] == ds.lengths.sum()
            assert file["mask/valid"][:].tolist() == [b"demo_9", b"demo_10", b"demo_11"]
            assert '"Reach"' in file["data"].attrs["env_args"]
            same(file["data/demo_3/next_obs/q"], ds[3]["obs/q"][1:])
        import_robomimic(tmp_path / "demo.hdf5", tmp_path / "back")
        back = trajstore.open(tmp_path / "back")
        for i, (got, wanted) in enumerate(zip(back, ds)):
            same(got["obs/image"], wanted["obs/image"])
            same(got["value"], wanted["value"])
            assert (got["seed"], got["success"], got["mask.train"]) == (wanted["seed"], wanted["success"], i < 9)
            same(got["dones"], (wanted["terminated"][:] | wanted["truncated"][:]).astype(np.int64))
        import_robomimic(tmp_path / "demo.hdf5", tmp_path / "valid", mask="valid")
        assert trajstore.open(tmp_path / "valid").table["seed"].tolist() == [109, 110, 111]

    def test_without_next_obs(self, without_final, tmp_path):
        from trajstore.exporters.robomimic import export_robomimic
        from trajstore.importers.robomimic import import_robomimic

        export_robomimic(without_final, tmp_path / "demo.hdf5")
        import_robomimic(tmp_path / "demo.hdf5", tmp_path / "back")
        for got, wanted in zip(trajstore.open(tmp_path / "back"), without_final):
            same(got["obs/q"], wanted["obs/q"])


class TestFlat:
    def test_d4rl_there_and_back(self, ds, tmp_path):
        from trajstore.exporters.flat import export_d4rl
        from trajstore.importers.flat import import_d4rl

        with pytest.raises(SchemaError, match="one array of observations"):
            export_d4rl(ds, tmp_path / "d4rl.hdf5")
        export_d4rl(ds, tmp_path / "d4rl.hdf5", observations="obs/q")
        with h5py.File(tmp_path / "d4rl.hdf5") as file:
            assert set(file) == {"observations", "next_observations", "actions", "rewards", "terminals", "timeouts"}
            assert int(file["terminals"][:].sum()) + int(file["timeouts"][:].sum()) == COUNT
        import_d4rl(tmp_path / "d4rl.hdf5", tmp_path / "back")
        for got, wanted in zip(trajstore.open(tmp_path / "back"), ds):
            same(got["observations"], wanted["obs/q"][:-1])
            same(got["next_observations"], wanted["obs/q"][1:])
            same(got["terminations"], wanted["terminated"])
            same(got["truncations"], wanted["truncated"])

    def test_ogbench_there_and_back(self, ds, without_final, tmp_path):
        from trajstore.exporters.flat import export_ogbench
        from trajstore.importers.flat import import_ogbench

        export_ogbench(ds, tmp_path / "og.npz", observations="obs/q")
        with np.load(tmp_path / "og.npz") as file:
            assert file["terminals"].sum() == COUNT and len(file["actions"]) == ds.lengths.sum() + COUNT
            ends = np.flatnonzero(file["terminals"])
            same(file["observations"][ends], np.stack([t["obs/q"][-1] for t in ds]))
        import_ogbench(tmp_path / "og.npz", tmp_path / "back")
        for got, wanted in zip(trajstore.open(tmp_path / "back"), ds):
            same(got["observations"], wanted["obs/q"])
            same(got["actions"], wanted["action"])
        with pytest.raises(SchemaError, match=r"T \+ 1"):
            export_ogbench(without_final, tmp_path / "no.npz", observations="obs/q")

    def test_npz_with_offsets_there_and_back(self, tmp_path):
        from trajstore.exporters.flat import export_flat
        from trajstore.importers.flat import import_flat

        with trajstore.create(tmp_path / "s") as writer:
            for i in range(9):
                goal = None if i % 3 == 1 else np.full((3, 2), i, np.float32)
                writer.append({"x": {"y": np.arange(i + 1)}, "goal": goal}, seed=i, score=i / 3)
        ds = trajstore.open(tmp_path / "s")
        export_flat(ds, tmp_path / "flat.npz")
        with np.load(tmp_path / "flat.npz") as file:  # no pickle
            low, high = file["x/y.offsets"][4:6]
            assert file["x/y"][low:high].tolist() == list(range(5))
            assert file["goal.absent"].tolist() == [i % 3 == 1 for i in range(9)]
        import_flat(tmp_path / "flat.npz", tmp_path / "back")
        for got, wanted in zip(trajstore.open(tmp_path / "back"), ds):
            same(got["x/y"], wanted["x/y"])
            assert (got["goal"] is None) == (wanted["goal"] is None)
            assert (got["seed"], got["score"]) == (wanted["seed"], wanted["score"])


def test_lerobot_videos_there_and_back(ds, tmp_path):
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    from trajstore.exporters.lerobot import export_lerobot
    from trajstore.importers.lerobot import import_lerobot

    export_lerobot(ds, tmp_path / "le", fps=12.5, images="video")
    report = import_lerobot(tmp_path / "le", tmp_path / "back.zarr")
    assert report.warnings == ("timestamps left out: they are frame / fps",)
    back = trajstore.open(tmp_path / "back.zarr")
    for i in range(COUNT):
        same(back[i]["observation/image"], ds[i]["obs/image"][:-1])
    few = import_lerobot(tmp_path / "le", tmp_path / "few.zarr", limit=3)
    assert few.trajectories == 3
    done = export_lerobot(ds, tmp_path / "lossy", fps=12.5, images="video", crf=23)
    assert "images are not what they were: videos of crf=23 are lossy" in done.warnings
    report = import_lerobot(tmp_path / "lossy", tmp_path / "lossy.zarr")
    assert "as the decoder gives them, the videos being lossy: observation.image" in report.warnings
    video = tmp_path / "le/videos/observation.image/chunk-000/file-000.mp4"
    video.write_bytes(video.read_bytes()[:2000])
    with pytest.raises(CorruptionError, match=r"file-000\.mp4"):
        import_lerobot(tmp_path / "le", tmp_path / "cut.zarr")
    assert not (tmp_path / "cut.zarr").exists()


@pytest.mark.filterwarnings("ignore")
def test_lerobots_own_loader_reads_it(ds, tmp_path):
    pytest.importorskip("lerobot")
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from trajstore.exporters.lerobot import export_lerobot

    export_lerobot(ds, tmp_path / "le", fps=10, task="reach")
    loaded = LeRobotDataset("me/reach", root=tmp_path / "le")
    assert (loaded.num_episodes, len(loaded)) == (COUNT, int(ds.lengths.sum()))
    for at, (i, k) in enumerate((n, step) for n in range(COUNT) for step in range(len(ds[n]))):
        row, one = loaded[at], ds[i]
        assert (int(row["episode_index"]), int(row["frame_index"]), row["task"]) == (i, k, "reach")
        image = np.rint(np.asarray(row["observation.image"]) * 255).astype(np.uint8).transpose(1, 2, 0)
        same(image, one["obs/image"][k])
        same(row["observation.q"], one["obs/q"][k])
        same(row["action"], one["action"][k])
        assert float(row["next.reward"]) == one["reward"][k]
        assert bool(row["next.done"]) == bool(one["terminated"][k] | one["truncated"][k])
    some = LeRobotDataset("me/reach", root=tmp_path / "le", episodes=[2, 5])
    assert len(some) == len(ds[2]) + len(ds[5])


def test_diffusion_policy_there_and_back(ds, tmp_path):
    zarr = pytest.importorskip("zarr")
    from trajstore.exporters.diffusion_policy import export_diffusion_policy
    from trajstore.importers.diffusion_policy import import_diffusion_policy

    done = export_diffusion_policy(ds, tmp_path / "buffer.zarr")
    assert any("obs/image" in warning for warning in done.warnings)
    root = zarr.open_group(tmp_path / "buffer.zarr", mode="r")
    assert root.metadata.zarr_format == 2
    assert root["meta/episode_ends"][:].tolist() == np.cumsum(ds.lengths).tolist()
    assert {a.shape[0] for _, a in root["data"].arrays()} == {int(ds.lengths.sum())}
    import_diffusion_policy(tmp_path / "buffer.zarr", tmp_path / "back")
    for got, wanted in zip(trajstore.open(tmp_path / "back"), ds):
        same(got["obs_image"], wanted["obs/image"][:-1])
        same(got["value"], wanted["value"])


@pytest.mark.parametrize("suffix", ["parquet", "feather"])
def test_the_table(ds, tmp_path, suffix):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    from trajstore.exporters.table import export_table

    export_table(ds, tmp_path / f"table.{suffix}")
    read = pandas.read_parquet if suffix == "parquet" else pandas.read_feather
    assert read(tmp_path / f"table.{suffix}").equals(ds.table.to_pandas())


def test_one_pt_a_trajectory(ds, tmp_path):
    torch = pytest.importorskip("torch")
    from trajstore.exporters.tensors import export_pt

    export_pt(ds, tmp_path / "pt")
    files = sorted((tmp_path / "pt").iterdir())
    assert len(files) == COUNT
    for file, wanted in zip(files, ds):
        tree = torch.load(file, weights_only=True)
        same(tree["obs"]["image"].numpy(), wanted["obs/image"])
        assert tree["seed"] == wanted["seed"]


def test_a_memory_mapped_tensordict(ds, tmp_path):
    tensordict = pytest.importorskip("tensordict")
    from trajstore.exporters.tensors import export_tensordict

    export_tensordict(ds, tmp_path / "td")
    tree = tensordict.TensorDict.load_memmap(tmp_path / "td")
    assert tree.batch_size[0] == ds.lengths.sum()
    mine = tree[tree["traj_ids"] == 5]
    same(mine["obs", "q"].numpy(), ds[5]["obs/q"][:-1])
    same(mine["next", "obs", "image"].numpy(), ds[5]["obs/image"][1:])


def test_roles_are_found_given_or_refused(ds, tmp_path):
    from trajstore.operations.roles import find_roles

    roles = find_roles(ds)
    assert roles.final and set(roles.observations) == {"image", "q"} and roles.others == ("value",)
    assert find_roles(ds, rewards="value").rewards == "value"
    with pytest.raises(SchemaError, match="no actions"):
        find_roles(ds, fields=["obs/q", "reward"])
    with pytest.raises(SchemaError, match="'reword' is no role"):
        find_roles(ds, reword="reward")


def test_nothing_is_written_over_and_nothing_left_behind(ds, tmp_path):
    from trajstore.exporters.robomimic import export_robomimic

    (tmp_path / "there.hdf5").write_text("mine")
    with pytest.raises(AlreadyExistsError):
        export_robomimic(ds, tmp_path / "there.hdf5")
    with pytest.raises(SchemaError):
        export_robomimic(ds, tmp_path / "new.hdf5", masks={"train": [99]})
    assert [file.name for file in tmp_path.iterdir()] == ["there.hdf5"]
    assert (tmp_path / "there.hdf5").read_text() == "mine"


class TestLeRobot:
    @pytest.fixture
    def folder(self, ds, tmp_path):
        pytest.importorskip("pyarrow")
        pytest.importorskip("PIL")
        from trajstore.exporters.lerobot import export_lerobot

        done = export_lerobot(ds, tmp_path / "lerobot", fps=10, task="reach")
        assert "the observation after the last step was left out: LeRobot has none" in done.warnings
        return tmp_path / "lerobot"

    def test_there_and_back(self, ds, folder, tmp_path):
        from trajstore.importers.lerobot import import_lerobot

        import_lerobot(folder, tmp_path / "back")
        back = trajstore.open(tmp_path / "back")
        assert len(back) == COUNT
        for got, wanted in zip(back, ds):
            same(got["observation/image"], wanted["obs/image"][:-1])
            same(got["observation/q"], wanted["obs/q"][:-1])
            same(got["action"], wanted["action"])
            same(got["next/reward"], wanted["reward"])
            assert got["task"] == "reach"

    def test_the_tables_are_as_lerobot_has_them(self, ds, folder):
        pandas = pytest.importorskip("pandas")
        frames = pandas.read_parquet(folder / "data")
        episodes = pandas.read_parquet(folder / "meta" / "episodes")
        tasks = pandas.read_parquet(folder / "meta" / "tasks.parquet")
        assert tasks.index.tolist() == ["reach"] and tasks["task_index"].tolist() == [0]
        assert frames["index"].tolist() == list(range(len(frames)))
        assert episodes["length"].tolist() == ds.lengths.tolist()
        for _, row in episodes.iterrows():
            mine = frames[row["dataset_from_index"] : row["dataset_to_index"]]
            assert (mine["episode_index"] == row["episode_index"]).all()
            assert np.allclose(mine["timestamp"], mine["frame_index"] / 10)


def test_the_hdf5_container_comes_back_byte_for_byte(ds, tmp_path):
    pytest.importorskip("hdf5plugin")
    from trajstore.exporters.hdf5 import export_hdf5
    from trajstore.importers.hdf5 import import_hdf5
    from trajstore.operations.verify import verify

    export_hdf5(ds, tmp_path / "run.h5")
    import_hdf5(tmp_path / "run.h5", tmp_path / "back")
    back = trajstore.open(tmp_path / "back")
    assert not [d for store in verify(tmp_path / "back").stores for d in store.damages]
    for got, wanted in zip(back, ds):
        for name in ds.fields:
            same(got[name], wanted[name])
        assert got.columns == wanted.columns
    here, there = (d.snapshots[0].reader("steps/obs/image") for d in (ds, back))
    assert dict(here.frames(np.arange(2))) == dict(there.frames(np.arange(2)))
    with trajstore.create(tmp_path / "back", resume=True) as writer:
        writer.append(trajectory(99), seed=1, success=True)
    assert len(trajstore.open(tmp_path / "back")) == COUNT + 1


@pytest.mark.parametrize("name", ["flat", "diffusion_policy"])
def test_narrow_rows_take_little_memory_to_export(name: str, tmp_path: Path) -> None:
    """Finding a row takes more bytes than such a row has."""
    if name == "diffusion_policy":
        pytest.importorskip("zarr")
    with trajstore.create(tmp_path / "s") as writer:
        for _ in range(20):
            writer.append({"action": np.zeros(100_000, np.uint8)})
    dataset = trajstore.open(tmp_path / "s")
    export: Any = getattr(importlib.import_module(f"trajstore.exporters.{name}"), f"export_{name}")
    export(dataset[:1], tmp_path / "warm.npz")
    tracemalloc.start()
    try:
        export(dataset, tmp_path / "out.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40e6
