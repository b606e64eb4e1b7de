"""The manifest: what one commit says exists; parsed from, and written as, the root ``zarr.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any

from trajstore.errors import CorruptionError, FormatError, UnsupportedFormatError
from trajstore.format.checksum import crc32c
from trajstore.format.encoding import array_attributes, set_layout
from trajstore.format.intervals import IntervalSet
from trajstore.format.layout import SETS, ArrayLayout, group_metadata
from trajstore.format.schema import Schema, check_path

MAJOR, MINOR = 1, 0
#: Features that a reader, or a writer, must know to go on; docs/spec.md says what each means.
KNOWN_FEATURES = frozenset({"deleted", "sets"})
#: Sets of more intervals stand in arrays of their own (``sets/``).
INLINE_INTERVALS = 1000
SET_NAMES = ("rows", "deleted", "attempted", "completed")

MAX_BYTES = 64 << 20
_MAX_DEPTH = 64


@dataclass(frozen=True)
class Shard:
    """One shard file as a commit knows it: its number, and length and CRC-32 of its bytes up to there."""

    number: int
    length: int
    crc32: int

    def to_json(self) -> list[int]:
        return [self.number, self.length, self.crc32]

    @classmethod
    def from_json(cls, value: Any) -> Shard:
        if not isinstance(value, list) or len(value) != 3 or not all(type(n) is int and n >= 0 for n in value):
            raise FormatError(f"not a shard: {value!r:.100}")
        return cls(*value)


@dataclass(frozen=True)
class SetArray:
    """An array (``encoding.set_layout``) of intervals, named ``name``."""

    name: str
    intervals: int
    shards: tuple[Shard, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "array": f"{SETS}/{self.name}",
            "intervals": self.intervals,
            "shards": [shard.to_json() for shard in self.shards],
        }

    @classmethod
    def from_json(cls, value: Any) -> SetArray:
        folder, _, name = check_path(value["array"], "array").rpartition("/")
        if folder != SETS:
            raise FormatError(f"a set lies in {folder!r}")
        return cls(name, _int(value["intervals"]), tuple(Shard.from_json(shard) for shard in value["shards"]))


@dataclass(frozen=True)
class StoredSet:
    """An interval set that is too large for the manifest: the union of arrays, and of the rest."""

    arrays: tuple[SetArray, ...]
    rest: IntervalSet = field(default_factory=IntervalSet)


@dataclass(frozen=True)
class Commit:
    """Which commit this is. time : seconds since the epoch, UTC. session : uuid of the writer session."""

    number: int
    uuid: str
    parent: str
    time: float
    session: str
    software: str


@dataclass(frozen=True)
class Manifest:
    """One commit, whole.

    arrays : layout and number of rows of each array that is read.
    names : of every array there ever was, in the order of their first commit; a seal names an array by its place here.
    tails : the last, unsealed shard of each array. seals : the shards of the seals array itself.
    sets : ``rows`` of the table that are trajectories, ``deleted`` ones among them, seeds ``attempted`` and
        ``completed``.
    counts : ``trajectories``, ``steps`` (rows of the main clock) and ``next_id``.
    session : when the writer session of this commit began and what was there then.
    """

    commit: Commit
    created: float
    schema: Schema
    arrays: Mapping[str, tuple[ArrayLayout, int]]
    names: tuple[str, ...] = ()
    tails: Mapping[str, Shard] = field(default_factory=dict)
    seals: tuple[Shard, ...] = ()
    sets: Mapping[str, IntervalSet | StoredSet] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    session: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    progress: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def features(self) -> list[str]:
        needed = []
        deleted = self.sets.get("deleted")
        if isinstance(deleted, StoredSet) or (deleted is not None and len(deleted)):
            needed.append("deleted")
        if any(isinstance(self.sets.get(name), StoredSet) for name in ("rows", "deleted")):
            needed.append("sets")
        return needed

    @property
    def set_arrays(self) -> tuple[SetArray, ...]:
        """The arrays that sets lie in, each once."""
        stored = [value for value in self.sets.values() if isinstance(value, StoredSet)]
        return tuple({array.name: array for value in stored for array in value.arrays}.values())

    def children(self) -> dict[str, dict[str, Any]]:
        """The metadata of every group and array, sorted by depth, then name."""
        arrays = {spec.array: array_attributes(spec) for spec in self.schema.fields.values()}
        nodes = {path: layout.metadata(rows, arrays.get(path)) for path, (layout, rows) in self.arrays.items()}
        for array in self.set_arrays:
            nodes[f"{SETS}/{array.name}"] = set_layout(array.name).metadata(array.intervals)
        for path in list(nodes):
            parts = path.split("/")
            for depth in range(1, len(parts)):
                nodes.setdefault("/".join(parts[:depth]), group_metadata())
        return {path: nodes[path] for path in sorted(nodes, key=lambda path: (path.count("/"), path))}

    def to_bytes(self) -> bytes:
        """The root ``zarr.json``."""
        body = {
            "format": {"major": MAJOR, "minor": MINOR, "reader_required": self.features, "writer_required": []},
            "commit": vars(self.commit),
            "created": self.created,
            "counts": dict(self.counts),
            "sets": {name: _set_to_json(value) for name, value in self.sets.items()},
            "schema": self.schema.to_json(),
            "arrays": list(self.names),
            "tails": {path: shard.to_json() for path, shard in self.tails.items()},
            "seals": [shard.to_json() for shard in self.seals],
            "session": dict(self.session),
            "config": dict(self.config),
            "progress": dict(self.progress),
        }
        root = group_metadata({**self.attributes, "trajstore": body})
        root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": self.children()}
        body["crc32c"] = root_checksum(root)
        return json.dumps(root, allow_nan=False, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes, place: str) -> Manifest:
        """Parse a root ``zarr.json``.

        Raises ``FormatError`` if it is no store's, ``CorruptionError`` if it is damaged and
        ``UnsupportedFormatError`` if it is of a newer format. ``place`` is named in each.
        """
        root = _parse(data, place)
        attributes = root.get("attributes") if isinstance(root, dict) else None
        body = attributes.get("trajstore") if isinstance(attributes, dict) else None
        if not isinstance(body, dict) or not isinstance(attributes, dict):
            raise FormatError(
                f"{place} is JSON, but not of a trajstore store", hint="other Zarr data can be taken in with `import`"
            )
        _check_version(body.get("format"), place)
        try:
            if body["crc32c"] != root_checksum(root):
                raise FormatError("it does not match its crc32c")
            metadata = root["consolidated_metadata"]["metadata"]
            names = tuple(check_path(path, "array") for path in body["arrays"])
            arrays = {path: ArrayLayout.from_metadata(path, metadata[path]) for path in names if path in metadata}
            schema = Schema.from_json(body["schema"])
            for path, spec in schema.fields.items():
                layout = arrays[spec.array][0]
                if layout.dtype != spec.stored or layout.row_shape != spec.shape:
                    raise FormatError(f"field {path} and its array disagree")
            commit = body["commit"]
            return cls(
                commit=Commit(
                    _int(commit["number"]),
                    str(commit["uuid"]),
                    str(commit["parent"]),
                    float(commit["time"]),
                    str(commit["session"]),
                    str(commit["software"]),
                ),
                created=float(body["created"]),
                schema=schema,
                arrays=arrays,
                names=names,
                tails={check_path(path, "array"): Shard.from_json(value) for path, value in body["tails"].items()},
                seals=tuple(Shard.from_json(value) for value in body["seals"]),
                sets={name: _set_from_json(body["sets"][name]) for name in SET_NAMES},
                counts={name: _int(body["counts"][name]) for name in ("trajectories", "steps", "next_id")},
                session=dict(body["session"]),
                config=dict(body["config"]),
                progress=dict(body["progress"]),
                attributes={name: value for name, value in attributes.items() if name != "trajstore"},
            )
        except UnsupportedFormatError:
            raise
        except (AttributeError, FormatError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise CorruptionError(
                f"the manifest {place} is damaged: {error}",
                hint="it was not touched; `trajstore repair` lists the older manifests that can be opened",
            ) from error


def root_checksum(root: Mapping[str, Any]) -> str:
    """CRC-32C (eight hex digits) of what a root ``zarr.json`` says of the store, however it is laid out as text."""
    body = {name: value for name, value in root["attributes"]["trajstore"].items() if name != "crc32c"}
    said = [body, root["consolidated_metadata"]["metadata"]]
    return f"{crc32c(json.dumps(said, sort_keys=True, separators=(',', ':')).encode()):08x}"


def _parse(data: bytes, place: str) -> Any:
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"{len(data)} bytes")
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(
            f"the manifest {place} cannot be read as JSON ({error})",
            hint="it was not touched; `trajstore repair` lists the older manifests that can be opened",
        ) from error


def _check_version(version: Any, place: str) -> None:
    try:
        major = _int(version["major"])
        required = [str(name) for name in version["reader_required"]]
    except (FormatError, KeyError, TypeError) as error:
        raise CorruptionError(f"the manifest {place} names no format version") from error
    unknown = sorted(set(required) - KNOWN_FEATURES)
    if major > MAJOR or unknown:
        what = f"format {major}" if major > MAJOR else f"the feature {', '.join(unknown)!r:.200}"
        raise UnsupportedFormatError(
            f"{place} needs {what}, this is a reader of format {MAJOR}.{MINOR}", hint="pip install --upgrade trajstore"
        )


def writer_may(manifest_bytes: bytes, place: str) -> None:
    """Raise ``UnsupportedFormatError`` if the store asks its writers for a feature that this version lacks."""
    version = _parse(manifest_bytes, place)["attributes"]["trajstore"]["format"]
    unknown = sorted(set(map(str, version.get("writer_required", []))) - KNOWN_FEATURES)
    if unknown or version.get("minor", 0) > MINOR:
        raise UnsupportedFormatError(
            f"{place} was written by a newer version, which this one may read but not continue",
            hint="pip install --upgrade trajstore",
        )


def _int(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise FormatError(f"not a count: {value!r:.100}")
    return value


def _set_to_json(value: IntervalSet | StoredSet) -> Any:
    if not isinstance(value, StoredSet):
        return value.to_json()
    parts = [array.to_json() for array in value.arrays]
    return parts[0] if len(parts) == 1 and not value.rest else {"union": [*parts, value.rest.to_json()]}


def _set_from_json(value: Any) -> IntervalSet | StoredSet:
    if not isinstance(value, dict):
        return IntervalSet.from_json(value)
    parts = value.get("union", [value])
    rest = [part for part in parts if not isinstance(part, dict)]
    return StoredSet(
        tuple(SetArray.from_json(part) for part in parts if isinstance(part, dict)),
        reduce(or_, map(IntervalSet.from_json, rest), IntervalSet()),
    )
