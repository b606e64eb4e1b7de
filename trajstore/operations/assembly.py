"""A new store built aside from a plan, and given its name by one rename when it is whole."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Union

import numpy as np

from trajstore.__about__ import __version__
from trajstore.engine.commit import Session
from trajstore.engine.gather import ArrayReader
from trajstore.engine.index import spans
from trajstore.engine.seals import SealWriter
from trajstore.engine.sets import SetWriter
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import AlreadyExistsError, StorageError
from trajstore.format.encoding import clock_layout, column_layout
from trajstore.format.intervals import IntervalSet
from trajstore.format.layout import LOCK, PRIVATE, SEALS, ArrayLayout, metadata_key, temporary
from trajstore.format.manifest import Commit, Manifest, Shard
from trajstore.format.schema import Column, Schema
from trajstore.media.shardfile import bring_shard, write_shard
from trajstore.media.storage import LocalStorage, Storage, local_path
from trajstore.operations.plan import PART, START, STOP, TARGET, Encoded, Linked, Plan
from trajstore.operations.tasks import run

Ints = np.ndarray[Any, np.dtype[np.int64]]

#: A path, or a folder's storage and a name in it.
Destination = Union[str, "os.PathLike[str]", tuple[Storage, str]]
#: Called with the number of shards done and of all.
Report = Callable[[int, int], None]

_DISK_THREADS = 16  # they wait for the disk
_CHUNK_BYTES = 4 << 20  # raw bytes of a shard that are read and encoded at a time


@dataclass(frozen=True)
class Contents:
    """What a new store says beside the rows of its fields.

    columns : of the table, each with its values (n,). next_id, progress, config, attributes, sets : as the manifest
        holds them.
    """

    columns: Mapping[str, tuple[Column, np.ndarray[Any, Any]]]
    next_id: int
    progress: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    sets: Mapping[str, IntervalSet] = field(default_factory=dict)


def refuse_existing(parent: Storage, name: str) -> None:
    """Raise ``AlreadyExistsError`` if anything but an empty folder has that name."""
    if parent.size(name) is not None or parent.list(name):
        raise AlreadyExistsError(
            f"{parent.describe(name)} exists", hint="nothing was touched; choose another destination, or remove it"
        )


def located(destination: Destination) -> tuple[Storage, str]:
    """The folder in which a destination will stand, and its name there."""
    if isinstance(destination, tuple):
        return destination
    parent, name = os.path.split(local_path(destination))
    return LocalStorage(parent), name


class Scaffold:
    """The folder beside a destination in which it is built; a context manager that holds the folder's lock.

    What a build before this one left there, killed midway, is removed first; what one that failed has made, at once.
    """

    def __init__(self, destination: Destination) -> None:
        self.parent, self.name = located(destination)
        self.folder = temporary("", self.name)
        self.storage = self.parent.child(self.folder)
        self._session: Session | None = None
        self._published = False

    def __enter__(self) -> Session:
        """The session of the folder itself, for a destination that is one store."""
        refuse_existing(self.parent, self.name)
        self.parent.make_root()
        session = Session(self.storage)
        while self.storage.size(LOCK) is None:  # whoever held it removed the folder, and this lock is nobody's
            session.close()
            session = Session(self.storage)
        self._session = session
        try:
            refuse_existing(self.parent, self.name)  # whoever had the lock before may have been making it
            _empty(self.storage)
        except BaseException:
            session.close()
            raise
        return session

    def publish(self) -> None:
        """Give the folder the destination's name. All that lies in it must be durable."""
        refuse_existing(self.parent, self.name)
        self.parent.rename(self.folder, self.name)
        self._published = True
        self.parent.sync_folder("")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None and not self._published:
                self.parent.remove(self.folder)
        except StorageError:
            pass  # what is left is removed by the next build; the error that ended this one matters more
        finally:
            if self._session is not None:
                self._session.close()


def _empty(storage: Storage) -> None:
    for name in storage.list(""):
        if name != PRIVATE:
            storage.remove(name)
    for name in storage.list(PRIVATE):
        if f"{PRIVATE}/{name}" != LOCK:
            storage.remove(f"{PRIVATE}/{name}")


def make_folder(storage: Storage, folder: str) -> None:
    try:
        storage.make_folder(folder)
    except AlreadyExistsError:
        pass


