"""One store as one commit left it: which rows there are, and a reader for each array."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from trajstore.engine.cache import ChunkCache
from trajstore.engine.commit import read_manifest
from trajstore.engine.gather import ArrayReader, Convert, Lengths
from trajstore.engine.seals import seal_records
from trajstore.errors import CorruptionError, NotFoundError
from trajstore.format.encoding import converter, set_layout
from trajstore.format.intervals import IntervalSet
from trajstore.format.layout import ROOT, TABLE_DIMENSION, ArrayLayout, clock_array, column_array
from trajstore.format.manifest import Manifest, SetArray, StoredSet
from trajstore.format.schema import ID
from trajstore.media.hdf5storage import Hdf5Storage
from trajstore.media.storage import Storage

_MANY = 1 << 62
_TABLE_CACHE = 4 << 20  # bytes; what a loop over trajectories needs of the table


class Snapshot:
    """An immutable view of a store at one commit.

    Notes
    -----
    Any number of threads may read. Pickles without its caches and descriptors.
    """

    def __init__(self, storage: Storage, manifest: Manifest, cache: ChunkCache | None = None) -> None:
        self.storage = storage
        self.manifest = manifest
        self.cache = cache
        self._table_cache = ChunkCache(_TABLE_CACHE)
        self._readers: dict[str, ArrayReader] = {}
        self._fields: dict[str, ArrayReader] = {}
        self._recorded: dict[str, np.ndarray[Any, Any]] = {}
        self._seals: np.ndarray[Any, Any] | None = None
        self._live: IntervalSet | None = None
        self._bounds: dict[str, tuple[int, int]] = {}
        self._guard = threading.Lock()

    @classmethod
    def of(cls, storage: Storage, cache: ChunkCache | None = None) -> Snapshot:
        """The last commit of a store."""
        snapshot = cls(storage, read_manifest(storage), cache)
        while not snapshot._has_sets():
            # A set too large for the manifest goes some commits later, which may be now: then there is a newer commit.
            newer = cls(storage, read_manifest(storage), cache)
            if newer.manifest.commit == snapshot.manifest.commit:
                break  # damaged; whoever asks for the trajectories is told
            snapshot = newer
        return snapshot

    def _has_sets(self) -> bool:
        """Read the sets that lie outside the manifest, while they are there; whether that was possible."""
        if any(isinstance(self.manifest.sets[name], StoredSet) for name in ("rows", "deleted")):
            try:
                return self.live is not None
            except CorruptionError:
                return False
        return True

    def __getstate__(self) -> tuple[Storage, Manifest, int | None, IntervalSet | None]:
        return self.storage, self.manifest, None if self.cache is None else self.cache.limit, self._live

    def __setstate__(self, state: tuple[Storage, Manifest, int | None, IntervalSet | None]) -> None:
        storage, manifest, limit, live = state
        Snapshot.__init__(self, storage, manifest, None if limit is None else ChunkCache(limit))
        self._live = live

    @property
    def place(self) -> str:
        return self.storage.describe()

    @property
    def table_rows(self) -> int:
        """Length of the table, gaps included."""
        known = self.manifest.arrays.get(column_array(ID))
        return known[1] if known else 0

    @property
    def live(self) -> IntervalSet:
        """Rows of the table that are trajectories and not deleted."""
        if self._live is None:
            rows, deleted = self.set("rows"), self.set("deleted")
            self._check_rows(rows)
            self._live = rows - deleted if deleted else rows
        return self._live

    def _check_rows(self, rows: IntervalSet) -> None:
        if not len(rows):
            return
        layout, end = self.manifest.arrays.get(column_array(ID), (None, 0))
        held = 0
        if layout is not None:
            held = (
                end
                if isinstance(self.storage, Hdf5Storage)
                else len(self._shard_lengths(layout.path)) * layout.shard_rows
            )
        if int(rows.pairs[-1, 1]) > end or len(rows) > held:
            raise CorruptionError(
                f"the manifest {self.storage.describe(ROOT)} names {len(rows)} trajectories, "
                "and the table has no such rows",
                hint="`trajstore repair` lists the older manifests that can be opened",
            )

    def set(self, name: str) -> IntervalSet:
        """One of the manifest's interval sets."""
        value = self.manifest.sets[name]
        if not isinstance(value, StoredSet):
            return value
        parts = [_load(self.storage, array) for array in value.arrays]
        return IntervalSet(np.concatenate([part.pairs for part in (*parts, value.rest)]))

    def reader(self, array: str) -> ArrayReader:
        """The reader of an array's rows as they are stored. Raises ``NotFoundError``."""
        reader = self._readers.get(array)
        if reader is None:
            reader = self._readers[array] = self._open(array, None)
        return reader

    def field(self, path: str) -> ArrayReader:
        """The reader of a field's values. Raises ``NotFoundError``."""
        reader = self._fields.get(path)
        if reader is None:
            try:
                spec = self.manifest.schema.fields[path]
            except KeyError:
                raise NotFoundError(
                    f"{self.place} has no field {path!r}",
                    hint=f"it has {', '.join(self.manifest.schema.fields) or 'none'}",
                ) from None
            reader = self._fields[path] = self._open(spec.array, converter(spec))
        return reader

    def _open(self, array: str, convert: Convert | None) -> ArrayReader:
        try:
            layout, rows = self.manifest.arrays[array]
        except KeyError:
            raise NotFoundError(f"{self.place} has no array {array!r}") from None
        table = layout.dimension == TABLE_DIMENSION
        lengths: Lengths = self._shard_lengths(array).get
        if isinstance(self.storage, Hdf5Storage):  # sealed: nothing grows there, and nothing is recorded
            lengths = partial(_length_of, self.storage, layout)
        cache = self._table_cache if table else self.cache
        return ArrayReader(self.storage, layout, rows, lengths, cache, strict=not table, convert=convert)

    def _shard_lengths(self, array: str) -> Mapping[int, int]:
        """The committed length of each shard of an array."""
        seals, names = self.seals, self.manifest.names
        mine = seals[seals[:, 0] == names.index(array)] if array in names else seals[:0]
        lengths = dict(zip(mine[:, 1].tolist(), mine[:, 2].tolist()))
        tail = self.manifest.tails.get(array)
        if tail is not None:
            lengths[tail.number] = tail.length
        return lengths

    @property
    def seals(self) -> np.ndarray[Any, Any]:
        """Every seal of the commit, see ``seals.seal_records``."""
        with self._guard:
            if self._seals is None:
                self._seals = seal_records(self.storage, self.manifest)
            return self._seals

    def take_for_seals(self, records: np.ndarray[Any, Any]) -> None:
        """Go by these seals (``seals.seal_records``) instead of those of the commit, which are damaged."""
        self._seals = records

    def pairs(self, clock: str, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Start and stop on a clock, int64 (n, 2), of trajectories by row of the table; -1 where absent."""
        self._check_recorded(clock_array(clock), rows)
        pairs = self.reader(clock_array(clock)).take(rows)
        self._check_pairs(clock, pairs)
        return pairs

    def _check_recorded(self, array: str, rows: np.ndarray[Any, Any]) -> None:
        """Raise ``CorruptionError`` if trajectories lie in a shard that the commit does not know.

        Only before its first shard may an array of the table have none: there it was added later, and reads as fill.
        """
        if isinstance(self.storage, Hdf5Storage) or not len(rows):
            return
        known = self._recorded.get(array)
        if known is None:
            known = self._recorded[array] = np.array(sorted(self._shard_lengths(array)), np.int64)
        size = self.reader(array).layout.shard_rows
        first, last = int(rows.min()) // size, int(rows.max()) // size
        low, high = np.searchsorted(known, (first, last + 1))
        if high - low == last + 1 - first:
            return
        shards = np.unique(rows // size)
        lost = shards[~np.isin(shards, known)]
        lost = lost[lost > known[0]] if len(known) else lost[:0]
        if len(lost):
            raise CorruptionError(
                f"{self.storage.describe(array)}: the commit names trajectories in shard {int(lost[0])}, "
                "and neither a seal nor a tail knows that shard",
                hint="restore the store from a copy, or save what is whole with `trajstore repair`",
            )

    def _check_pairs(self, clock: str, pairs: np.ndarray[Any, Any]) -> None:
        """Raise ``CorruptionError`` for pairs that no writer makes, before anyone reserves memory for such rows."""
        end, most = self._bounds.get(clock) or self._bounds.setdefault(clock, self._bounds_of(clock))
        start, stop = pairs[:, 0], pairs[:, 1]
        wrong = (start > stop) | (start < -1) | (stop > end) | (stop - start > most) | ((start < 0) & (stop >= 0))
        if wrong.any():
            raise CorruptionError(
                f"{self.storage.describe(clock_array(clock))} names rows {pairs[wrong][0].tolist()}, "
                "and there are none",
                hint="restore it from a copy, or save what is whole with `trajstore repair`",
            )

    def _bounds_of(self, clock: str) -> tuple[int, int]:
        """The rows on a clock, and how many of them there can be in the shards that the commit knows."""
        ends, most = [_MANY], [_MANY]
        for path in self.manifest.schema.on_clock(clock):
            array = self.manifest.schema.fields[path].array
            layout, rows = self.manifest.arrays[array]
            ends.append(rows)
            if layout.row_bytes and not isinstance(self.storage, Hdf5Storage):
                most.append(len(self._shard_lengths(array)) * layout.shard_rows)
        return min(ends), min(most)

    def column(self, name: str, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """A column's values (n,) by row of the table."""
        self._check_recorded(column_array(name), rows)
        return self.reader(column_array(name)).take(rows)


def _length_of(storage: Storage, layout: ArrayLayout, shard: int) -> int | None:
    return storage.size(layout.shard_key(shard))


def _load(storage: Storage, stored: SetArray) -> IntervalSet:
    lengths = {shard.number: shard.length for shard in stored.shards}
    layout = set_layout(stored.name)
    if stored.intervals > len(lengths) * layout.shard_rows:
        raise CorruptionError(
            f"the set {storage.describe(layout.path)} has shards for fewer than {stored.intervals} intervals"
        )
    reader = ArrayReader(storage, layout, stored.intervals, lengths.get, strict=True)
    pairs = reader.read(0, stored.intervals)
    found = IntervalSet(pairs)
    if len(found.pairs) != len(pairs):
        raise CorruptionError(f"the set {storage.describe(reader.layout.path)} holds intervals that overlap")
    return found
