"""The writer: trajectories in; commits by time, bytes, count, call, close, exception and signal."""

from __future__ import annotations

import atexit
import copy
import os
import threading
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from trajstore.engine import device, signals
from trajstore.engine.batch import Batch
from trajstore.engine.commit import Session, make_root_of_parts
from trajstore.engine.episode import Episode
from trajstore.engine.ingest import Ingest
from trajstore.engine.intake import AbsentField, Checker, LateField, extend, flatten, infer
from trajstore.engine.snapshot import Snapshot
from trajstore.engine.staging import Staging
from trajstore.errors import (
    AlreadyExistsError,
    ConflictError,
    NotFoundError,
    QueueFullError,
    SchemaError,
    StateError,
    StorageError,
    TrajstoreError,
)
from trajstore.format import typedjson
from trajstore.format.encoding import DEFAULT_PROFILE, PROFILES
from trajstore.format.intervals import IntervalSet
from trajstore.format.layout import PRIVATE, SCRATCH, Codec, is_temporary
from trajstore.format.manifest import Manifest
from trajstore.format.progress import Progress
from trajstore.format.schema import Clock, Column, Field, Schema, check_name
from trajstore.media.config import compare_config, describe_config, mismatch
from trajstore.media.storage import LocalStorage, Storage

COMMIT_EVERY = 10.0  # seconds
_AMPLIFICATION = 8
_SEED_STOP = 2**63 - 1
_SIGNAL_PATIENCE = 5.0  # seconds for what is being recorded, when a signal ends the process
_PATIENCE = 6  # commit intervals for which the back-off puts a commit off at the most


def create(
    path: str | os.PathLike[str] | Storage,
    *,
    part: str | None = None,
    resume: bool = False,
    force: bool = False,
    config: Mapping[str, Any] | None = None,
    files: Iterable[str | os.PathLike[str]] | None = None,
    target: int | None = None,
    unique: str | None = None,
    fields: Mapping[str, Field] | None = None,
    clocks: Mapping[str, Clock] | None = None,
    columns: Mapping[str, Column] | None = None,
    profile: str | Codec = DEFAULT_PROFILE,
    commit_every: float | None = COMMIT_EVERY,
    commit_trajectories: int | None = None,
    commit_bytes: int | None = None,
    queue_bytes: int = 256 << 20,
    on_full: str = "wait",
    threads: int | None = None,
    handle_signals: bool = True,
) -> Writer:
    """Open a store for writing.

    Parameters
    ----------
    path : folder of the store; it is made.
    part : name of this collector's own store inside ``path``; the parts are read as one dataset.
    resume : go on with the store if there is one. Without it, an existing store is refused.
    config, files : what the collection depends on: any dict that JSON can hold, and files whose contents count.
        A resumed store must have the same, key by key.
    force : resume under another configuration all the same; the change is recorded in the manifest.
    target : number of trajectories wanted in all; it may change from one session to the next.
    unique : name of an integer column (a seed) that no two trajectories may share; ``append`` drops the second one.
    fields, clocks, columns : declarations; what is not declared is taken from the first trajectory.
    profile : ``"fast"``, ``"balanced"``, ``"small"``, or a ``Codec``; for arrays that do not exist yet.
    commit_every : seconds from one commit to the next, ``None`` for no timer. The timer waits longer, up to six
        times, while a commit would write more than eight times the bytes that are new.
    commit_trajectories, commit_bytes : commit also when so many trajectories, or raw bytes, are new.
    queue_bytes : raw bytes that may wait for the encoders.
    on_full : ``"wait"`` for room in the queue, or ``"error"`` to raise ``QueueFullError``.
    threads : encoder threads; by default one for each core.
    handle_signals : commit on SIGINT and SIGTERM, then let them take their course (main thread only).

    Returns
    -------
    Writer
        Use it as a context manager: leaving it commits, also when an exception does.

    Raises
    ------
    AlreadyExistsError
        There is a store, or another folder with something in it.
    LockedError
        Another living process writes to the store.
    ConfigMismatchError
        The store was collected under another configuration.
    FormatError
        The store's manifest cannot be used; it is left as it is.

    Notes
    -----
    A commit makes everything appended so far durable and visible. A kill loses at most what came after the last one,
    and costs nothing else: the next session goes on from there. Commit often where trajectories are dear (call
    ``commit()``, or ``commit_trajectories=1``); a commit costs a flush of the disk and a rewrite of each array's last
    shard, so ten seconds is a good default for cheap ones.
    """
    if on_full not in ("wait", "error"):
        raise SchemaError(f"on_full is 'wait' or 'error', not {on_full!r}")
    storage: Storage = LocalStorage(path) if isinstance(path, (str, os.PathLike)) else path
    root = storage
    if part is not None:
        check_name(part, "part")
        make_root_of_parts(root)
        storage = root.child(part)
    session = _open_session(storage, resume)
    try:
        return Writer(
            session,
            part=None if part is None else (root, part),
            config=describe_config(config, files) if config is not None or files is not None else None,
            force=force,
            target=target,
            unique=unique,
            declared=Schema(dict(fields or {}), _clocks(fields, clocks), dict(columns or {})),
            codec=_codec(profile),
            commit_every=commit_every,
            commit_trajectories=commit_trajectories,
            commit_bytes=commit_bytes,
            queue_bytes=queue_bytes,
            on_full=on_full,
            threads=threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads or 2,
            handle_signals=handle_signals,
        )
    except BaseException:
        session.close()
        raise


