"""A dataset into a ``routes.npz``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from trajstore.dataset import Dataset
from trajstore.dataset import open as open_dataset
from trajstore.errors import SchemaError
from trajstore.npz import NpzWriter
from trajstore.operations.carriage import EVERYTHING
from trajstore.operations.output import Exported, counted
from trajstore.operations.roles import chosen
from trajstore.routes import META, MODES, RoutesView, resolve

__all__ = ["MODES", "export_routes"]

CARRIES = {
    "routes": replace(
        EVERYTHING,
        bfloat16="as float32",
        extra_row="rows alone",
        epochs="rows alone",
        rate="rows alone",
        ragged="rows alone",
        absent="no rows",
        configuration="keys of `meta`",
    )
}


def export_routes(
    dataset: Dataset | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    mode: str = "full",
    keys: Iterable[str] | None = None,
    fields: Sequence[str] | None = None,
    max_routes: int | None = None,
    compress: bool = True,
    tmp_dir: str | os.PathLike[str] | None = None,
    atomic: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a ``routes.npz``, for ``np.load(path, allow_pickle=True)`` under NumPy 1.26 and 2.x.

    Parameters
    ----------
    dataset : a dataset or a store's path; a store may be open for writing, and what it has committed is exported.
    path : of the file; missing folders are made.
    mode : ``"full"``, ``"pkd"``, ``"cca"``, ``"pkd_cca"`` or ``"analysis"``.
    keys : names of keys, with or without ``routes_``, in the place of ``mode``; also of fields and columns that a
        store of routes got in another way, which no mode writes. ``meta`` is always written.
    fields : the same, by the names that fields and columns have in the store, groups among them.
    max_routes : the first so many only.
    compress : as ``numpy.savez_compressed``; else as ``numpy.savez``.
    tmp_dir, atomic, overwrite : as of :class:`trajstore.npz.NpzWriter`.
    progress : is called with elements written and elements there are, all object keys together.

    Raises
    ------
    AlreadyExistsError : a file stands at ``path``.
    NotFoundError, SchemaError : there is no such key, field or mode.
    StorageError : the disk is full, or refuses otherwise; nothing is left behind.

    Notes
    -----
    Object keys are always 1-D arrays of arrays in the store's dtypes. A key that no route has is left out; a route
    that lacks one that others have gives an array without rows (``diag``, ``episodes_all``: ``None``). Memory stays
    below the largest trajectory and some 200 MB, whatever the size.
    """
    view = RoutesView(dataset if isinstance(dataset, Dataset) else open_dataset(dataset))
    if fields is not None:
        if keys is not None:
            raise SchemaError("keys= and fields= say the same", hint="give one of them")
        keys = chosen(view.dataset, fields, [*view.dataset.columns, *view.dataset.fields])
    count = len(view) if max_routes is None else min(len(view), max(max_routes, 0))
    names = resolve(view.keys if keys is None else view.available, mode, keys)
    numbers = np.arange(count, dtype=np.int64)
    objects = sum(not view.is_column(name) for name in names)
    done = 0
    with NpzWriter(path, compress=compress, tmp_dir=tmp_dir, atomic=atomic, overwrite=overwrite) as file:
        for name in names:
            if view.is_column(name):
                file.array(name, view.column(name)[:count])
            else:
                file.objects(name, count, counted(view.elements(name, numbers), progress, objects * count, done))
                done += count
        file.scalar_object(META, view.meta(count))
    seeds = [] if "routes_seed" in names else ["there is no key routes_seed, by which routes are told apart"]
    return Exported(count, int(view.dataset.lengths[:count].sum()), tuple(seeds))
