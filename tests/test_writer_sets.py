"""Sets of very many intervals: what they cost a commit, and that nothing of them is left behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from tests.campaign.disk import Disk, Tapped
from trajstore.engine.commit import kept_commits
from trajstore.engine.sets import SetWriter
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import StorageError
from trajstore.format.intervals import IntervalSet
from trajstore.format.layout import ROOT, SETS, commit_key
from trajstore.format.manifest import INLINE_INTERVALS, Manifest, StoredSet
from trajstore.media.storage import LocalStorage, Storage
from trajstore.operations.verify import verify

STEPS = {"x": np.arange(3)}


def arrays_of(path: Path) -> set[str]:
    return {name for name in LocalStorage(path).list(SETS) if name != ROOT}


def named_by(path: Path) -> set[str]:
    """The arrays that the manifests name which are kept."""
    storage = LocalStorage(path)
    keys = [ROOT, *(commit_key(number) for number in kept_commits(storage))]
    manifests = [Manifest.from_bytes(storage.read(key), key) for key in keys]
    return {array.name for manifest in manifests for array in manifest.set_arrays}


@pytest.fixture
def disk() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def test_a_set_that_grows_is_not_written_again_with_every_commit(disk: ThreadPoolExecutor) -> None:
    """20,000 seeds in random order: rewriting the set each time comes to several times as many intervals."""
    rows = 0
    inner = Disk().storage()
    inner.make_folder(SETS)

    def tap(name: str, arguments: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        return call()

    writer = SetWriter(Tapped(inner, tap), "token", disk)  # type: ignore[arg-type]
    order = np.random.default_rng(0).permutation(20_000)
    seeds = IntervalSet()
    rewritten = 0
    known: set[str] = set()
    for first in range(0, len(order), 200):
        seeds |= IntervalSet.of(order[first : first + 200])
        said = writer.store({"attempted": seeds, "completed": seeds})
        assert said["attempted"] == said["completed"]
        stored = said["attempted"]
        if isinstance(stored, StoredSet):
            sizes = [array.intervals for array in stored.arrays]
            assert all(larger > 2 * smaller for larger, smaller in itertools.pairwise(sizes))
            assert len(stored.rest.pairs) <= 256
            rows += sum(array.intervals for array in stored.arrays if array.name not in known)
            known |= {array.name for array in stored.arrays}
            rewritten += len(seeds.pairs)
        writer.forget()
    assert isinstance(said["attempted"], IntervalSet)  # they have grown together
    assert rows * 4 < rewritten
    for _ in range(4):
        writer.store({"attempted": seeds})
        writer.forget()
    assert inner.list(SETS) == []


def test_a_store_reads_what_its_sets_hold(tmp_path: Path) -> None:
    path = tmp_path / "s"
    order = np.random.default_rng(1).permutation(20_000)[:9_000]
    for session in np.array_split(order, 3):
        with trajstore.create(path, resume=True, commit_every=None) as writer:
            for seeds in np.array_split(session, 4):
                writer.mark_attempted(seeds)
                writer.commit()
                assert Snapshot.of(LocalStorage(path)).set("attempted") == writer.attempted
    with trajstore.create(path, resume=True) as writer:
        assert writer.attempted == IntervalSet.of(order)
    assert verify(path).ok


def test_arrays_of_dead_sessions_go_with_the_commits_that_name_them(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for session in range(4):
        writer = trajstore.create(path, resume=True, commit_every=None)
        writer.mark_attempted(range(0, 6000 + 2 * session, 2))
        writer.append(STEPS, seed=2 * session + 1)
        writer.commit()
        writer.abandon()
        assert arrays_of(path) >= named_by(path)
        assert len(arrays_of(path)) <= 6
    (path / SETS / "attempted.of_a_dead_session.0").mkdir()
    with trajstore.create(path, resume=True, commit_every=None) as writer:
        assert len(writer.attempted) == 3003 + 4
        for session in range(5):
            writer.mark_attempted(100_001 + session)
            writer.commit()
        assert arrays_of(path) == named_by(path) and len(arrays_of(path)) <= 2


def test_a_writer_that_was_thought_dead_keeps_its_arrays_until_it_can_commit_no_more(tmp_path: Path) -> None:
    """Between another's opening and its first commit the old one may still commit what it has written."""
    path = tmp_path / "s"
    trajstore.create(path).close()
    storage: Storage = LocalStorage(path)
    with ThreadPoolExecutor(2) as disk:
        old = SetWriter(storage, "old", disk)
        storage.make_folder(SETS)
        old.store({"attempted": IntervalSet.of(range(0, 4000, 2))})
        new = SetWriter(storage, "new", disk)
        new.store({"attempted": IntervalSet.of(range(0, 4000, 2))})
        assert arrays_of(path) == {"attempted.old.0", "attempted.new.0"}
        new.forget()
        assert arrays_of(path) == {"attempted.new.0"}


def test_what_cannot_be_removed_fails_no_commit(disk: ThreadPoolExecutor) -> None:
    inner = Disk().storage()
    inner.make_folder(SETS)
    broken = [True]

    def tap(name: str, arguments: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        if name in ("remove", "list") and broken[0] and str(arguments[0]).startswith(SETS):
            raise StorageError("Input/output error", errno=5)
        return call()

    writer: Any = SetWriter(Tapped(inner, tap), "token", disk)  # type: ignore[arg-type]
    for number in range(2 * INLINE_INTERVALS, 2 * INLINE_INTERVALS + 8):
        taken_out = IntervalSet.of(range(0, number, 2)) - IntervalSet.span(0, number - 2 * INLINE_INTERVALS)
        writer.store({"attempted": taken_out | IntervalSet.of([10**6, 10**6 + 2])})
        writer.forget()
    broken[0] = False
    for _ in range(4):
        writer.store({"attempted": IntervalSet()})
        writer.forget()
    assert inner.list(SETS) == []
