"""Seals: length and CRC-32 of every shard that will not grow again, in an append-only array of their own."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor

import numpy as np

from trajstore.arraywriter import ArrayWriter
from trajstore.encoding import seals_layout
from trajstore.gather import ArrayReader
from trajstore.layout import SEALS, ArrayLayout
from trajstore.manifest import Manifest, Shard
from trajstore.storage import Storage


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


def load_seals(storage: Storage, manifest: Manifest) -> dict[tuple[str, int], Shard]:
    """Every seal that a commit holds, by array and shard number."""
    if SEALS not in manifest.arrays:
        return {}
    layout, rows = manifest.arrays[SEALS]
    lengths = {shard.number: shard.length for shard in manifest.seals}
    reader = ArrayReader(storage, layout, rows, lengths.get)
    found: dict[tuple[str, int], Shard] = {}
    names = manifest.names
    for number in sorted(lengths):
        start = number * layout.shard_rows
        records = reader.read(start, min(rows, start + layout.shard_rows))
        for array, shard, length, crc in records[records[:, 0] >= 0].tolist():
            if array < len(names):
                found[names[array], shard] = Shard(shard, length, crc)
    return found
