"""Names on disk, and the Zarr v3 metadata of one array; every file name and key of the format is here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trajstore.errors import FormatError, SchemaError, UnsupportedFormatError
from trajstore.format.arguments import check_count
from trajstore.format.schema import NUMERIC, check_path

ROOT = "zarr.json"
STEPS = "steps"
CLOCKS = "clocks"
TABLE = "trajectories"
SEALS = "integrity/seals"
SETS = "sets"
PRIVATE = "__trajstore"
LOCK = f"{PRIVATE}/lock"
COMMITS = f"{PRIVATE}/commits"
SCRATCH = f"{PRIVATE}/scratch"
PARTS = "trajstore_parts"  # attribute of a plain group whose members are stores, one for each collector

TABLE_DIMENSION = "trajectories"
INDEX_ENTRY = 16  # bytes of one (offset, length) pair
MISSING = (1 << 64) - 1  # both numbers of a chunk that a shard does not hold
CRC = 4
FRAME_HEADER = 16  # bytes of a Blosc header
_MAX_CHUNK = (1 << 31) - 1  # Blosc's own bound
_MAX_ROWS = 1 << 62

_SHUFFLES = ("noshuffle", "shuffle", "bitshuffle")
_CNAMES = ("blosclz", "lz4", "lz4hc", "zlib", "zstd")


def field_array(path: str) -> str:
    return f"{STEPS}/{path}"


def clock_array(name: str) -> str:
    return f"{CLOCKS}/{name}"


def column_array(name: str) -> str:
    return f"{TABLE}/{name}"


def metadata_key(array: str) -> str:
    """Where an array's or group's own ``zarr.json`` lies."""
    return f"{array}/{ROOT}" if array else ROOT


def commit_key(number: int) -> str:
    return f"{COMMITS}/{number:012d}"


def temporary(folder: str, token: str) -> str:
    """A name that no reader looks at, in the folder where the file will be renamed."""
    name = f"tmp.{token}"
    return f"{folder}/{name}" if folder else name


def is_temporary(name: str) -> bool:
    return name.startswith("tmp.")


@dataclass(frozen=True)
class Codec:
    """Blosc's settings. cname, clevel 0-9, shuffle: as numcodecs names them; blocksize in bytes, 0 = Blosc's choice."""

    cname: str = "lz4"
    clevel: int = 5
    shuffle: str = "shuffle"
    blocksize: int = 0

    def __post_init__(self) -> None:
        if self.cname not in _CNAMES:
            raise SchemaError(f"{self.cname!r} is no Blosc compressor", hint="one of " + ", ".join(_CNAMES))
        if self.shuffle not in _SHUFFLES:
            raise SchemaError(f"{self.shuffle!r} is no Blosc shuffle", hint="one of " + ", ".join(_SHUFFLES))
        check_count("clevel", self.clevel, most=9)
        check_count("blocksize", self.blocksize)

    @property
    def shuffle_code(self) -> int:
        return _SHUFFLES.index(self.shuffle)


@dataclass(frozen=True)
class ArrayLayout:
    """Where the rows of one array lie.

    path : of the array in the store. dtype : as stored. row_shape : without the time axis.
    chunk_rows, shard_rows : powers of two; a shard file holds ``shard_rows / chunk_rows`` chunks.
    dimension : name of the time axis. fill : value of rows that no chunk holds.
    """

    path: str
    dtype: np.dtype[Any]
    row_shape: tuple[int, ...]
    chunk_rows: int
    shard_rows: int
    codec: Codec
    dimension: str
    fill: float | int | bool = 0

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.row_shape)

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_rows * self.row_bytes

    @property
    def chunks_per_shard(self) -> int:
        return self.shard_rows // self.chunk_rows

    @property
    def index_bytes(self) -> int:
        return self.chunks_per_shard * INDEX_ENTRY + CRC

    def shard_key(self, shard: int) -> str:
        return f"{self.path}/c.{shard}" + ".0" * len(self.row_shape)

    def shard_number(self, name: str) -> int | None:
        """The number of the shard that a file name in the array's folder stands for, or ``None``."""
        parts = name.split(".")
        if len(parts) != 2 + len(self.row_shape) or parts[0] != "c" or not parts[1].isdecimal():
            return None
        return int(parts[1]) if all(part == "0" for part in parts[2:]) else None

    def with_path(self, path: str) -> ArrayLayout:
        return replace(self, path=path)

    def metadata(self, rows: int, attributes: dict[str, Any] | None = None) -> dict[str, Any]:
        """The array's Zarr v3 metadata when it has ``rows`` rows."""
        row = list(self.row_shape)
        chunk_row = [max(n, 1) for n in row]
        crc = {"name": "crc32c"}
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        blosc = {
            "name": "blosc",
            "configuration": {
                "cname": self.codec.cname,
                "clevel": self.codec.clevel,
                "shuffle": self.codec.shuffle,
                "typesize": self.dtype.itemsize,
                "blocksize": self.codec.blocksize,
            },
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [rows, *row],
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.shard_rows, *chunk_row]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": _fill_to_json(self.fill, self.dtype),
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [self.chunk_rows, *chunk_row],
                        "codecs": [little, blosc, crc],
                        "index_codecs": [little, crc],
                        "index_location": "end",
                    },
                }
            ],
            "dimension_names": [self.dimension, *self._row_dimensions()],
            "attributes": attributes or {},
            "storage_transformers": [],
        }

    def _row_dimensions(self) -> list[str]:
        if self.path.startswith(f"{CLOCKS}/"):
            return ["bound"]
        name = self.path.split("/", 1)[-1].replace("/", ".")
        return [f"{name}_{axis}" for axis in range(1, len(self.row_shape) + 1)]

    @classmethod
    def from_metadata(cls, path: str, metadata: Any) -> tuple[ArrayLayout, int]:
        """The layout and the number of rows that Zarr v3 metadata describe.

        Raises ``FormatError`` where they are not this format's, ``UnsupportedFormatError`` for what it does not know.
        """
        try:
            check_path(path, "array")
            if metadata["zarr_format"] != 3 or metadata["node_type"] != "array":
                raise FormatError(f"{path} is no Zarr v3 array")
            dtype_name = metadata["data_type"]
            if dtype_name not in NUMERIC:
                raise UnsupportedFormatError(f"array {path} has the dtype {dtype_name!r:.80}, which is not read here")
            dtype = np.dtype(dtype_name)
            shape = _shape(metadata["shape"])
            outer = _shape(metadata["chunk_grid"]["configuration"]["chunk_shape"])
            (sharding,) = metadata["codecs"]
            configuration = sharding["configuration"]
            inner = _shape(configuration["chunk_shape"])
            little, blosc, crc = configuration["codecs"]
            names = [sharding["name"], little["name"], blosc["name"], crc["name"]]
            key = metadata["chunk_key_encoding"]
            if (
                names != ["sharding_indexed", "bytes", "blosc", "crc32c"]
                or [codec["name"] for codec in configuration["index_codecs"]] != ["bytes", "crc32c"]
                or configuration.get("index_location", "end") != "end"
                or metadata["chunk_grid"]["name"] != "regular"
                or key["name"] != "default"
                or key["configuration"]["separator"] != "."
            ):
                raise UnsupportedFormatError(f"array {path} is encoded in a way that is not read here: {names!r:.200}")
            settings = blosc["configuration"]
            layout = cls(
                path=path,
                dtype=dtype,
                row_shape=shape[1:],
                chunk_rows=inner[0],
                shard_rows=outer[0],
                codec=Codec(
                    settings["cname"], settings["clevel"], settings["shuffle"], int(settings.get("blocksize", 0))
                ),
                dimension=str(metadata["dimension_names"][0]),
                fill=_fill_from_json(metadata["fill_value"], dtype),
            )
            row = tuple(max(n, 1) for n in shape[1:])
            if (
                inner[1:] != row
                or outer[1:] != row
                or inner[0] < 1
                or outer[0] % inner[0]
                or layout.chunk_bytes > _MAX_CHUNK
                or layout.chunks_per_shard > 1 << 24
                or shape[0] > _MAX_ROWS
            ):
                raise FormatError(f"array {path} is chunked in a way that the format does not allow")
            return layout, shape[0]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"the metadata of array {path!r:.200} are damaged or not of this format") from error


def group_metadata(attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or len(value) > 32:
        raise FormatError(f"not a shape: {value!r:.200}")
    for n in value:
        if not isinstance(n, int) or isinstance(n, bool) or n < 0:
            raise FormatError(f"not a shape: {value!r:.200}")
    return tuple(value)


def _fill_to_json(fill: float | int | bool, dtype: np.dtype[Any]) -> Any:
    if dtype.kind == "b":
        return bool(fill)
    if dtype.kind == "f":
        return (
            "NaN"
            if math.isnan(fill)
            else "Infinity"
            if fill == math.inf
            else ("-Infinity" if fill == -math.inf else float(fill))
        )
    if dtype.kind == "c":
        return [float(fill), 0.0]
    return int(fill)


def _fill_from_json(value: Any, dtype: np.dtype[Any]) -> float | int | bool:
    if dtype.kind == "c":
        return float(value[0])
    if dtype.kind == "f":
        return float({"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}.get(value, value))
    return bool(value) if dtype.kind == "b" else int(value)
