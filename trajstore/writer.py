"""The writer: trajectories in; commits by time, bytes, count, call, close, exception and signal."""

from __future__ import annotations

import atexit
import os
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np

from trajstore.engine import crew, signals
from trajstore.engine.admission import Admission
from trajstore.engine.commit import Session
from trajstore.engine.committer import Committer, Source
from trajstore.engine.episode import Episode
from trajstore.engine.ingest import Ingest
from trajstore.engine.ledger import Ledger
from trajstore.engine.mutex import Mutex
from trajstore.engine.opening import open_part, open_session
from trajstore.errors import SchemaError, StateError, TrajstoreError
from trajstore.format.arguments import check_count, whole_numbers
from trajstore.format.encoding import DEFAULT_PROFILE, codec_of
from trajstore.format.intervals import IntervalSet
from trajstore.format.layout import Codec
from trajstore.format.manifest import Manifest
from trajstore.format.progress import State
from trajstore.format.schema import Clock, Column, Field, Schema, declaration
from trajstore.media.config import describe_config
from trajstore.media.storage import LocalStorage, Storage

__all__ = ["COMMIT_EVERY", "Source", "Writer", "create"]

COMMIT_EVERY = 10.0  # seconds
_MOST_THREADS = 1024


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
        A negative value stands for none.
    fields, clocks, columns : declarations; what is not declared is taken from the first trajectory.
    profile : ``"fast"``, ``"balanced"``, ``"small"``, or a ``Codec``; for arrays that do not exist yet.
    commit_every : seconds from one commit to the next, ``None`` for no timer. The timer waits longer, up to six
        times, while a commit would write more than eight times the bytes that are new.
    commit_trajectories, commit_bytes : commit also when so many trajectories, or raw bytes, are new.
    queue_bytes : raw bytes that may wait for the encoders.
    on_full : ``"wait"`` for room in the queue, or ``"error"`` to raise ``QueueFullError``.
    threads : encoder threads; by default one for each core.
    handle_signals : commit on SIGINT, SIGTERM and SIGHUP, then let them take their course (main thread only).

    Returns
    -------
    Writer
        Use it as a context manager: leaving it commits, also when an exception does.

    Raises
    ------
    SchemaError
        An argument means nothing.
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
    if commit_every is not None:
        if not isinstance(commit_every, (int, float, np.number)) or not commit_every > 0:
            raise SchemaError(f"commit_every is {commit_every!r}", hint="seconds above 0, or None for no timer")
        commit_every = float(commit_every) if commit_every < threading.TIMEOUT_MAX else None
    for name, count in (("commit_trajectories", commit_trajectories), ("commit_bytes", commit_bytes)):
        if count is not None:
            check_count(name, count, 1)
    check_count("queue_bytes", queue_bytes)
    check_count("threads", threads or 0, most=_MOST_THREADS)
    root: Any = path if hasattr(path, "describe") else LocalStorage(path)
    codec, declared = codec_of(profile), declaration(fields, clocks, columns)
    session = open_session(root if part is None else open_part(root, part), resume)
    try:
        given = None if config is None and files is None else describe_config(config, files)
        return Writer(
            session,
            Ledger(session, config=given, force=force, target=target, unique=unique),
            part=None if part is None else (root, part),
            declared=declared,
            codec=codec,
            commit_every=commit_every,
            commit_trajectories=commit_trajectories,
            commit_bytes=commit_bytes,
            queue_bytes=queue_bytes,
            patient=on_full == "wait",
            threads=threads or crew.SIZE,
            handle_signals=handle_signals,
        )
    except BaseException:
        session.close()
        raise


