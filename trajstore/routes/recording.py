"""Appending routes to a store, as a ``routes.npz`` names their parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trajstore.errors import SchemaError
from trajstore.format.schema import MAIN_CLOCK
from trajstore.routes.episodes import EXPECTED, Spec, pack
from trajstore.routes.keys import EPISODES, EPISODES_INDEX, KEYS, META, ordered, path_of
from trajstore.writer import Writer

Array = np.ndarray[Any, Any]

STATE = "routes"


def routes_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a store's progress says of its routes.

    ``keys``: those of the file, in order. ``meta``: its ``meta``. ``current_seed``, ``seeds_attempted``: how far a
    collector has come. Each may be missing.
    """
    found = state.get(STATE)
    return dict(found) if isinstance(found, dict) else {}


class RouteRecorder:
    """Appends routes to a writer. One thread at a time."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self._keys = list(routes_state(writer.state).get("keys", []))

    def note(self, **values: Any) -> None:
        """Set entries of :func:`routes_state`; the next commit makes them durable, together with the routes."""
        self.writer.state = {**self.writer.state, STATE: {**routes_state(self.writer.state), **values}}

    def append(self, route: Mapping[str, Any]) -> int | None:
        """Append one route.

        Parameters
        ----------
        route : values by key, as one element of each of a file's arrays. ``None`` for what the route does not have.

        Returns
        -------
        int or None
            Its id; ``None`` if its seed is stored already and the writer was told that seeds are unique.

        Raises
        ------
        SchemaError
            It does not fit what is stored, or a dict holds what JSON cannot give back; nothing of it was taken.
        """
        new = [key for key in route if key not in self._keys]
        fields: dict[str, Any] = {}
        values: dict[str, Any] = {}
        for key, value in route.items():
            path = path_of(key)
            if key == EPISODES:
                self._add_episodes(value, fields, values)
            elif self._is_array(key, value):
                fields[path] = self._rows(key, path, value)
            else:
                values[path] = value
        if self.writer.schema.clocks:
            self._complete(fields, values)
            self._part_clocks(fields)
        else:
            self._announce(fields, values)
        number = self.writer.append(fields, **values)
        if new:
            self._keys = ordered([*self._keys, *new])
            self.note(keys=self._keys)
        return number

    def _is_array(self, key: str, value: object) -> bool:
        known = KEYS.get(key)
        if known is not None:
            return known.kind == "array"
        if value is None:
            return path_of(key) in self.writer.schema.fields
        return isinstance(value, np.ndarray) and value.ndim > 0

    def _rows(self, key: str, path: str, value: Any) -> Array | None:
        """The rows of one array; one without rows takes the dtype and shape that the others have."""
        if value is None:
            return None
        known, spec = KEYS.get(key), self.writer.schema.fields.get(path)
        rows = np.asarray(value, known.dtype if known is not None and isinstance(value, (list, tuple)) else None)
        if rows.dtype.hasobject:
            raise SchemaError(f"{key} holds objects, not numbers", hint="give an array of a numeric dtype")
        if rows.shape[:1] == (0,):
            if spec is not None:
                return np.empty((0, *spec.shape), spec.in_memory)
            if known is not None and rows.shape[1:] != known.shape:
                return np.empty((0, *known.shape), known.dtype)
        return rows

    def _announce(self, fields: dict[str, Any], values: dict[str, Any]) -> None:
        """Name what a first route may lack and others have, so that the store takes it when it comes."""
        for key in KEYS.values():
            if key.kind == "array":
                fields.setdefault(key.path, None)
            elif key.kind == "json":
                values.setdefault(key.path, None)
        for name in EXPECTED:
            fields.setdefault(f"{EPISODES}/{name}", None)
        values.setdefault(EPISODES_INDEX, None)

    def _complete(self, fields: dict[str, Any], values: dict[str, Any]) -> None:
        for path in self.writer.schema.fields:
            if path not in fields and path not in values:
                fields[path] = None

    def _part_clocks(self, fields: dict[str, Any]) -> None:
        """Give a clock of its own to a field that has another number of rows than its clock had so far."""
        schema = self.writer.schema
        counts = {
            path: (str(spec.clock), len(rows))
            for path, spec in schema.fields.items()
            if (rows := None if spec.whole else fields.get(path)) is not None
        }
        lengths: dict[str, int] = {}
        for clock, count in counts.values():
            lengths.setdefault(clock, count)
        steps = lengths.get(MAIN_CLOCK)
        for path, (clock, count) in counts.items():
            bound = None if steps is None else schema.clocks[clock].ticks(steps)
            if count != (lengths[clock] if bound is None else bound):
                self.writer.split_clock(path)

    # --- episodes -----------------------------------------------------------------------------

    def _add_episodes(self, value: Any, fields: dict[str, Any], values: dict[str, Any]) -> None:
        if value is None:
            values[EPISODES_INDEX] = None
            return
        if isinstance(value, np.ndarray):  # equal counts make a row of an array, not a list
            value = value.tolist()
        rows, values[EPISODES_INDEX] = pack(value, self._spec)
        fields.update(rows)

    def _spec(self, path: str) -> Spec | bool:
        schema = self.writer.schema
        spec = schema.fields.get(path)
        if spec is not None:
            return spec.dtype, spec.shape
        return not schema.clocks or path in schema.absent


def check_keys(keys: list[str]) -> list[str]:
    """Keys of a file that are not ``meta``. Raises ``SchemaError`` if two would have one name in a store."""
    paths: dict[str, str] = {}
    for key in keys:
        if key == META:
            continue
        other = paths.setdefault(path_of(key).casefold(), key)
        if other != key or path_of(key) == EPISODES_INDEX:
            raise SchemaError(f"the key {key!r} has the name of another in a store", hint="rename it in the file")
    return [key for key in keys if key != META]
