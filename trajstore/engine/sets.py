"""Interval sets too large for the manifest, each version an immutable array of its own."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Executor

from trajstore.engine.arraywriter import ArrayWriter
from trajstore.format.encoding import set_layout
from trajstore.format.intervals import IntervalSet
from trajstore.format.layout import SETS
from trajstore.format.manifest import INLINE_INTERVALS, StoredSet
from trajstore.media.storage import Storage

_KEPT = 4  # versions of a set that readers of older commits may still want


class SetWriter:
    """Stores the sets of one writer session; a set that did not change is not written again."""

    def __init__(self, storage: Storage, token: str, disk: Executor) -> None:
        self._storage = storage
        self._token = token
        self._disk = disk
        self._names = itertools.count()
        self._last: dict[str, tuple[IntervalSet, StoredSet]] = {}
        self._old: dict[str, deque[str]] = {}

    def store(self, sets: Mapping[str, IntervalSet]) -> dict[str, IntervalSet | StoredSet]:
        """What the manifest is to say of each set: the set itself, or the array that holds it, written and durable."""
        return {
            name: value if len(value.pairs) <= INLINE_INTERVALS else self._stored(name, value)
            for name, value in sets.items()
        }

    def _stored(self, name: str, value: IntervalSet) -> StoredSet:
        last = self._last.get(name)
        if last is not None and last[0] == value:
            return last[1]
        layout = set_layout(f"{name}.{self._token}.{next(self._names)}")
        writer = ArrayWriter(layout, self._storage, self._token, self._disk)
        writer.make_folder()
        writer.encode(value.pairs, 0)
        writer.flush(len(value.pairs))
        for folder in (SETS, ""):
            self._storage.sync_folder(folder)
        tail = writer.tail(len(value.pairs))
        shards = [*writer.take_sealed(), *([tail] if tail else [])]
        stored = StoredSet(layout.path.rpartition("/")[2], len(value.pairs), tuple(shards))
        self._last[name] = value, stored
        self._old.setdefault(name, deque()).append(layout.path)
        return stored

    def forget(self) -> None:
        """After a commit: remove the versions that only long superseded commits of this session name."""
        for versions in self._old.values():
            while len(versions) > _KEPT:
                self._storage.remove(versions.popleft())
