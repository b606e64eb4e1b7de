"""The dataset: stores read as one, lazily, as one commit of each left them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Union, overload

import numpy as np

from trajstore.engine.cache import ChunkCache
from trajstore.engine.commit import is_root_of_parts
from trajstore.engine.index import bounds, locate, natural, spans
from trajstore.engine.partition import partition
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import CorruptionError, FormatError, MissingDependencyError, NotFoundError, SchemaError
from trajstore.format import typedjson
from trajstore.format.expression import Expression
from trajstore.format.layout import COMMITS, ROOT, is_temporary
from trajstore.format.schema import ID, MAIN_CLOCK, Column, Field, Schema
from trajstore.format.union import filling
from trajstore.media.hdf5storage import Hdf5Storage, is_hdf5
from trajstore.media.storage import LocalStorage, Storage

Place = Union[str, "os.PathLike[str]", Storage]
Array = np.ndarray[Any, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]

CACHE_BYTES = 64 << 20
LENGTH = "length"


def open(path: Place | Sequence[Place], *, cache_bytes: int = CACHE_BYTES) -> Dataset:
    """Open a store, the parts under a folder, or a list of these, as one dataset.

    Parameters
    ----------
    path : a store's folder, or an HDF5 file that was exported from one; a folder of stores (their order is that of
        their names, ``rank2`` before ``rank10``); or a list of such.
    cache_bytes : memory for decoded chunks, shared by all fields.

    Returns
    -------
    Dataset
        A snapshot of the last commit of each store. A store may be open for writing meanwhile.

    Raises
    ------
    NotFoundError
        There is no store.
    FormatError
        There is one that this version cannot read, or that is damaged.
    """
    places: list[Any] = list(path) if isinstance(path, (list, tuple)) else [path]
    if not places:
        raise NotFoundError("no store was given")
    storages = [storage for place in places for storage in stores(place)]
    return Dataset(tuple(places), storages, ChunkCache(cache_bytes))


def stores(place: Place) -> list[Storage]:
    """The stores that a path stands for: itself, or the parts directly inside it."""
    if isinstance(place, (str, os.PathLike)) and is_hdf5(place):
        return [Hdf5Storage(place)]
    storage: Storage = LocalStorage(place) if isinstance(place, (str, os.PathLike)) else place
    if _is_store(storage, "") and not is_root_of_parts(storage):
        return [storage]
    names = [name for name in storage.list("") if not is_temporary(name) and _is_store(storage, f"{name}/")]
    parts = [storage.child(name) for name in sorted(names, key=natural)]
    if not parts and is_root_of_parts(storage):
        raise NotFoundError(f"no part of {storage.describe()} has been committed yet", hint="open it again later")
    return parts or [storage]  # reading the storage itself then says what is missing


def _is_store(storage: Storage, prefix: str) -> bool:
    """A store that has lost its root is one all the same: opening it must say so, not leave it out."""
    return storage.size(f"{prefix}{ROOT}") is not None or bool(storage.list(f"{prefix}{COMMITS}"))


class Dataset:
    """Trajectories of one or several stores, or a selection of them; immutable.

    ``ds[i]`` is a :class:`Trajectory`; ``ds[a:b]``, ``ds[mask]``, ``ds[[3, 1]]`` and ``ds.where(...)`` are datasets.

    Notes
    -----
    Any number of threads may read. Pickles small, without caches or descriptors; safe to use after a fork.
    """

    def __init__(self, places: tuple[Place, ...], storages: Iterable[Storage], cache: ChunkCache) -> None:
        self._places = places
        self._cache = cache
        self._snapshots = tuple(Snapshot.of(storage, cache) for storage in storages)
        self._start()

    def _start(self, part: Ints | None = None, row: Ints | None = None) -> None:
        self._counts = np.array([len(snapshot.live) for snapshot in self._snapshots], np.int64)
        self._part, self._row = part, row  # of each trajectory, where this is a selection
        self._pairs: dict[str, Ints] = {}
        self._columns: dict[str, Array] = {}

    def _select(self, part: Ints, row: Ints) -> Dataset:
        view = object.__new__(Dataset)
        view._places, view._cache, view._snapshots = self._places, self._cache, self._snapshots
        view._start(part, row)
        return view

    def __getstate__(self) -> dict[str, Any]:
        return {
            "places": self._places,
            "cache_bytes": self._cache.limit,
            "snapshots": self._snapshots,
            "part": self._part,
            "row": self._row,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._places = state["places"]
        self._cache = ChunkCache(state["cache_bytes"])
        self._snapshots = state["snapshots"]
        for snapshot in self._snapshots:
            snapshot.cache = self._cache  # one for all of them
        self._start(state["part"], state["row"])

    # -- what there is ---------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self._counts.sum()) if self._row is None else len(self._row)

    def __repr__(self) -> str:
        stores = len(self._snapshots)
        place = self._snapshots[0].place if stores == 1 else f"{stores} stores"
        return f"<Dataset {place}: {len(self)} trajectories, {len(self.fields)} fields, {len(self.columns)} columns>"

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

    @property
    def table(self) -> Table:
        """The columns, one value for each trajectory."""
        return Table(self)

    @property
    def steps(self) -> Steps:
        """The fields, all trajectories end to end."""
        return Steps(self)

    def to_xarray(self, clock: str = MAIN_CLOCK) -> Any:
        """An ``xarray.Dataset`` of the fields on a clock, lazily (dask), rows end to end, trajectory after trajectory.

        Coordinates along the clock: ``trajectory`` (number in this dataset) and ``step`` (counted in the trajectory).
        Raises ``MissingDependencyError``.
        """
        xarray = _optional("xarray", "xarray")
        pairs = self.pairs(clock)
        counts = pairs[:, 1] - pairs[:, 0]
        number = np.repeat(np.arange(len(self), dtype=np.int64), counts)
        step = np.arange(len(number), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
        variables = {}
        for path, spec in self.fields.items():
            if spec.clock == clock and not spec.whole:
                name = path.replace("/", ".")
                inner = [f"{name}_{axis}" for axis in range(1, len(spec.shape) + 1)]
                variables[name] = ((clock, *inner), self.steps[path].to_dask())
        return xarray.Dataset(variables, {"trajectory": (clock, number), "step": (clock, step)})

    @property
    def deleted(self) -> Dataset:
        """The trajectories that were deleted and could be undeleted still."""
        rows = [snapshot.set("deleted") & snapshot.set("rows") for snapshot in self._snapshots]
        part = np.repeat(np.arange(len(rows), dtype=np.int64), [len(deleted) for deleted in rows])
        return self._select(part, np.concatenate([deleted.first(len(deleted)) for deleted in rows]))

    def refresh(self) -> Dataset:
        """The same stores as they are now; a selection stays the selection it was."""
        if self._row is None:
            return open(self._places, cache_bytes=self._cache.limit)
        fresh = object.__new__(Dataset)
        fresh._places, fresh._cache = self._places, self._cache
        fresh._snapshots = tuple(Snapshot.of(s.storage, self._cache) for s in self._snapshots)
        fresh._start(self._part, self._row)
        return fresh

    # -- choosing trajectories -------------------------------------------------------------------------------------

    @overload
    def __getitem__(self, key: int) -> Trajectory: ...
    @overload
    def __getitem__(self, key: slice | Sequence[int] | Array) -> Dataset: ...
    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, np.integer)):
            number = int(key)
            if not -len(self) <= number < len(self):
                raise NotFoundError(f"there is no trajectory {number}", hint=f"there are {len(self)}, counted from 0")
            part, row = self.locate(np.array([number % len(self)], np.int64))
            return Trajectory(self._snapshots[int(part[0])], int(row[0]), number % len(self))
        if isinstance(key, slice):
            chosen = bounds(key, len(self))
        else:
            chosen = np.asarray(key)
            if chosen.dtype == bool:
                if chosen.shape != (len(self),):
                    raise SchemaError(f"a mask of shape {chosen.shape} does not fit {len(self)} trajectories")
                chosen = np.flatnonzero(chosen)
            elif chosen.size == 0:
                chosen = chosen.astype(np.int64)
            elif chosen.dtype.kind not in "iu" or chosen.ndim != 1:
                raise SchemaError(f"a dataset is indexed by integers, slices and masks, not by {key!r:.60}")
            if chosen.size and (chosen.min() < -len(self) or chosen.max() >= len(self)):
                raise NotFoundError(f"an index is beyond the {len(self)} trajectories there are")
            chosen = np.where(chosen < 0, chosen + len(self), chosen)
        return self._select(*self.locate(chosen))

    def __iter__(self) -> Iterator[Trajectory]:
        for first in range(0, len(self), 1024):
            numbers = np.arange(first, min(first + 1024, len(self)), dtype=np.int64)
            part, row = self.locate(numbers)
            for number, p, r in zip(numbers.tolist(), part.tolist(), row.tolist()):
                yield Trajectory(self._snapshots[p], r, number)

    def where(self, expression: str) -> Dataset:
        """The trajectories for which an expression over the columns holds.

        Columns, ``length`` and string fields by name; comparisons, arithmetic, ``and or not``, ``& | ~``, ``in``.
        Example: ``ds.where("success & (length > 50)")``. Raises ``SchemaError`` for what is no expression,
        ``NotFoundError`` for a name that is no column.
        """
        return self[self.matching(expression)]

    def matching(self, expression: str) -> Ints:
        """The numbers, int64 (n,), of the trajectories that :meth:`where` gives."""
        parsed = Expression(expression)
        table = self.table
        parsed.check(list(table))
        mask = parsed.evaluate({name: table[name] for name in parsed.names})
        return np.flatnonzero(np.broadcast_to(mask, (len(self),)))

    def __add__(self, other: Dataset) -> Dataset:
        """The trajectories of both, end to end; nothing is copied."""
        if not isinstance(other, Dataset):
            return NotImplemented
        (part, row), (other_part, other_row) = self._all(), other._all()
        view = object.__new__(Dataset)
        view._places, view._cache = (*self._places, *other._places), self._cache
        others = tuple(Snapshot(s.storage, s.manifest, self._cache) for s in other._snapshots)
        view._snapshots = self._snapshots + others
        view._start(np.concatenate((part, other_part + len(self._snapshots))), np.concatenate((row, other_row)))
        return view

    def split(
        self,
        *,
        first: int | None = None,
        fractions: Mapping[str, float] | None = None,
        where: str | None = None,
        mask: Array | None = None,
        by: str | None = None,
        parts: int | None = None,
        seed: int | None = None,
    ) -> dict[str, Dataset]:
        """The dataset divided into parts by one rule, without writing anything.

        Parameters
        ----------
        first : ``first`` has so many trajectories, ``rest`` the others.
        fractions : of all, by name: ``{"train": 0.9, "test": 0.1}``.
        where, mask : ``match`` are those for which an expression holds, or a mask (n,) is true; ``rest`` the others.
        by : a part for each value of a column, called ``column.value``.
        parts : so many blocks, ``rank0``, ``rank1``, …
        seed : draw at random instead of from the front.

        Raises ``SchemaError`` if no rule is given, or several.
        """
        if where is not None and mask is None:
            mask = np.zeros(len(self), np.bool_)
            mask[self.matching(where)] = True
        values = None if by is None else (by, self.table[by])
        chosen = partition(len(self), first=first, fractions=fractions, mask=mask, by=values, parts=parts, seed=seed)
        return {name: self[positions] for name, positions in chosen.items()}

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

    # -- reading ---------------------------------------------------------------------------------------------------

    def _all(self) -> tuple[Ints, Ints]:
        return self.locate(np.arange(len(self), dtype=np.int64))

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
                raise NotFoundError(f"there is no column {name!r}", hint="there are " + ", ".join(self.columns))
            values = np.empty(len(row), np.dtype(spec.dtype))
            for p, mine in _groups(part, len(self._snapshots)):
                if name in self._snapshots[p].manifest.schema.columns:
                    values[mine] = self._snapshots[p].column(name, row[mine])
                else:
                    values[mine] = _filling(name, spec, self._snapshots[p])
            values.setflags(write=False)
            self._columns[name] = values
        return values

    def field_pairs(self, field: str) -> Ints:
        """Start and stop of every trajectory in a field, int64 (n, 2); rows of the trajectory's own store."""
        clocks = {s.manifest.schema.fields[field].clock for s in self._having(field)}
        if len(clocks) == 1 and len(self._having(field)) == len(self._snapshots):
            return self.pairs(str(clocks.pop()))
        part, row = self._all()
        pairs = np.full((len(row), 2), -1, np.int64)
        for p, mine in _groups(part, len(self._snapshots)):
            spec = self._snapshots[p].manifest.schema.fields.get(field)
            if spec is not None:
                pairs[mine] = self._snapshots[p].pairs(str(spec.clock), row[mine])
        return pairs

    def _having(self, field: str) -> list[Snapshot]:
        found = [s for s in self._snapshots if field in s.manifest.schema.fields]
        if not found:
            self._snapshots[0].field(field)
        return found

    def take(self, field: str, trajectories: Ints, steps: Ints, out: Array | None = None) -> Array:
        """Single rows of a field: row ``steps[i]`` of trajectory ``trajectories[i]``; (n, *shape), one gather.

        Raises ``NotFoundError`` for a row beyond its trajectory.
        """
        pairs = self.field_pairs(field)[trajectories]
        rows = pairs[:, 0] + steps
        if len(rows) and bool(((steps < 0) | (rows >= pairs[:, 1])).any()):
            bad = int(np.flatnonzero((steps < 0) | (rows >= pairs[:, 1]))[0])
            raise NotFoundError(f"trajectory {int(trajectories[bad])} has no row {int(steps[bad])} in field {field!r}")
        return self._gather(field, self._part_of(trajectories), rows, out)

    def read(self, field: str, trajectories: Ints | None = None, out: Array | None = None) -> Array:
        """All rows of a field of the given trajectories (all of them), end to end: (rows, *shape), one gather."""
        pairs = self.field_pairs(field)
        if trajectories is None:
            trajectories = np.arange(len(self), dtype=np.int64)
        pairs = pairs[trajectories]
        if len(self._snapshots) == 1:
            return self._snapshots[0].field(field).read_runs(pairs[:, 0], pairs[:, 1], out)
        part = np.repeat(self._part_of(trajectories), pairs[:, 1] - pairs[:, 0])
        return self._gather(field, part, spans(pairs[:, 0], pairs[:, 1]), out)

    def _part_of(self, trajectories: Ints) -> Ints:
        if len(self._snapshots) == 1:
            return np.zeros(len(trajectories), np.int64)
        return self.locate(np.asarray(trajectories, np.int64))[0]

    def _gather(self, field: str, part: Ints, rows: Ints, out: Array | None) -> Array:
        groups = _groups(part, len(self._snapshots))
        if len(groups) == 1 and len(part):
            return self._snapshots[groups[0][0]].field(field).take(rows, out)
        reader = self._having(field)[0].field(field)
        if out is None:
            out = np.empty((len(rows), *reader.layout.row_shape), reader.dtype)
        for p, mine in groups:
            reader = self._snapshots[p].field(field)
            if reader.dtype == out.dtype and type(mine) is not slice:
                reader.take(rows[mine], out, mine)
            else:
                out[mine] = reader.take(rows[mine])
        return out

    def batches(
        self, size: int, *, fields: Sequence[str] | None = None, by: str = LENGTH, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Batches of trajectories of one length, shortest first: each field as one (size, T, *shape) array.

        Parameters
        ----------
        size : trajectories in a batch; the last of each length may have fewer, unless ``drop_last``.
        fields : which to read; by default those on the main clock.
        by : the integer column that groups them; any but ``length`` must make equal lengths.
        """
        if size < 1:
            raise SchemaError(f"a batch of {size} trajectories")
        names = list(fields) if fields is not None else self.schema.on_clock(MAIN_CLOCK)
        key = self.table[by]
        order = np.argsort(key, kind="stable")
        edges = np.flatnonzero(np.diff(key[order])) + 1
        for group in np.split(order, edges):
            for first in range(0, len(group), size):
                chosen = group[first : first + size]
                if len(chosen) == size or not drop_last:
                    yield self._batch(chosen.astype(np.int64), names)

    def _batch(self, chosen: Ints, names: list[str]) -> Batch:
        batch = Batch(index=chosen)
        for name in names:
            pairs = self.field_pairs(name)[chosen]
            counts = pairs[:, 1] - pairs[:, 0]
            if len(counts) and bool((counts != counts[0]).any()):
                raise SchemaError(f"field {name!r} has different lengths within a batch", hint="group by its length")
            rows = self.read(name, chosen)
            batch[name] = rows.reshape(len(chosen), -1, *rows.shape[1:])
        return batch


class Batch(dict[str, Any]):
    """Arrays by field; ``index`` : numbers of the trajectories in the dataset, int64 (B,)."""

    def __init__(self, index: Ints) -> None:
        super().__init__()
        self.index = index


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
        if first is Ellipsis or first is None or (isinstance(first, slice) and first.step not in (None, 1)):
            return self._reader.read(self._start, self._stop)[key]
        if isinstance(first, slice):
            low, high, _ = first.indices(len(self))
            rows = self._reader.read(self._start + low, self._start + max(low, high))
            return rows[rest_key] if rest else rows
        chosen = np.asarray(first)
        if chosen.dtype == bool:
            return self._reader.read(self._start, self._stop)[key]
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


class Table(Mapping[str, Any]):
    """The columns of a dataset: name to values (n,); ``length`` and string fields among them."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._strings = [name for name, spec in dataset.fields.items() if spec.dtype == "string"]

    def __getitem__(self, name: str) -> Array:
        if name in self._dataset.columns:
            return self._dataset.column(name)
        if name == LENGTH:
            return self._dataset.lengths
        if name in self._strings:
            values = np.empty(len(self._dataset), object)
            values[:] = [trajectory[name] for trajectory in self._dataset]
            return values
        raise NotFoundError(f"there is no column {name!r}", hint="there are " + ", ".join(self))

    def __iter__(self) -> Iterator[str]:
        yield from self._dataset.columns
        if LENGTH not in self._dataset.columns:
            yield LENGTH
        yield from self._strings

    def __len__(self) -> int:
        return len(list(iter(self)))

    def to_pandas(self) -> Any:
        """A pandas DataFrame, one row for each trajectory. Raises ``MissingDependencyError``."""
        return _optional("pandas", "pandas").DataFrame({name: self[name] for name in self})

    def __repr__(self) -> str:
        return f"<Table of {len(self._dataset)} trajectories: {', '.join(self)}>"


def _optional(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.split(".")[0]
        raise MissingDependencyError(
            f"this needs {name}", hint=f"pip install 'trajstore[{extra}]'", name=name
        ) from error


class Steps(Mapping[str, "StepRows"]):
    """The fields of a dataset, each as one long array of the rows that trajectories name."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitem__(self, field: str) -> StepRows:
        return StepRows(self._dataset, field)

    def __iter__(self) -> Iterator[str]:
        return iter(self._dataset.fields)

    def __len__(self) -> int:
        return len(self._dataset.fields)


class StepRows:
    """All rows of a field, trajectory after trajectory, decoded when they are asked for: (rows, *shape)."""

    def __init__(self, dataset: Dataset, field: str) -> None:
        self._dataset = dataset
        self.field = field
        pairs = dataset.field_pairs(field)
        self._starts = pairs[:, 0]
        self._counts = pairs[:, 1] - pairs[:, 0]
        self._rows = int(self._counts.sum())
        reader = dataset._having(field)[0].field(field)
        self.dtype = reader.dtype
        self.shape = (self._rows, *reader.layout.row_shape)
        #: Rows that lie in one shard; a good block for whoever reads everything.
        self.block_rows = reader.layout.shard_rows

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, key: Any) -> Any:
        first, *rest = key if isinstance(key, tuple) else (key,)
        if isinstance(first, slice):
            low, high, step = first.indices(len(self))
            positions = np.arange(low, high, step, dtype=np.int64)
        else:
            positions = np.asarray(first)
            if positions.dtype == bool:
                positions = np.flatnonzero(positions)
            if positions.size and (positions.min() < -len(self) or positions.max() >= len(self)):
                raise NotFoundError(f"field {self.field!r} has {len(self)} rows, and no row {first!r:.60}")
            positions = np.where(positions < 0, positions + len(self), positions).astype(np.int64)
        flat = positions.reshape(-1)
        run, inner = locate(flat, self._counts)
        rows = self._dataset._gather(self.field, self._dataset._part_of(run), self._starts[run] + inner, None).reshape(
            (*positions.shape, *self.shape[1:])
        )
        return rows[(slice(None),) * positions.ndim + tuple(rest)] if rest else rows[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("rows are decoded into new memory; np.asarray(rows) makes that copy")
        rows: Array = self[:]
        return rows if dtype is None else rows.astype(dtype, copy=False)

    def to_awkward(self) -> Any:
        """An Awkward array, one ragged entry for each trajectory, in memory. Raises ``MissingDependencyError``."""
        awkward = _optional("awkward", "awkward")
        return awkward.unflatten(awkward.from_numpy(self[:]), self._counts)

    def to_dask(self) -> Any:
        """A dask array of these rows, one block for each shard's worth. Raises ``MissingDependencyError``."""
        array = _optional("dask.array", "dask")
        return array.from_array(self, chunks=(self.block_rows, *self.shape[1:]), asarray=False)

    def __repr__(self) -> str:
        return f"<StepRows of {self.field!r}: {self.shape} {self.dtype}>"
