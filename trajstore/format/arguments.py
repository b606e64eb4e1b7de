"""What callers give: counts, ids, and names of fields; checked where it is given, before anything is done with it."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

from trajstore.errors import SchemaError

Ints = np.ndarray[Any, np.dtype[np.int64]]


def check_count(name: str, value: Any, least: int = 0, most: int | None = None) -> None:
    """Raise ``SchemaError`` for what is no whole number, or none from ``least`` to ``most``."""
    try:
        fits = not isinstance(value, bool) and least <= operator.index(value) <= (value if most is None else most)
    except TypeError:
        fits = False
    if not fits:
        to = "or more" if most is None else f"to {most}"
        raise SchemaError(f"{name} is {value!r:.60}", hint=f"a whole number, {least} {to}")


def field_names(fields: str | Iterable[str]) -> list[str]:
    """Names of fields as a list; one may be given by itself. Raises ``SchemaError``."""
    names = [fields] if isinstance(fields, str) else list(fields) if isinstance(fields, Iterable) else [fields]
    for name in names:
        if not isinstance(name, str):
            raise SchemaError(f"fields are chosen by their names, not by {name!r:.60}")
    return names


def whole_numbers(what: str, values: Any) -> Ints:
    """One integer, or any number of them, as int64 (n,). Raises ``SchemaError`` for anything else."""
    try:
        given = values if isinstance(values, (int, np.integer, np.ndarray)) else list(values)
        found = np.atleast_1d(np.asarray(given))
    except (TypeError, ValueError, OverflowError):
        found = np.empty(0, object)
    if found.ndim != 1 or (found.dtype.kind not in "iu" and (found.size or found.dtype == object)):
        raise SchemaError(f"{what} are whole numbers, not {values!r:.60}")
    return found.astype(np.int64)
