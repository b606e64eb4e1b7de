"""The writer: what goes in comes out, what does not fit is refused whole, and a store can be gone on with."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import trajstore
from trajstore.errors import (
    AlreadyExistsError,
    ConfigMismatchError,
    CorruptionError,
    FormatError,
    LockedError,
    NotFoundError,
    QueueFullError,
    SchemaError,
    StateError,
    StorageError,
    UnsupportedFormatError,
)
from trajstore.format.layout import ROOT
from trajstore.format.manifest import root_checksum


def steps(seed, length):
    rng = np.random.default_rng(seed)
    return {
        "obs": rng.integers(0, 256, (length, 8, 8, 3), np.uint8),
        "action": rng.integers(0, 15, length),
        "info": {"x": rng.standard_normal((length, 2)).astype(np.float32)},
    }


def assert_equal(trajectory, expected):
    assert np.array_equal(trajectory["obs"], expected["obs"])
    assert np.array_equal(trajectory["action"], expected["action"])
    assert np.array_equal(trajectory["info/x"], expected["info"]["x"])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.zarr"


def test_every_row_comes_back(path):
    lengths = [5, 1, 300, 17, 2000, 64]
    with trajstore.create(path) as writer:
        ids = [writer.append(steps(i, n), seed=i, reward=i / 3) for i, n in enumerate(lengths)]
    assert ids == list(range(6))
    ds = trajstore.open(path)
    assert ds.lengths.tolist() == lengths
    for i, n in enumerate(lengths):
        assert_equal(ds[i], steps(i, n))
        assert (ds[i].id, ds[i]["seed"], ds[i]["reward"]) == (i, i, i / 3)


@pytest.mark.parametrize(
    "dtype",
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128".split(),
)
def test_every_dtype_keeps_its_bits(path, dtype):
    raw = np.random.default_rng(0).integers(0, 256, 700 * 16, np.uint8)
    values = (raw[:700] > 127) if dtype == "bool" else raw.view(dtype)[:700]
    with trajstore.create(path) as writer:
        writer.append({"action": np.zeros(700), "x": values})
        writer.append({"action": np.zeros(700), "x": values[::-1]})
    got = trajstore.open(path)
    assert got[0]["x"].dtype == values.dtype
    assert got[0]["x"][:].tobytes() == values.tobytes()
    assert got[1]["x"][:].tobytes() == values[::-1].tobytes()


def test_shapes_from_scalars_to_empty_rows(path):
    fields = {
        "scalar": np.arange(4.0),
        "one": np.ones((4, 1), np.int8),
        "none": np.ones((4, 0), np.float32),
        "deep": np.arange(4 * 24).reshape(4, 2, 3, 4),
        "wide": np.arange(4 * 300_000).reshape(4, 300_000),
    }
    with trajstore.create(path) as writer:
        writer.append(fields)
    got = trajstore.open(path)[0]
    for name, rows in fields.items():
        assert got[name].shape == rows.shape and got[name].dtype == rows.dtype
        assert np.array_equal(got[name], rows)


def test_clocks_hold_what_differs_in_length(path):
    def one(n, value):
        return {
            "reward": np.full(n, value, np.float32),
            "obs": np.full((n + 1, 3), value, np.float32),
            "lidar": np.arange(7 * n),
            "note": f"né {value}",
            "diag": {"k": (1, np.float32(2)), 3: None},
        }

    fields = {"diag": trajstore.Field("json")}
    with trajstore.create(path, fields=fields) as writer:
        for i in range(5):
            writer.append(one(i + 1, i))
    ds = trajstore.open(path)
    assert ds.schema.clocks["obs"].relation == "last_row_extra"
    assert ds.schema.fields["lidar"].clock == "lidar"
    for i in range(5):
        assert len(ds[i]) == i + 1
        assert ds[i]["obs"].shape == (i + 2, 3) and (ds[i]["obs"][:] == i).all()
        assert ds[i]["lidar"][:].tolist() == list(range(7 * (i + 1)))
        assert ds[i]["note"] == f"né {i}"
        assert ds[i]["diag"] == {"k": (1, np.float32(2)), 3: None}


def test_none_is_absent_and_zero_rows_are_not(path):
    full = {"action": np.arange(3), "goal": np.ones((3, 2)), "extra": np.zeros((0, 2), np.float32)}
    with trajstore.create(path) as writer:
        writer.append(full)
        writer.append({**full, "goal": None})
        writer.append({**full, "action": np.arange(2), "goal": np.ones((9, 2)), "extra": np.ones((4, 2), np.float32)})
    ds = trajstore.open(path)
    assert ds[0]["goal"].shape == (3, 2)
    assert ds[1]["goal"] is None
    assert ds[2]["goal"].shape == (9, 2)
    assert ds[0]["extra"].shape == (0, 2) and ds[2]["extra"].shape == (4, 2)
    assert [len(t) for t in ds] == [3, 3, 2]


def test_a_field_absent_at_first_may_come_later(path):
    with trajstore.create(path) as writer:
        for i in range(300):
            writer.append({"action": np.arange(2), "late": None}, seed=i)
    with trajstore.create(path, resume=True) as writer:
        writer.append({"action": np.arange(2), "late": np.full((5, 2), 7.0)}, seed=300)
        writer.append({"action": np.arange(2), "late": None}, seed=301)
    ds = trajstore.open(path)
    assert [t["late"] is None for t in ds] == [True] * 300 + [False, True]
    assert (ds[300]["late"][:] == 7).all()


def test_a_declared_field_may_be_absent_from_the_first_trajectory(path):
    declared = {name: trajstore.Field("float32", (2,), "steps") for name in ("a", "b")}
    with trajstore.create(path, fields=declared) as writer:
        writer.append({"a": np.ones((3, 2), np.float32), "b": None})
        writer.append({"a": np.ones((4, 2), np.float32), "b": np.full((4, 2), 7, np.float32)})
    ds = trajstore.open(path)
    assert ds[0]["b"] is None and (ds[1]["b"][:] == 7).all() and ds[1]["b"].shape == (4, 2)


def test_split_clock_copies_what_was_there(path):
    with trajstore.create(path) as writer:
        for i in range(600):
            writer.append({"action": np.arange(3), "xy": np.full((3, 2), i, np.float32)})
        with pytest.raises(SchemaError, match=r"'xy' has 2 rows, expected 3.*split_clock"):
            writer.append({"action": np.arange(3), "xy": np.zeros((2, 2), np.float32)})
        writer.split_clock("xy")
        writer.append({"action": np.arange(3), "xy": np.full((2, 2), 600, np.float32)})
    ds = trajstore.open(path)
    assert len(ds) == 601
    for i in (0, 255, 256, 599):
        assert ds[i]["xy"].shape == (3, 2) and (ds[i]["xy"][:] == i).all()
    assert ds[600]["xy"].shape == (2, 2) and (ds[600]["xy"][:] == 600).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"obs": np.zeros((4, 8, 8, 3), np.int16)}, "'obs' has the dtype int16, expected uint8"),
        ({"obs": np.zeros((4, 8, 8), np.uint8)}, r"'obs' has rows of shape \(8, 8\), expected \(8, 8, 3\)"),
        ({"obs": np.zeros((3, 8, 8, 3), np.uint8)}, "'action' has 4 rows, expected 3"),
        ({"action": np.zeros(4)}, "'action' has the dtype float64, expected int64"),
        ({"action": np.full(4, np.nan)}, "'action' has the dtype float64, expected int64"),
        ({"action": 3}, "'action' is a single value"),
        ({"action": [[1], [2, 3], [4], [5]]}, "'action' is ragged"),
        ({"action": np.array([1, 2, None, 4])}, "dtype object"),
        ({"obz": np.zeros(4)}, "unknown field or column 'obz'.*did you mean 'obs'"),
        ({"obs": np.zeros((0, 8, 8, 3), np.uint8)}, "'action' has 4 rows, expected 0"),
        ({"seed": np.nan}, "column 'seed' is nan, expected int64"),
        ({"seed": 1.5}, "column 'seed' is 1.5, expected int64"),
        ({"seed": 1 << 70}, "beyond int64"),
        ({"seed": "7"}, "column 'seed' is '7', expected int64"),
        ({"seed": None}, "column 'seed' is None"),
    ],
)
def test_what_does_not_fit_is_refused_whole(path, change, message):
    with trajstore.create(path) as writer:
        writer.append(steps(0, 4), seed=0)
        with pytest.raises(SchemaError, match=message):
            writer.append({**steps(1, 4), "seed": 1, **change})
        writer.append(steps(2, 6), seed=2)
    ds = trajstore.open(path)
    assert ds.table["seed"].tolist() == [0, 2]
    assert_equal(ds[1], steps(2, 6))


@pytest.mark.parametrize(
    ("trajectory", "message"),
    [
        ({"a": np.zeros((0, 2))}, "empty"),
        ({}, "empty"),
        ({"a": np.arange(3), "A": np.arange(3)}, "same name where case does not count"),
        ({"..": np.arange(3)}, "cannot name"),
        ({"a": {"..": np.arange(3)}}, "cannot name"),
        ({"a__b": np.arange(3)}, "cannot name"),
        ({"a b": np.arange(3)}, "cannot name"),
        ({"x/y": np.arange(3), "x": np.arange(3)}, "lies inside"),
        ({"a": np.array(["u", "v"])}, "dtype str"),
        ({"a": np.zeros(3, "M8[s]")}, "datetime64"),
        ({"a": np.zeros(3, np.longdouble)}, "longdouble|float128"),
        (np.zeros(3), "a trajectory is a dict"),
    ],
)
def test_a_first_trajectory_that_cannot_be_stored(path, trajectory, message):
    with trajstore.create(path) as writer:
        with pytest.raises(SchemaError, match=message):
            writer.append(trajectory)
        writer.append(steps(0, 4))
    assert_equal(trajstore.open(path)[0], steps(0, 4))


def test_what_the_caller_changes_afterwards_is_not_stored(path):
    buffer = np.zeros((50, 4), np.float32)
    with trajstore.create(path) as writer:
        for i in range(200):
            buffer[:] = i
            writer.append({"x": buffer})
    ds = trajstore.open(path)
    assert all((ds[i]["x"][:] == i).all() for i in range(200))


def test_readers_see_commits_and_nothing_else(path):
    with trajstore.create(path, commit_every=None) as writer:
        assert len(trajstore.open(path)) == 0
        writer.append(steps(0, 4))
        assert len(trajstore.open(path)) == 0
        writer.commit()
        ds = trajstore.open(path)
        writer.append(steps(1, 5))
        writer.commit()
        assert len(ds) == 1 and len(ds.refresh()) == 2
        assert_equal(ds[0], steps(0, 4))
        assert_equal(ds.refresh()[1], steps(1, 5))


def test_commits_by_count_and_bytes(path):
    with trajstore.create(path, commit_every=None, commit_trajectories=3) as writer:
        for i in range(3):
            writer.append(steps(i, 4))
        wait_for(lambda: writer.committed == 3)
    with trajstore.create(path, resume=True, commit_every=None, commit_bytes=5000) as writer:
        for i in range(10):
            writer.append(steps(i, 4))
        wait_for(lambda: writer.committed >= 9)


def test_commits_by_time(path):
    with trajstore.create(path, commit_every=0.05) as writer:
        writer.append(steps(0, 4))
        wait_for(lambda: writer.committed == 1)


def wait_for(condition):
    import time

    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")


def test_an_exception_leaving_the_block_commits(path):
    with pytest.raises(KeyError), trajstore.create(path, commit_every=None) as writer:  # noqa: PT012
        writer.append(steps(0, 4))
        raise KeyError("the simulator broke")
    assert len(trajstore.open(path)) == 1


def test_abandon_drops_what_was_not_committed(path):
    writer = trajstore.create(path, commit_every=None)
    writer.append(steps(0, 4))
    writer.commit()
    writer.append(steps(1, 4))
    writer.abandon()
    assert len(trajstore.open(path)) == 1
    with pytest.raises(StateError, match="closed"):
        writer.append(steps(2, 4))


# -- resume ------------------------------------------------------------------------------------------------------------


def test_resume_goes_on_and_nothing_moves(path):
    for session in range(4):
        with trajstore.create(path, resume=True) as writer:
            assert len(writer) == 3 * session
            for i in range(3):
                writer.append(steps(3 * session + i, 10 + i), seed=3 * session + i)
    ds = trajstore.open(path)
    assert ds.table["id"].tolist() == list(range(12))
    for i in range(12):
        assert_equal(ds[i], steps(i, 10 + i % 3))


def test_an_existing_store_is_refused_without_resume(path):
    trajstore.create(path).close()
    with pytest.raises(AlreadyExistsError, match="resume=True"):
        trajstore.create(path)


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(AlreadyExistsError, match="other files"):
            trajstore.create(tmp_path, resume=resume)
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_second_writer_is_refused_and_named(path):
    with trajstore.create(path) as writer:
        with pytest.raises(LockedError, match=f"process {os.getpid()}"):
            trajstore.create(path, resume=True)
        writer.append(steps(0, 4))
    assert len(trajstore.open(path)) == 1


def test_the_configuration_is_compared_key_by_key(path, tmp_path):
    model = tmp_path / "model.pt"
    model.write_bytes(b"weights")
    config = {"env": "coinrun", "ppo": {"lr": 1e-3, "clip": (0.1, 0.2)}}
    trajstore.create(path, config=config, files=[model]).close()
    trajstore.create(path, config=config, files=[model], resume=True).close()
    trajstore.create(path, resume=True).close()
    model.write_bytes(b"other weights")
    changed = {"env": "coinrun", "ppo": {"lr": 2e-3, "clip": (0.1, 0.2)}, "new": 1}
    with pytest.raises(ConfigMismatchError) as caught:
        trajstore.create(path, config=changed, files=[model], resume=True)
    assert set(caught.value.differences) == {"ppo.lr", "new", f"content of {model}"}
    assert caught.value.differences["ppo.lr"] == (1e-3, 2e-3)
    assert "stored 0.001, given 0.002" in str(caught.value)
    trajstore.create(path, config=changed, files=[model], resume=True, force=True).close()
    forced = trajstore.open(path).snapshots[0].manifest.config["forced"]
    assert forced[0]["differences"]["ppo.lr"] == [1e-3, 2e-3]
    trajstore.create(path, config=changed, files=[model], resume=True).close()


@pytest.mark.parametrize("damage", [b"", b"{", b"not json", b"[1, 2]", b'{"attributes": {}}'])
def test_a_damaged_manifest_is_refused_and_left_alone(path, damage):
    with trajstore.create(path) as writer:
        writer.append(steps(0, 4))
    (path / ROOT).write_bytes(damage)
    with pytest.raises(FormatError):
        trajstore.create(path, resume=True)
    with pytest.raises(FormatError):
        trajstore.open(path)
    assert (path / ROOT).read_bytes() == damage


def test_a_newer_format_is_refused(path):
    trajstore.create(path).close()
    root = (path / ROOT).read_text()
    (path / ROOT).write_text(root.replace('"major":1', '"major":2'))
    with pytest.raises(UnsupportedFormatError, match="pip install --upgrade"):
        trajstore.open(path)
    (path / ROOT).write_text(root.replace('"reader_required":[]', '"reader_required":["teleport"]'))
    with pytest.raises(UnsupportedFormatError, match="teleport"):
        trajstore.open(path)
    newer = json.loads(root.replace('"writer_required":[]', '"writer_required":["teleport"]'))
    newer["attributes"]["trajstore"]["crc32c"] = root_checksum(newer)
    (path / ROOT).write_text(json.dumps(newer))
    trajstore.open(path)
    with pytest.raises(UnsupportedFormatError, match="not continue"):
        trajstore.create(path, resume=True)


def test_a_later_session_may_add_a_column_with_a_default(path):
    with trajstore.create(path) as writer:
        writer.append(steps(0, 4))
    with pytest.raises(SchemaError, match="default"):
        trajstore.create(path, resume=True, columns={"score": trajstore.Column("float32")})
    with trajstore.create(path, resume=True, columns={"score": trajstore.Column("float32", default=-1)}) as writer:
        writer.append(steps(1, 4), score=0.5)
        writer.append(steps(2, 4))
    assert trajstore.open(path).table["score"].tolist() == [-1, 0.5, -1]


def test_progress_is_kept_with_the_data(path):
    with trajstore.create(path, target=5) as writer:
        writer.state["rng"] = np.random.default_rng(0).bit_generator.state
        for seed in writer.seeds(range(100, 200)):
            if seed % 2:
                writer.append(steps(seed, 4), seed=seed)
            if seed == 104:
                break
    with trajstore.create(path, resume=True, target=6) as writer:
        assert writer.target == 6 and writer.remaining == 4
        assert writer.state["rng"] == np.random.default_rng(0).bit_generator.state
        assert list(writer.attempted) == [100, 101, 102, 103]
        again = []
        for seed in writer.seeds(range(100, 200)):
            again.append(seed)
            if seed % 2:
                writer.append(steps(seed, 4), seed=seed)
        assert again == list(range(104, 112))
    assert trajstore.open(path).table["seed"].tolist() == [101, 103, 105, 107, 109, 111]


def test_a_unique_column_drops_what_is_there_already(path):
    with trajstore.create(path, unique="seed") as writer:
        assert writer.append(steps(0, 4), seed=7) == 0
        assert writer.append(steps(1, 4), seed=7) is None
    with trajstore.create(path, resume=True) as writer:
        assert writer.append(steps(2, 4), seed=7) is None
        assert writer.append(steps(3, 4), seed=8) == 1
    ds = trajstore.open(path)
    assert ds.table["seed"].tolist() == [7, 8]
    assert_equal(ds[0], steps(0, 4))


@pytest.mark.parametrize("unique", ["seed", None])
def test_a_negative_seed_stands_for_none(path, unique):
    """One rule for one trajectory and for many: it is stored, is never one too many, and marks nothing."""
    with trajstore.create(path, unique=unique) as writer:
        assert [writer.append(steps(i, 4), seed=-1) for i in range(2)] == [0, 1]
        assert writer.append(steps(2, 4), seed=np.int64(-7)) == 2
        given = writer.append_many(
            {
                "obs": np.zeros((3, 8, 8, 3), np.uint8),
                "action": np.arange(3),
                "info": {"x": np.zeros((3, 2), np.float32)},
            },
            lengths=[1, 1, 1],
            seed=[-1, 5, -1],
        )
        assert given.tolist() == [3, 4, 5]
        assert list(writer.completed) == list(writer.attempted) == [5]
    assert trajstore.open(path).table["seed"].tolist() == [-1, -1, -7, -1, 5, -1]


def test_a_declaration_alone_is_committed(path):
    with trajstore.create(path, commit_every=None) as writer:
        writer.append(steps(0, 4))
        number = writer.commit()
        assert writer.commit() == number
        writer.declare(columns={"score": trajstore.Column("float32", default=-1)})
        assert writer.commit() == number + 1 == writer.commit()
        assert trajstore.open(path).table["score"].tolist() == [-1]


def test_more_intervals_than_the_manifest_holds(path):
    with trajstore.create(path) as writer:
        writer.append(steps(0, 4), seed=0)
        writer.mark_attempted(range(0, 10_000, 2))
    stored = trajstore.open(path).snapshots[0].manifest.sets["attempted"]
    assert [array.intervals for array in stored.arrays] == [5000] and not stored.rest
    with trajstore.create(path, resume=True) as writer:
        assert list(writer.attempted) == list(range(0, 10_000, 2))
        assert writer.remaining_seeds(range(10), 3).tolist() == [1, 3, 5]
        writer.mark_attempted(3)
    with trajstore.create(path, resume=True) as writer:
        assert writer.remaining_seeds(range(10), 3).tolist() == [1, 5, 7]


# -- packing -----------------------------------------------------------------------------------------------------------


def frames(seed, length, dtype=np.float16):
    return (np.random.default_rng(seed).integers(0, 256, (length, 3, 16, 16)) / 255).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_frames_are_packed_exactly(path, dtype):
    with trajstore.create(path) as writer:
        for i in range(10):
            writer.append({"obs": frames(i, 30, dtype)})
    ds = trajstore.open(path)
    assert ds.fields["obs"].stored == np.uint8
    for i in range(10):
        assert ds[i]["obs"].dtype == dtype
        assert ds[i]["obs"][:].tobytes() == frames(i, 30, dtype).tobytes()


def test_declared_frames_are_packed_too_unless_told_otherwise(path, tmp_path):
    declared = {"obs": trajstore.Field("float16", (3, 16, 16), "steps")}
    with trajstore.create(path, fields=declared) as writer:
        writer.append({"obs": frames(0, 30)})
    assert trajstore.open(path).fields["obs"].stored == np.uint8
    plain = {"obs": trajstore.Field("float16", (3, 16, 16), "steps", pack=False)}
    with trajstore.create(tmp_path / "plain", fields=plain) as writer:
        writer.append({"obs": frames(0, 30)})
    assert trajstore.open(tmp_path / "plain").fields["obs"].stored == np.float16


@pytest.mark.parametrize("sessions", [1, 3])
def test_a_misfit_moves_the_field_to_plain_storage(path, sessions):
    expected = [frames(i, 200 + i) for i in range(12)]
    odd = frames(99, 50)
    odd[17, 0, 0, 0] = 0.123
    for session in range(sessions):
        with trajstore.create(path, resume=True) as writer:
            for rows in expected[session * 12 // sessions : (session + 1) * 12 // sessions]:
                writer.append({"obs": rows})
            writer.commit()
            before = trajstore.open(path)
            if session == sessions - 1:
                writer.append({"obs": odd})
                writer.commit()
                writer.append({"obs": expected[0]})
    ds = trajstore.open(path)
    assert ds.fields["obs"].stored == np.float16 and ds.fields["obs"].array == "steps/obs.1"
    for i, rows in enumerate([*expected, odd, expected[0]]):
        assert ds[i]["obs"][:].tobytes() == rows.tobytes()
    assert [t["obs"][:].tobytes() for t in before] == [rows.tobytes() for rows in expected]
    with trajstore.create(path, resume=True) as writer:
        writer.append({"obs": odd})
    assert trajstore.open(path)[14]["obs"][:].tobytes() == odd.tobytes()


# -- the queue, forks, signals -----------------------------------------------------------------------------------------


def test_a_full_queue_can_be_an_error(path):
    with trajstore.create(path, queue_bytes=1 << 20, on_full="error", threads=1) as writer:
        writer.append({"x": np.zeros((8, 1 << 16))})
        taken = 1
        with pytest.raises(QueueFullError):  # noqa: PT012
            for _ in range(200):
                writer.append({"x": np.random.default_rng(0).standard_normal((8, 1 << 16))})
                taken += 1
    assert len(trajstore.open(path)) == taken


def test_the_queue_is_bounded(path):
    with trajstore.create(path, queue_bytes=4 << 20) as writer:
        for i in range(60):
            writer.append({"x": np.random.default_rng(i).standard_normal((4, 1 << 15))})
        assert writer.stats["queue_peak_bytes"] <= 4 << 20


def test_a_writer_cannot_be_pickled_or_used_after_a_fork(path):
    with trajstore.create(path) as writer:
        writer.append(steps(0, 4))
        with pytest.raises(StateError, match="part="):
            pickle.dumps(writer)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                for call in (lambda: writer.append(steps(1, 4)), lambda: writer.attempted, lambda: writer.delete(0)):
                    with pytest.raises(StateError, match="forked"):
                        call()
                os.write(writing, b"refused")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(writing)
        assert os.read(reading, 1000) == b"refused"
        os.close(reading)
        writer.append(steps(2, 4))
    assert len(trajstore.open(path)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_commits_what_is_buffered(path, number):
    script = textwrap.dedent(f"""
        import os, signal, sys
        import numpy as np, trajstore
        writer = trajstore.create({str(path)!r}, commit_every=None)
        for i in range(50):
            writer.append({{"x": np.full((3, 2), i)}})
        os.kill(os.getpid(), {int(number)})
        print("went on")
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=False)
    assert b"went on" not in done.stdout
    assert done.returncode in (-number, 1, 130)
    assert len(trajstore.open(path)) == 50


