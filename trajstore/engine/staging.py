"""Trajectories whose rows are still on their way from a device: the caller goes on, the order stays."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trajstore.engine import device
from trajstore.errors import QueueFullError, StateError, TrajstoreError

_POLL = 0.001


@dataclass
class _Staged:
    fields: dict[str, Any]
    columns: Mapping[str, Any]
    transfer: device.Transfer
    nbytes: int


class Staging:
    """Takes trajectories as their tensors are, and appends them once their bytes are in host memory.

    Parameters
    ----------
    append : stores one trajectory; called in this object's thread, one at a time, in the order of ``put``.
    limit : bytes on their way at once; one trajectory may be larger.

    Attributes
    ----------
    count : trajectories on their way. keys : what ``put`` was given as their keys.
    stalled : seconds for which callers have waited.
    """

    def __init__(self, append: Callable[[Mapping[str, Any], Mapping[str, Any]], Any], limit: int) -> None:
        self.limit = limit
        self.count = 0
        self.stalled = 0.0
        self.keys: set[int] = set()
        self._nbytes = 0
        self._append = append
        self._backend: device.Backend = device.Cuda()
        self._waiting: deque[tuple[_Staged, int | None]] = deque()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="trajstore-staging", daemon=True)
        self._thread.start()

    def has_room(self, nbytes: int) -> bool:
        return not self._nbytes or self._nbytes + nbytes <= self.limit

    def put(self, fields: Mapping[str, Any], columns: Mapping[str, Any], key: int | None) -> None:
        """Start the copies of a trajectory's tensors; it is appended after all that were put before it.

        What is not on a device must belong to nobody else. Waits for room where there is none.
        """
        self.check()
        sources = {path: value for path, value in fields.items() if device.on_device(value)}
        nbytes = sum(value.element_size() * value.nelement() for value in sources.values())
        if not self.has_room(nbytes):
            begun = time.monotonic()
            while not self.has_room(nbytes) and self._failure is None:
                time.sleep(_POLL)
            self.stalled += time.monotonic() - begun
            self.check()
        targets = {path: self._backend.pinned(tuple(value.shape), value.dtype) for path, value in sources.items()}
        transfer = device.Transfer(self._backend, list(sources.values()), list(targets.values()))
        staged = _Staged({**fields, **targets}, columns, transfer, nbytes)  # bfloat16 stays a tensor: an array has none
        with self._changed:
            self.count += 1
            self._nbytes += nbytes
            if key is not None:
                self.keys.add(key)
            self._waiting.append((staged, key))
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting:
                    return
                staged, key = self._waiting.popleft()
            try:
                staged.transfer.wait()
                self._append_patiently(staged)
            except BaseException as error:
                self._failure = error
                return
            with self._changed:
                self.count -= 1
                self._nbytes -= staged.nbytes
                if key is not None:
                    self.keys.discard(key)

    def _append_patiently(self, staged: _Staged) -> None:
        while True:
            try:
                self._append(staged.fields, staged.columns)
                return
            except QueueFullError:
                if self._closing:
                    raise
                time.sleep(_POLL)

    def check(self) -> None:
        """Raise what failed in the background: trajectories put since then are not stored."""
        if isinstance(self._failure, TrajstoreError):
            raise self._failure
        if self._failure is not None:
            raise StateError(f"a trajectory could not be copied from its device: {self._failure!r}") from self._failure

    # -- as the writer's other sources -----------------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was put is appended; takes no lock, for a signal's thread."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.count and self._failure is None:
            if deadline is not None and time.monotonic() > deadline:
                return False
            time.sleep(_POLL)
        if timeout is None:
            self.check()
        return not self.count

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self.abandon()

    def abandon(self) -> None:
        with self._changed:
            self._closing = True
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join()
