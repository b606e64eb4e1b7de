"""Bytes that an accident, a stranger or an enemy put there: refused with a reason, or read right, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest

import trajstore
from tests.campaign import damage, share
from tests.campaign.workload import tiny_shards
from trajstore.errors import CorruptionError, TrajstoreError
from trajstore.format.layout import ROOT
from trajstore.media.storage import LocalStorage


def test_a_file_that_is_lost_or_put_back_in_an_older_version_is_noticed() -> None:
    counts = damage.lost_and_old_files()
    assert counts["CorruptionError"] > 40
    assert counts["resumed"] > 0, "a writer that needs nothing of what is damaged goes on"


@pytest.mark.parametrize("part", range(6))
def test_no_damage_is_read_as_anything_else(part: int) -> None:
    counts = damage.campaign(1112, 6 * share.NUMBER + part)
    share.count("damage", {"files": counts["damaged"], "found by verify only": counts["found by verify only"]})
    assert counts["CorruptionError"] > 200
    assert counts["forged: CorruptionError"] > 50


KEPT, STATES = damage.versions("afa", wide=False)


@pytest.mark.parametrize(("what", "forge"), list(damage.hostile_roots()), ids=lambda value: str(value)[:40])
def test_a_manifest_that_asks_for_too_much_is_refused(what: str, forge: object) -> None:
    files = KEPT[-1]
    changed = forge(json.loads(files[ROOT]))  # type: ignore[operator]
    outcome = damage.read({**files, ROOT: changed}, {STATES[len(KEPT) - 1]}, what)
    assert outcome in ("CorruptionError", "FormatError") or (outcome == "read right" and "at" in what), outcome
    assert "resume" in damage.go_on({**files, ROOT: changed}, {STATES[len(KEPT) - 1]}, what)


def test_every_digit_of_a_manifest_counts() -> None:
    """A flipped digit is still JSON; a checksum over what it says notices."""
    files, expected = KEPT[-1], STATES[len(KEPT) - 1]
    root = files[ROOT]
    said = root.index(b'"trajstore"')
    digits = [at for at, byte in enumerate(root) if at > said and 48 <= byte <= 57]
    for at in digits[::7]:
        flipped = bytearray(root)
        flipped[at] ^= 1
        with contextlib.suppress(ValueError):
            if json.loads(flipped) == json.loads(root):
                continue  # the seventeenth digit of a time
        outcome = damage.read({**files, ROOT: bytes(flipped)}, {expected}, f"digit {at}")
        assert outcome != "read right", root[at - 30 : at + 30]


def local(tmp_path: Path) -> Path:
    place = tmp_path / "store"
    with tiny_shards():
        writer = trajstore.create(place, commit_every=None)
        for seed in range(6):
            writer.append({"x": damage.trajectory(seed)["x"]}, seed=seed)
        writer.close()
    return place


@pytest.mark.parametrize("make", ["link", "pipe", "folder"])
def test_what_is_no_file_is_not_read_as_a_shard(tmp_path: Path, make: str) -> None:
    place = local(tmp_path)
    shard = place / "steps/x/c.0"
    os.rename(shard, tmp_path / "elsewhere")
    if make == "link":
        os.symlink(tmp_path / "elsewhere", shard)
    elif make == "pipe":
        os.mkfifo(shard)
    else:
        os.mkdir(shard)
    with pytest.raises(TrajstoreError):
        trajstore.open(place).read("x")


@pytest.mark.filterwarnings("ignore:.*symbolic link")
@pytest.mark.parametrize("folder", ["steps", "steps/x", "integrity", "__trajstore"])
def test_a_folder_that_is_a_link_is_not_followed(tmp_path: Path, folder: str) -> None:
    """Neither to read, nor to write, nor to remove what lies there; the store itself may be reached by a link."""
    place = local(tmp_path)
    outside = tmp_path / "outside"
    os.rename(place / folder, outside)
    (outside / "tmp.mine").write_text("mine")
    os.symlink(outside, place / folder)
    before = sorted(file.name for file in outside.rglob("*"))
    if folder != "__trajstore":
        with pytest.raises(TrajstoreError, match="symbolic link"):
            trajstore.open(place).read("x")
    with tiny_shards(), pytest.raises(TrajstoreError), trajstore.create(place, resume=True) as writer:
        writer.append({"x": damage.trajectory(7)["x"]}, seed=7)
    assert sorted(file.name for file in outside.rglob("*")) == before

    whole = local(tmp_path / "whole")
    os.symlink(whole, tmp_path / "link")
    assert len(trajstore.open(tmp_path / "link")) == 6


def test_a_manifest_of_a_gigabyte_is_not_read_into_memory(tmp_path: Path) -> None:
    place = local(tmp_path)
    with open(place / ROOT, "r+b") as file:
        file.truncate(1 << 30)  # a hole: no bytes on the disk
    with pytest.raises(CorruptionError):
        trajstore.open(place)


def test_names_that_escape_are_refused_when_they_are_written(tmp_path: Path) -> None:
    for name in ("../x", "/x", "a//b", "__trajstore", "a/../b", ".hidden", "a\x00b", ""):
        writer = trajstore.create(tmp_path / "store", resume=True, commit_every=None)
        try:
            with pytest.raises(TrajstoreError):
                writer.append({name: damage.trajectory(1)["x"]}, seed=1)
        finally:
            writer.abandon()
    assert sorted(os.listdir(tmp_path)) == ["store"]


def test_a_store_without_its_manifest_is_never_begun_anew(tmp_path: Path) -> None:
    place = local(tmp_path)
    for damaged in (b"", b"{}", b"\x00" * 1000):
        (place / ROOT).unlink()  # the newest commit that is kept beside it is the same file
        (place / ROOT).write_bytes(damaged)
        with pytest.raises(TrajstoreError):
            trajstore.create(place, resume=True)
        assert (place / ROOT).read_bytes() == damaged
    (place / ROOT).unlink()
    with pytest.raises(CorruptionError, match="missing"):
        trajstore.create(place, resume=True)
    assert LocalStorage(place).size("steps/x/c.0")
