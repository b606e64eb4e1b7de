"""Rows of episodes that have not ended, once the ring has no room for them: in memory up to a bound, then on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trajstore.collect.scratch import Spilled, SpillLog

Array = np.ndarray[Any, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]

_DEAD_IN_MEMORY = 2  # a piece is rewritten when less than one row in so many is still wanted
_DEAD_ON_DISK = 4
# Episodes that hardly ever end leave a few rows in each of many pieces: neighbours are joined while they are small.
_PIECES = 16
_JOINED_BYTES = 8 << 20


class _Piece:
    """Rows of steps ``[first, stop)`` by environment: those of one environment lie together, in the order of steps.

    offset : int64 (num_envs,), row at which an environment's begin; -1 where it has none.
    begin, count : int64 (num_envs,), its first step here and the number of its rows.
    """

    __slots__ = ("begin", "count", "first", "live", "offset", "rows", "spilled", "stop", "total")

    def __init__(self, first: int, stop: int, envs: Ints, begin: Ints, count: Ints, num_envs: int) -> None:
        self.first, self.stop = first, stop
        self.offset = np.full(num_envs, -1, np.int64)
        self.begin = np.zeros(num_envs, np.int64)
        self.count = np.zeros(num_envs, np.int64)
        self.offset[envs] = np.cumsum(count) - count
        self.begin[envs] = begin
        self.count[envs] = count
        self.live = self.total = int(count.sum())
        self.rows: dict[str, Array] | None = None
        self.spilled: Spilled | None = None

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows.values()) if self.rows is not None else 0

    def kinds(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and row shape of each field."""
        if self.rows is not None:
            return {path: (rows.dtype, rows.shape[1:]) for path, rows in self.rows.items()}
        assert self.spilled is not None
        return self.spilled.kinds()

    def take(self, path: str, index: Ints) -> Array:
        if self.rows is not None:
            return self.rows[path].take(index, axis=0)
        assert self.spilled is not None
        return self.spilled.take(path, index)


