"""Copying a state into an arena: at once, or, of what only an optimizer changes, while the loop goes on."""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from trajstore.checkpoint import tensors
from trajstore.checkpoint.arena import Arena, Plan, Planner
from trajstore.checkpoint.freezing import Freezing, Frozen, NotFrozen, Owned
from trajstore.checkpoint.rng import Drawn, as_tree
from trajstore.checkpoint.tensors import Snapshots
from trajstore.checkpoint.tree import Extent, Flattening
from trajstore.errors import StateError


def copy_into(arena: Arena, extents: list[Extent], layout: Plan) -> list[Any]:
    """Copy each extent to its place. What lies on a device is only queued, behind whatever the device was told before.

    Returns the events to be waited for until all of it is there.
    """
    devices = set()
    base = arena.address
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
        elif extent.address:
            ctypes.memmove(base + target, extent.address + extent.start, size)  # lets other threads run
        elif size:
            source = tensors.storage_bytes(extent.source, extent.start, extent.start + size)
            arena.device_view(target, target + size).copy_(source, non_blocking=source.is_cuda)
            if source.is_cuda:
                devices.add(source.device)
    return [_event(device) for device in devices]


def copy_now(arena: Arena, extents: list[Extent], layout: Plan) -> None:
    """The same, and wait until all of it is there."""
    for event in copy_into(arena, extents, layout):
        event.synchronize()


def _event(device: Any) -> Any:
    torch = sys.modules["torch"]
    with torch.cuda.device(device):
        event = torch.cuda.Event()
        event.record()
    return event


class Staging:
    """The copy of a state and of generators' states into an arena, made by whoever asks for it first.

    Parameters
    ----------
    state : a frozen one, unless the copy is made before anything in it can change.
    planner : lays out the arena; from save to save the plan is the same.

    Attributes
    ----------
    node, rng, extents, layout : what was copied, and where it lies.
    """

    node: Any
    rng: Any
    extents: list[Extent]
    layout: Plan

    def __init__(self, frozen: Frozen, rng: Drawn | None, arena: Arena, planner: Planner, snapshots: Snapshots) -> None:
        self._frozen: Frozen | None = frozen
        self._rng = rng
        self._arena = arena
        self._planner = planner
        self._snapshots = snapshots
        self._lock = threading.Lock()
        self._events: list[Any] = []
        self._error: BaseException | None = None

    def finish(self) -> None:
        """Make the copy unless it is made. Whoever comes first makes it, the other waits. Its errors wait too."""
        with self._lock:
            frozen, self._frozen = self._frozen, None
            if frozen is None:
                return
            try:
                self._copy(frozen)
            except Exception as error:
                self._error = error
            except BaseException as error:  # of the thread that came first: it is to see it now
                self._error = error
                raise
            finally:
                if frozen.memory is not None:
                    self._snapshots.release(frozen.memory)

    def wait(self) -> None:
        """Until everything lies in the arena.

        Raises ``SchemaError`` for what a checkpoint does not hold, ``StateError`` if a tensor that was to be copied
        later has changed before.
        """
        self.finish()
        for event in self._events:
            event.synchronize()
        self.check()

    def check(self) -> None:
        """Raise what went wrong."""
        if self._error is not None:
            raise self._error

    def _copy(self, frozen: Frozen) -> None:
        flat = Flattening(frozen.state)
        self.rng = flat.add("rng", as_tree(self._rng)) if self._rng is not None else None
        self.node, self.extents = flat.node, flat.finish()
        self.layout = self._planner.plan(self.extents)
        self._arena.prepare(self.layout.size, pinned=on_cuda(self.extents))
        self._events = copy_into(self._arena, self.extents, self.layout)
        changed = frozen.changed()
        if changed is not None:
            raise StateError(
                f"a tensor of section {changed!r} was changed in place between save() and the optimizer's next step",
                hint="change it before save() or after step(), or leave its optimizer out of stage_lazily()",
            )


def on_cuda(extents: list[Extent]) -> bool:
    """Whether any of the extents lies on a CUDA device."""
    return any(extent.storage and not extent.address and extent.source.is_cuda for extent in extents)


class Optimizers:
    """The torch optimizers whose tensors are copied after the save has returned, and the copies that are still due.

    Parameters
    ----------
    deferred : a stretch of the loop in which no signal's handler runs: it would wait for the copy that it cut off.
    """

    def __init__(self, deferred: Callable[[], AbstractContextManager[None]], snapshots: Snapshots) -> None:
        self._deferred = deferred
        self._hooks: list[tuple[Any, Any]] = []
        self._owned: tuple[int, Owned | None] = (-1, None)
        self._snapshots = snapshots
        self._due: deque[Staging] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def add(self, optimizer: Any) -> None:
        """From now on, this optimizer's ``step()`` waits for the copies that are due."""
        if not self._hooks:
            threading.Thread(target=_stage, args=(weakref.ref(self), self._changed), daemon=True).start()
        self._hooks.append((optimizer, optimizer.register_step_pre_hook(lambda *_: self.finish_in_loop())))
        self._owned = (-1, None)

    def freeze(self, state: Any) -> Frozen | None:
        """The state as something to be copied later; ``None`` where it must be copied at once."""
        if not self._hooks:
            return None
        try:
            owned = self._now_owned()
            return Freezing(state, owned, self._snapshots).frozen if owned else None
        except NotFrozen:
            return None

    def _now_owned(self) -> Owned:
        count = sum(len(optimizer.state) + len(optimizer.param_groups) for optimizer, _ in self._hooks)
        before, owned = self._owned
        if owned is None or count != before or not owned.still():
            owned = Owned([tensor for optimizer, _ in self._hooks for tensor in _tensors_of(optimizer)])
            self._owned = (count, owned)
        return owned

    def due(self, staging: Staging) -> None:
        """Have a copy made as soon as may be."""
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
