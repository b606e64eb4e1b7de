"""Threads that make calls in the background: the encoding of rows, handed over as cheaply as can be."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any


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