def build(
    session: Session,
    plan: Plan,
    contents: Contents,
    *,
    link: bool = True,
    client: Any = None,
    report: Report | None = None,
) -> Manifest:
    """Fill an empty folder with the store that a plan describes: durable, whole and committed on return.

    Parameters
    ----------
    session : of the folder.
    link : whether shard files may be shared with the sources; otherwise they are copied.
    client : a ``dask.distributed.Client`` that runs the encoding of shards; see ``tasks.run``.
    """
    schema = replace(plan.union.schema, columns={name: column for name, (column, _) in contents.columns.items()})
    tables = [(clock_layout(name), axis.pairs) for name, axis in plan.axes.items()]
    tables += [(column_layout(name, column), values) for name, (column, values) in contents.columns.items()]
    arrays = {spec.array: (plan.layouts[path], plan.axes[str(spec.clock)].rows) for path, spec in schema.fields.items()}
    arrays |= {layout.path: (layout, len(plan)) for layout, _ in tables}
    total = len(plan.linked) + len(plan.encoded)

    def tell(done: int) -> None:
        if report is not None:
            report(done, total)

    storage = session.storage
    folders = _make_folders(storage, [*arrays, SEALS])
    with ThreadPoolExecutor(_DISK_THREADS, thread_name_prefix="trajstore-disk") as disk:
        tell(0)
        writing = [write_table(storage, layout, values, disk) for layout, values in tables]
        shards = _link(storage, plan, link, disk, tell)
        common = _Encoding(storage, plan.snapshots)
        made = run(_encode, plan.encoded, common, client=client, report=lambda done: tell(len(plan.linked) + done))
        shards += [(task.layout.path, shard) for task, shard in zip(plan.encoded, made)]
        shards += [entry for written in writing for entry in written()]
        manifest = _manifest(session, plan, contents, schema, arrays, shards, disk)
        # Nobody sees any of it before the folder gets its name: all must be durable by then, in whatever order.
        children = [disk.submit(_write_child, storage, *child) for child in manifest.children().items()]
        session.publish(manifest)
        for child in children:
            child.result()
        list(disk.map(storage.sync_folder, folders))
    return manifest


# -- shards ------------------------------------------------------------------------------------------------------------


def _link(
    storage: Storage, plan: Plan, link: bool, disk: ThreadPoolExecutor, tell: Callable[[int], None]
) -> list[tuple[str, Shard]]:
    def bring(item: Linked) -> tuple[str, Shard]:
        source = plan.snapshots[item.part]
        layout = source.manifest.arrays[item.array][0]
        origin = source.storage, layout.shard_key(item.source)
        return item.layout.path, bring_shard(storage, item.layout, item.number, origin, item.shard, link=link)[0]

    found = []
    for done, entry in enumerate(disk.map(bring, plan.linked), 1):
        found.append(entry)
        tell(done)
    return found


@dataclass(frozen=True)
class _Encoding:
    """What every task needs; it travels to each worker once."""

    storage: Storage
    snapshots: tuple[Snapshot, ...]


def _encode(task: Encoded, common: _Encoding) -> Shard:
    return write_shard(common.storage, task.layout, task.number, _chunks(task, common.snapshots))


def _chunks(task: Encoded, snapshots: Sequence[Snapshot]) -> Iterator[tuple[int, np.ndarray[Any, Any] | bytes]]:
    """The chunks of a shard that hold rows: those that keep their borders as frames, the others as rows."""
    first = task.number * task.layout.chunks_per_shard
    readers = {
        part: _reader(snapshots[part], task.path, task.plainly[part]) for part in np.unique(task.runs[:, PART]).tolist()
    }
    moved, runs = _movable(task)
    for part, chunks, ahead in moved:
        for chunk, frame in readers[part].frames(chunks):
            yield chunk + ahead - first, frame
    if len(runs):
        yield from _encoded_chunks(task, runs, readers)


