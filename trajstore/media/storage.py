"""The storage port: bytes by key, and what makes them durable.

Everything the engine does to a disk goes through the few operations of
:class:`Storage`. A *key* is a path relative to the storage's root with ``/``
between its parts; ``""`` is the root itself. The crash explorer and the fault
injector of the tests are other implementations of the same port. Two of its
operations, ``link_from`` and ``copy_from``, have a second storage as their source:
merging stores is made of them.

Notes
-----
Operations may be called from several threads at once. No operation is retried
here: after a failed sync the state of that file is unknown (the kernel may
have dropped its dirty pages), so the caller writes a new file from memory.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import stat
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from trajstore.errors import AlreadyExistsError, LockedError, NotFoundError, SchemaError, StateError, StorageError

Piece = bytes | bytearray | memoryview

_OPEN_FILES = 256  # read descriptors kept, by all storages together; a process may often hold no more than 1,024
_IOV_MAX = 512
_URL = re.compile(r"([a-z0-9]+::)*[A-Za-z][A-Za-z0-9+.-]+:/")  # fsspec chains them; a pathlib.Path leaves one slash
_COPY_STEP = 1 << 30
_LOCK_PATIENCE = 0.5  # seconds; whoever merely asks whether a writer lives holds the lock for microseconds


class Lock(Protocol):
    """A held lock; the kernel frees it when the process dies."""

    def release(self) -> None: ...


class Storage(Protocol):
    """What the engine needs of a disk.

    gap : bytes between two that are wanted which are cheaper to read than to skip.
    streams : reads that are worth asking for at once, because they wait for something else than a core; 0 if none are.
    """

    gap: int
    streams: int

    def describe(self, key: str = "") -> str:
        """The place that ``key`` names, as a person would write it; for messages."""

    def child(self, key: str) -> Storage:
        """The storage whose root is the folder ``key`` of this one."""

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes ``[start, stop)`` of a file; fewer where it ends before ``stop``.

        Raises ``NotFoundError`` if there is no such file, ``StorageError`` if it cannot be read.
        """

    def size(self, key: str) -> int | None:
        """Length of a file in bytes; ``None`` if there is none."""

    def list(self, folder: str) -> list[str]:
        """Names directly inside a folder, in no order; empty if there is no such folder."""

    def make_root(self) -> bool:
        """Make the root folder and the missing ones above it; its name is durable on return. Whether it was missing."""

    def make_folder(self, folder: str) -> None:
        """Make a folder and the missing ones above it. Raises ``AlreadyExistsError``."""

    def write(
        self, key: str, pieces: Sequence[Piece], *, base: tuple[str, int] | None = None, sync: bool = True
    ) -> None:
        """Make a new file: the first ``base[1]`` bytes of the file ``base[0]``, then ``pieces``.

        On return the bytes are durable (``sync``), the name is not: see ``sync_folder``.
        Raises ``AlreadyExistsError`` if the name is taken. After any error no file of that name is left.
        """

    def append(self, key: str, data: Piece, *, sync: bool = True) -> None:
        """Add ``data`` to the end of a file, made if it is not there; a crash may keep any prefix of it.

        For logs whose reader checks every line: what a commit names is written by ``write``.
        """

    def rename(self, source: str, target: str) -> None:
        """Give a file or folder another name, atomically, in the place of what had it (an empty folder at most)."""

    def link(self, source: str, target: str) -> None:
        """Give a file a second name. Raises ``AlreadyExistsError`` if that name is taken: of two callers one wins."""

    def link_from(self, other: Storage, source: str, target: str) -> None:
        """Give a file of another storage a second name here: two stores then share its bytes, which never change.

        Raises ``AlreadyExistsError`` if the name is taken, ``NotFoundError`` if there is no such file, and
        ``StorageError`` where no file can have both names (another disk, no links there): see ``copy_from``.
        """

    def copy_from(self, other: Storage, source: str, length: int, target: str) -> None:
        """Make a new file of the first ``length`` bytes of another storage's; as ``write``, whose errors it raises."""

    def remove(self, key: str) -> None:
        """Remove a file, or a folder with all it holds; nothing happens if there is none."""

    def sync_folder(self, folder: str) -> None:
        """Make the names directly inside a folder durable.

        Once this has failed for a folder it fails for ever: the kernel reports what it lost but once.
        """

    def lock(self, key: str) -> Lock:
        """Take the exclusive lock of the file ``key``. Raises ``LockedError``, naming who holds it."""

    def holder(self, key: str) -> dict[str, object] | None:
        """Who holds the lock of ``key`` (pid, host, time), or ``None``."""


