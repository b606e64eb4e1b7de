"""Routes: ``ckpt_shards_v1`` folders and ``routes.npz`` in, ``routes.npz`` out, nothing lost on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from tests.sameness import loaded, objects, same
from trajstore.errors import (
    AlreadyExistsError,
    CorruptionError,
    FormatError,
    NotFoundError,
    SchemaError,
    StorageError,
)
from trajstore.exporters.routes import export_routes
from trajstore.importers.routes import RoutesReport, import_routes
from trajstore.npz import NpzWriter

DATA = Path(__file__).parent / "data"
CKPT, CLEAN = DATA / "coinrun_ckpt", DATA / "coinrun_routes.npz"
PKD = ["routes_seed", "routes_selected_ep", "routes_obs", "routes_actions", "routes_ep_len", "routes_success"]
SAMPLES = os.environ.get("TRAJSTORE_SAMPLES")


def assert_same_file(path: Path, expected: Path | dict[str, Any]) -> None:
    got, wanted = loaded(path), loaded(expected) if isinstance(expected, Path) else expected
    assert list(got) == list(wanted)
    for name, array in wanted.items():
        assert same(got[name], array), name


def boxed(values: list[Any]) -> np.ndarray[Any, Any]:
    """As the collectors build their columns; equal lengths fall into the trap."""
    return np.asarray(values, dtype=object)


def make_routes(lengths: list[int], first_seed: int = 0, **more: Any) -> dict[str, Any]:
    rng = np.random.default_rng(first_seed)
    routes = {
        "routes_seed": np.arange(first_seed, first_seed + len(lengths)),
        "routes_selected_ep": np.zeros(len(lengths), np.int64),
        "routes_obs": objects([(rng.integers(0, 256, (n, 3, 4, 4)) / 255).astype(np.float16) for n in lengths]),
        "routes_actions": objects([rng.integers(0, 15, n) for n in lengths]),
        "routes_ep_len": np.array(lengths),
        "routes_return": rng.random(len(lengths)).astype(np.float32),
        "routes_success": rng.random(len(lengths)) > 0.5,
    }
    return {**routes, **more}


def in_order(routes: dict[str, Any]) -> dict[str, Any]:
    from trajstore.routes import META, ordered

    names = [*ordered(name for name in routes if name != META), *(name for name in routes if name == META)]
    return {name: routes[name] for name in names}


def round_trip(tmp_path: Path, routes: dict[str, Any], **options: Any) -> dict[str, Any]:
    np.savez_compressed(tmp_path / "in.npz", **routes)
    shutil.rmtree(tmp_path / "store", ignore_errors=True)
    import_routes(tmp_path / "in.npz", tmp_path / "store", **options)
    export_routes(tmp_path / "store", tmp_path / "out.npz", overwrite=True)
    return loaded(tmp_path / "out.npz")


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CKPT, tmp_path / "ckpt"))


# --- the round trip ---------------------------------------------------------------------------


@pytest.mark.parametrize("source", [CKPT, CKPT / "shards", CLEAN])
def test_import_then_export_gives_the_clean_file(source: Path, tmp_path: Path) -> None:
    report = import_routes(source, tmp_path / "store", threads=2)
    assert (report.routes, report.steps, report.dropped, report.lost) == (8, 84, 0, 0)
    assert export_routes(tmp_path / "store", tmp_path / "out.npz").trajectories == 8
    expected = loaded(CLEAN)
    if source.name == "shards":  # without a manifest there is no meta but what the store knows
        expected["meta"] = loaded(tmp_path / "out.npz")["meta"]
        assert expected["meta"].item()["num_tasks_collected"] == 8
    assert_same_file(tmp_path / "out.npz", expected)


@pytest.mark.skipif(not SAMPLES, reason="TRAJSTORE_SAMPLES names no folder with the large samples")
@pytest.mark.parametrize("source", ["coinrun_ckpt", "coinrun_routes.npz"])
def test_the_large_samples(source: str, tmp_path: Path) -> None:
    folder = Path(str(SAMPLES))
    assert import_routes(folder / source, tmp_path / "store").routes == 41
    export_routes(tmp_path / "store", tmp_path / "out.npz")
    assert_same_file(tmp_path / "out.npz", folder / "coinrun_routes.npz")


def test_the_store_reads_as_a_store(tmp_path: Path) -> None:
    import_routes(CKPT, tmp_path / "store")
    ds = trajstore.open(tmp_path / "store")
    clean = loaded(CLEAN)
    assert ds.table["seed"].tolist() == clean["routes_seed"].tolist()
    assert same(ds[3]["obs"][2:5], clean["routes_obs"][3][2:5])
    assert ds[3]["diag"] == clean["routes_diag"][3] and ds[3]["diag"]["note"] == "café"
    assert len(ds.where("success & (length > 8)")) == int(
        (clean["routes_success"] & (clean["routes_ep_len"] > 8)).sum()
    )


@pytest.mark.parametrize(
    ("mode", "keys"),
    [
        ("pkd", PKD),
        ("cca", ["routes_seed", "routes_xy", "routes_ep_len", "routes_success"]),
        ("pkd_cca", [*PKD[:4], "routes_xy", *PKD[4:]]),
        ("analysis", [*PKD[:4], "routes_xy", *PKD[4:]]),
    ],
)
def test_modes(mode: str, keys: list[str], tmp_path: Path) -> None:
    import_routes(CLEAN, tmp_path / "store")
    export_routes(tmp_path / "store", tmp_path / "out.npz", mode=mode)
    clean = loaded(CLEAN)
    assert_same_file(tmp_path / "out.npz", {name: clean[name] for name in [*keys, "meta"]})


def test_keys_and_other_ways_of_exporting(tmp_path: Path) -> None:
    import_routes(CLEAN, tmp_path / "store")
    ds = trajstore.open(tmp_path / "store")
    clean = loaded(CLEAN)
    calls: list[tuple[int, int]] = []
    options: dict[str, Any] = {"compress": False, "tmp_dir": tmp_path / "tmp", "progress": lambda *c: calls.append(c)}
    done = export_routes(ds, tmp_path / "a.npz", keys=["xy", "routes_seed", "meta"], max_routes=3, **options)
    assert done.trajectories == 3
    expected = {name: clean[name][:3] for name in ("routes_seed", "routes_xy")}
    meta = {**clean["meta"].item(), "num_tasks_collected": 3}
    assert_same_file(tmp_path / "a.npz", {**expected, "meta": np.array(meta, object)})
    assert calls == [(1, 3), (2, 3), (3, 3)]
    export_routes(ds[[5, 2]], tmp_path / "b.npz", atomic=False, max_routes=99)
    got = loaded(tmp_path / "b.npz")
    assert same(got["routes_obs"], clean["routes_obs"][[5, 2]])
    assert got["routes_seed"].tolist() == clean["routes_seed"][[5, 2]].tolist()
    assert export_routes(ds, tmp_path / "c.npz", max_routes=0).trajectories == 0
    assert loaded(tmp_path / "c.npz")["routes_obs"].shape == (0,)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    import_routes(CLEAN, tmp_path / "store")
    with pytest.raises(SchemaError, match=r"'pkdd' is no mode.*pkd"):
        export_routes(tmp_path / "store", tmp_path / "out.npz", mode="pkdd")
    with pytest.raises(NotFoundError, match=r"no key 'routes_nope'.*routes_obs"):
        export_routes(tmp_path / "store", tmp_path / "out.npz", keys=["nope"])
    with pytest.raises(NotFoundError):
        export_routes(tmp_path / "nope", tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()
    (tmp_path / "out.npz").write_text("mine")
    with pytest.raises(AlreadyExistsError):
        export_routes(tmp_path / "store", tmp_path / "out.npz")
    assert (tmp_path / "out.npz").read_text() == "mine"


def test_export_while_it_is_collected(tmp_path: Path) -> None:
    routes = make_routes([3, 5, 4])
    with trajstore.create(tmp_path / "store") as writer:
        for i in range(3):
            writer.append({"obs": routes["routes_obs"][i], "actions": routes["routes_actions"][i]}, seed=i)
            writer.commit()
            assert export_routes(tmp_path / "store", tmp_path / "out.npz", overwrite=True).trajectories == i + 1
            got = loaded(tmp_path / "out.npz")
            assert same(got["routes_obs"], routes["routes_obs"][: i + 1])
            assert got["routes_ep_len"].tolist() == [3, 5, 4][: i + 1]  # from the clock: it was not stored
            assert got["meta"].item()["num_tasks_collected"] == i + 1


def test_parts_are_exported_as_one(tmp_path: Path) -> None:
    for rank in (2, 10):
        np.savez(tmp_path / "in.npz", **make_routes([3, 4], rank))
        import_routes(tmp_path / "in.npz", tmp_path / "all" / f"rank{rank}")
    assert export_routes(tmp_path / "all", tmp_path / "out.npz").trajectories == 4
    assert loaded(tmp_path / "out.npz")["routes_seed"].tolist() == [2, 3, 10, 11]


def test_a_list_of_sources(tmp_path: Path) -> None:
    report = import_routes([CKPT, CLEAN], tmp_path / "store", dedupe="seed")
    assert (report.routes, report.dropped, report.files) == (8, 8, 4)
    report = import_routes([CKPT, CLEAN], tmp_path / "twice")
    assert (report.routes, report.dropped, len(report.duplicate_seeds)) == (16, 0, 8)


# --- shapes that hurt -------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[5], [5, 5], [5, 7, 5], [1], [1, 1, 2]])
@pytest.mark.parametrize("build", [boxed, objects])
def test_lengths_alike_and_single_routes(lengths: list[int], build: Any, tmp_path: Path) -> None:
    routes = make_routes(lengths)
    given = {
        **routes,
        "routes_obs": build(list(routes["routes_obs"])),
        "routes_actions": build(list(routes["routes_actions"])),
    }
    got = round_trip(tmp_path, given)
    for name, array in routes.items():
        assert same(got[name], array), name


def test_empty_extras_keep_their_dtype_and_shape(tmp_path: Path) -> None:
    extras = {
        "routes_player_v": boxed([np.zeros((0, 2), np.float32)] * 3),
        "routes_ents_count": boxed([np.zeros(0, np.int32)] * 3),
        "routes_nearest_ents": boxed([np.zeros((0, 8, 4), np.float32)] * 3),
    }
    assert extras["routes_player_v"].shape == (3, 0, 2)
    got = round_trip(tmp_path, make_routes([3, 4, 5], **extras))
    assert [(a.shape, a.dtype) for a in got["routes_player_v"]] == [((0, 2), np.float32)] * 3
    assert [(a.shape, a.dtype) for a in got["routes_ents_count"]] == [((0,), np.int32)] * 3
    assert [(a.shape, a.dtype) for a in got["routes_nearest_ents"]] == [((0, 8, 4), np.float32)] * 3


@pytest.mark.parametrize("rows", [[4, 9, 0], [4, 5, 7]])
def test_extras_that_at_first_have_a_row_more_than_there_are_steps(rows: list[int], tmp_path: Path) -> None:
    extra = objects([np.full((count, 2), count, np.float32) for count in rows])
    assert same(round_trip(tmp_path, make_routes([3, 4, 5], routes_player_v=extra))["routes_player_v"], extra)


def test_extras_that_only_some_routes_have(tmp_path: Path) -> None:
    velocity = [np.ones((3, 2), np.float32), np.zeros((0, 2), np.float32), np.full((5, 2), np.nan, np.float32)]
    counts = [np.zeros(0, np.int32), np.arange(4, dtype=np.int32), np.zeros(0, np.int32)]
    extras = {"routes_player_v": objects(velocity), "routes_ents_count": objects(counts)}
    got = round_trip(tmp_path, make_routes([3, 4, 5], **extras))
    assert same(got["routes_player_v"], extras["routes_player_v"])
    assert same(got["routes_ents_count"], extras["routes_ents_count"])


def test_extras_without_a_shape_take_the_collectors(tmp_path: Path) -> None:
    extras = {"routes_player_v": objects([np.zeros(0), np.ones((4, 2), np.float32)])}
    got = round_trip(tmp_path, make_routes([3, 4], **extras))
    assert [(a.shape, a.dtype) for a in got["routes_player_v"]] == [((0, 2), np.float32), ((4, 2), np.float32)]


def test_keys_that_are_missing_are_left_out(tmp_path: Path) -> None:
    routes = make_routes([3, 4])
    del routes["routes_return"]
    assert list(round_trip(tmp_path, routes)) == [*routes, "meta"]


def test_other_keys_and_dtypes_come_back(tmp_path: Path) -> None:
    more = {
        "routes_level": np.array([3, 4], np.int16),
        "routes_hidden": objects([np.ones((3, 8), np.float64), np.zeros((4, 8), np.float64)]),
        "notes": objects([{"a": 1}, None]),
        "routes_return": np.array([1.5, 2.5]),
        "routes_actions": objects([np.zeros(3, np.uint8), np.ones(4, np.uint8)]),
    }
    routes = make_routes([3, 4], **more)
    got = round_trip(tmp_path, routes)
    del got["meta"]
    assert list(got) == list(in_order(routes))
    for name, array in routes.items():
        assert same(got[name], array), name


def test_frames_that_are_no_bytes_over_255(tmp_path: Path) -> None:
    frames = [np.random.default_rng(0).random((n, 3, 4, 4)).astype(np.float16) for n in (3, 4)]
    routes = make_routes([2, 3, 4], routes_obs=objects([make_routes([2])["routes_obs"][0], *frames]))
    assert same(round_trip(tmp_path, routes)["routes_obs"], routes["routes_obs"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_a_boxed_first_shard_takes_the_dtype_of_the_others(dtype: Any, tmp_path: Path) -> None:
    (tmp_path / "c" / "shards").mkdir(parents=True)
    frames = [np.full((2, 3, 2, 2), 0.5, dtype), np.full((3, 3, 2, 2), 0.1, dtype), np.full((4, 3, 2, 2), 0.1, dtype)]
    for number, part in enumerate([frames[:1], frames[1:]]):
        routes = make_routes([len(f) for f in part], number * 10, routes_obs=boxed(part))
        np.savez(tmp_path / "c" / "shards" / f"shard_{number:06d}.npz", **routes)
    import_routes(tmp_path / "c", tmp_path / "store")
    export_routes(tmp_path / "store", tmp_path / "out.npz")
    assert same(loaded(tmp_path / "out.npz")["routes_obs"], objects(frames))


@pytest.mark.parametrize("value", [0.1, 0.5])
def test_boxed_frames_that_float16_cannot_hold_are_widened_not_rounded(value: float, tmp_path: Path) -> None:
    frames = objects([np.full((3, 3, 2, 2), value, np.float32)] * 2)
    got = round_trip(tmp_path, make_routes([3, 3], routes_obs=boxed(list(frames))))
    assert [float(a[0, 0, 0, 0]) for a in got["routes_obs"]] == [float(np.float32(value))] * 2


# --- episodes and dicts -----------------------------------------------------------------------


def episode(n: int, **more: Any) -> dict[str, Any]:
    rng = np.random.default_rng(n)
    return {
        "obs": (rng.integers(0, 256, (n, 3, 4, 4)) / 255).astype(np.float16),
        "actions": rng.integers(0, 15, n),
        "rewards": rng.random(n).astype(np.float32),
        "xy": np.full((n, 2), np.nan, np.float32),
        "player_v": np.zeros((0, 2), np.float32),
        "success": bool(n % 2),
        "level_complete": np.bool_(n % 2),
        "return": np.float32(n),
        "len": n,
        "xy_missing_frac": 0.25,
        **more,
    }


EPISODES: dict[str, list[Any]] = {
    "unequal": [[episode(3)], [episode(2), episode(5), episode(1)], [episode(4), episode(4)]],
    "equal": [[episode(3), episode(2)], [episode(5), episode(1)], [episode(4), episode(4)]],
    "some without": [[], [episode(2)], []],
    "none": [[], [], []],
    "keys that come and go": [[episode(3)], [episode(2, more=np.arange(7))], [{"len": 1}, episode(2, obs=None)]],
    "another dtype": [[episode(3)], [episode(2, rewards=np.ones(2))], [episode(2, xy=np.ones((2, 3), np.float32))]],
    "odd keys": [[{1: 2, "a b": np.arange(3), "x/y": np.arange(2), "": (1, 2)}], [{}], [{"a b": np.arange(2)}]],
    "no lists": [{"a": 1}, None, ["x", 1]],
}


@pytest.mark.parametrize("name", EPISODES)
@pytest.mark.parametrize("build", [boxed, objects])
def test_episodes_come_back(name: str, build: Any, tmp_path: Path) -> None:
    episodes = EPISODES[name]
    got = round_trip(tmp_path, make_routes([3, 4, 5], episodes_all=build(episodes)))
    assert list(got)[-2:] == ["episodes_all", "meta"]
    assert got["episodes_all"].shape == (3,)
    assert same(list(got["episodes_all"]), episodes)


def test_a_route_and_its_episodes_are_one_trajectory(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **make_routes([3, 4, 5], episodes_all=objects(EPISODES["unequal"])))
    import_routes(tmp_path / "in.npz", tmp_path / "store")
    ds = trajstore.open(tmp_path / "store")
    assert len(ds) == 3
    assert ds[1]["episodes_all/obs"].shape == (8, 3, 4, 4)
    assert [entry["rows"]["obs"] for entry in ds[1]["episodes"]] == [2, 5, 1]


DIAGS = [
    {"tuple": (1, (2,)), 3: "int key", (1, 2): None, "nan": float("nan"), "np": np.float32(0.1), "b": b"\x00"},
    {"selector": "first_success", "ep_lens": [40, 43], "note": "café", "array": np.arange(3, dtype=np.int16)},
    {},
]


def test_dicts_come_back_exactly(tmp_path: Path) -> None:
    got = round_trip(tmp_path, make_routes([3, 4, 5], routes_diag=objects(DIAGS)))
    assert same(list(got["routes_diag"]), DIAGS)


def test_a_dict_that_json_cannot_give_back_is_refused_with_the_place(tmp_path: Path) -> None:
    diags = [{"a": 1}, {"a": [1, np.array([None])]}, {}]
    np.savez(tmp_path / "in.npz", **make_routes([3, 4, 5], routes_diag=objects(diags)))
    with pytest.raises(SchemaError, match=r"in\.npz, the route of seed 1: .*\$\.a\[1\].*object"):
        import_routes(tmp_path / "in.npz", tmp_path / "store")
    assert not (tmp_path / "store").exists()


# --- manifests are not trusted ----------------------------------------------------------------


def edit_manifest(ckpt: Path, **changes: Any) -> None:
    manifest = json.loads((ckpt / "manifest.json").read_text())
    (ckpt / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_what_differs_from_the_manifest_is_reported(ckpt: Path, tmp_path: Path) -> None:
    edit_manifest(ckpt, num_tasks_collected=30, shards_written=5)
    shutil.copy(ckpt / "shards" / "shard_000002.npz", ckpt / "shards" / "shard_000007.npz")
    for name in ("tmpab12.npz", "shard_000009.npz.tmp"):
        (ckpt / "shards" / name).write_bytes(b"half")
    before = sorted((p, p.stat().st_mtime_ns) for p in ckpt.rglob("*"))
    report = import_routes(ckpt, tmp_path / "store", dedupe="seed")
    assert sorted((p, p.stat().st_mtime_ns) for p in ckpt.rglob("*")) == before
    assert report.unlisted == ["shard_000007.npz"]
    assert report.missing == ["shard_000003.npz", "shard_000004.npz"]
    assert [Path(name).name for name in report.temporaries] == ["shard_000009.npz.tmp", "tmpab12.npz"]
    assert (report.routes, report.dropped, report.manifest_routes, report.lost) == (8, 3, 30, 19)
    assert report.duplicate_seeds == [1011, 1018, 1022]
    assert report.current_seed == 1023, "not 1024: the manifest runs ahead of the shards"
    assert report.unboxed.keys() == {"shard_000001.npz"}
    text = str(report)
    for part in ("8 routes", "shard_000007.npz", "tmpab12.npz", "1018", "19 routes that no shard holds", "un-boxed"):
        assert part in text, part


@pytest.mark.parametrize("content", ["{", "[]", "\xff", "{}"])
def test_a_manifest_that_cannot_be_read(content: str, ckpt: Path, tmp_path: Path) -> None:
    (ckpt / "manifest.json").write_text(content, encoding="latin-1")
    report = import_routes(ckpt, tmp_path / "store")
    assert report.routes == 8
    assert report.current_seed is None
    assert content == "{}" or "manifest.json" in str(report)


def test_older_manifests_lack_keys(ckpt: Path, tmp_path: Path) -> None:
    keep = ("storage_format", "num_tasks_collected", "env_name")
    manifest = json.loads((ckpt / "manifest.json").read_text())
    (ckpt / "manifest.json").write_text(json.dumps({key: manifest[key] for key in keep}))
    assert import_routes(ckpt, tmp_path / "store").routes == 8
    export_routes(tmp_path / "store", tmp_path / "out.npz")
    meta = loaded(tmp_path / "out.npz")["meta"].item()
    assert meta["env_name"] == "coinrun" and meta["max_steps"] is None


def test_progress_goes_into_the_store(tmp_path: Path) -> None:
    import_routes(CKPT, tmp_path / "store", dedupe="seed")
    with trajstore.create(tmp_path / "store", resume=True) as writer:
        assert writer.target == 12
        assert 1007 in writer.attempted and 1023 in writer.attempted and 1024 not in writer.attempted
        assert list(writer.completed) == sorted(loaded(CLEAN)["routes_seed"].tolist())
        assert writer.state["routes"]["current_seed"] == 1024


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize("how", [damage, cut, lambda path: path.write_text("text")])
def test_a_shard_that_cannot_be_read_is_named(how: Any, ckpt: Path, tmp_path: Path) -> None:
    how(ckpt / "shards" / "shard_000002.npz")
    with pytest.raises(FormatError, match=r"shard_000002\.npz"):
        import_routes(ckpt, tmp_path / "store")
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]
    report = import_routes(ckpt, tmp_path / "store", unreadable="skip")
    assert report.routes == 5 and report.lost == 3
    assert [name for name, _ in report.unreadable] == ["shard_000002.npz"]
    assert load_seeds(tmp_path / "store") == loaded(CLEAN)["routes_seed"][:5].tolist()


def load_seeds(store: Path) -> list[int]:
    return [int(seed) for seed in trajstore.open(store).table["seed"]]


KILLED = """
import os, signal, sys
from trajstore.importers.routes import import_routes
def kill(done, total):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)
import_routes(sys.argv[1], sys.argv[2], progress=kill, commit_trajectories=1)
"""


def test_an_import_that_was_killed_is_begun_again(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(CKPT), str(tmp_path / "store")]
    assert subprocess.run(command, cwd=Path(__file__).parent.parent, check=False).returncode == -9
    assert [p.name for p in tmp_path.iterdir()] == ["tmp.store"]
    with pytest.raises(NotFoundError):
        trajstore.open(tmp_path)  # half an import is no store to anybody
    assert import_routes(CKPT, tmp_path / "store").routes == 8
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    assert load_seeds(tmp_path / "store") == loaded(CLEAN)["routes_seed"].tolist()


def test_columns_added_later_can_be_asked_for(tmp_path: Path) -> None:
    import_routes(CLEAN, tmp_path / "store")
    new = {"level": trajstore.Column("int16", default=7)}
    trajstore.create(tmp_path / "store", resume=True, columns=new).close()
    export_routes(tmp_path / "store", tmp_path / "all.npz")
    assert_same_file(tmp_path / "all.npz", CLEAN)
    export_routes(tmp_path / "store", tmp_path / "some.npz", keys=["seed", "level"])
    assert loaded(tmp_path / "some.npz")["routes_level"].tolist() == [7] * 8


def test_nested_fields_of_any_store_are_exported(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "store") as writer:
        writer.append({"obs": {"image": np.ones((3, 2), np.uint8)}, "actions": np.arange(3), "text": "é"}, seed=1)
    export_routes(tmp_path / "store", tmp_path / "out.npz")
    got = loaded(tmp_path / "out.npz")
    assert got["routes_obs/image"][0].shape == (3, 2) and got["routes_text"].tolist() == ["é"]
    assert got["routes_ep_len"].tolist() == [3]


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nope"):
        import_routes(tmp_path / "nope", tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="no shards"):
        import_routes(tmp_path / "empty", tmp_path / "store")
    np.savez(tmp_path / "other.npz", a=np.arange(3))
    with pytest.raises(FormatError, match=r"other\.npz has no key 'routes_seed'"):
        import_routes(tmp_path / "other.npz", tmp_path / "store")
    np.savez(tmp_path / "odd.npz", routes_seed=np.arange(3), routes_return=np.zeros(2))
    with pytest.raises(FormatError, match="'routes_return'"):
        import_routes(tmp_path / "odd.npz", tmp_path / "store")
    np.savez(tmp_path / "none.npz", routes_seed=np.arange(0))
    with pytest.raises(NotFoundError, match="no routes"):
        import_routes(tmp_path / "none.npz", tmp_path / "store")
    np.savez(tmp_path / "clash.npz", routes_seed=np.arange(1), seed=np.arange(1))
    with pytest.raises(SchemaError, match="'seed'"):
        import_routes(tmp_path / "clash.npz", tmp_path / "store")
    with pytest.raises(SchemaError, match="dedupe"):
        import_routes(CKPT, tmp_path / "store", dedupe="id")
    with pytest.raises(SchemaError, match="unreadable"):
        import_routes(CKPT, tmp_path / "store", unreadable="maybe")
    (tmp_path / "store" / "mine").mkdir(parents=True)
    with pytest.raises(AlreadyExistsError):
        import_routes(CKPT, tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["mine"]


def test_a_report_prints() -> None:
    assert str(RoutesReport("out", 3, 9, 1)) == "3 routes, 9 steps from 1 files -> out"


def test_a_shard_that_would_run_something(ckpt: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "evil"),)

    np.savez(ckpt / "shards" / "shard_000003.npz", **make_routes([3, 4], 50, routes_diag=objects([{}, Evil()])))
    with pytest.raises(FormatError, match=r"shard_000003\.npz.*mkdir.*refused"):
        import_routes(ckpt, tmp_path / "store")
    assert not (tmp_path / "evil").exists() and not (tmp_path / "store").exists()


def test_damage_is_never_imported(ckpt: Path, tmp_path: Path) -> None:
    """A flipped bit anywhere in a shard is found, or changes nothing."""
    path = ckpt / "shards" / "shard_000000.npz"
    good = path.read_bytes()
    rng = np.random.default_rng(1)
    for at in rng.choice(len(good), 25, replace=False).tolist():
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        try:
            import_routes(ckpt, tmp_path / "store")
        except (FormatError, NotFoundError, StorageError):
            continue
        export_routes(tmp_path / "store", tmp_path / "out.npz", overwrite=True)
        assert_same_file(tmp_path / "out.npz", CLEAN)


def test_npz_files_of_this_package_are_imported(tmp_path: Path) -> None:
    clean = loaded(CLEAN)

    def elements(name: str) -> Iterator[Any]:
        yield from clean[name]

    with NpzWriter(tmp_path / "in.npz") as out:
        for name, array in clean.items():
            if not array.dtype.hasobject:
                out.array(name, array)
            elif array.shape:
                out.objects(name, len(array), elements(name))
            else:
                out.scalar_object(name, array.item())
    import_routes(tmp_path / "in.npz", tmp_path / "store")
    export_routes(tmp_path / "store", tmp_path / "out.npz")
    assert (tmp_path / "in.npz").read_bytes() == (tmp_path / "out.npz").read_bytes()


def test_corruption_names_the_file_and_the_key(ckpt: Path, tmp_path: Path) -> None:
    damage(ckpt / "shards" / "shard_000000.npz")
    with pytest.raises(CorruptionError, match=r"shard_000000\.npz, key 'routes_obs'"):
        import_routes(ckpt, tmp_path / "store")
