"""Threads that outlive the interpreter's farewell: a writer may still be closed in them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Pool(ThreadPoolExecutor):
    """Threads that a writer may still be closed with while the interpreter ends (``atexit``): its caller then works."""

    _closed = False

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._closed = True
        super().shutdown(wait, cancel_futures=cancel_futures)

    def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        try:
            return super().submit(function, *args, **named)
        except RuntimeError:
            if self._closed:
                raise
        done: Future[Any] = Future()
        try:
            done.set_result(function(*args, **named))
        except Exception as error:
            done.set_exception(error)
        return done
