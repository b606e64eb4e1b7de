"""What later opcodes of a pickle may refer to, within bounds."""

from __future__ import annotations

import sys
from collections import deque
from typing import Any

import numpy as np

from trajstore.errors import FormatError
from trajstore.npz.known import Global, Unbuilt, require
from trajstore.npz.stream import Stream

__all__ = ["WHOLE", "Memo", "NotStreamableError"]

_MEMO_BYTES = 16 << 20
_KEPT_BYTES = 16 << 20
_SMALL = 4096
WHOLE = "read the key whole, with read()"


class NotStreamableError(FormatError):
    """The elements cannot be told apart as they come, or refer to others far behind; the whole can be loaded."""


class Memo:
    """Values by number; what was put longest ago, and is not likely to be asked for, is let go of."""

    def __init__(self, stream: Stream) -> None:
        self.count: int = 0
        self._stream = stream
        self._values: dict[int, Any] = {}
        self._fresh: list[int] = []
        self._recurring: set[int] = set()
        self._recent: deque[tuple[int, list[int]]] = deque()
        self._recent_bytes = 0
        self._kept_bytes = 0
        self._start = 0

    def put(self, key: int, value: Any) -> None:
        self.count = max(self.count, key + 1)
        self._values[key] = value
        if self._kept_bytes < _KEPT_BYTES and self._is_common(value):
            self._kept_bytes += 100
        else:
            self._fresh.append(key)

    @staticmethod
    def _is_common(value: Any) -> bool:
        return type(value) in (Global, Unbuilt) or (type(value) in (str, bytes) and len(value) <= 64)

    def replace(self, key: int, value: Any) -> None:
        self._values[key] = value
        if not isinstance(value, np.dtype):
            self._fresh.append(key)

    def get(self, key: int) -> Any:
        require(key < self.count, "a reference to what was not there")
        if key not in self._values:
            raise NotStreamableError(
                f"{self._stream.place} refers back to an object more than {_MEMO_BYTES >> 20} MiB behind", hint=WHOLE
            )
        value = self._values[key]
        size = sys.getsizeof(value)
        if size < _SMALL and self._kept_bytes < _KEPT_BYTES and key not in self._recurring:
            self._recurring.add(key)  # what is referred to once may be again
            self._kept_bytes += size
        return value

    def element_ended(self) -> None:
        """Account what the element left here to it, and let go of the oldest elements' beyond the bound."""
        size = self._stream.position - self._start
        self._start = self._stream.position
        self._recent.append((size, self._fresh))
        self._recent_bytes += size
        self._fresh = []
        while self._recent_bytes > _MEMO_BYTES:
            size, keys = self._recent.popleft()
            self._recent_bytes -= size
            for key in keys:
                if key not in self._recurring:
                    self._values.pop(key, None)
