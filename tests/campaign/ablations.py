"""Mutants of the engine, each with one of its precautions taken out; a campaign that misses one cannot see."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from tests.campaign.disk import MemoryStorage
from trajstore.engine import arraywriter, commit, ingest, snapshot
from trajstore.engine.arraywriter import ArrayWriter
from trajstore.engine.commit import Session
from trajstore.format.layout import ROOT, metadata_key, temporary
from trajstore.media.shard import GrowingShard

Mutant = Callable[[], "contextlib.AbstractContextManager[Any]"]
patch = mock.patch.object


def _file_sync_dropped(match: Callable[[str], bool]) -> contextlib.AbstractContextManager[Any]:
    write = MemoryStorage.write

    def unsynced(self: MemoryStorage, key: str, pieces: Any, *, base: Any = None, sync: bool = True) -> None:
        write(self, key, pieces, base=base, sync=sync and not match(key))

    return patch(MemoryStorage, "write", unsynced)


def _folder_sync_dropped(match: Callable[[str], bool]) -> contextlib.AbstractContextManager[Any]:
    sync = MemoryStorage.sync_folder
    return patch(MemoryStorage, "sync_folder", lambda self, folder: None if match(folder) else sync(self, folder))


def a_shards_sync_is_dropped() -> contextlib.AbstractContextManager[Any]:
    return _file_sync_dropped(lambda key: "/" in key)


def the_manifests_sync_is_dropped() -> contextlib.AbstractContextManager[Any]:
    return _file_sync_dropped(lambda key: "/" not in key)


def an_arrays_folder_is_not_synced() -> contextlib.AbstractContextManager[Any]:
    return _folder_sync_dropped(lambda folder: folder.count("/") == 1)


def the_folders_above_are_not_synced() -> contextlib.AbstractContextManager[Any]:
    return _folder_sync_dropped(lambda folder: bool(folder) and "/" not in folder)


def the_root_folder_is_not_synced() -> contextlib.AbstractContextManager[Any]:
    return _folder_sync_dropped(lambda folder: not folder)


def the_roots_own_name_is_not_synced() -> contextlib.AbstractContextManager[Any]:
    def make_root(self: MemoryStorage) -> bool:
        with self.disk.guard:
            missing = not self.disk.resolve(self.root)
            if missing:
                self._make(self.root)
            return missing

    return patch(MemoryStorage, "make_root", make_root)


@contextlib.contextmanager
def the_manifest_comes_before_the_shards() -> Iterator[None]:
    """Swapped order: shards are written, and synced, once the root has named them."""
    publish = Session.publish
    late: list[tuple[ArrayWriter, int]] = []

    def announce(self: ArrayWriter, end: int) -> None:
        late.append((self, end))
        for shard in self._shards.values():
            with self._guard:
                if shard.waiting:
                    pieces, taken = shard.next_version()
                    self._promised = getattr(self, "_promised", [])  # type: ignore[attr-defined]
                    self._promised.append((shard, shard.length, pieces))  # type: ignore[attr-defined]
                    shard.advance(pieces, taken)

    def show_first(self: Session, manifest: Any) -> None:
        publish(self, manifest)
        for writer, _ in late:
            for shard, length, pieces in getattr(writer, "_promised", []):
                key = writer.layout.shard_key(shard.number)
                name = temporary(writer.layout.path, f"late{next(writer._names)}")
                writer.storage.write(name, pieces, base=(key, length) if length else None)
                writer.storage.rename(name, key)
            writer._promised = []  # type: ignore[attr-defined]
            writer.storage.sync_folder(writer.layout.path)
        late.clear()

    with patch(ArrayWriter, "flush", announce), patch(Session, "publish", show_first):
        yield


@contextlib.contextmanager
def the_root_is_written_in_place() -> Iterator[None]:
    rename = MemoryStorage.rename

    def overwrite(self: MemoryStorage, source: str, target: str) -> None:
        node = self.disk.resolve(self._path(target))
        if target != ROOT or not node:
            rename(self, source, target)
            return
        data = self.read(source)
        self.disk.log.append(("data", node, b""))
        self.disk.data(node, data)
        self.disk.log.append(("sync", node))
        self.remove(source)

    with patch(MemoryStorage, "rename", overwrite):
        yield


@contextlib.contextmanager
def a_shard_is_laid_out_anew_when_it_grows() -> Iterator[None]:
    """Its bytes are no prefix of its next version's: an older index names what is no longer there."""

    def next_version(self: GrowingShard) -> tuple[list[bytes], dict[int, bytes]]:
        self._all = {**getattr(self, "_all", {}), **self._pending}  # type: ignore[attr-defined]
        taken = dict(sorted(self._all.items(), reverse=True))  # type: ignore[attr-defined]
        self.length = 0
        self._entries[:] = (1 << 64) - 1
        return [*taken.values(), self._index(taken)], taken

    def replace_it(self: ArrayWriter, shard: GrowingShard) -> None:
        if not shard.waiting:
            return
        grown = shard.length
        pieces, taken = shard.next_version()
        name = temporary(self.layout.path, f"{self._token}.{next(self._names)}")
        self.storage.write(name, pieces)
        (self.storage.rename if grown else self.storage.link)(name, self.layout.shard_key(shard.number))
        if not grown:
            self.storage.remove(name)
        shard.crc = 0
        for chunk in taken:
            shard._pending.setdefault(chunk, taken[chunk])
        shard.advance(pieces, taken)
        self._new_names = True

    with patch(GrowingShard, "next_version", next_version), patch(ArrayWriter, "_write", replace_it):
        yield


