"""Verification: every byte that a commit names against its checksums, and the table against itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np

from trajstore.dataset import Place, stores
from trajstore.engine.cache import ChunkCache
from trajstore.engine.commit import read_manifest
from trajstore.engine.crew import SIZE
from trajstore.engine.seals import by_shard, load_seals, records_of_files
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import CorruptionError, FormatError, NotFoundError, StorageError, UnsupportedFormatError
from trajstore.format.encoding import set_layout
from trajstore.format.intervals import IntervalSet
from trajstore.format.layout import (
    COMMITS,
    PRIVATE,
    ROOT,
    SEALS,
    SETS,
    STEPS,
    TABLE,
    ArrayLayout,
    is_temporary,
    metadata_key,
)
from trajstore.format.manifest import Manifest, Shard, StoredSet, root_checksum
from trajstore.media.hdf5storage import Hdf5Storage
from trajstore.media.storage import Storage
from trajstore.operations.damage import Damage, Report, StoreReport
from trajstore.operations.shardcheck import Fault, check_shard, shards_in_hdf5
from trajstore.operations.tablecheck import TableCheck, nowhere

#: Called with the bytes checked so far and the bytes to check in all.
Progress = Callable[[int, int], None]

_CACHE = 8 << 20
_ATTEMPTS = 5


def verify(
    path: Place | list[Place] | tuple[Place, ...],
    *,
    deep: bool = False,
    salvage: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check a store, or every store that ``trajstore.open`` would open, against its last commit.

    Checked are: each shard file that the commit names (present, at least as long as committed, the crc32 of the
    committed bytes, its index, crc32c and lengths of each chunk); that every row that a trajectory names lies in a
    chunk; that clocks lie within their arrays and no two trajectories share a row; that ids, and the column declared
    unique, are; that the manifest's counts hold; that no array's own metadata runs ahead of the manifest.

    Parameters
    ----------
    deep : decode every chunk, string and JSON document too.
    salvage : where the seals are damaged, go by the lengths that the files have, and judge trajectories by the
        checksums of their chunks; else none is whole then.
    threads : checked side by side; by default one for each core.
    progress : see ``Progress``; called in this thread.

    Returns
    -------
    Report
        Damage is in it, and never raised.

    Raises
    ------
    NotFoundError
        There is no store.
    UnsupportedFormatError
        The store is of a newer format.

    Notes
    -----
    Writes nothing. A store may be open for writing meanwhile. Memory: a few MiB for each thread, and 16 bytes for each
    trajectory where their rows do not ascend.
    """
    places = list(path) if isinstance(path, (list, tuple)) else [path]
    storages = [storage for place in places for storage in stores(place)]
    checks = [_StoreCheck(storage, deep, salvage) for storage in storages]
    total = sum(check.work for check in checks)
    done = 0
    pool = ThreadPoolExecutor(threads or SIZE, thread_name_prefix="trajstore-verify")
    try:
        for check in checks:
            for checked in check.shards(pool):
                done += checked
                if progress is not None:
                    progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    return Report(tuple(check.finish() for check in checks), deep)


