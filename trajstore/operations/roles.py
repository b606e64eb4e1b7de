"""What the fields of a dataset are to a learner: the conventions that other formats are made of.

===============  ===========================================================================================
observations     fields ``observations``, ``observation``, ``obs``, or all inside such a group; T rows or T + 1
actions          ``actions``, ``action``, ``act``, or all inside such a group; T rows
rewards          ``rewards``, ``reward``; T rows; zeros where there is none
terminations     ``terminations``, ``terminated``, ``terminals``; T rows, or a bool column for the last step
truncations      ``truncations``, ``truncated``, ``timeouts``; likewise
===============  ===========================================================================================

A trajectory of which neither termination nor truncation is known counts as truncated at its last step: the recording
ended there. T rows of observations have no final one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trajstore.dataset import Dataset, Trajectory
from trajstore.errors import NotFoundError, SchemaError
from trajstore.format.schema import MAIN_CLOCK, Field

Array = np.ndarray[Any, Any]

_NAMES = {
    "observations": ("observations", "observation", "obs"),
    "actions": ("actions", "action", "act"),
    "rewards": ("rewards", "reward"),
    "terminations": ("terminations", "terminated", "terminals"),
    "truncations": ("truncations", "truncated", "timeouts"),
}


@dataclass(frozen=True)
class Roles:
    """Paths by role. observations, actions : name within the group (``""`` for a single field) to the field's path.

    others : fields that have no role. final : whether observations have T + 1 rows.
    """

    observations: Mapping[str, str]
    actions: Mapping[str, str]
    rewards: str | None
    terminations: str | None
    truncations: str | None
    others: tuple[str, ...]
    final: bool


@dataclass(frozen=True)
class Episode:
    """One trajectory by role: T steps, observations (T, …) or (T + 1, …), flags bool (T,), rewards (T,)."""

    number: int
    columns: Mapping[str, Any]
    observations: Mapping[str, Array]
    actions: Mapping[str, Array]
    rewards: Array
    terminations: Array
    truncations: Array
    others: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.rewards)


def chosen(dataset: Dataset, fields: Sequence[str] | None, known: Iterable[str] | None = None) -> list[str]:
    """Paths of the fields that ``fields`` names, each one or all inside a group of that name; ``None``: all there are.

    ``known`` : what there is, by default the dataset's fields. Raises ``NotFoundError`` for a name that is none.
    """
    there = list(dataset.fields if known is None else known)
    if fields is None:
        return there
    wanted = set()
    for name in [fields] if isinstance(fields, str) else fields:
        found = [path for path in there if path == name or path.startswith(f"{name}/")]
        if not found:
            raise NotFoundError(f"there is no field {name!r}", hint=f"there are {', '.join(there) or 'none'}")
        wanted.update(found)
    return [path for path in there if path in wanted]


def relation(dataset: Dataset, path: str) -> str:
    """How a field's clock lies against the main one; ``"none"`` where the stores do not agree on it."""
    schemas = [snapshot.manifest.schema for snapshot in dataset.snapshots]
    found = {s.clocks[str(s.fields[path].clock)].relation for s in schemas if path in s.fields}
    return found.pop() if len(found) == 1 else "none"


def has_rows(dataset: Dataset, path: str, relations: Sequence[str] = ("main", "last_row_extra")) -> bool:
    """Whether every trajectory has the field, as rows of numbers on a clock that lies so against the main one."""
    if dataset.fields[path].whole or relation(dataset, path) not in relations:
        return False
    return not bool((dataset.field_pairs(path)[:, 0] < 0).any())