def test_a_writer_that_nobody_closed_commits_at_the_end_of_the_process(path):
    script = textwrap.dedent(f"""
        import numpy as np, trajstore
        writer = trajstore.create({str(path)!r}, commit_every=None)
        for i in range(50):
            writer.append({{"x": np.full((3, 2), i)}})
    """)
    subprocess.run([sys.executable, "-c", script], timeout=120, check=True)
    assert len(trajstore.open(path)) == 50


def test_a_read_only_folder(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="permission"):
        trajstore.create(tmp_path / "run")


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"no store at .*nowhere"):
        trajstore.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises((NotFoundError, CorruptionError)):
        trajstore.open(tmp_path / "file")
    with pytest.raises(AlreadyExistsError, match="is a file"):
        trajstore.create(tmp_path / "file" / "run")


def test_no_column_hides_the_number_of_steps(path):
    with trajstore.create(path) as writer:
        with pytest.raises(SchemaError, match="number of steps"):
            writer.append({"x": np.zeros((3, 2))}, length=7)
        with pytest.raises(SchemaError, match="number of steps"):
            writer.append_many({"x": np.zeros((3, 2))}, lengths=[3], length=[7])
        writer.append({"x": np.zeros((3, 2))})
    assert trajstore.open(path).table["length"].tolist() == [3]


@pytest.mark.parametrize("resume", [False, True])
def test_a_root_of_parts_asks_for_the_name_of_one(path, resume):
    with trajstore.create(path, part="rank0") as writer:
        writer.append({"x": np.zeros((3, 2))})
    with pytest.raises(trajstore.TrajstoreError, match="part='rank0'"):
        trajstore.create(path, resume=resume)
    assert len(trajstore.open(path)) == 1
