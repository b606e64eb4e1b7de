"""Routes: how the keys of a ``routes.npz`` lie in a store, both ways.

A route is one trajectory. Its arrays are fields, its numbers columns, its ``diag`` a JSON field, all under the
key's name without ``routes_``. The episodes that led to it (``episodes_all``) are fields too, each key's rows of all
episodes end to end; the JSON field ``episodes`` says how they are cut, and holds what is no array. So a route with
its episodes is appended in one step.

* :class:`RouteRecorder` appends routes to a writer.
* :func:`find_routes` looks at files and folders of routes.
* :class:`RoutesView` gives a dataset's routes under the names and in the dtypes of the file.
"""

from __future__ import annotations

from trajstore.routes.keys import (
    EPISODES,
    KEYS,
    META,
    META_KEYS,
    MODES,
    SETTINGS,
    Key,
    known_dtype,
    ordered,
    path_of,
    resolve,
)
from trajstore.routes.reading import RoutesView
from trajstore.routes.recording import RouteRecorder, check_keys, routes_state
from trajstore.routes.shards import RoutesSource, find_routes

__all__ = [
    "EPISODES",
    "KEYS",
    "META",
    "META_KEYS",
    "MODES",
    "SETTINGS",
    "Key",
    "RouteRecorder",
    "RoutesSource",
    "RoutesView",
    "check_keys",
    "find_routes",
    "known_dtype",
    "ordered",
    "path_of",
    "resolve",
    "routes_state",
]
