"""The memory that a state is copied into before it is written: allocated once, used again and again.

A fresh copy of 200 MB costs 55 to 67 ms in page faults, one into memory that is there 10.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from trajstore.checkpoint.record import CHUNK_BYTES, FlatArray, stored_dtype
from trajstore.checkpoint.tensors import Bytes
from trajstore.checkpoint.tree import Extent

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


class Planner:
    """Plans the arena of one save after the other; where the same extents come again, the plan is the one before."""

    def __init__(self) -> None:
        self._last: tuple[Any, Plan] = (None, Plan((), (), (), 0))

    def plan(self, extents: list[Extent]) -> Plan:
        key = [(extent.section, extent.dtype, extent.stop - extent.start) for extent in extents]
        before, layout = self._last
        if key != before:
            layout = plan(extents)
            self._last = (key, layout)
        return layout


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
