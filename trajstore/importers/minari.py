"""A Minari dataset (HDF5) into a store."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from trajstore.errors import FormatError, NotFoundError
from trajstore.format.schema import Clock, Column, Field
from trajstore.media.hdf5storage import leaves, reading_hdf5
from trajstore.operations.filling import Parts, fill_store
from trajstore.operations.output import Exported

_KEPT = ("observation_space", "action_space", "env_spec", "dataset_id", "minari_version")
_STEPS = ("actions", "rewards", "terminations", "truncations")


def import_minari(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Exported:
    """Make a store of a Minari dataset folder (or its ``data`` folder, or its ``main_data.hdf5``).

    Observations and infos keep T + 1 rows; ``Tuple`` spaces become fields ``_index_k``. The spaces and the
    environment's specification go into the configuration. ``options`` are those of :func:`trajstore.create`.

    Raises ``NotFoundError``, ``FormatError`` (also for images that Minari holds as JPEG: decode them with Minari).
    """
    file_path = _find(os.fspath(source))
    metadata = _metadata(os.path.join(os.path.dirname(file_path), "metadata.json"))
    config = {key: _parsed(metadata[key]) for key in _KEPT if key in metadata}
    strange: dict[str, None] = {}
    with reading_hdf5(file_path) as file:
        names = sorted((name for name in file if name.startswith("episode_")), key=lambda name: int(name[8:]))[:limit]
        if not names:
            raise FormatError(f"{file_path} holds no episodes")
        fields, clocks = _declared(file[names[0]])
        columns = {"seed": Column("int64", default=-1)}
        jpeg = metadata.get("jpeg_encoding", True)

        def episodes() -> Iterator[Parts]:
            for name in names:
                episode = dict(_values(file[name]))
                if jpeg:
                    _refuse_jpeg(episode, config.get("observation_space"), file_path)
                strange.update(dict.fromkeys(path for path in episode if path not in fields))
                seed = file[name].attrs.get("seed")
                yield {path: episode.get(path) for path in fields}, {"seed": -1 if seed is None else int(seed)}

        return fill_store(
            destination,
            episodes(),
            len(names),
            progress=progress,
            warnings=(f"left out, the first episode does not have it: {path}" for path in strange),
            config=config,
            fields=fields,
            clocks=clocks,
            columns=columns,
            **options,
        )


def _find(source: str) -> str:
    for candidate in (source, os.path.join(source, "main_data.hdf5"), os.path.join(source, "data", "main_data.hdf5")):
        if os.path.isfile(candidate):
            return candidate
    raise NotFoundError(f"there is no Minari dataset at {source}", hint="give the folder that has data/main_data.hdf5")


def _metadata(path: str) -> dict[str, Any]:
    try:
        with open(path) as file:
            found = json.load(file)
    except FileNotFoundError:
        return {"jpeg_encoding": False}
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _parsed(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _values(episode: Any) -> Iterator[tuple[str, Any]]:
    for name, node in leaves(episode):
        value = node[()]
        path = name.replace("_index_", "index_")
        yield path, [text.decode() for text in value] if value.dtype == object else value


def _declared(episode: Any) -> tuple[dict[str, Field], dict[str, Clock]]:
    fields: dict[str, Field] = {}
    clocks: dict[str, Clock] = {}
    steps = len(episode["rewards"])
    for path, value in _values(episode):
        if isinstance(value, list):
            fields[path] = Field("json")
            continue
        role = path.split("/")[0]
        clock = "steps" if role in _STEPS else role
        if role == "infos" and len(value) == steps:
            clock = "steps"
        clocks[clock] = Clock("main" if clock == "steps" else "last_row_extra")
        fields[path] = Field(value.dtype.name, value.shape[1:], clock)
    return fields, clocks


def _refuse_jpeg(episode: dict[str, Any], space: Any, place: str) -> None:
    if '"uint8"' not in json.dumps(space):
        return
    for path, rows in episode.items():
        if path.startswith("observations") and isinstance(rows, np.ndarray) and rows.dtype == object:
            raise FormatError(f"{place} holds {path} as JPEG", hint="load it with minari and append its episodes")
