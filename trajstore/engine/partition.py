"""Dividing trajectories into named parts: every one into exactly one part, in the order that it was in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from trajstore.engine.order import shuffled
from trajstore.errors import SchemaError
from trajstore.format.arguments import check_count

Values = np.ndarray[Any, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]

_MOST_PARTS = 10_000


def partition(
    count: int,
    *,
    first: int | None = None,
    fractions: Mapping[str, float] | None = None,
    mask: Values | None = None,
    by: tuple[str, Values] | None = None,
    parts: int | None = None,
    seed: int | None = None,
) -> dict[str, Ints]:
    """Positions ``0 … count - 1`` by the name of their part, ascending in each; exactly one rule is given.

    Parameters
    ----------
    first : so many are ``first``, the others ``rest``.
    fractions : of all, by name; what they leave is ``rest``. Their borders are rounded, so no trajectory is left over.
    mask : bool (count,); ``match`` and ``rest``.
    by : a column's name and values; a part for each value, called ``column.value``.
    parts : ``rank0``, ``rank1``, …, in blocks; the first ones get one more where it does not come out even.
    seed : draw at random (``order.shuffled``) instead of from the front; for ``first``, ``fractions`` and ``parts``.

    Raises
    ------
    SchemaError
        No rule or several, or one that cannot be followed.
    """
    rules = [first is not None, fractions is not None, mask is not None, by is not None, parts is not None]
    if sum(rules) != 1:
        raise SchemaError("a split follows exactly one rule", hint="first, fractions, where, mask, by or parts")
    if mask is not None:
        chosen = np.asarray(mask)
        if chosen.dtype != np.bool_ or chosen.shape != (count,):
            raise SchemaError(f"a mask of {count} trajectories is bool ({count},), not {chosen.dtype} {chosen.shape}")
        return {"match": _ints(np.flatnonzero(chosen)), "rest": _ints(np.flatnonzero(~chosen))}
    if by is not None:
        return _by_value(*by)
    order = np.arange(count, dtype=np.int64) if seed is None else shuffled(count, seed)
    if first is not None:
        check_count("first, a number of trajectories,", first, most=count)
        edges = {"first": first, "rest": count}
    elif parts is not None:
        check_count("parts", parts, 1, _MOST_PARTS)
        sizes = [count // parts + (rank < count % parts) for rank in range(parts)]
        edges = {f"rank{rank}": sum(sizes[: rank + 1]) for rank in range(parts)}
    else:
        if not isinstance(fractions, Mapping):
            raise SchemaError(f"fractions are a dict of shares by name, not {fractions!r:.60}")
        edges = _edges(dict(fractions), count)
    found: dict[str, Ints] = {}
    start = 0
    for name, stop in edges.items():
        found[name] = np.sort(order[start:stop])
        start = stop
    return found


def _edges(fractions: dict[str, float], count: int) -> dict[str, int]:
    numbers = all(isinstance(fraction, (int, float, np.number)) and fraction > 0 for fraction in fractions.values())
    total = sum(fractions.values()) if numbers else 0.0
    if not 0 < total <= 1 + 1e-9:
        raise SchemaError(f"fractions are above 0 and 1 in all, not {fractions!r:.200}")
    edges = {}
    reached = 0.0
    for name, fraction in fractions.items():
        reached += fraction
        edges[name] = count if reached > 1 - 1e-9 else round(reached * count)
    if total < 1 - 1e-9:
        if "rest" in edges:
            raise SchemaError("the part 'rest' is what the fractions leave", hint="let them make 1, or rename it")
        edges["rest"] = count
    return edges


def _by_value(column: str, values: Values) -> dict[str, Ints]:
    distinct, inverse = np.unique(values, return_inverse=True)
    if len(distinct) > _MOST_PARTS:
        raise SchemaError(f"column {column!r} has {len(distinct)} values, too many to split by")
    order = np.argsort(inverse.reshape(-1), kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(inverse.reshape(-1), minlength=len(distinct)))[:-1])
    found: dict[str, Ints] = {}
    for value, group in zip(distinct.tolist(), groups):
        name = f"{column}.{_called(value)}"
        if name.casefold() in {other.casefold() for other in found}:
            raise SchemaError(f"two values of {column!r} would both be called {name!r}", hint="split by expressions")
        found[name] = _ints(group)
    return found


def _called(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"[^A-Za-z0-9_.-]|__|\.\.", "-", text)[:100]


def _ints(positions: Values) -> Ints:
    return positions.astype(np.int64)
