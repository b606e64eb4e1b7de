"""Integer arithmetic on rows: runs to row numbers, positions to runs; vectorised, no I/O."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from trajstore.errors import SchemaError

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


class Pieces(NamedTuple):
    """Stretches of rows, each within one chunk, ascending by chunk; int64 (n,) each.

    chunk : its number. inner : the first row, counted from the chunk's first. target : where that row goes.
    count : rows.
    """

    chunk: Ints
    inner: Ints
    target: Ints
    count: Ints  # type: ignore[assignment]  # a tuple's own count, which nobody asks for here


def runs(rows: Ints, targets: Ints | None = None) -> tuple[Ints, Ints, Ints]:
    """Rows by number as runs of consecutive ones: start, stop, and where each run goes.

    ``targets`` : where each row goes, if not in the order given; a run is consecutive there too.
    """
    follows = rows[1:] == rows[:-1] + 1
    if targets is not None:
        follows &= targets[1:] == targets[:-1] + 1
    first = np.concatenate((np.zeros(1, np.int64), np.flatnonzero(~follows) + 1))
    starts = rows[first]
    counts = np.diff(first, append=len(rows))
    return starts, starts + counts, first if targets is None else targets[first]


def pieces(starts: Ints, stops: Ints, targets: Ints, size: int) -> Pieces:
    """Runs that are not empty, cut at every multiple of ``size``, the rows of a chunk."""
    chunk = starts // size
    more = (stops - 1) // size - chunk
    if more.any():
        run = np.repeat(np.arange(len(starts)), more + 1)
        chunk = chunk[run] + np.arange(len(run)) - (np.cumsum(more + 1) - more - 1)[run]
        low = np.maximum(starts[run], chunk * size)
        targets = targets[run] + low - starts[run]
        starts, stops = low, np.minimum(stops[run], (chunk + 1) * size)
    found = Pieces(chunk, starts - chunk * size, targets, stops - starts)
    if bool((chunk[1:] >= chunk[:-1]).all()):
        return found
    order = np.argsort(chunk, kind="stable")
    return Pieces(*(part[order] for part in found))


def bounds(key: slice, length: int) -> Ints:
    """The positions that a slice of a sequence of this length names. Raises ``SchemaError`` for one that is none."""
    return np.arange(*indices(key, length), dtype=np.int64)


def indices(key: slice, length: int) -> tuple[int, int, int]:
    """Start, stop and step of a slice of a sequence of this length. Raises ``SchemaError`` for one that is none."""
    try:
        return key.indices(length)
    except (TypeError, ValueError) as error:
        raise SchemaError(f"{key!r:.80}: {error}", hint="give whole numbers, and a step other than 0") from None


def natural(name: str) -> tuple[Any, ...]:
    """A sort key under which ``rank2`` comes before ``rank10``, and ``rank02`` before ``rank2``."""
    parts = re.split(r"(\d+)", name)
    return *((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part), (-1, 0, name)
