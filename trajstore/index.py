"""Integer arithmetic on rows: runs to row numbers, positions to runs; vectorised, no I/O."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]


def spans(starts: Ints, stops: Ints) -> Ints:
    """All integers of the half-open runs ``[starts[i], stops[i])``, run after run."""
    counts = stops - starts
    total = int(counts.sum())
    if not total:
        return np.empty(0, np.int64)
    keep = counts > 0
    starts, counts = starts[keep], counts[keep]
    steps = np.ones(total, np.int64)
    steps[0] = starts[0]
    ends = np.cumsum(counts)[:-1]
    steps[ends] = starts[1:] - (starts[:-1] + counts[:-1] - 1)
    return np.cumsum(steps)


def locate(positions: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """Which of the runs laid end to end each position falls into, and where in it."""
    ends = np.cumsum(counts)
    run = np.searchsorted(ends, positions, side="right")
    return run, positions - (ends - counts)[run]


def bounds(key: slice, length: int) -> Ints:
    """The positions that a slice of a sequence of this length names."""
    return np.arange(*key.indices(length), dtype=np.int64)


def natural(name: str) -> tuple[Any, ...]:
    """A sort key under which ``rank2`` comes before ``rank10``."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)
