"""The writer's locks: re-entrant, and known to a signal handler that must not wait for its own thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from trajstore.engine import signals


class Mutex:
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
