"""The parsers of bytes from disk, one input at a time; by themselves, or driven by atheris where it is installed.

``python -m tests.campaign.fuzz [corpus folder] [libFuzzer options]`` lets atheris look for inputs that reach new code.
"""

from __future__ import annotations

import importlib
import json
import random
import struct
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from trajstore.errors import TrajstoreError
from trajstore.format import typedjson
from trajstore.format.checksum import crc32c
from trajstore.format.layout import ArrayLayout, Codec
from trajstore.format.manifest import Manifest, root_checksum
from trajstore.media.shard import decode_frame, encode_frame, parse_index

LAYOUT = ArrayLayout("steps/x", np.dtype("int32"), (3,), 8, 32, Codec("zstd", 1), "steps")


def one(data: bytes) -> str:
    """Give an input to the parser that its first byte names; what came of it. Raises what is not refused properly."""
    kind, data = (data[0] % 6 if data else 0), data[1:]
    try:
        if kind == 0:
            Manifest.from_bytes(data, "fuzz")
        elif kind == 1:
            Manifest.from_bytes(_signed(data), "fuzz")
        elif kind == 2:
            typedjson.loads(data)
        elif kind == 3:
            parse_index(data, LAYOUT, 1000)
        elif kind == 4:  # an index with the right checksum
            body = data[: LAYOUT.index_bytes - 4].ljust(LAYOUT.index_bytes - 4, b"\xff")
            index = parse_index(body + struct.pack("<I", crc32c(body)), LAYOUT, 1000)
            assert ((index >= -1) & (index <= 1000)).all()
        else:  # a frame with the right checksum
            decode_frame(data + struct.pack("<I", crc32c(data)), np.empty(LAYOUT.chunk_bytes, np.uint8))
    except TrajstoreError as error:
        return type(error).__name__
    return "accepted"


def _signed(data: bytes) -> bytes:
    """A manifest with the checksum that it should have, if it is near enough to one to have one."""
    try:
        root = json.loads(data)
        root["attributes"]["trajstore"]["crc32c"] = root_checksum(root)
        return json.dumps(root).encode()
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return data


def seeds() -> list[bytes]:
    """Inputs that are valid, or nearly so, from which others are made."""
    from tests.campaign.damage import versions

    files = versions("afd")[0][-1]
    root = files["zarr.json"]
    found = [bytes([kind]) + root for kind in (0, 1, 2)]
    found += [bytes([kind]) + files["steps/x/c.0"][-LAYOUT.index_bytes :] for kind in (3, 4)]
    for cname in ("zstd", "lz4", "lz4hc", "zlib", "blosclz"):
        for shuffle in ("noshuffle", "shuffle", "bitshuffle"):
            codec = Codec(cname, 1, shuffle, 0)
            for chunk in (np.zeros((8, 3), np.int32), np.arange(24, dtype=np.int32).reshape(8, 3)):
                found.append(b"\x05" + encode_frame(chunk, codec)[:-4])
    values: list[Any] = [{"a": [1, 2.5, None, "x"]}, {"t": (1, 2)}, {1: {"b": float("nan")}}, []]
    return found + [b"\x02" + typedjson.dumps(value) for value in values]


def mutants(seed: int) -> Iterator[bytes]:
    """The seeds, changed at random, without end."""
    draw = random.Random(seed)
    known = seeds()
    while True:
        data = bytearray(draw.choice(known))
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(1, len(data)) if len(data) > 1 else 0
            match draw.randrange(5):
                case 0:
                    data[at : at + 1] = bytes([draw.randrange(256)])
                case 1:
                    data[at : at + 4] = struct.pack("<I", draw.choice([0, 1, 255, 2**31 - 1, 2**31, 2**32 - 1]))
                case 2:
                    del data[at : at + draw.randint(1, 30)]
                case 3:
                    other = draw.choice(known)
                    start = draw.randrange(len(other))
                    data[at:at] = other[start : start + draw.randint(1, 40)]
                case _:
                    data[at:at] = draw.choice(
                        [b"0", b"-1", b"1e999", b"null", b"[]", b"{}", b'"', b"99999999999999999999"]
                    )
        yield bytes(data)


def main() -> None:
    import atheris

    for name in [name for name in sys.modules if name.partition(".")[0] == "trajstore"]:
        del sys.modules[name]
    with atheris.instrument_imports(include=["trajstore"]):
        module = importlib.import_module("tests.campaign.fuzz")

    def target(data: bytes) -> None:
        module.one(data)

    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
