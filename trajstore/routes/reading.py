"""A dataset's routes under the names, in the dtypes and in the order of a ``routes.npz``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from trajstore.dataset import Dataset
from trajstore.errors import NotFoundError
from trajstore.format import typedjson
from trajstore.format.progress import Progress
from trajstore.format.schema import ID
from trajstore.routes.episodes import unpack
from trajstore.routes.keys import EPISODES, EPISODES_INDEX, META_KEYS, PREFIX, ordered, path_of
from trajstore.routes.recording import routes_state

__all__ = ["RoutesView"]

Array = np.ndarray[Any, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]

_BATCH_BYTES = 16 << 20


class RoutesView:
    """The routes of a dataset.

    Parameters
    ----------
    dataset : of any origin; where it was not made of routes, its fields and columns take their names with ``routes_``.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._states = [
            routes_state(Progress.state_from_json(snapshot.manifest.progress)[1]) for snapshot in dataset.snapshots
        ]

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def keys(self) -> list[str]:
        """The keys of the file, in its order, without ``meta``; of a store not made of routes, all."""
        recorded = [key for state in self._states for key in state.get("keys", [])]
        return ordered(key for key in recorded if self._is_there(key)) if recorded else self.available

    @property
    def available(self) -> list[str]:
        """All that can be asked for: also fields and columns that came to the store in another way."""
        recorded = [key for state in self._states for key in state.get("keys", [])]
        paths = {path_of(key) for key in recorded} | {ID, EPISODES_INDEX}
        fields = [path for path in self.dataset.fields if not path.startswith(f"{EPISODES}/")]
        names = [PREFIX + path for path in (*self.dataset.columns, *fields) if path not in paths]
        if "ep_len" not in paths and PREFIX + "ep_len" not in names:
            names.append(PREFIX + "ep_len")
        if EPISODES_INDEX in self.dataset.fields:
            names.append(EPISODES)
        return ordered([*(key for key in recorded if self._is_there(key)), *names])

    def _is_there(self, key: str) -> bool:
        path = EPISODES_INDEX if key == EPISODES else path_of(key)
        return path in self.dataset.fields or path in self.dataset.columns

    def is_column(self, key: str) -> bool:
        """Whether a key is a plain array, one value a route, and not an array of objects."""
        path = path_of(key)
        return path in self.dataset.columns or (path == "ep_len" and path not in self.dataset.fields)

    def column(self, key: str) -> Array:
        """A plain key (n,)."""
        path = path_of(key)
        if path == "ep_len" and path not in self.dataset.columns:
            return self.dataset.lengths
        return self.dataset.column(path)

    def elements(self, key: str, numbers: Ints | None = None) -> Iterator[Any]:
        """The elements of an object key, one route after another, read in batches of some 16 MiB.

        Arrays may share memory within a batch, so whoever keeps one keeps its batch.
        """
        numbers = np.arange(len(self), dtype=np.int64) if numbers is None else np.asarray(numbers, np.int64)
        if key == EPISODES:
            yield from self._episodes(numbers)
            return
        path = path_of(key)
        spec = self.dataset.fields.get(path)
        if spec is None:
            raise NotFoundError(f"there is no key {key!r}", hint=f"there are {', '.join(self.keys) or 'none'}")
        if spec.dtype == "json":
            yield from (None if rows is None else typedjson.loads(rows.tobytes()) for rows in self._rows(path, numbers))
        elif spec.dtype == "string":
            for rows in self._rows(path, numbers):
                yield None if rows is None else rows.tobytes().decode("utf-8", "surrogatepass")
        else:
            empty = self._empty(path)
            yield from (empty if rows is None else rows for rows in self._rows(path, numbers))

    def _empty(self, path: str) -> Array:
        """What a route that does not have a field gives: no rows."""
        spec = self.dataset.fields[path]
        return np.empty((0, *spec.shape), spec.in_memory)

    def _rows(self, path: str, numbers: Ints) -> Iterator[Array | None]:
        """The rows of a field, route by route; ``None`` where a route does not have it."""
        pairs = self.dataset.field_pairs(path)[numbers]
        counts = pairs[:, 1] - pairs[:, 0]
        one = self._empty(path)
        row_bytes = max(one.dtype.itemsize * int(np.prod(one.shape[1:])), 1)
        ends = np.cumsum(counts) * row_bytes
        first = 0
        while first < len(numbers):
            before = int(ends[first - 1]) if first else 0
            last = max(int(np.searchsorted(ends, before + _BATCH_BYTES, side="right")), first + 1)
            last = min(last, first + 4096)
            rows = self.dataset.read(path, numbers[first:last])
            at = 0
            for i in range(first, last):
                yield rows[at : at + int(counts[i])] if pairs[i, 0] >= 0 else None
                at += int(counts[i])
            del rows
            first = last

    def _episodes(self, numbers: Ints) -> Iterator[object]:
        paths = [path for path in self.dataset.fields if path.startswith(f"{EPISODES}/")]
        streams = [self._rows(path, numbers) for path in paths]
        for index in self._rows(EPISODES_INDEX, numbers):
            arrays = {path: rows for path, rows in zip(paths, (next(s) for s in streams)) if rows is not None}
            yield None if index is None else unpack(typedjson.loads(index.tobytes()), arrays)

    def meta(self, routes: int | None = None) -> dict[str, Any]:
        """What the file's ``meta`` holds, for the first ``routes`` of the routes (all of them)."""
        count = len(self) if routes is None else routes
        template = next((state["meta"] for state in self._states if isinstance(state.get("meta"), dict)), None)
        meta = dict(template) if template is not None else self._meta_from_config()
        if len(self._states) > 1:
            meta["seeds_attempted"] = sum(int(state.get("seeds_attempted") or 0) for state in self._states)
        if meta.get("num_tasks_collected") != count:
            meta["num_tasks_collected"] = count
        return meta

    def _meta_from_config(self) -> dict[str, Any]:
        manifest = self.dataset.snapshots[0].manifest
        values = manifest.config.get("values", {})
        target, _ = Progress.state_from_json(manifest.progress)
        meta = {key: values.get(key) for key in META_KEYS}
        meta["num_tasks_target"] = len(self) if target is None else target
        meta["seeds_attempted"] = sum(len(s.set("attempted")) for s in self.dataset.snapshots)
        meta["seed_offset"] = meta["seed_offset"] or 0
        return meta
