"""RLlib algorithms into ``Checkpoints``: Ray's own files travel as they are, checksummed and never unpickled."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trajstore.checkpoint.checkpoints import Checkpoints, Restored
from trajstore.checkpoint.tree import read_folder, write_folder
from trajstore.errors import SchemaError, StateError
from trajstore.versions import library_versions, version_hint

ALGORITHM = "algorithm"
_METRICS = {
    "reward_mean": ("episode_return_mean", "episode_reward_mean"),
    "episode_len_mean": ("episode_len_mean",),
    "episodes_completed": ("num_episodes_lifetime",),
}


class SaveOnTrainResult:
    """For ``config.callbacks(on_train_result=SaveOnTrainResult("ckpts", every=10, keep_last=5))``.

    Parameters
    ----------
    path : the checkpoints' folder.
    every : training iterations between two saves.
    kwargs : of ``Checkpoints``.

    Notes
    -----
    Ray copies a configuration into its workers; the folder is opened by the algorithm's own process, at its first
    result. Metrics are the mean return and length of episodes where Ray reports them, and their number.
    """

    def __init__(self, path: str | Path, every: int = 10, **kwargs: Any) -> None:
        if every < 1:
            raise SchemaError(f"every is {every}: it counts training iterations, from 1")
        self._path = str(path)
        self._every = every
        self._kwargs = kwargs
        self._checkpoints: Checkpoints | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checkpoints": None}

    def __call__(self, *, algorithm: Any, result: Mapping[str, Any], **_: Any) -> None:
        iteration = int(result["training_iteration"])
        if iteration % self._every:
            return
        if self._checkpoints is None:
            self._checkpoints = Checkpoints(self._path, **self._kwargs)
        save_algorithm(self._checkpoints, algorithm, iteration, metrics_of(result))

    def close(self) -> None:
        """Finish what is being written; the process's exit does so too."""
        if self._checkpoints is not None:
            self._checkpoints.close()
            self._checkpoints = None


def save_algorithm(
    checkpoints: Checkpoints, algorithm: Any, step: int, metrics: Mapping[str, Any] | None = None, **kwargs: Any
) -> bool:
    """Let an algorithm write its files into a scratch folder, and save those; arguments as ``Checkpoints.save``."""
    scratch = Path(tempfile.mkdtemp(prefix="trajstore-"))
    try:
        save = getattr(algorithm, "save_to_path", None) or algorithm.save
        save(str(scratch / "files"))
        state = {ALGORITHM: read_folder(scratch / "files")}
        meta = {**(kwargs.pop("meta", None) or {}), "versions": library_versions("ray")}
        return checkpoints.save(step, state, metrics, meta, **kwargs)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def restore_algorithm(checkpoints: Checkpoints, algorithm: Any, step: Any = None, **kwargs: Any) -> Restored:
    """Put a checkpoint into an algorithm built with the same configuration; ``kwargs`` as ``Checkpoints.restore``.

    Raises ``StateError`` if Ray fails, naming the library versions of then and now.
    """
    restored = checkpoints.restore(None, step, **kwargs)
    scratch = Path(tempfile.mkdtemp(prefix="trajstore-"))
    try:
        write_folder(restored.state[ALGORITHM], scratch / "files")
        restore = getattr(algorithm, "restore_from_path", None) or algorithm.restore
        restore(str(scratch / "files"))
    except Exception as error:
        raise StateError(
            f"{restored.checkpoint.path} could not be restored: {error}",
            hint=version_hint(restored.meta.get("versions"), "ray"),
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return restored


def metrics_of(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a training result, by the names that listings and plots know."""
    places = [result.get("env_runners") or {}, result]
    metrics = {}
    for name, keys in _METRICS.items():
        value = next((place[key] for place in places for key in keys if isinstance(place.get(key), (int, float))), None)
        if value is not None:
            metrics[name] = float(value)
    return metrics
