"""What SIGTERM and SIGINT do to a process that is saving."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from trajstore.errors import SchemaError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Handlers that drain and then let happen what would have happened.

    The saves run in threads of their own and go on while the main thread is deep in some C code, so nothing needs to
    wake it. Only the main thread can set handlers: elsewhere, and with ``mode="ignore"``, nothing is done.

    Parameters
    ----------
    mode : ``"drain"``, ``"flag"`` (the first signal only sets :attr:`received`) or ``"ignore"``.
    """

    def __init__(self, mode: str) -> None:
        if mode not in ("drain", "flag", "ignore"):
            raise SchemaError(f"on_signal is {mode!r}", hint='"drain", "flag" or "ignore"')
        self.received = False
        self._flag = mode == "flag"
        self._drain: Callable[[], None] = lambda: None
        self._previous: dict[int, Any] = {}
        self._deferring = 0
        self._pending: list[tuple[int, Any]] = []
        self._wanted = mode != "ignore"

    def install(self, drain: Callable[[], None]) -> None:
        """Take the signals over; ``drain`` is called at one."""
        self._drain = drain
        if self._wanted and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A stretch in which a signal waits: a half-made copy is no state to drain. For one thread; may be nested."""
        self._deferring += 1
        try:
            yield
        finally:
            self._deferring -= 1
            while self._pending and not self._deferring:
                self._handle(*self._pending.pop(0))

    def restore(self) -> None:
        """Put the previous handlers back, where they were not replaced by others since."""
        for number, previous in self._previous.items():
            if threading.current_thread() is threading.main_thread() and signal.getsignal(number) == self._handle:
                signal.signal(number, previous if previous is not None else signal.SIG_DFL)
        self._previous = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self._deferring:
            self._pending.append((number, frame))
            return
        if self._flag and not self.received:
            self.received = True
            return
        self.received = True
        self._drain()
        previous = self._previous.get(number)
        if callable(previous):
            previous(number, frame)
        elif previous != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
