"""Rows of one array to memory: group by chunk, decode every chunk once, in threads, straight into the output."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from trajstore.engine import crew
from trajstore.engine.cache import Block, ChunkCache
from trajstore.engine.index import Ints, Pieces, pieces, runs, spans
from trajstore.errors import CorruptionError, NotFoundError, SchemaError
from trajstore.format.layout import ArrayLayout
from trajstore.media.shard import check_frame, decode_frame, decode_frames, parse_index
from trajstore.media.storage import Storage

#: The file length of a shard as the manifest knows it, or ``None`` for a shard that holds no named rows.
Lengths = Callable[[int], "int | None"]
Array = np.ndarray[Any, Any]

_READ_BYTES = 4 << 20  # frames that lie side by side are read together, up to this
_FEW_CHUNKS = 4  # a longer stretch is read once and would only push other chunks out of the cache
_WIDE_MOVE = 64 << 10  # bytes of a stretch of rows from which on stretches are copied one by one, not by row numbers
_ALONE_BYTES = 512 << 10  # decoded bytes that one thread has done before another would have begun
_BATCH_BYTES = 1 << 20  # decoded bytes that a thread decodes at a time, at the most
_PART_BYTES = 8 << 20  # decoded bytes that a thread reads at a time, at the most, where reading is what takes time
_INDEXES = 4096  # shard indexes kept for an array


class Convert(Protocol):
    """Stored rows to values."""

    dtype: np.dtype[Any]

    def __call__(self, stored: Array, out: Array) -> None: ...


class _Work:
    """What to bring from each chunk: ``chunks`` by number, ascending, and of each the pieces ``bounds[i]:bounds[i+1]``.

    place : of each piece, that of its chunk in ``chunks``.
    """

    __slots__ = ("bounds", "chunks", "numbers", "pieces", "place")

    def __init__(self, found: Pieces) -> None:
        another = found.chunk[1:] != found.chunk[:-1]
        first = np.concatenate((np.zeros(1, np.int64), np.flatnonzero(another) + 1))
        self.pieces = found
        self.place = np.concatenate((np.zeros(1, np.int64), np.cumsum(another)))
        self.numbers = found.chunk[first]
        self.chunks: list[int] = self.numbers.tolist()
        self.bounds: list[int] = [*first.tolist(), len(found.chunk)]

    def moves(self, begin: int, end: int, rows: int) -> tuple[Ints, Ints, Ints]:
        """Of the chunks ``begin`` to ``end``, of ``rows`` each and laid end to end: rows, where they go, how many.

        int64 (n,) each. Pieces that go on where the one before ends, here and there, are one.
        """
        low, high = self.bounds[begin], self.bounds[end]
        _, inner, target, count = (part[low:high] for part in self.pieces)
        source = (self.place[low:high] - begin) * rows + inner
        apart = (source[1:] != source[:-1] + count[:-1]) | (target[1:] != target[:-1] + count[:-1])
        first = np.concatenate((np.zeros(1, np.int64), np.flatnonzero(apart) + 1))
        return source[first], target[first], np.add.reduceat(count, first)


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
        self._kept: Block | None = None

    # -- what to read ----------------------------------------------------------------------------------------------

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Rows ``[start, stop)``, (stop - start, *row_shape)."""
        return self.read_runs(np.array([start], np.int64), np.array([max(start, stop)], np.int64), out)

    def read_runs(self, starts: Ints, stops: Ints, out: Array | None = None) -> Array:
        """Rows of the half-open runs ``[starts[i], stops[i])``, run after run."""
        counts = stops - starts
        out = self._output(int(counts.sum()), out)
        if len(out):
            kept = counts > 0
            starts, stops, targets = starts[kept], stops[kept], (np.cumsum(counts) - counts)[kept]
            apart = starts[1:] != stops[:-1]  # where one does not go on where the one before ends
            first = np.concatenate((np.ones(1, np.bool_), apart))
            starts, stops, targets = starts[first], stops[np.roll(first, -1)], targets[first]
            self._check(int(starts.min()), int(stops.max()))
            block = self._block(len(out), len(starts) == 1)
            if block is None:
                self._bring(starts, stops, targets, out)
            else:
                self._take(spans(starts, stops), out, None, block)
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
            self._check(int(rows.min()), int(rows.max()) + 1)
            one = into is None and int(rows[-1]) - int(rows[0]) + 1 == len(rows) and bool((np.diff(rows) == 1).all())
            block = self._block(len(rows), one)
            if block is None:
                self._bring(*runs(rows, into), out)
            else:
                self._take(rows, out, into, block)
        return out

    def _check(self, low: int, high: int) -> None:
        if low < 0 or high > self.rows:
            raise NotFoundError(f"{self._name} has {self.rows} rows, and not all of those asked for")

    def _block(self, count: int, one: bool) -> Block | None:
        """Where to look for rows that were read before; ``None`` for long stretches, which are read once."""
        layout, cache = self.layout, self._cache
        if cache is None or not layout.row_bytes or (one and count > _FEW_CHUNKS * layout.chunk_rows):
            return None
        if self._kept is None:
            shape = (layout.chunk_rows, *layout.row_shape)
            self._kept = cache.block(f"{self._name} {layout.dtype}", shape, self.dtype)
        return self._kept if self._kept.chunk_bytes <= cache.limit else None

    def _take(self, rows: Ints, out: Array, into: Ints | None, block: Block) -> None:
        missing = block.gather(rows, self.rows, out, into)
        if missing is None:
            return
        places = np.flatnonzero(missing)
        work = runs(rows[places], places if into is None else into[places])
        self._bring(*work, out, block)

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
            for frame, number in self._frames(key, wanted):
                data = bytes(frame)
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

    def _bring(self, starts: Ints, stops: Ints, targets: Ints, out: Array, block: Block | None = None) -> None:
        """Runs of rows, none empty, to where they go."""
        layout = self.layout
        if not layout.row_bytes:
            return
        work = _Work(pieces(starts, stops, targets, layout.chunk_rows))
        count = len(work.chunks)
        stride = 1
        if block is not None:
            stride = block.stride(self.rows // layout.chunk_rows * block.chunk_bytes, count * block.chunk_bytes)
        threads = self.storage.streams or crew.SIZE
        if self.storage.streams:
            low, high = 1, _PART_BYTES
        else:
            low, high = (_ALONE_BYTES // 2) // layout.chunk_bytes, _BATCH_BYTES
        share = max(low, min(-(-count // (4 * threads)), high // layout.chunk_bytes), 1)
        keep = None if block is None else (block, stride)
        if count <= share or threads == 1:
            self._fill(work, 0, count, out, keep)
            return

        def part(number: int) -> None:
            self._fill(work, number * share, min(number * share + share, count), out, keep)

        crew.share(part, -(-count // share), threads)

    # -- reading ---------------------------------------------------------------------------------------------------

    def _fill(self, work: _Work, begin: int, end: int, out: Array, keep: tuple[Block, int] | None) -> None:
        """Fill ``out`` from the chunks ``begin`` to ``end`` of the work; ``keep`` every n-th chunk of the array."""
        frames = self._wanted(work, begin, end)
        step = max(_BATCH_BYTES // self.layout.chunk_bytes, 1)
        for low in range(begin, end, step):
            high = min(low + step, end)
            self._hand_out(work, low, high, frames[low - begin : high - begin], out, keep)

    def _wanted(self, work: _Work, begin: int, end: int) -> list[Any]:
        """The frame of each chunk from ``begin`` to ``end``; ``None`` for one that no shard holds."""
        found: list[Any] = [None] * (end - begin)
        for shard, low, high in self._by_shard(work.chunks, begin, end):
            wanted = []
            for i, (offset, size) in enumerate(self._entries(shard, work.numbers[low:high]), low):
                if offset >= 0:
                    wanted.append((offset, size, i - begin))
                elif self._strict:
                    raise self._lost(work.chunks[i])
            for frame, place in self._frames(self.layout.shard_key(shard), wanted):
                found[place] = frame
        return found

    def _hand_out(
        self, work: _Work, begin: int, end: int, frames: list[Any], out: Array, keep: tuple[Block, int] | None
    ) -> None:
        """Decode the chunks ``begin`` to ``end`` of the work and bring their rows to where they go."""
        layout, rows = self.layout, self.layout.chunk_rows
        total = (end - begin) * rows
        source, target, count = work.moves(begin, end, rows)
        if self._convert is None and int(count[0]) == total and out.flags.c_contiguous:
            stored = out[int(target[0]) : int(target[0]) + total]
            self._decode(frames, work.chunks[begin:end], stored)
        else:
            stored = np.empty((total, *layout.row_shape), layout.dtype)
            self._decode(frames, work.chunks[begin:end], stored)
            self._move(stored, source, target, count, out)
        if keep is not None:
            block, stride = keep
            for i, chunk in enumerate(work.chunks[begin:end]):
                if chunk % stride == 0:
                    block.put(chunk, self._values(stored[i * rows : (i + 1) * rows]), self.rows)

    def _decode(self, frames: list[Any], chunks: list[int], out: Array) -> None:
        """Chunks end to end."""
        flat, size = out.reshape(-1).view(np.uint8), self.layout.chunk_bytes
        if all(frame is not None for frame in frames):
            try:
                decode_frames(frames, flat)
            except CorruptionError:
                pass  # each by itself: which one is it?
            else:
                return
        rows = self.layout.chunk_rows
        for i, (frame, chunk) in enumerate(zip(frames, chunks)):
            if frame is None:
                out[i * rows : (i + 1) * rows] = self.layout.fill
                continue
            try:
                decode_frame(frame, flat[i * size : (i + 1) * size])
            except CorruptionError as error:
                key = self.layout.shard_key(chunk // self.layout.chunks_per_shard)
                where = f"rows {chunk * rows} to {chunk * rows + rows} of {self.storage.describe(key)}"
                raise _placed(error, where) from error

    def _move(self, stored: Array, source: Ints, target: Ints, count: Ints, out: Array) -> None:
        """Stored rows, as values, to where they go in ``out``."""
        if self.layout.row_bytes * int(count.sum()) < _WIDE_MOVE * len(count):
            if len(count) < int(count.sum()):
                source, target = spans(source, source + count), spans(target, target + count)
            out[target] = self._values(stored.take(source, axis=0))
            return
        for first, to, n in zip(source.tolist(), target.tolist(), count.tolist()):
            if self._convert is None:
                out[to : to + n] = stored[first : first + n]
            else:
                self._convert(stored[first : first + n], out[to : to + n])

    def _values(self, stored: Array) -> Array:
        if self._convert is None:
            return stored
        values = np.empty(stored.shape, self.dtype)
        self._convert(stored, values)
        return values

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

    def _frames(self, key: str, wanted: list[tuple[int, int, int]]) -> Iterator[tuple[Any, int]]:
        """Each wanted (offset, size, what for): frame, what for; neighbours in the file come from one read."""
        wanted.sort()
        at, count, gap = 0, len(wanted), self.storage.gap
        while at < count:
            start, size, what = wanted[at]
            stop = start + size
            end = at + 1
            while end < count:
                offset, size, _ = wanted[end]
                if offset > stop + gap or offset + size - start > _READ_BYTES:
                    break
                stop = max(stop, offset + size)
                end += 1
            data = self._read(key, start, stop)
            if end - at == 1:
                yield data, what
            else:
                many = np.frombuffer(data, np.uint8)
                for offset, size, what in wanted[at:end]:
                    yield many[offset - start : offset - start + size], what
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


def _placed(error: CorruptionError, place: str) -> CorruptionError:
    return CorruptionError(
        f"{place}: {error.message}", hint="restore the file from a copy, or save what is whole with `trajstore repair`"
    )
