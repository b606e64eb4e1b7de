"""The gather: any rows, in any order, equal those that zarr-python and plain NumPy find; damage is found, not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trajstore.dataset import open
from trajstore.engine import crew, gather
from trajstore.engine.cache import ChunkCache
from trajstore.engine.gather import ArrayReader
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import CorruptionError, NotFoundError, SchemaError
from trajstore.format.layout import Codec
from trajstore.media import shard
from trajstore.media.storage import LocalStorage
from trajstore.writer import create

DTYPES = "bool int8 uint16 int32 int64 float16 float32 float64 complex64".split()


def random_rows(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    few = rng.choice((3, 256))  # bytes that compress, or do not
    data = rng.integers(0, few, (*shape, np.dtype(dtype).itemsize)).astype(np.uint8)
    return data.view(dtype).reshape(shape)


def random_store(path: Path, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """A store of random fields, and the rows of each, end to end as they are read."""
    rng = np.random.default_rng(seed)
    shapes = {"scalar": (), "vector": (int(rng.integers(1, 40)),), "frame": (3, 8, int(rng.integers(1, 60)))}
    dtypes = {name: str(rng.choice(DTYPES)) for name in shapes} | {"packed": "float16", "packed32": "float32"}
    shapes |= {"packed": (3, 9, 7), "packed32": (8, 8)}
    found: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in shapes}
    profile = [Codec("lz4", 1), Codec("zstd", 1, "bitshuffle"), "balanced"][seed % 3]
    with create(path, commit_every=None, profile=profile) as writer:
        for number in range(int(rng.integers(2, 60))):
            length = int(rng.integers(1, 90))
            trajectory = {}
            for name, shape in shapes.items():
                if name.startswith("packed"):
                    few = rng.choice((3, 256))
                    trajectory[name] = (rng.integers(0, few, (length, *shape)) / 255).astype(dtypes[name])
                else:
                    trajectory[name] = random_rows(rng, dtypes[name], (length, *shape))
                found[name].append(trajectory[name])
            writer.append(trajectory, number=number)
            if rng.random() < 0.1:
                writer.commit()
    return {name: np.concatenate(rows) for name, rows in found.items()}


def same(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """Bit for bit, so that NaNs count too."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cache_bytes", [0, 1 << 13, 64 << 20])
def test_rows_equal_what_was_appended(tmp_path: Path, seed: int, cache_bytes: int) -> None:
    rows = random_store(tmp_path / "s", seed)
    rng = np.random.default_rng(seed)
    snapshot = open(tmp_path / "s", cache_bytes=cache_bytes).snapshots[0]
    for name, expected in rows.items():
        reader = snapshot.field(name)
        total = len(expected)
        for _ in range(2):
            wanted = rng.integers(0, total, int(rng.integers(0, 3 * total)))
            assert same(reader.take(wanted), expected[wanted])
            assert same(reader.take(np.sort(wanted)), expected[np.sort(wanted)])
            start, stop = sorted(rng.integers(0, total + 1, 2).tolist())
            assert same(reader.read(start, stop), expected[start:stop])
            starts = rng.integers(0, total, 20)
            stops = np.minimum(starts + rng.integers(0, 30, 20), total)
            assert same(reader.read_runs(starts, stops), np.concatenate([expected[a:b] for a, b in zip(starts, stops)]))


@pytest.mark.parametrize("seed", range(3))
def test_rows_equal_zarr_python(tmp_path: Path, seed: int) -> None:
    zarr = pytest.importorskip("zarr", minversion="3.0")
    random_store(tmp_path / "s", seed)
    rng = np.random.default_rng(seed)
    group = zarr.open_group(tmp_path / "s", mode="r")
    snapshot = Snapshot.of(LocalStorage(tmp_path / "s"))
    for path, (layout, total) in snapshot.manifest.arrays.items():
        if not total:
            continue
        reader = snapshot.reader(path)
        wanted = rng.integers(0, total, 100)
        assert reader.layout == layout
        assert same(reader.take(wanted), group[path].oindex[wanted])
        assert same(reader.read(0, total), group[path][:])


def test_into_the_callers_array(tmp_path: Path) -> None:
    rows = random_store(tmp_path / "s", 1)
    snapshot = open(tmp_path / "s").snapshots[0]
    for name, expected in rows.items():
        reader = snapshot.field(name)
        out = np.empty_like(expected)
        assert reader.read(0, len(expected), out) is out
        assert same(out, expected)
        wide = np.zeros((len(expected), 2, *expected.shape[1:]), expected.dtype)
        reader.read(0, len(expected), wide[:, 1])  # not contiguous
        assert same(np.ascontiguousarray(wide[:, 1]), expected)
        assert not wide[:, 0].any()
        into = np.random.default_rng(0).permutation(len(expected))
        reader.take(np.arange(len(expected)), out, into)
        assert same(out[into], expected)


