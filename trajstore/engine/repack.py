"""Moving a packed field to plain storage, once, when a trajectory comes that the packing cannot hold."""

from __future__ import annotations

import numpy as np

from trajstore.engine.arraywriter import ArrayWriter
from trajstore.engine.gather import ArrayReader
from trajstore.format.encoding import decode_table
from trajstore.format.schema import Field


def unpack(old: ArrayWriter, new: ArrayWriter, spec: Field, end: int) -> None:
    """Copy the rows of ``spec`` below ``end`` from its packed array to a plain one.

    ``old`` must have been flushed. Chunks that ``new`` holds already are left as they are.
    """
    layout, storage = old.layout, old.storage
    table = decode_table(np.dtype(spec.dtype), spec.rule)
    numbers = sorted(n for n in map(layout.shard_number, storage.list(layout.path)) if n is not None)
    # What a file holds beyond its committed length is dead, and so are its copies; only missing chunks are told apart.
    reader = ArrayReader(storage, layout, end, lambda number: storage.size(layout.shard_key(number)))
    size = layout.chunk_rows
    for number in numbers:
        first = number * layout.shard_rows
        for chunk in range(first // size, -(-min(end, first + layout.shard_rows) // size)):
            held = old.held(chunk) if reader.has_chunk(chunk) else 0
            if held:
                new.encode(table[reader.read(chunk * size, chunk * size + held)], chunk * size)
