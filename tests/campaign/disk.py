"""A disk in memory that keeps a log of its effects, so that every state a power failure could leave can be built.

The model is POSIX's, with nothing granted beyond it: data of a file are durable once it is synced; names in a folder
once that folder is synced. What is not synced may be there or not, each folder operation for itself, in any
combination; of a file's data nothing, a part, zeros of the right length, or all. Only a rename is atomic.
"""

from __future__ import annotations

import errno
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Union

from trajstore.errors import AlreadyExistsError, LockedError, NotFoundError, StorageError
from trajstore.media.storage import LocalStorage, Piece, Storage

ABOVE = 0  #: the folder in which the storage's root stands
STORE = "store"

Names = tuple[str, tuple[tuple[int, str, int], ...]]  # ("names", ((folder, name, node or 0 for none), ...))
Effect = Union[Names, tuple[str, int], tuple[str, int, bytes], tuple[str, object]]  # noqa: UP007 (evaluated on 3.10)


class Disk:
    """Folders and files by number, and the log: ``names``, ``data``, ``sync`` (a file), ``syncdir``, ``mark``.

    lying_locks : every lock is granted, as by a network file system that ignores flock.
    """

    def __init__(self) -> None:
        self.folders: dict[int, dict[str, int]] = {ABOVE: {}}
        self.files: dict[int, bytes] = {}
        self.log: list[Effect] = []
        self.lying_locks = False
        self.locks: dict[int, MemoryLock] = {}
        self.guard = threading.RLock()
        self._next = 1

    def new(self) -> int:
        self._next += 1
        return self._next

    def names(self, *changes: tuple[int, str, int]) -> None:
        for folder, name, node in changes:
            if node:
                self.folders[folder][name] = node
            else:
                self.folders[folder].pop(name, None)
        self.log.append(("names", changes))

    def data(self, node: int, data: bytes) -> None:
        self.files[node] = data
        self.log.append(("data", node, data))

    def mark(self, what: object) -> None:
        """Put anything into the log, for whoever reads it."""
        with self.guard:
            self.log.append(("mark", what))

    def resolve(self, path: str) -> int:
        """The number of what stands at a path below ``ABOVE``; 0 if nothing does."""
        node = ABOVE
        for part in path.split("/"):
            names = self.folders.get(node)
            if names is None or part not in names:
                return 0
            node = names[part]
        return node

    def storage(self) -> MemoryStorage:
        return MemoryStorage(self, STORE)

    def tree(self) -> dict[str, bytes]:
        """All files below the store's root, by key."""
        found: dict[str, bytes] = {}

        def walk(folder: int, prefix: str) -> None:
            for name, node in self.folders[folder].items():
                if node in self.files:
                    found[prefix + name] = self.files[node]
                else:
                    walk(node, f"{prefix}{name}/")

        root = self.resolve(STORE)
        if root:
            walk(root, "")
        return found


class MemoryLock:
    def __init__(self, disk: Disk, node: int) -> None:
        self._disk, self._node = disk, node

    def release(self) -> None:
        with self._disk.guard:
            if self._disk.locks.get(self._node) is self:
                del self._disk.locks[self._node]


