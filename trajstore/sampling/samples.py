"""Samples of a dataset by number: single steps, windows, transitions, whole trajectories; batches as NumPy arrays."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trajstore.dataset import Dataset
from trajstore.engine.gather import ArrayReader
from trajstore.engine.index import spans
from trajstore.errors import NotFoundError, SchemaError
from trajstore.format.expression import Expression
from trajstore.sampling.cutting import MASK, Cut, Shape, known_clock
from trajstore.sampling.windows import Ints, WindowIndex

Array = np.ndarray[Any, Any]


_BLOCK = 64


class FieldRows:
    """Rows of one field of a dataset, with every lookup done beforehand.

    Attributes
    ----------
    starts, counts : of each trajectory, int64 (n,); a count of -1 where it does not have the field.
    clock : how its rows lie against the steps. A clock that says nothing of it, but on which every trajectory has as
        many rows as steps (or one more), counts as such a one.
    readers : of each store, ``None`` where it lacks the field.
    dtype : as declared, a str; ``take`` gives bfloat16 as float32, or as its bits (uint16) if asked for ``bits``.
    """

    def __init__(self, dataset: Dataset, path: str, *, bits: bool = False) -> None:
        try:
            spec = dataset.fields[path]
        except KeyError:
            raise NotFoundError(
                f"there is no field {path!r}", hint=f"there are {', '.join(dataset.fields) or 'none'}"
            ) from None
        if spec.whole:
            raise SchemaError(f"field {path!r} holds {spec.dtype}, which makes no batch", hint="leave it out")
        self.path, self.dtype, self.shape = path, spec.dtype, spec.shape
        pairs = dataset.field_pairs(path)
        self.starts = pairs[:, 0]
        self.counts = np.where(pairs[:, 0] < 0, -1, pairs[:, 1] - pairs[:, 0])
        self._part = dataset.locate(np.arange(len(dataset), dtype=np.int64))[0]
        self.readers: list[ArrayReader | None] = []
        clocks = set()
        for snapshot in dataset.snapshots:
            own = snapshot.manifest.schema.fields.get(path)
            if own is None:
                self.readers.append(None)
                continue
            raw = bits and own.dtype == "bfloat16"
            self.readers.append(snapshot.reader(own.array) if raw else snapshot.field(path))
            clocks.add(snapshot.manifest.schema.clocks[str(own.clock)])
        self.clock = known_clock(clocks, self.counts, dataset.lengths)
        self.array_dtype = next(reader.dtype for reader in self.readers if reader is not None)

    def take(self, trajectories: Ints, rows: Ints) -> Array:
        """Row ``rows[i]`` of trajectory ``trajectories[i]``, (n, *shape)."""
        absolute = self.starts[trajectories] + rows
        if len(self.readers) == 1 and self.readers[0] is not None:
            return self.readers[0].take(absolute)
        part = self._part[trajectories]
        out = np.empty((len(rows), *self.shape), self.array_dtype)
        for p in np.unique(part).tolist():
            mine = part == p
            reader = self.readers[p]
            if reader is not None:
                out[mine] = reader.take(absolute[mine])
        return out


class Samples:
    """A dataset cut into samples that have numbers.

    Parameters
    ----------
    fields : which to read; by default all but strings and documents, and but those of which nothing says how their
        rows lie against the steps.
    columns : columns to give along with each sample.
    bits : give bfloat16 as its bits, uint16, instead of as float32.

    Notes
    -----
    Any number of threads may read. Pickles small, and in a forked child opens its files anew.
    """

    def __init__(
        self, dataset: Dataset, *, fields: Sequence[str] | None = None, columns: Sequence[str] = (), bits: bool = False
    ) -> None:
        self.dataset = dataset
        self._arguments: dict[str, Any] = {"fields": fields, "columns": columns, "bits": bits}
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self.lengths = self.dataset.lengths
        arguments = self._arguments
        if arguments["fields"] is None:
            known = [path for path, spec in self.dataset.fields.items() if not spec.whole]
            found = [FieldRows(self.dataset, path, bits=arguments["bits"]) for path in known]
            self.fields = {rows.path: rows for rows in found if self._fits(rows)}
        else:
            self.fields = {path: FieldRows(self.dataset, path, bits=arguments["bits"]) for path in arguments["fields"]}
        self._columns = {name: self.dataset.table[name] for name in arguments["columns"]}
        if clash := set(self._reserved) & {path.partition("/")[0] for path in (*self.fields, *self._columns)}:
            raise SchemaError(f"a field or column called {clash.pop()!r} has no place in these batches")

    _reserved: tuple[str, ...] = (MASK,)

    def _fits(self, rows: FieldRows) -> bool:
        return rows.clock.relation not in ("none", "timestamps")

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "_arguments": self._arguments}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __len__(self) -> int:
        raise NotImplementedError

    def get(self, numbers: Any) -> dict[str, Array]:
        """The samples of these numbers, int (n,), as one batch: by path, (n, ...)."""
        if os.getpid() != self._pid:
            # A thread of the parent may have held a lock of the cache when this process was forked.
            self.__setstate__(pickle.loads(pickle.dumps(self.__getstate__())))
        chosen = np.asarray(numbers, np.int64)
        chosen = np.where(chosen < 0, chosen + len(self), chosen)
        if len(chosen) and not (int(chosen.min()) >= 0 and int(chosen.max()) < len(self)):
            raise NotFoundError(f"there are {len(self)} samples, counted from 0; one beyond was asked for")
        return self._read(chosen)

    def _read(self, numbers: Ints) -> dict[str, Array]:
        raise NotImplementedError

    def trajectory_of(self, numbers: Ints) -> Ints:
        """The trajectory of samples by number."""
        raise NotImplementedError

    @property
    def sample_lengths(self) -> Ints:
        """How long each sample is; for orders that put equal lengths together."""
        return np.ones(len(self), np.int64)

    @property
    def block(self) -> int:
        """Neighbouring samples that share the chunks of the widest field; a good block for an order of blocks."""
        layouts = [reader.layout for rows in self.fields.values() for reader in rows.readers if reader is not None]
        widest = max(layouts, key=lambda layout: layout.row_bytes, default=None)
        return max(_BLOCK, 2 * widest.chunk_rows if widest is not None else 0)

    def weights(self, what: Any) -> Array:
        """A weight for each sample, float64 (len,), from a column, a filter over columns, or given weights.

        what : the name of a column (or ``"length"``): each sample has its trajectory's value; a filter as
            ``Dataset.where`` takes it: 1 where it holds, else 0; an array, of a weight for each sample or trajectory.
        """
        if isinstance(what, str):
            table = self.dataset.table
            if what in list(table):
                if table[what].dtype == object:
                    raise SchemaError(
                        f"column {what!r} holds texts, which weigh nothing", hint=f"a filter: {what} == ''"
                    )
                values = np.asarray(table[what], np.float64)
            else:
                parsed = Expression(what)
                parsed.check(list(table))
                mask = parsed.evaluate({name: table[name] for name in parsed.names})
                values = np.broadcast_to(mask, (len(self.dataset),)).astype(np.float64)
        else:
            values = np.asarray(what, np.float64)
            if values.shape == (len(self),):
                return values
        if values.shape != (len(self.dataset),):
            raise SchemaError(
                f"weights of shape {values.shape} fit neither {len(self)} samples nor {len(self.dataset)} trajectories"
            )
        return values[self.trajectory_of(np.arange(len(self)))]

    @property
    def identity(self) -> dict[str, Any]:
        """What the numbers mean; the same samples have the same. JSON can hold it."""
        part, row = self.dataset.locate(np.arange(len(self.dataset), dtype=np.int64))
        digest = hashlib.blake2b(part.tobytes() + row.tobytes(), digest_size=8).hexdigest()
        commits = [snapshot.manifest.commit.uuid for snapshot in self.dataset.snapshots]
        return {"commits": commits, "trajectories": digest, "samples": self._describe()}

    def _describe(self) -> str:
        return type(self).__name__

    def _of_columns(self, trajectories: Ints) -> dict[str, Array]:
        return {name: values[trajectories] for name, values in self._columns.items()}


class CutSamples(Samples):
    """Samples of fixed shape: windows, transitions, or single steps; never across a trajectory's ends.

    A batch holds each field as (n, h, *shape) of windows, as (n, *shape) of single steps. Where windows may stick out
    of their trajectory, ``mask`` tells which rows are real: (n, h) bool; where fields have offsets of their own,
    ``mask/<field>`` for each. What transitions hold: see ``Transitions``. A trajectory without one of the fields gives
    no samples.
    """

    def __init__(
        self,
        dataset: Dataset,
        shape: Shape = None,
        *,
        fields: Sequence[str] | None = None,
        columns: Sequence[str] = (),
        bits: bool = False,
    ) -> None:
        self.dataset = dataset
        self._arguments = {"shape": shape, "fields": fields, "columns": columns, "bits": bits}
        self._start()

    def _start(self) -> None:
        self._cut = Cut(self._arguments["shape"])
        self._reserved = self._cut.reserved
        super()._start()
        self._cut.check(self.fields)
        self._usable = self._cut.usable(self.fields, self.lengths, np.arange(len(self.dataset), dtype=np.int64))
        self._index = WindowIndex(self._cut.window, self._usable)

    def __len__(self) -> int:
        return len(self._index)

    def trajectory_of(self, numbers: Ints) -> Ints:
        return self._index.locate(numbers)[0]

    def locate(self, numbers: Ints) -> tuple[Ints, Ints]:
        """The trajectory and the anchor step of each sample."""
        return self._index.locate(numbers)

    def _read(self, numbers: Ints) -> dict[str, Array]:
        trajectories, anchors = self._index.locate(numbers)
        batch = self._cut.read(self.fields, self.lengths, self._usable, trajectories, anchors)
        return batch | self._of_columns(trajectories)

    def _describe(self) -> str:
        return f"{self._cut.shape}, observations after the last: {self._cut.all_after(self.fields)}"


class TrajectorySamples(Samples):
    """Whole trajectories.

    A batch holds each field as (n, longest, *shape), zeros behind a trajectory's end, and ``count/<field>``, its rows
    of each: int64 (n,). ``end_to_end`` gives the rows without padding.
    """

    _reserved = ("count",)

    def _fits(self, rows: FieldRows) -> bool:
        return True

    def __len__(self) -> int:
        return len(self.dataset)

    def trajectory_of(self, numbers: Ints) -> Ints:
        return numbers

    @property
    def sample_lengths(self) -> Ints:
        return self.lengths

    def end_to_end(self, numbers: Ints) -> dict[str, tuple[Array, Ints]]:
        """By path, all rows of these trajectories (rows, *shape), and how many are whose, int64 (n,)."""
        found = {}
        for path, rows in self.fields.items():
            counts = np.maximum(rows.counts[numbers], 0)
            within = spans(np.zeros_like(counts), counts)
            found[path] = rows.take(np.repeat(numbers, counts), within), counts
        return found

    def _read(self, numbers: Ints) -> dict[str, Array]:
        batch = self._of_columns(numbers)
        for path, (rows, counts) in self.end_to_end(numbers).items():
            longest = int(counts.max(initial=0))
            padded = np.zeros((len(numbers), longest, *rows.shape[1:]), rows.dtype)
            padded[np.arange(longest) < counts[:, None]] = rows
            batch[path] = padded
            batch[f"count/{path}"] = counts
        return batch


def nested(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch by path as nested dicts: ``curr_obs/image`` becomes ``["curr_obs"]["image"]``."""
    made: dict[str, Any] = {}
    for path, value in batch.items():
        *folders, name = path.split("/")
        place = made
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return made
