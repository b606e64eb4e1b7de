"""A routes user moves over: one import line changed in the collector, ``load_routes`` in the analysis script."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from tests.sameness import loaded, same
from trajstore.compat import routes_ckpt_storage
from trajstore.compat.routes_ckpt_storage import CheckpointManifest, RoutesShardWriter, build_routes_npz_from_ckpt
from trajstore.errors import AlreadyExistsError, FormatError, LockedError, NotFoundError, SchemaError

DATA = Path(__file__).parent / "data"
CKPT, CLEAN = DATA / "coinrun_ckpt", DATA / "coinrun_routes.npz"
SAMPLES = os.environ.get("TRAJSTORE_SAMPLES")

# What their collectors do, with the one line changed. Some seeds yield nothing, some batches keep none.
COLLECTOR = """
import argparse, os, sys, time
import numpy as np
from trajstore.compat.routes_ckpt_storage import (
    CheckpointManifest, RoutesShardWriter, build_routes_npz_from_ckpt)

def rollout(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 9))
    obs = (rng.integers(0, 256, (n, 3, 8, 8)) / 255).astype(np.float16)
    xy = rng.random((n, 2)).astype(np.float32)
    xy[rng.random(n) < 0.2] = np.nan
    success = seed % 3 != 0 and not 40 <= seed < 56
    return obs, rng.integers(0, 15, n), xy, rng.random(n), success

def main(args):
    manifest = CheckpointManifest.load(args.ckpt_dir) if args.resume else None
    if manifest is not None:
        ok, message = manifest.validate_resume(args)
        if not ok and not args.resume_force:
            sys.exit("cannot resume: " + message)
        manifest.num_tasks_target = args.num_tasks
    else:
        manifest = CheckpointManifest(
            num_tasks_target=args.num_tasks, env_name=args.env_name, distribution_mode="easy", max_steps=64,
            max_ep_len=64, require_success=args.require_success, adapt_episodes=2, record_episodes=1,
            model_ckpt="model.tar", out_npz=args.out_npz, current_seed=args.seed_offset)
    writer = RoutesShardWriter(args.ckpt_dir, shard_size=args.ckpt_shard_size, flush_secs=args.ckpt_flush_secs,
                               manifest=manifest)
    seed, tried, B = manifest.current_seed, manifest.seeds_attempted, 4
    while manifest.num_tasks_collected < args.num_tasks:
        for s in range(seed, seed + B):
            obs, actions, xy, rewards, success = rollout(s)
            if args.require_success and not success:
                continue
            writer.append_route(
                seed=s, selected_ep=1, obs=obs, actions=actions, xy=xy, player_v=np.zeros((0, 2), np.float32),
                ents_count=np.zeros(0, np.int32), nearest_ents=np.zeros((0, 8, 4), np.float32), rewards=rewards,
                ep_len=len(obs), ep_return=float(rewards.sum()), success=success,
                diag={"num_eps": 2, "note": "café", "shape": (3, s)})
            writer.update_progress(current_seed=seed + B, seeds_attempted=tried + B)
            print(s, manifest.num_tasks_collected, flush=True)
            time.sleep(args.pause)
            if manifest.num_tasks_collected >= args.num_tasks:
                break
        seed, tried = seed + B, tried + B
    writer.flush(force=True)
    writer.close()
    build_routes_npz_from_ckpt(args.ckpt_dir, args.out_npz, show_progress=False)

parser = argparse.ArgumentParser()
for name in ("ckpt_dir", "out_npz"):
    parser.add_argument("--" + name, required=True)
parser.add_argument("--env_name", default="coinrun")
parser.add_argument("--num_tasks", type=int, default=20)
parser.add_argument("--seed_offset", type=int, default=0)
parser.add_argument("--require_success", type=int, default=1)
parser.add_argument("--resume", action="store_true")
parser.add_argument("--resume_force", action="store_true")
parser.add_argument("--ckpt_shard_size", type=int, default=25)
parser.add_argument("--ckpt_flush_secs", type=float, default=60.0)
parser.add_argument("--pause", type=float, default=0.0)
main(parser.parse_args())
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("collector") / "collect.py"
    path.write_text(textwrap.dedent(COLLECTOR))
    return path


