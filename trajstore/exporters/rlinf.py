"""A store's trajectories as folders of RLinf's embodied replay buffer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trajstore.dataset import Dataset
from trajstore.errors import SchemaError
from trajstore.format.layout import PRIVATE
from trajstore.format.schema import ID
from trajstore.media.storage import Storage
from trajstore.operations.assembly import Scaffold, located
from trajstore.operations.carriage import KEPT, Carriage
from trajstore.operations.output import Exported, counted
from trajstore.operations.roles import chosen
from trajstore.rlinf import joined, save_batch, write_index
from trajstore.rlinf.batch import (
    BATCH,
    DONES,
    ENTRY,
    ENV,
    LENGTH_FIELDS,
    MIDDLE,
    NUMBER,
    OTHER,
    RANK,
    VALUES,
    WEIGHTS,
    groups,
)
from trajstore.rlinf.folder import SUFFIXES, file_name

__all__ = ["Batches", "export_rlinf"]

CARRIES = {"rlinf": Carriage(numbers=KEPT, complex_numbers=KEPT, bfloat16=KEPT, nested=KEPT, absent=KEPT)}


@dataclass(frozen=True)
class Batches(Exported):
    """batches : files written."""

    batches: int = 0


def export_rlinf(
    dataset: Dataset,
    path: str | os.PathLike[str],
    *,
    format: str = "pt",
    by_rank: bool = False,
    seed: int | None = None,
    fields: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Batches:
    """Write a dataset as a buffer folder that ``TrajectoryReplayBuffer.load_checkpoint`` takes.

    Parameters
    ----------
    dataset : of a store that ``import_rlinf`` made, or any other; without the columns ``batch`` and ``env`` each
        trajectory is a batch of one environment. A batch of which only some environments are chosen is written with
        these.
    path : a new folder; it appears whole or not at all.
    format : ``"pt"``, or ``"pkl"``, which is a pickle: only when it is asked for.
    by_rank : folders ``rank_*`` with the ids that the batches had; otherwise one folder, numbered from 0.
    seed : of the metadata; by default the one that was imported.
    fields : only these, ``rewards``, ``prev_logprobs`` or ``actions`` among them: the buffer counts by those. Fields
        that do not have a row for each step are left out, but for its own of T + E rows.

    Raises
    ------
    AlreadyExistsError, MissingDependencyError
    SchemaError : the environments of a batch differ in length, or two batches of a rank have one id.
    """
    if format not in SUFFIXES:
        raise SchemaError(f"{format!r} is no format of this buffer", hint="pt or pkl")
    names = _rows_of(dataset, chosen(dataset, fields))
    if not any(name in LENGTH_FIELDS for name in names):
        raise SchemaError(
            f"there are none of {', '.join(LENGTH_FIELDS)}, by which this buffer counts samples",
            hint="name one of them",
        )
    found = list(groups(dataset))
    table = dataset.table
    ranks = table[RANK] if by_rank and RANK in dataset.columns else None
    numbers = table[NUMBER] if by_rank and NUMBER in dataset.columns else None
    if by_rank and (ranks is None or numbers is None):
        raise SchemaError("the trajectories have no rank", hint="leave by_rank out")
    folders: dict[str, dict[int, dict[str, Any]]] = {}
    scaffold = Scaffold(path)
    with scaffold as session:
        storage = session.storage
        for done, mine in enumerate(counted(found, progress, len(found))):
            folder = "" if ranks is None else f"rank_{int(ranks[mine[0]])}"
            number = done if numbers is None else int(numbers[mine[0]])
            entries = folders.setdefault(folder, {})
            if number in entries:
                raise SchemaError(f"two batches of {folder} have the id {number}", hint="leave by_rank out")
            if not entries and folder:
                storage.make_folder(folder)
            entries[number] = _write(storage, folder, number, dataset, names, mine, format)
        if not found:
            folders[""] = {}
        for folder, entries in folders.items():
            inside = storage.child(folder) if folder else storage
            write_index(inside, entries, list(entries), _metadata(dataset, folder, entries, format, seed))
            inside.sync_folder("")
        storage.sync_folder("")
        scaffold.publish()
    parent, name = located(path)
    parent.remove(f"{name}/{PRIVATE}")  # the lock; the folder is theirs
    return Batches(len(dataset), int(dataset.lengths.sum()), _left(dataset, names), len(found))


def _rows_of(dataset: Dataset, names: Sequence[str]) -> list[str]:
    """Those of the fields that have a row for each step, and the buffer's own that have E more."""
    kept = []
    for name in names:
        pairs = dataset.field_pairs(name)
        counts = pairs[:, 1] - pairs[:, 0]
        own = name in (*DONES, VALUES)
        if not dataset.fields[name].whole and (own or (counts == dataset.lengths)[pairs[:, 0] >= 0].all()):
            kept.append(name)
    return kept


def _left(dataset: Dataset, names: Sequence[str]) -> tuple[str, ...]:
    known = (WEIGHTS, ENTRY, MIDDLE, OTHER, BATCH, ENV, RANK, NUMBER, "max_episode_length", ID)
    fields = [name for name in dataset.fields if name not in names and name not in known]
    columns = [name for name in dataset.columns if name not in known]
    return tuple(
        f"{what} left out: {', '.join(left)}" for what, left in (("fields", fields), ("columns", columns)) if left
    )


def _write(
    storage: Storage,
    folder: str,
    number: int,
    dataset: Dataset,
    names: Sequence[str],
    mine: np.ndarray[Any, Any],
    kind: str,
) -> dict[str, Any]:
    """Write one batch file; its entry in the index."""
    first = dataset[int(mine[0])]
    value: dict[str, Any] = {}
    if "max_episode_length" in first and int(first["max_episode_length"]) >= 0:
        value["max_episode_length"] = int(first["max_episode_length"])
    weights = first.get(WEIGHTS)
    if weights is not None:
        value[WEIGHTS] = weights
    value |= first.get(OTHER) or {}
    value |= joined(dataset, mine, names)
    middle = first.get(MIDDLE) or weights or ""
    name = file_name(number, middle, kind)
    save_batch(storage, f"{folder}/{name}" if folder else name, value)
    entry = dict(first.get(ENTRY) or {})
    shape = next((list(value[n].shape) for n in ("prev_logprobs", "rewards", "actions") if n in value), [])
    entry.update(
        num_samples=int(np.prod(shape[:2])),
        trajectory_id=number,
        max_episode_length=value.get("max_episode_length", entry.get("max_episode_length", 0)),
        shape=shape,
        model_weights_id=entry.get("model_weights_id", weights or ""),
    )
    return entry


def _metadata(
    dataset: Dataset, folder: str, entries: Mapping[int, Mapping[str, Any]], kind: str, seed: int | None
) -> dict[str, Any]:
    known = _imported(dataset)
    rank = folder.removeprefix("rank_")
    before = known.get(rank, {}) if folder else next(iter(known.values()), {})
    counter = max([*entries, -1]) + 1
    return {
        **before,
        "trajectory_format": kind,
        "size": len(entries),
        "total_samples": sum(int(entry["num_samples"]) for entry in entries.values()),
        "trajectory_counter": max(counter, int(before.get("trajectory_counter", 0))) if folder else counter,
        "seed": seed if seed is not None else before.get("seed", 1234),
    }


def _imported(dataset: Dataset) -> Mapping[str, Any]:
    """The metadata of each rank that was imported, if they are all of one import."""
    state = dataset.snapshots[0].manifest.progress.get("state", {})
    known = state.get("rlinf", {}) if isinstance(state, Mapping) else {}
    return known if isinstance(known, Mapping) else {}
