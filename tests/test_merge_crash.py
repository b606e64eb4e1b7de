"""Merges, splits, moves, deletions and derived arrays that are killed, or lose power, at any of their operations."""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import trajstore
from tests.campaign.disk import CHANGES, SYNCS, Disk, Image, Tapped
from tests.campaign.images import Replay
from trajstore.errors import AlreadyExistsError, NotFoundError, StorageError
from trajstore.format import encoding
from trajstore.media.storage import Storage
from trajstore.operations import assembly, tasks
from trajstore.operations.compact import compact
from trajstore.operations.delete import delete
from trajstore.operations.derive import ReturnsToGo, add_column, add_field
from trajstore.operations.merge import merge
from trajstore.operations.split import split
from trajstore.operations.verify import verify

SEEDS = {"rank_0": range(0, 9), "rank_1": range(20, 26)}
MOMENTS, IMAGES = 60, 2  # at which the power fails, and images tried at each


@pytest.fixture(autouse=True)
def small_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows fill several shards, and operations come in one order, so that a moment is always the same one."""
    sizes = {"_SHARD_ROWS": 8, "_NARROW_ROWS": 2, "_TABLE_CHUNK_ROWS": 2, "_TABLE_SHARD_ROWS": 8}
    for name, value in sizes.items():
        monkeypatch.setattr(encoding, name, value)
    monkeypatch.setattr(assembly, "_DISK_THREADS", 1)
    monkeypatch.setattr(tasks, "_THREADS", 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no Dask


def sources(disk: Disk) -> None:
    storage = disk.storage()
    storage.make_root()
    for name, seeds in SEEDS.items():
        with trajstore.create(storage, part=name, commit_every=None, handle_signals=False, threads=1) as writer:
            for seed in seeds:
                steps = 1 + seed % 4
                rows = np.arange(10 * seed, 10 * seed + steps)
                writer.append({"x": rows, "reward": rows / 2}, seed=seed)


def seeds_of(dataset: trajstore.Dataset) -> list[int]:
    """The seeds of a dataset, every row of which was read and found right."""
    seeds: list[int] = dataset.column("seed").tolist()
    for seed, trajectory in zip(seeds, dataset):
        rows = np.arange(10 * seed, 10 * seed + 1 + seed % 4)
        np.testing.assert_array_equal(trajectory["x"][:], rows)
        np.testing.assert_array_equal(trajectory["reward"][:], rows / 2)
    return seeds


ALL = [*SEEDS["rank_0"], *SEEDS["rank_1"]]


def do_merge(root: Storage) -> None:
    merge([root.child(name) for name in SEEDS], (root, "new"))


def do_rewrite(root: Storage) -> None:
    merge([root.child(name) for name in SEEDS], (root, "new"), rewrite=True)


def do_split(root: Storage) -> None:
    split(root.child("rank_0"), (root, "new"), first=4)


def check_merged(root: Storage) -> bool:
    """Whether the merged store is there; all of it then is. The sources always are."""
    for name, seeds in SEEDS.items():
        assert seeds_of(trajstore.open(root.child(name))) == list(seeds)
    try:
        assert seeds_of(trajstore.open(root.child("new"))) == ALL
    except NotFoundError:
        return False
    assert verify(root.child("new"), deep=True).ok
    return True


def check_split(root: Storage) -> bool:
    assert seeds_of(trajstore.open(root.child("rank_0"))) == list(SEEDS["rank_0"])
    try:
        parts = [seeds_of(trajstore.open(root.child(f"new/{name}"))) for name in ("first", "rest")]
    except NotFoundError:
        assert not [name for name in root.list("new") if not name.startswith("__")], "all parts or none"
        return False
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    return True


def do_compact(root: Storage) -> None:
    compact(root.child("rank_0"), (root, "new"))


def check_compacted(root: Storage) -> bool:
    assert seeds_of(trajstore.open(root.child("rank_0"))) == list(SEEDS["rank_0"])
    try:
        assert seeds_of(trajstore.open(root.child("new"))) == list(SEEDS["rank_0"])
    except NotFoundError:
        return False
    assert verify(root.child("new"), deep=True).ok
    return True


def do_delete(root: Storage) -> None:
    delete(root.child("rank_0"), where="seed >= 5")


def check_deleted(root: Storage) -> bool:
    seeds = seeds_of(trajstore.open(root.child("rank_0")))
    assert seeds in ([0, 1, 2, 3, 4], list(SEEDS["rank_0"]))
    return len(seeds) == 5


def do_derive(root: Storage) -> None:
    with_column = "twice" in trajstore.open(root.child("rank_0")).columns
    if not with_column:
        add_column(root.child("rank_0"), "twice", "seed * 2")
    try:
        add_field(root.child("rank_0"), "togo", ReturnsToGo(), like="reward")
    except AlreadyExistsError:  # claimed by the one that died, and finished by whoever opens the store next
        pass


def check_derived(root: Storage) -> bool:
    dataset = trajstore.open(root.child("rank_0"))
    assert seeds_of(dataset) == list(SEEDS["rank_0"])
    assert verify(root.child("rank_0"), deep=True).ok
    if "twice" in dataset.columns:
        assert dataset.column("twice").tolist() == [2 * seed for seed in SEEDS["rank_0"]]
    for trajectory in dataset if "togo" in dataset.fields else []:
        np.testing.assert_array_equal(trajectory["togo"][:], np.cumsum(trajectory["reward"][::-1])[::-1])
    return "togo" in dataset.fields


Operation = tuple[Callable[[Storage], None], Callable[[Storage], bool]]
OPERATIONS: dict[str, Operation] = {
    "merge": (do_merge, check_merged),
    "rewrite": (do_rewrite, check_merged),
    "split": (do_split, check_split),
    "compact": (do_compact, check_compacted),
    "delete": (do_delete, check_deleted),
    "derive": (do_derive, check_derived),
}


class Killed(BaseException):
    pass


def mortal(storage: Storage, moment: int) -> tuple[Storage, list[str]]:
    """The storage as a process sees it that is killed before its change number ``moment``; the changes it made."""
    made: list[str] = []

    def tap(name: str, key: str, call: Callable[[], Any]) -> Any:
        if name in CHANGES or name in SYNCS:
            if len(made) >= moment:
                raise Killed
            made.append(name)
        return call()

    return Tapped(storage, tap), made  # type: ignore[return-value]


def begun() -> Disk:
    disk = Disk()
    sources(disk)
    return disk


def again(disk: Disk) -> Storage:
    """The disk as the next process finds it: a dead one holds no lock."""
    disk.locks.clear()
    return disk.storage()


def copied(disk: Disk) -> Disk:
    return Image(disk.folders, disk.files).disk()


def contents(disk: Disk) -> dict[str, bytes]:
    """Every shard of the new stores but those of seals, which also hold what was in the way."""
    return {key: data for key, data in disk.tree().items() if "/c." in key and "/integrity/" not in key}


@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_at_any_operation_it_runs_again_to_the_same_end(name: str) -> None:
    do, check = OPERATIONS[name]
    first = begun()
    whole = copied(first)
    storage, changes = mortal(again(whole), 1 << 30)
    do(storage)
    assert check(again(whole))
    expected = contents(whole)
    moments = list(range(len(changes)))
    if len(moments) > 20:
        moments = random.Random(1).sample(moments, 20)
    for moment in moments:
        disk = copied(first)
        storage, _ = mortal(again(disk), moment)
        with pytest.raises(Killed):
            do(storage)
        if not check(again(disk)):
            do(again(disk))
            assert check(again(disk))
        if name == "derive":  # it begins another array where a dead session had begun one
            continue
        found = contents(disk)
        assert found.keys() >= expected.keys() and all(found[key] == expected[key] for key in expected)
        names = [name for name in disk.storage().list("") if name.startswith("tmp.")]
        assert not names, "a finished run leaves no scaffold"


@pytest.mark.parametrize("name", OPERATIONS)
def test_after_a_power_failure_at_any_moment_it_is_whole_or_not_there(name: str) -> None:
    do, check = OPERATIONS[name]
    start = begun()
    disk = copied(start)
    do(again(disk))
    draw = random.Random(7)
    points = list(Replay(disk).points(copied(start)))
    for point in draw.sample(points, min(MOMENTS, len(points))):
        for image in point.some(IMAGES, draw):
            survivor = image.disk()
            done = check(again(survivor))
            if draw.random() < 0.1 and not done:
                do(again(survivor))
                assert check(again(survivor))
    for image in points[-1].some(20, draw):
        assert check(again(image.disk())), "what was acknowledged outlives a power failure"


@pytest.mark.parametrize("for_ever", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_fails_surfaces_and_harms_nothing(name: str, for_ever: bool) -> None:
    do, check = OPERATIONS[name]
    first = begun()
    whole = copied(first)
    storage, changes = mortal(again(whole), 1 << 30)
    do(storage)
    for moment in random.Random(2).sample(range(len(changes)), 8):
        disk = copied(first)
        calls = itertools.count()

        def tap(name: str, key: str, call: Callable[[], Any], moment: int = moment, calls: Any = calls) -> Any:
            if name in CHANGES or name in SYNCS:
                number = next(calls)
                if number == moment or (for_ever and number > moment):
                    raise StorageError("the disk is full", errno=errno.ENOSPC)
            return call()

        try:
            do(Tapped(again(disk), tap))  # type: ignore[arg-type]
        except StorageError:
            check(again(disk))
        else:
            assert check(again(disk)), "it found another way"
