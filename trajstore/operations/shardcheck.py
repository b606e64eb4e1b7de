"""One shard file against what its commit says of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from trajstore.errors import CorruptionError, NotFoundError, StorageError
from trajstore.format.checksum import crc32
from trajstore.format.layout import ArrayLayout
from trajstore.format.manifest import Manifest, Shard
from trajstore.media.hdf5storage import Hdf5Storage
from trajstore.media.shard import check_frame, decode_frame, parse_index
from trajstore.media.storage import Storage

_BLOCK = 4 << 20


@dataclass(frozen=True)
class Fault:
    """Rows of an array, half-open, that a shard does not hold as committed.

    sure : False where it is damage only if a trajectory names some of these rows (a chunk that is not there).
    """

    kind: str
    start: int
    stop: int
    message: str
    file: str
    sure: bool = True


@dataclass(frozen=True)
class Checked:
    """What was found in one shard: chunks, the bytes of their frames, and what is wrong."""

    chunks: int
    bytes: int
    faults: list[Fault]


def shards_in_hdf5(storage: Hdf5Storage, manifest: Manifest) -> Iterator[tuple[ArrayLayout, Shard]]:
    """The shards of a sealed HDF5 file, which names none of them."""
    for layout, rows in manifest.arrays.values():
        for number in range(-(-rows // layout.shard_rows)):
            length = storage.size(layout.shard_key(number))
            if length is not None:
                yield layout, Shard(number, length, 0)


def check_shard(storage: Storage, layout: ArrayLayout, shard: Shard, *, deep: bool = False) -> Checked:
    """Look for what is wrong with a shard file.

    Checks presence, length, crc32 of the committed prefix, the index, and crc32c and lengths of every frame; with
    ``deep`` decodes each. Holds a few MiB and one chunk in memory. Raises nothing for damage.
    """
    key = layout.shard_key(shard.number)
    first, stop = shard.number * layout.shard_rows, (shard.number + 1) * layout.shard_rows
    size = storage.size(key)
    if size is None:
        return Checked(0, 0, [Fault("missing", first, stop, "the file is missing", key)])
    if size < shard.length or shard.length < layout.index_bytes:
        message = f"{size} bytes, {shard.length} were committed: cut short, or an older version put back"
        return Checked(0, 0, [Fault("short", first, stop, message, key)])
    try:
        # A shard of an HDF5 file is no run of bytes; the file has checksums of its chunks, and no other.
        whole = isinstance(storage, Hdf5Storage) or _prefix_crc(storage, key, shard.length) == shard.crc32
        index = parse_index(storage.read(key, shard.length - layout.index_bytes, shard.length), layout, shard.length)
        faults = _bad_frames(storage, layout, key, index, first, deep)
    except CorruptionError as error:
        return Checked(0, 0, [Fault("index", first, stop, error.message, key)])
    except (StorageError, NotFoundError) as error:
        return Checked(0, 0, [Fault("unreadable", first, stop, error.message, key)])
    if not whole and not faults:
        message = "bytes that no chunk uses have changed: the file does not match its crc32, and every chunk is whole"
        faults.append(Fault("checksum", first, first, message, key))
    held = index[:, 0] >= 0
    for run_start, run_stop in _runs(~held):
        start = first + run_start * layout.chunk_rows
        faults.append(
            Fault("lost", start, first + run_stop * layout.chunk_rows, "no chunk holds these rows", key, sure=False)
        )
    return Checked(int(held.sum()), int(index[held, 1].sum()), faults)


def _prefix_crc(storage: Storage, key: str, length: int) -> int:
    crc = 0
    for start in range(0, length, _BLOCK):
        crc = crc32(storage.read(key, start, min(start + _BLOCK, length)), crc)
    return crc


def _bad_frames(
    storage: Storage, layout: ArrayLayout, key: str, index: np.ndarray[Any, Any], first: int, deep: bool
) -> list[Fault]:
    scratch = np.empty(layout.chunk_bytes, np.uint8) if deep else None
    faults = []
    for chunk, frame in _frames(storage, key, index):
        try:
            if scratch is None:
                check_frame(frame, layout.chunk_bytes)
            else:
                decode_frame(frame, scratch)
        except CorruptionError as error:
            start = first + chunk * layout.chunk_rows
            faults.append(Fault("chunk", start, start + layout.chunk_rows, error.message, key))
    return faults


def _frames(storage: Storage, key: str, index: np.ndarray[Any, Any]) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """Every frame that an index names, in the order of the file, a few MiB at a time."""
    held = np.flatnonzero(index[:, 0] >= 0)
    order = held[np.argsort(index[held, 0], kind="stable")].tolist()
    at = 0
    while at < len(order):
        start = int(index[order[at], 0])
        stop, end = start + int(index[order[at], 1]), at + 1
        while end < len(order) and int(index[order[end]].sum()) - start <= _BLOCK:
            stop = max(stop, int(index[order[end]].sum()))
            end += 1
        data = np.frombuffer(storage.read(key, start, stop), np.uint8)
        for chunk in order[at:end]:
            offset, size = index[chunk].tolist()
            yield chunk, data[offset - start : offset - start + size]
        at = end


def _runs(mask: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """Start and stop of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
