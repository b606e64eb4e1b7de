"""A file or folder that appears whole, durable and under its name, or not at all."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from trajstore.errors import AlreadyExistsError
from trajstore.format.checksum import crc32c
from trajstore.format.layout import PRIVATE, is_temporary, temporary
from trajstore.media.storage import Piece, Storage

_TRASH = f"{PRIVATE}/trash"
_READY = f"{PRIVATE}/ready"


def ensure_folder(storage: Storage, folder: str) -> None:
    """Make a folder unless it is there; its name is durable on return."""
    try:
        storage.make_folder(folder)
    except AlreadyExistsError:
        return
    if folder:
        storage.sync_folder(folder.rpartition("/")[0])


def publish_file(storage: Storage, key: str, pieces: Sequence[Piece]) -> None:
    """Write a file under a temporary name, sync it, and give it its name in the place of what had it."""
    folder = key.rpartition("/")[0]
    name = temporary(folder, uuid.uuid4().hex[:12])
    storage.write(name, pieces)
    try:
        storage.rename(name, key)
    except BaseException:
        storage.remove(name)
        raise
    storage.sync_folder(folder)


def publish_folder(storage: Storage, source: str, target: str) -> None:
    """Give a finished folder, whose files are durable, the name ``target``, in the place of what had it.

    The new folder waits complete under a name of its own while the old one moves out of the way, so a crash
    between the two renames is finished by :func:`recover`.
    """
    ready = f"{_READY}/{target}"
    ensure_folder(storage, _READY)
    discard(storage, ready)
    storage.rename(source, ready)
    storage.sync_folder(_READY)
    _install(storage, ready, target)


def _install(storage: Storage, ready: str, target: str) -> None:
    discard(storage, target)
    storage.rename(ready, target)
    storage.sync_folder(target.rpartition("/")[0])
    storage.sync_folder(_READY)


def recover(storage: Storage) -> None:
    """Finish what a crash cut off: install folders that were ready, empty the trash, remove temporaries.

    Only for whoever holds the folder's lock.
    """
    for name in storage.list(_READY):
        _install(storage, f"{_READY}/{name}", name)
    for name in storage.list(_TRASH):
        storage.remove(f"{_TRASH}/{name}")
    for folder in ("", PRIVATE):
        for name in storage.list(folder):
            if is_temporary(name):
                storage.remove(f"{folder}/{name}" if folder else name)


def discard(storage: Storage, *keys: str) -> None:
    """Remove files or folders; each leaves its name in one step, so that nobody sees half of it."""
    for key in hide(storage, *keys):
        storage.remove(key)


def hide(storage: Storage, *keys: str) -> list[str]:
    """Take files or folders from their names, durably; returns where they wait to be removed.

    The renames are made durable before the first byte goes: else a crash could bring a name back, hollow. What is
    not removed then, :func:`recover` removes.
    """
    folders: set[str] = set()
    trash: list[str] = []
    for key in keys:
        if storage.size(key) is None and not storage.list(key):
            storage.remove(key)  # an empty folder, or nothing
            continue
        if not trash:
            ensure_folder(storage, _TRASH)
        trash.append(f"{_TRASH}/{uuid.uuid4().hex[:12]}")
        storage.rename(key, trash[-1])
        folders.add(key.rpartition("/")[0])
    if trash:
        storage.sync_folder(_TRASH)
    for folder in folders:
        storage.sync_folder(folder)
    return trash


def adopt(storage: Storage, source: str, target: str) -> dict[str, tuple[int, int]]:
    """Copy a folder that a foreign library wrote into a new folder ``target``, every byte and name durable.

    Returns ``{path below the folder: (length, crc32c)}``. A foreign writer's files cannot be synced from here (a
    sync by another descriptor may miss the error of its writeback), so they are written again through the port.
    """
    storage.make_folder(target)
    files: dict[str, tuple[int, int]] = {}
    _adopt(storage, source, target, "", files)
    return files


def _adopt(storage: Storage, source: str, target: str, path: str, files: dict[str, tuple[int, int]]) -> None:
    for name in sorted(storage.list(f"{source}/{path}".rstrip("/"))):
        below = f"{path}/{name}" if path else name
        if storage.size(f"{source}/{below}") is None:
            storage.make_folder(f"{target}/{below}")
            _adopt(storage, source, target, below, files)
        else:
            data = storage.read(f"{source}/{below}")
            storage.write(f"{target}/{below}", [data])
            files[below] = (len(data), crc32c(data))
    storage.sync_folder(f"{target}/{path}".rstrip("/"))


def read_tree(storage: Storage, folder: str, path: str = "") -> dict[str, tuple[int, int]]:
    """``{path below the folder: (length, crc32c)}`` of every file in a folder, as :func:`adopt` returns it."""
    files: dict[str, tuple[int, int]] = {}
    for name in sorted(storage.list(f"{folder}/{path}".rstrip("/"))):
        below = f"{path}/{name}" if path else name
        if storage.size(f"{folder}/{below}") is None:
            files.update(read_tree(storage, folder, below))
        else:
            data = storage.read(f"{folder}/{below}")
            files[below] = (len(data), crc32c(data))
    return files
