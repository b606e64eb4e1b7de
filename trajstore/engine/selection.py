"""Trajectories of several stores, read as one sequence: where each of them lies, and what all of them hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from trajstore.engine.gather import ArrayReader
from trajstore.engine.index import locate, spans
from trajstore.engine.snapshot import Snapshot
from trajstore.engine.trajectory import Trajectory
from trajstore.errors import NotFoundError, SchemaError
from trajstore.format.schema import MAIN_CLOCK, Column, Field, Schema
from trajstore.format.union import filling

Array = np.ndarray[Any, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]

_BLOCK = 1024  # trajectories that are located at once by whoever iterates


class Selection:
    """Trajectories by number, those of the first store first; immutable.

    Parameters
    ----------
    snapshots : the stores, each as one commit left it.
    part, row : int64 (n,) each, of every trajectory the number of its store and its row in the table there; without
        them all that are live.

    Notes
    -----
    Any number of threads may read.
    """

    def __init__(self, snapshots: tuple[Snapshot, ...], part: Ints | None = None, row: Ints | None = None) -> None:
        self._snapshots = snapshots
        self._counts = np.array([len(snapshot.live) for snapshot in snapshots], np.int64)
        self._part, self._row = part, row
        self._pairs: dict[str, Ints] = {}
        self._columns: dict[str, Array] = {}

    def __len__(self) -> int:
        return int(self._counts.sum()) if self._row is None else len(self._row)

    def __iter__(self) -> Iterator[Trajectory]:
        for first in range(0, len(self), _BLOCK):
            numbers = np.arange(first, min(first + _BLOCK, len(self)), dtype=np.int64)
            part, row = self.locate(numbers)
            for number, p, r in zip(numbers.tolist(), part.tolist(), row.tolist()):
                yield Trajectory(self._snapshots[p], r, number)

    # -- what there is ---------------------------------------------------------------------------------------------

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """The stores, each as one commit left it."""
        return self._snapshots

    @property
    def fields(self) -> dict[str, Field]:
        """The fields by path; those of all stores together."""
        return {path: spec for s in reversed(self._snapshots) for path, spec in s.manifest.schema.fields.items()}

    @property
    def columns(self) -> dict[str, Column]:
        """The columns by name, ``id`` among them."""
        return {name: spec for s in reversed(self._snapshots) for name, spec in s.manifest.schema.columns.items()}

    @property
    def schema(self) -> Schema:
        """Fields, clocks and columns of the first store."""
        return self._snapshots[0].manifest.schema

    @property
    def lengths(self) -> Ints:
        """Number of steps of each trajectory, int64 (n,)."""
        pairs = self.pairs(MAIN_CLOCK)
        return pairs[:, 1] - pairs[:, 0]

    # -- the table -------------------------------------------------------------------------------------------------

    def locate(self, numbers: Ints) -> tuple[Ints, Ints]:
        """Store and row in its table, int64 (n,) each, of trajectories by number."""
        if self._row is not None and self._part is not None:
            return self._part[numbers], self._row[numbers]
        if len(self._snapshots) == 1:
            return np.zeros(len(numbers), np.int64), self._snapshots[0].live.nth(numbers)
        part, rank = locate(numbers, self._counts)
        row = np.empty(len(numbers), np.int64)
        for p in np.unique(part).tolist():
            mine = part == p
            row[mine] = self._snapshots[p].live.nth(rank[mine])
        return part, row

    def _all(self) -> tuple[Ints, Ints]:
        return self.locate(np.arange(len(self), dtype=np.int64))

    def _part_of(self, trajectories: Ints) -> Ints:
        if len(self._snapshots) == 1:
            return np.zeros(len(trajectories), np.int64)
        return self.locate(np.asarray(trajectories, np.int64))[0]

    def pairs(self, clock: str) -> Ints:
        """Start and stop on a clock of every trajectory, int64 (n, 2); rows of the trajectory's own store."""
        pairs = self._pairs.get(clock)
        if pairs is None:
            part, row = self._all()
            pairs = np.full((len(row), 2), -1, np.int64)
            for p, mine in _groups(part, len(self._snapshots)):
                if clock in self._snapshots[p].manifest.schema.clocks:
                    pairs[mine] = self._snapshots[p].pairs(clock, row[mine])
            pairs.setflags(write=False)
            self._pairs[clock] = pairs
        return pairs

    def column(self, name: str) -> Array:
        """A column's values (n,)."""
        values = self._columns.get(name)
        if values is None:
            part, row = self._all()
            spec = self.columns.get(name)
            if spec is None:
                raise NotFoundError(
                    f"there is no column {name!r}", hint=f"there are {', '.join(self.columns) or 'none'}"
                )
            values = np.empty(len(row), np.dtype(spec.dtype))
            for p, mine in _groups(part, len(self._snapshots)):
                if name in self._snapshots[p].manifest.schema.columns:
                    values[mine] = self._snapshots[p].column(name, row[mine])
                else:
                    values[mine] = _filling(name, spec, self._snapshots[p])
            values.setflags(write=False)
            self._columns[name] = values
        return values

    # -- rows ------------------------------------------------------------------------------------------------------

    def reader(self, field: str) -> ArrayReader:
        """The field's reader in the first store that has it. Raises ``NotFoundError``."""
        return self._having(field)[0].field(field)

    def _having(self, field: str) -> list[Snapshot]:
        found = [s for s in self._snapshots if field in s.manifest.schema.fields]
        if not found:
            self._snapshots[0].field(field)
        return found

    def field_pairs(self, field: str) -> Ints:
        """Start and stop of every trajectory in a field, int64 (n, 2); rows of the trajectory's own store."""
        having = self._having(field)
        clocks = {s.manifest.schema.fields[field].clock for s in having}
        if len(clocks) == 1 and len(having) == len(self._snapshots):
            return self.pairs(str(clocks.pop()))
        part, row = self._all()
        pairs = np.full((len(row), 2), -1, np.int64)
        for p, mine in _groups(part, len(self._snapshots)):
            spec = self._snapshots[p].manifest.schema.fields.get(field)
            if spec is not None:
                pairs[mine] = self._snapshots[p].pairs(str(spec.clock), row[mine])
        return pairs

    def take(self, field: str, trajectories: Ints, steps: Ints, out: Array | None = None) -> Array:
        """Single rows of a field: row ``steps[i]`` of trajectory ``trajectories[i]``; (n, *shape), one gather.

        Raises ``NotFoundError`` for a row beyond its trajectory, ``SchemaError`` for numbers that are no integers.
        """
        trajectories, steps = _integers(trajectories), _integers(steps)
        if len(trajectories) != len(steps):
            raise SchemaError(f"{len(trajectories)} trajectories and {len(steps)} steps: one step is taken of each")
        pairs = self._chosen(self.field_pairs(field), trajectories)
        rows = pairs[:, 0] + steps
        if len(rows) and bool(((steps < 0) | (rows >= pairs[:, 1])).any()):
            bad = int(np.flatnonzero((steps < 0) | (rows >= pairs[:, 1]))[0])
            raise NotFoundError(f"trajectory {int(trajectories[bad])} has no row {int(steps[bad])} in field {field!r}")
        return self.gather(field, trajectories, rows, out)

    def read(self, field: str, trajectories: Ints | None = None, out: Array | None = None) -> Array:
        """All rows of a field of the given trajectories (all of them), end to end: (rows, *shape), one gather."""
        pairs = self.field_pairs(field)
        if trajectories is None:
            trajectories = np.arange(len(self), dtype=np.int64)
        trajectories = _integers(trajectories)
        pairs = self._chosen(pairs, trajectories)
        if len(self._snapshots) == 1:
            return self._snapshots[0].field(field).read_runs(pairs[:, 0], pairs[:, 1], out)
        part = np.repeat(self._part_of(trajectories), pairs[:, 1] - pairs[:, 0])
        return self._gather(field, part, spans(pairs[:, 0], pairs[:, 1]), out)

    def _chosen(self, pairs: Ints, trajectories: Ints) -> Ints:
        try:
            return pairs[trajectories]
        except IndexError:
            raise NotFoundError(
                f"a trajectory is beyond the {len(self)} there are", hint="they are counted from 0"
            ) from None

    def gather(self, field: str, trajectories: Ints, rows: Ints, out: Array | None = None) -> Array:
        """Rows of a field by their numbers in the store of the trajectory that each belongs to: (n, *shape)."""
        return self._gather(field, self._part_of(trajectories), rows, out)

    def _gather(self, field: str, part: Ints, rows: Ints, out: Array | None) -> Array:
        groups = _groups(part, len(self._snapshots))
        if len(groups) == 1 and len(part):
            return self._snapshots[groups[0][0]].field(field).take(rows, out)
        reader = self.reader(field)
        if out is None:
            out = np.empty((len(rows), *reader.layout.row_shape), reader.dtype)
        for p, mine in groups:
            reader = self._snapshots[p].field(field)
            if reader.dtype == out.dtype and type(mine) is not slice:
                reader.take(rows[mine], out, mine)
            else:
                out[mine] = reader.take(rows[mine])
        return out


def _filling(name: str, spec: Column, lacking: Snapshot) -> float:
    value = filling(name, spec)
    if value is None:
        raise SchemaError(
            f"{lacking.place} has no column {name!r}, and {spec.dtype} has no value that says so",
            hint=f"merge the stores with fill={{{name!r}: ...}}, or add the column to that one",
        )
    return value


def _groups(part: Ints, parts: int) -> list[tuple[int, Any]]:
    """Each store that is met, with the places where it is met."""
    if parts == 1 or not len(part):
        return [(0, slice(None))]
    if (part == part[0]).all():
        return [(int(part[0]), slice(None))]
    return [(p, np.flatnonzero(part == p)) for p in np.unique(part).tolist()]


def _integers(numbers: Any) -> Ints:
    """Numbers of trajectories or steps, (n,); a list and a mask are taken as well."""
    found = np.asarray(numbers)
    if found.ndim == 1 and found.dtype.kind in "iu":
        return found
    if found.ndim == 1 and found.dtype == np.bool_:
        return np.flatnonzero(found)
    if not found.size:
        return np.empty(0, np.int64)
    raise SchemaError(f"trajectories and steps are chosen by integers (n,), not by {numbers!r:.60}")
