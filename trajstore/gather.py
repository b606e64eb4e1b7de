"""Rows of one array to memory: group by chunk, decode every chunk once, in threads, straight into the output."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from trajstore import crew
from trajstore.errors import CorruptionError, NotFoundError, SchemaError
from trajstore.index import Ints, Pieces, pieces, runs, spans
from trajstore.layout import ArrayLayout
from trajstore.shard import check_frame, decode_frame, parse_index
from trajstore.storage import Storage

#: The file length of a shard as the manifest knows it, or ``None`` for a shard that holds no named rows.
Lengths = Callable[[int], "int | None"]
Array = np.ndarray[Any, Any]

_READ_BYTES = 4 << 20  # frames that lie side by side are read together, up to this
_READ_GAP = 4096  # bytes between two frames that are cheaper to read than to skip
_FEW_CHUNKS = 4  # a longer stretch is read once and would only push other chunks out of the cache
_FEW_PIECES = 3  # of one chunk that are copied one by one; more are copied by their row numbers
_ALONE_BYTES = 512 << 10  # decoded bytes that one thread has done before another would have begun
_PART_BYTES = 8 << 20  # decoded bytes that a thread takes at a time, at the most
_INDEXES = 4096  # shard indexes kept for an array


class Convert(Protocol):
    """Stored rows to values."""

    dtype: np.dtype[Any]

    def __call__(self, stored: Array, out: Array) -> None: ...


class ChunkCache:
    """Decoded chunks of all arrays of a dataset, bounded in bytes; the least recently used go first.

    A chunk is named by its array (its storage included), its shard and its offset there: bytes of a shard never
    change, so no later commit makes an entry stale.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._chunks: OrderedDict[tuple[str, int, int], Array] = OrderedDict()
        self._guard = threading.Lock()

    def get(self, key: tuple[str, int, int]) -> Array | None:
        with self._guard:
            chunk = self._chunks.get(key)
            if chunk is not None:
                self._chunks.move_to_end(key)
            return chunk

    def put(self, key: tuple[str, int, int], chunk: Array) -> None:
        if chunk.nbytes > self.limit:
            return
        with self._guard:
            if key in self._chunks:
                return
            self._chunks[key] = chunk
            self.used += chunk.nbytes
            while self.used > self.limit:
                self.used -= self._chunks.popitem(last=False)[1].nbytes


