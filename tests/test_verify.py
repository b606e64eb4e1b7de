"""Verification finds what was changed on disk, and says whose rows it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore.errors import CorruptionError, NotFoundError, UnsupportedFormatError
from trajstore.format.manifest import root_checksum
from trajstore.media.shard import parse_index
from trajstore.operations.damage import Damage, StoreReport
from trajstore.operations.verify import verify


def fill(path: Path, count: int = 60, *, first: int = 0, part: str | None = None, resume: bool = False) -> None:
    rng = np.random.default_rng(first)
    with trajstore.create(
        path, part=part, resume=resume, unique="seed", commit_every=None, handle_signals=False
    ) as writer:
        for seed in range(first, first + count):
            steps = 5 + seed % 11
            frames = (rng.integers(0, 256, (steps, 3, 32, 32)) / 255).astype(np.float16)
            trajectory = {"obs": frames, "inner": {"reward": rng.random(steps), "value": rng.random(steps + 1)}}
            writer.append({**trajectory, "name": f"route {seed}"}, seed=seed, diag={"seed": seed})
            if seed % 20 == 0:
                writer.commit()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "run.zarr"
    fill(path)
    fill(path, first=60, count=5, resume=True)  # seals the first session's shards
    return path


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run.zarr"))


def only(path: Path, *, deep: bool = False) -> StoreReport:
    (report,) = verify(path, deep=deep).stores
    return report


def first(report: StoreReport, kind: str) -> Damage:
    found = [damage for damage in report.damages if damage.kind == kind]
    assert found, [damage.lines() for damage in report.damages]
    return found[0]


def index_of(store: Path, array: str, shard: int) -> np.ndarray:
    """Where the frames of a shard lie in its file, int64 (chunks, 2)."""
    (snapshot,) = trajstore.open(store).snapshots
    layout, _ = snapshot.manifest.arrays[array]
    length = snapshot.storage.size(layout.shard_key(shard))
    assert length is not None
    data = snapshot.storage.read(layout.shard_key(shard), length - layout.index_bytes, length)
    return parse_index(data, layout, length)


def frame(store: Path, array: str, chunk: int) -> int:
    """Where a chunk's frame begins in the file that holds it."""
    layout, _ = trajstore.open(store).snapshots[0].manifest.arrays[array]
    shard, inner = divmod(chunk, layout.chunks_per_shard)
    return int(index_of(store, array, shard)[inner, 0])


def flip(path: Path, offset: int, length: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + length] = bytes(byte ^ 0xFF for byte in data[offset : offset + length])
    path.write_bytes(data)


@pytest.mark.parametrize("deep", [False, True])
def test_a_whole_store_is_whole(store: Path, deep: bool) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(store, deep=deep, progress=lambda done, total: seen.append((done, total)))
    (one,) = report.stores
    assert report.ok and report.deep == deep
    assert (one.trajectories, one.steps, one.orphans, one.temporaries) == (65, sum(5 + s % 11 for s in range(65)), 0, 0)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (one.bytes, one.bytes) and len(seen) == one.files > 13


def test_a_flipped_bit_names_the_trajectory_and_its_rows(store: Path) -> None:
    file = store / "steps/obs/c.0.0.0.0"
    size = trajstore.open(store).snapshots[0].reader("steps/obs").layout.chunk_rows
    flip(file, frame(store, "steps/obs", 0) + 40)
    report = only(store)
    (damage,) = report.damages
    assert (damage.kind, damage.field, damage.rows) == ("chunk", "obs", (0, size))
    lengths = [5 + seed % 11 for seed in range(65)]
    ends = np.cumsum(lengths)
    hit = [i for i in range(65) if ends[i] - lengths[i] < size]
    assert damage.trajectories.tolist() == hit
    assert damage.spans[-1].tolist() == [0, size - (ends[hit[-1]] - lengths[hit[-1]])]
    assert damage.lines()[0].startswith("trajectory 0, field obs, rows 0..5, file steps/obs/c.0.0.0.0: ")
    assert report.damaged_rows() == {"obs": [(0, size)]}
    dataset = trajstore.open(store)
    for number in range(65):
        if number in hit:
            with pytest.raises(trajstore.TrajstoreError):
                dataset[number]["obs"][:]
        else:
            assert len(dataset[number]["obs"][:])


