"""The bytes of one shard: frames, their index, and a shard that grows.

A shard file is frames in any order, garbage between them, and an index of
(offset, length) pairs with its crc32c at the end: Zarr's ``sharding_indexed``
with ``index_location: end``. Every version of a file begins with the bytes of
the version before, its index included, so whoever still holds an older index
goes on reading what it names.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numcodecs import blosc

from trajstore.errors import CorruptionError
from trajstore.format.checksum import crc32, crc32c
from trajstore.format.layout import CRC, FRAME_HEADER, MISSING, ArrayLayout, Codec

# One thread for each call: chunks are encoded side by side by the engine's own threads.
blosc.use_threads = False

# A Blosc header: version, compressor's version, flags and type size; nbytes, blocksize, cbytes; and, of most frames,
# where their first block begins.
_HEADER = struct.Struct("<4siiii")
_SIZES = struct.Struct("<iii")
_FIRST_BLOCK = FRAME_HEADER + 4  # of a frame with one block
_COPIED = 2  # flag of a frame that holds the bytes as they were, and no blocks
_CRC = struct.Struct("<I")
_RESIDUE = 0x48674BC7  # CRC-32C of whatever ends with its own CRC-32C

Frame = Any  # bytes, or uint8 (n,)


def encode_frame(chunk: np.ndarray[Any, Any], codec: Codec) -> bytes:
    """Compress one whole chunk (C-contiguous) and append its crc32c."""
    frame = _compress(chunk, codec)
    return frame + _CRC.pack(crc32c(frame))


def encode_frames(chunks: np.ndarray[Any, Any], count: int, codec: Codec) -> list[bytes]:
    """The frames of ``count`` whole chunks that lie end to end (C-contiguous), as ``encode_frame`` makes them."""
    size, rows = chunks.nbytes // count, len(chunks) // count
    # Blosc takes any size of block in Zstd; in LZ4 it wants 64 KiB and more.
    together = count > 1 and codec.blocksize == size and codec.cname == "zstd"
    frames = _parted(_compress(chunks, codec), count, size) if together else []
    return frames or [encode_frame(chunks[at : at + rows], codec) for at in range(0, len(chunks), rows)]


def _parted(frame: bytes, count: int, size: int) -> list[bytes]:
    """A frame of ``count`` blocks as so many frames of one block each: the reverse of ``_joined``. None of one without.

    Here too it is the interpreter's lock that is let go once for many chunks.
    """
    encoding, _, blocksize, end, _ = _HEADER.unpack_from(frame)
    if blocksize != size or encoding[2] & _COPIED:
        return []
    starts = [*np.frombuffer(frame, "<i4", count, FRAME_HEADER).tolist(), end]
    if starts != sorted(starts):  # somebody has let Blosc work in threads, which lay blocks down as they are done
        return []
    parts = []
    for start, stop in pairwise(starts):
        part = _HEADER.pack(encoding, size, size, _FIRST_BLOCK + stop - start, _FIRST_BLOCK) + frame[start:stop]
        parts.append(part + _CRC.pack(crc32c(part)))
    return parts


def _compress(chunks: np.ndarray[Any, Any], codec: Codec) -> bytes:
    if chunks.dtype.kind in "bc":  # the codec takes its type size from the buffer, and some of its buffers know neither
        chunks = chunks.view(f"V{chunks.itemsize}") if chunks.dtype.kind == "c" else chunks.view(np.uint8)
    frame: bytes = blosc.compress(chunks, codec.cname.encode(), codec.clevel, codec.shuffle_code, codec.blocksize)
    return frame


def check_frame(frame: Frame, chunk_bytes: int) -> bytes | None:
    """Check the crc32c and the lengths of one frame of a chunk of ``chunk_bytes``.

    Returns
    -------
    bytes or None
        How the frame is encoded, if it is one block: frames of one encoding can be decoded together.

    Raises
    ------
    CorruptionError
        Without a place: the caller knows it. The decoder is not safe on forged input, so this comes before it.
    """
    end = len(frame) - CRC
    if end < FRAME_HEADER:
        raise CorruptionError("a chunk is shorter than its own header")
    if crc32c(frame) != _RESIDUE:
        raise CorruptionError("a chunk does not match its crc32c")
    encoding, nbytes, blocksize, cbytes, first = _HEADER.unpack_from(frame)
    if nbytes != chunk_bytes or cbytes != end:
        raise CorruptionError(f"a chunk claims {nbytes} bytes in {cbytes}, expected {chunk_bytes} in {end}")
    one = blocksize == nbytes and first == _FIRST_BLOCK and not encoding[2] & _COPIED
    return encoding if one else None


def decode_frame(frame: Frame, out: np.ndarray[Any, Any]) -> None:
    """Check one frame (bytes, or uint8 (n,)) and decompress it into ``out``, a C-contiguous array of a whole chunk.

    Raises ``CorruptionError`` (without a place: the caller knows it).
    """
    check_frame(frame, out.nbytes)
    _decompress(frame[:-CRC], out)


def decode_frames(frames: Sequence[Frame], out: np.ndarray[Any, Any]) -> None:
    """Check the frames of chunks of one size and decompress them, one behind the other, into ``out``, uint8 (n,).

    Raises ``CorruptionError`` (without a place: ``decode_frame`` on each frame tells it).
    """
    size = out.nbytes // len(frames)
    encodings = {check_frame(frame, size) for frame in frames}
    encoding = encodings.pop()
    if encoding is None or encodings:
        for number, frame in enumerate(frames):
            _decompress(frame[:-CRC], out[number * size : (number + 1) * size])
    else:
        _decompress(_joined(frames, encoding, size), out)


def _joined(frames: Sequence[Frame], encoding: bytes, size: int) -> Frame:
    """Frames of one block each, of ``size`` bytes decoded, as one frame of as many blocks.

    The decoder lets go of the interpreter's lock once for all of them: taking it back would cost two threads that
    decode beside each other more than a small chunk does. A frame's table says where each block begins, so what is
    left of the single frames stays where it is, between the blocks.
    """
    if len(frames) == 1:
        return frames[0][:-CRC]
    starts = list(accumulate(map(len, frames), initial=FRAME_HEADER + 4 * len(frames)))
    table = np.array(starts[:-1], "<i4") + _FIRST_BLOCK
    return b"".join((encoding, _SIZES.pack(size * len(frames), size, starts[-1]), table.tobytes(), *frames))


def _decompress(frame: Frame, out: np.ndarray[Any, Any]) -> None:
    try:
        blosc.decompress(frame, out)
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
