"""LeRobot's format v3 into a store; images that lie in the Parquet files as PNG are decoded, and videos."""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from trajstore.engine.optional import optional
from trajstore.errors import FormatError, NotFoundError
from trajstore.operations.filling import Parts, fill_store
from trajstore.operations.output import Exported
from trajstore.operations.videoreader import VideoReader

_LEFT = ("timestamp", "frame_index", "episode_index", "index", "task_index")


def import_lerobot(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Exported:
    """Make a store of a LeRobot v3 folder: each feature becomes a field, its dots ``/``; the task a string field.

    ``fps``, ``robot_type`` and ``features`` go into the configuration. ``options`` : of :func:`trajstore.create`.
    Videos need PyAV; where they are lossy (YUV) their frames are what it decodes, and a warning says so.
    """
    root = os.fspath(source)
    parquet = optional("pyarrow.parquet", "interchange")
    try:
        with open(os.path.join(root, "meta/info.json")) as file:
            info = json.load(file)
    except OSError as error:
        raise NotFoundError(f"there is no LeRobot dataset at {root}: it has no meta/info.json") from error
    if not str(info.get("codebase_version", "")).startswith("v3"):
        raise FormatError(f"{root} is LeRobot {info.get('codebase_version')}, and v3.0 is read here")
    videos = [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
    tasks = _tasks(parquet.read_table(os.path.join(root, "meta/tasks.parquet")))
    config = {key: info.get(key) for key in ("fps", "robot_type", "features")}
    count = min(int(info["total_episodes"]), limit if limit is not None else 1 << 62)

    lossy: list[str] = []

    def trajectories() -> Iterator[Parts]:
        with _Videos(parquet, root, info, videos) as filmed:
            yield from episodes(filmed)
            lossy.extend(filmed.lossy)

    def episodes(filmed: _Videos) -> Iterator[Parts]:
        for rows in _episodes(parquet, root, info, count):
            fields = {
                _field(name): _rows(rows[name], feature)
                for name, feature in info["features"].items()
                if name not in _LEFT and name in rows
            }
            fields |= {_field(name): frames for name, frames in filmed.read(rows)}
            yield {**fields, "task": tasks.get(int(rows["task_index"][0].as_py()), "")}, {}

    def warnings() -> Iterator[str]:
        yield "timestamps left out: they are frame / fps"
        if lossy:
            yield f"as the decoder gives them, the videos being lossy: {', '.join(lossy)}"

    return fill_store(
        destination, trajectories(), count, progress=progress, warnings=warnings(), config=config, **options
    )


class _Videos:
    """The frames of the features that lie in videos, episode by episode."""

    def __init__(self, parquet: Any, root: str, info: Mapping[str, Any], names: list[str]) -> None:
        self._root = root
        self._path = str(info.get("video_path"))
        self._fps = float(info["fps"])
        self._readers = {name: VideoReader() for name in names}
        self._places: dict[int, dict[str, Any]] = {}
        if names:
            keys = [f"videos/{name}/{key}" for name in names for key in ("chunk_index", "file_index", "from_timestamp")]
            for path in _files(os.path.join(root, "meta/episodes")):
                rows = parquet.read_table(path, columns=["episode_index", *keys]).to_pylist()
                self._places |= {row["episode_index"]: row for row in rows}

    def __enter__(self) -> _Videos:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers.values():
            reader.__exit__()

    @property
    def lossy(self) -> list[str]:
        return [name for name, reader in self._readers.items() if not reader.exact]

    def read(self, rows: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        for name, reader in self._readers.items():
            place = self._places[rows["episode_index"][0].as_py()]
            chunk, file, begin = (
                place[f"videos/{name}/{key}"] for key in ("chunk_index", "file_index", "from_timestamp")
            )
            path = self._path.format(video_key=name, chunk_index=chunk, file_index=file)
            yield name, reader.read(os.path.join(self._root, path), begin, len(rows["episode_index"]), self._fps)


def _field(name: str) -> str:
    return {"observation": "observation/state"}.get(name, name.replace(".", "/"))


def _tasks(table: Any) -> dict[int, str]:
    text = next(name for name in table.column_names if name != "task_index")
    return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist()))


def _episodes(parquet: Any, root: str, info: Mapping[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """The columns of each episode in order; frames of one episode lie side by side, in one file."""
    seen = 0
    pending: Any = None
    for path in _files(os.path.join(root, "data")):
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            pending = batch if pending is None else _joined(pending, batch)
            owners = pending.column("episode_index").to_numpy()
            edges = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist()]
            for start, stop in itertools.pairwise(edges):
                yield _columns(pending.slice(start, stop - start))
                seen += 1
                if seen == count:
                    return
            pending = pending.slice(edges[-1])
    if pending is not None and len(pending) and seen < count:
        yield _columns(pending)


def _files(folder: str) -> list[str]:
    """Parquet files below a folder, in the order of their names."""
    return sorted(
        os.path.join(at, name) for at, _, names in os.walk(folder) for name in names if name.endswith(".parquet")
    )


def _joined(first: Any, second: Any) -> Any:
    import pyarrow

    return pyarrow.Table.from_batches([first, second]).combine_chunks().to_batches()[0]


def _columns(batch: Any) -> dict[str, Any]:
    return dict(zip(batch.schema.names, batch.columns))


def _rows(column: Any, feature: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    if feature["dtype"] == "image":
        image = optional("PIL.Image", "interchange")
        return np.stack([np.asarray(image.open(io.BytesIO(row["bytes"]))) for row in column.to_pylist()])
    if hasattr(column, "flatten") and hasattr(column.type, "value_type"):
        values = np.asarray(column.flatten())
        return values.reshape(len(column), -1).astype(feature["dtype"], copy=False)
    return np.asarray(column.to_numpy(zero_copy_only=False)).astype(feature["dtype"], copy=False)
