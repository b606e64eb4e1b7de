"""The header of an npy array: what NumPy reads from it, remembered, since the keys of many files have the same few."""

from __future__ import annotations

import io
import warnings
from functools import lru_cache
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib import format as npy

from trajstore.npz.content import Content

__all__ = ["Header", "read_header"]

#: Shape, whether in Fortran's order, and dtype.
Header = tuple[tuple[int, ...], bool, np.dtype[Any]]

_MAX_BYTES = 10_000  # NumPy's own bound
_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_header(file: Content) -> Header:
    """Read a header to its end. Raises ``ValueError`` if it is none, or of another version."""
    version = npy.read_magic(file)
    if version not in _READERS:
        raise ValueError(f"its npy version is {version}, which is not read")
    size = _exactly(file, 2 if version == (1, 0) else 4)
    length = int.from_bytes(size, "little")
    if length > _MAX_BYTES:
        raise ValueError(f"its header has {length:,} bytes")
    return _parsed(version, size + _exactly(file, length))


def _exactly(file: Content, n: int) -> bytes:
    data = b""
    while len(data) < n:
        more = file.read(n - len(data))
        if not more:
            raise ValueError("its header is cut off")
        data += more
    return data


@lru_cache(256)
def _parsed(version: tuple[int, int], header: bytes) -> Header:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers written by Python 2
            shape, fortran, dtype = _READERS[version](io.BytesIO(header))
    except (TypeError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from error
    return tuple(shape), bool(fortran), dtype
