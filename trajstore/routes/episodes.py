"""The episodes of a route: a list of dicts, cut into fields and a JSON value, and put together again.

The JSON value is a list with, for each episode, ``{"keys": [...], "rows": {key: n}, "values": {key: value}}``: the
order of its keys, how many rows each field holds of it, and whatever is not in a field (numbers, empty arrays, arrays
of another dtype or shape than the field's). Anything but a list of dicts is kept as ``{"value": it}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trajstore.errors import CorruptionError, SchemaError
from trajstore.format.schema import NUMERIC, check_name
from trajstore.routes.keys import EPISODES

Array = np.ndarray[Any, Any]
Spec = tuple[str, tuple[int, ...]]

#: Keys that collectors give to an episode; a store keeps a place for them until an episode comes.
EXPECTED = ("obs", "actions", "rewards", "xy", "player_v", "ents_count", "nearest_ents")


def pack(value: object, spec_of: Callable[[str], Spec | bool]) -> tuple[dict[str, Array], object]:
    """The rows for each field, end to end, and the JSON value.

    Parameters
    ----------
    value : list of episodes.
    spec_of : dtype and row shape of a field by path; ``True`` if it may still have any, ``False`` if there can be none.
    """
    if not isinstance(value, list) or not all(isinstance(episode, dict) for episode in value):
        return {}, {"value": value}
    specs: dict[str, Spec] = {}
    parts: dict[str, list[Array]] = {}
    index = []
    for episode in value:
        rows: dict[str, int] = {}
        values: dict[object, object] = {}
        for key, item in episode.items():
            path = f"{EPISODES}/{key}"
            if _fits(path, key, item, specs, spec_of):
                parts.setdefault(path, []).append(item)
                rows[key] = len(item)
            else:
                values[key] = item
        index.append({"keys": list(episode), "rows": rows, "values": values})
    return {path: np.concatenate(arrays) if len(arrays) > 1 else arrays[0] for path, arrays in parts.items()}, index


def _fits(path: str, key: object, item: object, specs: dict[str, Spec], spec_of: Callable[[str], Spec | bool]) -> bool:
    """Whether an episode's value goes into the field; the first that does decides on dtype and shape."""
    if type(item) is not np.ndarray or not item.ndim or not len(item) or item.dtype.name not in NUMERIC:
        return False
    if path not in specs:
        try:
            check_name(key, "field")
        except SchemaError:
            return False
        found = spec_of(path)
        if found is False:
            return False
        specs[path] = (item.dtype.name, item.shape[1:]) if found is True else found
    return item.dtype.isnative and specs[path] == (item.dtype.name, item.shape[1:])


def unpack(index: object, fields: Mapping[str, Array]) -> object:
    """The list of episodes. Raises ``CorruptionError`` if the JSON value does not cut the fields' rows exactly."""
    if isinstance(index, dict) and index.keys() == {"value"}:
        return index["value"]
    taken = dict.fromkeys(fields, 0)
    episodes = []
    try:
        for entry in index:  # type: ignore[attr-defined]
            episode: dict[object, object] = {}
            for key in entry["keys"]:
                if key in entry["values"]:
                    episode[key] = entry["values"][key]
                    continue
                path = f"{EPISODES}/{key}"
                start, stop = taken[path], taken[path] + entry["rows"][key]
                episode[key] = fields[path][start:stop]
                taken[path] = stop
            episodes.append(episode)
    except (KeyError, TypeError) as error:
        raise CorruptionError(f"the episodes of a route are not described as they should be: {error!r}") from error
    for path, rows in fields.items():
        if taken[path] != len(rows):
            raise CorruptionError(f"the episodes of a route have {len(rows)} rows in {path!r}, described {taken[path]}")
    return episodes
