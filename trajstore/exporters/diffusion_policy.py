"""A dataset as diffusion_policy's and UMI's Zarr v2 replay buffer: ``data/<key>`` time first, ``meta/episode_ends``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numcodecs import Blosc

from trajstore.dataset import Dataset
from trajstore.engine.optional import optional
from trajstore.errors import SchemaError
from trajstore.operations.carriage import KEPT, Carriage
from trajstore.operations.output import Exported, counted, made_aside
from trajstore.operations.roles import chosen, relation

CARRIES = {
    "diffusion_policy": Carriage(
        numbers=KEPT, complex_numbers=KEPT, bfloat16="as float32", nested="`/` becomes `_`", extra_row="the first T"
    )
}
_BLOCK_BYTES = 16 << 20
_FINDING_BYTES = 64  # that it takes to find one row, however narrow it is


def export_diffusion_policy(
    dataset: Dataset,
    path: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a Zarr v2 group; every array has as many rows as there are steps, which is what the format demands.

    Fields of T + 1 rows lose the last one; fields on other clocks, strings and JSON, and the columns are left out, and
    named in the warnings. The ``/`` of a nested field becomes ``_``. Chunks of about 1 MiB, Blosc Zstd.
    Raises ``SchemaError`` if a field that was asked for cannot be carried, or a trajectory lacks one.
    """
    zarr = optional("zarr", "zarr")
    keys, warnings = _taken(dataset, fields)
    steps = int(dataset.lengths.sum())
    with made_aside(path) as aside:
        root = zarr.open_group(aside, mode="w", zarr_format=2)
        for name, key in counted(keys.items(), progress, len(keys)):
            rows = dataset.steps[name]
            chunk = max(1, min(steps, (1 << 20) // max(int(np.prod(rows.shape[1:])) * rows.dtype.itemsize, 1)))
            out = root.create_array(
                f"data/{key}",
                shape=(steps, *rows.shape[1:]),
                chunks=(chunk, *rows.shape[1:]),
                dtype=rows.dtype,
                compressors=Blosc(cname="zstd", clevel=5),
            )
            _fill(out, dataset, name)
        ends = root.create_array(
            "meta/episode_ends", shape=(len(dataset),), dtype="int64", chunks=(max(len(dataset), 1),)
        )
        ends[:] = np.cumsum(dataset.lengths)
    return Exported(len(dataset), steps, tuple(warnings))


def _taken(dataset: Dataset, fields: Sequence[str] | None) -> tuple[dict[str, str], list[str]]:
    """The array that each field goes to, and what is left out, in sentences."""
    relations = {name: "whole" if spec.whole else relation(dataset, name) for name, spec in dataset.fields.items()}
    able = [name for name in dataset.fields if relations[name] in ("main", "last_row_extra")]
    names = able if fields is None else chosen(dataset, fields)
    for name in names:
        if name not in able:
            raise SchemaError(f"field {name!r} does not have a row for each step", hint="leave it out")
        if (dataset.field_pairs(name)[:, 0] < 0).any():
            raise SchemaError(
                f"some trajectories have no {name!r}", hint="name the others with fields=, or leave those out"
            )
    keys = {name: name.replace("/", "_") for name in names}
    if len(set(keys.values())) < len(keys):
        raise SchemaError("two fields have one name where '/' is '_'", hint="name the ones to take with fields=")
    warnings = []
    left = [name for name in dataset.fields if name not in names]
    if left:
        warnings.append("fields left out: " + ", ".join(left))
    extra = [name for name in names if relations[name] == "last_row_extra"]
    if extra:
        warnings.append("the observation after the last step was left out of " + ", ".join(extra))
    if dataset.columns:
        warnings.append("columns left out: " + ", ".join(dataset.columns))
    return keys, warnings


def _fill(out: Any, dataset: Dataset, name: str) -> None:
    """Copy the first T rows of every trajectory, some megabytes at a time."""
    lengths = dataset.lengths
    row = int(np.prod(out.shape[1:])) * out.dtype.itemsize + _FINDING_BYTES
    at = first = 0
    while first < len(dataset):
        stop = first + 1
        while stop < len(dataset) and int(lengths[first : stop + 1].sum()) * row <= _BLOCK_BYTES:
            stop += 1
        trajectories = np.repeat(np.arange(first, stop), lengths[first:stop])
        inner = np.arange(len(trajectories)) - np.repeat(
            np.cumsum(lengths[first:stop]) - lengths[first:stop], lengths[first:stop]
        )
        out[at : at + len(trajectories)] = dataset.take(name, trajectories, inner)
        at += len(trajectories)
        first = stop
