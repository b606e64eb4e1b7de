"""Flat arrays, all steps end to end, into a store: D4RL's HDF5, OGBench's npz, and a plain npz with offsets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from trajstore.errors import FormatError
from trajstore.format.schema import Clock, Field
from trajstore.media.hdf5storage import h5py_module
from trajstore.npz import NpzReader
from trajstore.operations.output import Exported
from trajstore.writer import create

Array = np.ndarray[Any, Any]
_D4RL = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")


def import_d4rl(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Exported:
    """Make a store of D4RL's HDF5: a trajectory ends where ``terminals`` or ``timeouts`` is set, or the file ends.

    ``terminals`` becomes the field ``terminations``, ``timeouts`` ``truncations``. Other arrays with a row for each
    step (``infos/…``) are fields too; the rest is left out, and named in the report's warnings.
    """
    place = os.fspath(source)
    with h5py_module().File(place, "r") as file:
        arrays = dict(_datasets(file, ""))
        for name in ("observations", "actions"):
            if name not in arrays:
                raise FormatError(f"{place} has no {name!r}", hint="is it a D4RL file?")
        rows = len(arrays["actions"])
        kept = {name: node for name, node in arrays.items() if node.ndim and len(node) == rows}
        ends = np.zeros(rows, bool)
        for name in ("terminals", "timeouts"):
            if name in kept:
                ends |= kept[name][()].astype(bool)
        left = tuple(f"left out, not one row a step: {name}" for name in arrays if name not in kept)
        return _import(kept, _runs(ends, limit), destination, progress, options, left)


def _datasets(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, node in group.items():
        if hasattr(node, "items"):
            yield from _datasets(node, f"{prefix}{name}/")
        else:
            yield prefix + name, node


def _runs(ends: Array, limit: int | None) -> Array:
    """Start and stop of each trajectory, int64 (n, 2)."""
    stops = np.flatnonzero(ends) + 1
    if len(ends) and (not len(stops) or stops[-1] != len(ends)):
        stops = np.append(stops, len(ends))
    return np.stack((np.concatenate(([0], stops[:-1])), stops), axis=1)[:limit].astype(np.int64)


_RENAMED = {"terminals": "terminations", "timeouts": "truncations"}


def _import(
    arrays: Mapping[str, Any],
    runs: Array,
    destination: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None,
    options: dict[str, Any],
    warnings: tuple[str, ...],
) -> Exported:
    with create(destination, **options) as writer:
        for number, (start, stop) in enumerate(runs.tolist(), 1):
            rows = {_RENAMED.get(name, name): node[start:stop] for name, node in arrays.items()}
            for name in ("terminations", "truncations"):
                if name in rows:
                    rows[name] = rows[name].astype(bool)
            writer.append(rows)
            if progress is not None:
                progress(number, len(runs))
    return Exported(len(runs), int((runs[:, 1] - runs[:, 0]).sum()), warnings)


def import_ogbench(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Exported:
    """Make a store of OGBench's npz: T + 1 observations a trajectory, and T of everything else."""
    with NpzReader(source) as reader:
        arrays = {name: reader.read(name) for name in reader.names}
    if not {"observations", "actions", "terminals"} <= set(arrays):
        raise FormatError(f"{os.fspath(source)} lacks observations, actions or terminals", hint="is it OGBench's?")
    runs = _runs(arrays.pop("terminals").astype(bool), limit)
    extra = {"observations", "qpos", "qvel"} & set(arrays)  # states, which have a last one too
    clocks = {"steps": Clock("main"), "observations": Clock("last_row_extra")}
    fields = {
        name: Field(rows.dtype.name, rows.shape[1:], "observations" if name in extra else "steps")
        for name, rows in arrays.items()
    }
    with create(destination, fields=fields, clocks=clocks, **options) as writer:
        for number, (start, stop) in enumerate(runs.tolist(), 1):
            writer.append({name: rows[start : stop if name in extra else stop - 1] for name, rows in arrays.items()})
            if progress is not None:
                progress(number, len(runs))
    return Exported(len(runs), int((runs[:, 1] - runs[:, 0] - 1).sum()))


def import_flat(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Exported:
    """Make a store of the plain npz that ``exporters.flat.export_flat`` writes."""
    with NpzReader(source) as reader:
        found = {name: reader.read(name) for name in reader.names}
    names = [name for name in found if f"{name}.offsets" in found]
    if not names:
        raise FormatError(f"{os.fspath(source)} has no offsets", hint="is it an npz with <field>.offsets?")
    columns = {name[6:]: rows for name, rows in found.items() if name.startswith("table.") and name != "table.id"}
    arrays = {name: found[name] for name in names}
    offsets = {name: found[f"{name}.offsets"] for name in names}
    absent = {name: found[f"{name}.absent"] for name in names if f"{name}.absent" in found}
    count = min(len(next(iter(offsets.values()))) - 1, limit if limit is not None else 1 << 62)
    steps = 0
    with create(destination, **options) as writer:
        for i in range(count):
            rows = {
                name: None
                if name in absent and absent[name][i]
                else arrays[name][offsets[name][i] : offsets[name][i + 1]]
                for name in names
            }
            writer.append(rows, **{name: values[i] for name, values in columns.items()})
            steps = writer.steps
            if progress is not None:
                progress(i + 1, count)
    return Exported(count, steps)
