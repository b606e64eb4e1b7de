"""The newest batches in memory, their rows in one tensor for each field, so that a sample is one gather."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping

import torch

from trajstore.rlinf.flat import Ints, Tensors, put, take


class Arena:
    """A first-in-first-out cache of batches' rows.

    Parameters
    ----------
    limit : batches that are held at the most; ``None`` for any number. limit_bytes : of their rows, likewise.

    Notes
    -----
    Grows by doubling with what it holds, and never beyond twice of that. Not locked.
    """

    def __init__(self, limit: int | None, limit_bytes: int | None = None) -> None:
        self.limit, self.limit_bytes = limit, limit_bytes
        self.version = 0
        self._rows: Tensors = {}
        self._capacity = 0
        self._spans: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._paths: dict[int, frozenset[str]] = {}
        self._bytes: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._spans)

    def __contains__(self, number: int) -> bool:
        return number in self._spans

    def __iter__(self) -> Iterator[int]:
        return iter(self._spans)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are held."""
        return sum(self._bytes.values())

    def put(self, number: int, flat: Mapping[str, torch.Tensor]) -> list[int]:
        """Copy a batch's rows in; the batches that went for it."""
        gone = [number] if self.limit == 0 else []
        if gone or not flat:
            return gone
        count = len(next(iter(flat.values())))
        size = sum(rows.nbytes for rows in flat.values())
        while self._spans and self._is_full(size):
            gone.append(self.drop_oldest())
        start = self._place(count)
        for path, rows in flat.items():
            put(self._column(path, rows), slice(start, start + count), rows)
        self._spans[number] = start, count
        self._paths[number] = frozenset(flat)
        self._bytes[number] = size
        self.version += 1
        return gone

    def _is_full(self, size: int) -> bool:
        if self.limit is not None and len(self._spans) >= self.limit:
            return True
        return self.limit_bytes is not None and self.nbytes + size > self.limit_bytes

    def _column(self, path: str, like: torch.Tensor) -> torch.Tensor:
        held = self._rows.get(path)
        if held is None:
            held = self._rows[path] = torch.empty((self._capacity, *like.shape[1:]), dtype=like.dtype)
        return held

    def _place(self, count: int) -> int:
        """The first row of a free stretch: batches lie in a circle, the oldest behind the newest."""
        spans = self._spans
        if not spans and count <= self._capacity:
            return 0
        if spans:
            head = next(iter(spans.values()))[0]
            newest, n = next(reversed(spans.values()))
            end = newest + n
            stop = head if newest < head else self._capacity
            if end + count <= stop:
                return end
            if newest >= head >= count:
                return 0
        return self._grow(count)

    def _grow(self, count: int) -> int:
        """Move all rows together, into twice the room that they and ``count`` more need; the first free row."""
        held = sum(n for _, n in self._spans.values())
        self._capacity = 2 * (held + count)
        for path, rows in self._rows.items():
            larger = torch.empty((self._capacity, *rows.shape[1:]), dtype=rows.dtype)
            at = 0
            for start, n in self._spans.values():
                larger[at : at + n] = rows[start : start + n]
                at += n
            self._rows[path] = larger
        at = 0
        for number, (_, n) in self._spans.items():
            self._spans[number] = at, n
            at += n
        return at

    def drop_oldest(self) -> int:
        number = next(iter(self._spans))
        self.drop(number)
        return number

    def drop(self, number: int) -> None:
        del self._spans[number], self._paths[number], self._bytes[number]
        self.version += 1

    def clear(self) -> None:
        self._rows, self._capacity = {}, 0
        for number in list(self._spans):
            self.drop(number)

    def start(self, number: int) -> int:
        """The first row of a batch, -1 if it is not held."""
        return self._spans.get(number, (-1, 0))[0]

    def paths(self, numbers: Iterable[int]) -> list[str]:
        """The fields that all of these batches have."""
        different = {self._paths[number] for number in numbers}
        return [path for path in self._rows if all(path in known for known in different)]

    def gather(self, rows: Ints, paths: list[str]) -> Tensors:
        """Rows of these fields, by path."""
        return {path: take(self._rows[path], rows) for path in paths}

    def batch(self, number: int) -> Tensors:
        """All rows of a batch, by path."""
        start, count = self._spans[number]
        return {path: self._rows[path][start : start + count] for path in self._rows if path in self._paths[number]}
