"""Merges, splits, compactions, deletions and derived arrays on the disk in memory: killed, failed, out of power."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

import trajstore
from tests.campaign.disk import CHANGES, SYNCS, Disk, Image, Tapped
from tests.campaign.explorer import Memo, Violation
from tests.campaign.images import Replay
from trajstore.errors import AlreadyExistsError, NotFoundError
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


@contextlib.contextmanager
def small_and_in_order() -> Iterator[None]:
    """A few rows fill several shards, and operations come in one order, so that a moment is always the same one."""
    sizes = {"_SHARD_ROWS": 8, "_NARROW_ROWS": 2, "_TABLE_CHUNK_ROWS": 2, "_TABLE_SHARD_ROWS": 8}
    with contextlib.ExitStack() as stack:
        for name, value in sizes.items():
            stack.enter_context(mock.patch.object(encoding, name, value))
        stack.enter_context(mock.patch.object(assembly, "_DISK_THREADS", 1))
        stack.enter_context(mock.patch.object(tasks, "_THREADS", 1))
        stack.enter_context(mock.patch("importlib.util.find_spec", return_value=None))  # no Dask
        yield


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


def look_merged(root: Storage) -> bool:
    """Whether the merged store is there; all of it then is. The sources always are."""
    for name, seeds in SEEDS.items():
        assert seeds_of(trajstore.open(root.child(name))) == list(seeds)
    try:
        assert seeds_of(trajstore.open(root.child("new"))) == ALL
    except NotFoundError:
        return False
    return True


def look_split(root: Storage) -> bool:
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


def look_compacted(root: Storage) -> bool:
    assert seeds_of(trajstore.open(root.child("rank_0"))) == list(SEEDS["rank_0"])
    try:
        assert seeds_of(trajstore.open(root.child("new"))) == list(SEEDS["rank_0"])
    except NotFoundError:
        return False
    return True


def do_delete(root: Storage) -> None:
    delete(root.child("rank_0"), where="seed >= 5")


def look_deleted(root: Storage) -> bool:
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


def look_derived(root: Storage) -> bool:
    dataset = trajstore.open(root.child("rank_0"))
    assert seeds_of(dataset) == list(SEEDS["rank_0"])
    if "twice" in dataset.columns:
        assert dataset.column("twice").tolist() == [2 * seed for seed in SEEDS["rank_0"]]
    for trajectory in dataset if "togo" in dataset.fields else []:
        np.testing.assert_array_equal(trajectory["togo"][:], np.cumsum(trajectory["reward"][::-1])[::-1])
    return "togo" in dataset.fields


Operation = tuple[Callable[[Storage], None], Callable[[Storage], bool], str]
LOOKS: dict[str, Operation] = {
    "merge": (do_merge, look_merged, "new"),
    "rewrite": (do_rewrite, look_merged, "new"),
    "split": (do_split, look_split, "new/first"),
    "compact": (do_compact, look_compacted, "new"),
    "delete": (do_delete, look_deleted, "rank_0"),
    "derive": (do_derive, look_derived, "rank_0"),
}


def _checked(look: Callable[[Storage], bool], target: str) -> Callable[[Storage], bool]:
    """Whether the operation is done; all of what it made is then verified too."""

    def check(root: Storage) -> bool:
        done = look(root)
        assert not done or verify(root.child(target), deep=True).ok
        return done

    return check


OPERATIONS = {name: (do, _checked(look, target)) for name, (do, look, target) in LOOKS.items()}


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


def sees(disk: Disk) -> Storage:
    """The disk as the next process finds it: a dead one holds no lock."""
    disk.locks.clear()
    return disk.storage()


def copied(disk: Disk) -> Disk:
    return Image(disk.folders, disk.files).disk()


def contents(disk: Disk) -> dict[str, bytes]:
    """Every shard of the new stores but those of seals, which also hold what was in the way."""
    return {key: data for key, data in disk.tree().items() if "/c." in key and "/integrity/" not in key}


def unsynced(storage: Storage) -> Storage:
    """A storage that makes no folder durable."""

    def tap(name: str, arguments: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        return None if name == "sync_folder" else call()

    return Tapped(storage, tap)  # type: ignore[return-value]


def power_failures(
    name: str,
    moments: int,
    images: int,
    seed: int = 7,
    *,
    again: float = 0.1,
    cover: bool = False,
    wrap: Callable[[Storage], Storage] = lambda storage: storage,
) -> Counter[str]:
    """Images of so many moments of one operation: the new store is whole or not there, the old ones always are.

    again : share of those where it is not there on which the operation runs once more.
    cover : look at every image of every moment as well; those that differ only in what is not looked at, together.
    wrap : what the operation is given in the place of its storage.
    Raises ``Violation``.
    """
    do, check = OPERATIONS[name]
    counts: Counter[str] = Counter()
    draw = random.Random(seed)
    with small_and_in_order():
        start = begun()
        disk = copied(start)
        do(wrap(sees(disk)))
        points = list(Replay(disk).points(copied(start)))
        position = 0
        try:
            if cover:
                memo = Memo(LOOKS[name][1])
                for point in points:
                    position = point.position
                    for found, which in point.cover(memo):
                        if isinstance(found, Exception) or (point is points[-1] and not found):
                            raise Violation(f"recovered {found!r}")
                        counts["covered"] += point.count(which)
                counts["moments covered"] = len(points)
                counts["readings"] = memo.runs
            for point in draw.sample(points, min(moments, len(points))):
                position = point.position
                counts["moments"] += 1
                for image in point.some(images, draw):
                    survivor = image.disk()
                    done = check(sees(survivor))
                    counts["images"] += 1
                    if not done and draw.random() < again:
                        do(sees(survivor))
                        counts["run again"] += 1
                        if not check(sees(survivor)):
                            raise Violation("it ran again, and made nothing")
            for image in points[-1].some(20, draw):
                counts["images"] += 1
                if not check(sees(image.disk())):
                    raise Violation("what was acknowledged is gone")
        except Exception as error:
            raise Violation(f"{name}, after effect {position}, seed {seed}: {error!r}") from error
    return counts


def campaign(moments: int, images: int, seed: int = 0) -> Counter[str]:
    """Power failures in each of the operations."""
    counts: Counter[str] = Counter()
    for name in OPERATIONS:
        found = power_failures(name, moments, images, seed, cover=seed % 20 == 0)
        counts.update(found)
        counts[f"{name}: images"] += found["images"]
    return counts
