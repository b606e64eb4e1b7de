"""What is stored and read: real CoinRun routes, and low-dimensional rollouts made here.

The large samples are taken from the folder that ``TRAJSTORE_SAMPLES`` names (``coinrun_routes.npz``: 41 routes, 2,313
frames); without it the eight routes that the tests carry are used, which are the same kind of frames.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

_CARRIED = Path(__file__).resolve().parent.parent / "tests" / "data" / "coinrun_routes.npz"
COLUMNS = ("seed", "selected_ep", "ep_len", "return", "success")


def routes_file() -> Path:
    """A ``routes.npz`` of real frames."""
    large = Path(os.environ.get("TRAJSTORE_SAMPLES", "")) / "coinrun_routes.npz"
    return large if "TRAJSTORE_SAMPLES" in os.environ and large.exists() else _CARRIED


@cache
def sample() -> tuple[dict[str, Any], ...]:
    """The routes of the file."""
    with np.load(routes_file(), allow_pickle=True) as data:
        found = {key.removeprefix("routes_"): data[key] for key in data.files if key not in ("meta", "routes_diag")}
    count = len(found["seed"])
    return tuple({name: values[i] for name, values in found.items()} for i in range(count))


def routes(steps: int) -> list[dict[str, Any]]:
    """Routes of ``steps`` steps in all, at least: the sample as often as it takes, each time with other seeds.

    obs (T, 3, 64, 64) float16, actions (T,) int64, xy, player_v (T, 2) float32, ents_count (T,) int32, nearest_ents
    (T, 8, 4) float32, rewards (T,) float32, and the columns ``COLUMNS``.
    """
    found: list[dict[str, Any]] = []
    total = 0
    while total < steps:
        for route in sample():
            # Arrays of their own: an archive would hold one that is given twice but once.
            own = {name: value.view() if np.ndim(value) else value for name, value in route.items()}
            found.append({**own, "seed": np.int64(len(found))})
            total += len(route["obs"])
            if total >= steps:
                break
    return found


def frames(steps: int) -> np.ndarray[Any, Any]:
    """The frames of these routes, end to end, float16 (n, 3, 64, 64)."""
    return np.concatenate([route["obs"] for route in routes(steps)])[:steps]


def stored_frames(steps: int) -> np.ndarray[Any, Any]:
    """The same frames as the uint8 that they were before they were divided by 255."""
    return np.rint(frames(steps).astype(np.float32) * 255).astype(np.uint8)


def trajectory(route: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A route as ``append`` takes it: fields and columns."""
    fields = {name: value for name, value in route.items() if name not in COLUMNS}
    return fields, {name: route[name].item() for name in COLUMNS}


def rollouts(count: int, steps: int, seed: int = 0) -> list[dict[str, Any]]:
    """Low-dimensional rollouts, smooth as a simulator's: obs (T, 17), action (T, 6), reward (T,), done (T,)."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        phase = np.cumsum(rng.normal(0.05, 0.01, (steps, 17)), axis=0)
        obs = (np.sin(phase) + rng.normal(0, 1e-3, phase.shape)).astype(np.float32)
        done = np.zeros(steps, np.bool_)
        done[-1] = True
        action = rng.uniform(-1, 1, (steps, 6)).astype(np.float32)
        found.append({"obs": obs, "action": action, "reward": obs[:, 0] ** 2, "done": done})
    return found
