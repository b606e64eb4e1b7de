"""The checksums of every format here: CRC-32C of a piece of data, CRC-32 of a file made of such pieces."""

from __future__ import annotations

import zlib
from typing import Any

import google_crc32c
import numpy as np


def crc32c(data: Any) -> int:
    """CRC-32C of a contiguous buffer (bytes, memoryview, array); in ``[0, 2**32)``."""
    if not isinstance(data, (bytes, np.ndarray)):
        data = np.frombuffer(data, np.uint8)  # the C extension takes bytes and arrays, not a memoryview
    return int(google_crc32c.extend(0, data))


def crc32(data: Any, value: int = 0) -> int:
    """CRC-32 (of zlib, IEEE 802.3) of a contiguous buffer, going on from ``value``; in ``[0, 2**32)``.

    For whole files whose pieces end with their own CRC-32C: that polynomial once more would cancel against them, and
    every file of the same lengths would have the same checksum.
    """
    return zlib.crc32(data, value)
