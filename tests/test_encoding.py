"""Chunk shapes and packing: exact for every bit pattern there is, and refused where it would not be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import blosc

from trajstore.errors import SchemaError
from trajstore.format.encoding import (
    PROFILES,
    Lookup,
    Widen,
    choose_rule,
    chunk_shape,
    decode_table,
    field_layout,
    packer,
)
from trajstore.format.layout import Codec
from trajstore.format.schema import Field, Rule
from trajstore.media.shard import decode_frame, encode_frame, encode_frames

DIVISORS = (255, 256, 1)
FLOATS = ("float16", "float32", "float64")


@pytest.mark.parametrize("divisor", DIVISORS)
def test_every_float16_is_packed_exactly_or_refused(divisor: int) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    pack = packer("float16", Rule("divide", divisor))
    table = decode_table(np.dtype("float16"), Rule("divide", divisor))
    storable = set(table.view(np.uint16).tolist())
    for value in every:
        one = np.array([value])
        out = np.empty(1, np.uint8)
        fits = pack(one, out)
        assert fits == (int(one.view(np.uint16)[0]) in storable)
        if fits:
            assert table[out].tobytes() == one.tobytes()


@pytest.mark.parametrize("divisor", DIVISORS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_packed_is_unpacked_bit_for_bit(dtype: str, divisor: int) -> None:
    rule = Rule("divide", divisor)
    rng = np.random.default_rng(0)
    for shape in [(1,), (2,), (7, 3), (5, 2, 9), (0, 4), (64, 3, 8, 8)]:
        stored = rng.integers(0, 256, shape).astype(np.uint8)
        rows = (stored / divisor).astype(dtype)
        out = np.empty(shape, np.uint8)
        assert packer(dtype, rule)(rows, out)
        assert np.array_equal(out, stored)
        back = np.empty(shape, dtype)
        Lookup(dtype, rule)(stored, back)
        assert back.tobytes() == rows.tobytes()
        strided = np.zeros((*shape, 2), dtype)
        Lookup(dtype, rule)(stored, strided[..., 0])
        assert strided[..., 0].tobytes() == rows.tobytes()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [-1 / 255, -0.0, 0.5, 2.0, math.nan, math.inf, -math.inf, 1e-7, "next"])
def test_one_value_that_does_not_fit_is_noticed(dtype: str, bad: Any) -> None:
    rows = (np.random.default_rng(0).integers(0, 256, 5000) / 255).astype(dtype)
    place = 4321
    rows[place] = np.nextafter(rows[place], np.array(2, dtype)) if bad == "next" else bad
    assert not packer(dtype, Rule("divide", 255))(rows, np.empty(5000, np.uint8))


@given(st.lists(st.floats(width=32), min_size=64, max_size=64), st.sampled_from(DIVISORS))
@settings(max_examples=200, deadline=None)
def test_a_rule_is_chosen_only_where_it_loses_nothing(values: list[float], divisor: int) -> None:
    rows = np.array(values, np.float32).reshape(1, 64)
    spec = Field("float32", (64,))
    rule = choose_rule(spec, rows)
    if rule.kind == "divide":
        out = np.empty(rows.shape, np.uint8)
        assert packer("float32", rule)(rows, out)
        assert decode_table(np.dtype("float32"), rule)[out].tobytes() == rows.tobytes()
    assert choose_rule(spec, (np.arange(64) / 255).astype(np.float32).reshape(1, 64)).divisor == 255


def test_bfloat16_becomes_the_float32_that_has_its_bits() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    out = np.empty(bits.shape, np.float32)
    Widen()(bits, out)
    assert np.array_equal(out.view(np.uint32), bits.astype(np.uint32) << 16)


@given(
    st.sampled_from(["bool", "uint8", "float16", "float32", "complex128"]),
    st.lists(st.integers(0, 300), max_size=4),
    st.sampled_from([*PROFILES.values(), Codec("lz4hc", 9)]),
)
def test_chunks_are_powers_of_two_and_divide_shards(dtype: str, shape: list[int], codec: Codec) -> None:
    row = np.dtype(dtype).itemsize * math.prod(shape)
    try:
        chunk, shard = chunk_shape(np.dtype(dtype), tuple(shape), codec)
    except SchemaError:
        assert row > 1 << 30
        return
    for n in (chunk, shard):
        assert n >= 1
        assert n & (n - 1) == 0
    assert shard % chunk == 0
    assert chunk == 1 or chunk * row <= 64 << 10
    layout = field_layout(Field(dtype, tuple(shape), "steps", array="steps/x"), codec)
    assert (layout.chunk_rows, layout.shard_rows) == (chunk, shard)
    assert layout.codec.blocksize in (0, layout.chunk_bytes)


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("cname", ["zstd", "lz4"])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "complex64", "bool"])
@pytest.mark.parametrize("kind", ["smooth", "noise", "both"])
def test_chunks_encoded_together_are_what_each_is_alone(kind: str, dtype: str, cname: str, threads: bool) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (32, 4096), np.uint8)
    values[{"smooth": slice(None), "noise": slice(0), "both": slice(0, None, 2)}[kind]] //= 64
    rows = values.view(dtype) if dtype != "bool" else values > 2
    chunks = np.split(rows, 8)
    codec = Codec(cname, 3, "shuffle", chunks[0].nbytes)
    blosc.use_threads = threads
    try:
        together = encode_frames(rows, 8, codec)
    finally:
        blosc.use_threads = False
    assert len(together) == 8
    for chunk, frame in zip(chunks, together):
        out = np.empty(chunk.nbytes, np.uint8)
        decode_frame(frame, out)
        assert out.tobytes() == chunk.tobytes()
        if kind == "smooth":
            assert frame == encode_frame(chunk, codec)


def test_chunks_in_zstd_are_encoded_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    compress = blosc.compress
    monkeypatch.setattr(blosc, "compress", lambda *given: calls.append(given) or compress(*given))
    rows = np.arange(1 << 14).reshape(64, 256)
    assert len(encode_frames(rows, 16, Codec("zstd", 1, "shuffle", rows.nbytes // 16))) == 16
    assert len(calls) == 1
