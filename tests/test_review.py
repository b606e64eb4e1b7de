"""Defects that a reading of the core found, each as a user met it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore.engine.arraywriter import ArrayWriter
from trajstore.engine.cache import ChunkCache
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import SchemaError, StateError
from trajstore.format.layout import ArrayLayout, Codec
from trajstore.format.schema import Column, Field
from trajstore.media.storage import LocalStorage

ACTION = np.zeros(2, np.float32)


def writer(path: Path, **options: object) -> trajstore.Writer:
    return trajstore.create(path, commit_every=None, handle_signals=False, **options)  # type: ignore[arg-type]


def test_a_list_of_numbers_keeps_its_values_in_a_bfloat16_field(tmp_path: Path) -> None:
    with writer(tmp_path / "run", fields={"h": Field("bfloat16")}) as store:
        store.append({"action": ACTION, "h": [1.0, -2.5]})
        store.append({"action": ACTION, "h": [3, float("nan")]})
        with pytest.raises(SchemaError, match="bfloat16 cannot hold"):
            store.append({"action": ACTION, "h": [1.0, 1.001]})
    dataset = trajstore.open(tmp_path / "run")
    np.testing.assert_array_equal(dataset[0]["h"][:], np.array([1.0, -2.5], np.float32))
    np.testing.assert_array_equal(dataset[1]["h"][:], np.array([3, np.nan], np.float32))


def test_a_list_may_hold_what_is_not_a_number(tmp_path: Path) -> None:
    with writer(tmp_path / "run", fields={"r": Field("float32"), "n": Field("int32")}) as store:
        store.append({"action": ACTION, "r": [1.0, float("nan")], "n": [1.0, 2.0]})
        with pytest.raises(SchemaError, match="int32 cannot hold"):
            store.append({"action": ACTION, "r": [1.0, 2.0], "n": [1.0, float("nan")]})
    np.testing.assert_array_equal(trajstore.open(tmp_path / "run")[0]["r"][:], np.array([1, np.nan], np.float32))


def test_a_batch_of_bfloat16_is_not_taken_for_integers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    store = writer(tmp_path / "run", fields={"h": Field("uint16")})
    with store, pytest.raises(SchemaError, match="has the dtype bfloat16, expected uint16"):
        store.append_many({"action": ACTION, "h": torch.ones(2, dtype=torch.bfloat16)}, lengths=[2])


LAYOUT = ArrayLayout("steps/x", np.dtype("int64"), (2,), 4, 8, Codec(), "steps")


def test_a_commit_does_not_wait_for_shards_that_queue_behind_it(tmp_path: Path) -> None:
    gate = threading.Event()
    with ThreadPoolExecutor(1) as disk:
        array = ArrayWriter(LAYOUT, LocalStorage(tmp_path), "token", disk)
        array.make_folder()
        disk.submit(gate.wait)
        flushed = disk.submit(array.flush, 8)
        array.encode(np.arange(16).reshape(8, 2), 0)  # a whole shard: its early write stands behind the flush
        gate.set()
        flushed.result(timeout=60)
    assert [shard.number for shard in array.take_sealed()] == [0]


def test_encoders_wait_for_a_disk_that_is_slower_than_they_are(tmp_path: Path) -> None:
    class Lazy(Executor):
        """Does its work when someone waits for it, and not before."""

        waiting = 0

        def submit(self, function: Any, /, *args: Any, **named: Any) -> Future[Any]:
            disk, disk.waiting = self, self.waiting + 1

            class Job(Future[Any]):
                def exception(self, timeout: float | None = None) -> BaseException | None:
                    disk.waiting -= 1
                    function(*args, **named)
                    return None

            return Job()

    disk = Lazy()
    array = ArrayWriter(LAYOUT, LocalStorage(tmp_path), "token", disk)
    array.make_folder()
    array.encode(np.arange(800).reshape(400, 2), 0)
    assert 0 < disk.waiting < 10
    array.flush(400)
    assert len(array.take_sealed()) == 50


def test_a_seed_beyond_int64_is_refused_before_anything_is_stored(tmp_path: Path) -> None:
    with writer(tmp_path / "run") as store:
        store.append({"action": ACTION}, seed=np.uint64(7))
        with pytest.raises(SchemaError, match="seeds lie below"):
            store.append({"action": ACTION}, seed=np.uint64(2**63 + 5))
        with pytest.raises(SchemaError, match="seeds lie below"):
            store.append_many({"action": ACTION}, lengths=[1, 1], seed=np.array([8, 2**63 + 5], np.uint64))
        assert len(store) == 1 and list(store.completed) == [7]


def test_a_unique_column_of_floats_drops_nothing_silently(tmp_path: Path) -> None:
    with writer(tmp_path / "run", unique="x") as store:
        with pytest.raises(SchemaError, match="declared unique, is float"):
            store.append({"action": ACTION}, x=1.25)
        with pytest.raises(SchemaError, match="declared unique, is float64"):
            store.append_many({"action": ACTION}, lengths=[1, 1], x=np.array([1.25, 1.75]))


def test_a_seed_that_is_an_array_of_no_axis_counts_as_collected(tmp_path: Path) -> None:
    with writer(tmp_path / "run") as store:
        store.append({"action": ACTION}, seed=np.array(5))
        assert list(store.completed) == [5]


def test_a_field_with_a_clock_of_its_own_names_its_axis_after_it(tmp_path: Path) -> None:
    with writer(tmp_path / "run") as store:
        store.append({"action": ACTION, "extra": ACTION})
        store.split_clock("extra")
        store.append({"action": ACTION, "extra": np.zeros(5, np.float32)})
    for _ in range(2):
        arrays = json.loads((tmp_path / "run" / "zarr.json").read_bytes())["consolidated_metadata"]["metadata"]
        assert arrays["steps/action"]["dimension_names"] == ["steps"]
        assert arrays["steps/extra"]["dimension_names"] == ["extra"]
        with writer(tmp_path / "run", resume=True) as store:
            store.append({"action": ACTION, "extra": ACTION})


def test_a_late_field_does_not_share_the_array_that_another_moved_to(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = (random.integers(0, 256, (2, 8, 8)) / 255).astype(np.float32)
    noise, late = random.random((2, 2, 8, 8), np.float32)
    with writer(tmp_path / "run") as store:
        store.append({"action": ACTION, "obs": images, "obs.1": None})
        store.append({"action": ACTION, "obs": noise, "obs.1": None})
        store.commit()
        store.append({"action": ACTION, "obs": noise, "obs.1": late})
    dataset = trajstore.open(tmp_path / "run")
    for number, obs in enumerate((images, noise, noise)):
        np.testing.assert_array_equal(dataset[number]["obs"][:], obs)
    np.testing.assert_array_equal(dataset[2]["obs.1"][:], late)


def test_a_closed_writer_marks_and_declares_nothing(tmp_path: Path) -> None:
    store = writer(tmp_path / "run")
    store.append({"action": ACTION})
    store.close()
    with pytest.raises(StateError, match="is closed"):
        store.mark_attempted(4)
    with pytest.raises(StateError, match="is closed"):
        store.declare(columns={"late": Column("int64", 0)})
    assert not (tmp_path / "run" / "trajectories" / "late").exists()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_a_dataset_of_many_parts_reads_with_few_descriptors(tmp_path: Path) -> None:
    for part in range(8):
        storage = LocalStorage(tmp_path / f"rank{part}")
        storage.make_root()
        for number in range(50):
            storage.write(f"file{number}", [b"%d" % number])
    before = len(os.listdir("/proc/self/fd"))
    storages = [LocalStorage(tmp_path / f"rank{part}") for part in range(8)]
    for _ in range(2):
        for storage in storages:
            for number in range(50):
                assert storage.read(f"file{number}") == b"%d" % number
    assert len(os.listdir("/proc/self/fd")) - before <= 256


def test_a_cache_forgets_a_chunk_that_grew_while_others_came_behind_it(tmp_path: Path) -> None:
    """A replay buffer drew zeros: only the last chunk was looked at, and by then another one was the last."""
    cache = ChunkCache(1 << 24)
    rows = np.arange(1 << 16, dtype=np.int64)
    with writer(tmp_path / "run") as store:
        start = 0
        for stop in (5000, 5100, 14000, 40000):
            store.append({"action": rows[start:stop]})
            store.commit()
            reader = Snapshot(store.storage, store.head, cache).field("action")
            for low in range(0, stop - 100, 100):
                np.testing.assert_array_equal(reader.read(low, low + 100), rows[low : low + 100])
            np.testing.assert_array_equal(reader.read(stop - 7, stop), rows[stop - 7 : stop])
            start = stop


def test_a_writer_that_is_closed_while_the_interpreter_ends_commits(tmp_path: Path) -> None:
    script = f"""
import atexit, numpy, trajstore
store = trajstore.create({str(tmp_path / "run")!r}, commit_every=None)
atexit.register(store.close)
for _ in range(3):
    store.append({{"action": numpy.zeros((40, 1 << 17))}})  # more than one shard
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(trajstore.open(tmp_path / "run")) == 3
