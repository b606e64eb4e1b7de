"""The plan of each array: chunk and shard shape, codec, and the exact packing of float fields.

Chunk shapes are a pure function of dtype, row shape and codec, so that the shards
of two stores with one schema can stand beside each other unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from trajstore.errors import SchemaError
from trajstore.format.layout import (
    SEALS,
    SETS,
    TABLE_DIMENSION,
    ArrayLayout,
    Codec,
    clock_array,
    column_array,
)
from trajstore.format.schema import ID, Column, Field, Rule

#: Codecs by purpose; the measurement behind them, and behind the sizes below, is in docs/design.md, section 8.
PROFILES = {
    "fast": Codec("lz4", 5),
    "balanced": Codec("zstd", 2),
    "small": Codec("zstd", 5),
}
DEFAULT_PROFILE = "balanced"

_WIDE_ROW = 1024
_WIDE_CHUNK = 64 << 10
_WIDE_CHUNK_FAST = 32 << 10  # of codecs that find little in more, and are taken for their speed
_FAST = ("lz4", "blosclz")
_NARROW_CHUNK = 32 << 10
_NARROW_ROWS = 4096
_SHARD = 16 << 20
_SHARD_ROWS = 1 << 16
_TABLE_CHUNK_ROWS = 1024
_TABLE_SHARD_ROWS = 16384
_ROW_MAX = 1 << 30
_BLOCK = 16 << 20  # a larger block gains nothing, and Blosc works in three times its size

_TABLE_CODEC = Codec("zstd", 1)


def codec_of(profile: str | Codec) -> Codec:
    """A codec by its profile's name, or itself. Raises ``SchemaError``."""
    if isinstance(profile, Codec):
        return profile
    try:
        return PROFILES[profile]
    except KeyError:
        raise SchemaError(f"{profile!r} is no profile", hint="one of " + ", ".join(PROFILES)) from None


