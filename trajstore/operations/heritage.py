"""What a new store takes over from its sources beside their rows: ids, origins, configuration, progress."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trajstore.engine.snapshot import Snapshot
from trajstore.errors import SchemaError
from trajstore.format.intervals import IntervalSet
from trajstore.format.schema import ID, Column
from trajstore.format.union import filling
from trajstore.media.config import compare_config, with_fingerprint
from trajstore.operations.assembly import Contents
from trajstore.operations.plan import Plan

#: Columns that say where a trajectory comes from: the place of its store in the list ``ORIGINS`` of the root's
#: attributes, and its id there.
SOURCE, SOURCE_ID = "source", "source_id"
ORIGINS = "trajstore_sources"

_SHOWN = 5

Values = np.ndarray[Any, Any]


def inherit(
    plan: Plan, *, keep_ids: bool = False, provenance: bool = True, fill: Mapping[str, Any] | None = None
) -> Contents:
    """The contents of a planned store; what could not be taken over as it was is noted in ``plan.notes``.

    Parameters
    ----------
    keep_ids : of one source's trajectories, instead of numbering anew from 0; there is no provenance then to be added.
    provenance : whether to add the columns ``SOURCE`` and ``SOURCE_ID``. A source that was merged itself hands its own
        on, so that they name the first store that a trajectory was in.
    """
    columns = {name: (column, _column(plan, name, column, fill)) for name, column in plan.union.schema.columns.items()}
    attributes = _shared_attributes(plan.snapshots)
    next_id = len(plan)
    if not columns:
        pass  # nothing was ever appended to any of them, and the new store has no schema either
    elif keep_ids and len(plan.snapshots) == 1 and len(np.unique(columns[ID][1])) == len(plan):
        next_id = plan.snapshots[0].manifest.counts["next_id"]
    else:
        if provenance:
            origins, source, source_id = _origins(plan, columns[ID][1])
            columns[SOURCE] = Column("int64", -1), source
            columns[SOURCE_ID] = Column("int64", -1), source_id
            attributes[ORIGINS] = origins
        columns[ID] = columns[ID][0], np.arange(len(plan), dtype=np.int64)
    config = _config(plan)
    progress, sets = _progress(plan, columns)
    return Contents(columns, next_id, progress, config, attributes, sets)


def _column(plan: Plan, name: str, column: Column, fill: Mapping[str, Any] | None) -> Values:
    values = np.empty(len(plan), column.dtype)
    for p, snapshot in enumerate(plan.snapshots):
        mine = np.flatnonzero(plan.part == p)
        if name in snapshot.manifest.schema.columns:
            values[mine] = snapshot.column(name, plan.row[mine])
        elif len(mine):
            values[mine] = filling(name, column, fill)
    return values


# -- origins -----------------------------------------------------------------------------------------------------------


def _origins(plan: Plan, ids: Values) -> tuple[list[dict[str, Any]], Values, Values]:
    origins: list[dict[str, Any]] = []
    source = np.empty(len(plan), np.int64)
    source_id = ids.astype(np.int64)
    for p, snapshot in enumerate(plan.snapshots):
        mine = np.flatnonzero(plan.part == p)
        manifest = snapshot.manifest
        source[mine] = len(origins)
        origins.append({"place": snapshot.place, "commit": manifest.commit.uuid, "number": manifest.commit.number})
        known = manifest.attributes.get(ORIGINS)
        if isinstance(known, list) and {SOURCE, SOURCE_ID} <= manifest.schema.columns.keys():
            older = snapshot.column(SOURCE, plan.row[mine])
            has = (older >= 0) & (older < len(known))  # those appended after the merge have none
            source[mine[has]] = len(origins) + older[has]
            source_id[mine[has]] = snapshot.column(SOURCE_ID, plan.row[mine])[has]
            origins += [{**entry, "through": len(origins) - 1} for entry in known if isinstance(entry, dict)]
        elif {SOURCE, SOURCE_ID} & manifest.schema.columns.keys():
            raise SchemaError(
                f"{snapshot.place} has a column of its own called {SOURCE!r} or {SOURCE_ID!r}",
                hint="merge with provenance=False",
            )
    return origins, source, source_id


def _shared_attributes(snapshots: Sequence[Snapshot]) -> dict[str, Any]:
    """The root's attributes that all sources have alike."""
    first, *others = [dict(snapshot.manifest.attributes) for snapshot in snapshots]
    return {name: value for name, value in first.items() if all(o.get(name, _NOTHING) == value for o in others)}


