"""The recorder's thread: it takes steps out of the ring; the caller waits for it only where the ring is full."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

from trajstore.collect.boundaries import Boundaries, Episodes
from trajstore.collect.ring import Ring
from trajstore.collect.splitter import Splitter
from trajstore.engine import device
from trajstore.errors import QueueFullError, StateError, StorageError, TrajstoreError
from trajstore.writer import Writer

Array = np.ndarray[Any, Any]

_POLL = 0.02  # seconds until steps are looked at that nobody announced


class Background:
    """What happens between ``Recorder.step`` and ``Writer.append_many``.

    Parameters
    ----------
    lag : steps at the end that wait for the row after them, which holds their final observations: 0 or 1.
    keep_unfinished : whether episodes that nothing but the end has cut are stored.

    Attributes
    ----------
    head : steps recorded, the caller's to count up; ``done`` : those that are with the writer, or set aside.
    final_row : 1 once the last row is none that counts, but holds the observations after the last step.
    stalled : seconds for which the caller has waited for room.
    """

    def __init__(
        self,
        writer: Writer,
        ring: Ring,
        *,
        next_step: bool,
        boundary: tuple[str, ...],
        flags: str,
        memory_bytes: int,
        keep_unfinished: bool,
    ) -> None:
        self.head = self.done = self.final_row = 0
        self.stalled = 0.0
        self.transfers: deque[tuple[int, device.Transfer]] = deque()
        self._boundaries = Boundaries(ring.num_envs, next_step=next_step)
        self.splitter = Splitter(
            writer,
            ring,
            self._boundaries,
            boundary=boundary,
            flags=flags,
            memory_bytes=memory_bytes,
            append=self._append,
        )
        self._writer = writer
        self._ring = ring
        # A terminated episode's final observation comes with the next row: the last row waits for it.
        self._lag = int(bool(boundary) and next_step)
        self._keep_unfinished = keep_unfinished
        self._ended = 0  # steps in all, once they are known
        self._changed = threading.Condition()
        self._idle = self._closing = self._abandoned = False
        self._attempts = 0  # to append
        self._failure: BaseException | None = None
        self._trouble: StorageError | None = None  # of the disk, which may get over it
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="trajstore-recorder", daemon=True)
        self._thread.start()

    # -- in the caller's thread ------------------------------------------------------------------------------------

    @property
    def failed(self) -> bool:
        """Whether it has failed for good."""
        return self._failure is not None

    def advance(self) -> None:
        """Count a step that is complete in the ring."""
        self.head += 1
        if self._idle and self.head - self.splitter.tail >= self._ring.steps // 2:
            self._notify()

    def advance_to_end(self) -> None:
        """Count a last row that is no step."""
        self._ended, self.final_row = self.head, 1
        self.head += 1

    def wait_for_room(self) -> None:
        """Wait until the ring has room for a step."""
        if self.head - self.splitter.tail < self._ring.steps:
            return
        begun = time.perf_counter()
        with self._changed:
            self._changed.notify_all()
            while self.head - self.splitter.tail >= self._ring.steps and not (self._failure or self._trouble):
                self._changed.wait(_POLL)
        self.stalled += time.perf_counter() - begun
        self.check()

    def check(self) -> None:
        """Raise what has failed, or that this is another process than the recorder's."""
        if self._failure is not None or self._trouble is not None or os.getpid() != self._pid or self._closing:
            self.refuse()

    def refuse(self) -> NoReturn:
        if os.getpid() != self._pid:
            raise StateError("this recorder was inherited by a forked process, which may not use it")
        failure = self._failure or self._trouble
        if isinstance(failure, TrajstoreError):
            raise failure
        if failure is not None:
            raise StateError(f"recording failed in the background: {failure!r}") from failure
        raise StateError("the recorder is closed")

    def flush(self, timeout: float | None) -> bool:
        """Wait until every episode that has ended is with the writer; takes no lock, for a signal's thread."""
        wanted = self.head - self._lag
        deadline = None if timeout is None else time.monotonic() + timeout
        attempt = self._attempts + 1
        while self.done < wanted and self._failure is None and self._thread.is_alive():
            # What the writer refused before it was asked again is no news.
            if self._trouble is not None and self._attempts > attempt:
                break
            if deadline is not None and time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        if self.done < wanted and timeout is None:
            self.refuse()
        return self.done >= wanted

    def close(self, *, abandon: bool = False) -> None:
        """End the thread, after all that was recorded is stored, or, to ``abandon`` it, at once."""
        self._abandoned = abandon
        self._closing = True
        self._notify()
        self._thread.join()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._abandoned:
                closing = self._closing
                self._work()
                if closing:
                    self._finish()
                    return
                with self._changed:
                    self._changed.notify_all()
                    if not self._closing and self.head - self.splitter.tail < max(self._ring.steps // 2, 1):
                        self._idle = True
                        self._changed.wait(_POLL)
                        self._idle = False
        except BaseException as error:
            self._failure = error
        finally:
            self.splitter.close()
            self._notify()

    def _work(self) -> None:
        """Take what has been recorded out of the ring, as far as its episodes' final observations are there."""
        splitter, lag = self.splitter, self._lag
        while (limit := self.head - lag) > self._boundaries.scanned and not self._abandoned:
            stop = splitter.next_stop(limit)
            self._receive(stop + lag)
            splitter.store(self._wanted(splitter.scan(stop, limit + lag)))
            self._patiently(splitter.remains.trim)
            while splitter.release(self.head):
                self._notify()
                self._patiently(splitter.remains.trim)
            self.done = stop

    def _finish(self) -> None:
        """Take the last steps, and what is unfinished. Observations given at the end are a row that does not count."""
        if not self._ring.steps:
            return
        self._ended = self.head - self.final_row
        while self._boundaries.scanned < self.head:
            stop = self.splitter.next_stop(self.head)
            self._receive(stop)
            episodes = self.splitter.scan(stop, self.head)
            if not self.final_row:
                episodes = episodes.without_row(self.head)
            self.splitter.store(self._wanted(episodes))
        rest = self._boundaries.finish()
        if self._keep_unfinished:
            self.splitter.store(rest)
        self.done = self._boundaries.scanned

    def _wanted(self, episodes: Episodes) -> Episodes:
        """At the end, without those that nothing but the end has cut, if they are to be dropped."""
        if not self._ended or self._keep_unfinished:
            return episodes
        return episodes[episodes.ended | (episodes.last < self._ended - 1)]

    def _receive(self, stop: int) -> None:
        """Wait for what is on its way from a device, of steps before ``stop``."""
        while self.transfers and self.transfers[0][0] < stop:
            self.transfers[0][1].wait()
            self.transfers.popleft()

    def _append(self, fields: Mapping[str, Array], lengths: Array, columns: Mapping[str, Array]) -> None:
        self._patiently(lambda: self._writer.append_many(fields, lengths=lengths, **columns))

    def _patiently(self, work: Callable[[], object]) -> None:
        """Do what the disk may refuse, and again until it does not: one that is full now need not be so for ever."""
        while not self._abandoned:
            self._attempts += 1
            try:
                work()
                self._trouble = None
                return
            except QueueFullError:
                time.sleep(_POLL)  # this queue is the writer's; the recorder's own makes its caller wait
            except StorageError as error:
                if self._closing:
                    raise
                self._trouble = error
                with self._changed:
                    self._changed.notify_all()
                    self._changed.wait(5 * _POLL)
