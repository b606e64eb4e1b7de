"""A dataset as a Minari dataset (HDF5), which ``minari.MinariDataset`` loads.

Layout and names: Farama Foundation, Minari 0.5, ``main_data.hdf5`` and ``metadata.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from trajstore.__about__ import __version__
from trajstore.dataset import Dataset
from trajstore.errors import SchemaError
from trajstore.format.schema import Field
from trajstore.media.hdf5storage import h5py_module
from trajstore.operations.carriage import KEPT, Carriage
from trajstore.operations.output import Exported, counted, made_aside
from trajstore.operations.roles import Episode, Roles, episodes, find_roles, has_rows, not_carried

CARRIES = {
    "minari": Carriage(
        numbers=KEPT,
        complex_numbers=KEPT,
        bfloat16="as float32",
        nested=KEPT,
        extra_row=KEPT,
        columns="`seed`",
        configuration="spaces, `env_spec`",
    )
}
_CARRIED = ("seed",)


def export_minari(
    dataset: Dataset,
    path: str | os.PathLike[str],
    *,
    dataset_id: str = "",
    final_observation: str = "refuse",
    observation_space: Mapping[str, Any] | None = None,
    action_space: Mapping[str, Any] | None = None,
    env_spec: str | None = None,
    fields: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **roles: str,
) -> Exported:
    """Write a Minari dataset folder.

    Parameters
    ----------
    path : of the folder; it is made.
    dataset_id : Minari's name of it, ``env/name-v0``; by default the folder's name.
    final_observation : Minari has T + 1 observations. Where the store has T: ``"refuse"``, or ``"repeat"`` the last.
    observation_space, action_space : as Minari serialises spaces; by default those that the store's configuration
        holds under these names, or boxes (integers of one dimension: discrete) that hold all values' dtypes.
    env_spec : the environment's specification as Gymnasium serialises it; by default from the configuration.
    fields : only these. roles : see ``trajstore.operations.roles.find_roles``.

    Notes
    -----
    Images are written as they are, not as JPEG. Fields without a role go to ``infos`` if every
    trajectory has T or T + 1 rows of them.
    """
    if final_observation not in ("refuse", "repeat"):
        raise SchemaError(f"final_observation is 'refuse' or 'repeat', not {final_observation!r}")
    found = find_roles(dataset, fields, **roles)
    if not found.final and final_observation == "refuse":
        raise SchemaError(
            "Minari has an observation after the last step, and this dataset has none",
            hint="final_observation='repeat' writes the last one twice",
        )
    given = {"observation_space": observation_space, "action_space": action_space, "env_spec": env_spec}
    infos = [name for name in found.others if has_rows(dataset, name)]
    largest: dict[str, int] = {}
    with made_aside(path) as aside:
        folder = os.path.join(aside, "data")
        os.makedirs(folder)
        main = os.path.join(folder, "main_data.hdf5")
        with h5py_module().File(main, "w", track_order=True) as file:
            for number, one in enumerate(counted(episodes(dataset, found), progress, len(dataset))):
                _write(file.create_group(f"episode_{number}"), number, one, found, infos)
                _widen(largest, one)
        metadata = {
            **_metadata(dataset, found, given, largest),
            "dataset_id": dataset_id or os.path.basename(os.path.normpath(os.fspath(path))),
            "dataset_size": round(os.path.getsize(main) / 1e6, 1),
        }
        with open(os.path.join(folder, "metadata.json"), "w") as out:
            json.dump(metadata, out)
    warnings = not_carried(found, dataset, (*_CARRIED, *infos))
    if not found.final:
        warnings.append("there was no final observation: the last one was written twice")
    return Exported(len(dataset), int(dataset.lengths.sum()), tuple(warnings))


def _metadata(dataset: Dataset, roles: Roles, given: Mapping[str, Any], largest: Mapping[str, int]) -> dict[str, Any]:
    """What Minari's ``metadata.json`` says of the episodes; what is not given stands in the store's configuration."""
    config = dataset.snapshots[0].manifest.config.get("values", {})
    said = {name: value or config.get(name) for name, value in given.items()}
    metadata = {
        "total_episodes": len(dataset),
        "total_steps": int(dataset.lengths.sum()),
        "data_format": "hdf5",
        "observation_space": json.dumps(said["observation_space"] or _space(roles.observations, dataset, {})),
        "action_space": json.dumps(said["action_space"] or _space(roles.actions, dataset, largest)),
        "minari_version": "0.5.4",
        "jpeg_encoding": False,
        "description": f"written by trajstore {__version__}",
    }
    return {**metadata, "env_spec": said["env_spec"]} if said["env_spec"] else metadata


def _write(group: Any, number: int, one: Episode, roles: Roles, infos: Sequence[str]) -> None:
    group.attrs["id"] = number
    group.attrs["total_steps"] = len(one)
    if "seed" in one.columns:
        group.attrs["seed"] = int(one.columns["seed"])
    for name, rows in one.observations.items():
        rows = rows if roles.final else np.concatenate((rows, rows[-1:]))
        _put(group, "observations", name, rows)
    for name, rows in one.actions.items():
        _put(group, "actions", name, rows)
    group["rewards"] = one.rewards
    group["terminations"] = one.terminations
    group["truncations"] = one.truncations
    for name in infos:
        group[f"infos/{name}"] = one.others[name]


def _put(group: Any, role: str, name: str, rows: np.ndarray[Any, Any]) -> None:
    group[f"{role}/{name}" if name else role] = rows


def _widen(largest: dict[str, int], one: Episode) -> None:
    for name, rows in one.actions.items():
        if rows.dtype.kind in "iu" and rows.ndim == 1 and len(rows):
            largest[name] = max(largest.get(name, 0), int(rows.max()))


def _space(paths: Mapping[str, str], dataset: Dataset, largest: Mapping[str, int]) -> dict[str, Any]:
    """A space that holds every value of these fields, in Minari's serialisation."""
    if list(paths) == [""]:
        return _box(dataset.fields[paths[""]], largest.get(""))
    tree: dict[str, Any] = {"type": "Dict", "subspaces": {}}
    for name, path in paths.items():
        node = tree
        *parents, last = name.split("/")
        for parent in parents:
            node = node["subspaces"].setdefault(parent, {"type": "Dict", "subspaces": {}})
        node["subspaces"][last] = _box(dataset.fields[path], largest.get(name))
    return tree


def _box(spec: Field, largest: int | None) -> dict[str, Any]:
    dtype = np.dtype("float32") if spec.dtype == "bfloat16" else np.dtype(spec.dtype)
    if largest is not None and not spec.shape:
        return {"type": "Discrete", "dtype": "int64", "start": 0, "n": largest + 1}
    if dtype.kind == "b":
        return {"type": "MultiBinary", "n": list(spec.shape) or 1}
    bounds = (-np.inf, np.inf) if dtype.kind in "fc" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    low, high = (np.full(spec.shape, bound, dtype).tolist() for bound in bounds)
    return {"type": "Box", "dtype": dtype.name, "shape": list(spec.shape), "low": low, "high": high}
