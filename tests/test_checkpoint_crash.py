"""Power failures while checkpoints are saved and removed: every image that a disk may be left with.

A disk in memory keeps apart what is durable and what is not: names that no folder sync covers may be there or not, in
any combination; data without a sync may be absent, torn or zeros. After every operation all such images are opened.
The oracle: what was acknowledged is there, nothing that was not attempted is, everything that is there verifies.
"""

from __future__ import annotations

import itertools
import random
import threading
from dataclasses import dataclass, field

import numpy as np
import pytest

from trajstore.checkpoint import Checkpoints
from trajstore.checkpoint.chunks import Pool
from trajstore.checkpoint.reading import Reader, verify_checkpoint
from trajstore.checkpoint.shelf import Shelf
from trajstore.errors import AlreadyExistsError, NotFoundError, StorageError, TrajstoreError

ROOT = 0


@dataclass
class Image:
    """A state of the disk: entries ``(folder, name) -> inode``, operations on them that may be lost, data by inode."""

    durable: dict
    pending: list
    data: dict
    unsynced: frozenset
    acknowledged: frozenset
    attempted: frozenset


@dataclass
class Disk:
    """Inodes and entries. ``mutant`` switches off one of the things that durability rests on."""

    mutant: str = ""
    durable: dict = field(default_factory=dict)
    pending: list = field(default_factory=list)  # (target folder, [((folder, name), inode or None), ...])
    data: dict = field(default_factory=dict)  # inode: bytes, or None for a folder
    unsynced: set = field(default_factory=set)
    points: list = field(default_factory=list)
    acknowledged: set = field(default_factory=set)
    attempted: set = field(default_factory=set)
    guard: threading.RLock = field(default_factory=threading.RLock)
    counter: itertools.count = field(default_factory=lambda: itertools.count(1))
    record: bool = True

    def view(self):
        entries = dict(self.durable)
        for _, effects in self.pending:
            apply(entries, effects)
        return entries

    def change(self, folder, *effects):
        self.pending.append((folder, list(effects)))
        self.point()

    def sync(self, folder):
        kept, settled = [], set()
        for target, effects in reversed(self.pending):
            # What became durable later overrules an older operation on the same name that was never synced itself.
            effects = [effect for effect in effects if effect[0] not in settled]
            if target == folder:
                settled |= {place for place, _ in effects}
                apply(self.durable, effects)
            elif effects:
                kept.append((target, effects))
        self.pending = kept[::-1]
        self.point()

    def point(self):
        if self.record:
            self.points.append(
                Image(dict(self.durable), list(self.pending), dict(self.data), frozenset(self.unsynced),
                      frozenset(self.acknowledged), frozenset(self.attempted))
            )  # fmt: skip


def apply(entries, effects):
    for place, inode in effects:
        if inode is None:
            entries.pop(place, None)
        else:
            entries[place] = inode


