"""Threads that encode rows in the background, and the bytes that wait for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any


class Budget:
    """Bytes handed to the encoders and not encoded yet, held below a limit by making the caller wait.

    stalled : seconds for which callers have waited.
    encoded_bytes, encode_seconds : what the encoders have done, and the time it took them, all threads together.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.peak = 0
        self.stalled = 0.0
        self.encoded_bytes = 0
        self.encode_seconds = 0.0
        self._waiting = 0
        self._guard = threading.Lock()
        self._changed = threading.Condition(self._guard)

    def acquire(self, amount: int, clock: Callable[[], float]) -> None:
        """Wait for room; an amount above the limit passes when nothing else is in the queue."""
        with self._guard:
            if self.used and self.used + amount > self.limit:
                self._wait(amount, clock)
            self.used += amount
            if self.used > self.peak:
                self.peak = self.used

    def _wait(self, amount: int, clock: Callable[[], float]) -> None:
        begun = clock()
        self._waiting += 1
        try:
            while self.used and self.used + amount > self.limit:
                self._changed.wait(1.0)
        finally:
            self._waiting -= 1
        self.stalled += clock() - begun

    def release(self, amount: int, seconds: float = 0.0) -> None:
        """Give back what was acquired, after an encoder has had it for ``seconds``."""
        with self._guard:
            self.used -= amount
            self.encoded_bytes += amount
            self.encode_seconds += seconds
            if self._waiting:
                self._changed.notify_all()

    def has_room(self, amount: int) -> bool:
        return not self.used or self.used + amount <= self.limit


class Job:
    """A call that another thread makes, and whoever wants may wait for.

    error : what it raised.
    """

    __slots__ = ("_call", "_lock", "_over", "error")

    def __init__(self, function: Callable[..., object], *arguments: Any) -> None:
        self.error: BaseException | None = None
        self._call: Any = function, arguments
        self._over = False
        self._lock = threading.Lock()
        self._lock.acquire()

    @property
    def succeeded(self) -> bool:
        """Whether it is over, without an error."""
        return self._over and self.error is None

    def run(self) -> None:
        function, arguments = self._call
        try:
            function(*arguments)
        except BaseException as error:
            self.error = error
        self._call = None  # whoever keeps the job shall not keep the rows
        self._over = True
        self._lock.release()

    def wait(self) -> None:
        with self._lock:
            pass


def finish(jobs: Sequence[Job]) -> None:
    """Wait until all of them have ended; raise what the first of those that failed has raised."""
    for job in jobs:
        job.wait()
    for job in jobs:
        if job.error is not None:
            raise job.error


class Encoders:
    """Threads that make calls, begun in the order in which they are handed over.

    Notes
    -----
    A pool of the standard library does several times as much for each call in the thread that hands it over, which is
    the collector's. And these threads are there until the interpreter is gone: a writer that is closed by ``atexit``
    still has them.
    """

    def __init__(self, threads: int) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"trajstore-encode_{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., object], *arguments: Any) -> Job:
        job = Job(function, *arguments)
        self._jobs.put(job)
        return job

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
            del job  # it would be held until the next one comes
        self._jobs.put(None)

    def close(self) -> None:
        """Wait for the calls under way; those that nobody has begun are not made."""
        try:
            while True:
                self._jobs.get_nowait()
        except Empty:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
