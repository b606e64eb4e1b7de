"""Where batches lie that are not in memory: their own folder of files, or a store; both give single rows of them."""

from __future__ import annotations

import atexit
import os
import shutil
import time
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from trajstore.dataset import Dataset
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import FormatError, NotFoundError, SchemaError
from trajstore.format.layout import column_array
from trajstore.format.schema import Column, Field
from trajstore.media.storage import LocalStorage
from trajstore.rlinf.batch import BATCH, CLOCKS, ENV, NUMBER, VALUES, WEIGHTS, Batch, batch_of, fields_of, nested
from trajstore.rlinf.files import load_batch, save_batch
from trajstore.rlinf.flat import Tensors, assembled, copied, flatten, put, take
from trajstore.rlinf.folder import batch_files, file_name, read_folder, write_index
from trajstore.sampling.cutting import Cut
from trajstore.sampling.replayindex import LiveIndex, LiveRows
from trajstore.sampling.windows import Ints, ticks
from trajstore.writer import Writer, create

Entry = dict[str, Any]

LENGTH = "max_episode_length"
_OPEN_FILES = 64
_SAVERS = 4  # threads; they wait for the disk
_WAITING_BYTES = 256 << 20
_INDEX_SHARE = 0.05  # the index on disk is written again when it lacks so large a part,
_INDEX_SECONDS = 5.0  # or when it is so old


class Backing(Protocol):
    """Batches on disk."""

    def rows(self, numbers: Ints, rows: Ints) -> Tensors:
        """Row ``rows[i]`` of batch ``numbers[i]``, by path; the fields that all of them have."""

    def whole(self, number: int) -> Batch:
        """A batch as it was given."""


class Files:
    """A buffer folder, ``trajectory_{id}_{…}.pt|pkl``; read by mapping files, of which a few stay open."""

    def __init__(self, folder: str | os.PathLike[str], entries: Mapping[int, Entry], names: Mapping[int, str]) -> None:
        self.folder, self.entries, self.names = os.fspath(folder), dict(entries), dict(names)
        self._open: OrderedDict[int, tuple[Batch, Tensors]] = OrderedDict()

    def rows(self, numbers: Ints, rows: Ints) -> Tensors:
        found: Tensors = {}
        unique = np.unique(numbers).tolist()
        known = [self._flat(number) for number in unique]
        paths = [path for path in known[0] if all(path in flat for flat in known)]
        for number, flat in zip(unique, known):
            mine = np.flatnonzero(numbers == number)
            for path in paths:
                if path not in found:
                    found[path] = torch.empty((len(rows), *flat[path].shape[1:]), dtype=flat[path].dtype)
                put(found[path], mine, take(flat[path], rows[mine]))
        return found

    def whole(self, number: int) -> Batch:
        return self._batch(number)[0]

    def _flat(self, number: int) -> Tensors:
        return self._batch(number)[1]

    def _batch(self, number: int) -> tuple[Batch, Tensors]:
        known = self._open.get(number)
        if known is None:
            name = self.names[number]
            batch = batch_of(_mapped(self.folder, name), os.path.join(self.folder, name))
            known = self._open[number] = batch, flatten(batch, name)[0]
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return known


def _call(method: weakref.WeakMethod[Any]) -> None:
    found = method()
    if found is not None:
        found()


def unlisted(folder: str, known: Mapping[int, Any], kind: str) -> tuple[dict[int, Entry], dict[int, str]]:
    """Whole batch files newer than all that an index names, which it lacks because its writer was killed."""
    entries: dict[int, Entry] = {}
    names: dict[int, str] = {}
    for number, name in sorted(batch_files(LocalStorage(folder))):
        if number > max(known, default=-1) and name.endswith(kind):
            try:
                batch = batch_of(_mapped(folder, name), name)
            except (FormatError, SchemaError):
                continue  # the one that it was writing
            entries[number], names[number] = entry_of(number, batch), name
    return entries, names


def entry_of(number: int, batch: Batch) -> Entry:
    """What an index says of a batch."""
    shape = next(
        (batch.tensors[name].shape for name in ("prev_logprobs", "rewards", "actions") if name in batch.tensors),
        (batch.steps, batch.envs),
    )
    return {
        "num_samples": batch.steps * batch.envs,
        "trajectory_id": number,
        LENGTH: batch.plain.get(LENGTH),
        "shape": [int(n) for n in shape],
        WEIGHTS: str(batch.plain.get(WEIGHTS, "")),
    }