_NOTHING = object()


# -- configuration -----------------------------------------------------------------------------------------------------


def _config(plan: Plan) -> dict[str, Any]:
    """The sources' configuration; where they differ, what they have in common, and a note of every difference."""
    first = dict(plan.asked[0].manifest.config)
    different: dict[str, dict[str, list[str]]] = {}
    for snapshot in plan.asked[1:]:
        for key, (mine, theirs) in compare_config(first, snapshot.manifest.config).items():
            values = different.setdefault(key, {_shown(mine): [plan.asked[0].place]})
            values.setdefault(_shown(theirs), []).append(snapshot.place)
    if not different:
        return first
    for key, values in different.items():
        kinds = "; ".join(
            f"{value} in {', '.join(places[:_SHOWN])}{' …' if len(places) > _SHOWN else ''}"
            for value, places in values.items()
        )
        plan.notes.append(f"configurations differ in {key}: {kinds}")
    shared: Any = {name: first.get(name, {}) for name in ("values", "files")}
    for snapshot in plan.asked[1:]:
        shared = _common(shared, {name: snapshot.manifest.config.get(name, {}) for name in ("values", "files")})
    return {**with_fingerprint(shared.get("values", {}), shared.get("files", {})), "forced": []}


def _shown(value: Any) -> str:
    return f"{value!r:.60}"


def _common(one: Any, other: Any) -> Any:
    """The part of two nested dicts in which they agree."""
    found = {}
    for key in one.keys() & other.keys():
        if isinstance(one[key], dict) and isinstance(other[key], dict):
            found[key] = _common(one[key], other[key])
        elif one[key] == other[key]:
            found[key] = one[key]
    return {key: found[key] for key in one if key in found}


# -- progress ----------------------------------------------------------------------------------------------------------


def _progress(plan: Plan, columns: Mapping[str, tuple[Column, Values]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seeds attempted by any are attempted; those of the trajectories taken over are completed."""
    entries = [dict(snapshot.manifest.progress) for snapshot in plan.asked]
    attempted, completed = IntervalSet(), IntervalSet()
    for snapshot in plan.asked:
        attempted |= snapshot.set("attempted")
        completed |= snapshot.set("completed")
    uniques = {entry.get("unique") for entry in entries}
    unique = uniques.pop() if len(uniques) == 1 else None
    key = unique or "seed"
    if key in columns and columns[key][0].dtype.startswith(("int", "uint")):
        seeds = columns[key][1]
        present = IntervalSet.of(seeds)
        completed &= present
        if unique is not None and len(present) < len(seeds):
            plan.notes.append(f"{len(seeds) - len(present)} trajectories share a {unique} with another one")
            unique = None
    elif unique is None and len(plan.asked) > 1 and len(uniques) > 1:
        plan.notes.append("the stores declare different unique columns; the new one declares none")
    targets: list[Any] = [entry.get("target") for entry in entries]
    whole = len(plan) == sum(len(snapshot.live) for snapshot in plan.asked)
    target = sum(targets) if whole and all(isinstance(n, int) for n in targets) else None
    states = {json.dumps(entry.get("state", {}), sort_keys=True) for entry in entries}
    if len(states) > 1:
        plan.notes.append("the stores' own states (writer.state) differ; the new one begins with none")
    state = entries[0].get("state", {}) if len(states) == 1 else {}
    return {"target": target, "state": state, "unique": unique}, {"attempted": attempted, "completed": completed}
