"""The writing side of a folder of checkpoints: copies of states, a queue of them, and the thread that writes it."""

from __future__ import annotations

import atexit
import os
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trajstore.checkpoint.arena import Arena, Planner, plan
from trajstore.checkpoint.chunks import Pool
from trajstore.checkpoint.folder import write_rules
from trajstore.checkpoint.freezing import Frozen
from trajstore.checkpoint.interrupt import Signals
from trajstore.checkpoint.keeping import Keeper
from trajstore.checkpoint.record import Record
from trajstore.checkpoint.retention import Retention
from trajstore.checkpoint.rng import draw, rng_state
from trajstore.checkpoint.saving import Before, structure_bytes, write_checkpoint
from trajstore.checkpoint.shelf import LOCK, Shelf
from trajstore.checkpoint.staging import Optimizers, Staging, on_cuda
from trajstore.checkpoint.tensors import Snapshots
from trajstore.checkpoint.tree import Flattening
from trajstore.errors import SchemaError, StateError, StorageError, TrajstoreError
from trajstore.format.layout import PRIVATE
from trajstore.media.history import History, plain
from trajstore.media.publish import ensure_folder, recover
from trajstore.versions import library_versions


@dataclass
class Options:
    """How to save; see ``Checkpoints``."""

    on_busy: str = "wait"
    on_signal: str = "drain"
    rng: bool = True
    link: bool = True
    threads: int = 1
    milestone: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Branch:
    """Where a run goes on from, for its next save: the checkpoint restored, and whether what is newer shall go."""

    step: int
    serial: int
    uuid: str
    prune: bool


@dataclass
class _Job:
    """A state that lies in an arena, or soon will, and what is to be said of it."""

    facts: dict[str, Any]
    staging: Staging
    arena: Arena
    branch: Branch | None

    @property
    def step(self) -> int:
        return int(self.facts["step"])


@dataclass
class Stats:
    """Counts and sums over a session; see ``Checkpoints.stats``."""

    saved: int = 0
    skipped: int = 0
    failed: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    linked_bytes: int = 0
    held_seconds: float = 0.0
    persist_seconds: float = 0.0
    last: dict[str, Any] = field(default_factory=dict)


