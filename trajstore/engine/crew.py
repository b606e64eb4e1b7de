"""Work shared among threads: the caller's own and those of one pool for the whole process."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

#: Threads that work at once, the caller's among them: one for each core that the process may use.
SIZE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)

_executors: dict[int, ThreadPoolExecutor] = {}
_guard = threading.Lock()


def share(work: Callable[[int], None], count: int, threads: int = SIZE) -> None:
    """Call ``work`` with every number below ``count``, each once, in no order; return when all calls have.

    threads : that take part; more than there are cores for work that waits.

    The first error is raised again, when no thread works on it any more. The caller's thread takes part, so that this
    may be called from within ``work``, and by any number of threads at once: what the pool has no thread for, the
    caller does.
    """
    numbers = iter(range(count))
    helpers = [_pool(threads).submit(_run, work, numbers) for _ in range(min(threads, count) - 1)]
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


def _pool(threads: int) -> ThreadPoolExecutor:
    with _guard:
        if threads not in _executors:
            _executors[threads] = ThreadPoolExecutor(max(threads - 1, 1), thread_name_prefix="trajstore-crew")
        return _executors[threads]


def _forget_pools() -> None:
    global _executors, _guard
    _executors, _guard = {}, threading.Lock()


os.register_at_fork(after_in_child=_forget_pools)
