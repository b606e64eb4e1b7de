"""Where the trajectories of earlier sessions lie: rows of the table by id."""

from __future__ import annotations

from typing import Any

import numpy as np

from trajstore.engine.snapshot import Snapshot
from trajstore.errors import NotFoundError
from trajstore.format.intervals import IntervalSet
from trajstore.format.schema import ID

Ints = np.ndarray[Any, np.dtype[np.int64]]


class Identity:
    """The trajectories in ``rows`` of a snapshot's table, by id.

    Notes
    -----
    Ids are given in the order of rows, so that most lookups read the rows in question and no others. Only a store that
    was merged may have them otherwise: there the first lookup reads and sorts them all.
    """

    def __init__(self, snapshot: Snapshot, rows: IntervalSet) -> None:
        self._snapshot = snapshot
        self._rows = rows
        self._sorted: tuple[Ints, Ints] | None = None

    def rows_of(self, ids: Ints) -> Ints:
        """int64 (n,). Raises ``NotFoundError``."""
        if int(ids.max()) < len(self._rows):
            rows = self._rows.nth(ids)
            if bool((self._snapshot.column(ID, rows) == ids).all()):
                return rows
        stored, rows = self._sorted = self._sorted or self._sort()
        place = np.minimum(np.searchsorted(stored, ids), len(stored) - 1)
        missing = stored[place] != ids
        if missing.any():
            raise NotFoundError(f"{self._snapshot.place} has no trajectory of the id {ids[missing][0]}")
        return rows[place]

    def _sort(self) -> tuple[Ints, Ints]:
        rows = self._rows.first(len(self._rows))
        stored = self._snapshot.column(ID, rows)
        order = np.argsort(stored, kind="stable")
        return stored[order], rows[order]
