"""Makes the archive of this format version, once, when the version is released: python -m tests.archives.make"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

import trajstore
from trajstore.format.manifest import MAJOR, MINOR

HERE = Path(__file__).parent
COUNT = 24


def trajectory(i: int) -> dict[str, Any]:
    """What trajectory ``i`` of every archive holds: pure arithmetic, the same for ever."""
    n = 3 + i % 5
    frames = (np.arange(n * 3 * 8 * 8).reshape(n, 3, 8, 8) + i) % 256
    return {
        "frames": (frames / 255).astype(np.float16),
        "obs": (np.arange((n + 1) * 4).reshape(n + 1, 4) * 0.5 - i).astype(np.float64),
        "nested": {"x": (np.arange(n * 2).reshape(n, 2) + i).astype(np.int32)},
        "goal": None if i % 7 == 3 else np.full((n, 2), i, np.float32),
        "flag": np.arange(n) % 2 == 0,
        "task": f"täsk {i}",
        "diag": {"i": i, "pair": (i, None), "nan": float("inf")},
    }


def columns(i: int) -> dict[str, Any]:
    return {"seed": 100 + i, "score": i / 4, "success": i % 2 == 0}


def make(path: Path) -> None:
    """Two sessions, a gap, packed frames, an absent field, a deletion, more intervals than a manifest holds."""
    fields = {"diag": trajstore.Field("json")}
    for part in (range(COUNT // 2), range(COUNT // 2, COUNT)):
        with trajstore.create(path, resume=True, fields=fields, target=COUNT, config={"env": "archive"}) as writer:
            for i in part:
                writer.append(trajectory(i), **columns(i))
            writer.mark_attempted(range(0, 4000, 2))
            writer.state["counter"] = 7
    with trajstore.create(path, resume=True) as writer:
        writer.delete([5])


if __name__ == "__main__":
    target = HERE / f"{MAJOR}.{MINOR}"
    if target.exists():
        sys.exit(f"{target} exists: what was released does not change")
    make(target)
