"""Hostile bytes: files flipped, cut, lost, exchanged, put back in older versions, or forged with right checksums."""

from __future__ import annotations

import json
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import trajstore
import trajstore.operations.verify
from tests.campaign.disk import STORE, Disk
from tests.campaign.explorer import Violation
from tests.campaign.workload import NO_STORE, Run, State, open_writer, recover, rows_of, tiny_shards, trajectory
from trajstore.errors import TrajstoreError
from trajstore.format.checksum import crc32c
from trajstore.format.layout import PRIVATE, ROOT
from trajstore.format.manifest import root_checksum

Files = dict[str, bytes]


def disk_of(files: Files) -> Disk:
    """A disk that holds these files."""
    disk = Disk()
    disk.folders[0][STORE] = root = disk.new()
    disk.folders[root] = {}
    for key, data in files.items():
        folder = root
        *parents, name = key.split("/")
        for part in parents:
            node = disk.folders[folder].get(part, 0)
            if not node:
                node = disk.folders[folder][part] = disk.new()
                disk.folders[node] = {}
            folder = node
        disk.folders[folder][name] = node = disk.new()
        disk.files[node] = data
    return disk


def versions(operations: str, wide: bool = True) -> tuple[list[Files], list[State | str]]:
    """The files of a store after each of its commits, and what it then held."""
    run = Run(Disk(), wide=wide)
    kept: list[Files] = []
    acknowledge = run._acknowledge

    def snapshot() -> None:
        acknowledge()
        kept.append(run.disk.tree())

    run._acknowledge = snapshot  # type: ignore[method-assign]
    run(operations)
    return kept, run.states


def read(files: Files, allowed: set[State | str], what: str) -> str:
    """Open a damaged store: it is refused with an error of ours, or what it says is true. Raises ``Violation``."""
    try:
        with tiny_shards():
            found = recover(disk_of(files).storage())
    except TrajstoreError as error:
        return type(error).__name__
    except Exception as error:
        raise Violation(f"{what}: {error!r}") from error
    if found == NO_STORE:
        return "NotFoundError"
    if found not in allowed and "exchange" in what:
        # A whole file in another's place has all its checksums right; the one over all of it is for verify.
        if trajstore.operations.verify.verify(disk_of(files).storage()).ok:  # type: ignore[attr-defined]
            raise Violation(f"{what}: verify finds nothing")
        return "found by verify only"
    if found not in allowed:
        raise Violation(f"{what}: read as {found}, instead of {allowed}")
    return "read right"


def go_on(files: Files, allowed: set[State | str], what: str) -> str:
    """Resume a damaged store: refused, or gone on with from what it truly held; never begun anew."""
    disk = disk_of(files)
    try:
        with tiny_shards(), open_writer(disk.storage(), resume=True) as writer:
            writer.append(trajectory(77, True), seed=77)
    except TrajstoreError as error:
        return f"resume: {type(error).__name__}"
    except Exception as error:
        raise Violation(f"{what}, resumed: {error!r}") from error
    try:
        with tiny_shards():
            found = recover(disk.storage())
    except TrajstoreError as error:
        return f"resumed, then {type(error).__name__}"
    possible = {State((*state.trajectories, rows_of(77, True))) for state in allowed if isinstance(state, State)}
    if found not in possible:
        raise Violation(f"{what}, resumed: read as {found}, instead of {possible}")
    return "resumed"


def lost_and_old_files() -> Counter[str]:
    """Each file lost, and each put back in each of its older versions."""
    counts: Counter[str] = Counter()
    kept, states = versions("afraf")
    files, last = kept[-1], states[len(kept) - 1]
    for key in files:
        if key.startswith(PRIVATE):
            continue
        allowed = {last}
        without = {name: data for name, data in files.items() if name != key}
        counts[read(without, allowed, f"{key} lost")] += 1
        counts[go_on(without, allowed, f"{key} lost")] += 1
        for number, older in enumerate(kept[:-1]):
            if key in older and older[key] != files[key]:
                # An older manifest is an older commit, which is whole: nobody can tell but by a newer one kept beside.
                known = {last, states[number]} if key == ROOT else allowed
                changed = {**files, key: older[key]}
                counts[read(changed, known, f"{key} as after commit {number}")] += 1
                counts[go_on(changed, known, f"{key} as after commit {number}")] += 1
    if counts["read right"] == sum(counts.values()):
        raise Violation("no damage was noticed")
    return counts


def flips(files: Files, draw: random.Random) -> Iterator[tuple[str, Files]]:
    """Files damaged at random."""
    keys = [key for key in files if not key.startswith(PRIVATE) and files[key]]
    shards = [key for key in keys if not key.endswith(ROOT)]
    while True:
        key = draw.choice(shards) if draw.random() < 0.5 else draw.choice([ROOT, *keys])
        data = bytearray(files[key])
        kind = draw.choice(["bit", "byte", "digit", "zeros", "cut", "longer", "splice", "exchange"])
        at = draw.randrange(len(data))
        if kind == "bit":
            data[at] ^= 1 << draw.randrange(8)
        elif kind == "byte":
            data[at] = draw.randrange(256)
        elif kind == "digit":
            digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
            if digits:
                data[draw.choice(digits)] = draw.randrange(48, 58)
        elif kind == "zeros":
            data[at : at + 512] = bytes(len(data[at : at + 512]))
        elif kind == "cut":
            del data[at:]
        elif kind == "longer":
            data += draw.randbytes(draw.randrange(1, 64))
        elif kind == "splice":
            other = files[draw.choice(keys)]
            start = draw.randrange(len(other))
            data[at : at + 64] = other[start : start + 64]
        else:
            data = bytearray(files[draw.choice(shards)])
        yield f"{key}: {kind} at {at}", {**files, key: bytes(data)}