def collect(script: Path, folder: Path, *flags: str, kill_after: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run the collector; killed once it has reported so many routes."""
    command = [sys.executable, str(script), "--ckpt_dir", str(folder), "--out_npz", str(folder) + ".npz", *flags]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    if kill_after is not None:
        assert process.stdout is not None
        for _ in range(kill_after):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def assert_same_routes(got: dict[str, Any], expected: dict[str, Any], *, but: tuple[str, ...] = ()) -> None:
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert name in but or same(got[name], array), name


# --- the migration ----------------------------------------------------------------------------


def test_killed_and_resumed_it_collects_what_an_uninterrupted_run_does(script: Path, tmp_path: Path) -> None:
    done = collect(script, tmp_path / "whole", "--num_tasks", "40")
    assert done.returncode == 0, done.stderr
    flags = ["--num_tasks", "40", "--ckpt_shard_size", "3", "--ckpt_flush_secs", "0.05", "--pause", "0.01", "--resume"]
    chance = random.Random(0)
    for _ in range(5):
        assert collect(script, tmp_path / "killed", *flags, kill_after=chance.randint(1, 12)).returncode in (0, -9)
    done = collect(script, tmp_path / "killed", *flags)
    assert done.returncode == 0, done.stderr
    whole, killed = loaded(tmp_path / "whole.npz"), loaded(tmp_path / "killed.npz")
    assert whole["routes_seed"].tolist() == [s for s in range(100) if s % 3 and not 40 <= s < 56][:40]
    assert_same_routes(killed, whole, but=("meta",))
    assert killed["meta"].item()["num_tasks_collected"] == 40


def test_the_target_is_raised_on_resume(script: Path, tmp_path: Path) -> None:
    assert collect(script, tmp_path / "c", "--num_tasks", "9").returncode == 0
    first = loaded(tmp_path / "c.npz")
    done = collect(script, tmp_path / "c", "--num_tasks", "30", "--resume")
    assert done.returncode == 0, done.stderr
    second = loaded(tmp_path / "c.npz")
    assert len(first["routes_seed"]) == 9 and len(second["routes_seed"]) == 30
    assert second["routes_seed"].tolist() == [s for s in range(100) if s % 3 and not 40 <= s < 56][:30]
    assert same(first["routes_obs"], second["routes_obs"][:9])
    assert second["meta"].item()["num_tasks_target"] == 30


def test_other_settings_are_refused_unless_forced(script: Path, tmp_path: Path) -> None:
    assert collect(script, tmp_path / "c", "--num_tasks", "3").returncode == 0
    flags = ["--num_tasks", "5", "--resume", "--env_name", "maze"]
    refused = collect(script, tmp_path / "c", *flags)
    assert refused.returncode == 1 and "env_name: stored 'coinrun', given 'maze'" in refused.stderr
    assert collect(script, tmp_path / "c", *flags, "--resume_force").returncode == 0


def test_starting_over_on_top_is_refused(script: Path, tmp_path: Path) -> None:
    assert collect(script, tmp_path / "c", "--num_tasks", "3").returncode == 0
    again = collect(script, tmp_path / "c", "--num_tasks", "5")
    assert again.returncode == 1 and "holds 3 routes" in again.stderr and "--resume" in again.stderr
    assert len(trajstore.open(tmp_path / "c")) == 3


def test_an_old_folder_goes_on(script: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(CKPT, tmp_path / "old"))
    manifest = json.loads((old / "manifest.json").read_text())
    manifest.update(distribution_mode="easy", require_success=1, model_ckpt="model.tar")
    (old / "manifest.json").write_text(json.dumps(manifest))
    shards = {path: path.read_bytes() for path in (old / "shards").iterdir()}
    with RoutesShardWriter(old, manifest=CheckpointManifest.load(old)) as writer:
        assert writer.import_report is not None and writer.import_report.routes == 8
        assert (writer.manifest.num_tasks_collected, writer.manifest.current_seed) == (8, 1024)
        clean = loaded(CLEAN)
        append(writer, clean, 0, seed=1003)  # stored already
        append(writer, clean, 1, seed=1024)
        assert writer.manifest.num_tasks_collected == 9
    assert {path: path.read_bytes() for path in (old / "shards").iterdir()} == shards
    with RoutesShardWriter(old) as writer:
        assert writer.import_report is None and writer.manifest.num_tasks_collected == 9
    build_routes_npz_from_ckpt(old, tmp_path / "out.npz", show_progress=False)
    assert loaded(tmp_path / "out.npz")["routes_seed"].tolist() == [*clean["routes_seed"].tolist(), 1024]


def test_an_old_folder_whose_manifest_ran_ahead_goes_back_to_the_first_seed_lost(tmp_path: Path) -> None:
    old = Path(shutil.copytree(CKPT, tmp_path / "old"))
    manifest = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").write_text(json.dumps({**manifest, "num_tasks_collected": 12, "current_seed": 1040}))
    loaded = CheckpointManifest.load(old)
    assert loaded is not None and (loaded.num_tasks_collected, loaded.current_seed) == (8, 1023)
    with pytest.warns(UserWarning, match="routes are missing"), RoutesShardWriter(old, manifest=loaded) as writer:
        assert (writer.manifest.num_tasks_collected, writer.manifest.current_seed) == (8, 1023)
    (tmp_path / "broken").mkdir()
    shutil.copytree(CKPT / "shards", tmp_path / "broken" / "shards")
    (tmp_path / "broken" / "manifest.json").write_text("{")
    loaded = CheckpointManifest.load(tmp_path / "broken")
    assert loaded is not None and (loaded.num_tasks_collected, loaded.current_seed) == (8, 1023)


# --- the three names --------------------------------------------------------------------------


def append(writer: RoutesShardWriter, routes: dict[str, Any], i: int, seed: int | None = None, **more: Any) -> None:
    names = "obs actions xy player_v ents_count nearest_ents rewards diag".split()
    values = {name: routes[f"routes_{name}"][i] for name in names}
    writer.append_route(
        seed=int(routes["routes_seed"][i]) if seed is None else seed,
        selected_ep=int(routes["routes_selected_ep"][i]),
        ep_len=int(routes["routes_ep_len"][i]),
        ep_return=float(routes["routes_return"][i]),
        success=bool(routes["routes_success"][i]),
        **{**values, **more},
    )


def manifest_of(folder: Path, **changes: Any) -> CheckpointManifest:
    return CheckpointManifest(**{**json.loads((folder / "manifest.json").read_text()), **changes})


@pytest.mark.parametrize(
    ("folder", "clean"),
    [
        (CKPT, CLEAN),
        pytest.param(
            Path(str(SAMPLES)) / "coinrun_ckpt",
            Path(str(SAMPLES)) / "coinrun_routes.npz",
            marks=pytest.mark.skipif(not SAMPLES, reason="TRAJSTORE_SAMPLES names no folder with the large samples"),
        ),
    ],
)
def test_the_sample_through_append_route_gives_the_clean_file(folder: Path, clean: Path, tmp_path: Path) -> None:
    routes = loaded(clean)
    new = manifest_of(folder, num_tasks_collected=0, current_seed=1000, seeds_attempted=0, shards_written=0)
    writer = RoutesShardWriter(tmp_path / "c", manifest=new)
    for i in range(len(routes["routes_seed"])):
        append(writer, routes, i)
        tried = routes["meta"].item()["seeds_attempted"]
        writer.update_progress(current_seed=1000 + tried, seeds_attempted=tried)
    writer.close()
    assert build_routes_npz_from_ckpt(tmp_path / "c", tmp_path / "out.npz", show_progress=False) == len(
        routes["routes_seed"]
    )
    assert_same_routes(loaded(tmp_path / "out.npz"), routes)


def test_a_batch_counts_when_the_next_one_reports(tmp_path: Path) -> None:
    routes = loaded(CLEAN)
    writer = RoutesShardWriter(tmp_path / "c", manifest=CheckpointManifest(num_tasks_target=8, current_seed=1000))
    append(writer, routes, 0)
    writer.update_progress(1004, 4)
    assert (writer.manifest.current_seed, writer.manifest.seeds_attempted) == (1004, 4)
    writer.flush(force=True)
    assert durable(tmp_path / "c") == (1000, 0, 1), "the batch may have more routes to come"
    append(writer, routes, 1)
    writer.update_progress(1004, 4)
    append(writer, routes, 5)
    writer.update_progress(1012, 12)
    writer.flush(force=True)
    assert durable(tmp_path / "c") == (1004, 4, 3)
    assert len(writer.buffer) == 0
    append(writer, routes, 6)
    assert writer.buffer == [1018]
    writer.close()
    assert durable(tmp_path / "c") == (1004, 4, 4)
    with trajstore.create(tmp_path / "c" / "routes.zarr", resume=True) as store:
        assert list(store.attempted) == [1000, 1001, 1002, 1003, 1011, 1018]


def durable(folder: Path) -> tuple[int, int, int]:
    manifest = CheckpointManifest.load(folder)
    assert manifest is not None
    return manifest.current_seed, manifest.seeds_attempted, manifest.num_tasks_collected


def test_seeds_that_are_stored_are_dropped_and_not_counted(tmp_path: Path) -> None:
    routes = loaded(CLEAN)
    with RoutesShardWriter(tmp_path / "c") as writer:
        for i in (0, 1, 0, 1, 2):
            append(writer, routes, i)
        assert writer.manifest.num_tasks_collected == 3
    assert len(trajstore.load_routes(tmp_path / "c")["routes_obs"]) == 3


def test_the_manifest_beside_the_store_is_for_people(tmp_path: Path) -> None:
    assert CheckpointManifest.load(tmp_path / "c") is None
    with RoutesShardWriter(tmp_path / "c", manifest=CheckpointManifest(num_tasks_target=5, env_name="maze")) as writer:
        assert (tmp_path / "c" / "manifest.json").exists()
        assert Path(writer.shards_dir) == tmp_path / "c" / "shards"
        append(writer, loaded(CLEAN), 0)
    written = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert written["storage_format"] == "ckpt_shards_v1" and written["num_tasks_collected"] == 1
    (tmp_path / "c" / "manifest.json").write_text("{ broken")
    manifest = CheckpointManifest.load(tmp_path / "c")
    assert manifest is not None and (manifest.env_name, manifest.num_tasks_collected) == ("maze", 1)
    manifest.save(tmp_path / "c")
    assert set(json.loads((tmp_path / "c" / "manifest.json").read_text())) == set(written)


def test_validate_resume_compares_what_both_know(tmp_path: Path) -> None:
    manifest = CheckpointManifest(env_name="coinrun", max_steps=64, require_success=False, model_ckpt="a.tar")
    args = argparse.Namespace(env_name="coinrun", max_steps=64, require_success=0, num_tasks=9, max_ep_len=5)
    assert manifest.validate_resume(args) == (True, "ok")
    args.max_steps, args.require_success = 65, 1
    ok, message = manifest.validate_resume(args)
    assert not ok and "max_steps: stored 64, given 65" in message and "require_success" in message


def test_a_model_of_other_content_is_noticed(tmp_path: Path) -> None:
    model = tmp_path / "model.tar"
    model.write_bytes(b"one")
    RoutesShardWriter(tmp_path / "c", manifest=CheckpointManifest(model_ckpt=str(model))).close()
    args = argparse.Namespace(model_ckpt=str(model))
    manifest = CheckpointManifest.load(tmp_path / "c")
    assert manifest is not None and manifest.validate_resume(args) == (True, "ok")
    model.write_bytes(b"two")
    ok, message = manifest.validate_resume(args)
    assert not ok and "content" in message
    RoutesShardWriter(tmp_path / "c", manifest=manifest).close()  # --resume_force goes on, and it is recorded
    forced = trajstore.open(tmp_path / "c").snapshots[0].manifest.config["forced"]
    assert list(forced[0]["differences"]) == [f"content of {model}"]


def test_collectors_arrays_take_the_dtypes_of_the_file(tmp_path: Path) -> None:
    with RoutesShardWriter(tmp_path / "c") as writer:
        append(
            writer,
            loaded(CLEAN),
            0,
            rewards=np.arange(9) / 10,
            actions=list(range(9)),
            xy=np.ones((9, 2)),
            player_v=[],
            ents_count=None,
            all_episodes=[{"obs": np.ones((2, 3), np.float16), "len": 2}],
        )
    data = trajstore.load_routes(tmp_path / "c")
    assert [data[f"routes_{name}"][0].dtype.name for name in ("rewards", "actions", "xy", "player_v")] == [
        "float32",
        "int64",
        "float32",
        "float32",
    ]
    assert data["routes_player_v"][0].shape == (0, 2)
    assert "routes_ents_count" not in data.files
    assert same(data["episodes_all"][0], [{"obs": np.ones((2, 3), np.float16), "len": 2}])


def test_a_route_that_does_not_fit_is_refused_and_the_rest_goes_on(tmp_path: Path) -> None:
    routes = loaded(CLEAN)
    with RoutesShardWriter(tmp_path / "c") as writer:
        append(writer, routes, 0)
        with pytest.raises(SchemaError, match="obs"):
            append(writer, routes, 1, obs=np.zeros((12, 3, 32, 32), np.float16))
        with pytest.raises(SchemaError, match="object"):
            append(writer, routes, 1, diag={"model": object()})
        append(writer, routes, 1)
    assert len(trajstore.open(tmp_path / "c")) == 2


def test_one_collector_at_a_time(tmp_path: Path) -> None:
    with RoutesShardWriter(tmp_path / "c"), pytest.raises(LockedError):
        RoutesShardWriter(tmp_path / "c")


def test_a_new_manifest_over_routes_is_refused(tmp_path: Path) -> None:
    with RoutesShardWriter(tmp_path / "c") as writer:
        append(writer, loaded(CLEAN), 0)
    with pytest.raises(AlreadyExistsError, match="--resume"):
        RoutesShardWriter(tmp_path / "c", manifest=CheckpointManifest())


# --- the command line -------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main = routes_ckpt_storage.main
    assert main(["info", "--ckpt_dir", str(CKPT)]) == 0
    out = capsys.readouterr().out
    for part in ("8 / 12", "1024", "24", "coinrun", "512", "min 7, max 14, mean 10.5"):
        assert part in out, part
    with RoutesShardWriter(tmp_path / "c", manifest=manifest_of(CKPT, num_tasks_collected=0)) as writer:
        append(writer, loaded(CLEAN), 0)
    assert main(["info", "--ckpt_dir", str(tmp_path / "c")]) == 0
    assert "1 / 12" in capsys.readouterr().out
    assert main(["info", "--ckpt_dir", str(tmp_path)]) == 1
    assert "error: there is no collection" in capsys.readouterr().err


@pytest.mark.parametrize("store", [True, False])
def test_build(store: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CKPT, tmp_path / "c"))
    if store:
        RoutesShardWriter(folder).close()
    before = sorted(folder.rglob("*"))
    out, clean = tmp_path / "out.npz", loaded(CLEAN)
    flags = ["build", "--ckpt_dir", str(folder), "--out_npz", str(out)]
    assert routes_ckpt_storage.main([*flags, "--no_progress"]) == 0
    assert_same_routes(loaded(out), clean)
    more = ["--mode", "cca", "--max_routes", "3", "--no_compress", "--no_atomic", "--tmp_dir", str(tmp_path)]
    assert routes_ckpt_storage.main([*flags, *more]) == 0
    assert list(loaded(out)) == ["routes_seed", "routes_xy", "routes_ep_len", "routes_success", "meta"]
    assert same(loaded(out)["routes_xy"], clean["routes_xy"][:3])
    assert "3 routes" in capsys.readouterr().out
    assert sorted(folder.rglob("*")) == before, "a build changes nothing in the folder"
    assert routes_ckpt_storage.main(["build", "--ckpt_dir", str(tmp_path / "no"), "--out_npz", str(out)]) == 1


def test_it_is_a_module_to_run() -> None:
    command = [sys.executable, "-m", "trajstore.compat.routes_ckpt_storage", "info", "--ckpt_dir", str(CKPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert "8 / 12" in done.stdout


# --- load_routes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trajstore.importers.routes import import_routes

    path = tmp_path_factory.mktemp("routes") / "store"
    import_routes(CLEAN, path)
    return path


def test_load_routes_stands_in_for_np_load(store: Path) -> None:
    data, clean = trajstore.load_routes(store), loaded(CLEAN)
    assert data.files == list(clean) and len(data) == len(clean) and "routes_obs" in data and "x" not in data
    for name in data.files:
        assert same(np.asarray(data[name]), clean[name]), name
        assert data[name].shape == clean[name].shape and data[name].dtype == clean[name].dtype
        assert data[name].ndim == clean[name].ndim and data[name].size == clean[name].size
    assert data["meta"].item() == clean["meta"].item()
    with trajstore.load_routes(store) as again:
        assert dict(again.items()).keys() == clean.keys()


def test_columns_index_as_object_arrays_do(store: Path) -> None:
    column, expected = trajstore.load_routes(store)["routes_obs"], loaded(CLEAN)["routes_obs"]
    assert len(column) == 8
    for i in (0, 3, -1, np.int64(5), (2,)):
        assert same(column[i], expected[i])
    for key in (slice(2, 5), slice(None, None, -2), [4, 0, 4], np.arange(8) % 3 == 0, slice(3, 3)):
        assert same(list(column[key]), list(expected[key]))
        assert column[key].shape == expected[key].shape
    assert same(list(column), list(expected)) and same(column.tolist(), expected.tolist())
    assert same(column[2:6][1], expected[3])
    column[0][:] = 0  # an array of one's own, as np.load gives
    assert same(column[0], expected[0])
    for bad in (8, -9):
        with pytest.raises(IndexError):
            column[bad]
    with pytest.raises(ValueError, match="copy"):
        np.asarray(column).__class__ and column.__array__(copy=False)


def test_a_key_that_is_not_there_is_a_key_error(store: Path) -> None:
    data = trajstore.load_routes(store)
    with pytest.raises(KeyError):
        data["routes_nope"]
    with pytest.raises(NotFoundError, match="routes_obs"):
        data["routes_nope"]
    assert data.get("routes_nope") is None


def test_a_live_store_is_read_as_it_stands(tmp_path: Path) -> None:
    routes = loaded(CLEAN)
    with RoutesShardWriter(tmp_path / "c") as writer:
        for i in range(4):
            append(writer, routes, i)
        writer.flush(force=True)
        data = trajstore.load_routes(tmp_path / "c")
        append(writer, routes, 4)
        writer.flush(force=True)
        assert data["routes_seed"].tolist() == routes["routes_seed"][:4].tolist()
        assert len(trajstore.load_routes(tmp_path / "c")["routes_obs"]) == 5


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"is a file.*import"):
        trajstore.load_routes(CLEAN)
    with pytest.raises(NotFoundError):
        trajstore.load_routes(tmp_path)


def test_a_column_decodes_only_what_is_touched(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    take = trajstore.Dataset.read

    def counted(self: Any, field: str, trajectories: Any = None, out: Any = None) -> Any:
        read.extend(np.asarray(trajectories).tolist())
        return take(self, field, trajectories, out)

    monkeypatch.setattr(trajstore.Dataset, "read", counted)
    data = trajstore.load_routes(store)
    column = data["routes_obs"][2:]
    assert read == []
    column[3]
    assert read == [5]