@contextlib.contextmanager
def the_arrays_metadata_lead_the_root() -> Iterator[None]:
    publish = Session.publish

    def children_first(self: Session, manifest: Any) -> None:
        for path, metadata in manifest.children().items():
            name = temporary(path, f"{self.uuid}.{next(self._names)}")
            with contextlib.suppress(Exception):
                self.storage.make_folder(path)
            self.storage.write(name, [json.dumps(metadata).encode()])
            self.storage.rename(name, metadata_key(path))
        publish(self, manifest)

    with patch(Session, "publish", children_first):
        yield


def a_temporary_name_is_used_again() -> contextlib.AbstractContextManager[Any]:
    """The same names in every session, and nobody clears them away."""
    stack = contextlib.ExitStack()
    same = lambda folder, token: f"{folder}/tmp" if folder else "tmp"  # noqa: E731
    stack.enter_context(patch(commit, "temporary", same))
    stack.enter_context(patch(arraywriter, "temporary", same))
    return stack


def a_failed_sync_is_tried_again() -> contextlib.AbstractContextManager[Any]:
    """The first sync of each folder fails; the second succeeds and is believed, but the kernel had let go."""
    sync = MemoryStorage.sync_folder
    failed: set[tuple[int, str]] = set()

    def believed(self: MemoryStorage, folder: str) -> None:
        if (id(self.disk), folder) in failed:
            sync(self, folder)
        failed.add((id(self.disk), folder))

    return patch(MemoryStorage, "sync_folder", believed)


def seals_of_the_session_before_are_forgotten() -> contextlib.AbstractContextManager[Any]:
    """The tails that a dead session left are not sealed: the next one does not know where they end."""
    add = ingest.SealWriter.add

    def forgetful(self: Any, sealed: Any) -> None:
        add(self, list(sealed)[1:])

    return patch(ingest.SealWriter, "add", forgetful)


@contextlib.contextmanager
def a_session_continues_anothers_shard() -> Iterator[None]:
    """It begins where the rows end, writes over what it finds there, and so shares a file with a dead session."""

    def rename_always(self: MemoryStorage, source: str, target: str) -> None:
        if "/c." in target:
            MemoryStorage.rename(self, source, target)
            self.write(source, [b""])  # what is removed next
        else:
            link(self, source, target)

    link = MemoryStorage.link
    with (
        patch(MemoryStorage, "link", rename_always),
        patch(ArrayWriter, "existing_shards", lambda self: 0),
        patch(ingest, "_aligned", lambda row, writers: row),
    ):
        yield