def forgeries(files: Files, draw: random.Random) -> Iterator[tuple[str, Files]]:
    """Files forged on purpose: every checksum right, and what they say a lie."""
    shards = [key for key in files if "/c." in key and not key.startswith(PRIVATE)]
    while True:
        key = draw.choice(shards)
        data = bytearray(files[key])
        # Chunks of 2 rows and shards of 4: two entries, then the checksum of both.
        entries = list(struct.unpack_from("<4Q", data, len(data) - 36))
        chunk = draw.randrange(2)
        offset, size = entries[2 * chunk : 2 * chunk + 2]
        kind = draw.choice(["index", "header", "body"])
        if kind == "index" or offset > len(data) or size < 24:
            entries[draw.randrange(4)] = draw.choice(
                [0, 1, 15, 16, 20, 2**31, 2**62, 2**63, 2**64 - 1, 2**64 - 2, len(data)]
            )
            struct.pack_into("<4Q", data, len(data) - 36, *entries)
            struct.pack_into("<I", data, len(data) - 4, crc32c(bytes(data[-36:-4])))
        else:
            if kind == "header":
                field = draw.choice([0, 1, 2, 3, 4, 8, 12])
                value = draw.choice([0, 1, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, draw.randrange(2**32)])
                if field < 4:
                    data[offset + field] = value & 0xFF
                else:
                    struct.pack_into("<I", data, offset + field, value)
            else:
                data[offset + 16 + draw.randrange(max(size - 20, 1))] = draw.randrange(256)
            struct.pack_into("<I", data, offset + size - 4, crc32c(bytes(data[offset : offset + size - 4])))
        yield f"{key}: forged {kind}", {**files, key: bytes(data)}


def signed(root: dict[str, Any]) -> bytes:
    """A root with the checksum that it should have."""
    root["attributes"]["trajstore"]["crc32c"] = root_checksum(root)
    return json.dumps(root).encode()


def hostile_roots() -> Iterator[tuple[str, Callable[[dict[str, Any]], bytes]]]:
    """Manifests that are no manifests, or that ask for too much."""

    def with_rows(root: dict[str, Any], rows: int) -> bytes:
        for metadata in root["consolidated_metadata"]["metadata"].values():
            if metadata["node_type"] == "array":
                metadata["shape"][0] = rows
        root["attributes"]["trajstore"]["sets"]["rows"] = [[0, rows]]
        return signed(root)

    def with_tail(root: dict[str, Any], length: int) -> bytes:
        for tail in root["attributes"]["trajstore"]["tails"].values():
            tail[1] = length
        return signed(root)

    def with_path(root: dict[str, Any], path: str) -> bytes:
        root["attributes"]["trajstore"]["schema"]["fields"]["x"]["array"] = path
        root["attributes"]["trajstore"]["arrays"].append(path)
        metadata = root["consolidated_metadata"]["metadata"]
        metadata[path] = metadata["steps/x"]
        return signed(root)

    yield "deep", lambda root: b"[" * 100_000
    yield "deep objects", lambda root: b'{"a":' * 100_000
    yield "huge number", lambda root: b'{"attributes":' + b"9" * 100_000 + b"}"
    yield "not text", lambda root: b"\xff\xfe\x00"
    yield "empty", lambda root: b""
    yield "a list", lambda root: b"[]"
    yield "nothing", lambda root: b"{}"
    for rows in (2**31, 2**53, 2**62, 2**63, 2**70, -1):
        yield f"{rows} rows", lambda root, rows=rows: with_rows(root, rows)  # type: ignore[misc]
    for length in (0, 1, 35, 2**31, 2**63, 2**70):
        yield f"a tail of {length} bytes", lambda root, length=length: with_tail(root, length)  # type: ignore[misc]
    for path in ("../../etc", "/etc", "steps/../../x", "steps//x", "__trajstore/x", "", "steps/x\x00", "C:\\x"):
        yield f"an array at {path!r}", lambda root, path=path: with_path(root, path)  # type: ignore[misc]


def campaign(count: int, seed: int = 0) -> Counter[str]:
    """So many files damaged at random, half of them forged."""
    draw = random.Random(seed)
    counts: Counter[str] = Counter()
    kept, states = versions("afraf")
    files, last = kept[-1], states[len(kept) - 1]
    damaged, forged = flips(files, draw), forgeries(files, draw)
    for number in range(count):
        if number % 4 == 3:
            what, changed = next(forged)
            try:  # a forger can make any data he likes, but not crash us or make us lose our errors
                with tiny_shards():
                    recover(disk_of(changed).storage())
                counts["forged: read"] += 1
            except TrajstoreError as error:
                counts[f"forged: {type(error).__name__}"] += 1
            except Exception as error:
                raise Violation(f"{what}: {error!r}") from error
            continue
        what, changed = next(damaged)
        outcome = read(changed, {last}, what)
        counts[outcome] += 1
        if number % 16 == 0 and "exchange" not in what:
            counts[go_on(changed, {last}, what)] += 1
    counts["damaged"] = count
    return counts
