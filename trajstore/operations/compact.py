"""Compact: a store written anew, without gaps and deleted trajectories, in large shards for cold data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from trajstore.dataset import Dataset
from trajstore.errors import SchemaError
from trajstore.format.encoding import field_layout
from trajstore.format.layout import ArrayLayout, Codec
from trajstore.format.schema import Field
from trajstore.operations.assembly import Destination, Report, located, refuse_existing
from trajstore.operations.merge import Blueprint, Source, blueprint, gather_sources

#: Of cold data: whoever reads it reads much of it, and Zstd finds more in more rows.
CHUNK_BYTES, SHARD_BYTES = 256 << 10, 32 << 20
_SHARD_CHUNKS = 1 << 16  # a shard ends with 16 bytes for each


def compact(
    source: Source | Sequence[Source],
    destination: Destination,
    *,
    codec: str | Codec = "small",
    chunk_bytes: int = CHUNK_BYTES,
    shard_bytes: int = SHARD_BYTES,
    client: Any = None,
    report: Report | None = None,
) -> Dataset:
    """Write a store anew: rows without gaps, in the order of its trajectories, which keep their ids.

    Parameters
    ----------
    source : what ``merge`` takes; of several stores, ids are numbered anew.
    destination : where the new store will stand; there must be nothing yet. The source is not touched.
    codec : a profile's name, or a ``Codec``. ``recompress`` is this argument alone.
    chunk_bytes, shard_bytes : raw bytes of a chunk and of a shard, at most; ``rechunk`` is these alone.
    client, report : see ``merge``.

    Raises
    ------
    AlreadyExistsError
        There is something at the destination.

    Notes
    -----
    Deleted trajectories are gone in the new store. Chunk shapes depend on dtype, row shape and these arguments, so
    compacted stores are merged by linking their files, as live ones are.
    """
    refuse_existing(*located(destination))
    planned = plan_compact(source, codec=codec, chunk_bytes=chunk_bytes, shard_bytes=shard_bytes)
    return planned.write(destination, client=client, report=report)


def plan_compact(
    source: Source | Sequence[Source],
    *,
    codec: str | Codec = "small",
    chunk_bytes: int = CHUNK_BYTES,
    shard_bytes: int = SHARD_BYTES,
) -> Blueprint:
    """What :func:`compact` would write; nothing is written."""
    if not 0 < chunk_bytes <= shard_bytes:
        raise SchemaError(f"chunks of {chunk_bytes} bytes in shards of {shard_bytes}")
    if shard_bytes // chunk_bytes > _SHARD_CHUNKS:
        raise SchemaError(
            f"shards of {shard_bytes} bytes hold more than {_SHARD_CHUNKS} chunks of {chunk_bytes}",
            hint="make shards smaller, or chunks larger",
        )
    dataset = gather_sources(source)
    single = len(dataset.snapshots) == 1
    layouts = partial(cold_layout, chunk_bytes=chunk_bytes, shard_bytes=shard_bytes)
    return blueprint(dataset, keep_ids=single, provenance=not single, rewrite=True, codec=codec, layouts=layouts)


def cold_layout(spec: Field, codec: Codec, *, chunk_bytes: int, shard_bytes: int) -> ArrayLayout:
    """A field's layout with as many rows in chunks and shards as these bytes hold, powers of two."""
    row = max(spec.stored.itemsize * math.prod(spec.shape), 1)
    chunk = 1 << max((chunk_bytes // row).bit_length() - 1, 0)
    shard = 1 << max((shard_bytes // row).bit_length() - 1, 0)
    return field_layout(spec, codec, (chunk, max(shard, chunk)))
