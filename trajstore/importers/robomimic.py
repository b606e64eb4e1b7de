"""robomimic's and Isaac Lab's HDF5 into a store."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from trajstore.errors import FormatError
from trajstore.format.schema import Clock, Column, Field
from trajstore.media.hdf5storage import leaves, reading_hdf5
from trajstore.operations.filling import Parts, fill_store
from trajstore.operations.output import Exported


def import_robomimic(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    mask: str | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Exported:
    """Make a store of a robomimic file.

    Where ``next_obs`` continues ``obs`` by one step, bit for bit, ``obs`` gets T + 1 rows and ``next_obs`` is left out;
    otherwise both are fields of T rows. ``dones`` stays a field, ``seed`` and ``success`` become columns, masks bool
    columns ``mask.<key>``, and ``env_args`` goes into the configuration.

    Parameters
    ----------
    mask : only the demonstrations of this split. options : of :func:`trajstore.create`.

    Raises ``FormatError``.
    """
    place = os.fspath(source)
    strange: dict[str, None] = {}
    with reading_hdf5(place) as file:
        if "data" not in file:
            raise FormatError(f"{place} has no group /data", hint="is it a robomimic file?")
        data = file["data"]
        masks = {key: {_text(name) for name in names[()]} for key, names in file.get("mask", {}).items()}
        if mask is not None and mask not in masks:
            raise FormatError(f"{place} has no mask {mask!r}", hint=f"it has {', '.join(masks) or 'none'}")
        names = sorted((name for name in data if name.startswith("demo_")), key=lambda name: int(name[5:]))
        names = [name for name in names if mask is None or name in masks[mask]][:limit]
        if not names:
            raise FormatError(f"{place} holds no demonstrations")
        joined = all(_continues(data[name]) for name in names)
        columns = _columns(data[names[0]], masks)
        config = {"env_args": json.loads(_text(data.attrs.get("env_args", "{}")))}
        declared, clocks = _declared(data[names[0]], joined)

        def demonstrations() -> Iterator[Parts]:
            for name in names:
                fields = dict(_fields(data[name], joined))
                strange.update(dict.fromkeys(path for path in fields if path not in declared))
                values: dict[str, Any] = {
                    key: data[name].attrs[key].item() for key in ("seed", "success") if key in columns
                }
                values |= {f"mask.{key}": name in members for key, members in masks.items()}
                yield {path: fields.get(path) for path in declared}, values

        return fill_store(
            destination,
            demonstrations(),
            len(names),
            progress=progress,
            warnings=(f"left out, the first demonstration does not have it: {path}" for path in strange),
            config=config,
            fields=declared,
            clocks=clocks,
            columns=columns,
            **options,
        )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _columns(demo: Any, masks: dict[str, set[str]]) -> dict[str, Column]:
    columns = {f"mask.{key}": Column("bool") for key in masks}
    for key in ("seed", "success"):
        if key in demo.attrs:
            columns[key] = Column(np.asarray(demo.attrs[key]).dtype.name)
    return columns


def _continues(demo: Any) -> bool:
    """Whether ``next_obs`` is ``obs`` one step later, so that T + 1 rows hold both."""
    if "obs" not in demo or "next_obs" not in demo or set(demo["obs"]) != set(demo["next_obs"]):
        return False
    return all(np.array_equal(demo["obs"][key][1:], demo["next_obs"][key][:-1]) for key in demo["obs"])


def _fields(demo: Any, joined: bool) -> Iterator[tuple[str, Any]]:
    for path, node in leaves(demo):
        if not node.ndim:
            continue
        rows = node[()]
        if joined and path.startswith("next_obs/"):
            continue
        if joined and path.startswith("obs/"):
            rows = np.concatenate((rows, demo[f"next_{path}"][-1:]))
        yield path, rows


def _declared(demo: Any, joined: bool) -> tuple[dict[str, Field], dict[str, Clock]]:
    steps = int(demo.attrs["num_samples"])
    fields, clocks = {}, {"steps": Clock("main")}
    for path, rows in _fields(demo, joined):
        clock = {steps: "steps", steps + 1: "obs"}.get(len(rows), path.replace("/", "."))
        clocks.setdefault(clock, Clock("last_row_extra" if clock == "obs" else "none"))
        fields[path] = Field(rows.dtype.name, rows.shape[1:], clock)
    return fields, clocks
