"""One trajectory as the caller gives it, checked against the schema and turned into rows; nothing is stored here."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from trajstore.errors import SchemaError
from trajstore.format import typedjson
from trajstore.format.encoding import choose_rule
from trajstore.format.layout import field_array
from trajstore.format.schema import (
    CODED,
    ID,
    MAIN_CLOCK,
    Clock,
    Column,
    Field,
    Schema,
    check_name,
    check_path,
    dtype_name,
    unknown,
)

ABSENT = -1  # rows of a clock on which a trajectory has nothing, not even zero rows

#: Fields that a step has exactly one of, whatever else is recorded; they decide which length is T.
_STEP_NAMES = ("action", "actions", "reward", "rewards")


def flatten(trajectory: Mapping[str, Any], columns: Mapping[str, Any], schema: Schema) -> dict[str, Any]:
    """Every value by its path: nested dicts joined by ``/``, except where a JSON field is declared."""
    flat: dict[str, Any] = {}
    if type(trajectory) is not dict and not isinstance(trajectory, Mapping):
        raise SchemaError(f"a trajectory is a dict of arrays, not {type(trajectory).__name__}")
    try:
        _flatten_into(flat, trajectory, "", schema)
    except RecursionError:
        raise SchemaError("a dict of the trajectory contains itself, or lies too deep", hint="flatten it") from None
    except TypeError as error:
        hint = "names are strings; a dict with other keys is a document: give it by keyword"
        raise SchemaError(f"a field of the trajectory cannot be named: {error}", hint=hint) from error
    for name, value in columns.items():
        if name in flat:
            raise SchemaError(f"{name!r} is given twice: in the trajectory and as a column")
        flat[name] = value
    return flat


def _flatten_into(flat: dict[str, Any], values: Mapping[str, Any], prefix: str, schema: Schema) -> None:
    for name, value in values.items():
        if type(value) is np.ndarray:  # most are, and asking whether one is a Mapping takes a while
            flat[prefix + name if prefix else name] = value
            continue
        if isinstance(value, Mapping):
            path = prefix + str(name)
            spec = schema.fields.get(path)
            if spec is None or spec.dtype != "json":
                if not value and schema.fields:
                    continue
                _flatten_into(flat, value, f"{path}/", schema)
                continue
        path = prefix + name if prefix else name
        if value is None and path not in schema.fields:
            inside = [known for known in schema.fields if known.startswith(f"{path}/")]
            if inside:
                flat.update(dict.fromkeys(inside))
                continue
        flat[path] = value


def infer(flat: Mapping[str, Any], column_names: set[str], declared: Schema) -> Schema:
    """The schema that a first trajectory asks for, over what was declared.

    Fields of equal length T share the main clock, those of T + 1 rows another; any other field has a clock of its own.
    T is the length of the actions or rewards, else the one that most fields have.
    """
    fields = dict(declared.fields)
    columns: dict[str, Column] = {ID: Column("int64"), **declared.columns}
    found: dict[str, Any] = {}
    for path, value in flat.items():
        if path in fields or path in columns or value is None:
            continue
        if path in column_names and _is_scalar(value):
            columns[check_name(path, "column")] = Column(scalar_dtype(value))
            continue
        check_path(path, "field")
        if path in column_names and isinstance(value, (Mapping, list, tuple)):
            fields[path] = Field("json")
        elif isinstance(value, str):
            fields[path] = Field("string")
        elif isinstance(value, Mapping):
            raise SchemaError(f"field {path!r} is an empty dict", hint="leave it out, or declare it as Field('json')")
        else:
            found[path] = as_array(path, value)
            fields[path] = Field(array_dtype(path, value, found[path]), found[path].shape[1:])
    for path, spec in fields.items():
        if path not in found and flat.get(path) is not None and not spec.whole:
            found[path] = as_array(path, flat[path])
    given = {fields[path].clock for path in found}
    for path, spec in fields.items():
        if path in flat and flat[path] is None and spec.clock in given:
            fields[path] = _replace(spec, clock=None)  # absent where its fellows are not: it needs one of its own
    lengths = {path: len(rows) for path, rows in found.items()}
    clocks = {MAIN_CLOCK: Clock("main"), **declared.clocks}
    _assign_clocks(fields, clocks, lengths)
    for path, spec in fields.items():
        if not spec.array:
            fields[path] = _replace(spec, array=field_array(path))
    for path, rows in found.items():
        if rows.dtype == fields[path].in_memory and rows.shape[1:] == fields[path].shape:
            fields[path] = _replace(fields[path], rule=choose_rule(fields[path], rows))
    absent = {check_path(path, "field") for path, value in flat.items() if value is None and path not in fields}
    return Schema(fields, clocks, columns, frozenset(absent))


def extend(schema: Schema, declared: Schema, place: str) -> Schema:
    """A stored schema with what a later session declares beyond it.

    New columns need a default, for the trajectories that are there; new fields are absent from those.
    Raises ``SchemaError`` where a declaration contradicts the store.
    """
    for path, spec in declared.fields.items():
        stored = schema.fields.get(path)
        if stored is not None and (stored.dtype, stored.shape) != (spec.dtype, spec.shape):
            raise SchemaError(
                f"field {path!r} is declared {spec.dtype} {spec.shape}, and {place} holds {stored.dtype} {stored.shape}"
            )
    for name, column in declared.columns.items():
        known = schema.columns.get(name)
        if known is not None and known.dtype != column.dtype:
            raise SchemaError(f"column {name!r} is declared {column.dtype}, and {place} holds {known.dtype}")
        if known is None and column.default is None:
            raise SchemaError(
                f"column {name!r} is new, and {place} holds trajectories without it",
                hint=f"declare what those have: Column({column.dtype!r}, default=...)",
            )
    new = frozenset(path for path in declared.fields if path not in schema.fields)
    columns = {**declared.columns, **schema.columns}
    ordered = {name: columns[name] for name in [*schema.columns, *declared.columns]}
    return Schema(schema.fields, schema.clocks, ordered, schema.absent | new)


def _assign_clocks(fields: dict[str, Field], clocks: dict[str, Clock], lengths: Mapping[str, int]) -> None:
    free = {path: n for path, n in lengths.items() if fields[path].clock is None}
    steps = _main_length(free, {lengths[p] for p in lengths if fields[p].clock == MAIN_CLOCK})
    boundary = None
    for path, spec in fields.items():
        if spec.clock is not None:
            clocks.setdefault(spec.clock, Clock())
        elif free.get(path) == steps:
            fields[path] = _replace(spec, clock=MAIN_CLOCK)
        elif steps is not None and free.get(path) == steps + 1:
            boundary = boundary or _free_name(path, clocks)
            clocks.setdefault(boundary, Clock("last_row_extra"))
            fields[path] = _replace(spec, clock=boundary)
        else:
            own = _free_name(path, clocks)
            clocks[own] = Clock()
            fields[path] = _replace(spec, clock=own)


def _main_length(lengths: Mapping[str, int], declared: set[int]) -> int | None:
    if declared:
        return declared.pop()
    for name in _STEP_NAMES:
        if lengths.get(name):
            return lengths[name]
    counts: dict[int, int] = {}
    for n in lengths.values():
        if n:
            counts[n] = counts.get(n, 0) + 1
    return min(counts, key=lambda n: (-counts[n], n)) if counts else None


def _free_name(path: str, clocks: Mapping[str, Clock]) -> str:
    """A clock name for a field; a field called like the main clock needs another one."""
    name = path.replace("/", ".")
    while name.casefold() in {clock.casefold() for clock in clocks}:
        name += ".clock"
    return name


def _replace(spec: Field, **changes: Any) -> Field:
    values = {name: getattr(spec, name) for name in ("dtype", "shape", "clock", "pack", "rule", "array")}
    return Field(**{**values, **changes})


class Checker:
    """Checks trajectories against one schema, quickly: it runs in the collector's thread.

    fields, clocks, columns : names in the order in which ``rows`` returns their values.
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.fields = list(schema.fields)
        self.clocks = list(schema.clocks)
        self.columns = [name for name in schema.columns if name != ID]
        order = {name: i for i, name in enumerate(self.clocks)}
        self._fields = [
            (path, spec, _NEVER if spec.dtype in CODED else spec.in_memory, spec.shape, order[str(spec.clock)])
            for path, spec in schema.fields.items()
        ]
        self._columns = [(name, schema.columns[name], *_plain(schema.columns[name])) for name in self.columns]
        self._known = len(self._fields) + len(self._columns)
        self._bound = [(order[name], clock) for name, clock in schema.clocks.items() if clock.ticks(1) is not None]
        self._row_bytes = [0] * len(self.clocks)
        for _, spec, _, shape, clock in self._fields:
            self._row_bytes[clock] += spec.in_memory.itemsize * math.prod(shape)

    def rows(self, flat: Mapping[str, Any]) -> tuple[list[Any], list[int], list[Any]]:
        """The rows of each field (``None`` where absent), the number of rows on each clock, the value of each column.

        Raises ``SchemaError`` naming field, expected and found, for a trajectory that does not fit.
        """
        lengths = [ABSENT] * len(self.clocks)
        arrays: list[Any] = []
        whole = True
        for path, spec, dtype, shape, clock in self._fields:
            try:
                value = flat[path]
            except KeyError:
                raise SchemaError(
                    f"field {path!r} is missing", hint="pass None for a field that this trajectory does not have"
                ) from None
            if type(value) is np.ndarray and value.dtype == dtype and (given := value.shape)[1:] == shape and given:
                count = given[0]
            elif value is None:
                arrays.append(None)
                whole = False
                continue
            else:
                value = self._converted(path, spec, value)
                count = len(value)
            if lengths[clock] != count:
                if lengths[clock] != ABSENT:
                    raise self._unequal(path, count, clock, lengths[clock])
                lengths[clock] = count
            arrays.append(value)
        columns = []
        missing = 0
        for name, column, kind, low, high in self._columns:
            value = flat.get(name)
            if type(value) is not kind or not low <= value <= high:  # type: ignore[operator]  # kinds are ordered
                missing += name not in flat
                value = as_column(name, column, self._default(name, column, flat) if value is None else value)
            columns.append(value)
        if self._known - missing != len(flat) and any(
            name not in self.schema.absent or flat[name] is not None for name in flat
        ):
            self._refuse_unknown(flat)
        if not whole or not lengths or lengths[0] < 1:
            self._refuse_partial(arrays, lengths)
        for clock, relation in self._bound:
            if lengths[clock] != relation.ticks(lengths[0]) and ABSENT not in (lengths[clock], lengths[0]):
                raise false_relation(self.schema, self.clocks[clock], lengths[0], lengths[clock])
        return arrays, lengths, columns

    def nbytes(self, lengths: list[int]) -> int:
        """Bytes in memory of a trajectory with so many rows on each clock."""
        return sum(count * size for count, size in zip(lengths, self._row_bytes) if count > 0)

    def _default(self, name: str, column: Column, flat: Mapping[str, Any]) -> Any:
        if column.default is None and name in flat:
            raise SchemaError(f"column {name!r} is None, expected {column.dtype}")
        if column.default is None:
            raise SchemaError(f"column {name!r} is missing", hint=f"give {name}=..., or declare a default")
        return column.default

    def _converted(self, path: str, spec: Field, value: Any) -> np.ndarray[Any, Any]:
        if spec.dtype == "json":
            return np.frombuffer(typedjson.dumps(value), np.uint8)
        if spec.dtype == "string":
            if not isinstance(value, str):
                raise SchemaError(f"field {path!r} takes a str, found {type(value).__name__}")
            return np.frombuffer(value.encode("utf-8", "surrogatepass"), np.uint8)
        rows = as_array(path, value)
        found = array_dtype(path, value, rows)
        if rows.shape[1:] != spec.shape:
            if rows.shape == (0,):
                return np.empty((0, *spec.shape), spec.in_memory)
            raise SchemaError(
                f"field {path!r} has rows of shape {rows.shape[1:]}, expected {spec.shape}"
                f" (the array given has the shape {rows.shape}, time first)"
            )
        if found != spec.dtype:
            if not isinstance(value, (list, tuple)):
                raise SchemaError(
                    f"field {path!r} has the dtype {found}, expected {spec.dtype}",
                    hint=f"convert it before appending: values.astype({spec.dtype!r})",
                )
            exact = _exactly(rows, spec)
            if exact is None:
                raise SchemaError(f"field {path!r} has values that {spec.dtype} cannot hold")
            return exact
        return rows

    def _unequal(self, path: str, count: int, clock: int, expected: int) -> SchemaError:
        name = self.clocks[clock]
        first = next(p for p in self.schema.on_clock(name))
        return SchemaError(
            f"field {path!r} has {count} rows, expected {expected} as {first!r} has",
            hint=f"if {path!r} goes by a time of its own, call writer.split_clock({path!r}) first",
        )

    def _refuse_unknown(self, flat: Mapping[str, Any]) -> None:
        known = [*self.fields, *self.columns]
        absent = self.schema.absent
        late = [name for name in flat if name in absent and flat[name] is not None]
        if late:
            raise LateField(late)
        for name in flat:
            if not isinstance(name, str) or (name not in known and name not in absent):
                raise unknown(str(name), known, "field or column")

    def _refuse_partial(self, arrays: list[Any], lengths: list[int]) -> None:
        for (path, _, _, _, clock), value in zip(self._fields, arrays):
            if value is None and lengths[clock] != ABSENT:
                raise AbsentField(path)
        if not lengths or lengths[0] == 0 or not any(n > 0 for n in lengths):
            raise SchemaError("the trajectory is empty: it has no step", hint="append it when it has one")


