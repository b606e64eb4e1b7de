"""The committer of one writer: when commits are made, and that they are made one at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from trajstore.engine import signals
from trajstore.engine.commit import Session
from trajstore.engine.ingest import Ingest
from trajstore.engine.ledger import Ledger
from trajstore.engine.mutex import Mutex
from trajstore.errors import SchemaError, StateError, StorageError

_AMPLIFICATION = 8
_PATIENCE = 6  # commit intervals for which the back-off puts a commit off at the most
_SIGNAL_PATIENCE = 5.0  # seconds for what is being recorded, when a signal ends the process


class Source(Protocol):
    """What fills a writer in the background: it hands over before a commit that is asked for, and before the end."""

    def flush(self, timeout: float | None = None) -> bool: ...
    def close(self) -> None: ...
    def abandon(self) -> None: ...


class Committer:
    """Commits what an ingest has taken, with what a ledger says: when asked, by time, by number, and on a signal.

    Parameters
    ----------
    lock : the writer's. Whoever takes it and the committer's own takes the latter first.
    every : seconds from one commit to the next, ``None`` for no timer.
    trajectories, nbytes : commit also when so many trajectories, or raw bytes, are new.

    Attributes
    ----------
    failure : why the last commit in the background failed, until one succeeds or is asked for.
    commits, seconds, last_seconds : how many there were, and the time that they all took, and the last one.
    """

    def __init__(
        self,
        session: Session,
        ingest: Ingest,
        ledger: Ledger,
        lock: Mutex,
        *,
        every: float | None,
        trajectories: int | None,
        nbytes: int | None,
    ) -> None:
        self.failure: BaseException | None = None
        self.commits = 0
        self.seconds = self.last_seconds = 0.0
        self._sources: tuple[Source, ...] = ()
        self._session, self._ingest, self._ledger = session, ingest, ledger
        self._lock = lock
        self._committing = Mutex()
        self._every, self._trajectories, self._nbytes = every, trajectories, nbytes
        self._by_number = trajectories is not None or nbytes is not None
        self._taken_bytes = self._committed_bytes = 0
        self._committed: Any = None
        self._stopped = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="trajstore-commit", daemon=True)
        self._watching: object | None = None

    def start(self, *, handle_signals: bool) -> None:
        """Make a first commit, which says who writes now, and begin to make them in the background."""
        self.commit()
        self._thread.start()
        if handle_signals:
            self._watching = signals.watch(self._on_signal, self._is_mine)

    def stop(self) -> None:
        """Make no more commits; one that is under way is waited for."""
        with self._committing:
            self._stopped = True
        with self._wake:
            self._wake.notify_all()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        signals.unwatch(self._watching)

    # -- commits ---------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Make everything that was taken so far durable and visible; nothing happens if nothing is new.

        Raises ``StorageError`` if the disk refused (nothing is lost: call again), ``ConflictError`` if another writer
        took over, ``StateError`` if this one cannot go on; and, after all else is committed, ``SchemaError`` if the
        caller's state holds what cannot be stored.
        """
        with self._committing:
            if self._stopped:
                raise StateError(f"the writer of {self._session.storage.describe()} is closed")
            with self._lock:
                entry = self._ledger.entry(self._ingest.counts["next_id"])
                # The schema itself, and not its id, which another one may be given.
                version = self._ingest.schema, entry.version
                if version == self._committed and self._session.head is not None:
                    self._tell(entry.refused)
                    return
                cut = self._ingest.cut()
                taken_bytes = self._taken_bytes
            begun = time.monotonic()
            try:
                self._ingest.commit(cut, entry.sets, entry.extra)
            except StorageError:
                # A writer that took over removes unfinished files: say that, not that one of them is missing.
                self._session.check()
                raise
            self.last_seconds = time.monotonic() - begun
            self.seconds += self.last_seconds
            self.commits += 1
            self._committed = version
            self._committed_bytes = taken_bytes
            try:
                self._session.write_children(due=True)
            except StorageError:
                pass  # they may lag, and the commit is made: nobody must be told that it is not
            self._tell(entry.refused)

    def _tell(self, refused: SchemaError | None) -> None:
        if refused is not None:
            raise refused

    @property
    def sources(self) -> tuple[Source, ...]:
        """Those that hand over what they hold before a commit that is asked for."""
        return self._sources

    def attach(self, source: Source) -> None:
        with self._lock:
            self._sources = (*self._sources, source)

    def detach(self, source: Source) -> None:
        with self._lock:
            self._sources = tuple(held for held in self._sources if held is not source)

    def ask(self) -> None:
        """Commit what the sources hold too; a failure of before is forgotten."""
        self.failure = None
        for source in self._sources:
            source.flush()
        self.commit()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Both locks, of which the caller has the writer's; what has happened meanwhile is for it to look at."""
        # Commits take them in this order: whoever waited for the first with the second would wait for ever.
        with self._lock.released(), self._committing, self._lock:
            yield

    # -- in the background -----------------------------------------------------------------------------------------

    def took(self, nbytes: int) -> None:
        """Note, under the writer's lock, what the ingest has been given: so much of it, and a commit is made."""
        self._taken_bytes += nbytes
        if (self._by_number or self._ingest.disk_failed) and self._enough():
            with self._wake:
                self._wake.notify_all()

    def _enough(self) -> bool:
        """Whether a commit should be made at once; not if one has just failed.

        So much is new; or the disk has refused a shard, and more has come since the last commit than may wait for the
        encoders: what cannot be written must not pile up in memory, and it is a commit that says so.
        """
        if self.failure is not None:
            return False
        if self._ingest.disk_failed and self._taken_bytes - self._committed_bytes > self._ingest.budget.limit:
            return True
        head = self._session.head
        new = self._ingest.counts["trajectories"] - (head.counts["trajectories"] if head else 0)
        return (self._trajectories is not None and new >= self._trajectories) or (
            self._nbytes is not None and self._taken_bytes - self._committed_bytes >= self._nbytes
        )

    def _run(self) -> None:
        last = time.monotonic()
        while True:
            with self._wake:
                while not (self._stopped or self._enough() or self._due(last)):
                    self._wake.wait(self._pause(last))
                if self._stopped:
                    return
            last = time.monotonic()
            try:
                self.commit()
                self.failure = None
            except BaseException as error:
                self.failure = error

    def _pause(self, last: float) -> float | None:
        if self._every is None:
            return None
        late = time.monotonic() - last - self._every
        return -late if late < 0 else self._every

    def _due(self, last: float) -> bool:
        """Whether it is time, and the commit would write no more than ``_AMPLIFICATION`` times what is new."""
        waited = time.monotonic() - last
        if self._every is None or waited < self._every:
            return False
        if waited >= _PATIENCE * self._every:
            return True
        new = self._ingest.new_bytes(self._taken_bytes - self._committed_bytes)
        return self._ingest.rewritten_bytes() <= _AMPLIFICATION * new

    # -- signals ---------------------------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        if self._stopped:
            return
        for source in self._sources:
            source.flush(timeout=_SIGNAL_PATIENCE)
        try:
            self.commit()
        except BaseException as error:
            self.failure = error
            raise

    def _is_mine(self) -> bool:
        return self._lock.mine or self._committing.mine
