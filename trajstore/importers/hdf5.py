"""The HDF5 file of ``exporters.hdf5`` into a store again: every chunk as it is, byte for byte."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from trajstore.__about__ import __version__
from trajstore.engine.gather import ArrayReader
from trajstore.engine.seals import SealWriter
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import AlreadyExistsError
from trajstore.format.layout import SEALS
from trajstore.format.manifest import Shard
from trajstore.media.hdf5storage import Hdf5Storage
from trajstore.media.shard import GrowingShard
from trajstore.media.storage import Storage
from trajstore.operations.assembly import Scaffold
from trajstore.operations.output import Exported, counted


def import_hdf5(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Make a store of an exported HDF5 file. It appears whole, by one rename, or not at all.

    Raises ``FormatError`` for a file that trajstore did not write, ``CorruptionError`` for a damaged one,
    ``AlreadyExistsError`` if something stands at ``destination``.
    """
    snapshot = Snapshot.of(Hdf5Storage(source))
    manifest = snapshot.manifest
    names = [*manifest.names, SEALS]
    scaffold = Scaffold(destination)
    with scaffold as session, ThreadPoolExecutor(4, thread_name_prefix="trajstore-disk") as disk:
        storage = session.storage
        seals = SealWriter(storage, session.uuid, disk, None)
        for number, path in enumerate(counted(manifest.arrays, progress, len(manifest.arrays))):
            _make_folder(storage, path)
            shards = _write(storage, snapshot.reader(path))
            seals.add((number, shard) for shard in shards)
            storage.sync_folder(path)
        parents = {"/".join(path.split("/")[:depth]) for path in names for depth in range(path.count("/") + 1)}
        for folder in sorted(parents, reverse=True):
            storage.sync_folder(folder)
        session.publish(
            replace(
                manifest,
                commit=replace(
                    manifest.commit,
                    number=session.next_number(),
                    uuid=uuid.uuid4().hex,
                    parent="",
                    session=session.uuid,
                    time=session.clock(),
                    software=f"trajstore {__version__}",
                ),
                arrays={**manifest.arrays, SEALS: (seals.layout, seals.rows)},
                names=tuple(names),
                tails={},
                seals=seals.shards,
            )
        )
        session.write_children()
        scaffold.publish()
    return Exported(manifest.counts["trajectories"], manifest.counts["steps"])


def _make_folder(storage: Storage, path: str) -> None:
    try:
        storage.make_folder(path)
    except AlreadyExistsError:
        pass


def _write(storage: Storage, reader: ArrayReader) -> list[Shard]:
    """Every shard of an array, its frames in the order of their chunks."""
    layout = reader.layout
    written = []
    for number in range(-(-reader.rows // layout.shard_rows)) if layout.row_bytes else ():
        first = number * layout.chunks_per_shard
        last = min(first + layout.chunks_per_shard, -(-reader.rows // layout.chunk_rows))
        chunks = np.array([chunk for chunk in range(first, last) if reader.has_chunk(chunk)], np.int64)
        if not len(chunks):
            continue
        shard = GrowingShard(layout, number)
        for chunk, frame in reader.frames(chunks):
            shard.put(chunk - first, frame, layout.chunk_rows)
        pieces, taken = shard.next_version()
        storage.write(layout.shard_key(number), pieces)
        shard.advance(pieces, taken)
        written.append(Shard(number, shard.length, shard.crc))
    return written
