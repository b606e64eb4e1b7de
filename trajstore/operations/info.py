"""What there is to know of a store without reading its data."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from trajstore.dataset import Dataset, Place, open
from trajstore.engine.seals import load_seals
from trajstore.engine.snapshot import Snapshot
from trajstore.format.layout import LOCK, SEALS, SETS, column_array
from trajstore.format.manifest import MAJOR, MINOR, StoredSet
from trajstore.format.progress import Progress
from trajstore.format.schema import CODED, Field
from trajstore.media.hdf5storage import Hdf5Storage
from trajstore.media.shard import parse_index
from trajstore.operations.shardcheck import shards_in_hdf5


@dataclass(frozen=True)
class FieldInfo:
    """One field.

    stored : dtype on disk. rows : that trajectories name. bytes_raw : of those, in the field's own dtype.
    """

    name: str
    dtype: str
    stored: str
    shape: tuple[int, ...]
    clock: str
    codec: str
    rows: int
    bytes_raw: int
    bytes_disk: int

    @property
    def ratio(self) -> float | None:
        return self.bytes_raw / self.bytes_disk if self.bytes_disk else None


@dataclass(frozen=True)
class ClockInfo:
    """One clock. relation : against the main one (see ``trajstore.Clock``). rows : ticks of all trajectories."""

    name: str
    relation: str
    rows: int
    fields: tuple[str, ...]


@dataclass(frozen=True)
class ColumnInfo:
    """One column."""

    name: str
    dtype: str
    default: float | int | bool | None
    bytes_disk: int


@dataclass(frozen=True)
class PartInfo:
    """One store of the dataset.

    commit, committed, age : number of the last commit, its time in seconds since the epoch, and seconds since.
    files, bytes_disk : shard files that the commit names, and their bytes.
    writer : pid, host and time of the living process that writes to it, ``None`` where there is none.
    session_trajectories, session_steps, session_seconds : what the writer session of the last commit had stored by
        then, and in which time.
    """

    path: str
    commit: int
    committed: float
    age: float
    created: float
    software: str
    trajectories: int
    steps: int
    files: int
    bytes_disk: int
    writer: Mapping[str, Any] | None
    session_trajectories: int
    session_steps: int
    session_seconds: float


@dataclass(frozen=True)
class Info:
    """What there is to know of a dataset.

    target : sum of the parts' targets, ``None`` where one has none.
    current_seed : the seed after the highest attempted.
    length_min, length_max, length_mean : steps of a trajectory, ``None`` where there is none.
    rate_trajectories, rate_steps : a second, of the latest writer sessions together; ``None`` if they stored nothing.
    forced : changes of the configuration that a resume with ``force=True`` made.
    config_differs : whether the parts were collected under different configurations; ``config`` is the first one's.
    """

    path: str
    format: str
    trajectories: int
    deleted: int
    steps: int
    target: int | None
    unique: str | None
    current_seed: int | None
    seeds_attempted: int
    seeds_completed: int
    length_min: int | None
    length_max: int | None
    length_mean: float | None
    bytes_raw: int
    bytes_disk: int
    rate_trajectories: float | None
    rate_steps: float | None
    parts: tuple[PartInfo, ...]
    fields: tuple[FieldInfo, ...]
    clocks: tuple[ClockInfo, ...]
    columns: tuple[ColumnInfo, ...]
    config: Mapping[str, Any]
    config_files: Mapping[str, str]
    config_differs: bool
    forced: tuple[Mapping[str, Any], ...]
    state: Mapping[str, Any]

    @property
    def ratio(self) -> float | None:
        """Bytes that the trajectories have in memory for each byte on disk."""
        return self.bytes_raw / self.bytes_disk if self.bytes_disk else None

    @property
    def remaining(self) -> int | None:
        return None if self.target is None else max(self.target - self.trajectories - self.deleted, 0)

    @property
    def writing(self) -> bool:
        """Whether a writer lives."""
        return any(part.writer is not None for part in self.parts)


def info(path: Place | Sequence[Place]) -> Info:
    """Describe a store, or all that ``trajstore.open`` would open, as of its last commit.

    Raises what :func:`trajstore.open` raises. Reads the manifest and the clocks.
    """
    dataset = open(path)
    now = time.time()
    snapshots = dataset.snapshots
    shards = [_shards(snapshot) for snapshot in snapshots]
    disk = [{path: sum(lengths) for path, lengths in of.items()} for of in shards]
    parts = tuple(_part(snapshot, list(chain(*of.values())), now) for snapshot, of in zip(snapshots, shards))
    clocks = _clocks(dataset)
    fields = _fields(dataset, {clock.name: clock.rows for clock in clocks}, disk)
    lengths = dataset.lengths
    attempted = [snapshot.set("attempted") for snapshot in snapshots]
    manifests = [snapshot.manifest for snapshot in snapshots]
    targets = [manifest.progress.get("target") for manifest in manifests]
    columns = tuple(
        ColumnInfo(name, spec.dtype, spec.default, sum(sizes.get(column_array(name), 0) for sizes in disk))
        for name, spec in dataset.columns.items()
    )
    return Info(
        path=snapshots[0].place if len(snapshots) == 1 else str(path),
        format=f"{MAJOR}.{MINOR}",
        trajectories=len(dataset),
        deleted=sum(len(snapshot.set("deleted")) for snapshot in snapshots),
        steps=int(lengths.sum()),
        target=None if None in targets else sum(filter(None, targets)),
        unique=manifests[0].progress.get("unique"),
        current_seed=max((seeds.max() + 1 for seeds in attempted if seeds), default=None),
        seeds_attempted=sum(map(len, attempted)),
        seeds_completed=sum(len(snapshot.set("completed")) for snapshot in snapshots),
        length_min=int(lengths.min()) if len(lengths) else None,
        length_max=int(lengths.max()) if len(lengths) else None,
        length_mean=float(lengths.mean()) if len(lengths) else None,
        bytes_raw=sum(field.bytes_raw for field in fields)
        + len(dataset) * sum(np.dtype(column.dtype).itemsize for column in columns),
        bytes_disk=sum(part.bytes_disk for part in parts),
        rate_trajectories=_rate((part.session_trajectories, part.session_seconds) for part in parts),
        rate_steps=_rate((part.session_steps, part.session_seconds) for part in parts),
        parts=parts,
        fields=fields,
        clocks=clocks,
        columns=columns,
        config=manifests[0].config.get("values", {}),
        config_files=manifests[0].config.get("files", {}),
        config_differs=len({manifest.config.get("fingerprint") for manifest in manifests}) > 1,
        forced=tuple(change for manifest in manifests for change in manifest.config.get("forced", [])),
        state=Progress.state_from_json(manifests[0].progress)[1],
    )


def _shards(snapshot: Snapshot) -> dict[str, list[int]]:
    """The committed length of each shard file, by array."""
    lengths: dict[str, list[int]] = {}
    manifest, storage = snapshot.manifest, snapshot.storage
    if isinstance(storage, Hdf5Storage):
        for layout, shard in shards_in_hdf5(storage, manifest):
            key, begins = layout.shard_key(shard.number), shard.length - layout.index_bytes
            index = parse_index(storage.read(key, begins, shard.length), layout, shard.length)
            lengths.setdefault(layout.path, []).append(int(index[index[:, 0] >= 0, 1].sum()))
        return lengths
    shards = [(path, shard) for (path, _), shard in load_seals(storage, manifest).items()]
    shards += [*manifest.tails.items(), *((SEALS, shard) for shard in manifest.seals)]
    for path, shard in shards:
        if path in manifest.arrays:
            lengths.setdefault(path, []).append(shard.length)
    for name, stored in manifest.sets.items():
        if isinstance(stored, StoredSet):
            lengths[f"{SETS}/{name}"] = [shard.length for array in stored.arrays for shard in array.shards]
    return lengths


def _part(snapshot: Snapshot, lengths: Sequence[int], now: float) -> PartInfo:
    manifest = snapshot.manifest
    commit, counts, session = manifest.commit, manifest.counts, manifest.session
    return PartInfo(
        path=snapshot.place,
        commit=commit.number,
        committed=commit.time,
        age=now - commit.time,
        created=manifest.created,
        software=commit.software,
        trajectories=len(snapshot.live),
        steps=counts["steps"],
        files=len(lengths),
        bytes_disk=sum(lengths),
        writer=snapshot.storage.holder(LOCK),
        session_trajectories=counts["trajectories"] - int(session.get("trajectories", 0)),
        session_steps=counts["steps"] - int(session.get("steps", 0)),
        session_seconds=max(commit.time - float(session.get("started", commit.time)), 0.0),
    )


def _clocks(dataset: Dataset) -> tuple[ClockInfo, ...]:
    found = {}
    for snapshot in dataset.snapshots:
        for name, spec in snapshot.manifest.schema.clocks.items():
            if name not in found:
                pairs = dataset.pairs(name)
                rows = int((pairs[:, 1] - pairs[:, 0]).sum())
                found[name] = ClockInfo(name, spec.relation, rows, tuple(snapshot.manifest.schema.on_clock(name)))
    return tuple(found.values())


def _fields(dataset: Dataset, rows: Mapping[str, int], disk: Sequence[Mapping[str, int]]) -> tuple[FieldInfo, ...]:
    found = []
    for path, spec in dataset.fields.items():
        having = [(s.manifest, sizes) for s, sizes in zip(dataset.snapshots, disk) if path in s.manifest.schema.fields]
        codec = having[0][0].arrays[spec.array][0].codec
        found.append(
            FieldInfo(
                name=path,
                dtype=spec.dtype,
                stored=spec.stored.name,
                shape=spec.shape,
                clock=str(spec.clock),
                codec=f"{codec.cname} {codec.clevel}",
                rows=rows[str(spec.clock)],
                bytes_raw=rows[str(spec.clock)] * _row_bytes(spec),
                bytes_disk=sum(sizes.get(m.schema.fields[path].array, 0) for m, sizes in having),
            )
        )
    return tuple(found)


def _row_bytes(spec: Field) -> int:
    return np.dtype(CODED.get(spec.dtype, spec.dtype)).itemsize * math.prod(spec.shape)


def _rate(done: Any) -> float | None:
    """The sum of the sessions' rates."""
    rates = [count / seconds for count, seconds in done if count > 0 and seconds > 0]
    return sum(rates) if rates else None
