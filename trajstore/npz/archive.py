"""The zip container, written front to back: headers, descriptors, central directory.

Always in the zip64 forms, as NumPy does, so that a member may pass 4 GiB
without its size being known beforehand. Source: PKWARE APPNOTE 6.3.10,
sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

__all__ = ["DEFLATED", "STORED", "Entry", "descriptor", "directory", "header"]

STORED, DEFLATED = 0, 8

_VERSION = 45  # zip64
_FLAGS = 1 << 3 | 1 << 11  # sizes follow the data; names are UTF-8
_TIME, _DATE = 0, 1 << 5 | 1  # 1980-01-01 00:00, the earliest: equal input makes equal bytes
_UNKNOWN32 = 0xFFFFFFFF
_ZIP64 = 1
_MODE = 0o600 << 16
_UNIX = 3 << 8


@dataclass(frozen=True)
class Entry:
    """One member, when all of it is written."""

    name: str
    method: int
    offset: int
    crc32: int
    stored_bytes: int
    raw_bytes: int


def header(name: str, method: int) -> bytes:
    """What precedes a member's data."""
    encoded = name.encode()
    fixed = struct.pack(
        "<IHHHHHIIIHH",
        0x04034B50,
        _VERSION,
        _FLAGS,
        method,
        _TIME,
        _DATE,
        0,
        _UNKNOWN32,
        _UNKNOWN32,
        len(encoded),
        20,
    )
    return fixed + encoded + struct.pack("<HHQQ", _ZIP64, 16, 0, 0)


def descriptor(entry: Entry) -> bytes:
    """What follows a member's data."""
    return struct.pack("<IIQQ", 0x08074B50, entry.crc32, entry.stored_bytes, entry.raw_bytes)


def directory(entries: list[Entry], offset: int) -> bytes:
    """The end of the file: the central directory, which begins at ``offset``."""
    records = b"".join(map(_record, entries))
    count, size = len(entries), len(records)
    end64 = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, _UNIX | _VERSION, _VERSION, 0, 0, count, count, size, offset)
    locator = struct.pack("<IIQI", 0x07064B50, 0, offset + size, 1)
    end = struct.pack(
        "<IHHHHIIH",
        0x06054B50,
        0,
        0,
        min(count, 0xFFFF),
        min(count, 0xFFFF),
        min(size, _UNKNOWN32),
        min(offset, _UNKNOWN32),
        0,
    )
    return records + end64 + locator + end


def _record(entry: Entry) -> bytes:
    encoded = entry.name.encode()
    fixed = struct.pack(
        "<IHHHHHHIIIHHHHHII",
        0x02014B50,
        _UNIX | _VERSION,
        _VERSION,
        _FLAGS,
        entry.method,
        _TIME,
        _DATE,
        entry.crc32,
        _UNKNOWN32,
        _UNKNOWN32,
        len(encoded),
        28,
        0,
        0,
        0,
        _MODE,
        _UNKNOWN32,
    )
    return fixed + encoded + struct.pack("<HHQQQ", _ZIP64, 24, entry.raw_bytes, entry.stored_bytes, entry.offset)
