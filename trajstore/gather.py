"""Rows of one array to memory: group by chunk, decode every chunk once, in threads, straight into the output."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from trajstore.errors import CorruptionError, NotFoundError
from trajstore.layout import ArrayLayout
from trajstore.shard import check_frame, decode_frame, parse_index
from trajstore.storage import Storage

#: The file length of a shard as the manifest knows it, or ``None`` for a shard that holds no named rows.
Lengths = Callable[[int], "int | None"]
ChunkName = tuple[str, str, int, int]

_READ_BYTES = 4 << 20  # frames that lie side by side are read together, up to this
_READ_GAP = 4096  # bytes between two frames that are cheaper to read than to skip
_FEW_CHUNKS = 4  # a longer stretch is read once and would only push other chunks out of the cache
_TASK_BYTES = 1 << 20  # decoded bytes that are worth a thread's while
_INDEXES = 4096  # shard indexes kept for an array


class Convert(Protocol):
    """Stored rows to values."""

    dtype: np.dtype[Any]

    def __call__(self, stored: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None: ...


class ChunkCache:
    """Decoded chunks of all arrays of a dataset, bounded in bytes; the least recently used go first.

    A chunk is named by its store, its shard and its offset and size there: bytes of a shard never change, so no later commit
    makes an entry stale.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._chunks: OrderedDict[ChunkName, np.ndarray[Any, Any]] = OrderedDict()
        self._guard = threading.Lock()

    def get(self, key: ChunkName) -> np.ndarray[Any, Any] | None:
        with self._guard:
            chunk = self._chunks.get(key)
            if chunk is not None:
                self._chunks.move_to_end(key)
            return chunk

    def put(self, key: ChunkName, chunk: np.ndarray[Any, Any]) -> None:
        if chunk.nbytes > self.limit:
            return
        with self._guard:
            if key in self._chunks:
                return
            self._chunks[key] = chunk
            self.used += chunk.nbytes
            while self.used > self.limit:
                self.used -= self._chunks.popitem(last=False)[1].nbytes


