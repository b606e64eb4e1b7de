"""Checkpoints put away as one tar file each, verified before anything is removed."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

from trajstore.checkpoint.folder import find, locked, newest_valid, open_folder
from trajstore.checkpoint.shelf import candidate
from trajstore.errors import AlreadyExistsError, CorruptionError, SchemaError
from trajstore.format.checksum import crc32c
from trajstore.media.publish import ensure_folder
from trajstore.media.storage import LocalStorage


def archive_checkpoints(
    path: str | Path, which: Sequence[str | int], target: str | Path | None = None, *, remove: bool = True
) -> list[str]:
    """Pack checkpoints into ``{target}/{name}.tar`` each (``target``: ``archive`` in the folder), and remove them.

    The chunks are compressed already, so the tar is not. Unpacking it in the folder brings the checkpoint back.

    Returns the paths of the tar files.

    Raises
    ------
    CorruptionError : a checkpoint does not verify, or its tar does not read back; nothing is removed.
    AlreadyExistsError : a tar is there. SchemaError : the newest checkpoint that verifies would be removed.
    LockedError : a run saves here.
    """
    path = os.path.abspath(path)
    folder = open_folder(path)
    chosen = [find(folder, one) for one in which]
    out = LocalStorage(os.path.join(path, "archive") if target is None else target)
    ensure_folder(out, "")
    made = []
    with locked(folder):
        if remove:
            newest = newest_valid(folder, [candidate(c) for c in folder.checkpoints()])
            if any(checkpoint.name == newest for checkpoint in chosen):
                raise SchemaError(f"{newest} is the newest checkpoint that verifies: it stays", hint="--keep copies it")
        for checkpoint in chosen:
            folder.verify(checkpoint.name)
            names = [checkpoint.name, *folder.companions(checkpoint.name)]
            key = f"{checkpoint.name}.tar"
            if out.size(key) is not None:
                raise AlreadyExistsError(f"{out.describe(key)} exists")
            files = [(f"{name}/{f.relative_to(Path(path) / name).as_posix()}" if f != Path(path) / name else name, f)
                     for name in names for f in folder.files(name)]  # fmt: skip
            temp = f"tmp.{os.getpid()}.{key}"
            out.remove(temp)
            sums = _pack(out, temp, files)
            _check(out, temp, sums)
            out.rename(temp, key)
            out.sync_folder("")
            made.append(out.describe(key))
            if remove:
                folder.discard([checkpoint.name])
    return made


def _pack(storage: LocalStorage, key: str, files: Sequence[tuple[str, Path]]) -> dict[str, int]:
    """Append file after file, so that no more than one is in memory."""
    sums: dict[str, int] = {}
    for name, file in files:
        data = file.read_bytes()
        sums[name] = crc32c(data)
        info = tarfile.TarInfo(name)
        status = file.stat()
        info.size, info.mtime, info.mode = len(data), status.st_mtime, 0o644
        storage.append(key, info.tobuf(tarfile.PAX_FORMAT) + data + b"\0" * (-len(data) % 512), sync=False)
    storage.append(key, b"\0" * 1024)
    return sums


def _check(storage: LocalStorage, key: str, sums: dict[str, int]) -> None:
    found = {}
    with tarfile.open(storage.describe(key)) as archive:
        for member in archive:
            stream = archive.extractfile(member) or io.BytesIO()
            found[member.name] = crc32c(stream.read())
    if found != sums:
        raise CorruptionError(f"{storage.describe(key)} does not read back as it was written; nothing was removed")