def test_a_change_between_chunks_is_found_though_it_harms_no_row(store: Path) -> None:
    file = store / "steps/obs/c.0.0.0.0"
    reader = trajstore.open(store).snapshots[0].reader("steps/obs")
    index = reader._index(0)
    used = np.zeros(file.stat().st_size - reader.layout.index_bytes, bool)
    for offset, size in index[index[:, 0] >= 0].tolist():
        used[offset : offset + size] = True
    flip(file, int(np.flatnonzero(~used)[0]))
    (damage,) = only(store).damages
    assert (damage.kind, len(damage.trajectories)) == ("checksum", 0)


def test_a_lost_shard_takes_all_its_trajectories(store: Path) -> None:
    (store / "steps/inner/reward/c.0").unlink()
    damage = first(only(store), "missing")
    assert damage.field == "inner/reward" and damage.trajectories.tolist() == list(range(60))


def test_an_older_version_of_a_shard_is_found(store: Path) -> None:
    file = store / "steps/obs/c.0.0.0.0"
    file.write_bytes(file.read_bytes()[:-5000])
    damage = first(only(store), "short")
    assert damage.trajectories.tolist() == list(range(60)) and "older version" in damage.message


def test_another_file_of_the_same_length_is_found(store: Path) -> None:
    file = store / "steps/inner/value/c.0"
    flip(file, len(file.read_bytes()) - 20, 8)  # in the index
    damage = first(only(store), "index")
    assert damage.field == "inner/value" and len(damage.trajectories) == 60


def test_a_damaged_clock_takes_whole_trajectories(store: Path) -> None:
    flip(store / "clocks/steps/c.0.0", frame(store, "clocks/steps", 0) + 25)
    damage = first(only(store), "chunk")
    assert damage.clock == "steps" and damage.trajectories.tolist() == list(range(60))


def test_a_damaged_column_names_the_column(store: Path) -> None:
    (store / "trajectories/seed/c.0").unlink()
    damage = first(only(store), "missing")
    assert damage.column == "seed" and damage.lines()[0].startswith("trajectory 0, column seed, file ")


def test_without_its_seals_nothing_can_be_read(store: Path) -> None:
    (store / "integrity/seals/c.0.0").unlink()
    report = only(store)
    assert len(first(report, "seals").trajectories) == 65


@pytest.mark.parametrize("text", [b"", b"{", b'{"zarr_format": 3}', b"[" * 100000])
def test_a_damaged_manifest_is_damage(store: Path, text: bytes) -> None:
    (store / "zarr.json").write_bytes(text)
    report = only(store)
    assert [damage.kind for damage in report.damages] == ["manifest"] and report.commit is None


def test_a_lost_manifest_is_damage_and_not_an_empty_folder(store: Path, tmp_path: Path) -> None:
    (store / "zarr.json").unlink()
    assert [damage.kind for damage in only(store).damages] == ["manifest"]
    for place in (tmp_path / "nothing", tmp_path):
        if place == tmp_path:
            shutil.rmtree(store)
        with pytest.raises(NotFoundError):
            verify(place)


def test_a_store_that_was_never_committed_is_none(tmp_path: Path) -> None:
    (tmp_path / "s/__trajstore").mkdir(parents=True)
    (tmp_path / "s/__trajstore/lock").touch()
    with pytest.raises(NotFoundError):
        verify(tmp_path / "s")


def edit(store: Path, change: Callable[[dict[str, Any]], None]) -> None:
    root = json.loads((store / "zarr.json").read_text())
    change(root["attributes"]["trajstore"])
    root["attributes"]["trajstore"]["crc32c"] = root_checksum(root)
    (store / "zarr.json").write_text(json.dumps(root))


