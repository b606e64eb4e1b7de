"""The keys of a ``routes.npz``: their names in a store, their dtypes, their order, and the modes that choose them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from trajstore.errors import NotFoundError, SchemaError

PREFIX = "routes_"
EPISODES = "episodes_all"
EPISODES_INDEX = "episodes"
META = "meta"


@dataclass(frozen=True)
class Key:
    """One key.

    kind : ``"column"`` (a plain array, one value a route), ``"array"`` (one array a route, time first),
        ``"json"`` (one dict a route) or ``"episodes"`` (a list of dicts a route).
    dtype, shape : of a value, or of an array's rows, as the collectors write them.
    """

    name: str
    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()

    @property
    def path(self) -> str:
        return path_of(self.name)


KEYS: dict[str, Key] = {
    key.name: key
    for key in (
        Key("routes_seed", "column", "int64"),
        Key("routes_selected_ep", "column", "int64"),
        Key("routes_obs", "array", "float16", (3, 64, 64)),
        Key("routes_actions", "array", "int64"),
        Key("routes_xy", "array", "float32", (2,)),
        Key("routes_player_v", "array", "float32", (2,)),
        Key("routes_ents_count", "array", "int32"),
        Key("routes_nearest_ents", "array", "float32", (8, 4)),
        Key("routes_rewards", "array", "float32"),
        Key("routes_ep_len", "column", "int64"),
        Key("routes_return", "column", "float32"),
        Key("routes_success", "column", "bool"),
        Key("routes_diag", "json"),
        Key(EPISODES, "episodes"),
    )
}
"""The keys that collectors write, in the order in which they do."""

SETTINGS = (
    "env_name model_ckpt distribution_mode max_steps max_ep_len require_success adapt_episodes record_episodes"
).split()
"""What a collection was made with: its configuration in a store."""

META_KEYS = (
    "env_name distribution_mode num_tasks_target num_tasks_collected seeds_attempted seed_offset max_steps max_ep_len "
    "require_success adapt_episodes record_episodes"
).split()

_PKD = ("routes_seed", "routes_selected_ep", "routes_obs", "routes_actions", "routes_ep_len", "routes_success")
_CCA = ("routes_seed", "routes_xy", "routes_ep_len", "routes_success")

MODES: dict[str, tuple[str, ...] | None] = {
    "full": None,
    "pkd": _PKD,
    "cca": _CCA,
    "pkd_cca": (*_PKD, "routes_xy"),
    "analysis": (*_PKD, "routes_xy"),
}
"""The keys of each mode, ``None`` for all that there are; ``meta`` is always written."""


def path_of(name: str) -> str:
    """The field or column that holds a key."""
    return name.removeprefix(PREFIX)


def known_dtype(name: str) -> np.dtype[np.generic] | None:
    """The dtype in which collectors write a key, if it is one of theirs."""
    key = KEYS.get(name)
    return np.dtype(key.dtype) if key is not None and key.dtype else None


def ordered(names: Iterable[str]) -> list[str]:
    """Keys in the collectors' order; others come behind theirs, episodes last."""
    rank = {name: i for i, name in enumerate(KEYS)}
    last = rank.pop(EPISODES)
    given = list(dict.fromkeys(names))
    return sorted(given, key=lambda name: rank.get(name, len(KEYS) + 1 if name == EPISODES else last))


def resolve(present: Iterable[str], mode: str = "full", keys: Iterable[str] | None = None) -> list[str]:
    """Which of the keys that are present a mode, or a list of keys (with or without ``routes_``), asks for, in order.

    A mode leaves out what is not there. Raises ``SchemaError`` for an unknown mode, ``NotFoundError`` for a
    key of the list that is not there.
    """
    there = ordered(present)
    if keys is not None:
        wanted = {name if name in there else PREFIX + name for name in keys if name != META}
        missing = sorted(wanted - set(there))
        if missing:
            raise NotFoundError(f"there is no key {missing[0]!r}", hint=f"there are {', '.join(there) or 'none'}")
        return [name for name in there if name in wanted]
    if mode not in MODES:
        raise SchemaError(f"{mode!r} is no mode", hint="one of " + ", ".join(MODES))
    chosen = MODES[mode]
    return there if chosen is None else [name for name in there if name in chosen]