def _open_session(storage: Storage, resume: bool) -> Session:
    storage.make_root()
    # A temporary file alone is what a crash leaves of the very first commit.
    present = {name for name in storage.list("") if name != PRIVATE and not is_temporary(name)}
    if present and not resume and storage.size("zarr.json") is not None:
        raise AlreadyExistsError(
            f"{storage.describe()} exists",
            hint="pass resume=True to go on with it, or choose another path",
        )
    if present and storage.size("zarr.json") is None and storage.list(PRIVATE) == []:
        raise AlreadyExistsError(f"{storage.describe()} holds other files", hint="choose a new or an empty folder")
    session = Session(storage)
    try:
        storage.remove(SCRATCH)  # of dead sessions: whoever holds the lock is alone
        session.find_head()
        if session.head is not None and not resume:
            raise AlreadyExistsError(
                f"{storage.describe()} exists", hint="pass resume=True to go on with it, or choose another path"
            )
    except BaseException:
        session.close()
        raise
    return session


def _clocks(fields: Mapping[str, Field] | None, clocks: Mapping[str, Clock] | None) -> dict[str, Clock]:
    """The declared clocks, and those that declared fields merely name."""
    named = {spec.clock: Clock() for spec in (fields or {}).values() if spec.clock is not None}
    if "steps" in named:
        named["steps"] = Clock("main")
    return {**named, **(clocks or {})}


def _codec(profile: str | Codec) -> Codec:
    if isinstance(profile, Codec):
        return profile
    try:
        return PROFILES[profile]
    except KeyError:
        raise SchemaError(f"{profile!r} is no profile", hint="one of " + ", ".join(PROFILES)) from None


def _seed(name: str, flat: Mapping[str, Any]) -> int | None:
    """The seed that a trajectory has in a column; ``None`` where that is no integer."""
    value = flat.get(name)
    if not isinstance(value, int) and getattr(value, "shape", None) == ():
        value = value.item()  # type: ignore[union-attr]  # of NumPy, or a tensor
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    _check_seed(name, value)
    return value


def _check_seed(name: str, value: int) -> None:
    """Raise ``SchemaError``, before anything is stored, for a seed that the sets of seeds cannot hold."""
    if value >= _SEED_STOP:
        raise SchemaError(
            f"column {name!r} is {value}, and seeds lie below 2**63 - 1",
            hint="name the column otherwise",
        )


def _unique_key(name: str, flat: Mapping[str, Any]) -> int:
    key = _seed(name, flat)
    if key is None:
        found = flat.get(name)
        what = "is missing" if found is None else f"is {type(found).__name__}"
        raise SchemaError(f"the column {name!r}, declared unique, {what}", hint="give an integer")
    return key


def _owned(value: Any) -> Any:
    """A value that its caller may change from now on."""
    if device.on_device(value) or isinstance(value, (str, int, float, bool, type(None))):
        return value
    return copy.deepcopy(value.detach() if hasattr(value, "detach") else value)


class _Lock:
    """A re-entrant lock that knows whether the calling thread is inside: holds it, or is about to.

    A signal handler must not wait for its own thread, at no moment of it; what it puts off is sent again on leaving.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depths: dict[int, int] = {}  # by thread, each of which changes its own entry only

    def __enter__(self) -> None:
        me = threading.get_ident()
        self._depths[me] = self._depths.get(me, 0) + 1
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        me = threading.get_ident()
        if self._depths[me] > 1:
            self._depths[me] -= 1
            return
        del self._depths[me]
        if signals.deferred:
            signals.redeliver()

    @property
    def mine(self) -> bool:
        return threading.get_ident() in self._depths

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let others have the lock for a while."""
        depth = self._depths.get(threading.get_ident(), 0)
        for _ in range(depth):
            self._lock.release()
        try:
            yield
        finally:
            for _ in range(depth):
                self._lock.acquire()