class _StoreCheck:
    """The checks of one store, in the order: manifest, sets, seals, shards, table, the rest of the folder."""

    def __init__(self, storage: Storage, deep: bool, salvage: bool) -> None:
        self.storage = storage
        self.deep = deep
        self.salvage = salvage
        self.damages: list[Damage] = []
        self.faults: dict[str, list[Fault]] = {}
        self.known: list[tuple[ArrayLayout, Shard]] = []
        self.chunks = self.bytes = self.steps = 0
        self.rows = self.live = IntervalSet()
        self.snapshot: Snapshot | None = None
        self.sealed = True
        try:
            self.snapshot = self._open()
            self._find_shards(self.snapshot)
        except CorruptionError as error:
            self._add("manifest", ROOT, error.message)

    def _add(self, kind: str, file: str, message: str, **where: Any) -> None:
        self.damages.append(Damage(kind, self.storage.describe(), file, message, **where))

    def _open(self) -> Snapshot:
        """The last commit whose sets can be read; a living writer may remove a superseded one between two reads."""
        for _ in range(_ATTEMPTS):
            snapshot = Snapshot(self.storage, _manifest(self.storage), ChunkCache(_CACHE))
            wrong = list(self._set_faults(snapshot))
            if not wrong or _manifest(self.storage).commit == snapshot.manifest.commit:
                break
        for name, file, message in wrong:
            self._add("set", file, f"the set {name!r}: {message}")
        if not any(name in ("rows", "deleted") for name, _, _ in wrong):
            self.rows = snapshot.set("rows")
            self.live = self.rows - snapshot.set("deleted")
        return snapshot

    def _set_faults(self, snapshot: Snapshot) -> Iterator[tuple[str, str, str]]:
        for name, stored in snapshot.manifest.sets.items():
            if not isinstance(stored, StoredSet):
                continue
            for array in stored.arrays:
                layout = set_layout(array.name)
                for shard in array.shards:
                    for fault in check_shard(self.storage, layout, shard, deep=self.deep).faults:
                        if fault.sure or fault.start < array.intervals:
                            yield name, fault.file, fault.message
            try:
                snapshot.set(name)
            except (FormatError, StorageError, NotFoundError) as error:
                yield name, SETS, error.message

    def _find_shards(self, snapshot: Snapshot) -> None:
        """What the manifest and the seals say there is."""
        manifest = snapshot.manifest
        if isinstance(self.storage, Hdf5Storage):
            self.known = list(shards_in_hdf5(self.storage, manifest))
            return
        shards = {(SEALS, shard.number): shard for shard in manifest.seals}
        shards |= {(path, shard.number): shard for path, shard in manifest.tails.items()}
        try:
            shards |= load_seals(self.storage, manifest)
        except (CorruptionError, StorageError, NotFoundError) as error:
            self.sealed = False
            if self.salvage:
                records = records_of_files(self.storage, manifest)
                snapshot.take_for_seals(records)
                shards = by_shard(records, manifest) | shards
                self._add("seals", "", f"shards are taken as long as their files are: {error.message}")
            else:
                everyone = np.arange(min(len(self.live), manifest.counts["trajectories"]))
                message = f"without the lengths of the shards nothing can be read: {error.message}"
                self._add("seals", "", message, trajectories=everyone, spans=nowhere(len(everyone)))
        arrays = manifest.arrays
        self.known = [(arrays[path][0], shard) for (path, _), shard in shards.items() if path in arrays]

    @property
    def work(self) -> int:
        """Bytes to check; those of an HDF5 file are counted by chunks that may be there."""
        return sum(self._work(layout, shard) for layout, shard in self.known)

    def _work(self, layout: ArrayLayout, shard: Shard) -> int:
        return layout.chunks_per_shard if isinstance(self.storage, Hdf5Storage) else shard.length

    def shards(self, pool: ThreadPoolExecutor) -> Iterator[int]:
        """Check every shard; yields the work of each that is done."""
        todo = {pool.submit(check_shard, self.storage, *known, deep=self.deep): known for known in self.known}
        for future in as_completed(todo):
            layout, shard = todo.pop(future)
            checked = future.result()
            self.chunks += checked.chunks
            self.bytes += checked.bytes if isinstance(self.storage, Hdf5Storage) else shard.length
            # Taken from a file's own length, a shard has no checksum to be compared with.
            faults = [fault for fault in checked.faults if self.sealed or fault.kind != "checksum"]
            self.faults.setdefault(layout.path, []).extend(faults)
            yield self._work(layout, shard)

    def finish(self) -> StoreReport:
        """Check what needs the whole, and report."""
        figures: dict[str, int] = {}
        if self.snapshot is not None:
            manifest = self.snapshot.manifest
            for fault in self.faults.get(SEALS, ()):
                if fault.sure:
                    self._add("seals", fault.file, fault.message)
            if self.sealed or self.salvage:
                self.damages += self._table(self.snapshot)
            else:
                self._report_faults(manifest)
            if not isinstance(self.storage, Hdf5Storage):
                self._check_metadata(manifest)
                figures = self._count_orphans(manifest)
        return StoreReport(
            store=self.storage.describe(),
            commit=self.snapshot.manifest.commit.number if self.snapshot else None,
            trajectories=len(self.live),
            steps=self.steps,
            files=len(self.known),
            bytes=self.bytes,
            chunks=self.chunks,
            damages=tuple(self.damages),
            **figures,
        )

    def _table(self, snapshot: Snapshot) -> list[Damage]:
        numbers: dict[str, list[int]] = {}
        for layout, shard in self.known:
            numbers.setdefault(layout.path, []).append(shard.number)
        check = TableCheck(snapshot, self.rows, self.live, self.faults, numbers, deep=self.deep)
        damages = check.run()
        self.steps = check.steps
        return damages

    def _report_faults(self, manifest: Manifest) -> None:
        """What is surely wrong with shards when it cannot be told whose rows they hold."""
        fields = {spec.array: path for path, spec in manifest.schema.fields.items()}
        for path, faults in self.faults.items():
            for fault in faults:
                if fault.sure and path != SEALS:
                    rows = (fault.start, fault.stop)
                    self._add(fault.kind, fault.file, fault.message, rows=rows, field=fields.get(path, ""))

    # -- the rest of the folder ------------------------------------------------------------------------------------

    def _check_metadata(self, manifest: Manifest) -> None:
        """Each array's own metadata may lag behind the manifest, and never lead it."""
        newest: Manifest | None = None
        for path, expected in manifest.children().items():
            key = metadata_key(path)
            if self.storage.size(key) is None:
                continue  # it comes with a later commit, or at close
            wrong = _compare(self.storage, key, expected)
            if wrong and newest is None:
                newest = _manifest(self.storage)  # a living writer goes on
            if wrong and newest is not None:
                wrong = _compare(self.storage, key, newest.children().get(path, expected))
            if wrong:
                self._add("metadata", key, wrong)

    def _count_orphans(self, manifest: Manifest) -> dict[str, int]:
        named = {layout.shard_key(shard.number) for layout, shard in self.known}
        named |= {metadata_key(path) for path in manifest.children()} | {ROOT}
        for array in manifest.set_arrays:
            layout = set_layout(array.name)
            named |= {layout.shard_key(shard.number) for shard in array.shards}
        orphans = temporaries = orphan_bytes = temporary_bytes = 0
        for key, size in _files(self.storage, ""):
            if is_temporary(key.rpartition("/")[2]):
                temporaries, temporary_bytes = temporaries + 1, temporary_bytes + size
            elif key not in named:
                orphans, orphan_bytes = orphans + 1, orphan_bytes + size
        return {
            "orphans": orphans,
            "orphan_bytes": orphan_bytes,
            "temporaries": temporaries,
            "temporary_bytes": temporary_bytes,
        }