class Saver:
    """Whoever has one may write the folder, and nobody else.

    It lives until everything that it was given is written, also if nobody holds it. To be used by one thread.

    Raises
    ------
    LockedError : another process writes here.
    """

    def __init__(self, shelf: Shelf, history: History, rules: Retention, options: Options) -> None:
        if options.on_busy not in ("wait", "skip"):
            raise SchemaError(f"on_busy is {options.on_busy!r}", hint='"wait" or "skip"')
        self._storage = shelf.storage
        self._shelf = shelf
        self._history = history
        self._options = options
        self._changed = threading.Condition(threading.RLock())  # of what the thread that writes has in common with us
        self._queue: deque[_Job] = deque()
        self._free = deque([Arena(), Arena()])
        self._working = False
        self._error: tuple[int, BaseException] | None = None
        self._stats = Stats()
        self._planner = Planner()
        self._snapshots = Snapshots()
        self._branch: Branch | None = None
        self._closed = False
        self._process = os.getpid()
        self._signals = Signals(options.on_signal)
        self._optimizers = Optimizers(self._signals.deferred, self._snapshots)

        ensure_folder(self._storage, "")
        ensure_folder(self._storage, PRIVATE)
        self._lock = self._storage.lock(LOCK)
        recover(self._storage)
        self._newest: Before | None = None
        for name, record in shelf.records().items():  # the newest comes last
            self._newest = (name, record)
        self._serial = self._newest[1].serial if self._newest else 0
        write_rules(self._storage, rules)
        self._pool = Pool(options.threads)
        self._keeper = Keeper(shelf, rules, options.milestone, self._pool)
        self._thread = threading.Thread(target=_work, args=(weakref.ref(self), self._changed), daemon=True)
        self._thread.start()
        self._signals.install(self._drain)
        _open.add(self)

    # --- in the loop --------------------------------------------------------------------------

    def save(
        self, step: Any, state: Any, metrics: Mapping[str, Any] | None, meta: Mapping[str, Any] | None, final: bool
    ) -> bool:
        """Copy a state and queue it; ``False`` if it was skipped. See ``Checkpoints.save``."""
        start = time.perf_counter()
        self.check()
        facts = {"step": _whole(step), "metrics": plain(metrics or {}), "meta": dict(meta or {}), "final": final,
                 "interrupted": self.interrupted, "time": time.time()}  # fmt: skip
        with self._signals.deferred():
            arena = self._take_arena()
            if arena is None:
                self._stats.skipped += 1
                return False
            try:
                job = self._stage(facts, state, arena)
            except BaseException:
                with self._changed:
                    self._free.append(arena)
                    self._changed.notify_all()
                raise
            self._branch = None
            with self._changed:
                self._queue.append(job)
                _busy.add(self)
                self._changed.notify_all()
        held = time.perf_counter() - start
        with self._changed:
            self._stats.held_seconds += held
            self._stats.last["held_seconds"] = held
        return True

    def _take_arena(self) -> Arena | None:
        with self._changed:
            if not self._free and self._options.on_busy == "skip":
                return None
            self._changed.wait_for(lambda: self._free)
            self._raise_error()
            return self._free.popleft()

    def _stage(self, facts: dict[str, Any], state: Any, arena: Arena) -> _Job:
        rng = draw() if self._options.rng else None
        frozen = self._optimizers.freeze(state)
        staging = Staging(frozen or Frozen(state), rng, arena, self._planner, self._snapshots)
        if frozen is not None:
            self._optimizers.due(staging)
        else:
            staging.finish()
            staging.check()
        return _Job(facts, staging, arena, self._branch)

    def prepare(self, state: Any) -> None:
        """Make the arenas for states like this one."""
        self.check()
        flat = Flattening(state)
        if self._options.rng:
            flat.add("rng", rng_state())
        extents = flat.finish()
        size, pinned = plan(extents).size, on_cuda(extents)
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) == 2)
            for arena in self._free:
                arena.prepare(size, pinned=pinned)

    def stage_lazily(self, *optimizers: Any) -> None:
        """Copy what these own after :meth:`save` has returned. See ``Checkpoints.stage_lazily``."""
        self.check()
        for optimizer in optimizers:
            self._optimizers.add(optimizer)

    def go_on_from(self, branch: Branch) -> None:
        """Say that the next save continues an older checkpoint."""
        self._branch = branch

    def wait(self) -> None:
        """Until all that was given to :meth:`save` is durable. Raises what went wrong with any of it."""
        self._settle()
        self._raise_error()

    def close(self) -> None:
        """Write what is left and let go of the folder. Raises what went wrong."""
        if self._closed or self._forked():
            return
        try:
            self.wait()
        finally:
            self._closed = True
            _open.discard(self)
            self._signals.restore()
            self._optimizers.close()
            with self._changed:
                self._changed.notify_all()
            self._thread.join()
            self._pool.close()
            self._lock.release()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def interrupted(self) -> bool:
        return self._signals.received

    @property
    def stats(self) -> dict[str, Any]:
        with self._changed:
            return {**asdict(self._stats), "pending": len(self._queue) + self._working}

    def check(self) -> None:
        """Raise what went wrong since the last call, and ``StateError`` where nothing can be saved."""
        if self._closed:
            raise StateError("these checkpoints are closed", hint="open them again")
        if self._forked():
            raise StateError(
                "a forked process cannot use its parent's checkpoints", hint="open them in the process that saves"
            )
        self._raise_error()

    def _forked(self) -> bool:
        """Whether this is a copy in a forked child: its thread stayed in the parent."""
        return os.getpid() != self._process

    def _raise_error(self) -> None:
        with self._changed:
            failed, self._error = self._error, None
        if failed is None:
            return
        step, error = failed
        published = getattr(error, "_trajstore_published", False)
        what = "was saved, but the clean-up after it failed" if published else "was not saved"
        message, hint = f"the checkpoint of step {step} {what}: {error}", getattr(error, "hint", "")
        if isinstance(error, StorageError):
            raise StorageError(message, errno=error.errno) from error
        raise StateError(message, hint="" if hint and hint in message else hint) from error

    def _settle(self) -> None:
        self._optimizers.finish_in_loop()
        with self._changed:
            self._changed.wait_for(lambda: not self._queue and not self._working)

    def _drain(self) -> None:
        """At a signal: finish, and mark the newest checkpoint."""
        self._settle()
        names = list(self._shelf.records())
        if names and self._stats.saved:
            self._shelf.set_mark(names[-1], interrupted=True)

    # --- in the background --------------------------------------------------------------------

    def _persist(self, job: _Job) -> None:
        start = time.perf_counter()
        staging = job.staging
        staging.wait()
        record = self._record(job)
        structure = structure_bytes(staging.node, staging.rng, staging.extents, staging.layout)
        name = self._shelf.free_name(job.step)
        before = self._newest if self._options.link else None
        record, linked = write_checkpoint(
            self._storage, name, record, structure, staging.layout, job.arena, self._pool, before
        )
        self._newest = (name, record)
        if job.branch is not None:
            self._history.resume(job.branch.step)
        self._history.append(job.step, {**record.metrics})
        self._count(record, linked, time.perf_counter() - start)
        try:
            if job.branch is not None and job.branch.prune:
                self._keeper.drop_branch(job.branch.serial, record.serial)
            self._keeper.apply(name)
        except TrajstoreError as error:
            error._trajstore_published = True  # type: ignore[attr-defined]  # it is there: say so
            raise

    def _record(self, job: _Job) -> Record:
        parent = job.branch or (self._newest and self._newest[1])
        self._serial += 1  # also where this save fails: it may have got its name and failed after that
        return Record(
            **job.facts,
            serial=self._serial,
            uuid=uuid.uuid4().hex,
            parent=parent.uuid if parent else None,
            versions=library_versions(),
        )

    def _count(self, record: Record, linked: int, seconds: float) -> None:
        raw, stored = record.raw_bytes, record.stored_bytes - linked
        stats = self._stats
        with self._changed:
            stats.saved += 1
            stats.raw_bytes += raw
            stats.stored_bytes += stored
            stats.linked_bytes += linked
            stats.persist_seconds += seconds
            stats.last.update(
                step=record.step, raw_bytes=raw, stored_bytes=stored, linked_bytes=linked, persist_seconds=seconds
            )


