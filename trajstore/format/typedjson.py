"""JSON that gives back the Python value it was made from, types and all.

Users hang free-form dicts on their trajectories.  Plain JSON would turn tuples
into lists, integer keys into strings and NumPy scalars into errors; pickle
would run whatever a stranger's file says.  Here plain JSON stays plain JSON,
readable by anything, and what JSON lacks is an object with exactly one key
that starts with ``$``, a *tag*:

==========================================  ===================================================
``{"$tuple": [a, b]}``                      a tuple
``{"$set": [...]}``, ``{"$frozenset": …}``  a set, its elements in a canonical order
``{"$dict": [[key, value], ...]}``          a dict that has other keys than strings, or whose
                                            only key starts with ``$`` and would read as a tag
``{"$ordered_dict": [[key, value], ...]}``  a ``collections.OrderedDict``
``{"$float": "nan"}``                       ``nan``, ``inf`` or ``-inf``
``{"$complex": [re, im]}``                  a complex number
``{"$bytes": "<base64>"}``                  bytes
``{"$scalar": ["<f4", value]}``             a NumPy scalar: dtype in ``dtype.str`` notation and
                                            its value, or its raw memory as ``$bytes`` where no
                                            JSON value gives back the same bits
``{"$array": ["<f4", [2, 3], "<base64>"]}`` an ndarray: dtype, shape, raw memory in C order
==========================================  ===================================================

Tags nest.  Anything else is refused, with the path to it.  Not told apart: two
scalar types of one dtype (``longlong`` and ``int64`` on Linux), and the memory
order of an array.  The ``bytes`` made are a pure function of the value.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from trajstore.errors import FormatError, SchemaError

__all__ = ["MAX_BYTES", "MAX_DEPTH", "dumps", "loads"]

MAX_BYTES = 64 << 20
"""The longest text written or read; what is larger belongs into a field."""
MAX_DEPTH = 64
"""The deepest nesting of Python containers written or read."""
_MAX_NODES = 1 << 22
_MAX_INT_BITS = 8192  # CPython refuses to parse decimal numbers beyond 4,300 digits
_DTYPE = re.compile(r"[<>|](?:[biufcSUV]\d{1,7}|[mM]8(?:\[\d{0,9}[a-zA-Zμ]{1,2}\])?)")
_NAME = re.compile(r"[A-Za-z_]\w{0,60}")


def dumps(value: object) -> bytes:
    """Encode a value as UTF-8 JSON.

    Parameters
    ----------
    value : None, bool, int, float, complex, str, bytes, list, tuple, dict, OrderedDict,
        set, frozenset, NumPy scalars and ndarrays (no object or structured dtypes), nested.

    Raises
    ------
    SchemaError : something else, a subclass of one of these, or beyond the bounds; names the path.
    """
    plain = _Encoder().encode(value, "$", 0)
    text = json.dumps(plain, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:
        data = text.encode()
    except UnicodeEncodeError:  # lone surrogates have no UTF-8, but do have a JSON escape
        data = json.dumps(plain, separators=(",", ":"), allow_nan=False).encode()
    if len(data) > MAX_BYTES:
        raise _too_large("$")
    return data


def loads(data: bytes) -> Any:
    """Decode what :func:`dumps` wrote; arrays come back writable and in C order.

    Raises
    ------
    FormatError : not JSON, an unknown or malformed tag, or beyond the bounds; names the path.
    """
    if len(data) > MAX_BYTES:
        raise FormatError(f"a JSON value of {len(data):,} bytes is longer than the {MAX_BYTES:,} allowed")
    try:
        plain = json.loads(bytes(data).decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise FormatError(f"not a JSON value: {reason}") from error
    return _decode(plain, "$", 0)


# --- encoding -------------------------------------------------------------------------------


class _Encoder:
    """One call of :func:`dumps`: counts the nodes, so that a value that contains itself a
    thousand times over (a graph, not a tree) ends in an error and not in all memory."""

    def __init__(self) -> None:
        self._room, self._nodes = MAX_BYTES, _MAX_NODES

    def encode(self, value: object, path: str, depth: int) -> object:
        kind = type(value)
        if value is None or kind is bool:
            self._take(1, path)
        elif kind is str:
            self._take(len(value), path)  # type: ignore[arg-type]
        elif kind is int:
            return self._int(value, path)  # type: ignore[arg-type]
        elif kind is float:
            return self._float(value, path)  # type: ignore[arg-type]
        elif depth >= MAX_DEPTH:
            raise SchemaError(f"{path} lies deeper than {MAX_DEPTH} containers", hint=_HINT)
        else:
            encode = self._CONTAINERS.get(kind)
            if encode is not None:
                return encode(self, value, path, depth)
            if isinstance(value, np.generic):
                return self._scalar(value, path, depth)
            raise SchemaError(f"{path} is a {_qualified(kind)}, which a JSON field cannot hold", hint=_HINT)
        return value

    def _take(self, size: int, path: str) -> None:
        self._room -= size
        self._nodes -= 1
        if self._room < 0 or self._nodes < 0:
            raise _too_large(path)

    def _int(self, value: int, path: str) -> int:
        if value.bit_length() > _MAX_INT_BITS:
            raise SchemaError(f"{path} is an int of {value.bit_length()} bits, beyond {_MAX_INT_BITS}", hint=_HINT)
        self._take(1, path)
        return value

    def _float(self, value: float, path: str) -> object:
        self._take(3, path)
        return value if math.isfinite(value) else {"$float": repr(value)}

    def _items(self, values: Iterable[object], path: str, depth: int) -> list[object]:
        self._take(1, path)
        return [self.encode(value, f"{path}[{i}]", depth + 1) for i, value in enumerate(values)]

    def _pairs(self, value: dict[Any, Any], path: str, depth: int) -> list[object]:
        self._take(1, path)
        return [
            [self.encode(k, f"{path}.keys()[{i}]", depth + 1), self.encode(v, _member(path, k), depth + 1)]
            for i, (k, v) in enumerate(value.items())
        ]

    def _dict(self, value: dict[Any, Any], path: str, depth: int) -> object:
        if any(type(key) is not str for key in value) or _is_tag(value):
            return {"$dict": self._pairs(value, path, depth)}
        self._take(sum(map(len, value)), path)
        return {key: self.encode(item, _member(path, key), depth + 1) for key, item in value.items()}

    def _set(self, value: Iterable[object], path: str, depth: int) -> list[object]:
        items = [self.encode(item, f"{path}{{…}}", depth + 1) for item in value]
        return sorted(items, key=json.dumps)

    def _bytes(self, value: bytes, path: str, depth: int) -> object:
        self._take(len(value), path)
        return {"$bytes": base64.b64encode(value).decode()}

    def _complex(self, value: complex, path: str, depth: int) -> object:
        return {"$complex": [self._float(value.real, path), self._float(value.imag, path)]}

    def _scalar(self, value: np.generic, path: str, depth: int) -> object:
        dtype = _writable(value.dtype, path)
        raw = value.tobytes()
        item = value.item() if dtype.kind in _SCALAR_VALUES else None
        if type(item) in _SCALAR_VALUES.get(dtype.kind, ()):
            content = [dtype.str, self.encode(item, path, depth + 1)]
            if _scalar(content, path, depth).tobytes() == raw:  # else a NaN of another bit pattern
                return {"$scalar": content}
        return {"$scalar": [dtype.str, self._bytes(raw, path, depth)]}

    def _array(self, value: np.ndarray[Any, Any], path: str, depth: int) -> object:
        dtype = _writable(value.dtype, path)
        if not dtype.itemsize:  # bounds by bytes bound nothing here
            raise SchemaError(f"{path} has the dtype {dtype}, of no bytes", hint=_HINT)
        self._take(value.nbytes, path)
        return {"$array": [dtype.str, list(value.shape), base64.b64encode(value.tobytes()).decode()]}

    # keyed by exact type: a subclass (a namedtuple, a defaultdict, np.float64) would not come back as one
    _CONTAINERS: dict[type, Callable[[_Encoder, Any, str, int], object]] = {
        list: _items,
        tuple: lambda self, value, path, depth: {"$tuple": self._items(value, path, depth)},
        dict: _dict,
        OrderedDict: lambda self, value, path, depth: {"$ordered_dict": self._pairs(value, path, depth)},
        set: lambda self, value, path, depth: {"$set": self._set(value, path, depth)},
        frozenset: lambda self, value, path, depth: {"$frozenset": self._set(value, path, depth)},
        bytes: _bytes,
        complex: _complex,
        np.ndarray: _array,
    }


_HINT = "store what it stands for as numbers, strings, lists, dicts or small arrays, or as a field of its own"


def _too_large(path: str) -> SchemaError:
    return SchemaError(
        f"{path}: the value is longer than {MAX_BYTES:,} bytes or {_MAX_NODES:,} items as JSON", hint=_HINT
    )


def _qualified(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _member(path: str, key: object) -> str:
    if type(key) is str:
        return f"{path}.{key}" if _NAME.fullmatch(key) else f"{path}[{json.dumps(key[:40])}]"
    return f"{path}[{str(key)[:40]}]"


def _writable(dtype: np.dtype[Any], path: str) -> np.dtype[Any]:
    if not _DTYPE.fullmatch(dtype.str) or np.dtype(dtype.str) != dtype:
        raise SchemaError(f"{path} has the dtype {dtype}, which a JSON field cannot hold", hint=_HINT)
    return dtype


def _is_tag(value: dict[str, object]) -> bool:
    return len(value) == 1 and next(iter(value)).startswith("$")


# --- decoding -------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object has the same key twice")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"the constant {name}")


def _decode(value: Any, path: str, depth: int) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise FormatError(f"{path}: a number beyond the range of a double")
    if not isinstance(value, (list, dict)):
        return value
    if depth >= MAX_DEPTH:
        raise FormatError(f"{path} lies deeper than {MAX_DEPTH} containers")
    if isinstance(value, list):
        return _list(value, path, depth)
    if not _is_tag(value):
        return {key: _decode(item, _member(path, key), depth + 1) for key, item in value.items()}
    ((tag, content),) = value.items()
    if tag not in _TAGS:
        raise FormatError(f"{path}: the tag {tag!r} is unknown", hint="a newer version may have written it")
    try:
        return _TAGS[tag](content, path, depth)
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        raise FormatError(f"{path}: malformed {tag}: {error}") from error


def _list(content: object, path: str, depth: int) -> list[Any]:
    if not isinstance(content, list):
        raise ValueError("not a list")
    return [_decode(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(content)]


def _pairs(content: object, path: str, depth: int) -> list[tuple[Any, Any]]:
    if not isinstance(content, list):
        raise ValueError("not a list of pairs")
    pairs = []
    for i, (k, v) in enumerate(content):
        key = _decode(k, f"{path}.keys()[{i}]", depth + 1)
        pairs.append((key, _decode(v, _member(path, key), depth + 1)))
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return pairs


def _float(content: object, path: str, depth: int) -> float:
    if content not in ("nan", "inf", "-inf"):
        raise ValueError(f"{content!r} is none of nan, inf, -inf")
    return float(content)


def _complex(content: Any, path: str, depth: int) -> complex:
    re_, im = (_decode(part, path, depth + 1) for part in content)
    if type(re_) is not float or type(im) is not float:
        raise ValueError("not two floats")
    return complex(re_, im)


def _bytes(content: object, path: str, depth: int) -> bytes:
    return base64.b64decode(_text(content), validate=True)


def _text(content: object) -> str:
    if not isinstance(content, str):
        raise ValueError("not a string")
    return content


def _dtype(text: object) -> np.dtype[Any]:
    if not _DTYPE.fullmatch(_text(text)):
        raise ValueError(f"the dtype {text!r} is not allowed")
    return np.dtype(text)  # type: ignore[call-overload,no-any-return]


def _scalar(content: Any, path: str, depth: int) -> Any:
    name, value = content
    dtype, value = _dtype(name), _decode(value, path, depth + 1)
    if isinstance(value, bytes) and dtype.kind != "S":
        return _from_memory(value, dtype, ())[()]
    if type(value) not in _SCALAR_VALUES.get(dtype.kind, ()):
        raise ValueError(f"a {type(value).__name__} is no {dtype}")
    if dtype.kind in "iu" and not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
        raise ValueError(f"{value} is no {dtype}")
    with np.errstate(over="ignore"):
        scalar = dtype.type(value)
    if dtype.kind in "US" and scalar.dtype != dtype:
        raise ValueError(f"{len(value)} characters are no {dtype}")
    return scalar


_SCALAR_VALUES: dict[str, tuple[type, ...]] = {
    "b": (bool,),
    "i": (int,),
    "u": (int,),
    "f": (float,),
    "c": (complex,),
    "U": (str,),
    "S": (bytes,),
}


def _array(content: Any, path: str, depth: int) -> np.ndarray[Any, Any]:
    name, shape, data = content
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
        raise ValueError("not a shape")
    return _from_memory(_bytes(data, path, depth), _dtype(name), tuple(shape)).copy()


def _from_memory(data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    if not dtype.itemsize or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes are no {dtype} of shape {shape}")
    if not data:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, data)


_TAGS: dict[str, Callable[[Any, str, int], Any]] = {
    "$tuple": lambda content, path, depth: tuple(_list(content, path, depth)),
    "$set": lambda content, path, depth: set(_list(content, path, depth)),
    "$frozenset": lambda content, path, depth: frozenset(_list(content, path, depth)),
    "$dict": lambda content, path, depth: dict(_pairs(content, path, depth)),
    "$ordered_dict": lambda content, path, depth: OrderedDict(_pairs(content, path, depth)),
    "$float": _float,
    "$complex": _complex,
    "$bytes": _bytes,
    "$scalar": _scalar,
    "$array": _array,
}
