"""Many trajectories given end to end, checked against the schema at once; the counterpart of ``intake`` for one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from trajstore.engine.intake import array_dtype, as_array, false_relation
from trajstore.errors import SchemaError
from trajstore.format.encoding import choose_rule
from trajstore.format.layout import field_array
from trajstore.format.schema import ID, MAIN_CLOCK, Clock, Column, Field, Schema, check_name, dtype_name, unknown

Array = np.ndarray[Any, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]

BOUNDARY = "boundary"  # the clock of fields with one row more than there are steps, where no other is declared


class Batch:
    """Rows and columns of ``count`` trajectories.

    fields : by path, the rows of all trajectories end to end.
    lengths : by clock, int64 (count,): rows of each trajectory.
    columns : by name, (count,).
    """

    def __init__(self, fields: Mapping[str, Any], lengths: Any, columns: Mapping[str, Any]) -> None:
        given = lengths if isinstance(lengths, Mapping) else {MAIN_CLOCK: lengths}
        self.lengths = {str(clock): _lengths(clock, value) for clock, value in given.items()}
        if MAIN_CLOCK not in self.lengths:
            raise SchemaError(f"no lengths are given for the clock {MAIN_CLOCK!r}")
        self.count = len(self.lengths[MAIN_CLOCK])
        for clock, value in self.lengths.items():
            if len(value) != self.count:
                raise SchemaError(f"{len(value)} lengths on the clock {clock!r}, expected {self.count}")
        if bool((self.lengths[MAIN_CLOCK] < 1).any()):
            raise SchemaError("a trajectory is empty: it has no step", hint="leave it out")
        self.fields = dict(fields)
        rows = [path for path, value in self.fields.items() if np.shape(value)[:1] not in ((), (0,))]
        if rows and not self.count:
            raise SchemaError(
                f"field {rows[0]!r} has rows, and no lengths are given", hint="give one for each trajectory"
            )
        self.columns = {name: self._column(name, value) for name, value in columns.items()}

    def _column(self, name: str, value: Any) -> Array:
        if isinstance(value, (str, Mapping)):
            raise SchemaError(
                f"{name!r} is a {type(value).__name__}", hint="strings and dicts are appended one trajectory at a time"
            )
        values = as_array(name, value) if np.ndim(value) else np.asarray(value)
        if values.ndim == 0:
            return np.full(self.count, values)
        if values.shape != (self.count,):
            raise SchemaError(f"column {name!r} has the shape {values.shape}, expected ({self.count},)")
        return values

    def lengths_on(self, schema: Schema, clock: str) -> Ints | None:
        """Rows of each trajectory on a clock, where they are given or follow from its relation."""
        if clock in self.lengths:
            return self.lengths[clock]
        follows: Ints | None = schema.clocks[clock].ticks(self.lengths[MAIN_CLOCK])
        return follows

    # -- against a schema ------------------------------------------------------------------------------------------

    def infer(self, declared: Schema) -> Schema:
        """The schema that these trajectories ask for, over what was declared.

        A field with as many rows as there are steps is on the main clock, one with a row more for each trajectory on
        another. Raises ``SchemaError`` for any other.
        """
        fields = dict(declared.fields)
        clocks = {MAIN_CLOCK: Clock("main"), **declared.clocks, **{c: Clock() for c in self.lengths if c != MAIN_CLOCK}}
        clocks.update(declared.clocks)
        steps = int(self.lengths[MAIN_CLOCK].sum())
        for path, value in self.fields.items():
            rows = as_array(path, value)
            spec = fields.get(path)
            if spec is None:
                spec = Field(array_dtype(path, value, rows), rows.shape[1:])
            if spec.clock is None and len(rows) == steps:
                spec = replace(spec, clock=MAIN_CLOCK)
            elif spec.clock is None and len(rows) == steps + self.count:
                clocks.setdefault(BOUNDARY, Clock("last_row_extra"))
                spec = replace(spec, clock=BOUNDARY)
            elif spec.clock is None:
                raise _unequal(path, len(rows), steps)
            fields[path] = replace(spec, array=spec.array or field_array(path), rule=choose_rule(spec, rows))
        unnamed = [path for path, spec in fields.items() if spec.clock is None]
        fields = {path: spec for path, spec in fields.items() if path not in unnamed}
        columns = {ID: Column("int64"), **declared.columns}
        for name, values in self.columns.items():
            if name not in columns:
                columns[check_name(name, "column")] = Column(dtype_name(values.dtype))
        return Schema(fields, clocks, columns, frozenset(unnamed))

    def rows(self, schema: Schema) -> tuple[list[Array | None], list[Ints | None], list[Array]]:
        """Rows of each field (``None`` where absent), lengths on each clock, values of each column but the id.

        All in the schema's order. Raises ``SchemaError`` naming field, expected and found.
        """
        taken = 0
        arrays: list[Array | None] = []
        for path, spec in schema.fields.items():
            value = self.fields.get(path)
            taken += path in self.fields
            arrays.append(None if value is None else self._rows_of(schema, path, spec, value))
        lengths = [self._present(schema, arrays, clock) for clock in schema.clocks]
        columns = []
        for name, column in schema.columns.items():
            if name == ID:
                continue
            values = self.columns.get(name)
            taken += values is not None
            if values is None and column.default is None:
                raise SchemaError(f"column {name!r} is missing", hint=f"give {name}=..., or declare a default")
            columns.append(np.full(self.count, column.fill) if values is None else _as_column(name, column, values))
        if taken != len(self.fields) + len(self.columns):
            known = [*schema.fields, *(name for name in schema.columns if name != ID)]
            for name in [*self.fields, *self.columns]:
                if name not in known:
                    raise unknown(name, known, "field or column")
        return arrays, lengths, columns

    def _rows_of(self, schema: Schema, path: str, spec: Field, value: Any) -> Array:
        rows = as_array(path, value)
        if spec.whole:
            raise SchemaError(f"field {path!r} is a {spec.dtype}", hint="append such trajectories one at a time")
        if rows.shape[1:] != spec.shape:
            raise SchemaError(f"field {path!r} has rows of shape {rows.shape[1:]}, expected {spec.shape}")
        # The bits of bfloat16 come as uint16 from those who have no tensor of them.
        found = array_dtype(path, value, rows)
        if found != spec.dtype and (found == "bfloat16" or rows.dtype != spec.in_memory):
            raise SchemaError(
                f"field {path!r} has the dtype {found}, expected {spec.dtype}",
                hint=f"convert it before appending: values.astype({spec.dtype!r})",
            )
        lengths = self.lengths_on(schema, str(spec.clock))
        if lengths is None:
            raise SchemaError(f"no lengths are given for the clock {spec.clock!r}, which field {path!r} goes by")
        if len(rows) != int(lengths.sum()):
            raise _unequal(path, len(rows), int(lengths.sum()))
        return rows

    def _present(self, schema: Schema, arrays: list[Array | None], clock: str) -> Ints | None:
        paths = [(path, rows) for (path, spec), rows in zip(schema.fields.items(), arrays) if spec.clock == clock]
        missing = [path for path, rows in paths if rows is None]
        if len(missing) == len(paths) and clock != MAIN_CLOCK:
            return None
        for path in missing:
            raise SchemaError(f"field {path!r} is missing", hint="its clock has other fields, which are given")
        lengths, steps = self.lengths_on(schema, clock), self.lengths[MAIN_CLOCK]
        expected = schema.clocks[clock].ticks(steps)
        if lengths is not None and expected is not None and not np.array_equal(lengths, expected):
            first = int(np.flatnonzero(lengths != expected)[0])
            raise false_relation(schema, clock, int(steps[first]), int(lengths[first]))
        return lengths

    def without(self, schema: Schema, gone: Array) -> Batch:
        """The trajectories that the mask ``gone`` does not name."""
        kept = ~gone
        fields = {}
        for path, value in self.fields.items():
            lengths = self.lengths_on(schema, str(schema.fields[path].clock))
            fields[path] = as_array(path, value)[np.repeat(kept, lengths)] if lengths is not None else value
        lengths_kept = {clock: lengths[kept] for clock, lengths in self.lengths.items()}
        return Batch(fields, lengths_kept, {name: values[kept] for name, values in self.columns.items()})


def _lengths(clock: Any, value: Any) -> Ints:
    lengths = np.asarray(value)
    if lengths.ndim != 1 or (lengths.size and lengths.dtype.kind not in "iu") or bool((lengths < 0).any()):
        raise SchemaError(f"the lengths on the clock {clock!r} are not a list of counts")
    return lengths.astype(np.int64)


def _as_column(name: str, column: Column, values: Array) -> Array:
    if values.dtype.kind in "mMOSU" or not np.can_cast(values.dtype, np.dtype(column.dtype), "same_kind"):
        raise SchemaError(f"column {name!r} is {values.dtype}, expected {column.dtype}")
    cast = values.astype(column.dtype, copy=False)
    if column.dtype[0] in "iu" and not np.array_equal(cast, values):
        raise SchemaError(f"column {name!r} has values beyond {column.dtype}")
    return cast


def _unequal(path: str, found: int, expected: int) -> SchemaError:
    return SchemaError(
        f"field {path!r} has {found} rows, expected {expected}, all trajectories together",
        hint="give the lengths of its clock too: lengths={'steps': ..., clock: ...}",
    )