class MemoryStorage:
    """The storage port over a :class:`Disk`."""

    gap = LocalStorage.gap
    streams = LocalStorage.streams

    def __init__(self, disk: Disk, root: str) -> None:
        self.disk = disk
        self.root = root
        self._lost: set[str] = set()

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root

    def _folder(self, path: str) -> int:
        node = self.disk.resolve(path) if path else ABOVE
        if node not in self.disk.folders or (path and not node):
            raise StorageError(f"there is no folder {path}", errno=errno.ENOENT)
        return node

    def _place(self, key: str) -> tuple[int, str]:
        folder, _, name = self._path(key).rpartition("/")
        return self._folder(folder), name

    def describe(self, key: str = "") -> str:
        return f"memory:{self._path(key)}"

    def child(self, key: str) -> MemoryStorage:
        return MemoryStorage(self.disk, self._path(key))

    def _file(self, key: str) -> bytes:
        data = self.disk.files.get(self.disk.resolve(self._path(key)))
        if data is None:
            raise NotFoundError(f"there is no file {self.describe(key)}")
        return data

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        with self.disk.guard:
            return self._file(key)[start:stop]

    def size(self, key: str) -> int | None:
        with self.disk.guard:
            data = self.disk.files.get(self.disk.resolve(self._path(key)))
            return None if data is None else len(data)

    def list(self, folder: str) -> list[str]:
        with self.disk.guard:
            node = self.disk.resolve(self._path(folder))
            return list(self.disk.folders.get(node, ())) if node else []

    def _make(self, path: str) -> None:
        folder, _, name = path.rpartition("/")
        parent = self._folder(folder)
        if name in self.disk.folders[parent]:
            raise AlreadyExistsError(f"{path} exists")
        node = self.disk.new()
        self.disk.folders[node] = {}
        self.disk.names((parent, name, node))

    def make_root(self) -> bool:
        with self.disk.guard:
            missing = not self.disk.resolve(self.root)
            parts = self.root.split("/")
            for depth in range(1, len(parts) + 1):
                path = "/".join(parts[:depth])
                node = self.disk.resolve(path)
                if not node:
                    self._make(path)
                elif node in self.disk.files:
                    raise AlreadyExistsError(f"{path} is a file")
                self.disk.log.append(("syncdir", self._folder("/".join(parts[: depth - 1]))))
            return missing

    def make_folder(self, folder: str) -> None:
        with self.disk.guard:
            parts = self._path(folder).split("/")
            for depth in range(1, len(parts)):
                if not self.disk.resolve("/".join(parts[:depth])):
                    self._make("/".join(parts[:depth]))
            self._make(self._path(folder))

    def write(
        self, key: str, pieces: Sequence[Piece], *, base: tuple[str, int] | None = None, sync: bool = True
    ) -> None:
        head = b""
        with self.disk.guard:
            if base is not None:
                head = self._file(base[0])[: base[1]]
                if len(head) != base[1]:
                    raise StorageError(f"{base[0]} is too short", errno=errno.EIO)
            folder, name = self._place(key)
            if name in self.disk.folders[folder]:
                raise AlreadyExistsError(f"{self.describe(key)} exists")
            node = self.disk.new()
            self.disk.files[node] = b""
            self.disk.names((folder, name, node))
            self.disk.data(node, head + b"".join(bytes(memoryview(piece).cast("B")) for piece in pieces))
            if sync:
                self.disk.log.append(("sync", node))

    def append(self, key: str, data: Piece, *, sync: bool = True) -> None:
        with self.disk.guard:
            folder, name = self._place(key)
            node = self.disk.folders[folder].get(name, 0)
            if not node:
                node = self.disk.new()
                self.disk.files[node] = b""
                self.disk.names((folder, name, node))
            self.disk.data(node, self.disk.files[node] + bytes(memoryview(data).cast("B")))
            if sync:
                self.disk.log.append(("sync", node))

    def rename(self, source: str, target: str) -> None:
        with self.disk.guard:
            before, old = self._place(source)
            after, new = self._place(target)
            node = self.disk.folders[before].get(old, 0)
            if not node:
                raise StorageError(f"there is no {self.describe(source)}", errno=errno.ENOENT)
            there = self.disk.folders[after].get(new, 0)
            if there and self.disk.folders.get(there):
                raise StorageError(f"{self.describe(target)} is not empty", errno=errno.ENOTEMPTY)
            self.disk.names((after, new, node), (before, old, 0))

    def link(self, source: str, target: str) -> None:
        self.link_from(self, source, target)

    def link_from(self, other: Storage, source: str, target: str) -> None:
        with self.disk.guard:
            if not isinstance(other, MemoryStorage) or other.disk is not self.disk:
                raise StorageError("no common disk", errno=errno.EXDEV)
            node = self.disk.resolve(other._path(source))
            if node not in self.disk.files:
                if other is self:
                    raise StorageError(f"there is no {self.describe(source)}", errno=errno.ENOENT)
                raise NotFoundError(f"there is no {other.describe(source)}")
            folder, name = self._place(target)
            if name in self.disk.folders[folder]:
                raise AlreadyExistsError(f"{self.describe(target)} exists")
            self.disk.names((folder, name, node))

    def copy_from(self, other: Storage, source: str, length: int, target: str) -> None:
        data = other.read(source, 0, length)
        if len(data) != length:
            raise StorageError(f"{other.describe(source)} is too short", errno=errno.EIO)
        self.write(target, [data])

    def remove(self, key: str) -> None:
        with self.disk.guard:
            node = self.disk.resolve(self._path(key))
            if not node:
                return
            for name in list(self.disk.folders.get(node, ())):
                self.remove(f"{key}/{name}" if key else name)
            folder, name = self._place(key)
            self.disk.names((folder, name, 0))

    def sync_folder(self, folder: str) -> None:
        with self.disk.guard:
            if folder in self._lost:
                raise StorageError(f"an earlier sync of {self.describe(folder)} failed", errno=errno.EIO)
            self.disk.log.append(("syncdir", self._folder(self._path(folder))))

    def lose(self, folder: str) -> None:
        """Fail the sync of a folder, as a disk does that has dropped what was to be written."""
        self._lost.add(folder)
        raise StorageError(f"could not sync {self.describe(folder)}", errno=errno.EIO)

    def lock(self, key: str) -> MemoryLock:
        with self.disk.guard:
            folder, name = self._place(key)
            node = self.disk.folders[folder].get(name, 0)
            if not node:
                node = self.disk.new()
                self.disk.files[node] = b""
                self.disk.names((folder, name, node))
            if node in self.disk.locks and not self.disk.lying_locks:
                raise LockedError(f"{self.describe(key)} is locked", hint="wait for the other writer")
            lock = self.disk.locks[node] = MemoryLock(self.disk, node)
            return lock

    def holder(self, key: str) -> dict[str, object] | None:
        with self.disk.guard:
            return {} if self.disk.resolve(self._path(key)) in self.disk.locks else None


