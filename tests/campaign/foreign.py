"""A store read by zarr-python alone, as its documentation says that any Zarr library can."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.campaign.workload import State


def group(files: dict[str, bytes]) -> Any:
    """The root group of a store whose files are given by key."""
    import zarr
    from zarr.core.buffer import cpu
    from zarr.storage import MemoryStore

    return zarr.open_group(MemoryStore({key: cpu.Buffer.from_bytes(data) for key, data in files.items()}), mode="r")


def state_of(root: Any) -> State:
    """What a plain Zarr reader finds in an open root group; it knows docs/spec.md and nothing of trajstore."""
    body = root.attrs["trajstore"]
    deleted = {row for start, stop in body["sets"]["deleted"] for row in range(start, stop)}
    rows = [row for start, stop in body["sets"]["rows"] for row in range(start, stop) if row not in deleted]
    if not rows:
        return State()
    fields = {
        path: body["schema"]["fields"][path] for path in ("x", "obs/image", "note") if path in body["schema"]["fields"]
    }
    seeds = root["trajectories/seed"][:]
    pairs = {spec["clock"]: root[f"clocks/{spec['clock']}"][:] for spec in fields.values()}
    values = {path: root[spec["array"]][:] for path, spec in fields.items()}
    found = []
    for row in rows:
        parts = [
            np.ascontiguousarray(values[path][slice(*pairs[spec["clock"]][row])]).tobytes()
            for path, spec in fields.items()
        ]
        found.append((int(seeds[row]), *parts))
    return State(tuple(found))


def check(files: dict[str, bytes], expected: State) -> None:
    found = state_of(group(files))
    assert found == expected, f"zarr-python finds {found} instead of {expected}"
