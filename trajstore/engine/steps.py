"""The fields of a selection, each as one long array of the rows that its trajectories name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trajstore.engine.index import bounds, locate
from trajstore.engine.optional import optional
from trajstore.engine.selection import Selection
from trajstore.errors import NotFoundError, SchemaError

Array = np.ndarray[Any, Any]


class Steps(Mapping[str, "StepRows"]):
    """The fields of a dataset, each as one long array of the rows that trajectories name."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection

    def __getitem__(self, field: str) -> StepRows:
        return StepRows(self._selection, field)

    def __iter__(self) -> Iterator[str]:
        return iter(self._selection.fields)

    def __len__(self) -> int:
        return len(self._selection.fields)


class StepRows:
    """All rows of a field, trajectory after trajectory, decoded when they are asked for: (rows, *shape)."""

    def __init__(self, selection: Selection, field: str) -> None:
        self._selection = selection
        self.field = field
        pairs = selection.field_pairs(field)
        self._starts = pairs[:, 0]
        self._counts = pairs[:, 1] - pairs[:, 0]
        self._rows = int(self._counts.sum())
        reader = selection.reader(field)
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
            positions = bounds(first, len(self))
        else:
            positions = np.asarray(first)
            if positions.dtype == bool:
                positions = np.flatnonzero(positions)
            if positions.size and positions.dtype.kind not in "iu":
                raise SchemaError(f"rows are chosen by integers, slices and masks, not by {first!r:.60}")
            if positions.size and (positions.min() < -len(self) or positions.max() >= len(self)):
                raise NotFoundError(f"field {self.field!r} has {len(self)} rows, and no row {first!r:.60}")
            positions = np.where(positions < 0, positions + len(self), positions).astype(np.int64)
        flat = positions.reshape(-1)
        run, inner = locate(flat, self._counts)
        rows = self._selection.gather(self.field, run, self._starts[run] + inner).reshape(
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
        awkward = optional("awkward", "awkward")
        return awkward.unflatten(awkward.from_numpy(self[:]), self._counts)

    def to_dask(self) -> Any:
        """A dask array of these rows, one block for each shard's worth. Raises ``MissingDependencyError``."""
        array = optional("dask.array", "dask")
        return array.from_array(self, chunks=(self.block_rows, *self.shape[1:]), asarray=False)

    def __repr__(self) -> str:
        return f"<StepRows of {self.field!r}: {self.shape} {self.dtype}>"