class Writer:
    """Appends trajectories to one store; made by :func:`create`.

    Attributes
    ----------
    state : dict
        Anything of the caller's (random state, counters) that JSON can hold; each commit stores it with the data.
        What JSON cannot hold is refused where it is given.
    target : int or None
        Number of trajectories wanted in all.

    Notes
    -----
    Any thread may call anything; trajectories are stored in the order in which the calls came. A background failure is
    raised by the next call, and nothing of that call's trajectory is stored; ``commit`` tries again. Not usable in a
    forked child.
    """

    def __init__(
        self,
        session: Session,
        ledger: Ledger,
        *,
        part: tuple[Storage, str] | None,
        declared: Schema,
        codec: Codec,
        commit_every: float | None,
        commit_trajectories: int | None,
        commit_bytes: int | None,
        queue_bytes: int,
        patient: bool,
        threads: int,
        handle_signals: bool,
    ) -> None:
        self._session = session
        self._ledger = ledger
        self._part = part
        self._pid = os.getpid()
        self._closed = False
        self._ending = threading.RLock()
        self._lock = Mutex()
        self._ingest = Ingest(
            session, codec, threads=threads, queue_bytes=queue_bytes, lock=self._lock, clock=time.monotonic
        )
        self._committer = Committer(
            session,
            self._ingest,
            ledger,
            self._lock,
            every=commit_every,
            trajectories=commit_trajectories,
            nbytes=commit_bytes,
        )
        try:
            self._admission = Admission(self._ingest, ledger, self._committer, self._lock, declared, patient=patient)
            self._committer.start(handle_signals=handle_signals)
        except BaseException:
            self._ingest.close()
            raise
        atexit.register(self.close)  # what a writer that nobody closed still holds

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
        return self._ledger.progress.state

    @state.setter
    def state(self, value: Mapping[str, Any]) -> None:
        state = State(value)
        with self._changing():
            self._ledger.progress.state = state

    @property
    def target(self) -> int | None:
        return self._ledger.progress.target

    @target.setter
    def target(self, value: int | None) -> None:
        with self._changing():
            self._ledger.progress.target = value

    @property
    def remaining(self) -> int | None:
        """Trajectories still missing to the target; ``None`` without one."""
        target = self.target
        return None if target is None else max(target - len(self), 0)

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
        found, committer = self._ledger.found, self._committer
        encoded = budget.encoded_bytes
        return {
            "trajectories": len(self) - found["trajectories"],
            "steps": self.steps - found["steps"],
            "queue_bytes": budget.used,
            "queue_peak_bytes": budget.peak,
            "stall_seconds": budget.stalled + self._admission.stalled,
            "raw_bytes": encoded,
            "encode_bytes_per_second": encoded / budget.encode_seconds if budget.encode_seconds else 0.0,
            "commits": committer.commits,
            "commit_seconds": committer.seconds,
            "commit_last_seconds": committer.last_seconds,
            "ratio": encoded / disk["frame_bytes"] if disk["frame_bytes"] else 1.0,
            **disk,
        }

    # -- trajectories ----------------------------------------------------------------------------------------------

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
        self._check()
        return self._admission.append(trajectory, columns)

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
        self._check()
        return self._admission.append_many(trajectories, lengths, columns)

    def episode(self, *, on_error: str = "drop", **columns: Any) -> Episode:
        """A trajectory to be recorded step by step: ``with writer.episode(seed=7) as episode: episode.step(...)``.

        ``on_error`` : what an exception in the block does to it: ``"drop"``, or ``"truncate"`` to keep what there is.
        """
        return Episode(self.append, columns, on_error)

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
        self._check(failed=False)
        self._admission.declare(declaration(fields, clocks, columns))

    def split_clock(self, field: str) -> None:
        """Give a field a clock of its own: from now on it may have another number of rows than those it was with.

        Commits first. Raises ``NotFoundError`` for a field that the store does not have.
        """
        self._check()
        self._admission.split(field)

    def delete(self, ids: int | Iterable[int]) -> None:
        """Take trajectories out of the dataset, by id; the next commit makes it so.

        Their rows stay on disk until the store is compacted, and their seeds count as collected. Deleting one twice
        does nothing. Raises ``NotFoundError`` for an id that no trajectory has.
        """
        wanted = whole_numbers("ids", ids)
        self._check()
        with self._changing():
            self._ledger.deleted.update(IntervalSet.of(self._ingest.rows_of(wanted)))

    # -- seeds -----------------------------------------------------------------------------------------------------

    def seeds(self, wanted: range) -> Iterator[int]:
        """The seeds of a range that were never attempted, one by one, until the target is reached.

        Going on to the next seed marks the one before as attempted, whether it yielded a trajectory or not, so that
        after a kill no seed is skipped and none is collected twice. A seed whose trajectory was appended with
        ``seed=`` is marked in the same instant as the trajectory is.
        """
        with self._looking():
            remaining = self._ledger.progress.remaining(wanted)
        for seed in remaining:
            if self.remaining == 0:
                return
            if seed in self._ledger.progress.attempted:
                continue
            yield seed
            self.mark_attempted(seed)

    def remaining_seeds(self, wanted: range, count: int) -> np.ndarray[Any, Any]:
        """The first ``count`` seeds of a range that were never attempted, int64; for collectors that run batches."""
        check_count("count", count)
        with self._looking():
            return self._ledger.progress.remaining(wanted).first(count)

    def mark_attempted(self, seeds: int | Iterable[int]) -> None:
        """Mark seeds as tried, also those that yielded nothing; the next commit makes it durable."""
        with self._changing():
            self._ledger.progress.attempt(seeds)

    @property
    def attempted(self) -> IntervalSet:
        with self._looking():
            return self._ledger.progress.attempted.freeze()

    @property
    def completed(self) -> IntervalSet:
        with self._looking():
            return self._ledger.progress.completed.freeze()

    # -- commits ---------------------------------------------------------------------------------------------------

    def attach(self, source: Source) -> None:
        """Have ``source`` hand over what it holds before a commit that is asked for, and before the end."""
        self._check(failed=False)
        self._committer.attach(source)

    def detach(self, source: Source) -> None:
        self._committer.detach(source)

    def commit(self) -> int:
        """Make everything appended so far durable and visible; the number of the commit.

        Raises ``StorageError`` if the disk refused (nothing is lost: call again), ``ConflictError`` if another writer
        took over, ``StateError`` if this writer cannot go on; and, with all else committed, ``SchemaError`` if
        ``state`` has come to hold what JSON cannot.
        """
        self._check(failed=False)
        self._committer.ask()
        head = self._session.head
        return head.commit.number if head else 0

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Commit and release the store. Raises what a commit raises; the store is released in any case.

        Of several threads that close, one does, and the others wait for it.
        """
        if os.getpid() != self._pid:
            self._closed = True
            return
        with self._ending:
            if self._closed:
                return
            self._committer.failure = None
            try:
                try:
                    for source in self._committer.sources:
                        source.close()
                finally:
                    with self._lock:
                        self._admission.closed = True  # what another thread gives from here on would be dropped
                    self._committer.commit()
                self._session.write_children()
            finally:
                self._release()

    def abandon(self) -> None:
        """Release the store without another commit: what was appended since the last one is dropped."""
        if os.getpid() != self._pid:
            return
        with self._ending:
            if self._closed:
                return
            for source in self._committer.sources:
                source.abandon()
            with self._lock:
                self._admission.closed = True
            self._release()

    def _release(self) -> None:
        self._closed = True
        self._committer.stop()
        atexit.unregister(self.close)
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
            lost = len(self) - self.committed
            warnings.warn(f"{lost} trajectories are not stored: {failure}" if lost else str(failure), stacklevel=2)

    def __reduce__(self) -> Any:
        raise StateError(
            "a writer cannot be pickled: a store has one writer at a time",
            hint="in each process: trajstore.create(path, part=f'rank{rank}')",
        )

    def __repr__(self) -> str:
        return f"<Writer {self.path}: {len(self)} trajectories, {self.committed} committed>"

    # -- refusals --------------------------------------------------------------------------------------------------

    def _check(self, *, failed: bool = True) -> None:
        """Raise what keeps this writer from going on; ``failed`` : a commit that failed in the background too."""
        if self._closed or os.getpid() != self._pid or (failed and self._committer.failure is not None):
            self._refuse()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """The lock of a writer that will commit what changes under it."""
        self._check(failed=False)
        with self._lock:
            self._admission.check()
            yield

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """The lock, where it can be had: in a forked child it may be held by a thread that is not there."""
        if os.getpid() != self._pid:
            self._refuse()
        with self._lock:
            yield

    def _refuse(self) -> None:
        if os.getpid() != self._pid:
            raise StateError(
                "this writer was inherited by a forked process, which may not use it",
                hint="in each process: trajstore.create(path, part=f'rank{rank}')",
            )
        if self._closed:
            raise StateError(f"the writer of {self.path} is closed")
        failure = self._committer.failure
        if isinstance(failure, TrajstoreError):
            raise failure
        raise StateError(f"a background commit of {self.path} failed: {failure!r}") from failure
