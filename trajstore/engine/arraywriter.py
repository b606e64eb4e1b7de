"""One growing array on disk: chunks in, shard files out; the rules A and B of docs/design.md live here.

A  A shard file only grows, its bytes a prefix of its next version's.
B  A shard file has one author, the session that created its name exclusively.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np

from trajstore.errors import AlreadyExistsError, ConflictError, StateError, StorageError
from trajstore.format.encoding import Pack
from trajstore.format.layout import ArrayLayout, is_temporary, temporary
from trajstore.format.manifest import Shard
from trajstore.media.shard import GrowingShard, encode_frames
from trajstore.media.storage import Storage

_AHEAD = 4  # full shards of an array that may wait for the disk
_BATCH_BYTES = 256 << 10  # stored bytes that are packed and encoded in one go: a few calls each, within the caches


class Misfit(Exception):
    """Rows that the array's packing cannot hold exactly."""


class ArrayWriter:
    """Encodes chunks and writes the shards of one array.

    Parameters
    ----------
    token : unique to the writer session; temporary names carry it.
    disk : runs the writes of shards that have become full before any commit asks for them.
    pack : how rows become stored rows, where they differ.
    on_failure : told when such an early write fails; the next flush tries it again.

    Notes
    -----
    ``encode`` may run in many threads at once; ``flush`` in one at a time (it holds a lock of its own).
    A failed write changes nothing here: the frames wait in memory for the next flush.
    """

    def __init__(
        self,
        layout: ArrayLayout,
        storage: Storage,
        token: str,
        disk: Executor,
        pack: Pack | None = None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.layout = layout
        self.storage = storage
        self.pack = pack
        self.copied_bytes = 0
        self.written_bytes = 0
        self.frame_bytes = 0
        self._token = token
        self._names = itertools.count()
        self._disk = disk
        self._on_failure = on_failure
        self._shards: dict[int, GrowingShard] = {}
        self._sealed: list[Shard] = []
        self._guard = threading.Lock()
        self._flushing = threading.RLock()
        self._early: deque[Future[None]] = deque()
        self._new_names = False

    # -- rows to frames --------------------------------------------------------------------------------------------

    def encode(self, rows: np.ndarray[Any, Any], first: int) -> None:
        """Encode rows (n, *row_shape) from row ``first`` on, a multiple of the chunk; the last chunk may be partial.

        Raises ``Misfit`` if they cannot be packed.
        """
        layout = self.layout
        if not layout.row_bytes:
            return
        size = layout.chunk_rows
        rows = np.ascontiguousarray(rows)
        step = size * max(1, _BATCH_BYTES // layout.chunk_bytes)
        scratch: np.ndarray[Any, Any] | None = None
        for at in range(0, len(rows), step):
            block = rows[at : at + step]
            held = len(block)
            if self.pack is not None or held % size:
                if scratch is None:
                    scratch = np.empty((min(step, -(-held // size) * size), *layout.row_shape), layout.dtype)
                if self.pack is None:
                    scratch[:held] = block
                elif not self.pack(block, scratch[:held]):
                    raise Misfit(layout.path)
                scratch[held:] = layout.fill
                block = scratch
            count = -(-held // size)
            for i, frame in enumerate(encode_frames(block[: count * size], count, layout.codec)):
                self._put((first + at) // size + i, frame, min(held - i * size, size))

    def _put(self, chunk: int, frame: bytes, rows: int) -> None:
        number, inner = divmod(chunk, self.layout.chunks_per_shard)
        with self._guard:
            shard = self._shards.get(number)
            if shard is None:
                shard = self._shards[number] = GrowingShard(self.layout, number)
            if shard.put(inner, frame, rows):
                self.frame_bytes += len(frame)
            full = shard.full
        if full:
            # Waiting for the commit would hold whole shards in memory; the file is invisible until then.
            self._early.append(self._disk.submit(self._flush_full, shard))
            if len(self._early) > _AHEAD:
                # The disk is slower than the encoders: they wait, and whoever appends waits for them.
                self._early.popleft().exception()

    def _flush_full(self, shard: GrowingShard) -> None:
        try:
            with self._flushing:
                self._write(shard)
        except BaseException:
            self._on_failure()
            raise

    # -- frames to files -------------------------------------------------------------------------------------------

    def flush(self, end: int) -> None:
        """Write all frames that wait, make their names durable, and seal each shard that ends at or before row ``end``.

        Raises ``StorageError`` (the frames still wait; call again), ``ConflictError`` if another writer made a shard
        of this array.
        """
        # What was handed to ``disk`` early is not waited for: it may stand in a queue behind this very call. It writes
        # what it finds to write; a write that failed there is tried again here, and raises here.
        with self._flushing:
            for shard in list(self._shards.values()):
                self._write(shard)
            if self._new_names:
                self.storage.sync_folder(self.layout.path)
                self._new_names = False
            with self._guard:
                for number in sorted(self._shards):
                    shard = self._shards[number]
                    if (number + 1) * self.layout.shard_rows <= end and not shard.waiting:
                        self._sealed.append(_as_shard(shard))
                        del self._shards[number]

    def _write(self, shard: GrowingShard) -> None:
        with self._guard:
            if not shard.waiting:
                return
            pieces, taken = shard.next_version()
        storage, key = self.storage, self.layout.shard_key(shard.number)
        name = temporary(self.layout.path, f"{self._token}.{next(self._names)}")
        length = shard.length + sum(map(len, pieces))
        storage.write(name, pieces, base=(key, shard.length) if shard.length else None)
        try:
            if shard.length:
                storage.rename(name, key)
            else:
                storage.link(name, key)
                storage.remove(name)
        except AlreadyExistsError as error:
            storage.remove(name)
            raise _made_by_another(storage.describe(key)) from error
        except StorageError:
            self._settle(key, name, shard.length, pieces)
        with self._guard:
            self.copied_bytes += shard.length
            self.written_bytes += length
            shard.advance(pieces, taken)
            self._new_names = True

    def _settle(self, key: str, name: str, before: int, pieces: list[bytes]) -> None:
        """After a rename or link that failed: go on if it happened all the same, raise again if it did not."""
        present = self.storage.size(key)
        try:
            self.storage.remove(name)
        except StorageError:
            pass  # whoever opens the store next removes it
        if present == (before or None):
            raise
        added = b"".join(pieces)
        if present == before + len(added) and self.storage.read(key, before) == added:
            return
        if not before:
            raise _made_by_another(self.storage.describe(key)) from None
        raise StateError(
            f"{self.storage.describe(key)} is neither what this writer left there nor what it was to become",
            hint="close this writer and reopen the store with resume=True",
        )

    # -- what a commit asks ----------------------------------------------------------------------------------------

    def tail(self, end: int) -> Shard | None:
        """The unsealed shard that holds the last row before ``end``, as its file is now."""
        with self._guard:
            shard = self._shards.get((end - 1) // self.layout.shard_rows)
        return _as_shard(shard) if shard is not None and shard.length else None

    def take_sealed(self) -> list[Shard]:
        """The shards sealed since the last call."""
        with self._guard:
            taken, self._sealed = self._sealed, []
        return taken

    def give_back(self, sealed: list[Shard]) -> None:
        """Undo ``take_sealed``, for a commit that failed."""
        with self._guard:
            self._sealed = sealed + self._sealed

    def held(self, chunk: int) -> int:
        """Rows of a chunk that this session's unsealed shards hold; all of them where they know nothing of it."""
        number, inner = divmod(chunk, self.layout.chunks_per_shard)
        with self._guard:
            shard = self._shards.get(number)
            return self.layout.chunk_rows if shard is None else shard.held(inner)

    @property
    def tail_bytes(self) -> tuple[int, int]:
        """Live and dead bytes of the shards that are not sealed."""
        with self._guard:
            shards = list(self._shards.values())
        dead = sum(shard.garbage for shard in shards)
        return sum(shard.length for shard in shards) - dead, dead

    def make_folder(self) -> None:
        """Make the array's folder, if it is not there. Its name is durable once the commit has synced the parents."""
        try:
            self.storage.make_folder(self.layout.path)
        except AlreadyExistsError:
            pass

    def existing_shards(self) -> int:
        """One more than the highest shard number in the folder, whoever made it; removes what dead writers left."""
        highest = -1
        for name in self.storage.list(self.layout.path):
            number = self.layout.shard_number(name)
            if number is not None:
                highest = max(highest, number)
            elif is_temporary(name):
                self.storage.remove(f"{self.layout.path}/{name}")
        return highest + 1


def _as_shard(shard: GrowingShard) -> Shard:
    return Shard(shard.number, shard.length, shard.crc)


def _made_by_another(place: str) -> ConflictError:
    return ConflictError(
        f"another writer has made {place}", hint="reopen with resume=True to go on after what it wrote"
    )
