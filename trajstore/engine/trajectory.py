"""One trajectory of a store, and the rows of a field of it, decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from trajstore.engine.index import indices
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import CorruptionError, FormatError, NotFoundError, SchemaError
from trajstore.format import typedjson
from trajstore.format.schema import ID, MAIN_CLOCK, Field

Array = np.ndarray[Any, Any]


class Trajectory(Mapping[str, Any]):
    """One trajectory: a lazy mapping from names to its fields and columns.

    ``trajectory["obs"]`` is a :class:`Rows`; of a nested field, ``trajectory["curr_obs"]`` is a mapping and
    ``trajectory["curr_obs/image"]`` a ``Rows``. A field that the trajectory does not have is ``None``, a string or JSON
    field its value, a column its value. Iterating gives the names of fields, then of columns.

    Attributes
    ----------
    index : its number in the dataset it was taken from. row : its row in the store's table.
    """

    def __init__(self, snapshot: Snapshot, row: int, index: int) -> None:
        self._snapshot = snapshot
        self.row = row
        self.index = index

    @property
    def id(self) -> int:
        """Its id in its store."""
        return int(self[ID])

    def __len__(self) -> int:
        """Number of steps."""
        start, stop = self._pair(MAIN_CLOCK)
        return max(stop - start, 0)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        schema = self._snapshot.manifest.schema
        yield from schema.fields
        yield from schema.columns

    def __contains__(self, name: object) -> bool:
        schema = self._snapshot.manifest.schema
        return name in schema.fields or name in schema.columns

    def __getitem__(self, name: str) -> Any:
        schema = self._snapshot.manifest.schema
        spec = schema.fields.get(name)
        if spec is None:
            if name in schema.columns:
                return self._snapshot.column(name, np.array([self.row]))[0]
            inside = {path[len(name) + 1 :] for path in schema.fields if path.startswith(f"{name}/")}
            if inside:
                return _Nested(self, name, inside)
            raise NotFoundError(
                f"there is no field or column {name!r}",
                hint="there are " + ", ".join([*schema.fields, *schema.columns]),
            )
        start, stop = self._pair(str(spec.clock))
        if start < 0:
            return None
        rows = Rows(self._snapshot, name, start, stop)
        return _value(spec, rows) if spec.whole else rows

    def _pair(self, clock: str) -> tuple[int, int]:
        start, stop = self._snapshot.pairs(clock, np.array([self.row]))[0].tolist()
        return start, stop

    @property
    def columns(self) -> dict[str, Any]:
        """Every column's value."""
        return {name: self[name] for name in self._snapshot.manifest.schema.columns}

    def load(self, fields: Iterable[str] | None = None) -> dict[str, Any]:
        """The fields (all of them) in memory, by path."""
        found = {}
        for name in self._snapshot.manifest.schema.fields if fields is None else fields:
            value = self[name]
            found[name] = value[:] if isinstance(value, Rows) else value
        return found

    def __repr__(self) -> str:
        return f"<Trajectory {self.index} of {self._snapshot.place}: {len(self)} steps>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trajectory) and (self._snapshot.place, self.row) == (other._snapshot.place, other.row)

    def __hash__(self) -> int:
        return hash((self._snapshot.place, self.row))


class _Nested(Mapping[str, Any]):
    def __init__(self, trajectory: Trajectory, prefix: str, names: set[str]) -> None:
        self._trajectory, self._prefix, self._names = trajectory, prefix, sorted(names)

    def __getitem__(self, name: str) -> Any:
        return self._trajectory[f"{self._prefix}/{name}"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Rows:
    """Rows of a field of one trajectory, decoded when they are asked for; NumPy takes it as an array."""

    def __init__(self, snapshot: Snapshot, field: str, start: int, stop: int) -> None:
        self._reader = snapshot.field(field)
        self._start, self._stop = start, stop
        self.field = field

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._reader.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._stop - self._start, *self._reader.layout.row_shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, key: Any) -> Any:
        first, *rest = key if isinstance(key, tuple) else (key,)
        rest_key = (slice(None), *rest)
        if isinstance(first, slice):
            low, high, step = indices(first, len(self))
            if step == 1:
                rows = self._reader.read(self._start + low, self._start + max(low, high))
                return rows[rest_key] if rest else rows
        if first is Ellipsis or first is None or isinstance(first, slice):
            return self._reader.read(self._start, self._stop)[key]
        chosen = np.asarray(first)
        if chosen.dtype == bool:
            return self._reader.read(self._start, self._stop)[key]
        if chosen.size and chosen.dtype.kind not in "iu":
            raise SchemaError(f"rows are chosen by integers, slices and masks, not by {first!r:.60}")
        if chosen.size and (chosen.min() < -len(self) or chosen.max() >= len(self)):
            raise NotFoundError(f"field {self.field!r} has {len(self)} rows here, and no row {first!r:.60}")
        flat = np.where(chosen < 0, chosen + len(self), chosen).astype(np.int64).reshape(-1) + self._start
        rows = self._reader.take(flat).reshape((*chosen.shape, *self.shape[1:]))
        return rows[(slice(None),) * chosen.ndim + tuple(rest)] if rest else rows[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("rows are decoded into new memory; np.asarray(rows) makes that copy")
        rows: Array = self[:]
        return rows if dtype is None else rows.astype(dtype, copy=False)

    def __iter__(self) -> Iterator[Any]:
        return iter(self[:])

    def __repr__(self) -> str:
        return f"<Rows of {self.field!r}: {self.shape} {self.dtype}>"


def _value(spec: Field, rows: Rows) -> Any:
    data = rows[:].tobytes()
    try:
        return data.decode("utf-8", "surrogatepass") if spec.dtype == "string" else typedjson.loads(data)
    except (UnicodeDecodeError, FormatError) as error:
        raise CorruptionError(f"{rows.field!r} holds no {spec.dtype} where a trajectory names one: {error}") from error