def find_roles(dataset: Dataset, fields: Sequence[str] | None = None, **given: str) -> Roles:
    """The roles of a dataset's fields, by name.

    Parameters
    ----------
    fields : consider only these.
    given : a field's path, or a group's, or a column's, for a role whose name is not one of the usual ones:
        ``observations="curr_obs"``.

    Raises ``SchemaError`` if there are no observations or actions, or their lengths fit no convention.
    """
    paths = {path: dataset.fields[path] for path in chosen(dataset, fields)}
    for role in given:
        if role not in _NAMES:
            raise SchemaError(f"{role!r} is no role", hint="roles are " + ", ".join(_NAMES))
    observations = _group(paths, "observations", given)
    actions = _group(paths, "actions", given)
    single = {role: _single(paths, dataset, role, given) for role in ("rewards", "terminations", "truncations")}
    used = {*observations.values(), *actions.values(), *single.values()}
    clocks = {str(paths[path].clock) for path in observations.values()}
    relations = {relation(dataset, path) for path in observations.values()}
    if relations <= {"main"}:
        final = False
    elif relations == {"last_row_extra"}:
        final = True
    else:
        raise SchemaError(
            f"observations are on the clocks {', '.join(sorted(clocks))}: all must have T rows, or all T + 1",
            hint="name the ones to take: observations='obs/image'",
        )
    for path in actions.values():
        if paths[path].clock != MAIN_CLOCK:
            raise SchemaError(f"actions {path!r} do not have one row for each step")
    others = tuple(path for path in paths if path not in used)
    return Roles(observations, actions, single["rewards"], single["terminations"], single["truncations"], others, final)


def _group(paths: Mapping[str, Field], role: str, given: Mapping[str, str]) -> dict[str, str]:
    for name in [given[role]] if role in given else _NAMES[role]:
        if name in paths:
            return {"": name}
        inside = {path[len(name) + 1 :]: path for path in paths if path.startswith(f"{name}/")}
        if inside:
            return inside
    wanted = repr(given[role]) if role in given else ", ".join(_NAMES[role])
    raise SchemaError(
        f"there are no {role}: no field {wanted} among {', '.join(paths)}", hint=f"name them: {role}='...'"
    )


def _single(paths: Mapping[str, Field], dataset: Dataset, role: str, given: Mapping[str, str]) -> str | None:
    for name in [given[role]] if role in given else _NAMES[role]:
        if name in paths or (role != "rewards" and name in dataset.columns):
            if name in paths and paths[name].clock != MAIN_CLOCK:
                raise SchemaError(f"{role} {name!r} do not have one row for each step")
            return name
    if role in given:
        raise SchemaError(f"there is no field {given[role]!r} for the {role}")
    return None


def episodes(dataset: Dataset, roles: Roles) -> Iterator[Episode]:
    """Every trajectory by role, one at a time. Raises ``SchemaError`` for one that lacks a role's field."""
    for trajectory in dataset:
        yield episode(trajectory, roles)


def episode(trajectory: Trajectory, roles: Roles) -> Episode:
    steps = len(trajectory)
    observations = {name: _rows(trajectory, path) for name, path in roles.observations.items()}
    actions = {name: _rows(trajectory, path) for name, path in roles.actions.items()}
    rewards = np.zeros(steps, np.float32) if roles.rewards is None else _rows(trajectory, roles.rewards)
    terminations = _flags(trajectory, roles.terminations, steps)
    truncations = _flags(trajectory, roles.truncations, steps)
    if roles.terminations is None and roles.truncations is None:
        truncations[-1:] = True
    others = trajectory.load(roles.others)
    return Episode(
        trajectory.index, trajectory.columns, observations, actions, rewards, terminations, truncations, others
    )


def _rows(trajectory: Trajectory, path: str) -> Array:
    rows = trajectory[path]
    if rows is None:
        raise SchemaError(f"trajectory {trajectory.index} has no {path!r}", hint="leave it out with a filter")
    return np.asarray(rows)


def _flags(trajectory: Trajectory, name: str | None, steps: int) -> Array:
    if name is None:
        return np.zeros(steps, bool)
    value = trajectory[name]
    if np.ndim(value) == 1:
        return np.asarray(value).astype(bool)
    flags = np.zeros(steps, bool)
    flags[-1:] = bool(value)
    return flags


def not_carried(roles: Roles, dataset: Dataset, carried: Sequence[str] = ()) -> list[str]:
    """A sentence for each kind of thing that a format made of roles alone leaves behind."""
    warnings = []
    fields = [path for path in roles.others if path not in carried]
    known = {*carried, "id", roles.terminations, roles.truncations}
    columns = [name for name in dataset.columns if name not in known]
    if fields:
        warnings.append("fields left out: " + ", ".join(fields))
    if columns:
        warnings.append("columns left out: " + ", ".join(columns))
    if roles.rewards is None:
        warnings.append("there are no rewards: zeros were written")
    if roles.terminations is None and roles.truncations is None:
        warnings.append("neither terminations nor truncations are known: every last step counts as truncated")
    return warnings
