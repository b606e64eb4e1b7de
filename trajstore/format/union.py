"""One schema for the trajectories of several stores, or every reason why there is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trajstore.errors import SchemaError
from trajstore.format.layout import field_array
from trajstore.format.schema import MAIN_CLOCK, Clock, Column, Field, Rule, Schema

Number = float  # int and bool too


@dataclass(frozen=True)
class Union:
    """schema : of all of them together. clocks : for each clock, which one it is in each store, or ``None``."""

    schema: Schema
    clocks: Mapping[str, tuple[str | None, ...]]


def unite(schemas: Sequence[Schema], names: Sequence[str], fill: Mapping[str, Any] | None = None) -> Union:
    """The schema that holds what every one of these holds.

    Fields that share a clock in every store that has them share one here; a field that only some stores have is absent
    (``None``) in the others' trajectories. A column that only some have is filled up, see :func:`filling`.

    Parameters
    ----------
    names : of the stores, for messages. fill : values for columns that not every store has.

    Raises
    ------
    SchemaError
        A field or column differs in dtype or shape, or a column cannot be filled; all of them are named.
    """
    conflicts = _field_conflicts(schemas, names) + _column_conflicts(schemas, names)
    columns = _columns(schemas)
    for name in fill or {}:
        if name not in columns:
            conflicts.append(f"fill names {name!r}, which is no column of any")
    for name, column in columns.items():
        lacking = [place for schema, place in zip(schemas, names) if name not in schema.columns]
        if lacking and filling(name, column, fill) is None:
            conflicts.append(
                f"column {name!r} ({column.dtype}) is missing in {_some(lacking)}, and has no default: "
                f"give fill={{{name!r}: …}}"
            )
    if conflicts:
        raise SchemaError("these stores do not fit together:\n  " + "\n  ".join(conflicts))
    clocks, key_of = _clocks(schemas)
    fields = {
        path: replace(_field(path, schemas), clock=key_of[path], array=field_array(path)) for path in _paths(schemas)
    }
    return Union(Schema(fields, {name: _relation(name, key, schemas) for name, key in clocks.items()}, columns), clocks)


def filling(name: str, column: Column, fill: Mapping[str, Any] | None = None) -> Number | None:
    """The value of a column for trajectories of a store that lacks it; ``None`` where none is stated.

    What ``fill`` says, else the column's declared default, else NaN for a float column. Integers and bools have no
    value that means *unknown*, so for them one must be given.
    """
    if fill and name in fill:
        value: Number = fill[name]
        return value
    if column.default is not None:
        return column.default
    return float("nan") if column.dtype.startswith("float") else None


def _paths(schemas: Sequence[Schema]) -> list[str]:
    return list(dict.fromkeys(path for schema in schemas for path in schema.fields))


def _field(path: str, schemas: Sequence[Schema]) -> Field:
    """As the first store has it; stored plainly where they do not all store it by one rule."""
    specs = [schema.fields[path] for schema in schemas if path in schema.fields]
    same = all(spec.rule == specs[0].rule for spec in specs)
    return replace(specs[0], rule=specs[0].rule if same else Rule(), pack=all(spec.pack for spec in specs))


def _columns(schemas: Sequence[Schema]) -> dict[str, Column]:
    columns: dict[str, Column] = {}
    for schema in schemas:
        for name, column in schema.columns.items():
            known = columns.setdefault(name, column)
            if repr(known.default) != repr(column.default):  # nan equals itself here
                columns[name] = Column(known.dtype)
    return columns


def _clocks(schemas: Sequence[Schema]) -> tuple[dict[str, tuple[str | None, ...]], dict[str, str]]:
    """Clocks by name, and the clock of each field. Fields share a clock if they share one in every store."""
    main = (MAIN_CLOCK,) * len(schemas)
    clocks: dict[str, tuple[str | None, ...]] = {MAIN_CLOCK: main}
    named: dict[tuple[str | None, ...], str] = {main: MAIN_CLOCK}
    clock_of: dict[str, str] = {}
    for path in _paths(schemas):
        key = tuple(schema.fields[path].clock if path in schema.fields else None for schema in schemas)
        if key not in named:
            first = next(name for name in key if name is not None)
            named[key] = _free(path.replace("/", ".") if first == MAIN_CLOCK else first, clocks)
            clocks[named[key]] = key
        clock_of[path] = named[key]
    return clocks, clock_of


def _free(name: str, taken: Iterable[str]) -> str:
    folded = {other.casefold() for other in taken}
    while name.casefold() in folded:
        name += ".clock"
    return name


def _relation(name: str, key: tuple[str | None, ...], schemas: Sequence[Schema]) -> Clock:
    if name == MAIN_CLOCK:
        return Clock("main")
    found = {schema.clocks[clock] for schema, clock in zip(schemas, key) if clock is not None}
    if len(found) > 1:
        return Clock("none")
    relation = found.pop()
    # Where the field is there at all, it has a row for each step.
    return Clock("rate", 1) if relation.relation == "main" else relation


def _field_conflicts(schemas: Sequence[Schema], names: Sequence[str]) -> list[str]:
    return [
        conflict
        for path in _paths(schemas)
        for conflict in _conflict(
            f"field {path!r}",
            [
                (f"{schema.fields[path].dtype} {schema.fields[path].shape}", name)
                for schema, name in zip(schemas, names)
                if path in schema.fields
            ],
        )
    ]


def _column_conflicts(schemas: Sequence[Schema], names: Sequence[str]) -> list[str]:
    return [
        conflict
        for column in dict.fromkeys(name for schema in schemas for name in schema.columns)
        for conflict in _conflict(
            f"column {column!r}",
            [(s.columns[column].dtype, name) for s, name in zip(schemas, names) if column in s.columns],
        )
    ]


def _conflict(what: str, kinds: list[tuple[str, str]]) -> list[str]:
    places: dict[str, list[str]] = {}
    for kind, name in kinds:
        places.setdefault(kind, []).append(name)
    if len(places) == 1:
        return []
    return [f"{what} is " + ", and ".join(f"{kind} in {_some(held)}" for kind, held in places.items())]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
