"""Seals: length and CRC-32 of every shard that will not grow again, in an append-only array of their own."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor
from typing import Any

import numpy as np

from trajstore.engine.arraywriter import ArrayWriter
from trajstore.engine.gather import ArrayReader
from trajstore.format.encoding import seals_layout
from trajstore.format.layout import SEALS, ArrayLayout
from trajstore.format.manifest import Manifest, Shard
from trajstore.media.storage import Storage


class SealWriter:
    """Adds a session's seals; the shards of the seals array itself stand in the manifest."""

    def __init__(self, storage: Storage, token: str, disk: Executor, head: Manifest | None) -> None:
        self.writer = ArrayWriter(seals_layout(), storage, token, disk)
        self.writer.make_folder()
        self._shards = {shard.number: shard for shard in head.seals} if head else {}
        taken = max([self.writer.existing_shards(), *(number + 1 for number in self._shards)])
        self._first = taken * self.writer.layout.shard_rows
        self._records: list[tuple[int, int, int, int]] = []

    @property
    def rows(self) -> int:
        return self._first + len(self._records)

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(self._shards[number] for number in sorted(self._shards))

    @property
    def layout(self) -> ArrayLayout:
        return self.writer.layout

    def add(self, sealed: Iterable[tuple[int, Shard]]) -> None:
        """Write the seals of shards, each with the number of its array, so that the next commit can name them."""
        before = len(self._records)
        self._records += [(array, shard.number, shard.length, shard.crc32) for array, shard in sealed]
        if len(self._records) == before:
            return
        size = self.layout.chunk_rows
        start = before - before % size
        try:
            self.writer.encode(np.array(self._records[start:], np.int64), self._first + start)
            self.writer.flush(self.rows)
        except BaseException:
            del self._records[before:]
            raise
        tail = self.writer.tail(self.rows)
        for shard in [*self.writer.take_sealed(), *([tail] if tail else [])]:
            self._shards[shard.number] = shard


def seal_records(storage: Storage, manifest: Manifest) -> np.ndarray[Any, Any]:
    """Every seal of a commit, int64 (n, 4): array number, shard number, length in bytes, CRC-32."""
    if SEALS not in manifest.arrays:
        return np.empty((0, 4), np.int64)
    layout, rows = manifest.arrays[SEALS]
    lengths = {shard.number: shard.length for shard in manifest.seals}
    reader = ArrayReader(storage, layout, rows, lengths.get)
    starts = [number * layout.shard_rows for number in sorted(lengths)]
    found = [reader.read(start, min(rows, start + layout.shard_rows)) for start in starts if start < rows]
    records = np.concatenate([np.empty((0, 4), np.int64), *found])
    return records[(records[:, 0] >= 0) & (records[:, 0] < len(manifest.names))]


def records_of_files(storage: Storage, manifest: Manifest) -> np.ndarray[Any, Any]:
    """What the seals would be if every shard file were committed as it is, but for the checksums; for a repair.

    A file is only ever there whole, and later versions of it hold all that earlier ones did.
    """
    found = []
    for array, name in enumerate(manifest.names):
        layout, _ = manifest.arrays.get(name, (None, 0))
        if layout is None or name == SEALS:
            continue
        for file in storage.list(name):
            number = layout.shard_number(file)
            length = None if number is None else storage.size(layout.shard_key(number))
            if length:
                found.append((array, number, length, 0))
    return np.array(found, np.int64).reshape(-1, 4)


def load_seals(storage: Storage, manifest: Manifest) -> dict[tuple[str, int], Shard]:
    """Every seal that a commit holds, by array and shard number; for tools that walk them all."""
    return by_shard(seal_records(storage, manifest), manifest)


def by_shard(records: np.ndarray[Any, Any], manifest: Manifest) -> dict[tuple[str, int], Shard]:
    """Seals by array and shard number."""
    return {
        (manifest.names[array], number): Shard(number, length, crc) for array, number, length, crc in records.tolist()
    }
