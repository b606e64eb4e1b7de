"""Checkpoints of other programs into ``Checkpoints``: read where that is safe, carried as they are where it is not."""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trajstore.checkpoint import tensors
from trajstore.checkpoint.checkpoints import Checkpoints
from trajstore.checkpoint.folder import open_folder
from trajstore.checkpoint.foreign import ForeignFolder
from trajstore.checkpoint.shelf import Checkpoint
from trajstore.checkpoint.tree import File, read_folder
from trajstore.errors import MissingDependencyError, SchemaError, TrajstoreError

FILES = "files"
"""The section of what is carried unopened."""


@dataclass(frozen=True)
class Imported:
    """What :func:`import_checkpoints` did: names taken over, names that were there from an earlier call, and
    ``(name, what is wrong)`` of those that could not be read."""

    taken: tuple[str, ...]
    present: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]


def import_checkpoints(source: str | Path, target: str | Path | Checkpoints) -> Imported:
    """Take over a folder of RLlib, NavRL, OpenRL or Stable-Baselines3 checkpoints, the oldest first.

    Parameters
    ----------
    target : a folder, of which no rule then removes any, or open ``Checkpoints`` (whose rules apply). Can be called
        again after a kill.

    Notes
    -----
    Tensors of torch files that load with ``weights_only`` and of Stable-Baselines3's zip files become sections. What
    only a pickle could read (a whole module, RLlib's state) travels as bytes in the section ``files``;
    ``write_folder(restored.state["files"], path)`` brings the files back. Metrics, the final mark and the time stay
    (``meta["saved"]``).
    """
    origin = open_folder(source)
    if not isinstance(origin, ForeignFolder):
        raise SchemaError(f"{source} holds checkpoints of trajstore already")
    if isinstance(target, Checkpoints):
        return _import(origin, target)
    with Checkpoints(target, keep_last=None, rng=False) as checkpoints:
        return _import(origin, checkpoints)


def _import(origin: ForeignFolder, target: Checkpoints) -> Imported:
    taken, present, failed = [], [], []
    there = {str(checkpoint.meta.get("imported")) for checkpoint in target.list()}
    for checkpoint in origin.checkpoints():
        if checkpoint.name in there:
            present.append(checkpoint.name)
            continue
        try:
            origin.verify(checkpoint.name)
            state = _read(checkpoint)
        except MissingDependencyError:
            raise
        except (TrajstoreError, OSError) as error:
            failed.append((checkpoint.name, str(error)))
            continue
        meta = {"imported": checkpoint.name, "saved": checkpoint.time, "versions": dict(checkpoint.versions)}
        metrics = {
            key: value for key, value in checkpoint.metrics.items() if isinstance(value, (int, float, str, dict))
        }
        target.save(checkpoint.step, state, metrics, meta, final=checkpoint.final)
        taken.append(checkpoint.name)
    target.wait()
    return Imported(tuple(taken), tuple(present), tuple(failed))


def _read(checkpoint: Checkpoint) -> dict[str, Any]:
    path = Path(checkpoint.path)
    if path.is_dir():
        return {FILES: read_folder(path)}
    data = path.read_bytes()
    if path.name.endswith(".lz4"):
        import lz4.frame

        data = lz4.frame.decompress(data)
    if path.suffix == ".zip":
        return _read_archive(data)
    state = _tensors(data)
    return state if isinstance(state, dict) and state else {FILES: {path.name: File(path)}}


def _read_archive(data: bytes) -> dict[str, Any]:
    state: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            loaded = _tensors(content) if name.endswith(".pth") else None
            if loaded is None:
                files[name] = content
            else:
                state[name.removesuffix(".pth")] = loaded
    return {**state, FILES: files}


def _tensors(data: bytes) -> Any:
    """What ``torch.load`` makes of it without running code, or ``None``."""
    torch = tensors.import_torch()
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError):
        return None
