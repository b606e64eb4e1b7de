"""The memory that a state is copied into before it is written: allocated once, used again and again.

A fresh copy of 200 MB costs 55 to 67 ms in page faults, one into memory that is there 10.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from trajstore.checkpoint import tensors
from trajstore.checkpoint.record import CHUNK_BYTES, FlatArray, stored_dtype
from trajstore.checkpoint.tensors import Bytes
from trajstore.checkpoint.tree import Extent
from trajstore.errors import StateError

_ALIGN = 4096


@dataclass(frozen=True)
class Plan:
    """Where each extent goes: ``arrays`` and where each begins in the arena, ``places`` of the extents.

    places : for each extent the number of its array (-1 if it is empty) and its byte offset there.
    """

    arrays: tuple[FlatArray, ...]
    starts: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    size: int


def plan(extents: list[Extent]) -> Plan:
    """Lay extents end to end, an array for each section and dtype, in the order of their coming."""
    sizes: dict[tuple[str, str], int] = {}
    units: dict[tuple[str, str], int] = {}
    keys: list[tuple[tuple[str, str], int] | None] = []
    for extent in extents:
        if extent.size == 0:
            keys.append(None)
            continue
        key = (extent.section, extent.dtype)
        keys.append((key, sizes.get(key, 0)))
        sizes[key] = sizes.get(key, 0) + extent.size
        units[key] = extent.unit
    arrays, starts, size = [], [], 0
    numbers = {key: number for number, key in enumerate(sizes)}
    slugs = _slugs([section for section, _ in sizes])
    for (section, dtype), nbytes in sizes.items():
        unit = units[section, dtype]
        chunk = min(CHUNK_BYTES // unit, nbytes // unit)
        name = f"{slugs[section]}.{dtype}"
        arrays.append(FlatArray(name, section, dtype, stored_dtype(dtype, unit), nbytes // unit, chunk))
        starts.append(size)
        size += -(-nbytes // _ALIGN) * _ALIGN
    places = tuple((-1, 0) if key is None else (numbers[key[0]], key[1]) for key in keys)
    return Plan(tuple(arrays), tuple(starts), places, size)


def _slugs(sections: list[str]) -> dict[str, str]:
    """A name for each section that is safe as a file name and differs also where case does not count."""
    slugs: dict[str, str] = {}
    taken: set[str] = set()
    for section in sections:
        if section in slugs:
            continue
        slug = section
        plain = slug.isascii() and slug.replace("_", "").replace("-", "").isalnum() and slug[0].isalnum()
        if not plain or len(slug) > 60 or slug.lower() in taken:
            slug = f"section-{len(slugs)}"
        slugs[section] = slug
        taken.add(slug.lower())
    return slugs


class Arena:
    """A host buffer for one staged state; page-locked once a CUDA tensor is to go into it."""

    def __init__(self) -> None:
        self._memory: Bytes = np.empty(0, np.uint8)
        self._pinned: Any = None

    @property
    def size(self) -> int:
        return self._memory.size

    @property
    def address(self) -> int:
        return self._memory.ctypes.data

    def prepare(self, size: int, *, pinned: bool) -> None:
        """Make room for ``size`` bytes, and touch them."""
        if size <= self._memory.size and (self._pinned is not None or not pinned):
            return
        if pinned:
            self._pinned = sys.modules["torch"].empty(size, dtype=sys.modules["torch"].uint8, pin_memory=True)
            self._memory = self._pinned.numpy()
        else:
            self._pinned = None
            self._memory = np.zeros(0, np.uint8)  # let the smaller one go first
            self._memory = np.empty(size, np.uint8)
            self._memory[::_ALIGN] = 0

    def view(self, start: int, stop: int) -> Bytes:
        return self._memory[start:stop]

    def device_view(self, start: int, stop: int) -> Any:
        """The same as a tensor, page-locked if :meth:`prepare` made it so."""
        if self._pinned is not None:
            return self._pinned[start:stop]
        return sys.modules["torch"].from_numpy(self._memory[start:stop])


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
