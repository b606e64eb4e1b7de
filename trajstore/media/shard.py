"""The bytes of one shard: frames, their index, and a shard that grows.

A shard file is frames in any order, garbage between them, and an index of
(offset, length) pairs with its crc32c at the end: Zarr's ``sharding_indexed``
with ``index_location: end``. Every version of a file begins with the bytes of
the version before, its index included, so whoever still holds an older index
goes on reading what it names.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numcodecs import blosc

from trajstore.errors import CorruptionError
from trajstore.format.checksum import crc32, crc32c
from trajstore.format.layout import CRC, FRAME_HEADER, MISSING, ArrayLayout, Codec

# One thread for each call: chunks are encoded side by side by the engine's own threads.
blosc.use_threads = False

_LENGTHS = struct.Struct("<4xi4xi")  # nbytes and cbytes of a Blosc header
_CRC = struct.Struct("<I")

Frame = Any  # bytes, or uint8 (n,)


def encode_frame(chunk: np.ndarray[Any, Any], codec: Codec) -> bytes:
    """Compress one whole chunk (C-contiguous) and append its crc32c."""
    if chunk.dtype.kind in "bc":  # the codec takes its type size from the buffer, and some of its buffers know neither
        chunk = chunk.view(f"V{chunk.itemsize}") if chunk.dtype.kind == "c" else chunk.view(np.uint8)
    frame: bytes = blosc.compress(chunk, codec.cname.encode(), codec.clevel, codec.shuffle_code, codec.blocksize)
    return frame + _CRC.pack(crc32c(frame))


def check_frame(frame: Frame, chunk_bytes: int) -> Frame:
    """Check the crc32c and the lengths of one frame of a chunk of ``chunk_bytes``; the frame without its crc32c.

    The decoder is not safe on forged input, so this comes before it.
    Raises ``CorruptionError`` (without a place: the caller knows it).
    """
    end = len(frame) - CRC
    if end < FRAME_HEADER:
        raise CorruptionError("a chunk is shorter than its own header")
    body = frame[:end]
    if _CRC.unpack_from(frame, end)[0] != crc32c(body):
        raise CorruptionError("a chunk does not match its crc32c")
    nbytes, cbytes = _LENGTHS.unpack_from(body)
    if nbytes != chunk_bytes or cbytes != end:
        raise CorruptionError(f"a chunk claims {nbytes} bytes in {cbytes}, expected {chunk_bytes} in {end}")
    return body


def decode_frame(frame: Frame, out: np.ndarray[Any, Any]) -> None:
    """Check one frame (bytes, or uint8 (n,)) and decompress it into ``out``, a C-contiguous array of a whole chunk.

    Raises ``CorruptionError`` (without a place: the caller knows it).
    """
    body = check_frame(frame, out.nbytes)
    try:
        blosc.decompress(body, out)
    except (RuntimeError, ValueError) as error:
        raise CorruptionError("a chunk cannot be decompressed") from error


def parse_index(data: bytes, layout: ArrayLayout, length: int) -> np.ndarray[Any, Any]:
    """The index that ends a shard version of ``length`` bytes: int64 (chunks, 2), offset and length, -1 where absent.

    Raises ``CorruptionError`` for a wrong checksum and for any frame that lies outside the file.
    """
    if len(data) != layout.index_bytes or length < layout.index_bytes:
        raise CorruptionError("a shard is shorter than its index")
    if _CRC.unpack(data[-CRC:])[0] != crc32c(data[:-CRC]):
        raise CorruptionError("a shard's index does not match its crc32c")
    raw = np.frombuffer(data, "<u8", count=2 * layout.chunks_per_shard).reshape(-1, 2)
    missing = (raw == MISSING).all(axis=1)
    index = raw.astype(np.int64)
    limit = length - layout.index_bytes
    outside = (index < 0).any(axis=1) | (index[:, 0] > limit - index[:, 1])
    if (outside & ~missing).any():
        raise CorruptionError("a shard's index names bytes outside the shard")
    index[missing] = -1
    return index


class GrowingShard:
    """A shard that grows: what its file holds so far, and frames that wait to be added.

    Notes
    -----
    Not locked: its owner sees to that.
    """

    def __init__(self, layout: ArrayLayout, number: int) -> None:
        self.layout = layout
        self.number = number
        self.length = 0  # of the file; 0: no file yet
        self.crc = 0  # CRC-32 of the file so far
        self.garbage = 0
        self._entries = np.full((layout.chunks_per_shard, 2), MISSING, np.uint64)
        self._pending: dict[int, bytes] = {}
        self._rows: dict[int, int] = {}
        self._whole = 0

    def put(self, chunk: int, frame: bytes, rows: int) -> bool:
        """Add a chunk's frame that holds ``rows`` rows; one that holds no more than what is there is ignored."""
        if rows <= self._rows.get(chunk, 0):
            return False
        self._pending[chunk] = frame
        self._rows[chunk] = rows
        self._whole += rows == self.layout.chunk_rows
        return True

    def held(self, chunk: int) -> int:
        """Rows of a chunk that are here."""
        return self._rows.get(chunk, 0)

    @property
    def waiting(self) -> bool:
        """Whether frames are not in the file yet."""
        return bool(self._pending)

    @property
    def full(self) -> bool:
        """Whether every chunk has all its rows."""
        return self._whole == self.layout.chunks_per_shard

    def next_version(self) -> tuple[list[bytes], dict[int, bytes]]:
        """The bytes that follow the present file in its next version, and the frames among them."""
        taken = dict(self._pending)
        return [*taken.values(), self._index(taken)], taken

    def _index(self, taken: dict[int, bytes]) -> bytes:
        entries = self._entries.copy()
        at = self.length
        for chunk, frame in taken.items():
            entries[chunk] = at, len(frame)
            at += len(frame)
        body = entries.astype("<u8", copy=False).tobytes()
        return body + _CRC.pack(crc32c(body))

    def advance(self, pieces: list[bytes], taken: dict[int, bytes]) -> None:
        """The version that ``next_version`` gave is now the file."""
        if self.length:
            self.garbage += self.layout.index_bytes
        for chunk, frame in taken.items():
            if self._entries[chunk, 0] != MISSING:
                self.garbage += int(self._entries[chunk, 1])
            self._entries[chunk] = self.length, len(frame)
            self.length += len(frame)
            self.crc = crc32(frame, self.crc)
            if self._pending.get(chunk) is frame:
                del self._pending[chunk]
        self.length += len(pieces[-1])
        self.crc = crc32(pieces[-1], self.crc)
