"""A checkpoint's root ``zarr.json``: a Zarr group whose attributes are the record of all that belongs to it.

The record names every chunk with length and checksum, and carries a checksum of its own at a fixed place, so that
every byte of a checkpoint is covered by something that was written last. Any Zarr v3 library reads the arrays.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from trajstore.errors import CorruptionError, FormatError, UnsupportedFormatError
from trajstore.format import typedjson
from trajstore.format.checksum import crc32c
from trajstore.format.layout import Codec

FORMAT = 1
ATTRIBUTE = "trajstore_checkpoint"
CHUNK_BYTES = 4 << 20
CODEC = Codec("zstd", 1, "shuffle", 1 << 20)
STRUCTURE = "structure"
"""The array that holds the state's structure, as JSON."""

_NATIVE = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128".split()
)
_HEAD = b'{"zarr_format":3,"node_type":"group","attributes":{"' + ATTRIBUTE.encode() + b'":{"crc32c":"'
_ZEROS = b"00000000"
_MAX_RECORD = 64 << 20


@dataclass(frozen=True)
class Chunk:
    """One chunk file: its length, the crc32c that it ends with, and the crc32c of what it decodes to."""

    length: int
    crc: int
    raw: int


@dataclass(frozen=True)
class FlatArray:
    """All values of one dtype in one section, end to end, as a Zarr array of one dimension.

    dtype : torch's or NumPy's name, or ``bytes``. stored : the NumPy dtype on disk. length, chunk : in elements.
    """

    name: str
    section: str
    dtype: str
    stored: str
    length: int
    chunk: int
    chunks: tuple[Chunk, ...] = ()

    @property
    def itemsize(self) -> int:
        return np.dtype(self.stored).itemsize

    @property
    def nbytes(self) -> int:
        return self.length * self.itemsize

    @property
    def count(self) -> int:
        """Number of chunks."""
        return -(-self.length // self.chunk)

    def chunk_size(self, number: int) -> int:
        """Bytes of a chunk; the last one ends with the array."""
        return min(self.chunk, self.length - number * self.chunk) * self.itemsize

    def with_chunks(self, chunks: list[Chunk]) -> FlatArray:
        return replace(self, chunks=tuple(chunks))

    def metadata(self) -> dict[str, Any]:
        """The array's Zarr v3 metadata."""
        fill: Any = False if self.stored == "bool" else [0.0, 0.0] if self.stored.startswith("complex") else 0
        blosc = {"cname": CODEC.cname, "clevel": CODEC.clevel, "shuffle": CODEC.shuffle,
                 "typesize": self.itemsize, "blocksize": CODEC.blocksize}  # fmt: skip
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self.length],
            "data_type": self.stored,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.chunk]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": float(fill) if self.stored.startswith("float") else fill,
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}} if self.itemsize > 1 else {"name": "bytes"},
                {"name": "blosc", "configuration": blosc},
                {"name": "crc32c"},
            ],
            "attributes": {"section": self.section, "dtype": self.dtype},
            "storage_transformers": [],
        }


def stored_dtype(dtype: str, itemsize: int) -> str:
    """The Zarr dtype for values of ``dtype``: itself, or an unsigned integer as wide (bfloat16, float8)."""
    return dtype if dtype in _NATIVE else f"uint{8 * itemsize}"


@dataclass(frozen=True)
class Record:
    """What one checkpoint says of itself.

    step : as given. serial : counts the saves of a folder; the newest has the greatest. uuid, parent : of this
    checkpoint, and of the one that its run was restored from or saved before. time : seconds since the epoch.
    stripped : the sections that were dropped when it became a milestone.
    """

    step: int
    serial: int
    uuid: str
    parent: str | None
    time: float
    metrics: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    final: bool = False
    interrupted: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    arrays: tuple[FlatArray, ...] = ()
    stripped: tuple[str, ...] = ()

    @property
    def sections(self) -> list[str]:
        return list(dict.fromkeys(array.section for array in self.arrays if array.name != STRUCTURE))

    @property
    def raw_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all chunk files; those that are hard links to another checkpoint's count too."""
        return sum(chunk.length for array in self.arrays for chunk in array.chunks)

    def array(self, name: str) -> FlatArray | None:
        return next((array for array in self.arrays if array.name == name), None)


def to_bytes(record: Record) -> bytes:
    """The root ``zarr.json``."""
    facts = asdict(record)
    facts["arrays"] = [
        {**asdict(array), "chunks": [[chunk.length, chunk.crc, chunk.raw] for chunk in array.chunks]}
        for array in record.arrays
    ]
    for name in ("metrics", "meta"):
        facts[name] = json.loads(typedjson.dumps(facts[name]))
    document = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {ATTRIBUTE: {"crc32c": _ZEROS.decode(), "format": FORMAT, **facts}},
        "consolidated_metadata": {
            "kind": "inline",
            "must_understand": False,
            "metadata": {array.name: array.metadata() for array in record.arrays},
        },
    }
    data = compact(document)
    checksum = b"%08x" % crc32c(data)
    return data[: len(_HEAD)] + checksum + data[len(_HEAD) + len(checksum) :]


def from_bytes(data: bytes, place: str) -> Record:
    """The record in a root ``zarr.json``; ``place`` is for messages.

    Raises
    ------
    CorruptionError : it does not match its checksum. UnsupportedFormatError : of a newer format.
    FormatError : it is no checkpoint.
    """
    if not data.startswith(_HEAD):
        raise CorruptionError(f"{place} is no checkpoint's record, or a damaged one")
    if len(data) > _MAX_RECORD:
        raise FormatError(f"{place} has {len(data)} bytes: no record is that large")
    end = len(_HEAD) + len(_ZEROS)
    if data[len(_HEAD) : end] != b"%08x" % crc32c(_HEAD + _ZEROS + data[end:]):
        raise CorruptionError(f"{place} does not match its checksum")
    try:
        facts = json.loads(data)["attributes"][ATTRIBUTE]
        if facts["format"] != FORMAT:
            raise UnsupportedFormatError(
                f"{place} is of checkpoint format {facts['format']}, this version reads {FORMAT}",
                hint="upgrade trajstore",
            )
        del facts["crc32c"], facts["format"]
        for name in ("metrics", "meta"):
            facts[name] = typedjson.loads(compact(facts[name]))
        facts["arrays"] = tuple(
            FlatArray(**{**array, "chunks": tuple(Chunk(*chunk) for chunk in array["chunks"])})
            for array in facts["arrays"]
        )
        facts["stripped"] = tuple(facts["stripped"])
        record = Record(**facts)
        for array in record.arrays:
            _check(array)
        return record
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{place} is not a record of this format: {error}") from error


def _check(array: FlatArray) -> None:
    numbers = (array.length, array.chunk)
    if (
        not all(type(n) is int and n > 0 for n in numbers)
        or array.stored not in _NATIVE
        or array.chunk * array.itemsize > CHUNK_BYTES
        or len(array.chunks) != array.count
        or "/" in array.name
        or array.name.startswith(("_", "."))
    ):
        raise FormatError(f"the array {array.name!r:.80} of a checkpoint is outside the format's bounds")


def compact(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