def test_a_newer_format_is_no_damage(store: Path) -> None:
    edit(
        store, lambda body: body.update(format={"major": 99, "minor": 0, "reader_required": [], "writer_required": []})
    )
    with pytest.raises(UnsupportedFormatError):
        verify(store)


def test_counts_that_do_not_add_up_are_found(store: Path) -> None:
    edit(store, lambda body: body.update(counts={"trajectories": 66, "steps": 1, "next_id": 3}))
    kinds = [damage.kind for damage in only(store).damages]
    assert sorted(kinds) == ["count", "count", "table"]


def test_a_forged_number_of_trajectories_costs_neither_time_nor_memory(store: Path) -> None:
    edit(store, lambda body: body["sets"].update(rows=[[0, 1 << 60]]))
    report = only(store)
    assert {damage.kind for damage in report.damages} >= {"count", "lost"}


def test_a_manifest_that_was_changed_is_found_whatever_the_change(store: Path) -> None:
    """Though the text is JSON still, and all it says is possible."""
    data = (store / "zarr.json").read_bytes()
    for old, new in ((b'"target":null', b'"target":9999'), (b'"number":', b'"number":1'), (b'"id"', b'"Id"')):
        assert old in data
        (store / "zarr.json").write_bytes(data.replace(old, new, 1))
        assert [damage.kind for damage in only(store).damages] == ["manifest"]
    (store / "zarr.json").write_text(json.dumps(json.loads(data), indent=2))
    assert only(store).ok  # laid out anew, and nothing else


def test_metadata_ahead_of_the_manifest_is_found_and_behind_is_not(store: Path) -> None:
    file = store / "steps/obs/zarr.json"
    child = json.loads(file.read_text())
    child["shape"][0] -= 10
    file.write_text(json.dumps(child))
    assert only(store).ok
    child["shape"][0] += 11
    file.write_text(json.dumps(child))
    (damage,) = only(store).damages
    assert (damage.kind, damage.file) == ("metadata", "steps/obs/zarr.json")


def test_what_no_commit_names_is_counted_and_is_no_damage(store: Path) -> None:
    (store / "steps/obs/tmp.abc.1").write_bytes(b"12345")
    (store / "steps/obs/c.7.0.0.0").write_bytes(b"123")
    report = only(store)
    assert report.ok
    assert (report.orphans, report.orphan_bytes) == (1, 3)
    assert (report.temporaries, report.temporary_bytes) == (1, 5)