def _mapped(folder: str, name: str) -> dict[str, Any]:
    """A batch file's dict; of a ``.pt`` only those pages are read that are looked at."""
    if name.endswith(".pt"):
        try:
            value = torch.load(os.path.join(folder, name), map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # written by a torch of old, which cannot be mapped; or damaged
            value = None
        if isinstance(value, dict):
            return value
    return load_batch(LocalStorage(folder), name)


class FileWriter(Files):
    """A buffer folder that grows: files first, in threads, the index after them."""

    def __init__(self, folder: str | os.PathLike[str], kind: str) -> None:
        os.makedirs(folder, exist_ok=True)
        self._storage = LocalStorage(folder)
        self._before: dict[int, Entry] = {}
        try:
            known = read_folder(self._storage)
            self._before = {number: dict(known.entries[number]) for number in known.files}
        except NotFoundError:
            pass
        super().__init__(folder, {}, {})
        self.kind = kind
        self._threads = ThreadPoolExecutor(_SAVERS, thread_name_prefix="trajstore-rlinf")
        self._saving: OrderedDict[int, Future[None]] = OrderedDict()
        self.lost: list[int] = []  # could not be saved; whoever knows of them takes them out
        self._unlisted, self._listed_at = 0, time.monotonic()
        self._beyond = max([number for number, _ in batch_files(self._storage)], default=-1) + 1
        self._metadata: Mapping[str, Any] = {}
        self._at_exit = weakref.WeakMethod(self._finish)
        atexit.register(_call, self._at_exit)

    @property
    def next_number(self) -> int:
        """An id that no file has."""
        return max([*self.entries, self._beyond - 1]) + 1

    def add(self, number: int, value: Mapping[str, Any], entry: Entry, metadata: Mapping[str, Any]) -> None:
        """Save a batch in the background; ``value`` may not change any more. Raises what an earlier save has raised."""
        while len(self._saving) >= 4 * _SAVERS:
            self._saved(next(iter(self._saving)))
        name = file_name(number, str(entry["model_weights_id"]), self.kind)
        self.names[number], self.entries[number] = name, entry
        self._saving[number] = self._threads.submit(save_batch, self._storage, name, value)
        self._unlisted, self._metadata = self._unlisted + 1, metadata
        late = time.monotonic() - self._listed_at > _INDEX_SECONDS
        if late or self._unlisted > _INDEX_SHARE * len(self.entries):
            self._list(metadata)

    def _saved(self, number: int) -> None:
        """Wait until a batch is on disk; one that could not be written is forgotten, and its error raised."""
        future = self._saving.pop(number, None)
        if future is not None:
            try:
                future.result()
            except BaseException:
                del self.names[number], self.entries[number]
                self.lost.append(number)
                raise

    def _list(self, metadata: Mapping[str, Any]) -> None:
        """Write an index that names what is on disk by now."""
        for number in [number for number, future in self._saving.items() if future.done()]:
            self._saved(number)
        there = [number for number in self.entries if number not in self._saving]
        ids = [*(number for number in self._before if number not in self.entries), *there]
        entries = {**self._before, **self.entries}
        samples = sum(int(entries[number]["num_samples"]) for number in ids)
        write_index(self._storage, entries, ids, {**metadata, "size": len(ids), "total_samples": samples})
        self._unlisted, self._listed_at = len(self._saving), time.monotonic()

    def _finish(self) -> None:
        """At the end of a process that did not close its buffer."""
        if self._unlisted:
            self.flush(self._metadata)

    def flush(self, metadata: Mapping[str, Any]) -> None:
        """Have everything on disk and in the index. Raises what could not be saved."""
        for number in list(self._saving):
            self._saved(number)
        self._list(metadata)

    def close(self, metadata: Mapping[str, Any]) -> None:
        try:
            self.flush(metadata)
        finally:
            atexit.unregister(self._at_exit)
            self._threads.shutdown()

    def _batch(self, number: int) -> tuple[Batch, Tensors]:
        self._saved(number)
        return super()._batch(number)


class Stored:
    """Batches in a store; with a writer, also those that it has not committed yet."""

    def __init__(self) -> None:
        self._index: LiveIndex | None = None
        self._first: dict[int, int] = {}  # place of each batch's first environment
        self.entries: dict[int, Entry] = {}

    def rows(self, numbers: Ints, rows: Ints) -> Tensors:
        index = self._index
        if index is None or not len(numbers):
            return {}
        envs = np.array([self.entries[number]["shape"][1] for number in numbers.tolist()], np.int64)
        places = np.array([self._first[number] for number in numbers.tolist()], np.int64) + rows % envs
        steps = rows // envs
        return {
            path: self._tensor(source, path, places, steps)
            for path, source in index.sources.items()
            if bool((source.counts[places] >= 0).all())
        }

    def _tensor(self, source: LiveRows, path: str, places: Ints, steps: Ints) -> torch.Tensor:
        index = self._index
        assert index is not None
        lengths, counts = index.lengths[places], source.counts[places]
        if path == VALUES:
            extra = np.maximum(counts - lengths, 0)
            at = np.where(extra > 0, steps + steps // np.maximum(lengths // np.maximum(extra, 1), 1), steps)
        else:
            at = ticks(source.clock, steps[:, None], lengths, counts)[0][:, 0]
        return _as_tensor(source.take(places, at), source.dtype)

    def whole(self, number: int) -> Batch:
        index = self._index
        assert index is not None
        entry = self.entries[number]
        steps, envs = entry["shape"][:2]
        tensors = {}
        places = self._first[number] + np.arange(envs)
        for path, source in index.sources.items():
            count = int(source.counts[places[0]])
            if count >= 0:
                rows = source.take(np.tile(places, count), np.repeat(np.arange(count), envs))
                tensors[path] = _as_tensor(rows, source.dtype).reshape(count, envs, *source.shape)
        plain = {LENGTH: entry[LENGTH], WEIGHTS: entry[WEIGHTS]}
        return Batch(steps, envs, 0, tensors, {name: value for name, value in plain.items() if value is not None})

    def open(self, dataset: Dataset) -> None:
        """Take in the batches of a store. Raises ``FormatError`` if their environments do not stand together."""
        if not len(dataset):
            return
        snapshot = dataset.snapshots[0]
        if len(dataset.snapshots) > 1:
            raise FormatError("a buffer is loaded from one store", hint="merge the stores first")
        paths = [path for path, spec in dataset.fields.items() if not spec.whole]
        self._index = LiveIndex(Cut(None), paths, bits=True)
        self._index.refresh(snapshot)
        first, envs = _runs(dataset)
        steps = dataset.lengths[first].tolist()
        longest = dataset.table[LENGTH][first].tolist() if LENGTH in list(dataset.table) else [-1] * len(first)
        weights = _strings(dataset, WEIGHTS, first)
        for number, (start, count) in enumerate(zip(first.tolist(), envs.tolist())):
            self._first[number] = start
            self.entries[number] = {
                "num_samples": steps[number] * count,
                "trajectory_id": number,
                LENGTH: None if longest[number] < 0 else longest[number],
                "shape": [steps[number], count],
                WEIGHTS: weights[number],
            }


def _runs(dataset: Dataset) -> tuple[Ints, Ints]:
    """The first trajectory of each batch, and how many there are. Raises ``FormatError`` if they are scattered."""
    table = dataset.table
    if BATCH not in list(table) or ENV not in list(table):
        return np.arange(len(dataset), dtype=np.int64), np.ones(len(dataset), np.int64)
    batch = table[BATCH]
    first = np.flatnonzero(np.diff(batch, prepend=batch[0] - 1))
    envs = np.diff(np.r_[first, len(batch)])
    inside = np.arange(len(batch)) - np.repeat(first, envs)
    if len(np.unique(batch[first])) != len(first) or bool((table[ENV] != inside).any()):
        raise FormatError("the environments of a batch do not stand side by side", hint="merge without an order")
    return first, envs


def _strings(dataset: Dataset, field: str, trajectories: Ints) -> list[str | None]:
    """The strings of a field, all by one gather."""
    if field not in dataset.fields:
        return [None] * len(trajectories)
    pairs = dataset.field_pairs(field)[trajectories]
    ends = np.cumsum(pairs[:, 1] - pairs[:, 0]).tolist()
    data = dataset.read(field, trajectories).tobytes()
    found = [data[a:b].decode("utf-8", "replace") for a, b in zip([0, *ends], ends)]
    return [None if start < 0 else text for start, text in zip(pairs[:, 0].tolist(), found)]


class StoreWriter(Stored):
    """A store that grows: each environment of a batch is appended as a trajectory."""

    def __init__(self, folder: str | os.PathLike[str], **options: Any) -> None:
        super().__init__()
        plain = {WEIGHTS: Field("string")}
        columns = {BATCH: Column("int64"), ENV: Column("int64"), NUMBER: Column("int64"), LENGTH: Column("int64", -1)}
        settings = {"clocks": CLOCKS, "columns": columns, "fields": plain, "resume": True, **options}
        self.writer: Writer = create(folder, **settings)
        self._seen = -1
        self._waiting: OrderedDict[int, Tensors] = OrderedDict()  # rows of batches that no commit holds yet
        self._waiting_bytes = 0
        self._count = self.next_number = 0
        head = self.writer.head
        self._paths = [path for path, spec in self.writer.schema.fields.items() if not spec.whole]
        if head is not None and len(self.writer):
            snapshot = Snapshot(self.writer.storage, head)
            rows = np.arange(head.arrays[column_array(BATCH)][1])
            self.next_number = int(snapshot.column(BATCH, rows).max()) + 1
            self._count = len(snapshot.live)

    def add(self, number: int, batch: Batch, flat: Tensors, entry: Entry) -> None:
        """Append a batch; it can be sampled at once, from a copy of its rows, until a commit holds it."""
        writer, weights = self.writer, entry[WEIGHTS]
        if not self._paths:
            writer.declare(fields=fields_of(batch))
            self._paths = list(batch.tensors)
        if unknown := set(batch.tensors) - set(self._paths):
            raise SchemaError(
                f"the first batch of the store had no field {min(unknown)!r}",
                hint="give it from the first batch on, or save as 'pt'",
            )
        if self._waiting_bytes > _WAITING_BYTES:
            writer.commit()
            self._refresh()
        absent = dict.fromkeys(self._paths)
        # Arrays are checked faster than tensors; of bfloat16 there are none.
        tensors = {p: t if t.dtype == torch.bfloat16 else t.numpy() for p, t in batch.tensors.items()}
        for env, rows in enumerate(replace(batch, tensors=tensors).trajectories()):
            columns = {BATCH: number, ENV: env, NUMBER: number, LENGTH: -1 if entry[LENGTH] is None else entry[LENGTH]}
            trajectory = {**absent, **rows, WEIGHTS: None if weights is None else str(weights)}
            writer.append(nested(trajectory), **columns)
        self._waiting[number] = {path: copied(rows) for path, rows in flat.items()}
        self._waiting_bytes += sum(rows.nbytes for rows in flat.values())
        self._first[number] = self._count
        self._count += batch.envs
        self.entries[number] = entry

    def rows(self, numbers: Ints, rows: Ints) -> Tensors:
        self._refresh()
        waiting = np.array([number in self._waiting for number in numbers.tolist()], np.bool_)
        parts = [(places := np.flatnonzero(~waiting), super().rows(numbers[places], rows[places]))]
        if not waiting.any():
            return parts[0][1]
        if waiting.all():
            parts = []
        for number in np.unique(numbers[waiting]).tolist():
            places = np.flatnonzero(numbers == number)
            parts.append((places, {path: take(held, rows[places]) for path, held in self._waiting[number].items()}))
        return assembled(len(rows), parts)

    def _refresh(self) -> None:
        """Take in what was committed since the last time."""
        head = self.writer.head
        if head is None or head.commit.number == self._seen:
            return
        self._seen = head.commit.number
        if self._index is None:
            if not head.schema.fields or not len(self._paths):
                return
            self._index = LiveIndex(Cut(None), self._paths, bits=True)
        self._index.refresh(Snapshot(self.writer.storage, head))
        there = len(self._index.ids)
        for number in list(self._waiting):
            if self._first[number] + self.entries[number]["shape"][1] <= there:
                del self._waiting[number]
        self._waiting_bytes = sum(rows.nbytes for held in self._waiting.values() for rows in held.values())


def _as_tensor(rows: Any, dtype: str) -> torch.Tensor:
    if dtype == "bfloat16":
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(rows)


def link_or_copy(source: str, target: str) -> None:
    """Give a finished file a second name, or where that cannot be, a copy."""
    if os.path.exists(target):
        if os.path.samefile(source, target):
            return
        os.remove(target)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