def false_relation(schema: Schema, clock: str, steps: int, found: int) -> SchemaError:
    """The error for rows on a clock that its relation to the main one does not allow."""
    path, relation = schema.on_clock(clock)[0], schema.clocks[clock]
    said = f"{relation.rate} a step" if relation.relation == "rate" else "one more than there are steps"
    return SchemaError(
        f"field {path!r} has {found} rows beside {steps} steps, expected {relation.ticks(steps)}: {said}",
        hint=f"if {path!r} goes by a time of its own, call writer.split_clock({path!r}) first",
    )


def _exactly(values: np.ndarray[Any, Any], spec: Field) -> np.ndarray[Any, Any] | None:
    """Values of a list as a field's rows in memory; ``None`` if its dtype does not hold each of them."""
    coded = spec.dtype == "bfloat16"
    with np.errstate(invalid="ignore", over="ignore"):
        cast = values.astype(np.float32 if coded else spec.in_memory)
    bits = cast.view(np.uint32) if coded else np.zeros(1, np.uint32)
    if not np.array_equal(cast, values, equal_nan=True) or bool((bits & 0xFFFF).any()):
        return None
    return (bits >> 16).astype(np.uint16) if coded else cast


#: No array's dtype: values of a coded field are always converted.
_NEVER: np.dtype[Any] = np.dtype([("never", "V1")])

