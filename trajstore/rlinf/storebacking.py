"""Batches on disk in a store, each environment a trajectory; what is not committed yet is sampled from a copy."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from trajstore.dataset import Dataset
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import FormatError, SchemaError
from trajstore.format.layout import column_array
from trajstore.format.schema import Column, Field
from trajstore.rlinf.backing import LENGTH, Entry
from trajstore.rlinf.batch import BATCH, CLOCKS, ENV, NUMBER, VALUES, WEIGHTS, Batch, fields_of, nested
from trajstore.rlinf.flat import Tensors, assembled, copied, take
from trajstore.sampling.cutting import Cut
from trajstore.sampling.replayindex import LiveIndex, LiveRows
from trajstore.sampling.windows import Ints, ticks
from trajstore.writer import Writer, create

_WAITING_BYTES = 256 << 20


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
        leading = dataset[first]
        table, names, steps = leading.table, list(leading.table), leading.lengths.tolist()
        longest = table[LENGTH].tolist() if LENGTH in names else [-1] * len(first)
        weights = table[WEIGHTS].tolist() if WEIGHTS in names else [None] * len(first)
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
