"""Interval sets too large for the manifest: a few immutable arrays, each larger than the next, and what is new."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field

from trajstore.engine.arraywriter import ArrayWriter
from trajstore.engine.commit import kept_commits
from trajstore.errors import StorageError, TrajstoreError
from trajstore.format.encoding import set_layout
from trajstore.format.intervals import IntervalSet
from trajstore.format.layout import ROOT, SETS, commit_key, is_temporary
from trajstore.format.manifest import INLINE_INTERVALS, Manifest, SetArray, StoredSet
from trajstore.media.storage import Storage

_REST = 256  # intervals that stand in the manifest beside the arrays
_RATIO = 2  # of two arrays' sizes, at least
_KEPT = 4  # commits whose arrays their readers may still want


@dataclass
class _Parts:
    """Of one set, what lies in arrays: each with its members, the first the largest, and all of these."""

    arrays: list[tuple[SetArray, IntervalSet]] = field(default_factory=list)
    members: IntervalSet = field(default_factory=IntervalSet)


class SetWriter:
    """Stores the sets of one writer session.

    Notes
    -----
    A set that grows by a little costs little: what is new stands in the manifest until it is too much for it, and then
    becomes an array, into which those go that are not much larger. So there are few of them, and an interval is
    written again as often as the set has doubled, not at every commit. Sets that grow alike (seeds attempted and
    completed) share arrays.
    """

    def __init__(self, storage: Storage, token: str, disk: Executor) -> None:
        self._storage = storage
        self._token = token
        self._disk = disk
        self._numbers = itertools.count()
        self._parts: dict[str, _Parts] = {}
        self._named: deque[frozenset[str]] = deque(maxlen=_KEPT)  # the arrays that each of the last commits names
        self._next: frozenset[str] = frozenset()
        self._present: set[str] | None = None

    def store(self, sets: Mapping[str, IntervalSet]) -> dict[str, IntervalSet | StoredSet]:
        """What the manifest is to say of each set; what it names is written and durable."""
        said: dict[str, IntervalSet | StoredSet] = {}
        for name, value in sets.items():
            twin = next((other for other in said if sets[other] == value), None)
            if len(value.pairs) <= INLINE_INTERVALS:
                said[name] = value
                self._parts.pop(name, None)
            elif twin is not None:
                said[name], self._parts[name] = said[twin], self._parts[twin]
            else:
                said[name] = self._stored(name, value)
        self._next = frozenset(array.name for parts in self._parts.values() for array, _ in parts.arrays)
        return said

    def _stored(self, name: str, value: IntervalSet) -> StoredSet:
        parts = self._parts.get(name) or _Parts()
        rest = value - parts.members
        if len(parts.members) + len(rest) != len(value) or 2 * len(value.pairs) < sum(
            len(members.pairs) for _, members in parts.arrays
        ):
            parts, rest = _Parts(), value  # something was taken out, or intervals have grown together
        if len(rest.pairs) > _REST:
            arrays = list(parts.arrays)
            while arrays and len(arrays[-1][1].pairs) <= _RATIO * len(rest.pairs):
                rest |= arrays.pop()[1]
            arrays.append((self._array(name, rest), rest))
            parts, rest = _Parts(arrays, value), IntervalSet()
        self._parts[name] = parts
        return StoredSet(tuple(array for array, _ in parts.arrays), rest)

    def _array(self, name: str, value: IntervalSet) -> SetArray:
        layout = set_layout(f"{name}.{self._token}.{next(self._numbers)}")
        writer = ArrayWriter(layout, self._storage, self._token, self._disk)
        writer.make_folder()
        writer.encode(value.pairs, 0)
        writer.flush(len(value.pairs))
        for folder in (SETS, ""):
            self._storage.sync_folder(folder)
        tail = writer.tail(len(value.pairs))
        shards = (*writer.take_sealed(), *([tail] if tail else []))
        array = SetArray(layout.path.rpartition("/")[2], len(value.pairs), shards)
        if self._present is not None:
            self._present.add(array.name)
        return array

    def forget(self) -> None:
        """After a commit: remove the arrays that none of the last ones names, those of dead sessions among them.

        Not before this session's first: a writer that was thought dead may still make its own commit until then.
        """
        try:
            if self._present is None:
                names = self._storage.list(SETS)
                present = {name for name in names if name != ROOT and not is_temporary(name)}
                if present:  # most stores have none, and then it does not matter what is named
                    self._named.extend(self._named_before())
                self._present = present
            self._named.append(self._next)
            for name in self._present - frozenset().union(*self._named):
                self._storage.remove(f"{SETS}/{name}")
                self._present.discard(name)
        except StorageError:
            pass  # they are in nobody's way, and the commit is made

    def _named_before(self) -> list[frozenset[str]]:
        named = []
        for number in kept_commits(self._storage):
            key = commit_key(number)
            try:
                manifest = Manifest.from_bytes(self._storage.read(key), self._storage.describe(key))
            except TrajstoreError:
                continue  # nobody can open it
            named.append(frozenset(array.name for array in manifest.set_arrays))
        return named
