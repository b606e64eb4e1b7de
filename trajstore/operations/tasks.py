"""Many independent tasks on Dask: its threads, or a cluster. The only room that knows Dask."""

from __future__ import annotations

import importlib.util
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from trajstore.engine.optional import optional
from trajstore.errors import NotFoundError

Task = TypeVar("Task")
Shared = TypeVar("Shared")
Result = TypeVar("Result")

_PATIENCE = 10  # seconds until a scheduler answers
_THREADS = 2 * (os.cpu_count() or 1)  # a task encodes a shard, then waits for the disk

#: Called with the number of tasks done, one call at a time.
Report = Callable[[int], None]


def run(
    function: Callable[[Task, Shared], Result],
    tasks: Sequence[Task],
    shared: Shared,
    *,
    client: Any = None,
    report: Report | None = None,
) -> list[Result]:
    """``function(task, shared)`` for every task; the results in the order of the tasks.

    Parameters
    ----------
    function : named at the top of a module: on a cluster it is pickled, with the tasks, their results and ``shared``.
        It must bear being run twice for one task, also at once: a worker may die, or be thought dead.
    client : a ``dask.distributed.Client``. Without one, the Dask scheduler that is set (an open client, or
        ``dask.config.set(scheduler=...)``), else Dask's threads; where Dask is not installed, threads of our own.

    Notes
    -----
    The first error is raised; tasks that have not begun are dropped.
    """
    if not tasks:
        return []
    get = None
    if client is None and importlib.util.find_spec("dask") is not None:
        import dask.base
        import dask.config
        import dask.threaded

        get = dask.base.get_scheduler()  # type: ignore[no-untyped-call]
        if get is None:
            get = partial(dask.threaded.get, num_workers=dask.config.get("num_workers", _THREADS))
        owner = getattr(get, "__self__", None)  # an open client sets its own method as the scheduler
        client = owner if hasattr(owner, "submit") else None
    if client is not None:
        return _on_cluster(function, tasks, shared, client, report)
    calls = [partial(function, task, shared) for task in tasks]
    counted = _Counted(report)
    if get is not None:
        graph = {("trajstore", i): (partial(counted, call),) for i, call in enumerate(calls)}
        return list(get(graph, list(graph)))
    with ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(counted, call) for call in calls]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """A client of the Dask scheduler at an address; ``None`` without one.

    Raises ``NotFoundError`` if nothing answers there, ``MissingDependencyError`` if Dask is not installed.
    """
    if address is None:
        yield None
        return
    distributed = optional("distributed", "dask")
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:  # a client that reaches nobody takes a minute to give up
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except (OSError, ValueError) as error:
        raise NotFoundError(f"no Dask scheduler answers at {address}: {error}", hint="tcp://HOST:PORT") from error
    with distributed.Client(address, set_as_default=False) as client:
        yield client


class _Counted:
    """Runs calls and reports how many are done."""

    def __init__(self, report: Report | None) -> None:
        self._report = report
        self._done = 0
        self._guard = threading.Lock()

    def __call__(self, call: Callable[[], Any]) -> Any:
        result = call()
        if self._report is not None:
            with self._guard:
                self._done += 1
                self._report(self._done)
        return result

    def __reduce__(self) -> Any:  # to another process: its count would be nobody's
        return _Counted, (None,)


def _on_cluster(function: Any, tasks: Sequence[Any], shared: Any, client: Any, report: Report | None) -> list[Any]:
    from distributed import as_completed

    # A task's result, not scattered data: that would be lost with the worker that holds it.
    common = client.submit(pickle.loads, pickle.dumps(shared), pure=False)
    futures = client.map(_call, [(function, task) for task in tasks], shared=common, pure=False)
    try:
        for done, future in enumerate(as_completed(futures, loop=client.loop), 1):  # type: ignore[no-untyped-call]
            future.result()
            if report is not None:
                report(done)
        return [future.result() for future in futures]
    finally:
        client.cancel([future for future in futures if not future.done()])


def _call(call: tuple[Any, Any], shared: Any) -> Any:
    function, task = call
    return function(task, shared)
