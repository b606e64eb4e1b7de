"""Decoded chunks kept in memory: one block for each array, so that rows of many chunks are gathered by one copy."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

import numpy as np

from trajstore.engine.index import Ints

Array = np.ndarray[Any, Any]

_SMALL = 8  # chunks of a read of up to this fraction of the cache are kept: others may be read next to them soon
_SPARE = 64  # chunks by which an array may grow before its block is made anew


class ChunkCache:
    """Chunks of all arrays of a dataset, bounded in bytes.

    Notes
    -----
    Any number of threads may read and add. Within an array the chunk that came first goes first; an array that finds
    no room takes that of the largest other one.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._blocks: dict[tuple[str, str], Block] = {}
        self._guard = threading.Lock()  # taken before a block's own, never after it
        _caches.add(self)

    def block(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Block:
        """What is kept of an array's values. shape : of a chunk. Arrays of one name, shape and dtype share a block."""
        key = name, f"{dtype} {shape}"
        with self._guard:
            block = self._blocks.get(key)
            if block is None:
                block = self._blocks[key] = Block(self, shape, dtype)
            return block

    def reserve(self, wanted: Block) -> bool:
        """Take the bytes of one more chunk for a block, if need be from the largest other one."""
        with self._guard:
            while self.used + wanted.chunk_bytes > self.limit:
                largest = max(self._blocks.values(), key=lambda block: block.used)
                if largest.used <= wanted.used + wanted.chunk_bytes:
                    return False
                self.used -= largest.clear()
            self.used += wanted.chunk_bytes
            return True

    def _after_fork(self) -> None:
        """In a forked child: what other threads were changing at that moment is forgotten, all else stays."""
        guards = [self._guard, *(block._guard for block in self._blocks.values())]
        if any(guard.locked() for guard in guards):
            for block in self._blocks.values():
                block._guard = threading.Lock()
                block.clear()
            self._guard, self.used = threading.Lock(), 0

    def release(self, amount: int) -> None:
        with self._guard:
            self.used -= amount


class Block:
    """The chunks kept of one array, one behind the other, in slots that are used in turn."""

    def __init__(self, cache: ChunkCache, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape = shape
        self.dtype = dtype
        self.chunk_bytes = max(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, 1)
        self._cache = cache
        self._guard = threading.Lock()
        self._start()

    def _start(self) -> None:
        self._rows: Array = np.empty((0, *self.shape[1:]), self.dtype)
        self._chunk: Ints = np.empty(0, np.int64)  # in each slot
        self._held: Ints = np.empty(0, np.int64)  # rows of that chunk that were written when it was read
        self._slot: Ints = np.full(1, -1, np.int64)  # of each chunk, -1 if it is not kept; the last is of all beyond
        self._growing: set[int] = set()  # chunks that were not whole when they were read; one, or none, mostly
        self._count = 0
        self._next = 0

    @property
    def used(self) -> int:
        return self._count * self.chunk_bytes

    def clear(self) -> int:
        """Forget all; the bytes that this frees."""
        with self._guard:
            freed = self.used
            self._start()
            return freed

    def stride(self, array_bytes: int, read_bytes: int) -> int:
        """Of a read of so many bytes, of an array of so many, every n-th chunk of the array is worth keeping.

        Where rows are drawn at random from an array that does not fit, the chunks that are kept stay the same ones:
        each hit is worth as much as any other, and none is paid for by forgetting another.
        """
        limit = self._cache.limit
        return 1 if read_bytes <= limit // _SMALL else max(1, -(-array_bytes // limit))

    def gather(self, rows: Ints, end: int, out: Array, into: Ints | None) -> Array | None:
        """Copy to ``out`` the rows whose chunks are kept; a mask of those that are not, or ``None`` if all were.

        end : rows that the array has. A chunk that was kept when it had fewer is forgotten.
        into : where in ``out`` each row goes; ``None``: in the order given.
        """
        size = self.shape[0]
        chunk = rows // size
        with self._guard:
            if not self._count:
                return np.ones(len(rows), np.bool_)
            if self._growing:
                self._forget_grown(end)
            slot = self._slot.take(chunk, mode="clip")
            place = slot - chunk
            place *= size
            place += rows
            missing = slot < 0
            if not missing.any():
                if into is None:
                    self._rows.take(place, axis=0, out=out, mode="clip")
                else:
                    out[into] = self._rows.take(place, axis=0)
                return None
            there = np.flatnonzero(~missing)
            if len(there):
                out[there if into is None else into[there]] = self._rows.take(place[there], axis=0)
            return missing

    def _forget_grown(self, end: int) -> None:
        size = self.shape[0]
        for chunk in list(self._growing):
            slot = self._slot[chunk]
            if slot >= 0 and self._held[slot] < min(end - chunk * size, size):
                self._slot[chunk] = self._chunk[slot] = slot = -1
            if slot < 0:
                self._growing.discard(chunk)

    def put(self, chunk: int, values: Array, end: int) -> None:
        """Keep a chunk's values. end : rows that the array has."""
        size = self.shape[0]
        slots = min(self._cache.limit // self.chunk_bytes, -(-end // size) + _SPARE)
        with self._guard:
            if self._keeps(chunk):
                return
            full = self._count >= slots
        grows = not full and self._cache.reserve(self)
        with self._guard:
            slot = self._free_slot(slots, grows=grows) if not self._keeps(chunk) else -1
            if slot >= 0:
                self._rows[slot * size : (slot + 1) * size] = values
                self._chunk[slot], self._held[slot] = chunk, min(end - chunk * size, size)
                self._point(chunk, slot)
                if self._held[slot] < size:
                    self._growing.add(chunk)
        if grows and slot < 0:
            self._cache.release(self.chunk_bytes)

    def _keeps(self, chunk: int) -> bool:
        return chunk < len(self._slot) - 1 and bool(self._slot[chunk] >= 0)

    def _free_slot(self, slots: int, *, grows: bool) -> int:
        """A slot for one more chunk: a new one, or that of the chunk that is there longest; -1 if there is none."""
        if grows:
            if self._count == len(self._chunk):
                rows, chunk, held = self._rows, self._chunk, self._held
                count, self._rows = self._count, np.empty((slots * self.shape[0], *self.shape[1:]), self.dtype)
                self._chunk, self._held = np.full(slots, -1, np.int64), np.zeros(slots, np.int64)
                # Memory is taken when it is first written: a block may have room for far more than it ever holds.
                self._rows[: count * self.shape[0]] = rows[: count * self.shape[0]]
                self._chunk[:count], self._held[:count] = chunk[:count], held[:count]
            self._count += 1
            return self._count - 1
        if not self._count:
            return -1
        slot = self._next % self._count
        self._next = slot + 1
        if self._chunk[slot] >= 0:
            self._slot[self._chunk[slot]] = -1
        return slot

    def _point(self, chunk: int, slot: int) -> None:
        if chunk >= len(self._slot) - 1:
            more = max(len(self._slot), chunk + 2 - len(self._slot))
            self._slot = np.concatenate((self._slot, np.full(more, -1, np.int64)))
        self._slot[chunk] = slot


_caches: weakref.WeakSet[ChunkCache] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for cache in list(_caches):
        cache._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
