"""Orders of trajectories, and the choice of one among several that share a key: arithmetic on columns."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from trajstore.errors import SchemaError

Values = np.ndarray[Any, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]

_BEST = re.compile(r"(best|max|min):(.+)\Z")


def shuffled(count: int, seed: int) -> Ints:
    """A permutation of ``count`` that depends on the seed alone (NumPy's PCG64), an int of 0 or more."""
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise SchemaError(f"the seed of an order is {seed!r:.60}", hint="a whole number, 0 or more")
    return np.random.Generator(np.random.PCG64(seed)).permutation(count).astype(np.int64)


def interleaved(ids: Values, part: Ints) -> Ints:
    """The order in which id 0 of every store comes first, store after store, then id 1 of every store, and so on."""
    return np.lexsort((np.arange(len(ids)), part, ids)).astype(np.int64)


def ascending(values: Values) -> Ints:
    """The order of a column's values, equal ones as they were."""
    return np.argsort(values, kind="stable").astype(np.int64)


def parse_keep(keep: str) -> tuple[str, str]:
    """``"first"``, ``"last"``, ``"max:return"`` (or ``"best:return"``), ``"min:cost"`` as (rule, column)."""
    if keep in ("first", "last"):
        return keep, ""
    match = _BEST.match(keep)
    if match is None:
        raise SchemaError(f"{keep!r} is no rule for duplicates", hint="first, last, max:COLUMN or min:COLUMN")
    return ("min" if match[1] == "min" else "max"), match[2]


def distinct(keys: Values, rule: str, values: Values | None = None) -> Ints:
    """One position for each distinct key, ascending.

    rule : ``first`` or ``last`` of those that share it, or the one of the largest (``max``) or smallest (``min``)
        value; of equal ones the first. NaN is worse than any number.
    """
    position = np.arange(len(keys), dtype=np.int64)
    if rule == "last":
        position = -position
    rank = np.zeros(len(keys), np.int64)
    if values is not None:
        rank = np.unique(values, return_inverse=True)[1].reshape(-1).astype(np.int64)
        if rule == "max":
            rank = -rank
        if values.dtype.kind == "f":
            rank[np.isnan(values)] = len(keys)
    order = np.lexsort((position, rank, keys))
    first = np.ones(len(keys), np.bool_)
    first[1:] = keys[order][1:] != keys[order][:-1]
    return np.sort(order[first]).astype(np.int64)
