"""One shard file, whole: rows in, a durable file under its final name out. Nothing is shared between two calls."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

import numpy as np

from trajstore.errors import AlreadyExistsError, CorruptionError, NotFoundError, StorageError
from trajstore.format.checksum import crc32
from trajstore.format.layout import ArrayLayout, temporary
from trajstore.format.manifest import Shard
from trajstore.media.shard import GrowingShard, encode_frame
from trajstore.media.storage import Storage

Rows = np.ndarray[Any, Any]


def write_shard(
    storage: Storage, layout: ArrayLayout, number: int, chunks: Iterable[tuple[int, Rows | bytes]]
) -> Shard:
    """Write shard ``number`` of an array that nobody else appends to.

    Parameters
    ----------
    chunks : (chunk within the shard, rows (n, *row_shape) from its first row on), or the frame of a whole chunk; fewer
        rows than the chunk has are filled up. A chunk that is not given is not stored.

    Returns
    -------
    Shard
        What the manifest, or a seal, says of it. The name is durable once the array's folder is synced.

    Notes
    -----
    Idempotent: of two callers with the same rows one makes the file, exclusively, and the other reports what is there.
    So a task may run twice, also at once, and a late one changes nothing.
    """
    shard = GrowingShard(layout, number)
    for chunk, rows in chunks:
        if isinstance(rows, bytes):
            shard.put(chunk, rows, layout.chunk_rows)
        else:
            shard.put(chunk, encode_frame(_whole(rows, layout), layout.codec), len(rows))
    pieces, taken = shard.next_version()
    key, name = layout.shard_key(number), temporary(layout.path, uuid.uuid4().hex)
    storage.write(name, pieces)
    try:
        storage.link(name, key)
    except AlreadyExistsError:
        data = storage.read(key)
        return Shard(number, len(data), crc32(data))
    finally:
        storage.remove(name)
    shard.advance(pieces, taken)
    return Shard(number, shard.length, shard.crc)


def _whole(rows: Rows, layout: ArrayLayout) -> Rows:
    if len(rows) == layout.chunk_rows and rows.dtype == layout.dtype:
        return np.ascontiguousarray(rows)
    chunk = np.full((layout.chunk_rows, *layout.row_shape), layout.fill, layout.dtype)
    chunk[: len(rows)] = rows
    return chunk


def bring_shard(
    storage: Storage, layout: ArrayLayout, number: int, origin: tuple[Storage, str], shard: Shard, *, link: bool = True
) -> tuple[Shard, bool]:
    """Make a shard of another store this store's shard ``number``, as its commit knows it.

    ``origin`` is the other storage and the key there. A file that has grown since that commit is copied up to its
    committed length: what came later is not this commit's, and plain Zarr readers find the index at a file's end.

    Returns
    -------
    Shard, bool
        What the manifest says of it here, and whether the two stores now share one file.

    Raises
    ------
    CorruptionError
        The file is missing or shorter than it was committed.
    """
    other, source = origin
    key = layout.shard_key(number)
    here = Shard(number, shard.length, shard.crc32)
    if link:
        try:
            storage.link_from(other, source, key)
        except (StorageError, NotFoundError):
            pass  # another disk, no links, too many of them: copy
        else:
            # The name is looked at here: there, a living writer may have replaced it since. A file never changes.
            if storage.size(key) == shard.length:
                return here, True
            storage.remove(key)
    present = other.size(source)
    if present is None or present < shard.length:
        state = "is missing" if present is None else f"has {present} bytes, {shard.length} were committed"
        raise CorruptionError(
            f"{other.describe(source)} {state}", hint="see `trajstore verify`; restore the file, or leave its rows out"
        )
    storage.copy_from(other, source, shard.length, key)
    return here, False
