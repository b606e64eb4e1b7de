"""What is whole of a damaged store is saved, the rest is named, and the damaged store is never written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

import trajstore
import trajstore.operations.verify
from tests.campaign.workload import rows_of, tiny_shards, trajectory
from trajstore.errors import AlreadyExistsError, CorruptionError, NotFoundError
from trajstore.format.layout import ROOT
from trajstore.operations.repair import kept, plan_repair, repair


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "run.zarr"
    with tiny_shards():
        for part in range(3):
            with trajstore.create(place, resume=True, commit_every=None) as writer:
                for seed in range(part * 5, part * 5 + 5):
                    writer.append(trajectory(seed, True), seed=seed)
                writer.state["part"] = part
    return place


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x40
    file.unlink()  # not through a hard link
    file.write_bytes(data)


def digest(place: Path) -> str:
    whole = hashlib.sha256()
    for file in sorted(file for file in place.rglob("*") if file.is_file()):
        whole.update(file.relative_to(place).as_posix().encode() + b"\0" + file.read_bytes())
    return whole.hexdigest()


def check(saved: trajstore.Dataset, lost: set[int]) -> None:
    seeds = saved.table["seed"].tolist()
    assert seeds == [seed for seed in range(15) if seed not in lost]
    for seed, found in zip(seeds, saved):
        assert (seed, found["x"][:].tobytes(), found["obs/image"][:].tobytes()) == rows_of(seed, True)[:3]
        assert found["note"] == f"seed {seed}"


def test_a_whole_store_is_saved_whole(place: Path, tmp_path: Path) -> None:
    done = repair(place, tmp_path / "saved.zarr")
    assert done.report.ok and len(done.lost) == 0
    check(trajstore.open(tmp_path / "saved.zarr"), set())


@pytest.mark.parametrize("file", ["steps/x/c.0", "steps/obs/image/c.1.0.0", "steps/note/c.0", "clocks/steps/c.0.0"])
@pytest.mark.parametrize("what", ["flipped", "lost", "cut"])
def test_what_is_whole_is_saved_and_the_rest_is_named(place: Path, tmp_path: Path, file: str, what: str) -> None:
    if what == "flipped":
        flip(place / file, 20)
    elif what == "lost":
        (place / file).unlink()
    else:
        data = (place / file).read_bytes()
        (place / file).write_bytes(data[: len(data) // 2])
    before = digest(place)
    done = repair(place, tmp_path / "saved.zarr")
    assert digest(place) == before, "the damaged store was written"
    assert not done.report.ok and 0 < len(done.lost) < 15
    assert len(done.whole) + len(done.lost) == 15
    saved = trajstore.open(tmp_path / "saved.zarr")
    check(saved, set(range(15)) - set(done.whole.tolist()))
    assert saved.table["id"].tolist() == done.whole.tolist()
    assert trajstore.operations.verify.verify(tmp_path / "saved.zarr", deep=True).ok
    with trajstore.create(tmp_path / "saved.zarr", resume=True) as writer:
        writer.append(trajectory(20, True), seed=20)
    assert len(trajstore.open(tmp_path / "saved.zarr")) == len(done.whole) + 1


@pytest.mark.parametrize("what", ["flipped", "lost", "cut"])
@pytest.mark.parametrize("more", [False, True])
def test_damaged_seals_cost_nothing_that_is_whole(place: Path, tmp_path: Path, what: str, more: bool) -> None:
    for file in (place / "integrity/seals").glob("c.*"):
        if what == "flipped":
            flip(file, 20)
        elif what == "lost":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:30])
    if more:
        flip(place / "steps/x/c.0", 20)
    before = digest(place)
    done = repair(place, tmp_path / "saved.zarr")
    assert digest(place) == before
    assert not done.report.ok and (len(done.lost) > 0) == more and len(done.whole) + len(done.lost) == 15
    check(trajstore.open(tmp_path / "saved.zarr"), set(done.lost.tolist()))
    assert trajstore.operations.verify.verify(tmp_path / "saved.zarr", deep=True).ok
    assert not trajstore.operations.verify.verify(place).ok


def test_the_seeds_of_what_is_lost_are_collected_again(place: Path, tmp_path: Path) -> None:
    with tiny_shards(), trajstore.create(place, resume=True, commit_every=None) as writer:
        writer.delete(12)
        writer.mark_attempted(40)
        assert len(writer.completed) == 15
    flip(place / "steps/x/c.0", 20)
    done = repair(place, tmp_path / "saved.zarr")
    lost = set(done.lost.tolist())
    assert lost and 12 not in lost
    with trajstore.create(tmp_path / "saved.zarr", resume=True, commit_every=None) as writer:
        for seed in writer.seeds(range(15)):
            assert seed in lost
            writer.append(trajectory(seed, True), seed=seed)
        assert 40 in writer.attempted and not lost - set(writer.completed)
    assert sorted(trajstore.open(tmp_path / "saved.zarr").table["seed"].tolist()) == [n for n in range(15) if n != 12]


def test_an_older_commit_stands_in_for_a_lost_manifest(place: Path, tmp_path: Path) -> None:
    with tiny_shards(), trajstore.create(place, resume=True, commit_every=None) as writer:
        writer.append(trajectory(15, True), seed=15)
    newest = json.loads((place / ROOT).read_bytes())["attributes"]["trajstore"]["commit"]["number"]
    flip(place / ROOT, 300)
    with pytest.raises(CorruptionError, match="repair"):
        trajstore.open(place)
    with pytest.raises(CorruptionError):
        repair(place, tmp_path / "saved.zarr")
    found = kept(place)
    assert found[0].file == ROOT and found[0].error and found[0].number is None
    assert [entry.number for entry in found[1:]] == [newest, newest - 1, newest - 2]
    assert [entry.trajectories for entry in found[1:]] == [16, 15, 15]
    done = repair(place, tmp_path / "saved.zarr", commit=newest - 1)
    assert len(done.lost) == 0
    check(trajstore.open(tmp_path / "saved.zarr"), set())
    with pytest.raises(NotFoundError, match="kept are"):
        repair(place, tmp_path / "other.zarr", commit=99)


def test_nothing_is_written_over(place: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("mine")
    with pytest.raises(AlreadyExistsError):
        repair(place, tmp_path / "there")
    with pytest.raises(NotFoundError):
        kept(tmp_path / "nowhere")
    assert plan_repair(place).whole.tolist() == list(range(15))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.zarr", "there"]


def test_the_command(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("click")
    from click.testing import CliRunner

    from trajstore.cli import main

    def cli(*words: object) -> str:
        done = CliRunner().invoke(main, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return done.stdout

    flip(place / "steps/x/c.0", 20)
    assert "opens" in cli("repair", place)
    assert json.loads(cli("repair", place, "--json"))[0]["file"] == ROOT
    dry = json.loads(cli("repair", place, "--dry-run", "--json"))
    assert dry["lost"] and dry["destination"] is None
    assert "not whole, ids: 0" in cli("repair", place, tmp_path / "saved.zarr", "--no-progress")
    assert np.array_equal(trajstore.open(tmp_path / "saved.zarr").table["id"], dry["whole"])
