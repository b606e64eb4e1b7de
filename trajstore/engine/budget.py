"""The bytes that wait for the encoders."""

from __future__ import annotations

import threading
from collections.abc import Callable


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