class ArrayReader:
    """Reads rows of one array as one commit left it.

    Parameters
    ----------
    rows : number of rows that the commit names; none beyond is read.
    lengths : see ``Lengths``.
    strict : whether a chunk that is not there is damage (a field's named rows are always written) or fill (the table).
    convert : how stored rows become the rows given out, where they differ.

    Notes
    -----
    Immutable but for its caches; any number of threads may read.
    """

    def __init__(
        self,
        storage: Storage,
        layout: ArrayLayout,
        rows: int,
        lengths: Lengths,
        cache: ChunkCache | None = None,
        *,
        strict: bool = False,
        convert: Convert | None = None,
    ) -> None:
        self.storage = storage
        self.layout = layout
        self.rows = rows
        self._lengths = lengths
        self._cache = cache
        self._strict = strict
        self._convert = convert
        self.dtype = layout.dtype if convert is None else convert.dtype
        self._indexes: OrderedDict[int, np.ndarray[Any, Any] | None] = OrderedDict()

    # -- what to read ----------------------------------------------------------------------------------------------

    def read(self, start: int, stop: int, out: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        """Rows ``[start, stop)``, (stop - start, *row_shape)."""
        layout = self.layout
        if out is None:
            out = np.empty((stop - start, *layout.row_shape), self.dtype)
        if stop <= start or not layout.row_bytes:
            return out
        size = layout.chunk_rows
        tasks = []
        for chunk in range(start // size, -(-stop // size)):
            first = chunk * size
            low, high = max(start, first), min(stop, first + size)
            tasks.append((chunk, slice(low - first, high - first), slice(low - start, high - start)))
        self._run(tasks, out, self._cache if len(tasks) <= _FEW_CHUNKS else None)
        return out

    def take(self, rows: np.ndarray[Any, Any], out: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        """Rows by number, int64 (n,), in any order and with repeats: (n, *row_shape)."""
        layout = self.layout
        if out is None:
            out = np.empty((len(rows), *layout.row_shape), self.dtype)
        if not len(rows) or not layout.row_bytes:
            return out
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == len(rows) and (len(rows) == 1 or bool((np.diff(rows) == 1).all())):
            return self.read(first, last + 1, out)
        chunks, inner = np.divmod(rows, layout.chunk_rows)
        ascending = bool((chunks[1:] >= chunks[:-1]).all())
        order = None if ascending else np.argsort(chunks, kind="stable")
        if order is not None:
            chunks, inner = chunks[order], inner[order]
        bounds = np.flatnonzero(chunks[1:] != chunks[:-1]) + 1
        starts = [0, *bounds.tolist()]
        stops = [*starts[1:], len(rows)]
        named = chunks[starts].tolist()
        tasks = [
            (chunk, inner[a:b], slice(a, b) if order is None else order[a:b])
            for chunk, a, b in zip(named, starts, stops)
        ]
        self._run(tasks, out, self._cache)
        return out

    def frames(self, chunks: np.ndarray[Any, Any]) -> Iterator[tuple[int, bytes]]:
        """The frames of the given chunks (int64, ascending) as they are stored, each checked: number, bytes.

        Raises ``CorruptionError`` for a chunk that is not there or does not match its checksum.
        """
        tasks = [(chunk, None, None) for chunk in chunks.tolist()]
        for shard, index, group in self._by_shard(tasks):
            key = self.layout.shard_key(shard)
            wanted = []
            for task in group:
                inner = task[0] - shard * self.layout.chunks_per_shard
                if index is None or index[inner, 0] < 0:
                    raise self._lost(task[0])
                wanted.append((*index[inner].tolist(), task))
            for _, _, frame, task in self._frames(key, wanted):
                data = frame.tobytes()
                try:
                    check_frame(data, self.layout.chunk_bytes)
                except CorruptionError as error:
                    raise _placed(error, f"chunk {task[0]} of {self.storage.describe(key)}") from error
                yield task[0], data

    def has_chunk(self, chunk: int) -> bool:
        """Whether a shard holds this chunk."""
        shard, inner = divmod(chunk, self.layout.chunks_per_shard)
        index = self._index(shard, self._lengths(shard))
        return index is not None and bool(index[inner, 0] >= 0)

    def _run(self, tasks: list[Any], out: np.ndarray[Any, Any], cache: ChunkCache | None) -> None:
        share = max(1, _TASK_BYTES // max(self.layout.chunk_bytes, 1))
        if len(tasks) <= share or _THREADS == 1 or getattr(_in_pool, "yes", False):
            self._fill(tasks, out, cache)
            return
        share = max(share, min(-(-len(tasks) // _THREADS), 16 * share))
        parts = [tasks[i : i + share] for i in range(0, len(tasks), share)]
        for done in [_pool().submit(self._fill_in_pool, part, out, cache) for part in parts]:
            done.result()

    def _fill_in_pool(self, tasks: list[Any], out: np.ndarray[Any, Any], cache: ChunkCache | None) -> None:
        _in_pool.yes = True
        self._fill(tasks, out, cache)

    # -- reading ---------------------------------------------------------------------------------------------------

    def _fill(self, tasks: list[Any], out: np.ndarray[Any, Any], cache: ChunkCache | None) -> None:
        """Fill ``out`` from chunks; a task is (chunk, rows in the chunk, rows of ``out``)."""
        layout, convert = self.layout, self._convert
        place = self.storage.describe()
        shape = (layout.chunk_rows, *layout.row_shape)
        whole = slice(0, layout.chunk_rows)
        in_place = convert is None and out.flags.c_contiguous and out.dtype == layout.dtype
        scratch: np.ndarray[Any, Any] | None = None
        for shard, index, group in self._by_shard(tasks):
            key = layout.shard_key(shard)
            wanted = []
            for task in group:
                offset, size = (-1, 0) if index is None else index[task[0] - shard * layout.chunks_per_shard].tolist()
                if offset < 0:
                    if self._strict:
                        raise self._lost(task[0])
                    out[task[2]] = layout.fill
                    continue
                found = cache.get((place, key, offset, size)) if cache is not None else None
                if found is not None:
                    self._give(found, task, out)
                else:
                    wanted.append((offset, size, task))
            for offset, size, frame, task in self._frames(key, wanted):
                if in_place and cache is None and type(task[1]) is slice and task[1] == whole:
                    self._decode(frame, out[task[2]], key, task[0])
                    continue
                if cache is not None or scratch is None:
                    scratch = np.empty(shape, layout.dtype)
                self._decode(frame, scratch, key, task[0])
                self._give(scratch, task, out)
                if cache is not None:
                    cache.put((place, key, offset, size), scratch)

    def _give(self, chunk: np.ndarray[Any, Any], task: Any, out: np.ndarray[Any, Any]) -> None:
        _, inner, target = task
        if self._convert is None:
            out[target] = chunk[inner]
        elif isinstance(target, slice):
            self._convert(chunk[inner], out[target])
        else:
            values = np.empty((len(target), *self.layout.row_shape), self.dtype)
            self._convert(chunk[inner], values)
            out[target] = values

    def _by_shard(self, tasks: list[Any]) -> Iterator[tuple[int, Any, list[Any]]]:
        per = self.layout.chunks_per_shard
        at = 0
        while at < len(tasks):
            shard = tasks[at][0] // per
            end = at
            while end < len(tasks) and tasks[end][0] // per == shard:
                end += 1
            yield shard, self._index(shard, self._lengths(shard)), tasks[at:end]
            at = end

    def _frames(self, key: str, wanted: list[Any]) -> Iterator[tuple[int, int, Any, Any]]:
        """Each wanted frame with its offset, size and task; neighbours in the file come from one read."""
        wanted.sort(key=lambda item: item[0])
        at = 0
        while at < len(wanted):
            start, size, _ = wanted[at]
            stop = start + size
            end = at + 1
            while end < len(wanted):
                offset, size, _ = wanted[end]
                if offset > stop + _READ_GAP or offset + size - start > _READ_BYTES:
                    break
                stop = max(stop, offset + size)
                end += 1
            data = np.frombuffer(self._read(key, start, stop), np.uint8)
            for offset, size, task in wanted[at:end]:
                yield offset, size, data[offset - start : offset - start + size], task
            at = end

    def _read(self, key: str, start: int, stop: int) -> bytes:
        try:
            data = self.storage.read(key, start, stop)
        except NotFoundError as error:
            raise CorruptionError(
                f"{self.storage.describe(key)} is missing, and committed rows lie in it",
                hint="restore it from a copy, or save what is whole with `trajstore repair`",
            ) from error
        if len(data) != stop - start:
            raise CorruptionError(
                f"{self.storage.describe(key)} has lost its end: it is shorter than when it was committed",
                hint="restore it from a copy, or save what is whole with `trajstore repair`",
            )
        return data

    def _index(self, shard: int, length: int | None) -> np.ndarray[Any, Any] | None:
        if shard in self._indexes:
            return self._indexes[shard]
        index = None
        if length is not None:
            key = self.layout.shard_key(shard)
            data = self._read(key, length - self.layout.index_bytes, length)
            try:
                index = parse_index(data, self.layout, length)
            except CorruptionError as error:
                raise _placed(error, self.storage.describe(key)) from error
        self._indexes[shard] = index
        while len(self._indexes) > _INDEXES:
            self._indexes.popitem(last=False)
        return index

    def _lost(self, chunk: int) -> CorruptionError:
        rows = self.layout.chunk_rows
        return CorruptionError(
            f"rows {chunk * rows} to {chunk * rows + rows} of {self.storage.describe(self.layout.path)} are committed, "
            "and no chunk holds them",
            hint="restore the array from a copy, or save what is whole with `trajstore repair`",
        )

    def _decode(self, frame: Any, chunk: np.ndarray[Any, Any], key: str, number: int) -> None:
        try:
            decode_frame(frame, chunk.reshape(-1).view(np.uint8))
        except CorruptionError as error:
            rows = self.layout.chunk_rows
            place = f"rows {number * rows} to {number * rows + rows} of {self.storage.describe(key)}"
            raise _placed(error, place) from error


def _placed(error: CorruptionError, place: str) -> CorruptionError:
    return CorruptionError(
        f"{place}: {error.message}", hint="restore the file from a copy, or save what is whole with `trajstore repair`"
    )


_THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
_in_pool = threading.local()
_executor: ThreadPoolExecutor | None = None
_executor_guard = threading.Lock()


def _pool() -> ThreadPoolExecutor:
    global _executor
    with _executor_guard:
        if _executor is None:
            _executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="trajstore-gather")
        return _executor


def _forget_pool() -> None:
    global _executor, _executor_guard
    _executor, _executor_guard = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_pool)
