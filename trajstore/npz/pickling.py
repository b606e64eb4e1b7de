"""Pickles of object arrays, given out piece by piece.

``pickle`` cannot stream, and under NumPy 2 it writes module names that NumPy
before 1.26 does not know.  These are opcodes of protocol 4, without its
optional frames, and the names that every NumPy knows.  The bytes are a pure
function of the values.  Arrays go out as views of their own memory.

The memo, which a reader must keep in memory, holds only what recurs: dtypes,
the function that makes arrays, and a bounded number of short strings.
"""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np

from trajstore.errors import SchemaError

__all__ = ["object_array"]

Piece: TypeAlias = "bytes | memoryview"
Array = np.ndarray[Any, Any]

_BATCH = 1000
_MAX_DEPTH = 64
_MAX_NAMES = 1000
_MAX_NAME = 40


def object_array(shape: tuple[int, ...], elements: Iterable[object], place: str) -> Iterator[Piece]:
    """The pickle of an object array of ``shape``, whose elements come in C order.

    Raises ``SchemaError`` for an element that is not made of arrays and plain values, naming ``place`` and its index.
    """
    yield from _Pickler(place).pickle(shape, elements)


class _Pickler:
    def __init__(self, place: str) -> None:
        self._place = place
        self._memo: dict[object, bytes] = {}
        self._names = 0

    def pickle(self, shape: tuple[int, ...], elements: Iterable[object]) -> Iterator[Piece]:
        yield b"\x80\x04"
        yield from self._empty_array()
        yield b"(K\x01"
        yield from self._tuple(shape, 0)
        yield from self._dtype(np.dtype(object))
        yield b"\x89]"
        place = self._place
        i = -1
        for i, element in enumerate(elements):
            self._place = f"{place}[{i}]"
            if i % _BATCH == 0:
                yield b"e(" if i else b"("
            yield from self._value(element, 0)
        self._place = place
        yield b"etb." if i >= 0 else b"tb."

    def _value(self, value: object, depth: int) -> Iterator[Piece]:
        kind = type(value)
        if kind is np.ndarray:
            yield from self._array(value, depth)  # type: ignore[arg-type]
        elif kind in self._ATOMS:
            yield from self._ATOMS[kind](self, value)
        elif depth >= _MAX_DEPTH:
            raise SchemaError(f"{self._place} nests deeper than {_MAX_DEPTH} containers")
        elif kind in self._CONTAINERS:
            yield from self._CONTAINERS[kind](self, value, depth + 1)
        elif isinstance(value, np.generic) and not value.dtype.hasobject and value.dtype.names is None:
            yield from self._global("numpy.core.multiarray", "scalar")
            yield from self._dtype(value.dtype)
            yield from self._bytes(value.tobytes())
            yield b"\x86R"
        else:
            raise SchemaError(
                f"{self._place} holds a {kind.__module__}.{kind.__qualname__}, which is not written",
                hint="only arrays and plain values are",
            )

    # --- arrays -------------------------------------------------------------------------------

    def _array(self, array: Array, depth: int) -> Iterator[Piece]:
        if array.dtype.names is not None or (array.dtype.hasobject and depth >= _MAX_DEPTH):
            raise SchemaError(f"{self._place} holds an array of dtype {array.dtype}, which is not written")
        yield from self._empty_array()
        yield b"(K\x01"
        yield from self._tuple(array.shape, 0)
        yield from self._dtype(array.dtype)
        yield b"\x89"
        if array.dtype.hasobject:
            yield from self._list(array.reshape(-1).tolist(), depth + 1)
        else:
            yield from self._bytes(_memory(array))
        yield b"tb"

    def _empty_array(self) -> Iterator[Piece]:
        """``_reconstruct(ndarray, (0,), b"b")``: an array waiting for its state."""
        yield from self._global("numpy.core.multiarray", "_reconstruct")
        if "empty" in self._memo:
            yield self._memo["empty"]
        else:
            yield from self._global("numpy", "ndarray")
            yield b"K\x00\x85C\x01b\x87"
            yield self._put("empty")
        yield b"R"

    def _dtype(self, dtype: np.dtype[Any]) -> Iterator[Piece]:
        key = dtype.str
        if key in self._memo:
            yield self._memo[key]
            return
        arguments, state = _dtype_state(dtype)
        yield from self._global("numpy", "dtype")
        yield from self._tuple(arguments, 0)
        yield b"R"
        put = self._put(key)
        yield from self._tuple(state, 0)
        yield b"b" + put

    def _global(self, module: str, name: str) -> Iterator[Piece]:
        if (module, name) in self._memo:
            yield self._memo[module, name]
        else:
            yield f"c{module}\n{name}\n".encode()
            yield self._put((module, name))

    def _put(self, key: object) -> bytes:
        """The opcode that remembers what is on the stack, as ``key``."""
        index = len(self._memo)
        self._memo[key] = b"h%c" % index if index < 256 else b"j" + struct.pack("<I", index)
        return b"q%c" % index if index < 256 else b"r" + struct.pack("<I", index)

    # --- plain values -------------------------------------------------------------------------

    def _constant(self, value: object) -> Iterator[Piece]:
        yield {None: b"N", True: b"\x88", False: b"\x89"}[value]  # type: ignore[index]

    def _int(self, value: int) -> Iterator[Piece]:
        if 0 <= value < 256:
            yield b"K%c" % value
        elif -(1 << 31) <= value < 1 << 31:
            yield b"J" + struct.pack("<i", value)
        else:
            data = pickle.encode_long(value)
            if len(data) > 255:
                raise SchemaError(f"{self._place} holds an int of {len(data)} bytes, which is not written")
            yield b"\x8a%c" % len(data) + data

    def _float(self, value: float) -> Iterator[Piece]:
        yield b"G" + struct.pack(">d", value)

    def _complex(self, value: complex) -> Iterator[Piece]:
        yield from self._global("builtins", "complex")
        yield b"G" + struct.pack(">d", value.real) + b"G" + struct.pack(">d", value.imag) + b"\x86R"

    def _text(self, value: str) -> Iterator[Piece]:
        key = ("text", value)
        if key in self._memo:
            yield self._memo[key]
            return
        data = value.encode("utf-8", "surrogatepass")
        yield (b"\x8c%c" % len(data) if len(data) < 256 else b"X" + struct.pack("<I", len(data))) + data
        if len(data) <= _MAX_NAME and self._names < _MAX_NAMES:
            self._names += 1
            yield self._put(key)

    def _bytes(self, value: Piece) -> Iterator[Piece]:
        if len(value) < 256:
            yield b"C%c" % len(value)
        elif len(value) < 1 << 32:
            yield b"B" + struct.pack("<I", len(value))
        else:
            yield b"\x8e" + struct.pack("<Q", len(value))
        yield value

    def _bytearray(self, value: bytearray) -> Iterator[Piece]:
        yield from self._global("builtins", "bytearray")
        yield from self._bytes(bytes(value))
        yield b"\x85R"

    # --- containers ---------------------------------------------------------------------------

    def _values(self, values: Iterable[object], depth: int) -> Iterator[Piece]:
        for value in values:
            yield from self._value(value, depth)

    def _tuple(self, value: tuple[object, ...], depth: int) -> Iterator[Piece]:
        if not value:
            yield b")"
        elif len(value) <= 3:
            yield from self._values(value, depth)
            yield (b"\x85", b"\x86", b"\x87")[len(value) - 1]
        else:
            yield b"("
            yield from self._values(value, depth)
            yield b"t"

    def _list(self, value: list[object], depth: int) -> Iterator[Piece]:
        yield b"]("
        yield from self._values(value, depth)
        yield b"e"

    def _pairs(self, value: dict[object, object], depth: int) -> Iterator[Piece]:
        yield b"("
        for pair in value.items():
            yield from self._values(pair, depth)
        yield b"u"

    def _dict(self, value: dict[object, object], depth: int) -> Iterator[Piece]:
        yield b"}"
        yield from self._pairs(value, depth)

    def _ordered_dict(self, value: dict[object, object], depth: int) -> Iterator[Piece]:
        yield from self._global("collections", "OrderedDict")
        yield b")R"
        yield from self._pairs(value, depth)

    def _sorted(self, values: Iterable[object]) -> list[object]:
        """A set's elements in an order that does not hang on string hashes."""
        return sorted(values, key=lambda value: (type(value).__name__, repr(value)))

    def _set(self, value: set[object], depth: int) -> Iterator[Piece]:
        yield b"\x8f("
        yield from self._values(self._sorted(value), depth)
        yield b"\x90"

    def _frozenset(self, value: frozenset[object], depth: int) -> Iterator[Piece]:
        yield b"("
        yield from self._values(self._sorted(value), depth)
        yield b"\x91"

    _ATOMS: dict[type, Callable[[_Pickler, Any], Iterator[Piece]]] = {
        type(None): _constant,
        bool: _constant,
        int: _int,
        float: _float,
        complex: _complex,
        str: _text,
        bytes: _bytes,
        bytearray: _bytearray,
    }
    _CONTAINERS: dict[type, Callable[[_Pickler, Any, int], Iterator[Piece]]] = {
        tuple: _tuple,
        list: _list,
        dict: _dict,
        OrderedDict: _ordered_dict,
        set: _set,
        frozenset: _frozenset,
    }


def _dtype_state(dtype: np.dtype[Any]) -> tuple[tuple[object, ...], tuple[object, ...]]:
    reduced: Any = dtype.__reduce__()
    return reduced[1], reduced[2]


def _memory(array: Array) -> Piece:
    """The array's bytes in C order, without a copy where it lies so."""
    if not array.size:
        return b""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
