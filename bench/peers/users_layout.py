"""The layout that route collectors write today: ``np.savez_compressed`` of object arrays, 25 routes a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

SHARD = 25


def column(values: list[Any]) -> np.ndarray[Any, Any]:
    made = np.empty(len(values), object)
    made[:] = values
    return made


def shard(routes: list[dict[str, Any]]) -> dict[str, Any]:
    """The arrays of one file."""
    first = routes[0]
    return {
        f"routes_{name}": column([route[name] for route in routes])
        if np.ndim(first[name])
        else np.array([route[name] for route in routes])
        for name in first
    }


def write(folder: Path, routes: list[dict[str, Any]]) -> None:
    for number in range(0, len(routes), SHARD):
        with open(folder / f"shard_{number // SHARD:06d}.npz", "wb") as file:
            np.savez_compressed(file, **shard(routes[number : number + SHARD]))


def read_frames(folder: Path) -> np.ndarray[Any, Any]:
    parts = []
    for path in sorted(folder.glob("shard_*.npz")):
        with np.load(path, allow_pickle=True) as data:
            parts += list(data["routes_obs"])
    return np.concatenate(parts)


def nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
