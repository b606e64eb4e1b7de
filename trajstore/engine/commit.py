"""The commit: how the manifest is found, fenced and replaced; visibility is decided here and nowhere else.

Each commit is a file ``__trajstore/commits/<number>`` first, made exclusively: of two writers
that would both follow one commit, one fails, whatever their file system's locks are worth. The
same file then becomes the root ``zarr.json`` by a rename, which is what readers see.
"""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import Callable
from typing import Any

from trajstore.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptionError,
    FormatError,
    NotFoundError,
    StateError,
    StorageError,
)
from trajstore.format.layout import (
    COMMITS,
    LOCK,
    PARTS,
    PRIVATE,
    ROOT,
    commit_key,
    group_metadata,
    is_temporary,
    metadata_key,
    temporary,
)
from trajstore.format.manifest import MAX_BYTES, Manifest, writer_may
from trajstore.media.storage import Lock, Storage

PARTS_MARK = f'"{PARTS}"'.encode()
CHILDREN_EVERY = 30.0  # seconds
_KEPT_COMMITS = 3


def exists(storage: Storage) -> bool:
    """Whether the storage's root holds a store."""
    return storage.size(ROOT) is not None


def read_manifest(storage: Storage) -> Manifest:
    """The last commit, as readers see it.

    Raises ``NotFoundError`` if there is no store, ``FormatError`` and its kin if the root cannot be used.
    """
    return Manifest.from_bytes(_read_root(storage), storage.describe(ROOT))


def _read_root(storage: Storage) -> bytes:
    try:
        return storage.read(ROOT, 0, MAX_BYTES + 1)
    except NotFoundError:
        place = storage.describe()
        if storage.list(""):
            raise NotFoundError(
                f"{place} is not a store: it has no {ROOT}", hint="give the folder that `trajstore.create` made"
            ) from None
        raise NotFoundError(f"there is no store at {place}") from None


def kept_commits(storage: Storage) -> list[int]:
    """Numbers of the commits whose manifests are still kept beside the root, ascending."""
    return sorted(int(name) for name in storage.list(COMMITS) if name.isdecimal())


def is_root_of_parts(storage: Storage) -> bool:
    """Whether the storage's root is the group that holds parts, and no store itself."""
    return storage.size(ROOT) is not None and PARTS_MARK in storage.read(ROOT, 0, 4096)


def make_root_of_parts(storage: Storage) -> None:
    """Make the root of a dataset of parts: a plain Zarr group; nothing happens if it is there.

    Raises ``AlreadyExistsError`` if a store is there.
    """
    storage.make_root()
    if storage.size(ROOT) is None:
        name = temporary("", uuid.uuid4().hex)
        storage.write(name, [json.dumps(group_metadata({PARTS: True})).encode()])
        try:
            storage.link(name, ROOT)
        except AlreadyExistsError:
            pass  # another collector came first
        finally:
            storage.remove(name)
        storage.sync_folder("")
    if not is_root_of_parts(storage):
        raise AlreadyExistsError(
            f"{storage.describe()} is a store, which cannot hold parts", hint="choose another path for the parts"
        )


