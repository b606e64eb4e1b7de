"""The dataset: stores read as one, lazily, as one commit of each left them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Union, overload

import numpy as np

from trajstore.engine.cache import ChunkCache
from trajstore.engine.commit import is_root_of_parts
from trajstore.engine.index import bounds, natural
from trajstore.engine.optional import optional
from trajstore.engine.partition import partition
from trajstore.engine.selection import Selection
from trajstore.engine.snapshot import Snapshot
from trajstore.engine.steps import StepRows, Steps
from trajstore.engine.table import Table
from trajstore.engine.trajectory import Rows, Trajectory
from trajstore.errors import NotFoundError, SchemaError
from trajstore.format.arguments import check_count, field_names
from trajstore.format.expression import Expression
from trajstore.format.layout import COMMITS, ROOT, is_temporary
from trajstore.format.schema import LENGTH, MAIN_CLOCK
from trajstore.media.hdf5storage import Hdf5Storage, is_hdf5
from trajstore.media.remotestorage import RemoteStorage
from trajstore.media.storage import LocalStorage, Storage, is_url, local_path

__all__ = ["LENGTH", "Batch", "Dataset", "Place", "Rows", "StepRows", "Table", "Trajectory", "open", "stores"]

Place = Union[str, "os.PathLike[str]", Storage]
Array = np.ndarray[Any, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]

CACHE_BYTES = 64 << 20


def open(
    path: Place | Sequence[Place],
    *,
    cache_bytes: int = CACHE_BYTES,
    storage_options: Mapping[str, Any] | None = None,
) -> Dataset:
    """Open a store, the parts under a folder, or a list of these, as one dataset.

    Parameters
    ----------
    path : a store's folder, or an HDF5 file that was exported from one; a folder of stores (their order is that of
        their names, ``rank2`` before ``rank10``); a URL of either folder, such as ``"s3://bucket/run"``; or a list of
        such.
    cache_bytes : memory for decoded chunks, shared by all fields.
    storage_options : of URLs, for fsspec: credentials, an endpoint.

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
    StorageError, MissingDependencyError
        It cannot be reached.
    """
    check_count("cache_bytes", cache_bytes)
    places: list[Any] = list(path) if isinstance(path, (list, tuple)) else [path]
    if not places:
        raise NotFoundError("no store was given")
    places = [RemoteStorage(place, dict(storage_options or {})) if is_url(place) else place for place in places]
    cache = ChunkCache(cache_bytes)
    snapshots = tuple(Snapshot.of(storage, cache) for place in places for storage in stores(place))
    return Dataset(tuple(places), snapshots, cache)


def stores(place: Place) -> list[Storage]:
    """The stores that a path stands for: itself, or the parts directly inside it."""
    storage = _storage(place)
    if isinstance(storage, Hdf5Storage):
        return [storage]
    if _is_store(storage, "") and not is_root_of_parts(storage):
        return [storage]
    names = [name for name in storage.list("") if not is_temporary(name) and _is_store(storage, f"{name}/")]
    parts = [storage.child(name) for name in sorted(names, key=natural)]
    if not parts and is_root_of_parts(storage):
        raise NotFoundError(f"no part of {storage.describe()} has been committed yet", hint="open it again later")
    return parts or [storage]  # reading the storage itself then says what is missing


def _storage(place: Place) -> Storage:
    if not isinstance(place, (str, os.PathLike)):
        if not hasattr(place, "describe"):
            local_path(place)  # says what a place is
        return place
    if is_url(place):
        return RemoteStorage(str(place))
    local = LocalStorage(place)
    return Hdf5Storage(place) if is_hdf5(place) else local


def _is_store(storage: Storage, prefix: str) -> bool:
    """A store that has lost its root is one all the same: opening it must say so, not leave it out."""
    return storage.size(f"{prefix}{ROOT}") is not None or bool(storage.list(f"{prefix}{COMMITS}"))


class Dataset(Selection):
    """Trajectories of one or several stores, or a selection of them; immutable.

    ``ds[i]`` is a :class:`Trajectory`; ``ds[a:b]``, ``ds[mask]``, ``ds[[3, 1]]`` and ``ds.where(...)`` are datasets.

    Notes
    -----
    Any number of threads may read. Pickles small, without caches or descriptors; safe to use after a fork.
    """

    def __init__(
        self,
        places: tuple[Place, ...],
        snapshots: tuple[Snapshot, ...],
        cache: ChunkCache,
        part: Ints | None = None,
        row: Ints | None = None,
    ) -> None:
        super().__init__(snapshots, part, row)
        self._places = places
        self._cache = cache

    def _select(self, part: Ints, row: Ints) -> Dataset:
        return Dataset(self._places, self._snapshots, self._cache, part, row)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "places": self._places,
            "cache_bytes": self._cache.limit,
            "snapshots": self._snapshots,
            "part": self._part,
            "row": self._row,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        cache = ChunkCache(state["cache_bytes"])
        for snapshot in state["snapshots"]:
            snapshot.cache = cache  # one for all of them
        Dataset.__init__(self, state["places"], state["snapshots"], cache, state["part"], state["row"])

    def __repr__(self) -> str:
        stores = len(self._snapshots)
        place = self._snapshots[0].place if stores == 1 else f"{stores} stores"
        return f"<Dataset {place}: {len(self)} trajectories, {len(self.fields)} fields, {len(self.columns)} columns>"

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
        Raises ``MissingDependencyError``, and ``NotFoundError`` for a clock that there is not.
        """
        xarray = optional("xarray", "xarray")
        clocks = self.schema.clocks
        if clock != MAIN_CLOCK and clock not in clocks:
            raise NotFoundError(f"there is no clock {clock!r}", hint=f"there are {', '.join(clocks) or 'none'}")
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
        snapshots = tuple(Snapshot.of(s.storage, self._cache) for s in self._snapshots)
        return Dataset(self._places, snapshots, self._cache, self._part, self._row)

    # -- choosing trajectories -------------------------------------------------------------------------------------

    @overload
    def __getitem__(self, key: int) -> Trajectory: ...
    @overload
    def __getitem__(self, key: slice | Sequence[int] | Array) -> Dataset: ...
    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
            number = int(key)
            if not -len(self) <= number < len(self):
                raise NotFoundError(f"there is no trajectory {number}", hint=f"there are {len(self)}, counted from 0")
            part, row = self.locate(np.array([number % len(self)], np.int64))
            return Trajectory(self._snapshots[int(part[0])], int(row[0]), number % len(self))
        if isinstance(key, slice):
            chosen = bounds(key, len(self))
        else:
            try:
                chosen = np.asarray(key)
            except ValueError as error:
                raise SchemaError(f"a dataset is not indexed by {key!r:.60}: {error}") from None
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
        others = tuple(Snapshot(s.storage, s.manifest, self._cache) for s in other._snapshots)
        return Dataset(
            (*self._places, *other._places),
            self._snapshots + others,
            self._cache,
            np.concatenate((part, other_part + len(self._snapshots))),
            np.concatenate((row, other_row)),
        )

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

    # -- batches ---------------------------------------------------------------------------------------------------

    def batches(
        self, size: int, *, fields: Sequence[str] | None = None, by: str = LENGTH, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Batches of trajectories of one length, shortest first: each field as one (size, T, *shape) array.

        Parameters
        ----------
        size : trajectories in a batch; the last of each length may have fewer, unless ``drop_last``.
        fields : which to read, or one; by default those on the main clock.
        by : the integer column that groups them; any but ``length`` must make equal lengths.
        """
        check_count("a batch, a number of trajectories,", size, 1)
        names = self.schema.on_clock(MAIN_CLOCK) if fields is None else field_names(fields)
        for name in names:
            if (spec := self.fields.get(name)) is not None and spec.whole:
                raise SchemaError(f"field {name!r} holds {spec.dtype}, which makes no batch", hint="leave it out")
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
