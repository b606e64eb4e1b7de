"""One state in one folder, without a shelf of checkpoints around it: for libraries that name their own paths."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from typing import Any

from trajstore.checkpoint.arena import Arena, plan
from trajstore.checkpoint.chunks import Pool
from trajstore.checkpoint.reading import Reader, verify_checkpoint
from trajstore.checkpoint.record import Record, from_bytes
from trajstore.checkpoint.saving import structure_bytes, write_checkpoint
from trajstore.checkpoint.staging import copy_now
from trajstore.checkpoint.tree import Flattening
from trajstore.errors import NotFoundError
from trajstore.format.layout import ROOT
from trajstore.media.publish import discard, ensure_folder
from trajstore.media.storage import LocalStorage
from trajstore.versions import library_versions

_THREADS = 2


def save_state(
    path: str | os.PathLike[str],
    state: Any,
    *,
    step: int = 0,
    metrics: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write a state into a new folder, durably, in the place of one that is there. See ``Checkpoints.save``."""
    folder, name = os.path.split(os.path.abspath(os.fspath(path)))
    storage, pool = LocalStorage(folder), Pool(_THREADS)
    ensure_folder(storage, "")
    flat = Flattening(state)
    extents = flat.finish()
    layout = plan(extents)
    arena = Arena()
    arena.prepare(layout.size, pinned=False)
    copy_now(arena, extents, layout)
    record = Record(
        step=step, serial=1, uuid=uuid.uuid4().hex, parent=None, time=time.time(), metrics=dict(metrics or {}),
        meta=dict(meta or {}), versions=library_versions(),
    )  # fmt: skip
    structure = structure_bytes(flat.node, None, extents, layout)
    if storage.size(f"{name}/{ROOT}") is not None:
        discard(storage, name)
    try:
        write_checkpoint(storage, name, record, structure, layout, arena, pool, None, scratch="")
    finally:
        pool.close()


def load_state(path: str | os.PathLike[str], section: str | tuple[Any, ...] = ()) -> Any:
    """The state of a checkpoint's folder, or a part of it, verified as it is read.

    Raises ``NotFoundError`` if there is no checkpoint, ``CorruptionError`` if it is damaged.
    """
    storage, record = _open(path)
    pool = Pool(_THREADS)
    try:
        reader = Reader(storage, record, pool)
        return reader.part(section.split("/") if isinstance(section, str) else section)
    finally:
        pool.close()


def verify_state(path: str | os.PathLike[str]) -> int:
    """Check every byte; returns the number of files. Raises ``CorruptionError``."""
    storage, record = _open(path)
    pool = Pool(_THREADS)
    try:
        return verify_checkpoint(storage, record, pool)
    finally:
        pool.close()


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a folder has the files of a checkpoint."""
    storage = LocalStorage(path)
    return storage.size(ROOT) is not None and storage.size(f"structure/{ROOT}") is not None


def _open(path: str | os.PathLike[str]) -> tuple[LocalStorage, Record]:
    storage = LocalStorage(path)
    if storage.size(ROOT) is None:
        raise NotFoundError(f"there is no checkpoint {storage.describe()}")
    return storage, from_bytes(storage.read(ROOT), storage.describe(ROOT))
