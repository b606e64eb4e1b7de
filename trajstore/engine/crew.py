"""Work shared among threads: the caller's own and those of one pool for the whole process."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

#: Threads that work at once, the caller's among them: one for each core that the process may use.
SIZE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)

_executor: ThreadPoolExecutor | None = None
_guard = threading.Lock()


def share(work: Callable[[int], None], count: int) -> None:
    """Call ``work`` with every number below ``count``, each once, in no order; return when all calls have.

    The first error is raised again, when no thread works on it any more. The caller's thread takes part, so that this
    may be called from within ``work``, and by any number of threads at once: what the pool has no thread for, the
    caller does.
    """
    numbers = iter(range(count))
    helpers = [_pool().submit(_run, work, numbers) for _ in range(min(SIZE, count) - 1)]
    error: BaseException | None = None
    try:
        _run(work, numbers)
    except BaseException as failure:
        error = failure
    for helper in helpers:
        if not helper.cancel():
            error = error or helper.exception()
    if error is not None:
        raise error


def _run(work: Callable[[int], None], numbers: Iterator[int]) -> None:
    try:
        for number in numbers:  # one thread at a time takes the next: the iterator is C code
            work(number)
    except BaseException:
        deque(numbers, maxlen=0)  # nobody begins anything new
        raise


def _pool() -> ThreadPoolExecutor:
    global _executor
    with _guard:
        if _executor is None:
            _executor = ThreadPoolExecutor(max(SIZE - 1, 1), thread_name_prefix="trajstore-crew")
        return _executor


def _forget_pool() -> None:
    global _executor, _guard
    _executor, _guard = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_pool)
