"""Repair: what is whole of a damaged store, in a new one; and the older commits that can still be opened."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trajstore.dataset import CACHE_BYTES, Dataset, stores
from trajstore.dataset import open as open_dataset
from trajstore.engine.cache import ChunkCache
from trajstore.engine.commit import kept_commits, read_manifest
from trajstore.engine.seals import records_of_files
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import FormatError, NotFoundError, SchemaError, StorageError
from trajstore.format.intervals import IntervalSet
from trajstore.format.layout import COMMITS, ROOT, commit_key
from trajstore.format.manifest import Manifest
from trajstore.format.schema import ID
from trajstore.media.storage import LocalStorage, Storage
from trajstore.operations.assembly import Destination, located, refuse_existing
from trajstore.operations.damage import Report
from trajstore.operations.merge import Blueprint, blueprint
from trajstore.operations.verify import verify


@dataclass(frozen=True)
class KeptCommit:
    """A manifest that lies in a store: the root, or one of the last commits, which are kept beside it.

    number, time, trajectories : ``None`` where it cannot be opened; ``error`` then says why.
    """

    file: str
    number: int | None
    time: float | None
    trajectories: int | None
    error: str = ""


@dataclass(frozen=True)
class Repair:
    """What can be saved of a store.

    report : what ``verify`` found. whole, lost : int64 (n,), ids of the trajectories that are, and are not, whole.
    """

    report: Report
    whole: np.ndarray[Any, Any]
    lost: np.ndarray[Any, Any]
    blueprint: Blueprint

    def write(self, destination: Destination) -> Dataset:
        """Make the new store, with all trajectories that are whole, under the ids that they had.

        Raises ``AlreadyExistsError`` if something is there.
        """
        return self.blueprint.write(destination, link=False)


def kept(path: str | os.PathLike[str]) -> list[KeptCommit]:
    """The manifests of a store, the root first, then the commits kept beside it, the newest first."""
    storage = LocalStorage(path)
    keys = [ROOT, *(commit_key(number) for number in reversed(kept_commits(storage)))]
    if not any(storage.size(key) for key in keys) and not storage.list(COMMITS):
        raise NotFoundError(f"there is no store at {storage.describe()}")
    return [_kept(storage, key) for key in keys]


def _kept(storage: Storage, key: str) -> KeptCommit:
    try:
        manifest = Manifest.from_bytes(storage.read(key), storage.describe(key))
    except (FormatError, NotFoundError, StorageError) as error:
        return KeptCommit(key, None, None, None, error.message)
    return KeptCommit(key, manifest.commit.number, manifest.commit.time, manifest.counts["trajectories"])


class _AsOf(LocalStorage):
    """A store as one of its kept commits left it: that commit's manifest stands for the root."""

    def __init__(self, root: str, number: int) -> None:
        super().__init__(root)
        self._number = number

    def __reduce__(self) -> Any:
        return _AsOf, (self.root, self._number)

    def _path(self, key: str) -> str:
        return super()._path(commit_key(self._number) if key == ROOT else key)


def plan_repair(path: str | os.PathLike[str], *, commit: int | None = None, progress: Any = None) -> Repair:
    """What :func:`repair` would save; nothing is written."""
    storage: Storage = LocalStorage(path)
    if commit is not None:
        if commit not in kept_commits(LocalStorage(path)):
            known = ", ".join(map(str, kept_commits(LocalStorage(path)))) or "none"
            raise NotFoundError(f"commit {commit} of {os.fspath(path)} is not kept", hint=f"kept are {known}")
        storage = _AsOf(os.fspath(path), commit)
    report = verify(storage, deep=True, salvage=True, progress=progress)
    if len(report.stores) > 1:
        raise SchemaError(
            f"{os.fspath(path)} holds {len(report.stores)} stores", hint="repair each of its parts by itself"
        )
    dataset = _opened(storage, sealed=not any(damage.kind == "seals" for damage in report.stores[0].damages))
    snapshot = dataset.snapshots[0]
    hit = np.zeros(len(dataset), np.bool_)
    hit[report.stores[0].damaged_trajectories] = True
    whole, lost = dataset[~hit], dataset[hit]
    planned = blueprint(whole, keep_ids=True, provenance=False, rewrite=True)
    ids = whole.table[ID] if len(whole) else np.empty(0, np.int64)  # a store may have no column yet
    return Repair(report, ids, _ids(lost), _without_lost_seeds(planned, snapshot))


def _opened(storage: Storage, *, sealed: bool) -> Dataset:
    """The store; without its seals its shards are taken as long as their files are."""
    if sealed:
        return open_dataset(storage)
    found = stores(storage)[0]
    cache = ChunkCache(CACHE_BYTES)
    snapshot = Snapshot(found, read_manifest(found), cache)
    snapshot.take_for_seals(records_of_files(found, snapshot.manifest))
    return Dataset((storage,), (snapshot,), cache)


def _without_lost_seeds(planned: Blueprint, snapshot: Snapshot) -> Blueprint:
    """The seeds of what is lost can be collected again: they count neither as attempted nor as completed.

    Those of trajectories that were deleted still do, if they can be read.
    """
    contents = planned.contents
    key = contents.progress.get("unique") or "seed"
    if key not in contents.columns or not contents.columns[key][0].dtype.startswith(("int", "uint")):
        return planned
    kept = IntervalSet.of(contents.columns[key][1]) | _readable(snapshot, key, snapshot.set("deleted"))
    lost = snapshot.set("completed") - kept
    sets = {
        name: found - lost if name in ("attempted", "completed") else found for name, found in contents.sets.items()
    }
    return replace(planned, contents=replace(contents, sets=sets))


def _readable(snapshot: Snapshot, column: str, rows: IntervalSet) -> IntervalSet:
    """The values of an integer column in those of the rows that can be read."""
    numbers = rows.nth(np.arange(len(rows), dtype=np.int64))
    try:
        return IntervalSet.of(snapshot.column(column, numbers))
    except (FormatError, StorageError):
        found = []
    for number in numbers:
        try:
            found.append(int(snapshot.column(column, number[None])[0]))
        except (FormatError, StorageError):
            continue
    return IntervalSet.of(found)


def _ids(dataset: Dataset) -> np.ndarray[Any, Any]:
    """Ids of damaged trajectories; -1 where they lie in what is damaged."""
    found = np.full(len(dataset), -1, np.int64)
    for number in range(len(dataset)):
        try:
            found[number] = dataset[number : number + 1].table[ID][0]
        except (FormatError, StorageError):
            continue
    return found


def repair(
    path: str | os.PathLike[str], destination: Destination, *, commit: int | None = None, progress: Any = None
) -> Repair:
    """Save every trajectory of a damaged store that is whole into a new one. The damaged store is only read.

    Parameters
    ----------
    destination : where the new store will stand; there must be nothing yet. It appears whole or not at all.
    commit : read the store as this one of its kept commits left it (see :func:`kept`), where its manifest is lost.
    progress : see ``verify.Progress``.

    Raises
    ------
    AlreadyExistsError
        There is something at the destination.
    FormatError
        The manifest cannot be read; :func:`kept` says which older ones can.

    Notes
    -----
    Where the seals are damaged, shards are taken as long as their files are. The seed of a trajectory that is lost
    counts neither as attempted nor as completed in the new store, so that it can be collected again.

    A trajectory is whole if every row that it names in every field, and its row of the table, passes every check that
    ``verify`` makes, with all chunks decoded.
    """
    refuse_existing(*located(destination))
    planned = plan_repair(path, commit=commit, progress=progress)
    planned.write(destination)
    return planned
