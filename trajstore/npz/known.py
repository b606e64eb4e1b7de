"""What the names in a NumPy pickle stand for: functions of this module, never the things themselves.

A global is looked up in :data:`GLOBALS` alone; any other name is refused by whoever asks.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["GLOBALS", "Global", "Unbuilt", "as_key", "require"]

Array = np.ndarray[Any, Any]


class Global:
    """A name that the pickle gave; ``make`` is what it stands for here."""

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[[tuple[Any, ...]], Any]) -> None:
        self.name = name
        self.make = make


class Unbuilt:
    """An array or dtype whose state has not come yet, and where the memo holds it."""

    __slots__ = ("build", "keys")

    def __init__(self, build: Callable[[Any], Any]) -> None:
        self.build = build
        self.keys: list[int] = []


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def as_key(value: Any, depth: int = 0) -> Any:
    """A value that may be a key: its hash is cheap, its nesting shallow."""
    if isinstance(value, (tuple, frozenset)) and depth < 8:
        for item in value:
            as_key(item, depth + 1)
    elif not isinstance(value, (str, int, float, complex, bytes, np.generic, type(None))):
        raise ValueError(f"a {type(value).__name__} as a key")
    return value


def _reconstruct(arguments: tuple[Any, ...]) -> Unbuilt:
    kind, _, _ = arguments
    require(type(kind) is Global and kind.name == "numpy.ndarray", "an array of another class")
    return Unbuilt(_array)


def _array(state: tuple[Any, ...]) -> Array:
    version, shape, dtype, fortran, data = state
    require(version == 1, "an array state of another version")
    return _array_of(shape, dtype, "F" if fortran else "C", data)


def _array_of(shape: Any, dtype: Any, order: Any, data: Any) -> Array:
    require(type(shape) is tuple and len(shape) <= 32, "an array without a shape")
    require(all(type(n) is int and n >= 0 for n in shape), "an array without a shape")
    require(isinstance(dtype, np.dtype), "an array without a dtype")
    count = math.prod(shape)
    if dtype.hasobject:
        require(type(data) is list and len(data) == count, "an array whose elements are not as many as its shape says")
        flat = np.empty(count, object)
        for i, value in enumerate(data):
            flat[i] = value
        return flat.reshape(shape)
    require(isinstance(data, (bytes, bytearray)) and order in ("C", "F"), "an array without data")
    require(dtype.itemsize > 0 and len(data) == count * dtype.itemsize, "an array whose data does not fill its shape")
    array = np.ndarray(shape, dtype, data, order=order) if count else np.empty(shape, dtype)
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))  # as NumPy does


def _frombuffer(arguments: tuple[Any, ...]) -> Array:
    data, dtype, shape, order = arguments
    return _array_of(shape, dtype, order, data)


_DTYPE = re.compile(r"O8?|[bB?hHiIlLqQefdgFDG]|[biufc]\d{1,2}|[SUV]\d{0,7}|[mM]8")


def _dtype(arguments: tuple[Any, ...]) -> Unbuilt:
    code = arguments[0]
    if type(code) is not str or not _DTYPE.fullmatch(code):
        raise ValueError(f"the dtype {code!r}")

    def build(state: tuple[Any, ...]) -> np.dtype[Any]:
        version, order, subarray, names, fields = state[:5]
        require(version in (3, 4) and order in ("<", ">", "|", "="), "a dtype state of another version")
        require(subarray is None and names is None and fields is None, "a structured dtype")
        if code[0] in "mM" and len(state) > 8:
            unit, count = state[8][1][0].decode(), state[8][1][1]
            return np.dtype(code if unit == "generic" else f"{code}[{count}{unit}]").newbyteorder(order)
        return np.dtype(code).newbyteorder(order)

    return Unbuilt(build)


def _scalar(arguments: tuple[Any, ...]) -> Any:
    dtype, data = arguments
    require(isinstance(dtype, np.dtype) and not dtype.hasobject, "a scalar of no dtype")
    if not dtype.itemsize:
        return dtype.type()
    return _array_of((), dtype, "C", data)[()]


def _encode(arguments: tuple[Any, ...]) -> bytes:
    text, encoding = arguments
    require(encoding in ("latin1", "latin-1") and type(text) is str, "an encoding other than latin1")
    return str(text).encode("latin1")


def _set_of(arguments: tuple[Any, ...]) -> set[Any]:
    require(len(arguments) <= 1 and all(type(items) is list for items in arguments), "a set of no list")
    return {as_key(item) for items in arguments for item in items}


def _bytes(arguments: tuple[Any, ...]) -> bytes:
    if len(arguments) == 2:
        return _encode(arguments)
    require(len(arguments) == 0 or type(arguments[0]) is bytes, "bytes of no bytes")
    return bytes(arguments[0]) if arguments else b""


def _complex(arguments: tuple[Any, ...]) -> complex:
    real, imag = arguments
    require(type(real) is float and type(imag) is float, "a complex number of no floats")
    return complex(real, imag)


def _ordered_dict(arguments: tuple[Any, ...]) -> OrderedDict[Any, Any]:
    require(arguments == (), "an OrderedDict with arguments")
    return OrderedDict()


def _not_callable(arguments: tuple[Any, ...]) -> Any:
    raise ValueError("a call of numpy.ndarray")


GLOBALS: dict[tuple[str, str], Callable[[tuple[Any, ...]], Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy", "ndarray"): _not_callable,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _ordered_dict,
}
for _module in ("builtins", "__builtin__"):
    GLOBALS[_module, "set"] = _set_of
    GLOBALS[_module, "frozenset"] = lambda arguments: frozenset(_set_of(arguments))
    GLOBALS[_module, "bytes"] = _bytes
    GLOBALS[_module, "bytearray"] = lambda arguments: bytearray(_bytes(arguments))
    GLOBALS[_module, "complex"] = _complex
