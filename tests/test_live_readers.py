"""Readers of four makes beside a writer that commits, is killed and resumes as fast as it can."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest

import trajstore
from tests.campaign import readers, share


@pytest.mark.parametrize("seed", range(2))
def test_our_own_readers_and_their_old_snapshots(seed: int) -> None:
    counts = readers.campaign(5, 2 * share.NUMBER + seed, ("own", "own_held"), reads=17_000)
    share.count("live readers", counts)
    assert counts["own reader"] and counts["reads"] > 20


@pytest.mark.parametrize(
    ("kind", "package"), [("zarr_python", "zarr"), ("tensorstore", "tensorstore"), ("zarrs", "zarrs")]
)
def test_readers_of_other_makes(kind: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    counts = readers.campaign(5, 7 + share.NUMBER, ("own", kind))
    share.count("live readers", counts)
    assert counts["reads"] > 20


def test_an_old_snapshot_travels_though_its_large_sets_are_gone(tmp_path: Path) -> None:
    """A worker that unpickled a dataset after some commits of evictions found its store damaged."""
    writer = trajstore.create(tmp_path / "store", commit_every=None)
    writer.append_many({"x": np.arange(3000)}, lengths=np.ones(3000, np.int64), seed=np.arange(3000))
    writer.commit()
    writer.delete(range(0, 2400, 2))  # more intervals than the manifest holds
    writer.commit()
    dataset = trajstore.open(tmp_path / "store")
    packed = pickle.dumps(dataset)
    writer.delete(range(1200))  # intervals grow together, and the manifest holds them again
    for number in range(7):
        writer.delete(2900 + 2 * number)
        writer.commit()
    writer.close()
    for old in (pickle.loads(packed), dataset):
        assert len(old) == 1800 and old.table["seed"][:2].tolist() == [1, 3]
    assert len(trajstore.open(tmp_path / "store")) == 1193
    assert not list((tmp_path / "store/sets").glob("*/c.*")), "the sets of the old snapshot are gone"


def test_a_reader_that_comes_as_a_set_goes_takes_the_newer_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trajstore.engine import snapshot

    writer = trajstore.create(tmp_path / "store", commit_every=None)
    writer.append_many({"x": np.arange(3000)}, lengths=np.ones(3000, np.int64), seed=np.arange(3000))
    writer.delete(range(0, 2400, 2))
    writer.commit()
    read = snapshot.read_manifest

    def slow(storage: object) -> object:
        monkeypatch.undo()
        old = read(storage)  # type: ignore[arg-type]
        writer.delete(range(1200))
        for number in range(7):
            writer.delete(2900 + 2 * number)
            writer.commit()
        return old

    monkeypatch.setattr(snapshot, "read_manifest", slow)
    assert len(trajstore.open(tmp_path / "store")) == 1193
    writer.close()
