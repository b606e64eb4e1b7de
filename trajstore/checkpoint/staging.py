"""Copying a state into an arena: at once, or, of what only an optimizer changes, while the loop goes on."""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from trajstore.checkpoint import tensors
from trajstore.checkpoint.arena import Arena, Plan
from trajstore.checkpoint.tree import Extent
from trajstore.errors import StateError


@dataclass(slots=True)
class _Copy:
    target: int
    size: int
    address: int  # of the source on the host; 0 where it lies on a device
    extent: Extent


class Staging:
    """The copies that bring a state into an arena: at once, or some of them later.

    Parameters
    ----------
    lazy : storages whose extents may be copied later, until :meth:`finish`: those that nothing but an optimizer's
        step changes.
    """

    def __init__(self, extents: list[Extent], layout: Plan, arena: Arena, lazy: frozenset[int]) -> None:
        self._arena = arena
        self._base = arena.address
        self._later: list[tuple[_Copy, int]] = []
        self._lock = threading.Lock()
        self._events: list[Any] = []
        self._error: BaseException | None = None
        now: list[_Copy] = []
        for extent, (number, offset) in zip(extents, layout.places):
            if number < 0:
                continue
            target = layout.starts[number] + offset
            # An extent is whole elements; a storage that other dtypes share may end within the last one.
            size = min(extent.stop, extent.limit) - extent.start
            if size < extent.size:
                arena.view(target + size, target + extent.size)[:] = 0
            if isinstance(extent.source, bytes):
                arena.view(target, target + size)[:] = np.frombuffer(extent.source, np.uint8)
                continue
            copy = _Copy(target, size, extent.address and extent.address + extent.start, extent)
            # What lies on a device is only queued here: the device copies it before whatever it is told next.
            if extent.address and extent.storage in lazy:
                self._later.append((copy, extent.source._version))
            else:
                now.append(copy)
        self._run(now)

    def finish(self) -> None:
        """Make the copies that are left. Whoever comes first makes them, the other waits. Raises nothing."""
        with self._lock:
            later, self._later = self._later, []
            self._run([copy for copy, _ in later])
            for copy, version in later:
                if copy.extent.source._version != version:
                    self._error = StateError(
                        f"a tensor of section {copy.extent.section!r} was changed in place between save() and the "
                        "optimizer's next step",
                        hint="change it before save() or after step(), or leave its optimizer out of stage_lazily()",
                    )

    def wait(self) -> None:
        """Until everything lies in the arena. Raises ``StateError`` if a lazily copied tensor changed before."""
        self.finish()
        for event in self._events:
            event.synchronize()
        if self._error is not None:
            raise self._error

    def _run(self, copies: list[_Copy]) -> None:
        devices = set()
        for copy in copies:
            if copy.address:
                ctypes.memmove(self._base + copy.target, copy.address, copy.size)  # lets other threads run
            elif copy.size:
                start = copy.extent.start
                source = tensors.storage_bytes(copy.extent.source, start, start + copy.size)
                target = self._arena.device_view(copy.target, copy.target + copy.size)
                target.copy_(source, non_blocking=source.is_cuda)
                if source.is_cuda:
                    devices.add(source.device)
        for device in devices:
            torch = sys.modules["torch"]
            with torch.cuda.device(device):
                event = torch.cuda.Event()
                event.record()
            self._events.append(event)


class Optimizers:
    """The torch optimizers whose tensors are copied after the save has returned, and the copies that are still due.

    Parameters
    ----------
    deferred : a stretch of the loop in which no signal's handler runs: it would wait for the copy that it cut off.
    """

    def __init__(self, deferred: Callable[[], AbstractContextManager[None]]) -> None:
        self._deferred = deferred
        self._hooks: list[tuple[Any, Any]] = []
        self._owned: tuple[int, frozenset[int], Any] = (-1, frozenset(), None)
        self._due: deque[Staging] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def add(self, optimizer: Any) -> None:
        """From now on, this optimizer's ``step()`` waits for the copies that are due."""
        if not self._hooks:
            threading.Thread(target=_stage, args=(weakref.ref(self), self._changed), daemon=True).start()
        self._hooks.append((optimizer, optimizer.register_step_pre_hook(lambda *_: self.finish_in_loop())))
        self._owned = (-1, frozenset(), None)

    def storages(self) -> frozenset[int]:
        """The storages that nothing but these optimizers' steps changes."""
        if not self._hooks:
            return frozenset()
        count = sum(len(optimizer.state) + len(optimizer.param_groups) for optimizer, _ in self._hooks)
        if count != self._owned[0]:
            owned = [tensor for optimizer, _ in self._hooks for tensor in _tensors_of(optimizer)]
            # The tensors are kept, so that no other storage can come to bear the key of one of theirs.
            self._owned = (count, frozenset(map(tensors.storage_key, owned)), owned)
        return self._owned[1]

    def due(self, staging: Staging) -> None:
        """Have the rest of a staging copied as soon as may be."""
        if self._hooks:
            with self._changed:
                self._due.append(staging)
                self._changed.notify_all()

    def finish(self) -> None:
        """Make every copy that is due, or wait for whoever makes it."""
        while True:
            with self._changed:
                if not self._due:
                    return
                staging = self._due[0]
            staging.finish()
            with self._changed:
                if self._due and self._due[0] is staging:
                    self._due.popleft()

    def finish_in_loop(self) -> None:
        """The same for the thread that trains."""
        with self._deferred():
            self.finish()

    def close(self) -> None:
        """Let go of the optimizers."""
        for _, hook in self._hooks:
            hook.remove()
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _stage(reference: weakref.ref[Optimizers], changed: threading.Condition) -> None:
    """The thread that copies what is due as soon as it can."""
    while True:
        owner = reference()
        if owner is None or owner._closed:
            return
        owner.finish()
        with changed:
            if not owner._due:
                del owner
                changed.wait(1.0)


def _tensors_of(optimizer: Any) -> list[Any]:
    found = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for values in optimizer.state.values():
        found += [value for value in values.values() if tensors.is_tensor(value)]
    return found
