"""diffusion_policy's and UMI's Zarr replay buffer into a store."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from trajstore.engine.optional import optional
from trajstore.errors import FormatError
from trajstore.operations.filling import Parts, fill_store
from trajstore.operations.output import Exported


def import_diffusion_policy(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Exported:
    """Make a store of a replay buffer, a folder or a ``.zarr.zip``: each array under ``data`` becomes a field.

    ``options`` are those of :func:`trajstore.create`. Raises ``FormatError`` where lengths and ends disagree.
    """
    zarr = optional("zarr", "zarr")
    place = os.fspath(source)
    store: Any = zarr.storage.ZipStore(place, mode="r") if place.endswith(".zip") else place
    try:
        root: Any = zarr.open_group(store, mode="r")
        ends = np.asarray(root["meta/episode_ends"][:], np.int64)
        arrays = dict(root["data"].arrays())
    except (KeyError, ValueError, OSError) as error:
        raise FormatError(f"{place} is no diffusion_policy replay buffer: {error}") from error
    for name, array in arrays.items():
        if array.shape[0] != (ends[-1] if len(ends) else 0):
            raise FormatError(f"{place}: data/{name} has {array.shape[0]} rows, episode_ends says {ends[-1]}")
    starts = np.concatenate(([0], ends[:-1]))
    runs = list(zip(starts.tolist(), ends.tolist()))[:limit]
    trajectories: Iterator[Parts] = (
        ({name: np.asarray(array[start:stop]) for name, array in arrays.items()}, {}) for start, stop in runs
    )
    return fill_store(destination, trajectories, len(runs), progress=progress, **options)