@pytest.mark.parametrize("wrong", ["dtype", "shape"])
def test_an_output_that_does_not_fit_is_refused(tmp_path: Path, wrong: str) -> None:
    rows = random_store(tmp_path / "s", 2)["frame"]
    reader = open(tmp_path / "s").snapshots[0].field("frame")
    out = np.empty((len(rows) + (wrong == "shape"), *rows.shape[1:]), "S3" if wrong == "dtype" else rows.dtype)
    with pytest.raises(SchemaError, match="expected"):
        reader.read(0, len(rows), out)


@pytest.mark.parametrize("wanted", [[-1], [0, 10**9]])
def test_rows_that_are_not_there(tmp_path: Path, wanted: list[int]) -> None:
    random_store(tmp_path / "s", 3)
    with pytest.raises(NotFoundError, match="rows"):
        open(tmp_path / "s").snapshots[0].field("scalar").take(np.array(wanted))


def test_damage_in_any_chunk_is_found_by_every_way_of_reading(tmp_path: Path) -> None:
    rows = random_store(tmp_path / "s", 0)["frame"]
    snapshot = open(tmp_path / "s").snapshots[0]
    reader = snapshot.field("frame")
    path = tmp_path / "s" / reader.layout.shard_key(0)
    data = bytearray(path.read_bytes())
    data[int(reader._index(0)[0, 0]) + 20] ^= 1  # type: ignore[index]
    path.write_bytes(data)
    for read in (
        lambda r: r.read(0, len(rows)),
        lambda r: r.take(np.zeros(1, np.int64)),
        lambda r: r.take(np.arange(len(rows))[::-1]),
    ):
        with pytest.raises(CorruptionError, match="crc32c"):
            read(open(tmp_path / "s").snapshots[0].field("frame"))
    path.unlink()
    with pytest.raises(CorruptionError, match="missing"):
        open(tmp_path / "s").snapshots[0].field("frame").read(0, 1)