def _manifest(storage: Storage) -> Manifest:
    """The manifest; ``CorruptionError`` for all that is wrong with it but absence and a newer format."""
    try:
        data = storage.read(ROOT)
        _check_root(data)
        return Manifest.from_bytes(data, storage.describe(ROOT))
    except NotFoundError as error:
        if any(storage.list(folder) for folder in (COMMITS, STEPS, TABLE)):
            raise CorruptionError("the manifest is missing, and the rest of the store is there") from error
        return read_manifest(storage)  # raises, and says what lies there instead
    except (CorruptionError, UnsupportedFormatError):
        raise
    except (FormatError, StorageError) as error:
        raise CorruptionError(error.message) from error


def _check_root(data: bytes) -> None:
    """Raise ``CorruptionError`` for a root that does not match the checksum that it holds."""
    try:
        root = json.loads(data)
        found, expected = root["attributes"]["trajstore"].get("crc32c"), root_checksum(root)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return  # parsing it will say what it is
    if found is not None and found != expected:
        raise CorruptionError("the manifest does not match its crc32c")


def _compare(storage: Storage, key: str, expected: dict[str, Any]) -> str:
    """What is wrong with a child's metadata, ``""`` for nothing."""
    try:
        found = json.loads(storage.read(key))
        if found["node_type"] != expected["node_type"]:
            return f"says {found['node_type']!r:.40}, the manifest {expected['node_type']!r}"
        if found["node_type"] == "array":
            if found["shape"][1:] != expected["shape"][1:] or found["data_type"] != expected["data_type"]:
                return "describes another array than the manifest does"
            if found["shape"][0] > expected["shape"][0]:
                return f"names {found['shape'][0]} rows, {expected['shape'][0]} are committed"
    except (NotFoundError, StorageError) as error:
        return error.message
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return "cannot be read as the metadata of an array or group"
    return ""


def _files(storage: Storage, folder: str) -> Iterator[tuple[str, int]]:
    """Every file of a store but those of its private folder."""
    for name in sorted(storage.list(folder)):
        key = f"{folder}/{name}" if folder else name
        if key == PRIVATE:
            continue
        size = storage.size(key)
        if size is None:
            yield from _files(storage, key)
        else:
            yield key, size
