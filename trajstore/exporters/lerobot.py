"""A dataset in LeRobot's format v3: Parquet files of frames, episodes and tasks; images inside as PNG, or videos.

Layout: Hugging Face LeRobot, codebase_version v3.0 (``lerobot/datasets/utils.py``).
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trajstore.dataset import Dataset
from trajstore.engine.optional import optional
from trajstore.errors import SchemaError
from trajstore.operations.carriage import Carriage
from trajstore.operations.output import Exported, counted, made_aside
from trajstore.operations.roles import Episode, Roles, episodes, find_roles, not_carried
from trajstore.operations.videowriter import VideoWriter

CARRIES = {"lerobot": Carriage()}
_FILE = "chunk-000/file-{:03d}.parquet"
_FILE_BYTES = 100 << 20  # as LeRobot's own default
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_BOOKKEEPING = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


def export_lerobot(
    dataset: Dataset,
    path: str | os.PathLike[str],
    *,
    fps: float,
    task: str = "",
    robot_type: str | None = None,
    images: str = "png",
    crf: int = 0,
    fields: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **roles: str,
) -> Exported:
    """Write a LeRobot dataset folder.

    Parameters
    ----------
    fps : frames a second; LeRobot's timestamps come from it.
    task : of every episode, where the store has no string field ``task``.
    images : ``"png"``, inside the Parquet files, or ``"video"``: H.264 in MP4 files.
    crf : of videos; 0 loses nothing (RGB), more is lossy and smaller (H.264's rate factor).
    fields, roles : see ``trajstore.operations.roles.find_roles``.

    Notes
    -----
    Observations are ``observation.<name>``, actions ``action`` or ``action.<name>``, and there are ``next.reward`` and
    ``next.done`` (terminated or truncated). uint8 fields (H, W, 3) or (3, H, W) are images. Of T + 1 observations the
    last is left out: LeRobot has none.
    """
    if images not in ("png", "video"):
        raise SchemaError(f"images={images!r}", hint="images is 'png' or 'video'")
    if not isinstance(fps, (int, float)) or not 0 < fps < math.inf:
        raise SchemaError(f"fps={fps!r:.60}", hint="fps is a number above 0, of frames a second")
    pyarrow, parquet = optional("pyarrow", "interchange"), optional("pyarrow.parquet", "interchange")
    found = find_roles(dataset, fields, **roles)
    features = _features(dataset, found, images)
    tasks: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    with made_aside(path) as aside:
        for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
            os.makedirs(os.path.join(aside, folder))
        writer = _Frames(pyarrow, aside, features, fps, crf)
        for number, one in enumerate(counted(episodes(dataset, found), progress, len(dataset))):
            name = one.others.get("task")
            mine = tasks.setdefault(name if isinstance(name, str) else task, len(tasks))
            place = writer.add(number, one, found, mine)
            rows.append({**place, "tasks": [list(tasks)[mine]], "length": len(one)})
        writer.end()
        parquet.write_table(pyarrow.Table.from_pylist(rows), os.path.join(aside, "meta/episodes", _FILE.format(0)))
        table = pyarrow.table({"task_index": list(tasks.values()), "__index_level_0__": list(tasks)})
        parquet.write_table(table.replace_schema_metadata(_index_metadata()), os.path.join(aside, "meta/tasks.parquet"))
        info = _info(features, len(dataset), int(dataset.lengths.sum()), len(tasks), fps, robot_type)
        _write_json(os.path.join(aside, "meta/info.json"), info)
        _write_json(os.path.join(aside, "meta/stats.json"), writer.statistics())
    warnings = not_carried(found, dataset, ("task",))
    if found.final:
        warnings.append("the observation after the last step was left out: LeRobot has none")
    if crf and images == "video" and any(feature["dtype"] == "video" for feature in features.values()):
        warnings.append(f"images are not what they were: videos of crf={crf} are lossy")
    return Exported(len(dataset), int(dataset.lengths.sum()), tuple(warnings))


def _png(frame: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    optional("PIL.Image", "interchange").fromarray(np.ascontiguousarray(frame)).save(
        out, format="PNG", compress_level=1
    )
    return out.getvalue()


def _channels_last(frames: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Images (n, H, W, 3), of (n, 3, H, W) too."""
    return frames.transpose(0, 2, 3, 1) if frames.shape[1] == 3 and frames.shape[-1] != 3 else frames


def _is_image(dtype: str, shape: tuple[int, ...]) -> bool:
    return dtype == "uint8" and len(shape) == 3 and 3 in (shape[0], shape[-1])


def _named(role: str, name: str, alone: str) -> str:
    return f"{role}.{name.replace('/', '.')}" if name else role + alone


def _features(dataset: Dataset, roles: Roles, images: str) -> dict[str, dict[str, Any]]:
    features: dict[str, dict[str, Any]] = {}
    named = [(_named("observation", name, ".state"), path) for name, path in roles.observations.items()]
    named += [(_named("action", name, ""), path) for name, path in roles.actions.items()]
    for name, path in named:
        spec = dataset.fields[path]
        if _is_image(spec.dtype, spec.shape):
            height, width = spec.shape[:2] if spec.shape[-1] == 3 else spec.shape[1:]
            features[name] = {
                "dtype": "video" if images == "video" else "image",
                "shape": [height, width, 3],
                "names": ["height", "width", "channels"],
            }
        elif len(spec.shape) > 1:
            raise SchemaError(f"field {path!r} has rows of shape {spec.shape}: LeRobot has vectors and images")
        else:
            dtype = "float32" if spec.dtype == "bfloat16" else spec.dtype
            features[name] = {"dtype": dtype, "shape": list(spec.shape) or [1], "names": None}
    features["next.reward"] = {"dtype": "float32", "shape": [1], "names": None}
    features["next.done"] = {"dtype": "bool", "shape": [1], "names": None}
    for name, dtype in _BOOKKEEPING.items():
        features[name] = {"dtype": dtype, "shape": [1], "names": None}
    return features


class _Frames:
    """The Parquet files of frames and the videos, an episode at a time, and the statistics of what goes by."""

    def __init__(self, pyarrow: Any, folder: str, features: Mapping[str, dict[str, Any]], fps: float, crf: int) -> None:
        self._pyarrow = pyarrow
        self._folder = folder
        self._features = features
        self._fps = fps
        filmed = [name for name, feature in features.items() if feature["dtype"] == "video"]
        self._videos = {name: VideoWriter(os.path.join(folder, "videos", name), fps, crf) for name in filmed}
        for name, video in self._videos.items():
            height, width, _ = features[name]["shape"]
            features[name]["info"] = {"video.height": height, "video.width": width, **video.about()}
        self._writer: Any = None
        self._file = -1
        self._bytes = 0
        self._index = 0
        self._sums: dict[str, list[Any]] = {}

    def add(self, number: int, one: Episode, roles: Roles, task: int) -> dict[str, Any]:
        """Write one episode; what the table of episodes says of its place."""
        columns = dict(self._columns(number, one, roles, task))
        filmed: dict[str, Any] = {}
        for name, video in self._videos.items():
            file, begin, stop = video.add(_channels_last(columns.pop(name)))
            place = {"chunk_index": 0, "file_index": file, "from_timestamp": begin, "to_timestamp": stop}
            filmed |= {f"videos/{name}/{key}": value for key, value in place.items()}
        table = self._pyarrow.table({name: self._array(name, rows) for name, rows in columns.items()})
        if self._writer is None or self._bytes + table.nbytes > _FILE_BYTES:
            self.close()
            self._file += 1
            path = os.path.join(self._folder, "data", _FILE.format(self._file))
            self._writer = self._pyarrow.parquet.ParquetWriter(path, table.schema, compression="zstd")
            self._bytes = 0
        self._writer.write_table(table)
        self._bytes += table.nbytes
        start, self._index = self._index, self._index + len(one)
        return {
            "episode_index": number,
            "data/chunk_index": 0,
            "data/file_index": self._file,
            "dataset_from_index": start,
            "dataset_to_index": self._index,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
            **filmed,
        }

    def _columns(
        self, number: int, one: Episode, roles: Roles, task: int
    ) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        steps = len(one)
        for name, rows in one.observations.items():
            yield _named("observation", name, ".state"), rows[:steps]
        for name, rows in one.actions.items():
            yield _named("action", name, ""), rows
        yield "next.reward", one.rewards.astype(np.float32)
        yield "next.done", one.terminations | one.truncations
        frames = np.arange(steps)
        yield "timestamp", (frames / self._fps).astype(np.float32)
        yield "frame_index", frames
        yield "episode_index", np.full(steps, number)
        yield "index", frames + self._index
        yield "task_index", np.full(steps, task)

    def _array(self, name: str, rows: np.ndarray[Any, Any]) -> Any:
        pa = self._pyarrow
        if self._features[name]["dtype"] == "image":
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            return pa.array([{"bytes": _png(row), "path": None} for row in _channels_last(rows)], kind)
        self._count(name, rows)
        flat = pa.array(np.ascontiguousarray(rows).reshape(-1))
        return flat if rows.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])

    def _count(self, name: str, rows: np.ndarray[Any, Any]) -> None:
        values = rows.astype(np.float64).reshape(len(rows), -1)
        found = [values.min(0), values.max(0), values.sum(0), (values**2).sum(0), len(rows)]
        known = self._sums.get(name)
        if known is None:
            self._sums[name] = found
        else:
            joined = [np.minimum(known[0], found[0]), np.maximum(known[1], found[1])]
            self._sums[name] = joined + [known[i] + found[i] for i in (2, 3, 4)]

    def statistics(self) -> dict[str, Any]:
        """min, max, mean, std and count of each vector feature, over all frames."""
        stats = {}
        for name, (low, high, total, squares, count) in self._sums.items():
            mean = total / count
            std = np.sqrt(np.maximum(squares / count - mean**2, 0))
            stats[name] = {"min": low, "max": high, "mean": mean, "std": std, "count": np.array([count])}
        return {name: {key: value.tolist() for key, value in values.items()} for name, values in stats.items()}

    def end(self) -> None:
        """Make the files whole that are being written."""
        self.close()
        for video in self._videos.values():
            video.end()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _info(
    features: Mapping[str, Any], count: int, steps: int, tasks: int, fps: float, robot_type: str | None
) -> dict[str, Any]:
    return {
        "codebase_version": "v3.0",
        "robot_type": robot_type,
        "total_episodes": count,
        "total_frames": steps,
        "total_tasks": tasks,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": fps,
        "splits": {"train": f"0:{count}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": VIDEO_PATH if any(f["dtype"] == "video" for f in features.values()) else None,
        "features": dict(features),
    }


def _index_metadata() -> dict[str, str]:
    """Tell pandas that the task's text is the index, as LeRobot's own files do."""
    column = {"name": None, "field_name": "__index_level_0__", "pandas_type": "unicode", "numpy_type": "object"}
    return {"pandas": json.dumps({"index_columns": ["__index_level_0__"], "columns": [column], "column_indexes": []})}


def _write_json(path: str, value: Any) -> None:
    with open(path, "w") as file:
        json.dump(value, file, indent=4)
