"""Checkpoints of a training run: saved in the background, kept by rule, restored from the newest that is whole."""

from __future__ import annotations

import atexit
import threading
import time
import uuid
import warnings
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trajstore.checkpoint import tensors
from trajstore.checkpoint.arena import Arena, Plan, Staging, plan
from trajstore.checkpoint.chunks import Pool
from trajstore.checkpoint.folder import read_rules, write_rules
from trajstore.checkpoint.interrupt import Signals
from trajstore.checkpoint.reading import Reader, verify_checkpoint
from trajstore.checkpoint.record import Record
from trajstore.checkpoint.restoring import check_into, put_into
from trajstore.checkpoint.retention import Best, Retention, select
from trajstore.checkpoint.rng import rng_state, set_rng_state
from trajstore.checkpoint.saving import Before, strip_checkpoint, structure_bytes, write_checkpoint
from trajstore.checkpoint.shelf import HISTORY, LOCK, Checkpoint, Shelf, age
from trajstore.checkpoint.tree import Extent, Flattening
from trajstore.errors import (
    CorruptionError,
    FormatError,
    NotFoundError,
    SchemaError,
    StateError,
    StorageError,
    TrajstoreError,
)
from trajstore.format.layout import PRIVATE
from trajstore.media.history import History, plain
from trajstore.media.publish import ensure_folder, recover
from trajstore.media.storage import LocalStorage, Lock, Storage
from trajstore.versions import library_versions, version_hint

