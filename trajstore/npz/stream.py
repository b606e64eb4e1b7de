"""The bytes of one pickle, taken in order from a stream of unknown goodwill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from trajstore.errors import CorruptionError, FormatError

_BLOCK = 1 << 20
_MAX_LINE = 1 << 10


class Stream:
    """Reads ahead in blocks.

    Parameters
    ----------
    read : gives up to n bytes, ``b""`` at the end.
    size : bytes that the container promises; nothing beyond is allocated on anyone's word.
    place : the file and member, for messages.
    """

    def __init__(self, read: Callable[[int], bytes], size: int, place: str) -> None:
        self._read = read
        self._size = size
        self.place = place
        self._buffer = b""
        self._at = 0
        self._before = 0  # bytes of the stream that lie before the buffer

    @property
    def position(self) -> int:
        """Bytes taken so far."""
        return self._before + self._at

    @property
    def ahead(self) -> int:
        """Bytes read and not taken."""
        return len(self._buffer) - self._at

    def byte(self) -> int:
        if self._at == len(self._buffer):
            self._refill()
        self._at += 1
        return self._buffer[self._at - 1]

    def take(self, n: int) -> bytes:
        """Exactly n bytes; memory is used only as they arrive."""
        end = self._at + n
        if end <= len(self._buffer):
            data = self._buffer[self._at : end]
            self._at = end
            return data
        if n > self._size - self.position:
            raise CorruptionError(f"{self.place} promises {n:,} bytes and ends before", hint=_HINT)
        pieces: list[memoryview] = []
        while n:
            if self._at == len(self._buffer):
                self._refill()
            pieces.append(memoryview(self._buffer)[self._at : self._at + n])
            self._at += len(pieces[-1])
            n -= len(pieces[-1])
        return b"".join(pieces)

    def line(self) -> str:
        """ASCII text up to a newline, which is taken too."""
        text = bytearray()
        while (byte := self.byte()) != 0x0A:
            text.append(byte)
            if len(text) > _MAX_LINE:
                raise FormatError(f"{self.place}: a name longer than {_MAX_LINE} characters")
        return text.decode("ascii", "replace")

    def run(self, opcode: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        """The values of as many records ``opcode, value`` as lie ahead in the buffer.

        Called with the first opcode already taken, so there is at least one.  Boxed floats
        come in millions; a step of the machine for each would take minutes where this takes
        a second.
        """
        self._at -= 1
        width = 1 + dtype.itemsize
        if len(self._buffer) - self._at < width:
            self._buffer = self._buffer[self._at :] + self._read(_BLOCK)
            self._before += self._at
            self._at = 0
        count = (len(self._buffer) - self._at) // width
        if not count:
            raise CorruptionError(f"{self.place} ends in the middle of a value", hint=_HINT)
        record = np.dtype([("opcode", "u1"), ("value", dtype)])
        records = np.frombuffer(self._buffer, record, count, self._at)
        other = np.flatnonzero(records["opcode"] != opcode)
        values = records["value"][: other[0] if len(other) else count]
        self._at += len(values) * width
        return values.astype(dtype.newbyteorder("="))

    def _refill(self) -> None:
        self._before += len(self._buffer)
        self._at = 0
        self._buffer = self._read(_BLOCK)
        if not self._buffer:
            raise CorruptionError(f"{self.place} ends in the middle of a value", hint=_HINT)


_HINT = "the file is incomplete or damaged: restore it from a copy, or write it again"
