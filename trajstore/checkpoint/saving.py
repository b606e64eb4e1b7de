"""Writing one checkpoint from an arena: chunks, metadata, record; then its name."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

import numpy as np

from trajstore.checkpoint.arena import Arena, Plan
from trajstore.checkpoint.chunks import Pool, write_chunk
from trajstore.checkpoint.record import CHUNK_BYTES, STRUCTURE, Chunk, FlatArray, Record, compact, to_bytes
from trajstore.checkpoint.tree import Extent
from trajstore.errors import StorageError
from trajstore.format import typedjson
from trajstore.format.layout import PRIVATE, ROOT, metadata_key, temporary
from trajstore.media.storage import Storage

Before = tuple[str, Record]
"""The folder and record of the checkpoint whose unchanged chunks are linked."""


def structure_bytes(state: Any, rng: Any, extents: list[Extent], layout: Plan) -> bytes:
    """The document of the structure array: the nodes, and where each extent lies."""
    places = [
        [layout.arrays[number].name if number >= 0 else "", offset, extent.size if number >= 0 else 0, extent.start]
        for extent, (number, offset) in zip(extents, layout.places)
    ]
    return typedjson.dumps({"state": state, "rng": rng, "extents": places})


def write_checkpoint(
    storage: Storage, name: str, record: Record, structure: bytes, layout: Plan, arena: Arena, pool: Pool,
    before: Before | None,
    scratch: str = PRIVATE,
) -> tuple[Record, int]:  # fmt: skip
    """Write a checkpoint in the folder ``scratch`` and publish it as ``name``; returns its record and the bytes linked.

    Raises ``StorageError``; then nothing of it is left.
    """
    temp = temporary(scratch, uuid.uuid4().hex[:12])
    try:
        document = np.frombuffer(structure, np.uint8)
        chunk = min(CHUNK_BYTES, len(document))
        arrays = [*layout.arrays, FlatArray(STRUCTURE, STRUCTURE, "uint8", "uint8", len(document), chunk)]
        sources = [arena.view(start, start + array.nbytes) for array, start in zip(layout.arrays, layout.starts)]
        calls = []
        storage.make_folder(temp)
        for array, data in zip(arrays, [*sources, document]):
            storage.make_folder(f"{temp}/{array.name}")
            step = array.chunk * array.itemsize
            for number in range(array.count):
                piece = data[number * step : (number + 1) * step]
                calls.append((storage, temp, array, number, piece, _before(before, array, number)))
        written = iter(pool.map(write_chunk, calls))
        linked, done = 0, []
        for array in arrays:
            chunks = []
            for _ in range(array.count):
                chunk_record, is_link = next(written)
                chunks.append(chunk_record)
                linked += chunk_record.length * is_link
            done.append(array.with_chunks(chunks))
        record = replace(record, arrays=tuple(done))
        finish_folder(storage, temp, record, pool)
        publish(storage, temp, name)
    except BaseException:
        _remove_quietly(storage, temp)
        raise
    return record, linked


def strip_checkpoint(
    storage: Storage, name: str, target: str, record: Record, sections: frozenset[str], pool: Pool
) -> Record:
    """Publish as ``target`` what a checkpoint holds of ``sections``; its chunks are links."""
    temp = temporary(PRIVATE, uuid.uuid4().hex[:12])
    kept = tuple(array for array in record.arrays if array.name == STRUCTURE or array.section in sections)
    dropped = tuple(section for section in record.sections if section not in sections)
    record = replace(record, arrays=kept, stripped=dropped)
    try:
        storage.make_folder(temp)
        for array in kept:
            storage.make_folder(f"{temp}/{array.name}")
            for number in range(array.count):
                key = f"{array.name}/c.{number}"
                try:
                    storage.link(f"{name}/{key}", f"{temp}/{key}")
                except StorageError:
                    storage.write(f"{temp}/{key}", [storage.read(f"{name}/{key}")])
        finish_folder(storage, temp, record, pool)
        publish(storage, temp, target)
    except BaseException:
        _remove_quietly(storage, temp)
        raise
    return record


def _before(before: Before | None, array: FlatArray, number: int) -> tuple[str, Chunk] | None:
    if before is None:
        return None
    folder, record = before
    same = record.array(array.name)
    if same is None or same.stored != array.stored or same.chunk != array.chunk or number >= same.count:
        return None
    return (folder, same.chunks[number]) if same.chunk_size(number) == array.chunk_size(number) else None


def finish_folder(storage: Storage, temp: str, record: Record, pool: Pool) -> None:
    """The metadata of the arrays, the record, and every name in the folder durable."""

    def metadata(array: FlatArray) -> None:
        storage.write(metadata_key(f"{temp}/{array.name}"), [compact(array.metadata())])
        storage.sync_folder(f"{temp}/{array.name}")

    pool.map(metadata, [(array,) for array in record.arrays])
    storage.write(f"{temp}/{ROOT}", [to_bytes(record)])
    storage.sync_folder(temp)


def publish(storage: Storage, temp: str, name: str) -> None:
    """Give a finished folder its name: the commit."""
    storage.rename(temp, name)
    storage.sync_folder("")


def _remove_quietly(storage: Storage, key: str) -> None:
    try:
        storage.remove(key)
    except StorageError:
        pass  # the next session's first act is to empty the scratch folder