Which = int | str | None
List = list  # the class has a method of that name


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint that does not verify was stepped over."""


@dataclass(frozen=True)
class Restored:
    """What :meth:`Checkpoints.restore` found: the checkpoint, and its whole state as it was saved."""

    checkpoint: Checkpoint
    state: Any

    @property
    def step(self) -> int:
        return self.checkpoint.step

    @property
    def metrics(self) -> dict[str, Any]:
        return self.checkpoint.metrics

    @property
    def meta(self) -> dict[str, Any]:
        return self.checkpoint.meta


@dataclass
class _Job:
    """A state that lies in an arena, or soon will, and what is to be written of it."""

    step: int
    node: Any
    rng: Any
    extents: list[Extent]
    layout: Plan
    arena: Arena
    staging: Staging
    record: Record
    abandoned: int | None
    resumed: int | None


@dataclass
class _Stats:
    saved: int = 0
    skipped: int = 0
    failed: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    linked_bytes: int = 0
    held_seconds: float = 0.0
    persist_seconds: float = 0.0
    last: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """A folder of checkpoints that one process writes and any number reads.

    Parameters
    ----------
    path : the folder, made if it is not there (or a storage).
    keep_last : the newest so many stay; ``None`` for no such rule.
    keep_best : (metric, ``"max"`` or ``"min"``, n), or several: the n best by a metric stay. Nested metrics are
        ``"eval/return"``. NaN is worse than any number.
    keep_every : the first checkpoint at or after each multiple of so many steps stays.
    milestone : what a checkpoint that only ``keep_every`` keeps retains: ``"full"``, or one section (``"model"``),
        or several.
    on_busy : when both arenas are taken, ``"wait"`` for one or ``"skip"`` the save (counted in :attr:`stats`).
    on_signal : at SIGTERM and SIGINT ``"drain"`` (finish what was given to :meth:`save`, mark the newest interrupted,
        then let the process end as it would), ``"flag"`` (only set :attr:`interrupted`, for a loop that wants to save
        once more; a second signal drains), or ``"ignore"``.
    rng : save the states of the global random number generators with each checkpoint.
    link : write a chunk that did not change since the checkpoint before as a hard link to it.
    threads : that compress and write.
    read_only : take no lock and write nothing; many may read while one writes.

    With no rule at all (``keep_last=None``) everything stays. The newest is never deleted.

    Raises
    ------
    LockedError : another process writes here.

    Notes
    -----
    To be used by one thread. A forked child may not use it. A process that is killed leaves its checkpoints as of the
    last one whose save was done; :meth:`wait` says when that is.
    """

    def __init__(
        self,
        path: Any,
        keep_last: int | None = 3,
        keep_best: Best | Sequence[Best] = (),
        keep_every: int | None = None,
        milestone: str | Sequence[str] = "full",
        *,
        on_busy: str = "wait",
        on_signal: str = "drain",
        rng: bool = True,
        link: bool = True,
        threads: int = 2,
        read_only: bool = False,
    ) -> None:
        if on_busy not in ("wait", "skip"):
            raise SchemaError(f"on_busy is {on_busy!r}", hint='"wait" or "skip"')
        self._rules = Retention(keep_last=keep_last, keep_best=keep_best, keep_every=keep_every)
        sections = (milestone,) if isinstance(milestone, str) else tuple(milestone)
        self._milestone = frozenset() if sections == ("full",) else frozenset(sections)
        self._storage: Storage = path if hasattr(path, "sync_folder") else LocalStorage(path)
        self._shelf = Shelf(self._storage)
        self._history = History(self._storage, HISTORY)
        self._on_busy = on_busy
        self._with_rng = rng
        self._link = link
        self._read_only = read_only
        self._pool = Pool(max(threads, 1))
        self._stats = _Stats()
        self._state = threading.Condition(threading.RLock())
        self._queue: deque[_Job] = deque()
        self._free = deque([Arena(), Arena()])
        self._working = False
        self._error: tuple[int, BaseException] | None = None
        self._closed = False
        self._lock: Lock | None = None
        self._thread: threading.Thread | None = None
        self._signals = Signals("ignore" if read_only else on_signal)
        self._optimizers: list[tuple[Any, Any]] = []
        self._owned: tuple[int, frozenset[int], Any] = (-1, frozenset(), None)
        self._unstaged: deque[Staging] = deque()
        self._layout: tuple[Any, Plan] = (None, Plan((), (), (), 0))
        self._parent: str | None = None
        self._before: Before | None = None
        self._abandoned: int | None = None
        self._resumed: int | None = None
        self._serial = 0
        if read_only:
            self._rules = read_rules(self._storage)  # they say what is best
        else:
            self._claim()

    def _claim(self) -> None:
        ensure_folder(self._storage, "")
        ensure_folder(self._storage, PRIVATE)
        self._lock = self._storage.lock(LOCK)
        recover(self._storage)
        records = self._shelf.records()
        for name, record in records.items():  # the newest comes last
            self._serial, self._parent = record.serial, record.uuid
            self._before = (name, record)
        write_rules(self._storage, self._rules)
        self._thread = threading.Thread(target=_work, args=(weakref.ref(self), self._state), daemon=True)
        self._thread.start()
        self._signals.install(self._on_signal)
        _open.add(self)

    # --- saving -------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, Any] | None = None,
        meta: Mapping[str, Any] | None = None,
        *,
        final: bool = False,
    ) -> bool:
        """Copy a state and write it in the background.

        Parameters
        ----------
        step : counts what the run counts (environment steps, iterations), from 0.
        state : any nesting of dicts, lists and tuples of tensors, arrays, scalars, strings, bytes, :class:`File`;
            objects with a ``state_dict`` stand for it. The keys of its top level are its sections.
        metrics : numbers by name, may be nested; retention and listings use them.
        meta : JSON-like values to keep with it: a cursor into a replay store, a configuration.
        final : mark it as the run's last.

        Returns
        -------
        bool : ``False`` if it was skipped (``on_busy="skip"``). When it returns the state may change.

        Raises
        ------
        SchemaError : the state holds something that a checkpoint does not; names the path to it.
        StorageError, StateError : an earlier save failed.
        """
        start = time.perf_counter()
        self._usable()
        if type(step) is not int:
            step = _whole(step)
        if step < 0:
            raise SchemaError(f"step is {step}: steps count from 0")
        with self._signals.deferred():
            arena = self._take_arena()
            if arena is None:
                self._stats.skipped += 1
                return False
            try:
                job = self._stage(step, state, metrics, meta, final, arena)
            except BaseException:
                with self._state:
                    self._free.append(arena)
                    self._state.notify_all()
                raise
            with self._state:
                self._queue.append(job)
                _busy.add(self)
                self._state.notify_all()
        held = time.perf_counter() - start
        self._stats.held_seconds += held
        self._stats.last["held_seconds"] = held
        return True

    def _take_arena(self) -> Arena | None:
        with self._state:
            if not self._free and self._on_busy == "skip":
                return None
            self._state.wait_for(lambda: self._free)
            self._raise_error()
            return self._free.popleft()

    def _stage(
        self, step: int, state: Any, metrics: Mapping[str, Any] | None, meta: Mapping[str, Any] | None, final: bool,
        arena: Arena,
    ) -> _Job:  # fmt: skip
        flat = Flattening(state)
        rng = flat.add("rng", rng_state()) if self._with_rng else None
        extents = flat.finish()
        key = [(extent.section, extent.dtype, extent.stop - extent.start) for extent in extents]
        if key != self._layout[0]:
            self._layout = (key, plan(extents))
        layout = self._layout[1]
        arena.prepare(layout.size, pinned=_on_cuda(extents))
        staging = Staging(extents, layout, arena, self._owned_storages())
        if self._optimizers:
            self._unstaged.append(staging)
        self._serial += 1
        record = Record(
            step=step,
            serial=self._serial,
            uuid=uuid.uuid4().hex,
            parent=self._parent,
            time=time.time(),
            metrics=plain(metrics or {}),
            meta=dict(meta or {}),
            final=final,
            interrupted=self.interrupted,
        )
        job = _Job(step, flat.node, rng, extents, layout, arena, staging, record, self._abandoned, self._resumed)
        self._parent, self._abandoned, self._resumed = record.uuid, None, None
        return job

    def prepare(self, state: Any) -> None:
        """Make the arenas for states like this one, so that the first saves need not."""
        self._usable()
        flat = Flattening(state)
        if self._with_rng:
            flat.add("rng", rng_state())
        extents = flat.finish()
        size = plan(extents).size
        pinned = _on_cuda(extents)
        with self._state:
            self._state.wait_for(lambda: len(self._free) == 2)
            for arena in self._free:
                arena.prepare(size, pinned=pinned)

    def stage_lazily(self, *optimizers: Any) -> None:
        """Copy what these torch optimizers own after :meth:`save` returns, while the loop goes on.

        Their parameters and states change in ``step()`` alone, so a hook before it waits for the copy; all else is
        copied at once as before. A tensor that something else changes in between is noticed: that save then fails.
        """
        self._usable()
        for optimizer in optimizers:
            hook = optimizer.register_step_pre_hook(lambda *_: self._finish_staging())
            self._optimizers.append((optimizer, hook))
        self._owned = (-1, frozenset(), None)
        if optimizers and len(self._optimizers) == len(optimizers):
            threading.Thread(target=_stage, args=(weakref.ref(self), self._state), daemon=True).start()

    def _owned_storages(self) -> frozenset[int]:
        if not self._optimizers:
            return frozenset()
        count = sum(len(optimizer.state) + len(optimizer.param_groups) for optimizer, _ in self._optimizers)
        if count != self._owned[0]:
            owned = [tensor for optimizer, _ in self._optimizers for tensor in _tensors_of(optimizer)]
            # The tensors are kept, so that no other storage can come to bear the key of one of theirs.
            self._owned = (count, frozenset(map(tensors.storage_key, owned)), owned)
        return self._owned[1]

    def _finish_staging(self) -> None:
        while True:
            with self._state:
                if not self._unstaged:
                    return
                staging = self._unstaged[0]
            staging.finish()
            with self._state:
                if self._unstaged and self._unstaged[0] is staging:
                    self._unstaged.popleft()

    def _persist(self, job: _Job) -> None:
        start = time.perf_counter()
        job.staging.wait()
        structure = structure_bytes(job.node, job.rng, job.extents, job.layout)
        record = Record(**{**job.record.__dict__, "versions": library_versions()})
        name = self._shelf.free_name(job.step)
        before = self._before if self._link else None
        record, linked = write_checkpoint(
            self._storage, name, record, structure, job.layout, job.arena, self._pool, before
        )
        self._before = (name, record)
        if job.resumed is not None:
            self._history.resume(job.resumed)
        self._history.append(job.step, {**record.metrics})
        stats, elapsed = self._stats, time.perf_counter() - start
        stats.saved += 1
        stats.raw_bytes += record.raw_bytes
        stats.stored_bytes += record.stored_bytes - linked
        stats.linked_bytes += linked
        stats.persist_seconds += elapsed
        stats.last.update(
            step=job.step, raw_bytes=record.raw_bytes, stored_bytes=record.stored_bytes - linked,
            linked_bytes=linked, persist_seconds=elapsed,
        )  # fmt: skip
        try:
            if job.abandoned is not None:
                self._prune_abandoned(job.abandoned, record.serial)
            self._retain(name)
        except TrajstoreError as error:
            error._trajstore_published = True  # type: ignore[attr-defined]  # it is there: say so
            raise

    def _prune_abandoned(self, after: int, before: int) -> None:
        for checkpoint in self._shelf.checkpoints():
            if after < checkpoint.serial < before and not checkpoint.pinned:
                self._shelf.discard(checkpoint.name)

    def _retain(self, newest: str) -> None:
        if self._rules.keeps_all:
            return
        candidates = self._shelf.candidates()
        kept = select(candidates, self._rules, newest_valid=newest)
        for candidate in candidates:
            reasons = kept.get(candidate.name)
            if reasons is None:
                self._shelf.discard(candidate.name)
            elif reasons == ["every"] and self._milestone:
                self._strip(candidate.name)

    def _strip(self, name: str) -> None:
        """Drop all but the milestone's sections: the smaller one appears, then the whole one goes."""
        record = self._shelf.record(name)
        if record.stripped or not self._milestone & set(record.sections):
            return
        target = f"{name}.milestone"
        if target not in self._shelf.names():
            strip_checkpoint(self._storage, name, target, record, self._milestone, self._pool)
        mark = self._shelf.mark(name)
        if mark:
            self._shelf.set_mark(target, **mark)
        self._shelf.discard(name)

    # --- reading ------------------------------------------------------------------------------

    def list(self) -> List[Checkpoint]:
        """All checkpoints, in the order of saving."""
        return self._shelf.checkpoints()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, or ``None``."""
        found = self._shelf.checkpoints()
        return found[-1] if found else None

    def best(self, metric: str | None = None, mode: str = "max") -> Checkpoint | None:
        """The best checkpoint by a metric (by the first ``keep_best`` rule if none is named), or ``None``."""
        try:
            return self._shelf.find("best", self._best_rule(metric, mode))
        except NotFoundError:
            return None

    def history(self, *, abandoned: bool = False) -> List[dict[str, Any]]:
        """``[{"step", "time", "metrics"}]`` of all saves of this run, also of checkpoints that are gone.

        Steps that a resume at an older step abandoned are left out unless ``abandoned``.
        """
        return self._history.read(abandoned=abandoned)

    def restore(
        self,
        into: Any = None,
        step: Which = None,
        *,
        rng: bool = True,
        abandoned: str = "keep",
        best: tuple[str, str] | None = None,
    ) -> Restored:
        """Load a checkpoint, and put it into what is given.

        Parameters
        ----------
        into : like the state that was saved, or some of its keys: modules and optimizers (``load_state_dict``),
            tensors and arrays (changed in place), containers of those. Nothing of it is touched before the whole
            checkpoint is read and verified, and found to fit. ``None``: only return the state.
        step : a step, a checkpoint's name, ``"best"``, or ``None`` for the newest that verifies: damaged ones are
            stepped over with a warning.
        rng : with ``into``, also set the global random number generators as they were.
        abandoned : what becomes of checkpoints newer than the one restored, once the next save is done: ``"keep"``
            (they stay, subject to the rules) or ``"prune"``.
        best : (metric, mode) for ``step="best"``; by default the first ``keep_best`` rule's.

        Raises
        ------
        NotFoundError : there is no such checkpoint, or it lacks a key of ``into``.
        CorruptionError : the one asked for is damaged, or all are.
        StateError : something in ``into`` did not take its part; names the library versions of then and now.
        """
        if abandoned not in ("keep", "prune"):
            raise SchemaError(f"abandoned is {abandoned!r}", hint='"keep" or "prune"')
        self._settle()
        checkpoint, reader, state = self._read(step, into, best)
        generators = reader.rng_state() if rng and into is not None else None
        if into is not None:
            check_into(into, state)
            try:
                put_into(into, state)
            except TrajstoreError:
                raise
            except Exception as error:
                raise StateError(
                    f"{checkpoint.path} does not fit: {error}", hint=version_hint(checkpoint.versions)
                ) from error
            if generators is not None:
                set_rng_state(generators)
        if not self._read_only:
            record = self._shelf.record(checkpoint.name)
            self._parent = record.uuid
            self._resumed = checkpoint.step
            self._abandoned = record.serial if abandoned == "prune" else None
        return Restored(checkpoint, state)

    def load(self, step: Which, section: str | Sequence[Any] = (), *, best: tuple[str, str] | None = None) -> Any:
        """A part of a checkpoint: a section, or deeper (``"model/conv.weight"``, ``("optimizer", "state", 0)``).

        Reads no more than the chunks that it lies in. ``step`` as in :meth:`restore`.
        """
        self._settle()
        path = section.split("/") if isinstance(section, str) else list(section)
        checkpoint = self._shelf.find("latest" if step is None else step, self._best_rule(None, "max", best))
        return self._reader(checkpoint.name).part(path)

    def verify(self, step: Which = None) -> List[tuple[Checkpoint | str, str]]:
        """Check every byte of one checkpoint, or of all.

        Returns ``[(checkpoint, what is wrong)]``, empty if all is well; a checkpoint whose record cannot be read is
        given by name.
        """
        self._settle()
        names = self._shelf.names() if step is None else [self._shelf.find(step, self._best_rule(None, "max")).name]
        marks, problems = self._shelf.marks(), []
        for name in sorted(names):
            who: Checkpoint | str = name
            try:
                record = self._shelf.record(name)
                who = self._shelf.describe(name, record, marks.get(name, {}))
                verify_checkpoint(self._storage.child(name), record, self._pool)
            except TrajstoreError as error:
                problems.append((who, str(error)))
        return problems

    def _read(self, step: Which, into: Any, best: tuple[str, str] | None) -> tuple[Checkpoint, Reader, Any]:
        if step is not None:
            checkpoint = self._shelf.find(step, self._best_rule(None, "max", best))
            reader = self._reader(checkpoint.name)
            return checkpoint, reader, reader.state()
        tried = []
        for name in self._newest_first():
            try:
                record = self._shelf.record(name)
                if record.stripped and into is not None:
                    continue  # a milestone cannot be trained on
                reader = self._reader(name)
                state = reader.state()
            except (CorruptionError, FormatError, NotFoundError) as error:
                tried.append(name)
                warnings.warn(f"stepping over {name}: {error}", DamagedCheckpointWarning, stacklevel=3)
                continue
            return self._shelf.describe(name, record, self._shelf.mark(name)), reader, state
        if tried:
            raise CorruptionError(f"none of the {len(tried)} checkpoints in {self._storage.describe()} verifies")
        raise NotFoundError(f"there is no checkpoint in {self._storage.describe()}")

    def _settle(self) -> None:
        if self._lock is not None and not self._closed:
            self.wait()

    def _newest_first(self) -> List[str]:
        """The names by age; one whose record is damaged stands where its step would."""
        readable = self._shelf.records()
        newest = list(reversed(readable))
        for name in sorted(set(self._shelf.names()) - readable.keys(), key=age, reverse=True):
            newest.insert(next((i for i, other in enumerate(newest) if age(other) < age(name)), len(newest)), name)
        return newest

    def _reader(self, name: str) -> Reader:
        return Reader(self._storage.child(name), self._shelf.record(name), self._pool)

    def _best_rule(self, metric: str | None, mode: str, given: tuple[str, str] | None = None) -> tuple[str, str] | None:
        if given is not None:
            return given
        if metric is not None:
            return metric, mode
        rules = self._rules.best_rules
        return (rules[0][0], rules[0][1]) if rules else None

    # --- the background -----------------------------------------------------------------------

    def wait(self) -> None:
        """Until all that was given to :meth:`save` is durable. Raises what went wrong with any of it."""
        self._finish_staging()
        with self._state:
            self._state.wait_for(lambda: not self._queue and not self._working)
        self._raise_error()

    @property
    def interrupted(self) -> bool:
        """Whether SIGTERM or SIGINT came (``on_signal="flag"``): time to save and stop."""
        return self._signals.received

    @property
    def stats(self) -> dict[str, Any]:
        """Counts and sums over this session.

        saved, skipped, failed; raw_bytes before compression; stored_bytes written; linked_bytes that were not,
        because nothing had changed; held_seconds that :meth:`save` kept the caller; persist_seconds in the
        background; ``last``: the same of the last save.
        """
        stats = dict(self._stats.__dict__)
        stats["last"] = dict(stats["last"])
        with self._state:
            stats["pending"] = len(self._queue) + self._working
        return stats

    def close(self) -> None:
        """Finish what was given to :meth:`save` and let go of the folder. Raises what went wrong."""
        if self._closed or self._forked():
            return
        try:
            if self._lock is not None:
                self.wait()
        finally:
            self._closed = True
            _open.discard(self)
            self._signals.restore()
            for _, hook in self._optimizers:
                hook.remove()
            with self._state:
                self._state.notify_all()
            if self._thread is not None:
                self._thread.join()
            self._pool.close()
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except TrajstoreError:
            if error is None:
                raise
            # The error that is on its way tells more than this one.

    def _usable(self) -> None:
        if self._closed:
            raise StateError("these checkpoints are closed", hint="open them again")
        if self._read_only:
            raise StateError("these checkpoints were opened read_only", hint="open them without it to save")
        if self._forked():
            raise StateError(
                "a forked process cannot use its parent's checkpoints", hint="open them in the process that saves"
            )
        self._raise_error()

    def _forked(self) -> bool:
        """Whether this is a copy in a forked child: its background thread stayed in the parent."""
        return self._thread is not None and not self._thread.is_alive()

    def _raise_error(self) -> None:
        with self._state:
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

    def _on_signal(self) -> None:
        """Drain, and mark the newest checkpoint."""
        self._finish_staging()
        with self._state:
            self._state.wait_for(lambda: not self._queue and not self._working)
        latest = self.latest()
        if latest is not None and self._stats.saved:
            self._shelf.set_mark(latest.name, interrupted=True)


def _work(reference: weakref.ref[Checkpoints], state: threading.Condition) -> None:
    """The background thread: it keeps its owner alive only while there is something to write."""
    while True:
        with state:
            owner = reference()
            if owner is None or (owner._closed and not owner._queue):
                return
            if not owner._queue:
                del owner
                state.wait(1.0)
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
        with state:
            owner._working = False
            owner._free.append(arena)
            if not owner._queue:
                _busy.discard(owner)
            if error is not None:
                owner._stats.failed += 1
                owner._error = owner._error or (step, error)
            state.notify_all()
        del owner, arena, error


def _stage(reference: weakref.ref[Checkpoints], state: threading.Condition) -> None:
    """The thread that copies lazily staged tensors as soon as it can."""
    while True:
        owner = reference()
        if owner is None or owner._closed:
            return
        owner._finish_staging()
        with state:
            if not owner._unstaged:
                del owner
                state.wait(1.0)


def _tensors_of(optimizer: Any) -> List[Any]:
    found = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for values in optimizer.state.values():
        found += [value for value in values.values() if tensors.is_tensor(value)]
    return found


def _on_cuda(extents: list[Extent]) -> bool:
    return any(extent.storage and not extent.address and extent.source.is_cuda for extent in extents)


def _whole(step: Any) -> int:
    try:
        if int(step) == step and not isinstance(step, bool):
            return int(step)
    except (TypeError, ValueError):
        pass
    raise SchemaError(f"step is {step!r}", hint="a whole number")


_open: weakref.WeakSet[Checkpoints] = weakref.WeakSet()
_busy: set[Checkpoints] = set()  # what has something to write is not forgotten, also if nobody holds it


@atexit.register
def _drain() -> None:
    for checkpoints in list(_open):
        checkpoints.close()
