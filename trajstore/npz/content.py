"""What one member of the archive holds: its bytes, inflated in order, some of them ahead in another thread.

zlib releases the interpreter lock, so that taking a pickle apart and inflating the rest of it go on together.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor

__all__ = ["Content"]

_FIRST = 1 << 16  # what a look at the header inflates
_BLOCK = 1 << 20
_READ = 1 << 18
_AHEAD = 3  # blocks
_LOCAL = struct.Struct("<4s22xHH")


class Content:
    """The bytes of a member, from its first to its last; reaching the end compares length and checksum.

    Parameters
    ----------
    file : a descriptor, read by position alone.
    info : of the member, from the archive's directory.
    pool : where blocks are inflated ahead; it must have one thread, so that they stay in order.

    Raises
    ------
    zipfile.BadZipFile, zlib.error : while reading, where the archive is cut off or damaged.
    """

    def __init__(self, file: int, info: zipfile.ZipInfo, pool: Executor) -> None:
        blocks = _blocks(file, info)
        self._blocks = _ahead(blocks, pool) if info.file_size > 2 * _BLOCK else blocks
        self._block = b""
        self._at = 0
        self.position = 0
        """Bytes read so far."""

    def read(self, n: int = _BLOCK) -> bytes:
        """Up to n bytes, as many as lie ready; ``b""`` at the end."""
        if self._at == len(self._block):
            self._block, self._at = next(self._blocks, b""), 0
        data = self._block if not self._at and n >= len(self._block) else self._block[self._at : self._at + n]
        self._at += len(data)
        self.position += len(data)
        return data

    def skip(self, n: int) -> None:
        """Pass over n bytes, or all that are left."""
        while n and (data := self.read(n)):
            n -= len(data)


def _ahead(blocks: Iterator[bytes], pool: Executor) -> Iterator[bytes]:
    """The same blocks; behind the first, each is made in the pool while those before it are used."""
    yield next(blocks, b"")
    pending = deque(pool.submit(next, blocks, b"") for _ in range(_AHEAD))
    while block := pending.popleft().result():
        pending.append(pool.submit(next, blocks, b""))
        yield block


def _blocks(file: int, info: zipfile.ZipInfo) -> Iterator[bytes]:
    raw = _inflated(_stored(file, info)) if info.compress_type == zipfile.ZIP_DEFLATED else _stored(file, info)
    crc = size = 0
    for block in raw:
        crc, size = zlib.crc32(block, crc), size + len(block)
        if size > info.file_size:
            break
        yield block
    if size != info.file_size:
        raise zipfile.BadZipFile(f"it holds {size:,} bytes or more, and {info.file_size:,} are promised")
    if crc != info.CRC:
        raise zipfile.BadZipFile("its checksum differs")


def _inflated(stored: Iterator[bytes]) -> Iterator[bytes]:
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    room = _FIRST
    for data in stored:
        while data and not stream.eof:
            if block := stream.decompress(data, room):
                yield block
                room = _BLOCK
            data = stream.unconsumed_tail
    while not stream.eof and (block := stream.decompress(b"", room)):  # what zlib still holds back
        yield block
    if not stream.eof:
        raise zipfile.BadZipFile("its data ends too early")


def _stored(file: int, info: zipfile.ZipInfo) -> Iterator[bytes]:
    """The member's data as it lies in the file."""
    head = os.pread(file, _LOCAL.size, info.header_offset)
    if len(head) < _LOCAL.size or not head.startswith(b"PK\x03\x04"):
        raise zipfile.BadZipFile("there is no member where the directory says")
    _, name, extra = _LOCAL.unpack(head)
    at = info.header_offset + _LOCAL.size + name + extra
    stop = at + info.compress_size
    size = _FIRST
    while at < stop:
        data = os.pread(file, min(size, stop - at), at)
        if not data:
            raise zipfile.BadZipFile("the file ends too early")
        at += len(data)
        yield data
        size = _READ
