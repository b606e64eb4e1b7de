"""A dataset as flat arrays, all steps end to end: D4RL's HDF5, OGBench's npz, and a plain npz with offsets."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trajstore.dataset import Dataset, StepRows
from trajstore.errors import SchemaError
from trajstore.media.hdf5storage import h5py_module
from trajstore.npz import NpzWriter
from trajstore.operations.carriage import EVERYTHING, Carriage
from trajstore.operations.output import Exported, counted, made_aside
from trajstore.operations.roles import Episode, Roles, chosen, episode, episodes, find_roles, not_carried

Array = np.ndarray[Any, Any]

CARRIES = {"d4rl": Carriage(), "ogbench": Carriage(), "flat": replace(EVERYTHING, bfloat16="as float32")}
_BLOCK_BYTES = 16 << 20
_FINDING_BYTES = 64  # that it takes to find one row, however narrow it is


def export_d4rl(
    dataset: Dataset,
    path: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **roles: str,
) -> Exported:
    """Write D4RL's HDF5: observations, actions, rewards, terminals, timeouts, each (N, …), one file.

    Of T + 1 observations the last T are ``next_observations``. ``roles`` : see ``roles.find_roles``.
    Raises ``SchemaError`` for observations or actions that are several fields: flat files have one of each.
    """
    found = find_roles(dataset, fields, **roles)
    _single(found, "D4RL")
    total = int(dataset.lengths.sum())
    at = 0
    with made_aside(path) as aside, h5py_module().File(aside, "w") as file:
        for one in counted(episodes(dataset, found), progress, len(dataset)):
            for name, rows in _d4rl(one, found):
                if name not in file:
                    file.create_dataset(name, (total, *rows.shape[1:]), rows.dtype)
                file[name][at : at + len(one)] = rows
            at += len(one)
    return Exported(len(dataset), total, tuple(not_carried(found, dataset)))


def _single(roles: Roles, what: str) -> None:
    for role, paths in (("observations", roles.observations), ("actions", roles.actions)):
        if len(paths) != 1:
            raise SchemaError(
                f"{what} has one array of {role}, and these are {', '.join(paths.values())}",
                hint=f"name one: {role}='...'",
            )


def _only(rows: Any) -> Array:
    (found,) = rows.values()
    return np.asarray(found)


def _d4rl(one: Episode, roles: Roles) -> Iterator[tuple[str, Array]]:
    observations = _only(one.observations)
    yield "observations", observations[: len(one)]
    if roles.final:
        yield "next_observations", observations[1:]
    yield "actions", _only(one.actions)
    yield "rewards", one.rewards
    yield "terminals", one.terminations
    yield "timeouts", one.truncations & ~one.terminations


def export_ogbench(
    dataset: Dataset,
    path: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **roles: str,
) -> Exported:
    """Write OGBench's npz: T + 1 rows a trajectory, ``terminals`` 1 on the last, whose action is zero.

    Raises ``SchemaError`` without a final observation: this format is made of them.
    """
    found = find_roles(dataset, fields, **roles)
    _single(found, "OGBench")
    if not found.final:
        raise SchemaError(
            "OGBench has T + 1 observations, and this dataset has T", hint="export it as 'd4rl', which has T"
        )
    rows = int((dataset.lengths + 1).sum())
    makers = {"observations": _last, "actions": _padded, "terminals": _terminals}
    with NpzWriter(path) as out:
        for name, make in counted(makers.items(), progress, len(makers)):
            first = make(episode(dataset[0], found))
            out.rows(name, first.dtype, (rows, *first.shape[1:]), map(make, episodes(dataset, found)))
    warnings = not_carried(found, dataset)
    if found.rewards is not None:
        warnings.append("rewards left out: OGBench computes them from the goal")
    return Exported(len(dataset), int(dataset.lengths.sum()), tuple(warnings))


def _last(one: Episode) -> Array:
    return _only(one.observations)


def _padded(one: Episode) -> Array:
    rows = _only(one.actions)
    return np.concatenate((rows, np.zeros_like(rows, shape=(1, *rows.shape[1:]))))


def _terminals(one: Episode) -> Array:
    flags = np.zeros(len(one) + 1, np.float32)
    flags[-1] = 1
    return flags


def export_flat(
    dataset: Dataset,
    path: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    compress: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a plain npz without pickles: each field end to end, and who owns which rows.

    For a field ``obs`` there are ``obs`` (rows, …) and ``obs.offsets``, int64 (n + 1,): trajectory ``i`` has the rows
    ``offsets[i]:offsets[i + 1]``. A trajectory without the field has no rows, and ``obs.absent`` (n,) tells which.
    Columns are ``table.<name>`` (n,). A nested field's ``/`` stays in its name. Strings and JSON are their UTF-8 bytes,
    bfloat16 is widened to float32. ``store.json``, one string, names dtypes, clocks and the configuration.
    """
    names = chosen(dataset, fields)
    with NpzWriter(path, compress=compress) as out:
        for name in counted(names, progress, len(names)):
            pairs = dataset.field_pairs(name)
            counts = pairs[:, 1] - pairs[:, 0]
            rows = dataset.steps[name]
            out.rows(name, rows.dtype, rows.shape, _blocks(rows))
            out.array(f"{name}.offsets", np.concatenate(([0], np.cumsum(counts))).astype(np.int64))
            if (pairs[:, 0] < 0).any():
                out.array(f"{name}.absent", pairs[:, 0] < 0)
        for column in dataset.columns:
            out.array(f"table.{column}", np.asarray(dataset.column(column)))
        out.array("store.json", np.array(json.dumps(_described(dataset, names))))
    return Exported(len(dataset), int(np.maximum(dataset.lengths, 0).sum()))


def _described(dataset: Dataset, names: Sequence[str]) -> dict[str, Any]:
    specs = {name: dataset.fields[name] for name in names}
    clocks = {str(spec.clock) for spec in specs.values() if not spec.whole}
    return {
        "fields": {
            name: {
                "dtype": "float32" if spec.dtype == "bfloat16" else spec.dtype,
                "shape": spec.shape,
                "clock": spec.clock,
            }
            for name, spec in specs.items()
        },
        "clocks": {name: clock.to_json() for name, clock in dataset.schema.clocks.items() if name in clocks},
        "config": dict(dataset.snapshots[0].manifest.config.get("values", {})),
    }


def _blocks(rows: StepRows) -> Iterator[Array]:
    step = max(1, _BLOCK_BYTES // (int(np.prod(rows.shape[1:])) * rows.dtype.itemsize + _FINDING_BYTES))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]
