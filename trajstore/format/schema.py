"""What a store holds: fields, their clocks, and columns; pure descriptions, no I/O.

A *field* is an array with one row for each tick of its *clock*; a *column* has
one value for each trajectory. A value that is no array of numbers (a string, a
JSON document) is a field of bytes on a clock of its own.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from trajstore.errors import FormatError, SchemaError

MAIN_CLOCK = "steps"
ID = "id"

#: What every trajectory has without being given it: its number of steps.
LENGTH = "length"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z")
_NAME_MAX = 200

#: Stored as they are. Zarr v3 has no core name for longdouble, and no other NumPy numeric type exists.
NUMERIC = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128".split()
#: Stored as integers, with a rule that gives the values back (docs/spec.md, "Rules").
CODED = {"bfloat16": "uint16", "string": "uint8", "json": "uint8"}

#: How a clock lies against the main one.
RELATIONS = ("main", "last_row_extra", "first_row_of_each_epoch_extra", "rate", "timestamps", "none")


def check_name(name: object, what: str) -> str:
    """A name that is safe as a file name on every system. Raises ``SchemaError``."""
    if isinstance(name, str) and (name.casefold() == "zarr.json" or name.startswith("tmp.")):
        raise SchemaError(f"{name!r} cannot name a {what}: files of the store are called so", hint="rename it")
    if what == "column" and name == LENGTH:
        raise SchemaError(f"{name!r} cannot name a column: it is each trajectory's number of steps", hint="rename it")
    if not isinstance(name, str) or not _NAME.match(name) or ".." in name or "__" in name or len(name) > _NAME_MAX:
        raise SchemaError(
            f"{name!r} cannot name a {what}",
            hint="a name starts with a letter or digit and goes on with letters, digits, '_', '-' or '.', "
            "without '..' or '__'",
        )
    return name


def check_path(path: object, what: str) -> str:
    """A name, or names joined by ``/`` (a nested field). Raises ``SchemaError``."""
    if not isinstance(path, str):
        raise SchemaError(f"{path!r} cannot name a {what}: names are strings")
    for part in path.split("/"):
        check_name(part, what)
    return path


def check_distinct(paths: Iterable[str], what: str) -> None:
    """No two paths may differ by case alone, nor may one be a folder of another. Raises ``SchemaError``."""
    seen: dict[str, str] = {}
    for path in paths:
        folded = path.casefold()
        if path == seen.get(folded):
            raise SchemaError(f"{path!r} is both a {what} and a column", hint="rename one of them")
        if folded in seen:
            raise SchemaError(
                f"{what}s {seen[folded]!r} and {path!r} are the same name where case does not count",
                hint="rename one of them",
            )
        seen[folded] = path
    for folded, path in seen.items():
        parts = folded.split("/")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in seen:
                raise SchemaError(f"{what} {path!r} lies inside {what} {seen['/'.join(parts[:depth])]!r}")


@dataclass(frozen=True)
class Rule:
    """How stored values give back a field's values.

    kind : ``"plain"``; ``"divide"`` (stored / ``divisor``, computed in float64 and rounded once to the
        field's dtype); ``"bfloat16"``, ``"string"`` (UTF-8), ``"json"`` (docs/spec.md, "Tagged JSON").
    """

    kind: str = "plain"
    divisor: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "divisor": self.divisor} if self.kind == "divide" else {"kind": self.kind}

    @classmethod
    def from_json(cls, value: Any) -> Rule:
        kind = value.get("kind") if isinstance(value, dict) else None
        if kind == "divide" and isinstance(value.get("divisor"), int) and value["divisor"] > 0:
            return cls(kind, value["divisor"])
        if kind in ("plain", "bfloat16", "string", "json"):
            return cls(kind)
        raise FormatError(f"unknown storage rule {value!r}")


@dataclass(frozen=True)
class Field:
    """A per-step array: one row of ``shape`` and ``dtype`` for each tick of ``clock``.

    dtype : a NumPy numeric or bool dtype, or ``"bfloat16"``, ``"string"``, ``"json"``.
    shape : of one row, without the time axis.
    clock : name of the clock; ``None`` lets the first trajectory decide (equal lengths share one).
    pack : whether float rows may be stored as integers where that is exact (docs/spec.md, "Rules").
    """

    dtype: str
    shape: tuple[int, ...] = ()
    clock: str | None = None
    pack: bool = True
    rule: Rule = field(default=Rule())
    array: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        try:
            shape = tuple(operator.index(n) for n in self.shape)
        except TypeError:
            raise SchemaError(
                f"a row cannot have the shape {self.shape!r}", hint="a tuple of ints; () is one number"
            ) from None
        object.__setattr__(self, "shape", shape)
        if any(n < 0 for n in self.shape):
            raise SchemaError(f"a row cannot have the shape {self.shape}")
        if self.clock is not None:
            check_name(self.clock, "clock")
        if self.dtype in CODED:
            object.__setattr__(self, "rule", Rule(self.dtype))

    @property
    def stored(self) -> np.dtype[Any]:
        """The dtype of the array on disk."""
        if self.rule.kind == "plain":
            return np.dtype(self.dtype)
        return np.dtype("uint8") if self.rule.kind == "divide" else np.dtype(CODED[self.dtype])

    @property
    def in_memory(self) -> np.dtype[Any]:
        """The dtype of the rows that the writer buffers: the field's own, or its code's."""
        return np.dtype(CODED.get(self.dtype, self.dtype))

    @property
    def whole(self) -> bool:
        """True where the rows of one trajectory are one value (a string, a document)."""
        return self.dtype in ("string", "json")

    def to_json(self) -> dict[str, Any]:
        return {
            "array": self.array,
            "clock": self.clock,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "rule": self.rule.to_json(),
            "pack": self.pack,
        }

    @classmethod
    def from_json(cls, value: Any) -> Field:
        try:
            return cls(
                dtype=value["dtype"],
                shape=tuple(value["shape"]),
                clock=check_name(value["clock"], "clock"),
                pack=bool(value.get("pack", True)),
                rule=Rule.from_json(value["rule"]),
                array=check_path(value["array"], "array"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"not a field: {value!r:.200}") from error


@dataclass(frozen=True)
class Clock:
    """A time axis that fields share.

    relation : one of ``RELATIONS``, against the main clock. ``last_row_extra``: T + 1 rows, the last after the
        last step (observations). ``first_row_of_each_epoch_extra``: T + E rows. ``rate``: ``rate`` ticks a step.
        ``timestamps``: ``field`` holds each tick's time. ``none``: nothing is known (ragged extras, strings).
        A trajectory that breaks ``last_row_extra`` or ``rate`` is refused when it is appended.
    """

    relation: str = "none"
    rate: int = 1
    field: str = ""

    def __post_init__(self) -> None:
        if self.relation not in RELATIONS:
            raise SchemaError(f"{self.relation!r} is no clock relation", hint="one of " + ", ".join(RELATIONS))
        if not isinstance(self.rate, int) or self.rate < 1:
            raise SchemaError(f"a clock cannot have {self.rate!r} ticks a step", hint="1 or more")

    def ticks(self, steps: Any) -> Any:
        """Rows on this clock beside so many steps, an int or an array; ``None`` where the relation leaves that open."""
        if self.relation == "last_row_extra":
            return steps + 1
        return steps * self.rate if self.relation == "rate" else None

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {"relation": self.relation}
        if self.relation == "rate":
            value["rate"] = self.rate
        if self.relation == "timestamps":
            value["field"] = self.field
        return value

    @classmethod
    def from_json(cls, value: Any) -> Clock:
        try:
            return cls(value["relation"], int(value.get("rate", 1)), str(value.get("field", "")))
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"not a clock: {value!r:.200}") from error


@dataclass(frozen=True)
class Column:
    """One value for each trajectory.

    dtype : a NumPy integer, float or bool dtype.
    default : the value of a trajectory that does not give one; ``None`` means that each must.
    """

    dtype: str
    default: float | int | bool | None = None

    def __post_init__(self) -> None:
        name = dtype_name(self.dtype)
        if name in CODED or np.dtype(name).kind not in "biuf":
            raise SchemaError(f"a column cannot be {name}", hint="strings and dicts are fields: give them in the dict")
        object.__setattr__(self, "dtype", name)
        default = self.default.item() if isinstance(self.default, np.generic) else self.default
        object.__setattr__(self, "default", default)
        if default is not None and not _holds(np.dtype(name), default):
            raise SchemaError(f"a column of {name} cannot have the default {default!r:.60}")

    @property
    def fill(self) -> float | int | bool:
        if self.default is not None:
            return self.default
        return False if self.dtype == "bool" else 0

    def to_json(self) -> dict[str, Any]:
        default = self.default
        if isinstance(default, float) and default != default:
            default = "NaN"  # type: ignore[assignment]  # as Zarr writes it
        return {"dtype": self.dtype, "default": default}

    @classmethod
    def from_json(cls, value: Any) -> Column:
        try:
            default = value.get("default")
            return cls(value["dtype"], float("nan") if default == "NaN" else default)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"not a column: {value!r:.200}") from error


@dataclass(frozen=True)
class Schema:
    """Fields by path, clocks and columns by name; every field's clock is among the clocks.

    absent : fields that were named and never had a row, so that nothing is known of them yet.
    """

    fields: Mapping[str, Field] = field(default_factory=dict)
    clocks: Mapping[str, Clock] = field(default_factory=dict)
    columns: Mapping[str, Column] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for path in self.fields:
            check_path(path, "field")
        for name in self.columns:
            check_name(name, "column")
        for name in self.clocks:
            check_name(name, "clock")
        check_distinct([*self.fields, *self.columns], "field")
        check_distinct(self.clocks, "clock")
        for path, spec in self.fields.items():
            if spec.clock is not None and spec.clock not in self.clocks:
                raise SchemaError(f"field {path!r} is on the clock {spec.clock!r}, which is not declared")

    def on_clock(self, clock: str) -> list[str]:
        """Paths of the fields on a clock."""
        return [path for path, spec in self.fields.items() if spec.clock == clock]

    def with_field(self, path: str, spec: Field, clock: Clock | None = None) -> Schema:
        clocks = dict(self.clocks)
        if clock is not None and spec.clock is not None:
            clocks[spec.clock] = clock
        return replace(self, fields={**self.fields, path: spec}, clocks=clocks, absent=self.absent - {path})

    def to_json(self) -> dict[str, Any]:
        return {
            "fields": {path: spec.to_json() for path, spec in self.fields.items()},
            "clocks": {name: spec.to_json() for name, spec in self.clocks.items()},
            "columns": {name: spec.to_json() for name, spec in self.columns.items()},
            "absent": sorted(self.absent),
        }

    @classmethod
    def from_json(cls, value: Any) -> Schema:
        try:
            return cls(
                {path: Field.from_json(spec) for path, spec in value["fields"].items()},
                {name: Clock.from_json(spec) for name, spec in value["clocks"].items()},
                {name: Column.from_json(spec) for name, spec in value["columns"].items()},
                frozenset(check_path(path, "field") for path in value.get("absent", [])),
            )
        except SchemaError as error:
            raise FormatError(f"the manifest's schema is not valid: {error.message}") from error
        except (AttributeError, KeyError, TypeError) as error:
            raise FormatError("the manifest holds no schema") from error


def _holds(dtype: np.dtype[Any], value: object) -> bool:
    """Whether a column of that dtype can have a value."""
    if dtype.kind == "b" or isinstance(value, bool):
        return dtype.kind == "b" and isinstance(value, bool)
    if dtype.kind == "f":
        return isinstance(value, (int, float))
    return isinstance(value, int) and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max


def declaration(
    fields: Mapping[str, Field] | None, clocks: Mapping[str, Clock] | None, columns: Mapping[str, Column] | None
) -> Schema:
    """What a caller declares; clocks that its fields merely name are declared too. Raises ``SchemaError``."""
    for given, kind in ((fields, Field), (clocks, Clock), (columns, Column)):
        what = kind.__name__
        if not isinstance(given or {}, Mapping):
            raise SchemaError(f"{what.lower()}s are declared as a dict of trajstore.{what}, not {given!r:.60}")
        for name, spec in (given or {}).items():
            if not isinstance(spec, kind):
                raise SchemaError(f"{name!r} is declared as {spec!r:.60}", hint=f"declare a trajstore.{what}")
    for name, clock in (clocks or {}).items():
        if (name == MAIN_CLOCK) != (clock.relation == "main"):
            raise SchemaError(
                f"the clock {name!r} is declared {clock.relation!r}",
                hint=f"{MAIN_CLOCK!r} is the main clock, and no other is",
            )
    named = {spec.clock: Clock() for spec in (fields or {}).values() if spec.clock is not None}
    if MAIN_CLOCK in named:
        named[MAIN_CLOCK] = Clock("main")
    return Schema(dict(fields or {}), {**named, **(clocks or {})}, dict(columns or {}))


def dtype_name(dtype: object) -> str:
    """The canonical name of a dtype that can be stored. Raises ``SchemaError`` for any other."""
    if isinstance(dtype, str) and dtype in CODED:
        return dtype
    text = str(dtype)
    if text in ("torch.bfloat16", "bfloat16"):
        return "bfloat16"
    if text.startswith("torch."):
        dtype = text[len("torch.") :]
    try:
        found: np.dtype[Any] = np.dtype(dtype)  # type: ignore[call-overload]
    except TypeError:
        raise SchemaError(f"{dtype!r} is not a dtype") from None
    if found.name not in NUMERIC:
        raise SchemaError(f"values of dtype {found.name} cannot be stored", hint=_DTYPE_HINTS.get(found.kind, ""))
    return found.name


_DTYPE_HINTS = {
    "O": "an object array has no dtype of its own: convert it, or pass a dict or list for a JSON field",
    "M": "store dates as int64: values.astype('datetime64[ns]').astype('int64')",
    "m": "store durations as int64: values.astype('timedelta64[ns]').astype('int64')",
    "U": "a str is a field of its own, and a list of them is one by keyword: append(trajectory, name=[...])",
    "S": "pass the bytes as a uint8 array: np.frombuffer(value, 'uint8')",
    "f": "longdouble has no portable form: convert it to float64",
    "c": "clongdouble has no portable form: convert it to complex128",
}


def unknown(name: str, known: Iterable[str], what: str) -> SchemaError:
    """The error for a name that the schema lacks, with what it may have been meant to be."""
    names = list(known)
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"the store has {', '.join(names) or 'none'}"
    return SchemaError(f"unknown {what} {name!r}", hint=hint)