def frames_store(path: Path) -> np.ndarray[Any, Any]:
    """A store of 50 chunks of two rows each, of noise and of what compresses in turn, and its rows."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 3, (100, 3, 64, 64)).astype(np.uint8)
    rows[20:24] = rng.integers(0, 256, (4, 3, 64, 64))  # these two chunks are stored as they are
    with create(path, profile="fast") as writer:
        writer.append({"frame": rows})
    return rows


def test_chunks_of_one_read_are_decoded_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = frames_store(tmp_path / "s")
    reader = open(tmp_path / "s", cache_bytes=0).snapshots[0].field("frame")
    assert reader.layout.chunk_rows == 2
    calls: list[int] = []
    real = shard._decompress
    monkeypatch.setattr(shard, "_decompress", lambda frame, out: calls.append(out.nbytes) or real(frame, out))
    monkeypatch.setattr(crew, "SIZE", 1)
    for start, stop, expected in ((30, 60, 1), (31, 59, 1), (30, 31, 1), (18, 26, 4)):
        calls.clear()
        assert same(reader.read(start, stop), rows[start:stop])
        assert len(calls) == expected
    wanted = np.array([99, 5, 98, 50, 5, 71])
    calls.clear()
    assert same(reader.take(wanted), rows[wanted])
    assert len(calls) == 1


@pytest.mark.parametrize("row", [0, 21, 57, 99])
def test_of_chunks_decoded_together_the_damaged_one_is_named(tmp_path: Path, row: int) -> None:
    rows = frames_store(tmp_path / "s")
    reader = open(tmp_path / "s").snapshots[0].field("frame")
    offset, size = reader._index(0)[row // 2].tolist()  # type: ignore[index]
    path = tmp_path / "s" / reader.layout.shard_key(0)
    data = bytearray(path.read_bytes())
    data[offset + size // 2] ^= 1
    path.write_bytes(data)
    place = f"rows {row // 2 * 2} to {row // 2 * 2 + 2} of .*crc32c"
    for read in (lambda r: r.read(0, len(rows)), lambda r: r.take(np.arange(len(rows))[::-1])):
        with pytest.raises(CorruptionError, match=place):
            read(open(tmp_path / "s", cache_bytes=0).snapshots[0].field("frame"))
    others = np.setdiff1d(np.arange(len(rows)), np.arange(row // 2 * 2, row // 2 * 2 + 2))
    assert same(open(tmp_path / "s").snapshots[0].field("frame").take(others), rows[others])


def test_chunks_of_the_table_that_no_shard_holds_are_fill(tmp_path: Path) -> None:
    with create(tmp_path / "s") as writer:
        writer.append_many({"x": np.arange(3000)}, lengths=np.ones(3000, np.int64))
    snapshot = open(tmp_path / "s").snapshots[0]
    reader = snapshot.reader("trajectories/id")
    index = reader._index(0)
    assert index is not None
    index[1] = -1, 0
    rows = reader.read(0, 3000)
    assert (rows[1024:2048] == -1).all()
    assert (rows[:1024] == np.arange(1024)).all()
    assert (rows[2048:] == np.arange(2048, 3000)).all()
    wanted = np.array([2999, 1500, 7])
    assert reader.take(wanted).tolist() == [2999, -1, 7]


def test_the_cache_keeps_to_its_limit_and_serves_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_store(tmp_path / "s", 4)
    cache = ChunkCache(1 << 20)
    snapshot = Snapshot.of(LocalStorage(tmp_path / "s"), cache)
    wanted = np.array([5, 0, 5])
    for name, expected in rows.items():
        assert same(snapshot.field(name).take(wanted), expected[wanted])
        assert 0 < cache.used <= cache.limit
    monkeypatch.setattr(ArrayReader, "_read", None)  # nothing is read again
    assert same(snapshot.field("packed").take(wanted), rows["packed"][wanted])


def test_cached_chunks_give_way_in_turn_and_to_other_arrays() -> None:
    cache = ChunkCache(100_000)
    first = cache.block("first", (10, 100), np.dtype("uint8"))
    for chunk in range(300):
        first.put(chunk, np.full((10, 100), chunk % 251, np.uint8), 3000)
        assert cache.used <= cache.limit
    out = np.zeros((300, 100), np.uint8)
    missing = first.gather(np.arange(300) * 10, 3000, out, None)
    assert missing is not None
    assert missing.tolist() == [True] * 200 + [False] * 100
    assert (out[200:, 0] == np.arange(200, 300) % 251).all()
    second = cache.block("second", (5,), np.dtype("float64"))
    second.put(7, np.arange(5.0), 1000)
    assert cache.used == second.used == second.chunk_bytes
    found = np.zeros(2)
    assert second.gather(np.array([36, 38]), 1000, found, None) is None
    assert found.tolist() == [1.0, 3.0]
    large = cache.block("large", (200_000,), np.dtype("uint8"))
    large.put(0, np.zeros(200_000, np.uint8), 200_000)
    assert cache.used == second.used


def test_a_child_forked_in_the_middle_of_a_change_does_not_wait_for_it() -> None:
    cache = ChunkCache(100_000)
    block = cache.block("a", (10,), np.dtype("uint8"))
    block.put(0, np.arange(10, dtype=np.uint8), 100)
    out = np.zeros(1, np.uint8)
    cache._after_fork()
    assert block.gather(np.array([7]), 100, out, None) is None
    with block._guard:  # of a thread that the child does not have
        cache._after_fork()
    assert cache.used == block.used == 0
    assert block.gather(np.array([7]), 100, out, None) is not None
    block.put(0, np.arange(10, dtype=np.uint8), 100)
    assert block.gather(np.array([7]), 100, out, None) is None
    assert out[0] == 7


def test_a_chunk_that_has_grown_since_it_was_kept_is_read_again(tmp_path: Path) -> None:
    with create(tmp_path / "s", commit_every=None) as writer:
        for number in range(6):
            writer.append({"x": np.full((3, 5), number, np.float32)})
            writer.commit()
            if number == 0:
                old = dataset = open(tmp_path / "s")
            dataset = dataset.refresh()
            rows = np.arange(3 * number + 3)
            assert (dataset.snapshots[0].field("x").take(rows)[:, 0] == rows // 3).all()
            assert (old.snapshots[0].field("x").take(np.arange(3)) == 0).all()


def test_threads_share_one_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_store(tmp_path / "s", 5)["packed"]
    monkeypatch.setattr(gather, "_ALONE_BYTES", 1)
    monkeypatch.setattr(crew, "SIZE", 4)
    reader = open(tmp_path / "s", cache_bytes=1 << 12).snapshots[0].field("packed")
    wanted = np.random.default_rng(0).integers(0, len(rows), (8, 300))
    results: list[Any] = [None] * len(wanted)

    def read(number: int) -> None:
        results[number] = reader.take(wanted[number])

    crew.share(read, len(wanted))
    for found, want in zip(results, wanted):
        assert same(found, rows[want])


def test_the_crew_does_each_part_once_and_raises_the_first_error() -> None:
    done: list[int] = []
    crew.share(done.append, 100)
    assert sorted(done) == list(range(100))

    def fail(number: int) -> None:
        if number == 3:
            raise KeyError(number)
        done.append(number)

    with pytest.raises(KeyError):
        crew.share(fail, 10_000)
    assert len(done) < 10_100