class Session:
    """One opening of a store for writing: it holds the lock and makes the commits.

    Notes
    -----
    Not locked: the writer commits in one thread at a time.
    After a commit whose outcome is not known the session is *poisoned*: every later call raises.
    """

    def __init__(self, storage: Storage, clock: Callable[[], float] = time.time) -> None:
        self.storage = storage
        self.uuid = uuid.uuid4().hex
        self.clock = clock
        self.head: Manifest | None = None
        self._lock: Lock | None = None
        self._poison = ""
        self._claimed = 0
        self._unshown = False  # whether commits were claimed, and there is no root yet
        self._names = itertools.count()
        self._children: dict[str, bytes] = {}
        self._children_time = 0.0
        try:
            storage.make_folder(PRIVATE)
        except AlreadyExistsError:
            pass
        self._lock = storage.lock(LOCK)

    def find_head(self) -> Manifest | None:
        """The newest commit, or ``None`` in a folder where none was ever made.

        A commit that was claimed and not yet renamed over the root when its writer died is gone on from: all that it
        names was durable before it was claimed, and the next commit, which is this session's, makes it visible.
        Raises ``CorruptionError`` for a root that cannot be read: a store is never started over.
        """
        storage = self.storage
        claimed = kept_commits(storage)
        self._claimed = claimed[-1] if claimed else 0
        # After the list: a writer that was long thought dead has not claimed yet, or can no longer rename what it did.
        for name in storage.list(""):
            if is_temporary(name):
                storage.remove(name)
        key = ROOT if storage.size(ROOT) is not None else commit_key(self._claimed)
        if key == ROOT or claimed:
            head = self._read_head(key)
            if self._claimed > head.commit.number:
                try:
                    head = self._read_head(commit_key(self._claimed))
                except NotFoundError:
                    raise self._fenced() from None  # it was here, and is so old by now that it is not kept
            self._unshown = key != ROOT
            if self._unshown and not self._never_shown(claimed):
                raise CorruptionError(
                    f"{storage.describe(ROOT)} is missing, and its commits are here",
                    hint="`trajstore repair` lists the manifests that can be opened",
                )
            self.head = head
        return self.head

    def _never_shown(self, claimed: list[int]) -> bool:
        """Whether each of the commits may be the first of a session that died before it was renamed over the root.

        A session goes on only from what it has shown, so two commits of one session say that there was a root.
        """
        kept = [self._read_head(commit_key(number)).commit for number in claimed]
        sessions = {commit.session for commit in kept}
        return claimed == [*range(1, len(claimed) + 1)] and not kept[0].parent and len(sessions) == len(kept)

    def _read_head(self, key: str) -> Manifest:
        data, place = self.storage.read(key, 0, MAX_BYTES + 1), self.storage.describe(key)
        head = Manifest.from_bytes(data, place)
        writer_may(data, place)
        return head

    # -- committing ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ``StateError`` if the session is poisoned, ``ConflictError`` if another writer has committed since."""
        if self._poison:
            raise StateError(
                f"this writer cannot go on: {self._poison}", hint="close it and reopen the store with resume=True"
            )
        if self.head is None:
            if exists(self.storage):
                raise self._fenced()  # the store was made while this writer was about to
            return
        if self._unshown and not exists(self.storage):
            return  # commits that their writers did not live to show
        root = _root_commit(_read_root(self.storage))
        if root["uuid"] != self.head.commit.uuid and root["number"] >= self.head.commit.number:
            # A lower number is the commit before one that was claimed when its writer died.
            raise self._fenced()

    def next_number(self) -> int:
        return max(self.head.commit.number if self.head else 0, self._claimed) + 1

    def publish(self, manifest: Manifest) -> None:
        """Make this the last commit. On return it is durable and every new reader sees it.

        Raises ``ConflictError`` if another writer came first, ``StorageError`` if the disk refused and nothing was
        published, ``StateError`` if it cannot be known.
        """
        number = manifest.commit.number
        self._replace_root(manifest.to_bytes(), number)
        self.head, self._unshown = manifest, False
        if number > _KEPT_COMMITS:
            self._remove_quietly(commit_key(number - _KEPT_COMMITS))

    def _replace_root(self, data: bytes, number: int) -> None:
        storage = self.storage
        name = temporary("", f"{self.uuid}.{next(self._names)}")
        storage.write(name, [data])
        try:
            self._claim(name, number)
            storage.rename(name, ROOT)
        except ConflictError:
            raise
        except StorageError:
            self._remove_quietly(name)
            if self._root_is(data):
                self._poison = "the commit's rename failed after it had happened"
                raise StateError(f"{self._poison} in {storage.describe()}", hint="reopen with resume=True") from None
            raise
        try:
            storage.sync_folder("")
        except StorageError as error:
            # The new root is visible; whether it outlives a power cut, nobody can tell any more.
            self._poison = f"the last commit may not be durable ({error.message})"
            raise

    def _claim(self, name: str, number: int) -> None:
        try:
            self.storage.make_folder(COMMITS)
        except AlreadyExistsError:
            pass
        try:
            self.storage.link(name, commit_key(number))
        except AlreadyExistsError:
            self._remove_quietly(name)
            raise self._fenced() from None
        self._claimed = number
        if kept_commits(self.storage)[-1:] != [number]:
            # The number was free because its commit is so old that it is no longer kept.
            self._remove_quietly(commit_key(number))
            self._remove_quietly(name)
            raise self._fenced()

    def _root_is(self, data: bytes) -> bool:
        try:
            return self.storage.read(ROOT) == data
        except NotFoundError:
            return False
        except StorageError:
            return True  # not known: assume the worse

    def _fenced(self) -> ConflictError:
        self._poison = "another writer has committed since"
        return ConflictError(
            f"another writer has committed to {self.storage.describe()} since this one did",
            hint="rows after this writer's last commit are not stored; reopen with resume=True and append them again",
        )

    def _remove_quietly(self, key: str) -> None:
        try:
            self.storage.remove(key)
        except StorageError:
            pass

    # -- children --------------------------------------------------------------------------------------------------

    def write_children(self, *, due: bool = False) -> None:
        """Bring the arrays' own metadata up to the last commit: they may lag it, and never lead.

        ``due`` : only if it was last done ``CHILDREN_EVERY`` seconds ago, or never.
        """
        if self.head is None or (due and self.clock() - self._children_time < CHILDREN_EVERY):
            return
        self._children_time = self.clock()
        for path, metadata in self.head.children().items():
            data = json.dumps(metadata, allow_nan=False, separators=(",", ":")).encode()
            if self._children.get(path) == data:
                continue
            name = temporary(path, f"{self.uuid}.{next(self._names)}")
            try:
                self.storage.make_folder(path)
            except AlreadyExistsError:
                pass
            self.storage.write(name, [data])
            self.storage.rename(name, metadata_key(path))
            self._children[path] = data

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _root_commit(data: bytes) -> dict[str, Any]:
    try:
        commit = json.loads(data)["attributes"]["trajstore"]["commit"]
        return {"uuid": str(commit["uuid"]), "number": int(commit["number"])}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError("the manifest was damaged while the store was being written") from error
