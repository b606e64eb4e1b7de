"""Seeds for many collectors of one dataset: each is handed out once, and again if its collector died before storing it.

Claims are small files under the root of the parts, made exclusively: block
``k`` of the seeds belongs to whoever made ``<k>.<generation>`` with the highest
generation. A claim whose writer session is over may be followed by the next
generation's, which gets what no part has committed of the block.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from socket import gethostname
from typing import Any, NamedTuple

import numpy as np

from trajstore.engine.commit import exists, read_manifest
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import (
    AlreadyExistsError,
    ConfigMismatchError,
    CorruptionError,
    NotFoundError,
    SchemaError,
    StateError,
)
from trajstore.format.arguments import check_count
from trajstore.format.intervals import IntervalSet
from trajstore.format.layout import LOCK, PRIVATE, temporary
from trajstore.media.storage import Storage
from trajstore.writer import Writer

Ints = np.ndarray[Any, np.dtype[np.int64]]


def split_seeds(seeds: range, rank: int, world_size: int) -> range:
    """The share of one of ``world_size`` collectors: contiguous ranges that together are ``seeds``."""
    if not isinstance(seeds, range):
        raise SchemaError(f"seeds come from a range, not from {seeds!r:.60}", hint="range(0, 1000), say")
    check_count("world_size", world_size, 1)
    check_count("rank", rank)
    if rank >= world_size:
        raise SchemaError(f"rank {rank} is not one of {world_size}")
    return seeds[len(seeds) * rank // world_size : len(seeds) * (rank + 1) // world_size]


class _Owner(NamedTuple):
    part: str
    session: str
    host: str


class SeedDispenser:
    """Hands the seeds of a range to the collectors of one dataset, until every seed is stored by one of them.

    Parameters
    ----------
    writer : this collector's, opened with ``part=``. Append with ``seed=``, or call ``mark_attempted`` for a seed that
        yielded nothing.
    seeds : ascending without gaps. A later run may end it further up; its start stays.
    block : seeds claimed at once, as the first collector chose it.
    wait : when nothing is left but what others are busy with, wait for them, and take over from those that die. Without
        it the iteration ends there; what a dead collector has left then goes to whoever runs next.
    grace : seconds without a commit after which a collector of another machine that holds no lock counts as dead.

    Raises
    ------
    StateError
        The writer is not a part.
    ConfigMismatchError
        The seeds of this name start elsewhere.

    Notes
    -----
    A seed counts as done when a commit of its part says so. What was collected and not committed when a collector died
    is handed out again; since it was never visible, no seed is stored twice. Use it in one thread.
    """

    def __init__(
        self,
        writer: Writer,
        seeds: range,
        *,
        block: int = 16,
        name: str = "seeds",
        wait: bool = False,
        poll: float = 0.2,
        grace: float = 120.0,
    ) -> None:
        if writer.part is None:
            raise StateError(
                f"{writer.path} is no part of a dataset", hint="open the writer with trajstore.create(root, part=...)"
            )
        if seeds.step != 1 or block < 1:
            raise SchemaError(
                f"{seeds!r} in blocks of {block} cannot be handed out", hint="range(start, stop), block >= 1"
            )
        self._writer = writer
        self._root, self._part = writer.part
        self._folder = f"{PRIVATE}/seeds/{name}"
        self._seeds = seeds
        self._wait, self._poll, self._grace = wait, poll, grace
        self._block = self._agree(block)
        self._done = self._attempted()
        self._held: list[int] = []

    # -- handing out -----------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[int]:
        """Seeds, one by one; going on to the next marks the one before as attempted, stored or not."""
        while len(seeds := self.take(1)):
            seed = int(seeds[0])
            yield seed
            self._writer.mark_attempted(seed)

    def take(self, count: int) -> Ints:
        """Up to ``count`` seeds, int64, for collectors that run many at once; none when there are no more."""
        while len(self._held) < count:
            found = self._claim()
            if found is not None:
                self._held += found.first(len(found)).tolist()
            elif self._held or not self._wait or not self._others_busy:
                break
            else:
                time.sleep(self._poll)
        taken, self._held = self._held[:count], self._held[count:]
        return np.array(taken, np.int64)

    def _claim(self) -> IntervalSet | None:
        """Claim the next block that has seeds left: a fresh one, else one whose collector is gone."""
        self._others_busy = False
        newest = self._newest()
        for block in range(-(-len(self._seeds) // self._block)):
            if block not in newest:
                seeds = self._seeds_of(block) - self._done
                if self._follow(block, 0) and seeds:
                    return seeds
        self._done = self._attempted()
        open_blocks = {block: gen for block, gen in sorted(newest.items()) if self._seeds_of(block) - self._done}
        owners = {block: self._owner(block, generation) for block, generation in open_blocks.items()}
        over = {owner: self._is_over(owner) for owner in set(owners.values())}
        self._done = self._attempted()  # once more, after they were found to be gone: all that they committed is here
        for block, generation in open_blocks.items():
            seeds = self._seeds_of(block) - self._done
            if seeds and over[owners[block]]:
                if self._follow(block, generation + 1):
                    return seeds
            elif seeds:
                self._others_busy |= owners[block].session != self._writer.session
        return None

    # -- claims ----------------------------------------------------------------------------------------------------

    def _seeds_of(self, block: int) -> IntervalSet:
        first = self._seeds.start + block * self._block
        return IntervalSet.span(first, min(first + self._block, self._seeds.stop))

    def _newest(self) -> dict[int, int]:
        """The newest generation of each block that was ever claimed."""
        newest: dict[int, int] = {}
        for name in self._root.list(self._folder):
            block, _, generation = name.partition(".")
            if block.isdecimal() and generation.isdecimal():
                newest[int(block)] = max(newest.get(int(block), 0), int(generation))
        return newest

    def _follow(self, block: int, generation: int) -> bool:
        """Claim a block; False if another collector was quicker."""
        claim = {"part": self._part, "session": self._writer.session, "host": gethostname(), "time": time.time()}
        return self._make(f"{self._folder}/{block}.{generation}", claim)

    def _make(self, key: str, content: dict[str, Any]) -> bool:
        """Make a small file, whole and durable, unless it is there."""
        name = temporary(self._folder, uuid.uuid4().hex)
        self._root.write(name, [json.dumps(content).encode()])
        try:
            self._root.link(name, key)
        except AlreadyExistsError:
            return False
        finally:
            self._root.remove(name)
        self._root.sync_folder(self._folder)
        return True

    def _read(self, key: str) -> dict[str, Any]:
        try:
            content = json.loads(self._root.read(key))
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise CorruptionError(
                f"{self._root.describe(key)} is damaged", hint="remove it; no stored seed is lost by that"
            )
        return content

    def _owner(self, block: int, generation: int) -> _Owner:
        claim = self._read(f"{self._folder}/{block}.{generation}")
        return _Owner(str(claim.get("part")), str(claim.get("session")), str(claim.get("host")))

    def _is_over(self, owner: _Owner) -> bool:
        """Whether a writer session can commit nothing more: its part is unlocked, or another session's."""
        if owner.session == self._writer.session:
            return False
        store = self._root.child(owner.part)
        try:
            commit = read_manifest(store).commit
        except NotFoundError:
            return True  # the part was removed, and with it what it had
        if commit.session != owner.session:
            return True
        if store.holder(LOCK) is not None:
            # A session makes a commit as it begins; until then the lock's holder may be taken for the one before.
            return False
        # Some network file systems do not tell one machine of the locks that another holds.
        return owner.host == gethostname() or time.time() - commit.time > self._grace

    def _agree(self, block: int) -> int:
        """The block size that the first collector chose."""
        try:
            self._root.make_folder(self._folder)
        except AlreadyExistsError:
            pass
        key = f"{self._folder}/about"
        self._make(key, {"start": self._seeds.start, "block": block})
        about = self._read(key)
        if about.get("start") != self._seeds.start:
            raise ConfigMismatchError(
                f"the seeds of {self._root.describe()} start at {about.get('start')}, not at {self._seeds.start}",
                differences={"start": (about.get("start"), self._seeds.start)},
                hint="give this collection another name=, or the same start",
            )
        return int(about["block"])

    def _attempted(self) -> IntervalSet:
        """Seeds that some part has committed as attempted."""
        done = IntervalSet()
        for name in self._root.list(""):
            store = self._root.child(name)
            if name != PRIVATE and exists(store):
                done = done | _attempted_in(store)
        return done


def _attempted_in(store: Storage) -> IntervalSet:
    try:
        return Snapshot.of(store).set("attempted")
    except NotFoundError:
        return IntervalSet()  # a part that has just been removed
