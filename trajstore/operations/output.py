"""A file or folder that another library writes, made aside and given its name when it is whole and durable."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from trajstore.errors import AlreadyExistsError, StorageError, TrajstoreError
from trajstore.media.storage import LocalStorage, local_path

T = TypeVar("T")


@dataclass(frozen=True)
class Exported:
    """What an export did. warnings : what the format could not carry, a sentence each."""

    trajectories: int
    steps: int
    warnings: tuple[str, ...] = ()


def counted(items: Iterable[T], progress: Callable[[int, int], None] | None, total: int, done: int = 0) -> Iterator[T]:
    """The items; ``progress`` is told after each how many of all are done, ``done`` of them before the first."""
    for number, item in enumerate(items, done + 1):
        yield item
        if progress is not None:
            progress(number, total)


@contextmanager
def made_aside(path: str | os.PathLike[str]) -> Iterator[str]:
    """A path beside ``path`` to write to, a file or a folder; on leaving it is synced and becomes ``path``.

    After an error nothing is left. Raises ``AlreadyExistsError`` if anything stands at ``path``, before and after.
    """
    target = local_path(path)
    folder, name = os.path.split(target)
    storage = LocalStorage(folder)
    _refuse(target)
    storage.make_root()
    aside = f"tmp.{uuid.uuid4().hex}.{name}"
    try:
        try:
            yield storage.describe(aside)
        except TrajstoreError:
            raise
        except OSError as error:  # of the library that writes the format
            raise StorageError(f"could not write {target}: {error}", errno=error.errno) from error
        _sync(storage.describe(aside))
        _refuse(target)
        storage.rename(aside, name)
        storage.sync_folder("")
    finally:
        storage.remove(aside)


def _refuse(path: str) -> None:
    if os.path.lexists(path):
        raise AlreadyExistsError(f"{path} exists", hint="choose another path, or remove it first")


def _sync(path: str) -> None:
    """Make a file, or a folder with all it holds, durable."""
    if os.path.isdir(path):
        for name in os.listdir(path):
            _sync(os.path.join(path, name))
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        raise StorageError(f"could not sync {path}: {error.strerror}", errno=error.errno) from error
    finally:
        os.close(fd)