_name_of = lru_cache(maxsize=None)(dtype_name)


def _plain(column: Column) -> tuple[type, float, float]:
    """A Python type and bounds within which a column takes a value as it is."""
    kind = np.dtype(column.dtype).kind
    if kind in "iu":
        bounds = np.iinfo(column.dtype)
        return int, int(bounds.min), int(bounds.max)
    return (bool, False, True) if kind == "b" else (float, -math.inf, math.inf)


class LateField(Exception):
    """Fields that were absent until now have rows."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(*paths)
        self.paths = paths


class AbsentField(Exception):
    """A field is None while others on its clock are not: it needs a clock of its own."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


def as_array(path: str, value: Any) -> np.ndarray[Any, Any]:
    """A value as rows of a storable dtype, without a copy where it is an array or a tensor on the CPU.

    bfloat16 tensors come as their uint16 bits.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach()
        if value.is_sparse or value.layout != torch.strided:
            raise SchemaError(f"field {path!r} is a sparse tensor", hint="pass value.to_dense()")
        try:
            value = value.cpu().resolve_conj().resolve_neg()
            value = value.view(torch.int16).numpy().view(np.uint16) if value.dtype == torch.bfloat16 else value.numpy()
        except (TypeError, RuntimeError) as error:  # meta, quantised and nested ones, and dtypes that NumPy lacks
            kind = "meta tensor" if value.is_meta else f"tensor of {value.dtype}"
            raise SchemaError(
                f"field {path!r} is a {kind}, which cannot be stored", hint="convert it: value.to(torch.float32)"
            ) from error
    elif isinstance(value, np.ma.MaskedArray):
        raise SchemaError(f"field {path!r} is a masked array", hint="store value.data and value.mask as two fields")
    try:
        rows = np.asarray(value)
    except ValueError as error:
        raise SchemaError(f"field {path!r} is ragged: its rows differ in shape", hint="pad it, or split it") from error
    except (TypeError, RuntimeError) as error:  # of a list: as above
        raise SchemaError(f"field {path!r}: {error}", hint="pass one tensor: torch.stack(values)") from error
    if rows.dtype.isbuiltin == 2 and rows.dtype.name == "bfloat16":
        rows = rows.view(np.uint16)
    if rows.dtype.kind in "SO" and rows.ndim == 0:
        raise SchemaError(
            f"{path!r} is a {type(value).__name__}, which is neither a column nor a field",
            hint="pass a str or a dict, or bytes as np.frombuffer(value, 'uint8')",
        )
    if rows.ndim == 0:
        raise SchemaError(
            f"field {path!r} is a single value, not an array with time first",
            hint=f"pass one value for each trajectory as a column: append(trajectory, {path.split('/')[-1]}=...)",
        )
    if not rows.dtype.isnative:
        rows = rows.astype(rows.dtype.newbyteorder("="))
    return rows


def array_dtype(path: str, value: Any, rows: np.ndarray[Any, Any]) -> str:
    """The name of the dtype that ``value`` has as a field. Raises ``SchemaError`` for one that cannot be stored."""
    given = getattr(value, "dtype", None)
    if given is not rows.dtype and str(given) in ("torch.bfloat16", "bfloat16"):
        return "bfloat16"
    try:
        return _name_of(rows.dtype)
    except SchemaError as error:
        raise SchemaError(f"field {path!r}: {error.message}", hint=error.hint) from None


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.generic)) or getattr(value, "shape", None) == ()


def scalar_dtype(value: Any) -> str:
    """The dtype of a column that a first value asks for: Python ints, floats and bools become 64 bits and bool."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64"
    if type(value) is float:
        return "float64"
    return dtype_name(getattr(value, "dtype", type(value)))


def as_column(name: str, column: Column, value: Any) -> Any:
    """A column's value, checked: ints stay ints, bools stay bools, floats may come from ints."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    kind = np.dtype(column.dtype).kind
    if kind == "f" and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise SchemaError(f"column {name!r} is beyond {column.dtype}") from None
    if kind == "b" and isinstance(value, bool):
        return value
    if kind in "iu" and isinstance(value, int) and not isinstance(value, bool):
        bounds = np.iinfo(column.dtype)
        if bounds.min <= value <= bounds.max:
            return value
        raise SchemaError(f"column {name!r} is {value}, beyond {column.dtype}")
    found = f"{value!r:.60}" if isinstance(value, (int, float, str, bool)) else type(value).__name__
    nan = isinstance(value, float) and math.isnan(value)
    raise SchemaError(
        f"column {name!r} is {found}, expected {column.dtype}",
        hint="an integer column has no NaN: leave the trajectory's value out, or use a float column" if nan else "",
    )