def _work(reference: weakref.ref[Saver], changed: threading.Condition) -> None:
    """The thread that writes: it keeps its owner alive only while there is something to write."""
    while True:
        with changed:
            owner = reference()
            if owner is None or (owner._closed and not owner._queue):
                return
            if not owner._queue:
                del owner
                changed.wait(1.0)
                continue
            job = owner._queue.popleft()
            owner._working = True
        error: BaseException | None = None
        try:
            owner._persist(job)
        except BaseException as caught:  # raised at the caller's next call
            error = caught
        arena = job.arena
        step = job.step
        del job
        with changed:
            owner._working = False
            owner._free.append(arena)
            if not owner._queue:
                _busy.discard(owner)
            if error is not None:
                owner._stats.failed += 1
                owner._error = owner._error or (step, error)
            changed.notify_all()
        del owner, arena, error


def _whole(step: Any) -> int:
    try:
        whole = None if isinstance(step, bool) or int(step) != step else int(step)
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or whole < 0:
        raise SchemaError(f"step is {step!r}", hint="a whole number, 0 or more")
    return whole


_open: weakref.WeakSet[Saver] = weakref.WeakSet()
_busy: set[Saver] = set()  # what has something to write is not forgotten, also if nobody holds it


@atexit.register
def _finish_all() -> None:
    for saver in list(_open):
        saver.close()
