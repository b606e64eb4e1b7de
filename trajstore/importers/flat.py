"""Flat arrays, all steps end to end, into a store: D4RL's HDF5, OGBench's npz, and a plain npz with offsets."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trajstore.errors import FormatError
from trajstore.format import typedjson
from trajstore.format.schema import CODED, Clock, Column, Field
from trajstore.media.hdf5storage import leaves, reading_hdf5
from trajstore.npz import NpzReader
from trajstore.operations.filling import Parts, fill_store
from trajstore.operations.output import Exported

Array = np.ndarray[Any, Any]


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
    with reading_hdf5(place) as file:
        arrays = dict(leaves(file))
        for name in ("observations", "actions"):
            if name not in arrays:
                raise FormatError(f"{place} has no {name!r}", hint="is it a D4RL file?")
        rows = len(arrays["actions"])
        kept = {name: node for name, node in arrays.items() if node.ndim and len(node) == rows}
        ends = np.zeros(rows, bool)
        for name in ("terminals", "timeouts"):
            if name in kept:
                ends |= kept[name][()].astype(bool)
        left = [f"left out, not one row a step: {name}" for name in arrays if name not in kept]
        runs = _runs(ends, limit)
        trajectories: Iterator[Parts] = ((_d4rl(kept, start, stop), {}) for start, stop in runs.tolist())
        return fill_store(destination, trajectories, len(runs), progress=progress, warnings=left, **options)


_RENAMED = {"terminals": "terminations", "timeouts": "truncations"}


def _d4rl(arrays: Mapping[str, Any], start: int, stop: int) -> dict[str, Array]:
    rows = {_RENAMED.get(name, name): node[start:stop] for name, node in arrays.items()}
    return {name: values.astype(bool) if name in _RENAMED.values() else values for name, values in rows.items()}


def _runs(ends: Array, limit: int | None) -> Array:
    """Start and stop of each trajectory, int64 (n, 2)."""
    stops = np.flatnonzero(ends) + 1
    if len(ends) and (not len(stops) or stops[-1] != len(ends)):
        stops = np.append(stops, len(ends))
    return np.stack((np.concatenate(([0], stops[:-1])), stops), axis=1)[:limit].astype(np.int64)


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
        if not {"observations", "actions", "terminals"} <= set(reader.names):
            raise FormatError(f"{os.fspath(source)} lacks observations, actions or terminals", hint="is it OGBench's?")
        runs = _runs(reader.read("terminals").astype(bool), limit)
        names = [name for name in reader.names if name != "terminals"]
        extra = {"observations", "qpos", "qvel"} & set(names)  # states, which have a last one too
        members = {name: reader.member(name) for name in names}
        fields = {
            name: Field(member.dtype.name, member.shape[1:], "observations" if name in extra else "steps")
            for name, member in members.items()
        }
        counts = (runs[:, 1] - runs[:, 0]).tolist()
        streams = {name: reader.runs(name, counts) for name in names}
        trajectories: Iterator[Parts] = (
            ({name: rows if name in extra else rows[:-1] for name, rows in zip(streams, each)}, {})
            for each in zip(*streams.values())
        )
        clocks = {"steps": Clock("main"), "observations": Clock("last_row_extra")}
        return fill_store(
            destination, trajectories, len(runs), progress=progress, fields=fields, clocks=clocks, **options
        )


def import_flat(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Exported:
    """Make a store of the plain npz that ``exporters.flat.export_flat`` writes, or of one that is made like it.

    Without the member ``store.json`` fields share a clock if their lengths are the same, and columns have no defaults.
    """
    with NpzReader(source) as reader:
        names = [name for name in reader.names if f"{name}.offsets" in reader]
        if not names:
            raise FormatError(f"{os.fspath(source)} has no offsets", hint="is it an npz with <field>.offsets?")
        said = _said(reader)
        table = {name: reader.read(name) for name in reader.names if name.startswith("table.") and name != "table.id"}
        columns = {name[6:]: Column(values.dtype.name) for name, values in table.items()}
        offsets = {name: reader.read(f"{name}.offsets") for name in names}
        count = min(len(offsets[names[0]]) - 1, limit if limit is not None else 1 << 62)
        streams = {name: reader.runs(name, np.diff(offsets[name])[:count].tolist()) for name in names}
        absent = {name: reader.read(f"{name}.absent") for name in names if f"{name}.absent" in reader}
        nothing = np.zeros(count, bool)
        fields = {name: spec for name, spec in said.fields.items() if name in names}

        def trajectories() -> Iterator[Parts]:
            for i, each in enumerate(zip(*streams.values())):
                rows = {
                    name: None if absent.get(name, nothing)[i] else _value(fields.get(name), rows)
                    for name, rows in zip(streams, each)
                }
                yield rows, {name[6:]: values[i] for name, values in table.items()}

        settings = {"config": said.config, "fields": fields, "clocks": said.clocks, "columns": columns, **options}
        return fill_store(destination, trajectories(), count, progress=progress, **settings)


@dataclass(frozen=True)
class _Said:
    fields: dict[str, Field]
    clocks: dict[str, Clock]
    config: dict[str, Any]


def _said(reader: NpzReader) -> _Said:
    """What ``store.json`` in the file says of the store it came from."""
    if "store.json" not in reader:
        return _Said({}, {}, {})
    try:
        found = json.loads(str(reader.read("store.json").item()))
        fields = {
            name: Field(spec["dtype"], tuple(spec["shape"]), None if spec["dtype"] in CODED else spec["clock"])
            for name, spec in found["fields"].items()
        }
        clocks = {name: Clock.from_json(clock) for name, clock in found["clocks"].items()}
        return _Said(fields, clocks, dict(found["config"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{reader.path}: store.json is not what trajstore writes: {error!r}") from error


def _value(spec: Field | None, rows: Array) -> Any:
    """The rows of one trajectory, or the string or document that they are."""
    if spec is None or not spec.whole:
        return rows
    data = rows.tobytes()
    return typedjson.loads(data) if spec.dtype == "json" else data.decode("utf-8", "surrogatepass")
