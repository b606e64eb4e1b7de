"""The trajectories of a live store that can be sampled, as they come, are committed, and leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trajstore.engine.intake import as_array, flatten
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import NotFoundError, SchemaError
from trajstore.format.encoding import converter
from trajstore.format.intervals import IntervalSet
from trajstore.format.schema import ID, MAIN_CLOCK, Clock, Field, Schema
from trajstore.sampling.cutting import Cut
from trajstore.sampling.windows import Ints

Array = np.ndarray[Any, Any]

_ABSENT = (-1, -1)
_PENDING = -2  # the start of rows that no commit holds yet


class Grown:
    """An array that grows at its end."""

    def __init__(self, dtype: Any, row_shape: tuple[int, ...] = ()) -> None:
        self._held = np.empty((64, *row_shape), dtype)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def values(self) -> Array:
        return self._held[: self._count]

    def extend(self, values: Any) -> None:
        count = self._count + len(values)
        if count > len(self._held):
            larger = np.empty((max(count, 2 * len(self._held)), *self._held.shape[1:]), self._held.dtype)
            larger[: self._count] = self.values
            self._held = larger
        self._held[self._count : count] = values
        self._count = count

    def copy(self) -> Grown:
        made = Grown(self._held.dtype, self._held.shape[1:])
        made.extend(self.values)
        return made

    def drop(self, count: int) -> None:
        """Forget the first ones."""
        kept = self.values[count:].copy()
        self._held, self._count = kept, len(kept)


class LiveRows:
    """Rows of one field, from the last commit or from memory; a ``cutting.RowSource``."""

    def __init__(self, index: LiveIndex, path: str, spec: Field, *, bits: bool) -> None:
        self._index, self.path, self.shape = index, path, spec.shape
        self.dtype = spec.dtype
        self._bits = bits and spec.dtype == "bfloat16"
        self._convert = None if self._bits or spec.dtype != "bfloat16" else converter(spec)
        self._array_dtype = spec.in_memory if self._convert is None else self._convert.dtype

    @property
    def _name(self) -> str:
        return str(self._index.schema.fields[self.path].clock)

    @property
    def counts(self) -> Ints:
        return self._index.pairs(self._name)[:, 1]

    @property
    def clock(self) -> Clock:
        return self._index.clock(self._name)

    def take(self, trajectories: Ints, rows: Ints) -> Array:
        starts = self._index.pairs(self._name)[trajectories, 0]
        waiting = starts == _PENDING
        if not waiting.any():
            return self._stored(starts + rows)
        out = np.empty((len(rows), *self.shape), self._array_dtype)
        if not waiting.all():
            out[~waiting] = self._stored(starts[~waiting] + rows[~waiting])
        for place in np.unique(trajectories[waiting]).tolist():
            mine = np.flatnonzero(trajectories == place)
            held = self._index.held(place)[self.path][rows[mine]]
            if self._convert is None:
                out[mine] = held
            else:
                values = np.empty(held.shape, self._array_dtype)
                self._convert(held, values)
                out[mine] = values
        return out

    def _stored(self, rows: Ints) -> Array:
        snapshot = self._index.snapshot
        assert snapshot is not None
        if self._bits:
            return snapshot.reader(snapshot.manifest.schema.fields[self.path].array).take(rows)
        return snapshot.field(self.path).take(rows)


class LiveIndex:
    """Numbered *places* of trajectories, oldest first, and *slots* of their samples, which never change.

    Slots count all samples there ever were, so that those of ``[low, high)`` are the ones that can be drawn now.

    Attributes
    ----------
    snapshot : the commit that rows are read from. schema : of the newest trajectory.
    low : the first place that was not dropped.
    held_bytes : of the rows that are in memory only.

    Notes
    -----
    Not locked.
    """

    def __init__(self, cut: Cut, fields: Sequence[str] | None, *, bits: bool) -> None:
        self.snapshot: Snapshot | None = None
        self.schema = Schema()
        self.sources: dict[str, LiveRows] = {}
        self.low = 0
        self._cut, self._fields, self._bits = cut, fields, bits
        self._ids = Grown(np.int64)
        self._rows = Grown(np.int64)  # of the table; -1 while in memory only
        self._usable = Grown(np.int64)
        self._ends = Grown(np.int64)  # slots
        self._step_ends = Grown(np.int64)  # steps of all trajectories there ever were
        self._pairs: dict[str, Grown] = {}
        self._lengths = Grown(np.int64)
        self.held_bytes = 0
        self._held: dict[int, dict[str, Array]] = {}
        self._places: dict[int, int] = {}  # of those that are held
        self._fits: dict[str, tuple[bool, bool]] = {}  # as many rows as steps, or one more, in every trajectory
        self._first_slot = self._first_step = 0
        self._next_row = 0
        self._next_id = 0

    # -- what there is ---------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Trajectories that can be sampled."""
        return len(self._ids) - self.low

    @property
    def ids(self) -> Ints:
        """Ids by place, the dropped ones included."""
        return self._ids.values

    @property
    def rows(self) -> Ints:
        """Rows of the table by place; -1 of those in memory only."""
        return self._rows.values

    @property
    def ends(self) -> Ints:
        """The slot behind the last sample of each place."""
        return self._ends.values

    @property
    def lengths(self) -> Ints:
        """Steps by place."""
        return self._lengths.values

    @property
    def usable(self) -> Ints:
        return self._usable.values

    def holding(self, steps: int) -> int:
        """The first of the places that hold the newest so many steps."""
        ends = self._step_ends.values
        newest = int(ends[-1]) if len(ends) else 0
        return max(self.low, int(np.searchsorted(ends, newest - steps, side="right")))

    def within(self, steps: int) -> int:
        """The first of the newest places that together hold at most so many steps; at the most the very newest."""
        ends = self._step_ends.values
        beyond = (int(ends[-1]) if len(ends) else 0) - steps
        first = int(np.searchsorted(ends, beyond, side="left")) + 1 if beyond > self._first_step else 0
        return max(self.low, min(first, len(ends) - 1))

    @property
    def steps(self) -> int:
        """Steps of the trajectories that were not dropped."""
        ends, low = self._step_ends.values, self.low
        return int(ends[-1]) - (int(ends[low - 1]) if low else self._first_step) if len(ends) else 0

    def slot(self, place: int) -> int:
        """The slot of the first sample of a place."""
        return int(self._ends.values[place - 1]) if place > 0 else self._first_slot

    @property
    def span(self) -> tuple[int, int]:
        """The slots that can be drawn, ``[low, high)``."""
        return self.slot(self.low), self.slot(len(self._ids))

    def locate(self, slots: Ints) -> tuple[Ints, Ints]:
        """The place of samples, and their numbers in it."""
        places = np.searchsorted(self.ends, slots, side="right")
        starts = np.where(places > 0, self.ends[places - 1], self._first_slot)
        return places, slots - starts

    def pairs(self, clock: str) -> Ints:
        """Start and count of each place on a clock, int64 (n, 2); the start is ``_PENDING`` while in memory."""
        found = self._pairs.get(clock)
        return found.values if found is not None else np.full((len(self._ids), 2), -1, np.int64)

    def clock(self, name: str) -> Clock:
        """How a clock lies against the steps, as far as can be known."""
        declared = self.schema.clocks[name]
        if declared.relation != "none":
            return declared
        same, one_more = self._fits.get(name, (False, False))
        return Clock("main") if same else Clock("last_row_extra") if one_more else declared

    def held(self, place: int) -> dict[str, Array]:
        """The rows of a trajectory that is in memory only."""
        return self._held[int(self._ids.values[place])]

    # -- what comes ------------------------------------------------------------------------------------------------

    def add(self, number: int, trajectory: Mapping[str, Any], columns: Mapping[str, Any], schema: Schema) -> None:
        """A trajectory that was appended, and is not committed yet: a copy of it is kept until it is."""
        for path, now in schema.fields.items():
            known, clock = self.schema.fields.get(path), str(now.clock)
            if known is not None and known.clock != clock and clock not in self._pairs:
                # The field was given a clock of its own, on which all before lies as on the old one.
                self._pairs[clock] = self._pairs[str(known.clock)].copy()
                self._fits[clock] = self._fits[str(known.clock)]
        self.schema = schema
        flat = flatten(trajectory, columns, schema)
        lengths: dict[str, int] = {}
        held = {}
        for path, value in flat.items():
            spec = schema.fields.get(path)
            if spec is None or spec.whole or value is None:
                continue
            rows = as_array(path, value)
            held[path] = np.array(rows, spec.in_memory, copy=True).reshape(len(rows), *spec.shape)
            lengths[str(spec.clock)] = len(rows)
        self._held[number] = held
        self.held_bytes += sum(rows.nbytes for rows in held.values())
        self._places[number] = len(self._ids)
        self._extend(
            np.array([number]),
            np.array([-1]),
            {name: np.array([(_PENDING, lengths[name]) if name in lengths else _ABSENT]) for name in schema.clocks},
        )

    def refresh(self, snapshot: Snapshot) -> None:
        """Take in what a newer commit holds."""
        self.snapshot = snapshot
        schema = snapshot.manifest.schema
        if not schema.clocks:
            return
        if not self._held:
            self.schema = schema
        live = snapshot.live - IntervalSet.span(0, self._next_row)
        rows = live.nth(np.arange(len(live), dtype=np.int64))
        for name in schema.clocks:
            if name not in self._pairs and len(self._ids):
                self._pairs[name] = Grown(np.int64, (2,))
                values = self._read_pairs(snapshot, name, self._rows.values)
                self._pairs[name].extend(values)
                self._judge(name, values[:, 1], self.lengths)
        if not len(rows):
            return
        self._next_row = int(rows[-1]) + 1
        ids = snapshot.column(ID, rows)
        pairs = {name: self._read_pairs(snapshot, name, rows) for name in schema.clocks}
        self._settle(ids, rows, pairs)
        new = ids >= self._next_id
        if new.any():
            self._extend(ids[new], rows[new], {name: values[new] for name, values in pairs.items()})

    def _settle(self, ids: Ints, rows: Ints, pairs: Mapping[str, Ints]) -> None:
        """Trajectories that were in memory are committed now."""
        known = np.array([number in self._held for number in ids.tolist()], np.bool_)
        if not known.any():
            return
        places = np.array([self._places.pop(number) for number in ids[known].tolist()], np.int64)
        self._rows.values[places] = rows[known]
        for name, values in pairs.items():
            self._pairs[name].values[places] = values[known]
        for number in ids[known].tolist():
            self._let_go(number)

    def _let_go(self, number: int) -> None:
        self.held_bytes -= sum(rows.nbytes for rows in self._held.pop(number, {}).values())

    @staticmethod
    def _read_pairs(snapshot: Snapshot, clock: str, rows: Ints) -> Ints:
        """Start and count, int64 (n, 2), by row of the table; where that is -1, as of a field that is not there."""
        found = np.full((len(rows), 2), -1, np.int64)
        there = rows >= 0
        stored = snapshot.pairs(clock, rows[there])
        found[there] = np.stack([stored[:, 0], stored[:, 1] - stored[:, 0]], 1)
        found[found[:, 0] < 0, 1] = -1
        return found

    def _extend(self, ids: Ints, rows: Ints, pairs: Mapping[str, Ints]) -> None:
        before = len(self._ids)
        lengths = np.maximum(pairs[MAIN_CLOCK][:, 1], 0)
        self._lengths.extend(lengths)
        done = int(self._step_ends.values[-1]) if before else self._first_step
        self._step_ends.extend(done + np.cumsum(lengths))
        self._ids.extend(ids)
        self._rows.extend(rows)
        self._next_id = max(self._next_id, int(ids.max()) + 1)
        for name, values in pairs.items():
            if name not in self._pairs:
                self._pairs[name] = Grown(np.int64, (2,))
                self._pairs[name].extend(np.full((before, 2), -1, np.int64))
            self._pairs[name].extend(values)
            self._judge(name, values[:, 1], lengths)
        for name, known in self._pairs.items():
            if name not in pairs:
                known.extend(np.full((len(ids), 2), -1, np.int64))
        if not self.sources:
            self._choose()
        places = np.arange(before, len(self._ids), dtype=np.int64)
        usable = self._cut.usable(self.sources, self.lengths, places)
        self._usable.extend(usable)
        self._ends.extend(self.slot(before) + np.cumsum(self._cut.counts(usable)))

    def _judge(self, clock: str, counts: Ints, lengths: Ints) -> None:
        """Learn from more trajectories how a clock lies against the steps."""
        same, one_more = self._fits.get(clock, (True, True))
        there = counts >= 0
        same = same and bool((counts == lengths)[there].all())
        one_more = one_more and bool((counts == lengths + 1)[there].all())
        self._fits[clock] = same, one_more

    def _choose(self) -> None:
        """The fields to read, as the first trajectories show them."""
        schema = self.schema
        for path in schema.fields if self._fields is None else self._fields:
            spec = schema.fields.get(path)
            if spec is None:
                raise NotFoundError(
                    f"there is no field {path!r}", hint=f"there are {', '.join(schema.fields) or 'none'}"
                )
            rows = LiveRows(self, path, spec, bits=self._bits)
            if spec.whole or (self._fields is None and rows.clock.relation in ("none", "timestamps")):
                if self._fields is not None:
                    raise SchemaError(f"field {path!r} holds {spec.dtype}, which makes no batch", hint="leave it out")
                continue
            self.sources[path] = rows
        self._cut.check(self.sources)
        if clash := set(self._cut.reserved) & {path.partition("/")[0] for path in self.sources}:
            raise SchemaError(f"a field called {clash.pop()!r} has no place in these batches", hint="name the others")

    # -- what leaves -----------------------------------------------------------------------------------------------

    def drop(self, count: int) -> Ints:
        """Let the oldest trajectories go; their ids. Their places stay until ``compact``."""
        gone = self._ids.values[self.low : self.low + count].copy()
        self.low += len(gone)
        return gone

    def compact(self, count: int) -> None:
        """Forget the first places, dropped ones: those behind move up, and slots stay what they are."""
        low = min(count, self.low)
        if not low:
            return
        for number in self._ids.values[:low].tolist():
            self._let_go(number)
            self._places.pop(number, None)
        self._places = {number: place - low for number, place in self._places.items()}
        self._first_slot, self._first_step = self.slot(low), int(self._step_ends.values[low - 1])
        of_all = self._ids, self._rows, self._lengths, self._step_ends, self._usable, self._ends
        for grown in (*of_all, *self._pairs.values()):
            grown.drop(low)
        self.low -= low
