"""The spill log: rows of unfinished episodes that memory has no room for, one file a block, each told by its header.

A file is an eight-byte mark, the length and the crc32c of a JSON header, the
header, and Blosc frames with their crc32c. It is never synced and never part
of the dataset: its writer removes it, or whoever opens the store next.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from trajstore.errors import AlreadyExistsError, StorageError
from trajstore.format.checksum import crc32c
from trajstore.format.layout import SCRATCH, Codec
from trajstore.media.shard import decode_frame, encode_frame
from trajstore.media.storage import Storage

Array = np.ndarray[Any, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]

_MARK = b"TJSPILL1"
_HEAD = struct.Struct("<8sII")
_FRAME_BYTES = 64 << 10
_CODEC = Codec("lz4", 1)


class SpillLog:
    """Writes blocks of rows to a store's scratch folder and reads single rows back.

    Parameters
    ----------
    session : unique to the writer session; file names begin with it.

    Attributes
    ----------
    written_bytes, read_bytes : what went to and came from the disk.
    """

    def __init__(self, storage: Storage, session: str) -> None:
        self.written_bytes = 0
        self.read_bytes = 0
        self._storage = storage
        self._session = session
        self._numbers = itertools.count()
        self._keys: set[str] = set()

    def write(self, fields: Mapping[str, Array], about: Mapping[str, Any]) -> Spilled:
        """Write a block; ``about`` (what JSON holds) says in its header whose rows they are."""
        try:
            self._storage.make_folder(SCRATCH)
        except AlreadyExistsError:
            pass
        frames: list[bytes] = []
        described, places, at = {}, {}, 0
        for path, rows in fields.items():
            per_frame = max(_FRAME_BYTES // max(rows.itemsize * int(np.prod(rows.shape[1:])), 1), 1)
            encoded = [
                encode_frame(np.ascontiguousarray(rows[i : i + per_frame]), _CODEC)
                for i in range(0, len(rows), per_frame)
            ]
            offsets = at + np.cumsum([0, *map(len, encoded)])
            at = int(offsets[-1])
            frames += encoded
            described[path] = {
                "dtype": rows.dtype.str,
                "shape": list(rows.shape),
                "rows_per_frame": per_frame,
                "offsets": offsets.tolist(),
            }
            places[path] = (rows.dtype, rows.shape, per_frame, offsets)
        header = json.dumps({"session": self._session, **about, "fields": described}).encode()
        key = f"{SCRATCH}/{self._session}.{next(self._numbers)}"
        self._keys.add(key)
        self._storage.write(key, [_HEAD.pack(_MARK, len(header), crc32c(header)), header, *frames], sync=False)
        self.written_bytes += _HEAD.size + len(header) + at
        return Spilled(self, key, _HEAD.size + len(header), places)

    def read(self, key: str, start: int, stop: int) -> bytes:
        self.read_bytes += stop - start
        return self._storage.read(key, start, stop)

    def remove(self, key: str) -> None:
        """Remove a block's file; one that cannot be removed is left for whoever opens the store next."""
        self._keys.discard(key)
        try:
            self._storage.remove(key)
        except StorageError:
            pass

    def close(self) -> None:
        for key in list(self._keys):
            self.remove(key)


class Spilled:
    """A block on disk; ``places`` as ``write`` made them: dtype, shape, rows in a frame and frame offsets by field."""

    def __init__(
        self, log: SpillLog, key: str, base: int, places: Mapping[str, tuple[np.dtype[Any], tuple[int, ...], int, Any]]
    ) -> None:
        self._log = log
        self._key = key
        self._base = base
        self._places = places

    def kinds(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and row shape of each field."""
        return {path: (dtype, shape[1:]) for path, (dtype, shape, _, _) in self._places.items()}

    def take(self, path: str, rows: Ints) -> Array:
        """Rows of a field by number: (n, *shape). Raises ``CorruptionError`` for a frame that is damaged."""
        dtype, shape, per_frame, offsets = self._places[path]
        out = np.empty((len(rows), *shape[1:]), dtype)
        frames = rows // per_frame
        for frame in np.unique(frames).tolist():
            held = min(per_frame, shape[0] - frame * per_frame)
            block = np.empty((held, *shape[1:]), dtype)
            if block.nbytes:
                start, stop = self._base + int(offsets[frame]), self._base + int(offsets[frame + 1])
                decode_frame(self._log.read(self._key, start, stop), block)
            mine = frames == frame
            out[mine] = block[rows[mine] - frame * per_frame]
        return out

    def remove(self) -> None:
        self._log.remove(self._key)