class MemoryStorage:
    """The storage port on a :class:`Disk`."""

    def __init__(self, disk, root=""):
        self.disk, self.root = disk, root

    def _key(self, key):
        return "/".join(part for part in (self.root, key) if part)

    def _inode(self, entries, path):
        inode = ROOT
        for part in filter(None, path.split("/")):
            inode = entries.get((inode, part))
            if inode is None:
                return None
        return inode

    def _place(self, entries, path):
        folder, _, name = path.rpartition("/")
        inode = self._inode(entries, folder)
        if inode is None:
            raise StorageError(f"no folder {folder}")
        return inode, name

    def describe(self, key=""):
        return "/" + self._key(key)

    def child(self, key):
        return MemoryStorage(self.disk, self._key(key))

    def read(self, key, start=0, stop=None):
        with self.disk.guard:
            inode = self._inode(self.disk.view(), self._key(key))
            if inode is None or self.disk.data[inode] is None:
                raise NotFoundError(f"no file {key}")
            return self.disk.data[inode][start:stop]

    def size(self, key):
        with self.disk.guard:
            inode = self._inode(self.disk.view(), self._key(key))
            data = None if inode is None else self.disk.data.get(inode)
            return None if data is None else len(data)

    def list(self, folder):
        with self.disk.guard:
            entries = self.disk.view()
            inode = self._inode(entries, self._key(folder))
            return [name for (parent, name) in entries if parent == inode and inode is not None]

    def make_folder(self, folder):
        with self.disk.guard:
            path, entries = self._key(folder), self.disk.view()
            if not path or self._inode(entries, path) is not None:
                raise AlreadyExistsError(folder)
            parts = path.split("/")
            for depth in range(1, len(parts) + 1):
                part = "/".join(parts[:depth])
                if self._inode(self.disk.view(), part) is None:
                    place = self._place(self.disk.view(), part)
                    inode = next(self.disk.counter)
                    self.disk.data[inode] = None
                    self.disk.change(place[0], (place, inode))

    def write(self, key, pieces, *, base=None, sync=True):
        with self.disk.guard:
            entries = self.disk.view()
            place = self._place(entries, self._key(key))
            if place in entries:
                raise AlreadyExistsError(key)
            data = b"" if base is None else self.read(base[0])[: base[1]]
            data += b"".join(bytes(memoryview(piece).cast("B")) for piece in pieces)
            inode = next(self.disk.counter)
            self.disk.data[inode] = data
            self.disk.unsynced.add(inode)
            self.disk.change(place[0], (place, inode))
            if sync and self.disk.mutant != "no data sync":
                self.disk.unsynced.discard(inode)
                self.disk.point()

    def append(self, key, data, *, sync=True):
        with self.disk.guard:
            entries = self.disk.view()
            place = self._place(entries, self._key(key))
            inode = entries.get(place)
            before = b"" if inode is None else self.disk.data[inode]
            if inode is None:
                inode = next(self.disk.counter)
                self.disk.data[inode] = b""
                self.disk.change(place[0], (place, inode))
            for end in (len(data) // 2, len(data)):  # a crash may keep any prefix
                self.disk.data[inode] = before + bytes(data[:end])
                self.disk.point()

    def rename(self, source, target):
        with self.disk.guard:
            entries = self.disk.view()
            a, b = self._place(entries, self._key(source)), self._place(entries, self._key(target))
            if a not in entries:
                raise StorageError(f"no {source}")
            inode = entries.get(b)
            if inode is not None and any(parent == inode for parent, _ in entries):
                raise StorageError(f"{target} is a folder that is not empty")
            self.disk.change(b[0], (a, None), (b, entries[a]))

    def link(self, source, target):
        with self.disk.guard:
            entries = self.disk.view()
            a, b = self._place(entries, self._key(source)), self._place(entries, self._key(target))
            if b in entries:
                raise AlreadyExistsError(target)
            if a not in entries:
                raise StorageError(f"no {source}")
            self.disk.change(b[0], (b, entries[a]))

    def remove(self, key):
        with self.disk.guard:
            entries = self.disk.view()
            inode = self._inode(entries, self._key(key))
            if inode is None:
                return
            for name in self.list(key):
                self.remove(f"{key}/{name}")
            place = self._place(entries, self._key(key))
            self.disk.change(place[0], (place, None))

    def sync_folder(self, folder):
        with self.disk.guard:
            path = self._key(folder)
            inode = self._inode(self.disk.view(), path)
            if inode is None:
                raise StorageError(f"no folder {folder}")
            lost = {
                "no sync of the root": path == "",
                "no sync of arrays": path.count("/") == 2 and "tmp." in path,
                "no sync of the new folder": path.count("/") == 1 and "tmp." in path,
                "no sync of the trash": path.endswith("/trash"),
            }
            if not lost.get(self.disk.mutant, False):
                self.disk.sync(inode)

    def lock(self, key):
        class Held:
            def release(self):
                pass

        return Held()

    def holder(self, key):
        return None


def images(point, rng, budget):
    """The disks that a failure at this point may leave: all if they are few, else a sample with the extremes."""
    count = len(point.pending)
    masks = range(1 << count) if count <= 5 else [0, (1 << count) - 1, *(rng.getrandbits(count) for _ in range(budget))]
    for mask in masks:
        entries = dict(point.durable)
        for bit, (_, effects) in enumerate(point.pending):
            if mask >> bit & 1:
                apply(entries, effects)
        data = dict(point.data)
        for inode in point.unsynced:
            whole = data[inode]
            data[inode] = rng.choice([b"", whole[: len(whole) // 2], bytes(len(whole)), whole])
        yield Disk(durable=entries, data=data, record=False, counter=itertools.count(1 << 20))


def value(step):
    return np.random.default_rng(step).standard_normal(40)


def state(step):
    return {"model": {"w": value(step), "frozen": np.arange(30.0)}, "opt": {"step": step}}


def workload(disk, saves=7):
    """Saves with retention, milestones, links, a resume at an older step that prunes, and saves after it."""
    storage = MemoryStorage(disk)

    def session(steps, back=None):
        with Checkpoints(storage, keep_last=2, keep_best=("r", "max", 1), keep_every=3, milestone="model", rng=False,
                         threads=1, on_signal="ignore") as ckpts:  # fmt: skip
            if back is not None:
                ckpts.restore(step=back, abandoned="prune")
            for step in steps:
                disk.attempted.add(step)
                ckpts.save(step, state(step), {"r": float(-abs(step - 2))})
                ckpts.wait()
                with disk.guard:
                    disk.acknowledged.add((step, ckpts.latest().serial))

    session(range(saves))
    session(range(saves - 1, saves + 1), back=saves - 2)


def examine(disk, point, pool):
    """What is wrong with an image, or ``None``."""
    storage = MemoryStorage(disk)
    shelf = Shelf(storage)
    try:
        found = {}
        for name in shelf.names():
            record = shelf.record(name)
            verify_checkpoint(storage.child(name), record, pool)
            reader = Reader(storage.child(name), record, pool)
            if not np.array_equal(reader.part(("model", "w")), value(record.step)):
                return f"{name} holds another state"
            found[record.serial] = (record.step, bool(record.stripped))
    except TrajstoreError as error:
        return f"damage: {error}"
    if any(step not in point.attempted for step, _ in found.values()):
        return "a step that was never saved"
    if point.acknowledged:
        newest = max(serial for _, serial in point.acknowledged)
        whole = [serial for serial, (_, stripped) in found.items() if not stripped]
        if not whole or max(whole) < newest:
            return f"the newest acknowledged is gone: {sorted(found.items())}, {sorted(point.acknowledged)}"
    return None


def explore(mutant, budget, saves=7):
    disk, rng, pool = Disk(mutant), random.Random(0), Pool(0)
    workload(disk, saves)
    seen, checked = set(), 0
    for point in disk.points:
        for image in images(point, rng, budget):
            key = (frozenset(image.durable.items()), frozenset((i, hash(image.data[i])) for i in point.unsynced),
                   point.acknowledged)  # fmt: skip
            if key in seen:
                continue
            seen.add(key)
            checked += 1
            problem = examine(image, point, pool)
            if problem:
                return checked, problem
    return checked, None


def test_no_power_failure_loses_or_damages_a_checkpoint():
    checked, problem = explore("", budget=6)
    assert problem is None, problem
    assert checked > 1_000


@pytest.mark.parametrize(
    "mutant",
    ["no data sync", "no sync of the root", "no sync of arrays", "no sync of the new folder", "no sync of the trash"],
)
def test_each_sync_is_needed(mutant):
    _, problem = explore(mutant, budget=40, saves=5)
    assert problem is not None, f"nothing notices {mutant!r}"


def test_every_image_can_be_gone_on_from():
    disk, rng = Disk(), random.Random(1)
    workload(disk, saves=4)
    for point in disk.points[:: max(1, len(disk.points) // 60)]:
        for image in itertools.islice(images(point, rng, 2), 4):
            storage = MemoryStorage(image)
            if not image.durable:
                continue
            with Checkpoints(storage, keep_last=2, rng=False, threads=1, on_signal="ignore") as ckpts:
                before = ckpts.latest()
                ckpts.save(100, state(100), {"r": 0.0})
                ckpts.wait()
                assert ckpts.restore().step == 100 and ckpts.verify() == []
                assert before is None or ckpts.latest().serial > before.serial
                assert not [name for name in storage.list("__trajstore") if name.startswith("tmp.")]
                assert storage.list("__trajstore/trash") == []


def test_every_failing_operation_surfaces_and_costs_one_save_at_most():
    class Failing(MemoryStorage):
        count, at, failed = 0, -1, ""

        def __getattribute__(self, name):
            found = object.__getattribute__(self, name)
            if name in ("write", "append", "rename", "link", "make_folder", "sync_folder", "remove"):
                Failing.count += 1
                if Failing.count == Failing.at:
                    Failing.failed = name
                    raise StorageError(f"{name}: no space left on device", errno=28)
            return found

    total = 0
    for at in itertools.count(1):
        Failing.count, Failing.at = 0, -1
        disk = Disk(record=False)
        ckpts = Checkpoints(Failing(disk), keep_last=1, rng=False, threads=1, on_signal="ignore")
        ckpts.save(0, state(0))
        ckpts.wait()
        Failing.count, Failing.at = 0, at
        surfaced = False
        for step in (1, 2):
            try:
                ckpts.save(step, state(step))
                ckpts.wait()
            except TrajstoreError:
                surfaced = True
        over = Failing.count < at
        Failing.at = -1
        # A link that cannot be made is written instead; all else must be said.
        assert surfaced or over or Failing.failed == "link", f"operation {at}, {Failing.failed}, failed unheard"
        ckpts.save(3, state(3))
        ckpts.close()
        with Checkpoints(MemoryStorage(disk), keep_last=1, rng=False, threads=1, on_signal="ignore") as after:
            assert after.restore().step == 3 and after.verify() == []
        total += 1
        if over:
            break
    assert total > 20
