"""Delete: trajectories leave the table by one commit, and come back by another, until a compaction drops their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from trajstore.dataset import Dataset, Place, stores
from trajstore.dataset import open as open_dataset
from trajstore.errors import NotFoundError, SchemaError
from trajstore.format.arguments import whole_numbers
from trajstore.format.intervals import IntervalSet
from trajstore.format.schema import ID
from trajstore.operations.amendment import amending


def delete(place: Place, *, where: str | None = None, ids: Iterable[int] | None = None) -> int:
    """Delete the trajectories for which an expression holds, or those of some ids; how many there were.

    Each store of the place gets one commit. Rows stay on disk: :func:`undelete` brings them back, and a ``compact``,
    which writes a new store, leaves them out. Readers that do not know the feature ``deleted`` are refused by then.

    Raises
    ------
    SchemaError
        Neither ``where`` nor ``ids`` is given, or both.
    NotFoundError
        An id is not there.
    LockedError
        A writer has the store open.
    """
    return _edit(place, where, ids, lambda dataset: dataset, lambda deleted, rows: deleted | rows)


def undelete(
    place: Place, *, where: str | None = None, ids: Iterable[int] | None = None, everything: bool = False
) -> int:
    """Bring back deleted trajectories: those for which an expression holds, those of some ids, or all; how many.

    Raises what :func:`delete` raises.
    """
    if everything:
        if where is not None or ids is not None:
            raise SchemaError("either everything is undeleted, or what `where` or `ids` says")
        where = "id == id"
    return _edit(place, where, ids, lambda dataset: dataset.deleted, lambda deleted, rows: deleted - rows)


Edit = Callable[[IntervalSet, IntervalSet], IntervalSet]


def _edit(
    place: Place, where: str | None, ids: Iterable[int] | None, among: Callable[[Dataset], Dataset], edit: Edit
) -> int:
    if (where is None) == (ids is None):
        raise SchemaError("trajectories are chosen by `where` or by `ids`", hint="for example: where='length < 5'")
    wanted = None if ids is None else np.unique(whole_numbers("ids", ids))
    found = stores(place)
    if wanted is not None and len(found) > 1:
        raise SchemaError(f"{place} holds {len(found)} stores, and an id may be in several", hint="give one of them")
    count = 0
    for storage in found:
        with amending(storage) as amendment:
            candidates = among(open_dataset(storage))
            numbers = candidates.matching(where) if where is not None else _positions(candidates, wanted)
            if not len(numbers):
                continue
            rows = IntervalSet.of(candidates.locate(numbers)[1])
            amendment.commit(sets={"deleted": edit(amendment.snapshot.set("deleted"), rows)})
            count += len(rows)
    return count


def _positions(dataset: Dataset, wanted: Any) -> Any:
    ids = dataset.table[ID]
    missing = wanted[~np.isin(wanted, ids)]
    if len(missing):
        shown = ", ".join(map(str, missing[:10].tolist())) + (" …" if len(missing) > 10 else "")
        raise NotFoundError(f"{dataset.snapshots[0].place} has no trajectory {shown} to be found here")
    return np.flatnonzero(np.isin(ids, wanted))