class _Work:
    """What to bring from each chunk: ``chunks`` by number, ascending, and of each the pieces ``bounds[i]:bounds[i+1]``.

    inner, target, count : of the first piece of each chunk, which mostly is the only one.
    """

    __slots__ = ("bounds", "chunks", "count", "inner", "numbers", "pieces", "target")

    def __init__(self, found: Pieces) -> None:
        first = np.flatnonzero(found.chunk[1:] != found.chunk[:-1]) + 1
        first = np.concatenate((np.zeros(1, np.int64), first))
        self.pieces = found
        self.numbers = found.chunk[first]
        self.chunks: list[int] = self.numbers.tolist()
        self.bounds: list[int] = [*first.tolist(), len(found.chunk)]
        self.inner: list[int] = found.inner[first].tolist()
        self.target: list[int] = found.target[first].tolist()
        self.count: list[int] = found.count[first].tolist()

    def places(self, i: int) -> Iterator[tuple[Any, Any]]:
        """Rows in the chunk, and rows of the output, that the chunk's pieces stand for; slices, or row numbers."""
        low, high = self.bounds[i], self.bounds[i + 1]
        if high - low == 1:
            inner, target, count = self.inner[i], self.target[i], self.count[i]
            yield slice(inner, inner + count), slice(target, target + count)
            return
        _, inner, target, count = (part[low:high] for part in self.pieces)
        if high - low <= _FEW_PIECES:
            for a, b, n in zip(inner.tolist(), target.tolist(), count.tolist()):
                yield slice(a, a + n), slice(b, b + n)
        elif len(count) == int(count.sum()):
            yield inner, target
        else:
            yield spans(inner, inner + count), spans(target, target + count)


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
        self._indexes: OrderedDict[int, Array | None] = OrderedDict()
        self._name = storage.describe(layout.path)

    # -- what to read ----------------------------------------------------------------------------------------------

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Rows ``[start, stop)``, (stop - start, *row_shape)."""
        out = self._output(stop - start, out)
        if len(out):
            self._bring(np.array([start]), np.array([stop]), np.zeros(1, np.int64), out)
        return out

    def read_runs(self, starts: Ints, stops: Ints, out: Array | None = None) -> Array:
        """Rows of the half-open runs ``[starts[i], stops[i])``, run after run."""
        counts = stops - starts
        out = self._output(int(counts.sum()), out)
        if len(out):
            targets = np.cumsum(counts) - counts
            kept = counts > 0
            self._bring(starts[kept], stops[kept], targets[kept], out)
        return out

    def take(self, rows: Ints, out: Array | None = None, into: Ints | None = None) -> Array:
        """Rows by number, int64 (n,), in any order and with repeats: (n, *row_shape).

        into : where in ``out`` each row goes, if ``out`` has others too.
        """
        if into is None:
            out = self._output(len(rows), out)
        elif out is None:
            raise SchemaError("`into` names rows of `out`, and there is none")
        if len(rows):
            self._bring(*runs(rows, into), out)
        return out

    def frames(self, chunks: Ints) -> Iterator[tuple[int, bytes]]:
        """The frames of the given chunks (int64, ascending) as they are stored, each checked: number, bytes.

        Raises ``CorruptionError`` for a chunk that is not there or does not match its checksum.
        """
        numbers = chunks.tolist()
        for shard, begin, end in self._by_shard(numbers, 0, len(numbers)):
            entries = self._entries(shard, chunks[begin:end])
            wanted = [(offset, size, numbers[begin + i]) for i, (offset, size) in enumerate(entries)]
            for offset, _, number in wanted:
                if offset < 0:
                    raise self._lost(number)
            key = self.layout.shard_key(shard)
            for _, frame, number in self._frames(key, wanted):
                data = frame.tobytes()
                try:
                    check_frame(data, self.layout.chunk_bytes)
                except CorruptionError as error:
                    raise _placed(error, f"chunk {number} of {self.storage.describe(key)}") from error
                yield number, data

    def has_chunk(self, chunk: int) -> bool:
        """Whether a shard holds this chunk."""
        shard, inner = divmod(chunk, self.layout.chunks_per_shard)
        index = self._index(shard)
        return index is not None and bool(index[inner, 0] >= 0)

    def _output(self, count: int, out: Array | None) -> Array:
        shape = (max(count, 0), *self.layout.row_shape)
        if out is None:
            return np.empty(shape, self.dtype)
        if out.shape != shape or out.dtype != self.dtype:
            raise SchemaError(f"out is {out.dtype} {out.shape}, expected {self.dtype} {shape}")
        return out

    def _bring(self, starts: Ints, stops: Ints, targets: Ints, out: Array) -> None:
        """Runs of rows, none empty, to where they go."""
        layout, cache = self.layout, self._cache
        if int(starts.min()) < 0 or int(stops.max()) > self.rows:
            raise NotFoundError(f"{self._name} has {self.rows} rows, and not the rows asked for")
        if not layout.row_bytes:
            return
        work = _Work(pieces(starts, stops, targets, layout.chunk_rows))
        count = len(work.chunks)
        if cache is not None and (
            (len(starts) == 1 and count > _FEW_CHUNKS) or count * layout.chunk_bytes > cache.limit
        ):
            cache = None
        if count * layout.chunk_bytes <= _ALONE_BYTES or count == 1 or crew.SIZE == 1:
            self._fill(work, 0, count, out, cache)
            return
        share = max(1, min(-(-count // (4 * crew.SIZE)), _PART_BYTES // layout.chunk_bytes))
        share = max(share, (_ALONE_BYTES // 2) // layout.chunk_bytes)
        crew.share(
            lambda part: self._fill(work, part * share, min(part * share + share, count), out, cache),
            -(-count // share),
        )

    # -- reading ---------------------------------------------------------------------------------------------------

    def _fill(self, work: _Work, begin: int, end: int, out: Array, cache: ChunkCache | None) -> None:
        """Fill ``out`` from the chunks ``begin`` to ``end`` of the work."""
        layout, convert, name, rows = self.layout, self._convert, self._name, self.layout.chunk_rows
        row_bytes, shape = layout.row_bytes, (rows, *layout.row_shape)
        flat = out.reshape(-1).view(np.uint8) if convert is None and cache is None and out.flags.c_contiguous else None
        scratch: Array | None = None
        for shard, low, high in self._by_shard(work.chunks, begin, end):
            key = layout.shard_key(shard)
            wanted = []
            for i, (offset, size) in enumerate(self._entries(shard, work.numbers[low:high]), low):
                if offset < 0:
                    if self._strict:
                        raise self._lost(work.chunks[i])
                    for _, target in work.places(i):
                        out[target] = layout.fill
                    continue
                found = cache.get((name, shard, offset)) if cache is not None else None
                if found is not None:
                    self._give(found, work, i, out)
                else:
                    wanted.append((offset, size, i))
            for offset, frame, i in self._frames(key, wanted):
                if flat is not None and work.count[i] == rows and work.bounds[i + 1] - work.bounds[i] == 1:
                    place = work.target[i] * row_bytes
                    self._decode(frame, flat[place : place + rows * row_bytes], key, work.chunks[i])
                    continue
                if cache is not None or scratch is None:
                    scratch = np.empty(shape, layout.dtype)
                self._decode(frame, scratch.reshape(-1).view(np.uint8), key, work.chunks[i])
                self._give(scratch, work, i, out)
                if cache is not None:
                    cache.put((name, shard, offset), scratch)

    def _give(self, chunk: Array, work: _Work, i: int, out: Array) -> None:
        convert = self._convert
        for inner, target in work.places(i):
            if convert is None:
                out[target] = chunk[inner]
            elif type(target) is slice:
                convert(chunk[inner], out[target])
            else:
                values = np.empty((len(target), *self.layout.row_shape), self.dtype)
                convert(chunk[inner], values)
                out[target] = values

    def _by_shard(self, chunks: list[int], begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Each shard that the chunks ``begin`` to ``end`` lie in, with the first and last that do."""
        per = self.layout.chunks_per_shard
        while begin < end:
            shard = chunks[begin] // per
            stop = bisect_left(chunks, (shard + 1) * per, begin, end)
            yield shard, begin, stop
            begin = stop

    def _entries(self, shard: int, numbers: Ints) -> list[list[int]]:
        """Offset and size of each of the chunks in its shard; -1 where it holds none."""
        index = self._index(shard)
        if index is None:
            return [[-1, 0]] * len(numbers)
        found: list[list[int]] = index[numbers - shard * self.layout.chunks_per_shard].tolist()
        return found

    def _frames(self, key: str, wanted: list[tuple[int, int, int]]) -> Iterator[tuple[int, Array, int]]:
        """Each wanted (offset, size, what for): offset, frame, what for; neighbours in the file come from one read."""
        wanted.sort()
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
            for offset, size, what in wanted[at:end]:
                yield offset, data[offset - start : offset - start + size], what
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

    def _index(self, shard: int) -> Array | None:
        if shard in self._indexes:
            return self._indexes[shard]
        index = None
        length = self._lengths(shard)
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

    def _decode(self, frame: Array, chunk: Array, key: str, number: int) -> None:
        try:
            decode_frame(frame, chunk)
        except CorruptionError as error:
            rows = self.layout.chunk_rows
            place = f"rows {number * rows} to {number * rows + rows} of {self.storage.describe(key)}"
            raise _placed(error, place) from error


def _placed(error: CorruptionError, place: str) -> CorruptionError:
    return CorruptionError(
        f"{place}: {error.message}", hint="restore the file from a copy, or save what is whole with `trajstore repair`"
    )
