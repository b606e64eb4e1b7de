"""The ``CheckpointManager`` of an RLlib training script, with its names and files.

``from trajstore.compat.rllib import CheckpointManager, plot_training_metrics`` in the script; ``checkpoint_000010/``
with Ray's own files and ``metadata.json``, ``checkpoint_index.json``, ``metrics_iter_N.json`` and
``training_metrics_iter_N.png`` are written as before, so listings, demos and resumes go on working.

What differs: a checkpoint appears whole or not at all and is durable; the index is rewritten atomically, mended from
the folders when it disagrees with them, and never names what was deleted; saving an iteration again after a resume
replaces it and does not let the clean-up delete it; the best can be kept too; Ray's and torch's versions are kept.
"""

from __future__ import annotations

import json
import os
import re
import uuid
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from trajstore.checkpoint.foreign import load_metrics_history, read_json
from trajstore.checkpoint.plot import render, training_figure
from trajstore.checkpoint.retention import Best, Candidate, Retention, select
from trajstore.checkpoint.shelf import Shelf
from trajstore.errors import MissingDependencyError, NotFoundError, StateError
from trajstore.format.layout import PRIVATE, temporary
from trajstore.media.publish import adopt, discard, ensure_folder, publish_file, publish_folder, recover
from trajstore.media.storage import LocalStorage, Lock
from trajstore.operations.receipt import check_receipt, forget_receipt, write_receipt
from trajstore.versions import library_versions, version_hint

__all__ = ["CheckpointManager", "load_metrics_history", "plot_training_metrics"]

_INDEX = "checkpoint_index.json"
_METADATA = "metadata.json"
_NAME = re.compile(r"checkpoint_(\d+)")
_METRICS = re.compile(r"metrics_(?:interrupted_)?iter_(\d+)\.json")