def a_shard_is_made_over_what_stands_there() -> contextlib.AbstractContextManager[Any]:
    """Rule B without its exclusive creation: two writers that lying locks let in share a shard's name."""
    link = MemoryStorage.link

    def rename_always(self: MemoryStorage, source: str, target: str) -> None:
        if "/c." in target:
            MemoryStorage.rename(self, source, target)
            self.write(source, [b""])
        else:
            link(self, source, target)

    return patch(MemoryStorage, "link", rename_always)


@contextlib.contextmanager
def commits_are_not_claimed() -> Iterator[None]:
    """No exclusive number for a commit: of two writers the second to rename wins."""
    with patch(Session, "_claim", lambda self, name, number: None):
        yield


@contextlib.contextmanager
def the_commits_uuid_is_not_checked() -> Iterator[None]:
    """Neither the root's uuid nor the claimed number holds a stale writer back."""
    with patch(Session, "check", lambda self: None), patch(Session, "_claim", lambda self, name, number: None):
        yield


@contextlib.contextmanager
def an_old_claim_is_not_noticed() -> Iterator[None]:
    """A number that is free only because its commit is no longer kept is taken for the next one."""
    claim = Session._claim

    def short_sighted(self: Session, name: str, number: int) -> None:
        with patch(commit, "kept_commits", lambda storage: [number]):
            claim(self, name, number)

    with patch(Session, "_claim", short_sighted):
        yield


@contextlib.contextmanager
def a_sleepers_manifest_is_left() -> Iterator[None]:
    """Whoever opens a store leaves the temporary files in its root alone."""
    with patch(commit, "is_temporary", lambda name: False):
        yield


@contextlib.contextmanager
def an_unreadable_store_is_begun_anew() -> Iterator[None]:
    find = Session.find_head

    def careless(self: Session) -> Any:
        try:
            return find(self)
        except Exception:
            return None

    with patch(Session, "find_head", careless):
        yield


@contextlib.contextmanager
def the_length_of_a_shard_is_taken_from_the_disk() -> Iterator[None]:
    """A sealed shard is not checked: whatever version of the file stands there is read."""

    known = snapshot.Snapshot._shard_lengths

    def lengths(self: Any, array: str) -> Any:
        layout = self.manifest.arrays[array][0]
        sizes = {number: self.storage.size(layout.shard_key(number)) for number in known(self, array)}
        return {number: size for number, size in sizes.items() if size is not None}

    with patch(snapshot.Snapshot, "_shard_lengths", lengths):
        yield


#: Seen by the crash images of a few short workloads.
BY_CRASHES: list[Mutant] = [
    a_shards_sync_is_dropped,
    the_manifests_sync_is_dropped,
    an_arrays_folder_is_not_synced,
    the_folders_above_are_not_synced,
    the_root_folder_is_not_synced,
    the_roots_own_name_is_not_synced,
    the_manifest_comes_before_the_shards,
    the_root_is_written_in_place,
    a_shard_is_laid_out_anew_when_it_grows,
    the_arrays_metadata_lead_the_root,
    a_temporary_name_is_used_again,
    a_failed_sync_is_tried_again,
    seals_of_the_session_before_are_forgotten,
    a_session_continues_anothers_shard,
]
#: Seen by two writers whose locks lie.
BY_ZOMBIES: list[Mutant] = [
    a_shard_is_made_over_what_stands_there,
    commits_are_not_claimed,
    the_commits_uuid_is_not_checked,
    an_old_claim_is_not_noticed,
    a_sleepers_manifest_is_left,
]
#: Seen by damage done to a store's files.
BY_DAMAGE: list[Mutant] = [an_unreadable_store_is_begun_anew, the_length_of_a_shard_is_taken_from_the_disk]
