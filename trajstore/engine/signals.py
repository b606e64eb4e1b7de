"""SIGINT, SIGTERM and SIGHUP: what is buffered is committed before the process goes the way it would have gone."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
_callbacks: weakref.WeakValueDictionary[int, _Callback] = weakref.WeakValueDictionary()
_previous: dict[int, Any] = {}
_wakeup: tuple[int, int, int] | None = None  # our reading end, our writing end, the descriptor that was set before


#: Signals that arrived while the main thread was inside a writer; ``redeliver`` sends them again.
deferred: list[int] = []


class _Callback:
    def __init__(self, function: Callable[[], None], busy: Callable[[], bool]) -> None:
        self.function = function
        self.busy = busy


def watch(function: Callable[[], None], busy: Callable[[], bool]) -> object | None:
    """Call ``function`` when such a signal arrives, until the object returned is let go of or given to ``unwatch``.

    It is called in a thread of its own, so that a main thread deep in C does not delay it; after that the handlers
    that were there before run as they would have. Only the main thread can set handlers: elsewhere nothing happens
    and ``None`` is returned.

    ``busy`` tells whether the main thread itself is inside ``function``'s locks. Waiting for ``function`` there would
    wait for ever, so the signal is put off: whoever leaves those locks calls ``redeliver``.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    callback = _Callback(function, busy)
    if not _callbacks:
        _install()
    _callbacks[id(callback)] = callback
    return callback


def unwatch(callback: object | None) -> None:
    if callback is not None:
        _callbacks.pop(id(callback), None)
    if not _callbacks and threading.current_thread() is threading.main_thread():
        _restore()


def _install() -> None:
    global _wakeup
    if _previous:
        return
    reading, writing = os.pipe()
    for fd in (reading, writing):
        os.set_inheritable(fd, False)
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _wakeup = reading, writing, before
    threading.Thread(target=_listen, args=_wakeup, name="trajstore-signals", daemon=True).start()
    for number in _SIGNALS:
        _previous[number] = signal.signal(number, _handle)


def _restore() -> None:
    global _wakeup
    for number, handler in list(_previous.items()):
        if signal.getsignal(number) is _handle:
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        del _previous[number]
    if _wakeup is not None:
        _, writing, before = _wakeup
        _wakeup = None
        signal.set_wakeup_fd(before)
        os.close(writing)  # the thread reads the end of the pipe, and ends


def _listen(reading: int, writing: int, before: int) -> None:
    while True:
        data = os.read(reading, 64)
        if not data:
            break
        if before >= 0:
            try:
                os.write(before, data)
            except OSError:
                pass
        if any(number in data for number in _SIGNALS):
            _call_all()
    os.close(reading)


_calling = threading.Lock()


def _call_all() -> None:
    with _calling:
        for callback in list(_callbacks.values()):
            try:
                callback.function()
            except Exception:  # the writer keeps its own failures, and its next call raises them
                pass


def redeliver() -> None:
    """Send the signals that were put off to this process again, unless its main thread is inside a writer still."""
    if threading.current_thread() is threading.main_thread():
        while deferred and not _busy():
            os.kill(os.getpid(), deferred.pop())


def _busy() -> bool:
    return any(callback.busy() for callback in list(_callbacks.values()))


def _handle(number: int, frame: FrameType | None) -> None:
    if _busy():
        deferred.append(number)
        return
    # Whoever arrives second, this handler or the listening thread, finds nothing left to commit.
    caller = threading.Thread(target=_call_all, name="trajstore-signal-commit")
    caller.start()
    caller.join()
    previous = _previous.get(number, signal.SIG_DFL)
    if callable(previous):
        previous(number, frame)
    elif previous == signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _forget() -> None:
    """A forked child has no writer to commit; what it inherited of this is put back."""
    global _wakeup, _calling
    _callbacks.clear()
    deferred.clear()
    _calling = threading.Lock()
    _wakeup = None
    try:
        if _previous:
            signal.set_wakeup_fd(-1)
    except ValueError:
        pass
    for number, handler in list(_previous.items()):
        try:
            if signal.getsignal(number) is _handle:
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        except ValueError:
            pass
    _previous.clear()


os.register_at_fork(after_in_child=_forget)