def chunk_shape(dtype: np.dtype[Any], row_shape: tuple[int, ...], codec: Codec) -> tuple[int, int]:
    """Rows in a chunk and in a shard, both powers of two, for rows of this dtype and shape in this codec.

    Raises ``SchemaError`` for rows beyond 1 GiB, which no codec frame holds.
    """
    row = dtype.itemsize * math.prod(row_shape)
    if row > _ROW_MAX:
        raise SchemaError(f"a row of {row} bytes is too large; at most {_ROW_MAX} bytes", hint="split the field")
    if row >= _WIDE_ROW:
        chunk = _power_of_two((_WIDE_CHUNK_FAST if codec.cname in _FAST else _WIDE_CHUNK) // row)
    else:
        chunk = min(_power_of_two(_NARROW_CHUNK // max(row, 1)), _NARROW_ROWS)
    shard = min(_power_of_two(_SHARD // max(row, 1)), _SHARD_ROWS)
    return chunk, max(shard, chunk)


def _power_of_two(n: int) -> int:
    """The largest power of two that is not above ``n``, at least 1."""
    return 1 << max(n.bit_length() - 1, 0)


def field_layout(spec: Field, codec: Codec, shape: tuple[int, int] | None = None) -> ArrayLayout:
    """The layout of a field's array, as its rule stores it. shape : rows in a chunk and a shard, if not the usual ones.

    A chunk is one Blosc block unless the codec names a size: chunks are decoded whole in any case, and Zstd finds what
    one frame shares with the next only within a block.
    """
    chunk, shard = shape or chunk_shape(spec.stored, spec.shape, codec)
    layout = ArrayLayout(spec.array, spec.stored, spec.shape, chunk, shard, codec, str(spec.clock))
    if codec.blocksize or layout.chunk_bytes > _BLOCK:
        return layout
    return replace(layout, codec=replace(codec, blocksize=layout.chunk_bytes))


def clock_layout(name: str) -> ArrayLayout:
    return _table_layout(clock_array(name), np.dtype("int64"), (2,), -1)


def column_layout(name: str, spec: Column) -> ArrayLayout:
    return _table_layout(column_array(name), np.dtype(spec.dtype), (), -1 if name == ID else spec.fill)


def seals_layout() -> ArrayLayout:
    """One row for each sealed shard: array number, shard number, length in bytes, CRC-32."""
    return _table_layout(SEALS, np.dtype("int64"), (4,), -1, "seals")


def set_layout(name: str) -> ArrayLayout:
    """An interval set too large for the manifest: start and stop of each interval."""
    return _table_layout(f"{SETS}/{name}", np.dtype("int64"), (2,), -1, name)


def _table_layout(
    path: str, dtype: np.dtype[Any], row_shape: tuple[int, ...], fill: float, dimension: str = TABLE_DIMENSION
) -> ArrayLayout:
    return ArrayLayout(path, dtype, row_shape, _TABLE_CHUNK_ROWS, _TABLE_SHARD_ROWS, _TABLE_CODEC, dimension, fill)


def array_attributes(spec: Field) -> dict[str, Any]:
    """What an array says of itself, for readers that know Zarr but not this format (CF names where CF has one)."""
    attributes: dict[str, Any] = {"trajstore": {"dtype": spec.dtype, "rule": spec.rule.to_json()}}
    if spec.rule.kind == "divide":
        attributes |= {"scale_factor": 1.0 / spec.rule.divisor, "add_offset": 0.0}
    return attributes


# Packing: float rows that are exactly integers over a divisor are stored as those integers.

_DIVISORS = (255, 256, 1)
_PROBE = 1 << 20  # values looked at before a rule is chosen; every later value is checked as it is stored

Pack = Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], bool]


def decode_table(dtype: np.dtype[Any], rule: Rule) -> np.ndarray[Any, Any]:
    """The 256 values that the stored bytes of a ``divide`` rule stand for, in the field's dtype."""
    return (np.arange(256) / rule.divisor).astype(dtype)


class Lookup:
    """Stored bytes to a float field's values, bit for bit."""

    def __init__(self, dtype: str, rule: Rule) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._table = decode_table(self.dtype, rule)
        self._divisor = self.dtype.type(rule.divisor)
        # Rounding once in the field's own precision gives the same values, if that is wide enough: then no lookup.
        exact = np.arange(256).astype(self.dtype) / self._divisor
        self._divides = self.dtype.itemsize > 2 and exact.tobytes() == self._table.tobytes()
        self._pairs = _pair_table(self._table) if self.dtype.itemsize == 2 else None

    def __call__(self, stored: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        if self._divides:
            np.divide(stored, self._divisor, out=out, dtype=self.dtype, casting="unsafe")
        elif self._pairs is not None and not stored.size % 2 and out.flags.c_contiguous and stored.flags.c_contiguous:
            two, values = stored.reshape(-1).view(np.uint16), out.reshape(-1).view(np.uint32)
            np.take(self._pairs, two, out=values, mode="wrap")  # unlike "raise" it writes into ``out`` as it goes
        else:
            np.take(self._table, stored, out=out, mode="wrap")


def _pair_table(table: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What two stored bytes, read as one uint16, stand for, as one uint32: half the lookups."""
    both = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    pairs: np.ndarray[Any, Any] = table[both].view(np.uint32)
    return pairs


class Widen:
    """bfloat16 bits to float32, which holds every bfloat16 exactly."""

    dtype: np.dtype[Any] = np.dtype("float32")

    def __call__(self, stored: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        np.left_shift(stored, 16, out=out.view(np.uint32), dtype=np.uint32)


def converter(spec: Field) -> Lookup | Widen | None:
    """How a field's stored rows become its values; ``None`` where they are its values."""
    if spec.rule.kind == "divide":
        return Lookup(spec.dtype, spec.rule)
    return Widen() if spec.dtype == "bfloat16" else None


def choose_rule(spec: Field, rows: np.ndarray[Any, Any]) -> Rule:
    """The rule under which these first rows (n, *shape) are stored in fewer bytes without losing a bit."""
    if not spec.pack or spec.rule.kind != "plain" or np.dtype(spec.dtype).kind != "f" or len(rows) == 0:
        return spec.rule
    if math.prod(spec.shape) < 64:  # scalars and small vectors are seldom images, and a misfit costs a rewrite
        return spec.rule
    probe = rows.reshape(-1)[:_PROBE]
    if not (probe != probe[0]).any():
        return spec.rule
    for divisor in _DIVISORS:
        rule = Rule("divide", divisor)
        out = np.empty(probe.shape, np.uint8)
        if packer(spec.dtype, rule)(np.ascontiguousarray(probe), out):
            return rule
    return spec.rule


def packer(dtype: str, rule: Rule) -> Pack:
    """A function (rows, out) that stores rows as ``rule`` says and tells whether that is exact.

    ``rows`` is contiguous, of the field's dtype; ``out`` is uint8, of the same shape.
    """
    table = decode_table(np.dtype(dtype), rule)
    if dtype == "float16":
        return _pack_float16(table.view(np.uint16), rule.divisor)
    bits = np.dtype(f"u{table.itemsize}")

    def pack_float(rows: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> bool:
        with np.errstate(invalid="ignore", over="ignore"):
            scaled = np.rint(rows * table.dtype.type(rule.divisor))
            np.copyto(out, np.clip(np.nan_to_num(scaled, nan=0.0), 0, 255), casting="unsafe")
        return bool(np.array_equal(table[out].view(bits), rows.view(bits)))

    return pack_float


def _pack_float16(table: np.ndarray[Any, Any], divisor: int) -> Pack:
    """A packer of float16 by its bits; ``table`` are those of the 256 values that the rule can store.

    Shifted left by 13, the bits of a finite positive float16 are those of a float32 that is 2**112 times smaller. So
    the code comes by one multiplication, and it is right if what it stands for lies within half a float16 step of the
    value.
    """
    scale, back = np.float32(divisor * 2.0**112), np.float32(2.0**-112 / divisor)
    highest, half = int(table.max()), 1 << 12

    def codes(bits: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Writes the code of each value; how far each is from what its code stands for, ``half`` being not at all."""
        shifted = bits.astype(np.uint32)
        shifted <<= 13
        scaled = shifted.view(np.float32) * scale
        np.rint(scaled, out=scaled)
        np.copyto(out, scaled, casting="unsafe")
        scaled *= back
        distance: np.ndarray[Any, Any] = scaled.view(np.uint32)
        distance -= shifted
        distance += half
        return distance

    def pack(rows: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> bool:
        bits = rows.view(np.uint16)
        if int(bits.max(initial=0)) > highest:  # negative, not finite, or too large
            return False
        return int(codes(bits, out).max(initial=0)) <= 2 * half

    # There are few enough values to try them all.
    every = np.arange(highest + 1, dtype=np.uint16)
    found = np.empty(len(every), np.uint8)
    fits = codes(every, found) <= 2 * half
    if not (np.array_equal(every[fits], np.sort(table)) and np.array_equal(table[found[fits]], every[fits])):
        raise SchemaError(f"float16 cannot be packed by {divisor}")
    return pack
