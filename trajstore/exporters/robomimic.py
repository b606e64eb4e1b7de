"""A dataset as robomimic's HDF5, which Isaac Lab reads and writes too: one group for each demonstration.

Layout: robomimic documentation, "Dataset structure": ``/data/demo_i``, ``/mask/<key>``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from trajstore.dataset import Dataset
from trajstore.errors import SchemaError
from trajstore.media.hdf5storage import h5py_module
from trajstore.operations.carriage import KEPT, Carriage
from trajstore.operations.output import Exported, counted, made_aside
from trajstore.operations.roles import Episode, Roles, episodes, find_roles, has_rows, not_carried

CARRIES = {
    "robomimic": Carriage(
        numbers=KEPT,
        complex_numbers=KEPT,
        bfloat16="as float32",
        nested=KEPT,
        columns="`seed`, `success`",
        configuration="`env_args`",
    )
}
_ATTRIBUTES = ("seed", "success")


def export_robomimic(
    dataset: Dataset,
    path: str | os.PathLike[str],
    *,
    masks: Mapping[str, Sequence[int]] | None = None,
    env_args: Mapping[str, Any] | None = None,
    fields: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **roles: str,
) -> Exported:
    """Write one HDF5 file.

    Parameters
    ----------
    masks : name of a split to numbers of trajectories in this dataset.
    env_args : of the environment; by default what the store's configuration holds under ``env_args``.
    fields : only these. roles : see ``trajstore.operations.roles.find_roles``.

    Notes
    -----
    ``obs`` has T rows; of T + 1 observations the last T are ``next_obs``, of T there is no ``next_obs``. ``dones`` is
    terminated or truncated. Fields of T rows without a role stand beside ``actions`` under their names.
    """
    found = find_roles(dataset, fields, **roles)
    beside = [name for name in found.others if has_rows(dataset, name, ("main",))]
    config = dataset.snapshots[0].manifest.config.get("values", {})
    steps = int(dataset.lengths.sum())
    with made_aside(path) as aside, h5py_module().File(aside, "w", track_order=True) as file:
        data = file.create_group("data", track_order=True)
        for number, one in enumerate(counted(episodes(dataset, found), progress, len(dataset))):
            _write(data.create_group(f"demo_{number}"), one, found, beside)
        data.attrs["total"] = steps
        data.attrs["env_args"] = json.dumps(dict(env_args or config.get("env_args") or {}))
        for key, numbers in (masks or {}).items():
            file[f"mask/{key}"] = np.array([f"demo_{_number(n, len(dataset))}" for n in numbers], "S")
    return Exported(len(dataset), steps, tuple(not_carried(found, dataset, (*_ATTRIBUTES, *beside))))


def _number(number: int, count: int) -> int:
    if not 0 <= number < count:
        raise SchemaError(f"a mask names trajectory {number}, and there are {count}")
    return int(number)


def _write(group: Any, one: Episode, roles: Roles, beside: Sequence[str]) -> None:
    steps = len(one)
    group.attrs["num_samples"] = steps
    for name in _ATTRIBUTES:
        if name in one.columns:
            group.attrs[name] = one.columns[name]
    for name, rows in one.actions.items():
        group[f"actions/{name}" if name else "actions"] = rows
    group["rewards"] = one.rewards
    group["dones"] = (one.terminations | one.truncations).astype(np.int64)
    for name, rows in one.observations.items():
        group[f"obs/{name or 'state'}"] = rows[:steps]
        if roles.final:
            group[f"next_obs/{name or 'state'}"] = rows[1:]
    for name in beside:
        group[name] = one.others[name]