class CheckpointManager:
    """Numbered checkpoints of an RLlib algorithm.

    Parameters
    ----------
    checkpoint_dir : made if it is not there.
    keep_last_n : the newest so many stay; 0 keeps all.
    keep_best : (metric, ``"max"`` or ``"min"``, n): these stay too.
    plot : write the six-panel plot at each save; ``None``: if matplotlib is installed.
    verbose : print a line for each save and removal.
    """

    def __init__(
        self,
        checkpoint_dir: str | os.PathLike[str],
        keep_last_n: int = 10,
        *,
        keep_best: Best | Sequence[Best] = (),
        plot: bool | None = None,
        verbose: bool = True,
    ) -> None:
        self.checkpoint_dir = Path(checkpoint_dir)
        self.keep_last_n = keep_last_n
        self.metrics_history: list[dict[str, Any]] = []
        self._rules = Retention(keep_last=keep_last_n or None, keep_best=keep_best if keep_last_n else ())
        self._plot = plot
        self._verbose = verbose
        self._storage = LocalStorage(self.checkpoint_dir)
        self._lock: Lock | None = None  # taken by the first save: listings and demos make managers too
        ensure_folder(self._storage, "")
        self.checkpoint_history = self._read_index()
        if self.checkpoint_history:
            self._say(f"📂 Loaded {len(self.checkpoint_history)} existing checkpoints")

    def save_checkpoint(self, trainer: Any, iteration: int, metrics: Mapping[str, Any] | None = None) -> str:
        """Save ``trainer`` (its ``save`` gets a folder) as ``checkpoint_{iteration:06d}``; returns the path.

        ``metrics`` go into ``metadata.json``; ``final=True`` or ``interrupted=True`` among them mark it so.

        Raises
        ------
        LockedError : another process saves here.
        """
        self._claim()
        storage, metrics = self._storage, dict(metrics or {})
        name = f"checkpoint_{iteration:06d}"
        self._say(f"💾 Saving checkpoint: {name}")
        target = os.path.abspath(storage.describe(name))
        metadata = {
            "iteration": iteration,
            "timestamp": datetime.now().isoformat(),
            "checkpoint_path": target,
            "versions": library_versions("ray"),
            **metrics,
        }
        token = uuid.uuid4().hex[:12]
        theirs, ours = (temporary(PRIVATE, f"{token}.{kind}") for kind in ("theirs", "ours"))
        try:
            trainer.save(os.path.abspath(storage.describe(theirs)))
            adopt(storage, theirs, ours)
            publish_file(storage, f"{ours}/{_METADATA}", [_json(metadata)])
            publish_folder(storage, ours, name)
        finally:
            storage.remove(theirs)
            storage.remove(ours)
        write_receipt(storage, name)
        self.checkpoint_history = [entry for entry in self.checkpoint_history if entry["path"] != name]
        self.checkpoint_history.append({"iteration": iteration, "path": name, "timestamp": metadata["timestamp"]})
        self._clean_up()
        self._write_index()
        self._export(iteration, metrics)
        self._say(f"✅ Checkpoint saved: {name}")
        return target

    def record(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Add an iteration to ``metrics_history``, which every save exports and plots."""
        self.metrics_history = [entry for entry in self.metrics_history if entry.get("iteration") != iteration]
        self.metrics_history.append({"iteration": iteration, **metrics})

    def get_latest_checkpoint(self) -> str | None:
        """The path of the checkpoint saved last, or ``None``."""
        return self._path(self.checkpoint_history[-1]) if self.checkpoint_history else None

    def get_best_checkpoint(self, metric: str = "reward_mean", mode: str = "max") -> str | None:
        """The path of the checkpoint with the best value of a metric, or ``None``; NaN never wins over a number."""
        kept = select(self._candidates(), Retention(keep_best=(metric, mode, 1)), newest_valid="")
        return self._path({"path": next(iter(kept))}) if kept else None

    def get_checkpoint_by_iteration(self, iteration: int) -> str | None:
        """The path of the checkpoint of an iteration, or ``None``."""
        return next((self._path(e) for e in self.checkpoint_history if e["iteration"] == iteration), None)

    def list_checkpoints(self) -> list[dict[str, Any]]:
        """The metadata of all checkpoints, in the order of saving."""
        return [
            read_json(self.checkpoint_dir / entry["path"] / _METADATA) or entry for entry in self.checkpoint_history
        ]

    def restore(self, trainer: Any, checkpoint: str | int | None = None) -> int:
        """Restore ``trainer`` from a path, an iteration, or the latest checkpoint; returns its iteration.

        Loads the metrics history as it was then. Raises ``NotFoundError``, ``CorruptionError``, and ``StateError``
        if Ray fails, naming the library versions of then and now.
        """
        path = self._find(checkpoint)
        check_receipt(LocalStorage(path.parent), path.name)
        metadata = read_json(path / _METADATA) or {}
        try:
            trainer.restore(str(path))
        except Exception as error:
            raise StateError(
                f"{path} could not be restored: {error}", hint=version_hint(metadata.get("versions"), "ray")
            ) from error
        match = _NAME.fullmatch(path.name)
        iteration = int(metadata.get("iteration") or (match[1] if match else 0))
        self.metrics_history = load_metrics_history(path.parent, iteration)
        return iteration

    def _find(self, checkpoint: str | int | None) -> Path:
        found = (
            self.get_latest_checkpoint()
            if checkpoint is None
            else self.get_checkpoint_by_iteration(checkpoint)
            if isinstance(checkpoint, int)
            else checkpoint
        )
        if found is None or not Path(found).is_dir():
            raise NotFoundError(
                f"there is no checkpoint {checkpoint or ''} in {self.checkpoint_dir}".replace("  ", " ")
            )
        return Path(found)

    def _claim(self) -> None:
        if self._lock is None:
            ensure_folder(self._storage, PRIVATE)
            self._lock = self._storage.lock(f"{PRIVATE}/lock")
            recover(self._storage)
            self.checkpoint_history = self._read_index()

    def _read_index(self) -> list[dict[str, Any]]:
        """The index, mended: folders decide what there is, the index in which order it came."""
        index = read_json(self.checkpoint_dir / _INDEX) or {}
        entries: dict[str, dict[str, Any]] = {}
        for entry in index.get("checkpoints", []) if isinstance(index.get("checkpoints"), list) else []:
            name = entry.get("path") if isinstance(entry, dict) else None
            # An old clean-up could leave names whose folders it had deleted, and one name twice.
            if isinstance(name, str) and _NAME.fullmatch(name) and (self.checkpoint_dir / name).is_dir():
                entries.pop(name, None)
                entries[name] = entry
        unknown = []
        for folder in self.checkpoint_dir.iterdir():
            match = _NAME.fullmatch(folder.name)
            if match and folder.is_dir() and folder.name not in entries:
                metadata = read_json(folder / _METADATA) or {}
                modified = datetime.fromtimestamp(folder.stat().st_mtime).isoformat()
                stamp = str(metadata.get("timestamp", modified))
                unknown.append({"iteration": int(match[1]), "path": folder.name, "timestamp": stamp})
        if not unknown:
            return list(entries.values())
        return sorted([*entries.values(), *unknown], key=lambda entry: str(entry.get("timestamp", "")))

    def _write_index(self) -> None:
        index = {"checkpoints": self.checkpoint_history, "last_updated": datetime.now().isoformat()}
        publish_file(self._storage, _INDEX, [_json(index)])

    def _candidates(self) -> list[Candidate]:
        marks = Shelf(self._storage).marks()
        return [
            Candidate(
                name=entry["path"],
                step=int(entry["iteration"]),
                order=position,
                metrics=read_json(self.checkpoint_dir / entry["path"] / _METADATA) or {},
                pinned=bool(marks.get(entry["path"], {}).get("pinned")),
            )
            for position, entry in enumerate(self.checkpoint_history)
        ]

    def _clean_up(self) -> None:
        if self._rules.keeps_all:
            return
        kept = select(self._candidates(), self._rules)
        gone = [entry for entry in self.checkpoint_history if entry["path"] not in kept]
        if not gone:
            return
        # First out of the index, then off the disk: the index never names what is not there.
        self.checkpoint_history = [entry for entry in self.checkpoint_history if entry["path"] in kept]
        self._write_index()
        for entry in gone:
            discard(self._storage, entry["path"])
            forget_receipt(self._storage, entry["path"])
            self._say(f"🗑️  Deleted old checkpoint: {entry['path']}")

    def _export(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        if not any(entry.get("iteration") == iteration for entry in self.metrics_history):
            self.record(iteration, metrics)
        name = f"metrics_iter_{iteration}.json"
        if metrics.get("final"):
            name = "final_metrics.json"
        elif metrics.get("interrupted"):
            name = f"metrics_interrupted_iter_{iteration}.json"
        publish_file(self._storage, name, [_json(self.metrics_history)])
        if self._plot is not False:
            try:
                plot_training_metrics(self.metrics_history, self.checkpoint_dir, iteration, verbose=self._verbose)
            except MissingDependencyError as error:
                if self._plot:
                    raise
                self._plot = False
                warnings.warn(f"no training plots: {error}", stacklevel=3)

    def _path(self, entry: Mapping[str, Any]) -> str:
        return str(self.checkpoint_dir / entry["path"])

    def _say(self, line: str) -> None:
        if self._verbose:
            print(line)


def plot_training_metrics(
    metrics_history: Sequence[Mapping[str, Any]],
    checkpoint_dir: str | os.PathLike[str],
    iteration: int,
    *,
    verbose: bool = True,
) -> None:
    """Write ``training_metrics_iter_{iteration}.png``: the six panels of the history."""
    name = f"training_metrics_iter_{iteration}.png"
    storage = LocalStorage(checkpoint_dir)
    publish_file(storage, name, [render(training_figure(metrics_history, f"Training metrics, iteration {iteration}"))])
    if verbose:
        print(f"📊 Plot saved: {storage.describe(name)}")


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, default=_plain).encode()


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()  # NumPy scalars and arrays, tensors
    return str(value)
