"""Reading one checkpoint: all of it, or only the chunks that some of its tensors need."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from trajstore.checkpoint.chunks import Pool, read_chunk_into
from trajstore.checkpoint.record import STRUCTURE, FlatArray, Record, compact, to_bytes
from trajstore.checkpoint.tensors import Bytes
from trajstore.checkpoint.tree import Unflattening, child, extents_of
from trajstore.errors import CorruptionError, FormatError, NotFoundError
from trajstore.format import typedjson
from trajstore.format.layout import ROOT, metadata_key
from trajstore.media.storage import Storage

Place = tuple[str, int, int, int]
"""Where an extent lies: array, byte offset in it, bytes, and where its storage's offsets count from."""


class Reader:
    """One checkpoint, opened: its structure is read, its arrays when something in them is asked for.

    Parameters
    ----------
    storage : the checkpoint's folder. record : its record.

    Raises
    ------
    CorruptionError, FormatError : the structure is damaged.
    """

    def __init__(self, storage: Storage, record: Record, pool: Pool) -> None:
        self._storage = storage
        self._record = record
        self._pool = pool
        structure = record.array(STRUCTURE)
        if structure is None:
            raise FormatError(f"{storage.describe()} has no structure")
        document = self.document = typedjson.loads(
            self._read({structure.name: range(structure.count)})[structure.name].tobytes()
        )
        try:
            self.node = document["state"]
            self.rng = document["rng"]
            self.places: list[Place] = [
                (str(array), int(offset), int(size), int(start)) for array, offset, size, start in document["extents"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{storage.describe()} has a malformed structure: {error}") from error

    def state(self) -> Any:
        """The whole state."""
        return self.build(self.node)

    def rng_state(self) -> Any:
        """The states of the random number generators, or ``None``."""
        return None if self.rng is None else self.build(self.rng)

    def part(self, path: Iterable[Any]) -> Any:
        """What lies at a path of keys. Raises ``NotFoundError`` naming what there is."""
        return self.build(child(self.node, path))

    def array(self, name: str) -> FlatArray:
        found = self._record.array(name)
        if found is None:
            raise NotFoundError(
                f"{self._storage.describe()} is a milestone that kept only {', '.join(self._record.sections)}",
                hint="load that section, or restore a complete checkpoint",
            )
        return found

    def build(self, node: Any) -> Any:
        """The value of a node of the structure."""
        needed: dict[str, set[int]] = {}
        for index in extents_of(node):
            if not 0 <= index < len(self.places):
                raise FormatError(f"{self._storage.describe()}: its structure names an extent that it has not")
            name, offset, size, _ = self.places[index]
            if size:
                array = self.array(name)
                if offset < 0 or size < 0 or offset + size > array.nbytes:
                    raise FormatError(f"{self._storage.describe()}: an extent lies outside its array")
                step = array.chunk * array.itemsize
                needed.setdefault(name, set()).update(range(offset // step, (offset + size - 1) // step + 1))
        data = self._read(needed)
        empty = np.empty(0, np.uint8)

        def provide(index: int) -> Bytes:
            name, offset, size, _ = self.places[index]
            return data[name][offset : offset + size] if size else empty

        return Unflattening([start for *_, start in self.places], provide).build(node)

    def _read(self, needed: dict[str, Any]) -> dict[str, Bytes]:
        """Buffers as large as the arrays, of which the chunks asked for are filled; the rest costs no memory."""
        data, calls = {}, []
        for name, numbers in needed.items():
            array = self.array(name)
            data[name] = np.empty(array.nbytes, np.uint8)
            step = array.chunk * array.itemsize
            for number in numbers:
                out = data[name][number * step : number * step + array.chunk_size(number)]
                calls.append((self._storage, "", array, number, array.chunks[number], out))
        self._pool.map(read_chunk_into, calls)
        return data


def verify_checkpoint(storage: Storage, record: Record, pool: Pool) -> int:
    """Check every byte of a checkpoint: all chunks against the record, all metadata against what they must say.

    Returns the number of files looked at. Raises ``CorruptionError`` naming the first that differs.
    """
    _same(storage, ROOT, to_bytes(record))
    calls = []
    for array in record.arrays:
        _same(storage, metadata_key(array.name), compact(array.metadata()))
        expected = {ROOT, *(f"c.{number}" for number in range(array.count))}
        strangers = set(storage.list(array.name)) - expected
        if strangers:
            raise CorruptionError(
                f"{storage.describe(array.name)} holds {sorted(strangers)[0]}, which the record does not name"
            )
        for number in range(array.count):
            out = np.empty(array.chunk_size(number), np.uint8)
            calls.append((storage, "", array, number, array.chunks[number], out))
    pool.map(read_chunk_into, calls)
    if record.array(STRUCTURE) is not None:
        Reader(storage, record, pool)
    return 1 + len(record.arrays) + len(calls)


def _same(storage: Storage, key: str, expected: bytes) -> None:
    try:
        found = storage.read(key)
    except NotFoundError as error:
        raise CorruptionError(f"{storage.describe(key)} is missing") from error
    if found != expected:
        raise CorruptionError(f"{storage.describe(key)} does not say what it should", hint="restore another checkpoint")
