"""Rows of native numbers out of object arrays of Python numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from trajstore.npz.unpickling import Block

__all__ = ["rows"]

Array = np.ndarray[Any, Any]

_WIDER: dict[str, list[str]] = {"b": ["?"], "i": ["i1", "i2", "i4", "i8", "u8"], "f": ["f2", "f4", "f8"]}
_DEFAULT = {"b": np.dtype("?"), "i": np.dtype("i8"), "f": np.dtype("f4")}


def rows(elements: Iterable[Any], shape: tuple[int, ...], dtype: np.dtype[Any] | None = None) -> Iterator[Array]:
    """Cut the elements of an object array of ``shape`` into its rows.

    Parameters
    ----------
    elements : in C order, runs of numbers as :class:`~trajstore.npz.unpickling.Block`.
    dtype : of the rows, if it is of the values' kind (float, int, bool) and holds each exactly; else
        the row comes in the smallest wider one that does.

    Yields
    ------
    Arrays of ``shape[1:]``; of dtype object where the elements are no numbers.
    """
    size = math.prod(shape[1:])
    if not size:
        yield from (np.empty(shape[1:], dtype or _DEFAULT["f"]) for _ in range(shape[0]))
        return
    row = _Row(size, dtype)
    for element in elements:
        values = element.values if type(element) is Block else None
        if values is None:
            row.add(element)
        else:
            while len(values):
                taken = row.extend(values)
                values = values[taken:]
                if not row.room:
                    yield row.finish().reshape(shape[1:])
        if not row.room:
            yield row.finish().reshape(shape[1:])


_NOTHING: Array = np.empty(0)


class _Row:
    """One row being filled: numbers that came singly wait in a list, so that they are cast together."""

    def __init__(self, size: int, dtype: np.dtype[Any] | None) -> None:
        self._size = size
        self._wanted = dtype
        self._begin()

    def _begin(self) -> None:
        self._array: Array = _NOTHING
        self._filled = 0
        self._single: list[Any] = []

    @property
    def room(self) -> int:
        return self._size - self._filled - len(self._single)

    def add(self, value: Any) -> None:
        self._single.append(value)

    def extend(self, values: Array) -> int:
        """Take as many values as there is room for; returns how many."""
        self._settle()
        values = values[: self.room]
        self._put(values)
        return len(values)

    def finish(self) -> Array:
        self._settle()
        array = self._array
        self._begin()
        return array

    def _settle(self) -> None:
        if not self._single:
            return
        kinds = {type(value) for value in self._single}
        if kinds <= {bool} or kinds <= {float} or kinds <= {int}:
            try:
                values = np.array(self._single)
            except OverflowError:  # beyond 64 bits
                values = _objects(self._single)
        else:
            values = _objects(self._single)
        self._single = []
        self._put(values)

    def _put(self, values: Array) -> None:
        stop = self._filled + len(values)
        if self._array is _NOTHING:
            self._array = np.empty(self._size, self._first(values.dtype))
        for dtype in self._candidates(values.dtype):
            cast = _exact(values, dtype)
            if cast is not None:
                break
        else:
            dtype, cast = np.dtype(object), _objects(values.tolist())
        if dtype != self._array.dtype:
            self._array = self._array.astype(dtype)
        self._array[self._filled : stop] = cast
        self._filled = stop

    def _first(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        kind = _kind(dtype)
        if kind and self._wanted is not None and _kind(self._wanted) == kind:
            return self._wanted
        return _DEFAULT.get(kind, np.dtype(object))

    def _candidates(self, dtype: np.dtype[Any]) -> Iterator[np.dtype[Any]]:
        """The row's own dtype first, then the wider ones of its kind."""
        own = self._array.dtype
        kind = _kind(own)
        if kind and kind == _kind(dtype):
            yield own
            wider = [np.dtype(code) for code in _WIDER[kind]]
            yield from (d for d in wider if np.can_cast(own, d) and d != own)


def _kind(dtype: np.dtype[Any]) -> str:
    return {"b": "b", "i": "i", "u": "i", "f": "f"}.get(dtype.kind, "")


def _exact(values: Array, dtype: np.dtype[Any]) -> Array | None:
    """The values in another dtype, or None if one of them is not in it."""
    with np.errstate(all="ignore"):
        cast = values.astype(dtype)
        back = cast.astype(values.dtype)
    if np.array_equal(back, values, equal_nan=values.dtype.kind == "f"):
        return cast
    return None


def _objects(values: list[Any]) -> Array:
    array = np.empty(len(values), object)
    for i, value in enumerate(values):
        array[i] = value
    return array
