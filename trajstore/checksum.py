"""CRC-32C, the checksum of every format here."""

from __future__ import annotations

from typing import Any

import google_crc32c
import numpy as np


def crc32c(data: Any, value: int = 0) -> int:
    """CRC-32C of a contiguous buffer (bytes, memoryview, array), going on from ``value``; in ``[0, 2**32)``."""
    if not isinstance(data, bytes):
        # The C extension takes bytes and arrays, not a writable memoryview.
        data = data.reshape(-1).view(np.uint8) if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    return int(google_crc32c.extend(value, data))