Tap = Callable[[str, tuple[Any, ...], Callable[[], Any]], Any]

#: The operations of the port that change a disk, or make a change durable.
CHANGES = ("make_root", "make_folder", "write", "append", "rename", "link", "link_from", "copy_from", "remove")
SYNCS = ("sync_folder",)


class Tapped:
    """Any storage, each operation of which goes through ``tap(name, arguments, call)``; it calls, raises, or waits.

    Made for a class of operations at once: faults before and after, pauses, counts.
    """

    def __init__(self, inner: Storage, tap: Tap) -> None:
        self.inner = inner
        self.tap = tap

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.inner, name)
        if name in ("describe", "root", "disk", "gap", "streams"):
            return method
        if name == "child":
            return lambda key: Tapped(method(key), self.tap)

        def tapped(*args: Any, **options: Any) -> Any:
            return self.tap(name, args, lambda: method(*args, **options))

        return tapped


@functools.cache
def _parsed(question: str) -> tuple[list[str], bool]:
    """The parts of a question's path, and whether it asks for a folder."""
    return question.rstrip("/").split("/"), question.endswith("/")


@dataclass
class Image:
    """One state that a power failure could leave: the names in each folder, and the data of each file."""

    folders: dict[int, dict[str, int]]
    files: dict[int, bytes]

    def look(self, question: str) -> object:
        """What there is: a folder's names for ``"path/"``, a file's bytes for ``"path"``, ``None`` for nothing."""
        folders = self.folders
        node = ABOVE
        parts, of_folder = _parsed(question)
        for part in parts:
            names = folders.get(node)
            if names is None or part not in names:
                return None
            node = names[part]
        if of_folder:
            names = folders.get(node)
            return None if names is None else frozenset(names)
        return self.files.get(node)

    def disk(self) -> Disk:
        """A disk that holds this image, all of it durable."""
        disk = Disk()
        disk.folders = {node: dict(names) for node, names in self.folders.items()}
        disk.files = dict(self.files)
        disk._next = max([*self.folders, *self.files, 1]) + 1
        return disk

    def tree(self) -> dict[str, bytes]:
        """All files below the store's root, by key."""
        return self.disk().tree()


class Looking:
    """What reads of the storage port, over anything that can be looked at; it remembers each question and answer."""

    gap = LocalStorage.gap
    streams = LocalStorage.streams

    def __init__(self, image: Any, root: str = STORE, asked: list[tuple[str, object]] | None = None) -> None:
        self.image = image
        self.root = root
        self.asked: list[tuple[str, object]] = [] if asked is None else asked

    def _ask(self, question: str) -> Any:
        question = f"{self.root}/{question}"
        answer = self.image.look(question)
        self.asked.append((question, answer))
        return answer

    def describe(self, key: str = "") -> str:
        return f"image:{key}"

    def child(self, key: str) -> Looking:
        return Looking(self.image, f"{self.root}/{key}", self.asked)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        data = self._ask(key)
        if data is None:
            raise NotFoundError(f"there is no file {key}")
        content: bytes = data[start:stop]
        return content

    def size(self, key: str) -> int | None:
        data = self._ask(key)
        return None if data is None else len(data)

    def list(self, folder: str) -> list[str]:
        return sorted(self._ask(f"{folder}/" if folder else "") or ())

    def holder(self, key: str) -> dict[str, object] | None:
        return None