def _close(writer: weakref.ref[Writer]) -> None:
    """At the interpreter's end: commit what a writer that nobody closed still holds."""
    found = writer()
    if found is not None:
        found.close()


class Source(Protocol):
    """What fills a writer in the background: it hands over before a commit that is asked for, and before the end."""

    def flush(self, timeout: float | None = None) -> bool: ...
    def close(self) -> None: ...
    def abandon(self) -> None: ...


class Writer:
    """Appends trajectories to one store; made by :func:`create`.

    Attributes
    ----------
    state : dict
        Anything of the caller's (random state, counters) that JSON can hold; each commit stores it with the data.
    target : int or None
        Number of trajectories wanted in all.

    Notes
    -----
    Any thread may append; trajectories are stored in the order in which the calls came. A background failure is raised
    by the next call, and nothing of that call's trajectory is stored; ``commit`` tries again. Not usable in a forked
    child.
    """

    def __init__(
        self,
        session: Session,
        *,
        part: tuple[Storage, str] | None = None,
        config: dict[str, Any] | None,
        force: bool,
        target: int | None,
        unique: str | None,
        declared: Schema,
        codec: Codec,
        commit_every: float | None,
        commit_trajectories: int | None,
        commit_bytes: int | None,
        queue_bytes: int,
        on_full: str,
        threads: int,
        handle_signals: bool,
    ) -> None:
        self._session = session
        self._part = part
        self._commit_times: list[float] = []
        self._sources: list[Source] = []
        self._order = threading.Lock()  # of appends, once some are on their way from a device; taken before the other
        self._staging: Staging | None = None
        self._reserved = -1  # the last id given to a trajectory on its way
        self._lock = _Lock()
        self._committing = _Lock()
        self._pid = os.getpid()
        self._closed = False
        self._closing = False
        self._failure: BaseException | None = None
        self._on_full = on_full
        self._commit_every = commit_every
        self._commit_trajectories = commit_trajectories
        self._commit_bytes = commit_bytes
        self._declared = declared
        self._ingest = Ingest(
            session, codec, threads=threads, queue_bytes=queue_bytes, lock=self._lock, clock=time.monotonic
        )
        self._restore(config, force, target, unique)
        self._checker = self._resumed_checker()
        self._new_bytes = 0
        self._new_trajectories = 0
        self._committed_version: tuple[Any, ...] | None = None
        self._wake = threading.Condition()
        self._wanted = False
        self._commit()
        self._timer = threading.Thread(target=self._keep_time, name="trajstore-commit", daemon=True)
        self._timer.start()
        self._watching = signals.watch(self._on_signal, self._is_mine) if handle_signals else None
        self._at_exit = partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)

    def _restore(self, config: dict[str, Any] | None, force: bool, target: int | None, unique: str | None) -> None:
        head = self._session.head
        now = time.time()
        if head is None:
            self._progress = Progress(target, IntervalSet(), IntervalSet(), {})
            self._deleted = IntervalSet()
            self._config: dict[str, Any] = {**(config or describe_config(None, None)), "forced": []}
            self._unique, self._created, self._attributes = unique, now, {}
        else:
            snapshot = Snapshot(self._session.storage, head)
            stored_target, state = Progress.state_from_json(head.progress)
            self._progress = Progress(
                stored_target if target is None else target, snapshot.set("attempted"), snapshot.set("completed"), state
            )
            self._deleted = snapshot.set("deleted")
            self._unique = unique or head.progress.get("unique")
            self._created, self._attributes = head.created, dict(head.attributes)
            self._config = self._resumed_config(dict(head.config), config, force)
        counts = self._ingest.counts
        self._opened = {
            "started": now,
            "trajectories": counts["trajectories"],
            "steps": counts["steps"],
            "pid": os.getpid(),
        }

    def _resumed_checker(self) -> Checker | None:
        schema = self._ingest.schema
        if not schema.clocks:
            return None
        extended = extend(schema, self._declared, self.path)
        if extended != schema:
            self._ingest.declare(extended)
        return Checker(extended)

    def _resumed_config(self, stored: dict[str, Any], given: dict[str, Any] | None, force: bool) -> dict[str, Any]:
        if given is None:
            return stored
        differences = compare_config(stored, given)
        if not differences:
            return stored
        if not force:
            raise mismatch(differences, self.path)
        record = {"time": time.time(), "differences": {key: list(pair) for key, pair in differences.items()}}
        return {**given, "forced": [*stored.get("forced", []), record]}

    # -- what a user sees ------------------------------------------------------------------------------------------

    @property
    def path(self) -> str:
        return self._session.storage.describe()

    @property
    def schema(self) -> Schema:
        return self._ingest.schema

    @property
    def storage(self) -> Storage:
        """Where the store lies."""
        return self._session.storage

    @property
    def session(self) -> str:
        """The name, unique for ever, of this opening of the store."""
        return self._session.uuid

    @property
    def part(self) -> tuple[Storage, str] | None:
        """The root that this store is a part of, and its name there; ``None`` for a store of its own."""
        return self._part

    def __len__(self) -> int:
        """Number of trajectories, those not committed yet included."""
        return self._ingest.counts["trajectories"]

    @property
    def steps(self) -> int:
        """Number of rows on the main clock, those not committed yet included."""
        return self._ingest.counts["steps"]

    @property
    def state(self) -> dict[str, Any]:
        return self._progress.state

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        self._progress.state = value
        self._progress.version += 1

    @property
    def target(self) -> int | None:
        return self._progress.target

    @target.setter
    def target(self, value: int | None) -> None:
        self._progress.target = value
        self._progress.version += 1

    @property
    def remaining(self) -> int | None:
        """Trajectories still missing to the target; ``None`` without one."""
        return None if self.target is None else max(self.target - len(self), 0)

    @property
    def committed(self) -> int:
        """Number of trajectories in the last commit."""
        head = self._session.head
        return head.counts["trajectories"] if head else 0

    @property
    def head(self) -> Manifest | None:
        """The last commit; what a :class:`Snapshot` needs to read it. ``None`` before the first."""
        return self._session.head

    @property
    def stats(self) -> dict[str, float]:
        """What this session has done so far, and what it cost.

        queue_bytes, queue_peak_bytes : handed to the encoders and not encoded yet. stall_seconds : for which ``append``
        has waited for room. encode_bytes_per_second : raw bytes, one thread. commits, commit_seconds, and of the last
        one, commit_last_seconds. ratio : raw bytes to compressed. frame_bytes : compressed. written_bytes,
        copied_bytes : of shard files, and how much of that was copied from their versions before.
        """
        budget, disk = self._ingest.budget, self._ingest.disk_figures()
        encoded = budget.encoded_bytes
        return {
            "trajectories": len(self) - self._opened["trajectories"],
            "steps": self.steps - self._opened["steps"],
            "queue_bytes": budget.used,
            "queue_peak_bytes": budget.peak,
            "stall_seconds": budget.stalled + (self._staging.stalled if self._staging else 0.0),
            "raw_bytes": encoded,
            "encode_bytes_per_second": encoded / budget.encode_seconds if budget.encode_seconds else 0.0,
            "commits": len(self._commit_times),
            "commit_seconds": sum(self._commit_times),
            "commit_last_seconds": self._commit_times[-1] if self._commit_times else 0.0,
            "ratio": encoded / disk["frame_bytes"] if disk["frame_bytes"] else 1.0,
            **disk,
        }

    def append(self, trajectory: Mapping[str, Any], /, **columns: Any) -> int | None:
        """Append one trajectory and return at once, after one copy of it.

        Parameters
        ----------
        trajectory : dict of arrays, time first, nested as you like: NumPy arrays, torch tensors on any device, lists,
            a str, ``None`` for a field that this trajectory does not have.
        columns : one value for the whole trajectory: an int, float or bool; a str or a dict becomes a field.

        Returns
        -------
        int or None
            Its id; ``None`` if a trajectory with the same value of the ``unique`` column is stored already.

        Raises
        ------
        SchemaError
            It does not fit what is stored; nothing of it was taken.
        QueueFullError
            ``on_full="error"`` and the encoders are behind; nothing of it was taken.
        StorageError, ConflictError, StateError
            A commit failed in the background since the last call, or the writer is closed, forked or fenced.
        """
        if self._closed or self._failure is not None or os.getpid() != self._pid:
            self._refuse()
        with self._lock:
            at_once = self._checker is None or not (self._staging or device.holds(trajectory))
            if at_once:
                if self._checker is None:
                    self._learn(trajectory, columns)
                number = self._append(trajectory, columns)
        if not at_once:
            number = self._stage(trajectory, columns)
        if self._wanted:
            self._after_append()
        return number

    def _stage(self, trajectory: Mapping[str, Any], columns: Mapping[str, Any]) -> int | None:
        """Append a trajectory of device tensors without waiting for them, or another one behind those."""
        with self._order:
            if device.holds(trajectory):
                if self._staging is None:
                    self._staging = Staging(self._append_staged, self._ingest.budget.limit)
                    self._sources.append(self._staging)
                staging = self._staging
                try:
                    with self._lock:
                        found = self._reserve(trajectory, columns)
                    if found is None:
                        return None
                    number, flat, key = found
                    staging.put({path: _owned(value) for path, value in flat.items()}, {}, key)
                    self._reserved = number
                    return number
                except (AbsentField, LateField):
                    pass  # the schema is about to change: wait for the values, this once
            if self._staging is not None:
                self._staging.flush()
            with self._lock:
                return self._append(trajectory, columns)

    def _reserve(
        self, trajectory: Mapping[str, Any], columns: Mapping[str, Any]
    ) -> tuple[int, dict[str, Any], int | None] | None:
        """Check a trajectory by shapes and dtypes alone; its id, its values by path, and its unique key."""
        checker, staging = self._checker, self._staging
        assert checker is not None and staging is not None
        flat = flatten(trajectory, columns, checker.schema)
        _, lengths, _ = checker.rows(
            {path: device.stand_in(value) if device.on_device(value) else value for path, value in flat.items()}
        )
        key = None
        if self._unique is not None:
            key = _unique_key(self._unique, flat)
            if key in self._progress.completed or key in staging.keys:
                return None
        if self._on_full == "error" and not staging.has_room(checker.nbytes(lengths)):
            raise QueueFullError("the copies from the device are behind", hint="append it again later")
        return max(self._ingest.counts["next_id"], self._reserved + 1), flat, key

    def _append_staged(self, trajectory: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
        with self._lock:
            self._append(trajectory, columns)
        if self._wanted:
            self._after_append()

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """The writer's lock, once nothing is on its way from a device."""
        if self._staging is None:
            with self._lock:
                yield
            return
        with self._order:
            self._staging.flush()
            with self._lock:
                yield

    def _append(self, trajectory: Mapping[str, Any], columns: Mapping[str, Any]) -> int | None:
        if self._closing:
            self._refuse()
        checker = self._checker
        assert checker is not None
        flat = flatten(trajectory, columns, checker.schema)
        try:
            arrays, lengths, values = checker.rows(flat)
        except AbsentField as absent:
            self._split(absent.path)
            return self._append(trajectory, columns)
        except LateField as late:
            self._add_late(late.paths, flat)
            return self._append(trajectory, columns)
        seed = _seed("seed", flat) if self._unique is None else _unique_key(self._unique, flat)
        if self._unique is not None and seed is not None and seed in self._progress.completed:
            return None
        amount = checker.nbytes(lengths)
        self._check_room(amount)
        number = self._ingest.append(arrays, lengths, values)
        if seed is not None:
            self._progress.attempt(seed, completed=True)
        self._note(amount, 1)
        return number

    def append_many(
        self, trajectories: Mapping[str, Any], /, *, lengths: Any, **columns: Any
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Append many trajectories, given end to end, at once: no work for each of them, whatever their number.

        Parameters
        ----------
        trajectories : dict of arrays, nested as you like, each with the rows of all trajectories one after the other.
        lengths : int (n,), steps of each; or a dict of such by clock. A field with n rows more than there are steps
            has one after each trajectory's last step (an observation).
        columns : (n,) values each, or one for all. A negative seed stands for none.

        Returns
        -------
        int64 (n,)
            Their ids; -1 for one whose value of the ``unique`` column is stored already.

        Raises what ``append`` raises; of a batch that does not fit nothing is taken.
        """
        if self._closed or self._failure is not None or os.getpid() != self._pid:
            self._refuse()
        with self._settled():
            if self._closing:
                self._refuse()
            known = self._checker.schema if self._checker is not None else self._declared
            batch = Batch(flatten(trajectories, {}, known), lengths, columns)
            if not batch.count:
                return np.empty(0, np.int64)
            if self._checker is None:
                schema = batch.infer(self._declared)
                batch.rows(schema)
                self._ingest.declare(schema)
                self._checker = Checker(schema)
            numbers = self._append_many(batch)
        if self._wanted:
            self._after_append()
        return numbers

    def _append_many(self, batch: Batch) -> np.ndarray[Any, np.dtype[np.int64]]:
        schema = self._ingest.schema
        arrays, lengths, values = batch.rows(schema)
        keys = batch.columns.get(self._unique or "seed")
        if keys is not None and keys.dtype.kind in "iu":
            _check_seed(self._unique or "seed", int(keys.max()))
        elif keys is not None and self._unique is not None:
            raise SchemaError(f"the column {self._unique!r}, declared unique, is {keys.dtype}", hint="give integers")
        numbers = np.full(batch.count, -1, np.int64)
        kept = np.arange(batch.count)
        if self._unique is not None:
            if keys is None:
                raise SchemaError(f"the column {self._unique!r}, declared unique, is missing")
            again = np.ones(batch.count, np.bool_)
            again[np.unique(keys, return_index=True)[1]] = False
            again |= self._progress.completed.freeze().contains(keys)
            again &= keys >= 0
            kept = np.flatnonzero(~again)
            if not len(kept):
                return numbers
            if len(kept) < batch.count:
                batch = batch.without(schema, again)
                arrays, lengths, values = batch.rows(schema)
                keys = keys[kept]
        amount = sum(rows.nbytes for rows in arrays if rows is not None)
        self._check_room(amount)
        first = self._ingest.append_many(arrays, lengths, values, batch.count)
        numbers[kept] = np.arange(first, first + batch.count)
        if keys is not None and keys.dtype.kind in "iu":
            self._progress.attempt(keys[keys >= 0], completed=True)
        self._note(amount, batch.count)
        return numbers

    def episode(self, *, on_error: str = "drop", **columns: Any) -> Episode:
        """A trajectory to be recorded step by step: ``with writer.episode(seed=7) as episode: episode.step(...)``.

        ``on_error`` : what an exception in the block does to it: ``"drop"``, or ``"truncate"`` to keep what there is.
        """
        return Episode(self.append, columns, on_error)

    def _check_room(self, amount: int) -> None:
        if self._on_full == "error" and not self._ingest.budget.has_room(amount):
            raise QueueFullError(
                f"{self._ingest.budget.used} bytes wait for the encoders, and {amount} more do not fit",
                hint="append it again later, or raise queue_bytes",
            )

    def _note(self, amount: int, count: int) -> None:
        """Count what was appended; so much of it, and the committer's thread is woken."""
        self._new_bytes += amount
        self._new_trajectories += count
        if (self._commit_trajectories is not None and self._new_trajectories >= self._commit_trajectories) or (
            self._commit_bytes is not None and self._new_bytes >= self._commit_bytes
        ):
            self._wanted = True

    def _after_append(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _learn(self, trajectory: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
        """Take what the first trajectory shows into the schema."""
        declared = self._declared
        flat = flatten(trajectory, columns, declared)
        schema = infer(flat, set(columns), declared)
        Checker(schema).rows({name: flat.get(name) for name in [*schema.fields, *flat]})
        self._ingest.declare(schema)
        self._checker = Checker(schema)

    def _add_late(self, paths: list[str], flat: Mapping[str, Any]) -> None:
        """Fields that no trajectory had so far get their arrays, each on a clock of its own."""
        schema = self._ingest.schema
        for path in paths:
            declared = {path: self._declared.fields[path]} if path in self._declared.fields else {}
            found = infer({path: flat[path]}, {path}, Schema(declared))
            if path in found.columns:
                raise SchemaError(
                    f"column {path!r} was None until now, and a column has a value for every trajectory",
                    hint=f"resume with columns={{{path!r}: Column({found.columns[path].dtype!r}, default=...)}}",
                )
            spec = found.fields[path]
            spec = replace(spec, clock=self._ingest.free_clock(path), array=self._ingest.free_array(path))
            schema = schema.with_field(path, spec, Clock())
        self._ingest.declare(schema)
        self._checker = Checker(schema)

    def declare(
        self,
        *,
        fields: Mapping[str, Field] | None = None,
        clocks: Mapping[str, Clock] | None = None,
        columns: Mapping[str, Column] | None = None,
    ) -> None:
        """Declare fields, clocks and columns later than ``create`` does, and before a trajectory has them.

        Raises ``SchemaError`` where that contradicts what is stored.
        """
        if self._closed or os.getpid() != self._pid:
            self._refuse()
        new = Schema(dict(fields or {}), _clocks(fields, clocks), dict(columns or {}))
        with self._lock:
            before = self._declared
            if self._checker is not None:
                schema = extend(self._ingest.schema, new, self.path)
                self._ingest.declare(schema)
                self._checker = Checker(schema)
            else:
                extend(before, replace(new, columns={}), self.path)
            self._declared = Schema(
                {**new.fields, **before.fields}, {**new.clocks, **before.clocks}, {**new.columns, **before.columns}
            )

    def split_clock(self, field: str) -> None:
        """Give a field a clock of its own: from now on it may have another number of rows than those it was with.

        Commits first. Raises ``NotFoundError`` for a field that the store does not have.
        """
        if self._closed or self._failure is not None or os.getpid() != self._pid:
            self._refuse()
        with self._lock:
            if field not in self.schema.fields:
                raise NotFoundError(f"{self.path} has no field {field!r}")
            self._split(field)

    def _split(self, path: str) -> None:
        # Commits take the two locks in this order: whoever waited for the first with the second would wait for ever.
        with self._lock.released(), self._committing, self._lock:
            if len(self.schema.on_clock(str(self.schema.fields[path].clock))) > 1:
                self._commit()
                self._ingest.split(path)
                self._checker = Checker(self._ingest.schema)

    def delete(self, ids: int | Iterable[int]) -> None:
        """Take trajectories out of the dataset, by id; the next commit makes it so.

        Their rows stay on disk until the store is compacted, and their seeds count as collected. Deleting one twice
        does nothing. Raises ``NotFoundError`` for an id that no trajectory has.
        """
        if self._closed or self._failure is not None or os.getpid() != self._pid:
            self._refuse()
        wanted = np.atleast_1d(np.asarray(ids if isinstance(ids, (int, np.integer)) else list(ids), np.int64))
        with self._lock:
            self._deleted = self._deleted | IntervalSet.of(self._ingest.rows_of(wanted))
            self._progress.version += 1

    # -- seeds -----------------------------------------------------------------------------------------------------

    def seeds(self, wanted: range) -> Iterator[int]:
        """The seeds of a range that were never attempted, one by one, until the target is reached.

        Going on to the next seed marks the one before as attempted, whether it yielded a trajectory or not, so that
        after a kill no seed is skipped and none is collected twice. A seed whose trajectory was appended with
        ``seed=`` is marked in the same instant as the trajectory is.
        """
        for seed in self._progress.remaining(wanted):
            if self.remaining == 0:
                return
            if seed in self._progress.attempted:
                continue
            yield seed
            self.mark_attempted(seed)

    def remaining_seeds(self, wanted: range, count: int) -> np.ndarray[Any, Any]:
        """The first ``count`` seeds of a range that were never attempted, int64; for collectors that run batches."""
        return self._progress.remaining(wanted).first(count)

    def mark_attempted(self, seeds: int | Iterable[int]) -> None:
        """Mark seeds as tried, also those that yielded nothing; the next commit makes it durable."""
        if self._closed or os.getpid() != self._pid:
            self._refuse()
        with self._lock:
            self._progress.attempt(seeds)

    @property
    def attempted(self) -> IntervalSet:
        return self._progress.attempted.freeze()

    @property
    def completed(self) -> IntervalSet:
        return self._progress.completed.freeze()

    # -- sources ---------------------------------------------------------------------------------------------------

    def attach(self, source: Source) -> None:
        """Have ``source`` hand over what it holds before a commit that is asked for, and before the end."""
        if self._closed or os.getpid() != self._pid:
            self._refuse()
        self._sources.append(source)

    def detach(self, source: Source) -> None:
        self._sources = [held for held in self._sources if held is not source]

    # -- commits ---------------------------------------------------------------------------------------------------

    def commit(self) -> int:
        """Make everything appended so far durable and visible; the number of the commit.

        Raises ``StorageError`` if the disk refused (nothing is lost: call again), ``ConflictError`` if another writer
        took over, ``StateError`` if this writer cannot go on.
        """
        if self._closed or os.getpid() != self._pid:
            self._refuse()
        self._failure = None
        for source in self._sources:
            source.flush()
        self._commit()
        head = self._session.head
        return head.commit.number if head else 0

    def _commit(self) -> None:
        with self._committing:
            with self._lock:
                version = self._version()
                if version == self._committed_version and self._session.head is not None:
                    self._wanted = False
                    return
                cut = self._ingest.cut()
                progress = self._progress
                sets = {
                    "deleted": self._deleted,
                    "attempted": progress.attempted.freeze(),
                    "completed": progress.completed.freeze(),
                }
                extra = {
                    "created": self._created,
                    "config": self._config,
                    "session": self._opened,
                    "progress": {**progress.to_json(), "unique": self._unique},
                    "attributes": self._attributes,
                }
                new_bytes, new_trajectories = self._new_bytes, self._new_trajectories
                self._wanted = False
            begun = time.monotonic()
            try:
                self._ingest.commit(cut, sets, extra)
            except StorageError:
                # A writer that took over removes unfinished files: say that, not that one of them is missing.
                self._session.check()
                raise
            with self._lock:
                self._commit_times.append(time.monotonic() - begun)
                self._committed_version = version
                self._new_bytes -= new_bytes
                self._new_trajectories -= new_trajectories
            try:
                self._session.write_children(due=True)
            except StorageError:
                pass  # they may lag, and the commit is made: nobody must be told that it is not

    def _version(self) -> tuple[Any, ...]:
        ingest = self._ingest
        return (
            ingest.counts["next_id"],
            id(ingest.schema),
            self._progress.version,
            typedjson.dumps(self._progress.state),
        )

    def _keep_time(self) -> None:
        """The committer's thread: commits when asked by ``_wanted``, or when the time has come."""
        last = time.monotonic()
        while True:
            with self._wake:
                if self._closed:
                    return
                if not self._wanted:
                    self._wake.wait(self._until(last))
                if self._closed:
                    return  # type: ignore[unreachable]  # it was closed meanwhile
            due = self._commit_every is not None and time.monotonic() - last >= self._commit_every
            if not self._wanted and not (due and self._worth_it(last)):
                continue
            last = time.monotonic()
            try:
                self._commit()
                self._failure = None
            except BaseException as error:
                self._failure = error
                self._wanted = False

    def _until(self, last: float) -> float | None:
        if self._commit_every is None:
            return None
        late = time.monotonic() - last - self._commit_every
        return -late if late < 0 else self._commit_every

    def _worth_it(self, last: float) -> bool:
        """Whether a commit by the timer would write no more than ``_AMPLIFICATION`` times what is new."""
        every = self._commit_every or 0.0
        if time.monotonic() - last >= _PATIENCE * every:
            return True
        return self._ingest.rewritten_bytes() <= _AMPLIFICATION * self._ingest.new_bytes(self._new_bytes)

    def _on_signal(self) -> None:
        if not self._closed and os.getpid() == self._pid:
            for source in self._sources:
                source.flush(timeout=_SIGNAL_PATIENCE)
            try:
                self._commit()
            except BaseException as error:
                self._failure = error
                raise

    def _is_mine(self) -> bool:
        return self._lock.mine or self._committing.mine

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Commit and release the store. Raises what a commit raises; the store is released in any case."""
        if self._closed:
            return
        if os.getpid() != self._pid:
            self._closed = True
            return
        self._failure = None
        try:
            try:
                for source in self._sources:
                    source.close()
            finally:
                with self._lock:
                    self._closing = True  # what another thread appends from here on would be dropped
                self._commit()
            self._session.write_children()
        finally:
            self._release()

    def abandon(self) -> None:
        """Release the store without another commit: what was appended since the last one is dropped."""
        if not self._closed and os.getpid() == self._pid:
            for source in self._sources:
                source.abandon()
            self._release()

    def _release(self) -> None:
        self._closed = True
        with self._wake:
            self._wake.notify_all()
        if threading.current_thread() is not self._timer:
            self._timer.join()
        signals.unwatch(self._watching)
        atexit.unregister(self._at_exit)
        self._ingest.close()
        self._session.close()
        signals.redeliver()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except TrajstoreError as failure:
            if error is None:
                raise
            # The error that ended the block goes on; this one must not vanish behind it.
            warnings.warn(f"what was appended since the last commit is not stored: {failure}", stacklevel=2)

    def __reduce__(self) -> Any:
        raise StateError(
            "a writer cannot be pickled: a store has one writer at a time",
            hint="in each process: trajstore.create(path, part=f'rank{rank}')",
        )

    def __repr__(self) -> str:
        return f"<Writer {self.path}: {len(self)} trajectories, {self.committed} committed>"

    def _refuse(self) -> None:
        if os.getpid() != self._pid:
            raise StateError(
                "this writer was inherited by a forked process, which may not use it",
                hint="in each process: trajstore.create(path, part=f'rank{rank}')",
            )
        if self._closed or self._closing:
            raise StateError(f"the writer of {self.path} is closed")
        failure = self._failure
        if isinstance(failure, (StorageError, ConflictError, StateError)):
            raise failure
        raise StateError(f"a background commit of {self.path} failed: {failure!r}") from failure