def _movable(task: Encoded) -> tuple[list[tuple[int, Ints, int]], Ints]:
    """Whole chunks of stores, each with how far ahead it goes, and the runs of rows that are left."""
    size = task.layout.chunk_rows
    starts, targets = task.runs[:, START], task.runs[:, TARGET]
    stops = targets + task.runs[:, STOP] - starts
    lows, highs = -(-targets // size), stops // size
    whole = np.array(task.chunkwise)[task.runs[:, PART]] & ((targets - starts) % size == 0) & (lows < highs)
    moved = []
    left = [task.runs[~whole]]
    for (part, start, stop, target), low, high in zip(
        task.runs[whole].tolist(), lows[whole].tolist(), highs[whole].tolist()
    ):
        ahead = (target - start) // size
        moved.append((part, np.arange(low - ahead, high - ahead), ahead))
        before, behind = low * size - target, target + stop - start - high * size
        left.append(np.array([[part, start, start + before, target], [part, stop - behind, stop, high * size]]))
    rest = np.concatenate(left)
    rest = rest[rest[:, START] < rest[:, STOP]]
    return moved, rest[np.argsort(rest[:, TARGET], kind="stable")]


def _encoded_chunks(
    task: Encoded, runs: Ints, readers: Mapping[int, ArrayReader]
) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """Chunks of rows, read a few at a time."""
    layout = task.layout
    first = task.number * layout.shard_rows
    starts, counts = runs[:, TARGET] - first, runs[:, STOP] - runs[:, START]
    size = layout.chunk_rows
    step = size * max(1, _CHUNK_BYTES // layout.chunk_bytes)
    for block in range(0, layout.shard_rows, step):
        low = int(np.searchsorted(starts + counts, block, side="right"))
        high = int(np.searchsorted(starts, block + step, side="left"))
        if low >= high:
            continue
        rows = np.full((step, *layout.row_shape), layout.fill, layout.dtype)
        held = np.zeros(step, np.bool_)
        parts = runs[low:high, PART]
        skipped = np.maximum(block - starts[low:high], 0)
        begin = starts[low:high] + skipped
        end = np.minimum(starts[low:high] + counts[low:high], block + step)
        origin = runs[low:high, START] + skipped
        for part in np.unique(parts).tolist():
            mine = parts == part
            place = spans(begin[mine] - block, end[mine] - block)
            rows[place] = readers[part].take(spans(origin[mine], origin[mine] + (end - begin)[mine]))
            held[place] = True
        for at in np.flatnonzero(held.reshape(-1, size).any(axis=1)).tolist():
            yield block // size + at, rows[at * size : (at + 1) * size]


def _reader(snapshot: Snapshot, path: str, plainly: bool) -> ArrayReader:
    if plainly:
        return snapshot.reader(snapshot.manifest.schema.fields[path].array)
    return snapshot.field(path)


# -- the table ---------------------------------------------------------------------------------------------------------


def write_table(
    storage: Storage, layout: ArrayLayout, values: np.ndarray[Any, Any], disk: Executor
) -> Callable[[], list[tuple[str, Shard]]]:
    """Begin to write an array of the table whole, ``values`` (n, *row_shape); call the result for its shards."""

    def write(first: int) -> Shard:
        rows, size = values[first : first + layout.shard_rows], layout.chunk_rows
        chunks = ((at // size, rows[at : at + size]) for at in range(0, len(rows), size))
        return write_shard(storage, layout, first // layout.shard_rows, chunks)

    written = disk.map(write, range(0, len(values), layout.shard_rows))
    return lambda: [(layout.path, shard) for shard in written]


def _write_child(storage: Storage, path: str, metadata: dict[str, Any]) -> None:
    storage.write(metadata_key(path), [json.dumps(metadata, allow_nan=False, separators=(",", ":")).encode()])


# -- the commit --------------------------------------------------------------------------------------------------------


def _make_folders(storage: Storage, arrays: Sequence[str]) -> list[str]:
    """Make the folder of each array; all folders, those inside before those around them."""
    folders: set[str] = set()
    for path in arrays:
        make_folder(storage, path)
        parts = path.split("/")
        folders |= {"/".join(parts[:depth]) for depth in range(len(parts) + 1)}
    return sorted(folders, key=lambda folder: (-folder.count("/"), folder == "", folder))


def _manifest(
    session: Session,
    plan: Plan,
    contents: Contents,
    schema: Schema,
    arrays: Mapping[str, tuple[ArrayLayout, int]],
    shards: Sequence[tuple[str, Shard]],
    disk: Executor,
) -> Manifest:
    storage, token = session.storage, session.uuid
    names = [*arrays, SEALS]
    place = {name: i for i, name in enumerate(names)}
    seals = SealWriter(storage, token, disk, None)
    seals.add((place[path], shard) for path, shard in shards)
    empty = {"deleted": IntervalSet(), "attempted": IntervalSet(), "completed": IntervalSet()}
    sets = {**empty, **contents.sets, "rows": IntervalSet.span(0, len(plan))}
    now = session.clock()
    return Manifest(
        commit=Commit(session.next_number(), uuid.uuid4().hex, "", now, token, f"trajstore {__version__}"),
        created=now,
        schema=schema,
        arrays={**arrays, SEALS: (seals.layout, seals.rows)},
        names=tuple(names),
        seals=seals.shards,
        sets=SetWriter(storage, token, disk).store(sets),
        counts={"trajectories": len(plan), "steps": plan.steps, "next_id": contents.next_id},
        session={"started": now, "trajectories": 0, "steps": 0, "pid": os.getpid()},
        config=contents.config,
        progress=contents.progress,
        attributes=contents.attributes,
    )
