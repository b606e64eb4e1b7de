"""A place in a store of trajectories, to be kept in a checkpoint instead of a copy of them.

ckpts.save(step, state, meta={"replay": cursor(trajstore.open("replay.zarr"))})
...
replay = open_at(restored.meta["replay"])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trajstore.dataset import Dataset
from trajstore.dataset import open as open_dataset
from trajstore.errors import ConflictError, FormatError


def cursor(dataset: Dataset) -> dict[str, Any]:
    """Where a dataset stands: for each of its stores the path, the commit, and how many ids it had given out.

    A few hundred bytes, whatever the dataset holds. Plain values, for ``meta`` or the state itself.
    """
    return {
        "stores": [
            {
                "path": snapshot.place,
                "commit": snapshot.manifest.commit.number,
                "uuid": snapshot.manifest.commit.uuid,
                "next_id": int(snapshot.manifest.counts.get("next_id", 0)),
            }
            for snapshot in dataset.snapshots
        ]
    }


def open_at(place: Mapping[str, Any], path: Any = None) -> Dataset:
    """The dataset as it was at a cursor: the trajectories that were there then and have not been deleted since.

    Parameters
    ----------
    path : where the stores are now, if they were moved; their order must be the same.

    Raises
    ------
    ConflictError : a store has given out fewer ids than it had then: it is another one, or an older copy.
    FormatError : not a cursor.
    """
    try:
        stores = [(str(store["path"]), int(store["next_id"])) for store in place["stores"]]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"not a cursor into a store: {str(place)[:80]}") from error
    paths: Any = [store for store, _ in stores]
    dataset = open_dataset(path if path is not None else paths[0] if len(paths) == 1 else paths)
    if len(dataset.snapshots) < len(stores):
        raise ConflictError(f"the cursor is of {len(stores)} stores, there are {len(dataset.snapshots)}")
    limits = []
    for snapshot, (_, next_id) in zip(dataset.snapshots, stores):
        if int(snapshot.manifest.counts.get("next_id", 0)) < next_id:
            raise ConflictError(
                f"{snapshot.place} has fewer trajectories than when the cursor was made",
                hint="it is another store, or an older copy: open the one that the run wrote",
            )
        limits.append(np.full(len(snapshot.live), next_id))
    # A part that joined since was not there then.
    limits += [np.zeros(len(snapshot.live), int) for snapshot in dataset.snapshots[len(stores) :]]
    return dataset[np.asarray(dataset.table["id"]) < np.concatenate(limits)]