def is_url(path: object) -> bool:
    """Whether a place is written as a URL."""
    return isinstance(path, str) and bool(_URL.match(path))


def local_path(path: Any) -> str:
    """The absolute path of a local file or folder. Raises ``StateError`` for a URL, ``SchemaError`` for no path."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not text or not isinstance(text, str) or "\0" in text:
        raise SchemaError(f"{path!r:.60} is no path", hint="give a str or a pathlib.Path")
    if is_url(text):
        raise StateError(
            f"{text} is a URL, and this takes a local path",
            hint="remote stores are only read: trajstore.open(url), with the URL as a str",
        )
    return os.path.abspath(text)


class LocalStorage:
    """A folder of a local file system. Picklable: descriptors stay behind."""

    gap = 4096
    streams = 0

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = local_path(root)
        self._files: dict[str, _ReadFile] = {}
        self._lost: set[str] = set()  # folders of which a sync has failed
        self._plain = {""}  # folders that were looked at and are no links
        self._guard = threading.Lock()
        _storages.add(self)

    def __reduce__(self) -> tuple[type[LocalStorage], tuple[str]]:
        return LocalStorage, (self.root,)

    def __repr__(self) -> str:
        return f"LocalStorage({self.root!r})"

    def describe(self, key: str = "") -> str:
        return f"{self.root}/{key}" if key else self.root

    def _path(self, key: str) -> str:
        """Where a key lies. Raises ``StorageError`` for one that is reached through a symbolic link."""
        self._refuse_links(key.rpartition("/")[0])
        return self.describe(key)

    def _folder(self, key: str) -> str:
        """The same of a folder that is gone into."""
        self._refuse_links(key)
        return self.describe(key)

    def child(self, key: str) -> LocalStorage:
        return LocalStorage(self.describe(key))

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        with self._guard:
            file = self._files.get(key)
        if file is None or stop is None or stop > file.size:
            file = self._open(key)
        length = file.size - start if stop is None else min(stop, file.size) - start
        try:
            data = os.pread(file.fd, length, start) if length > 0 else b""
            while len(data) < length:
                more = os.pread(file.fd, length - len(data), start + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise _storage_error("read", self.describe(key), error) from error
        return data

    def _refuse_links(self, folder: str) -> None:
        """Raise ``StorageError`` if a folder, or one between the root and it, is a symbolic link; looked at once.

        The root itself may be one: where a store stands is its owner's business.
        """
        if folder in self._plain:
            return
        self._refuse_links(folder.rpartition("/")[0])
        try:
            status = os.lstat(self.describe(folder))
        except OSError:
            return  # whatever is done next says what is wrong
        if stat.S_ISLNK(status.st_mode):
            raise StorageError(
                f"{self.describe(folder)} is a symbolic link",
                hint="no links are followed inside a store: copy what it names",
            )
        self._plain.add(folder)

    def _open(self, key: str) -> _ReadFile:
        path = self._path(key)
        try:
            # Not to wait for ever where a pipe stands.
            file = _ReadFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK))
        except (FileNotFoundError, NotADirectoryError) as error:
            with self._guard:
                self._files.pop(key, None)
            raise NotFoundError(f"there is no file {path}") from error
        except OSError as error:
            hint = "a symbolic link stands where a file should" if error.errno == errno.ELOOP else ""
            raise _storage_error("open", path, error, hint) from error
        if not file.regular:
            raise StorageError(f"{path} is no file", hint="something else stands where a file should")
        with self._guard:
            self._files[key] = file
        _opened.append((weakref.ref(self), key, weakref.ref(file)))
        while len(_opened) > _OPEN_FILES:
            self._let_go(*_opened.popleft())
        return file

    @staticmethod
    def _let_go(owner: weakref.ref[LocalStorage], key: str, oldest: weakref.ref[_ReadFile]) -> None:
        """Keep a descriptor no longer. Closed by its last user: another thread may be reading through it."""
        storage, file = owner(), oldest()
        if storage is not None and file is not None:
            with storage._guard:
                if storage._files.get(key) is file:
                    del storage._files[key]

    def size(self, key: str) -> int | None:
        path = self._path(key)
        try:
            status = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _storage_error("look at", path, error) from error
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def list(self, folder: str) -> list[str]:
        path = self._folder(folder)
        try:
            return os.listdir(path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _storage_error("list", path, error) from error

    def make_root(self) -> bool:
        missing = []
        path = self.root
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        try:
            for path in reversed(missing):
                os.mkdir(path)
        except FileExistsError as error:
            if not os.path.isdir(path):
                raise AlreadyExistsError(f"{path} is a file", hint="give the path of a folder") from error
        except OSError as error:
            raise _storage_error("make the folder", path, error) from error
        for path in missing or [self.root]:  # whoever made a root that is there may not have synced its name
            LocalStorage(os.path.dirname(path)).sync_folder("")
        return bool(missing)

    def make_folder(self, folder: str) -> None:
        path = self._path(folder)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.mkdir(path)
        except FileExistsError as error:
            raise AlreadyExistsError(f"{path} exists") from error
        except OSError as error:
            raise _storage_error("make the folder", path, error) from error

    def write(
        self, key: str, pieces: Sequence[Piece], *, base: tuple[str, int] | None = None, sync: bool = True
    ) -> None:
        self._create(key, pieces, (self._path(base[0]), base[1]) if base is not None else None, sync)

    def _create(self, key: str, pieces: Sequence[Piece], base: tuple[str, int] | None, sync: bool) -> None:
        path = self._path(key)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileExistsError as error:
            raise AlreadyExistsError(f"{path} exists") from error
        except OSError as error:
            raise _storage_error("create", path, error) from error
        try:
            try:
                if base is not None:
                    _copy(base[0], fd, base[1])
                _write_all(fd, pieces)
                if sync:
                    _fdatasync(fd)
            finally:
                os.close(fd)
        except BaseException as error:
            _remove_quietly(path)
            if isinstance(error, OSError):
                raise _storage_error("write", path, error) from error
            raise

    def append(self, key: str, data: Piece, *, sync: bool = True) -> None:
        path = self._path(key)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                _write_all(fd, [data])
                if sync:
                    _fdatasync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise _storage_error("append to", path, error) from error

    def rename(self, source: str, target: str) -> None:
        path, goal = self._path(source), self._path(target)
        try:
            os.rename(path, goal)
        except OSError as error:
            raise _storage_error(f"rename {source} to", goal, error) from error
        with self._guard:
            self._files.pop(target, None)

    def link(self, source: str, target: str) -> None:
        path, goal = self._path(source), self._path(target)
        try:
            os.link(path, goal, follow_symlinks=False)
        except FileExistsError as error:
            raise AlreadyExistsError(f"{goal} exists") from error
        except OSError as error:
            raise _storage_error(f"link {source} to", goal, error) from error

    def link_from(self, other: Storage, source: str, target: str) -> None:
        if not isinstance(other, LocalStorage):
            raise StorageError(f"{other.describe(source)} and {self.describe(target)} share no disk", errno=errno.EXDEV)
        path, goal = other._path(source), self._path(target)
        try:
            os.link(path, goal, follow_symlinks=False)
        except FileExistsError as error:
            raise AlreadyExistsError(f"{goal} exists") from error
        except OSError as error:
            if error.errno == errno.ENOENT and other.size(source) is None:
                raise NotFoundError(f"there is no file {other.describe(source)}") from error
            raise _storage_error(f"link {path} to", goal, error) from error

    def copy_from(self, other: Storage, source: str, length: int, target: str) -> None:
        if isinstance(other, LocalStorage):
            self._create(target, [], (other._path(source), length), sync=True)
            return
        data = other.read(source, 0, length)
        if len(data) != length:
            raise StorageError(f"{other.describe(source)} has {len(data)} bytes, {length} were committed")
        self.write(target, [data])

    def remove(self, key: str) -> None:
        path = self._path(key)
        try:
            if stat.S_ISDIR(os.lstat(path).st_mode):
                for name in os.listdir(path):
                    self.remove(f"{key}/{name}" if key else name)
                os.rmdir(path)
            else:
                os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _storage_error("remove", path, error) from error

    def sync_folder(self, folder: str) -> None:
        path = self._folder(folder)
        if folder in self._lost:
            raise StorageError(
                f"an earlier sync of the folder {path} failed, and names in it may be lost",
                hint="reopen the store with resume=True",
                errno=errno.EIO,
            )
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _storage_error("open the folder", path, error) from error
        try:
            os.fsync(fd)
        except OSError as error:
            self._lost.add(folder)
            raise _storage_error("sync the folder", path, error) from error
        finally:
            os.close(fd)

    def lock(self, key: str) -> LocalLock:
        return LocalLock(self._path(key))

    def holder(self, key: str) -> dict[str, object] | None:
        return _holder(self._path(key))


class _ReadFile:
    """An open descriptor with the length it had when it was opened; closed when its last user lets go."""

    fd = -1  # where an interrupt comes before the first line

    def __init__(self, fd: int) -> None:
        self.fd = fd
        status = os.fstat(fd)
        self.size = status.st_size
        self.regular = stat.S_ISREG(status.st_mode)

    def __del__(self) -> None:
        try:
            os.close(self.fd)
        except OSError:
            pass


def _copy(source: str, target_fd: int, length: int) -> None:
    """Copy the first ``length`` bytes, in the kernel where it can (a reflink where the file system can)."""
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        done = 0
        copy_range = getattr(os, "copy_file_range", None)
        while done < length and copy_range is not None:
            try:
                step = copy_range(fd, target_fd, min(length - done, _COPY_STEP))
            except OSError as error:
                if error.errno in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    break
                raise
            if not step:
                break
            done += step
        while done < length:
            data = os.pread(fd, min(length - done, 1 << 20), done)
            if not data:
                raise OSError(errno.EIO, f"{source} has {done} bytes, {length} were committed")
            _write_all(target_fd, [data])
            done += len(data)
    finally:
        os.close(fd)


def _write_all(fd: int, pieces: Iterable[Piece]) -> None:
    views = [view for view in (memoryview(piece).cast("B") for piece in pieces) if len(view)]
    first = 0
    while first < len(views):
        written = os.writev(fd, views[first : first + _IOV_MAX])
        while first < len(views) and written >= len(views[first]):
            written -= len(views[first])
            first += 1
        if written:
            views[first] = views[first][written:]


def _fdatasync(fd: int) -> None:
    getattr(os, "fdatasync", os.fsync)(fd)


def _remove_quietly(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


_HINTS = {
    errno.ENOSPC: "the disk is full: make room, then commit again",
    errno.EDQUOT: "the disk quota is used up: make room, then commit again",
    errno.EACCES: "check the permissions of the folder",
    errno.EROFS: "the file system is read-only",
    errno.EPERM: "check the permissions of the folder",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
}


def _storage_error(what: str, path: str, error: OSError, hint: str = "") -> StorageError:
    reason = error.strerror or str(error)
    code = error.errno or 0
    return StorageError(f"could not {what} {path}: {reason}", hint=hint or _HINTS.get(code, ""), errno=error.errno)


class LocalLock:
    """An flock on a file that is never removed; freed by the kernel when its process ends, however it ends.

    A forked child closes its copy at once: an environment worker that outlives
    its killed parent must not hold the parent's lock.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise _storage_error("open the lock", path, error) from error
        self._fd = fd
        _locks.add(self)  # before it is locked: a fork by another thread must find it
        try:
            self._take(fd)
        except BaseException:
            self.release()
            raise
        try:
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(holder).encode(), 0)
        except OSError:
            pass  # a full disk; it is for people only

    def _take(self, fd: int) -> None:
        import fcntl  # not on every platform, and readers need none

        deadline = time.monotonic() + _LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LockedError(
                        f"{os.path.dirname(os.path.dirname(self.path))} is being written by {_who(self.path)}",
                        hint="wait for it to end, or give each collector a store of its own (part=...)",
                    ) from None
                time.sleep(0.01)
            except OSError as error:
                raise _storage_error("lock", self.path, error) from error

    def release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _who(path: str) -> str:
    try:
        holder = json.loads(Path(path).read_bytes())
        return f"process {int(holder['pid'])} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _holder(path: str) -> dict[str, object] | None:
    import fcntl

    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError:
        try:
            holder = json.loads(os.pread(fd, 4096, 0))
        except ValueError:
            holder = None
        return holder if isinstance(holder, dict) else {}
    finally:
        os.close(fd)


_locks: weakref.WeakSet[LocalLock] = weakref.WeakSet()
_storages: weakref.WeakSet[LocalStorage] = weakref.WeakSet()
#: Every descriptor kept for reading, the oldest first: its storage, its key there, and the descriptor.
_opened: deque[tuple[weakref.ref[LocalStorage], str, weakref.ref[_ReadFile]]] = deque()


def _after_fork_in_child() -> None:
    for lock in list(_locks):
        lock.release()
    for storage in list(_storages):
        storage._guard = threading.Lock()  # its owner may be a thread that the child does not have


os.register_at_fork(after_in_child=_after_fork_in_child)