class Remains:
    """Unfinished rows by environment and step.

    Parameters
    ----------
    limit : bytes held in memory after a ``trim``; beyond it the oldest pieces go to the spill log.
    log : makes the spill log when it is first needed.

    Attributes
    ----------
    memory_bytes, peak_bytes : held in memory now, and at most so far.
    """

    def __init__(self, num_envs: int, limit: int, log: Callable[[], SpillLog]) -> None:
        self.limit = limit
        self.memory_bytes = 0
        self.peak_bytes = 0
        self._num_envs = num_envs
        self._make_log = log
        self._log: SpillLog | None = None
        self._pieces: list[_Piece] = []
        self._row_bytes = 1

    def add(self, first: int, stop: int, envs: Ints, begin: Ints, rows: Mapping[str, Array]) -> None:
        """Take rows of steps ``[first, stop)``: those of each of ``envs`` from ``begin`` on, one env's together."""
        piece = _Piece(first, stop, envs, begin, stop - begin, self._num_envs)
        piece.rows = dict(rows)
        self._pieces.append(piece)
        self._count(piece.nbytes)
        self._row_bytes = max(piece.nbytes // max(piece.total, 1), 1)
        if len(self._pieces) > _PIECES:
            self._join()

    def trim(self) -> None:
        """Move the oldest pieces to disk while there are more bytes in memory than may be.

        Raises ``StorageError`` if the disk refuses; call again, nothing is lost.
        """
        while self.memory_bytes > self.limit:
            self._spill(next(piece for piece in self._pieces if piece.rows is not None))

    def take(self, path: str, env: Ints, step: Ints, out: Array) -> None:
        """Fill ``out`` (n, *shape) with one field's rows."""
        if len(self._pieces) == 1:
            piece = self._pieces[0]
            out[...] = piece.take(path, piece.offset[env] + step - piece.begin[env])
            return
        number = np.searchsorted([piece.first for piece in self._pieces], step, side="right") - 1
        for i in np.unique(number).tolist():
            piece = self._pieces[i]
            mine = np.flatnonzero(number == i)
            out[mine] = piece.take(path, piece.offset[env[mine]] + step[mine] - piece.begin[env[mine]])

    def drop(self, envs: Ints) -> None:
        """Forget the rows of environments whose episode has been taken."""
        kept = []
        rewritten = False  # one at a time: what is rewritten passes through memory
        for piece in self._pieces:
            held = envs[piece.offset[envs] >= 0]
            piece.live -= int(piece.count[held].sum())
            piece.offset[held] = -1
            piece.count[held] = 0
            if not piece.live:
                self._forget(piece)
                continue
            wasteful = piece.live * (_DEAD_IN_MEMORY if piece.rows is not None else _DEAD_ON_DISK) < piece.total
            if wasteful and not rewritten:
                piece, rewritten = self._replace(piece.first, piece.stop, [piece]), True
            kept.append(piece)
        self._pieces = kept

    def close(self) -> None:
        self._pieces = []
        self.memory_bytes = 0
        if self._log is not None:
            self._log.close()

    @property
    def figures(self) -> dict[str, int]:
        log = self._log
        return {
            "unfinished_bytes": self.memory_bytes,
            "unfinished_peak_bytes": self.peak_bytes,
            "spilled_bytes": log.written_bytes if log else 0,
        }

    def _count(self, change: int) -> None:
        self.memory_bytes += change
        self.peak_bytes = max(self.peak_bytes, self.memory_bytes)

    def _forget(self, piece: _Piece) -> None:
        self._count(-piece.nbytes)
        if piece.spilled is not None:
            piece.spilled.remove()

    def _spill(self, piece: _Piece) -> None:
        assert piece.rows is not None
        if self._log is None:
            self._log = self._make_log()
        envs = np.flatnonzero(piece.offset >= 0)
        about = {"envs": envs.tolist(), "begin": piece.begin[envs].tolist(), "count": piece.count[envs].tolist()}
        about["offset"] = piece.offset[envs].tolist()
        spilled = self._log.write(piece.rows, about)
        self._count(-piece.nbytes)
        piece.rows, piece.spilled = None, spilled

    def _join(self) -> None:
        """Make one piece of two neighbours, the smallest there are, unless they are large."""
        live = [piece.live for piece in self._pieces]
        i = min(range(len(live) - 1), key=lambda i: live[i] + live[i + 1])
        pair = self._pieces[i : i + 2]
        if (live[i] + live[i + 1]) * self._row_bytes <= _JOINED_BYTES:
            self._pieces[i : i + 2] = [self._replace(pair[0].first, pair[1].stop, pair)]

    def _replace(self, first: int, stop: int, pieces: list[_Piece]) -> _Piece:
        """A new piece with the live rows of neighbours. Whose rows begin in one of them go on in the next."""
        envs = np.flatnonzero(pieces[-1].offset >= 0)
        counts = np.stack([np.where(piece.offset[envs] >= 0, piece.count[envs], 0) for piece in pieces])
        begin = np.where(counts[0] > 0, pieces[0].begin[envs], pieces[-1].begin[envs])
        total = counts.sum(axis=0)
        joined = _Piece(first, stop, envs, begin, total, self._num_envs)
        starts = np.cumsum(total) - total
        rows = {}
        for path, (dtype, shape) in pieces[0].kinds().items():
            out = rows[path] = np.empty((int(total.sum()), *shape), dtype)
            at = starts.copy()
            for piece, count in zip(pieces, counts):
                held = np.cumsum(count) - count
                index = np.arange(int(count.sum()))
                taken = piece.take(path, np.repeat(piece.offset[envs] - held, count) + index)
                out[np.repeat(at - held, count) + index] = taken
                at += count
        joined.rows = rows
        for piece in pieces:
            self._forget(piece)
        self._count(joined.nbytes)
        return joined