def rewrite(store: Path, array: str, rows: np.ndarray, first: int) -> None:
    """Put other rows into an array's tail, with all checksums right: what a bug would do, and no disk."""
    from trajstore.engine.commit import read_manifest
    from trajstore.format.manifest import Shard
    from trajstore.media.shard import GrowingShard, encode_frame
    from trajstore.media.storage import LocalStorage

    manifest = read_manifest(LocalStorage(store))
    layout, _ = manifest.arrays[array]
    number, inner = divmod(first // layout.chunk_rows, layout.chunks_per_shard)
    chunk = np.full((layout.chunk_rows, *layout.row_shape), layout.fill, layout.dtype)
    chunk[: len(rows)] = rows
    shard = GrowingShard(layout, number)
    shard.put(inner, encode_frame(chunk, layout.codec), len(rows))
    pieces, taken = shard.next_version()
    (store / layout.shard_key(number)).write_bytes(b"".join(pieces))
    shard.advance(pieces, taken)
    tail = Shard(number, shard.length, shard.crc)

    def name(body: dict) -> None:
        body["tails"][array] = tail.to_json()

    edit(store, name)


def test_trajectories_that_share_rows_are_found(store: Path) -> None:
    snapshot = trajstore.open(store).snapshots[0]
    rows = np.arange(5) + snapshot.live.pairs[1, 0]
    pairs = snapshot.pairs("steps", rows)
    pairs[3] = pairs[1, 0], pairs[1, 0] + 2
    rewrite(store, "clocks/steps", pairs, int(rows[0]))
    damage = first(only(store), "table")
    assert damage.clock == "steps" and damage.trajectories.tolist() == [61, 63]


def test_a_clock_beyond_its_arrays_is_found(store: Path) -> None:
    snapshot = trajstore.open(store).snapshots[0]
    rows = np.arange(5) + snapshot.live.pairs[1, 0]
    pairs = snapshot.pairs("steps", rows)
    pairs[4, 1] += 1000
    rewrite(store, "clocks/steps", pairs, int(rows[0]))
    damage = first(only(store), "table")
    assert damage.clock == "steps" and damage.trajectories.tolist() == [64]


@pytest.mark.parametrize("column", ["id", "seed"])
def test_values_that_must_differ_and_do_not_are_found(store: Path, column: str) -> None:
    snapshot = trajstore.open(store).snapshots[0]
    rows = np.arange(5) + snapshot.live.pairs[1, 0]
    values = snapshot.column(column, rows)
    values[2] = 7
    rewrite(store, f"trajectories/{column}", values, int(rows[0]))
    damage = first(only(store), "table")
    assert damage.column == column and damage.trajectories.tolist() == [7, 62]


def test_whatever_byte_changes_it_is_found_and_never_read_as_something_else(store: Path) -> None:
    """Any one byte of any shard file, or its end: verification says so, and reading raises or gives what was stored."""
    chance = np.random.default_rng(7)
    whole = trajstore.open(store)
    expected = {name: whole.read(name) for name in whole.fields}
    files = sorted(file for file in store.rglob("c.*") if "__trajstore" not in file.parts)
    for turn in range(100):
        file = files[turn % len(files)]
        data = file.read_bytes()
        if turn % 5 == 4:
            os.truncate(file, int(chance.integers(len(data))))
        else:
            flip(file, int(chance.integers(len(data))))
        assert not verify(store).ok, f"turn {turn}, {file}"
        for name, rows in expected.items():
            try:
                found = trajstore.open(store).read(name)
            except CorruptionError:
                continue
            np.testing.assert_array_equal(found, rows)
        file.write_bytes(data)
    assert verify(store).ok


def test_text_that_is_no_text_is_found_when_decoding(store: Path) -> None:
    snapshot = trajstore.open(store).snapshots[0]
    start, stop = snapshot.pairs("name", snapshot.live.pairs[1, :1])[0].tolist()
    reader = snapshot.reader("steps/name")
    base = start - start % reader.layout.chunk_rows
    data = reader.read(base, snapshot.manifest.arrays["steps/name"][1])
    data[start - base : stop - base] = 0xFF
    rewrite(store, "steps/name", data, base)
    assert only(store).ok
    damage = first(only(store, deep=True), "value")
    assert (damage.field, damage.trajectories.tolist()) == ("name", [60])


def test_parts_are_verified_one_by_one(tmp_path: Path) -> None:
    for rank in range(3):
        fill(tmp_path / "run", 4, first=10 * rank, part=f"rank{rank}")
    assert [report.trajectories for report in verify(tmp_path / "run").stores] == [4, 4, 4]
    (tmp_path / "run/rank1/zarr.json").unlink()
    assert [report.ok for report in verify(tmp_path / "run").stores] == [True, False, True]


def test_a_store_is_verified_while_it_is_written(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s", commit_every=None, handle_signals=False) as writer:
        for number in range(30):
            writer.append({"a": np.arange(number + 1)})
            if number % 3 == 0:
                writer.commit()
                report = only(tmp_path / "s", deep=True)
                assert report.ok and report.trajectories == number + 1


def test_a_sealed_hdf5_file_is_verified_too(whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    pytest.importorskip("hdf5plugin")
    from trajstore.exporters.hdf5 import export_hdf5

    file = tmp_path / "run.h5"
    export_hdf5(trajstore.open(whole), file)
    report = only(file, deep=True)
    assert report.ok and report.trajectories == 65 and 0 < report.bytes < file.stat().st_size
    flip(file, frame(file, "steps/obs", 0) + 30)
    (damage,) = only(file).damages
    assert (damage.kind, damage.field, damage.trajectories[0]) == ("chunk", "obs", 0)
