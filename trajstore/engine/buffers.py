"""Memory for rows that wait to be encoded, used again and again, and touched before the caller writes to it."""

from __future__ import annotations

import threading
from collections import defaultdict
from concurrent.futures import Executor
from typing import Any

import numpy as np

Buffer = np.ndarray[Any, np.dtype[np.uint8]]

#: The size that is made ahead, and the largest that comes from a slab.
BLOCK_BYTES = 1 << 20
_BLOCKS = 4  # in a slab: NumPy asks for huge pages from 4 MiB on
_AHEAD = 3  # blocks that are kept ready, once one was asked for
_PAGE = 4096


class Buffers:
    """Buffers by size; blocks of ``BLOCK_BYTES`` are cut from slabs that another thread makes ahead.

    Notes
    -----
    The first write to a page costs as much as several later ones, more so on a virtual machine, and whoever appends
    would wait for it. What was taken once is kept for the writer's life: as much as its queue once held.
    """

    def __init__(self, background: Executor) -> None:
        self._background = background
        self._spare: defaultdict[int, list[Buffer]] = defaultdict(list)
        self._making = False
        self._guard = threading.Lock()

    def take(self, nbytes: int) -> Buffer:
        """Uninitialised memory, uint8 of at least ``nbytes``."""
        blocks = BLOCK_BYTES // 2 < nbytes <= BLOCK_BYTES
        size = BLOCK_BYTES if blocks else nbytes
        with self._guard:
            spare = self._spare[size]
            found = spare.pop() if spare else None
            make = blocks and len(spare) < _AHEAD and not self._making
            self._making |= make
        if make:
            try:
                self._background.submit(self._make_ahead)
            except RuntimeError:  # the writer is closing
                self._making = False
        if found is not None:
            return found
        if not blocks:
            return np.empty(nbytes, np.uint8)
        first, *others = _cut(np.empty(_BLOCKS * BLOCK_BYTES, np.uint8))
        self._keep(others)
        return first

    def give(self, buffer: Buffer) -> None:
        """Take back what nobody reads any more."""
        self._keep([buffer])

    def _keep(self, buffers: list[Buffer]) -> None:
        with self._guard:
            self._spare[buffers[0].nbytes] += buffers

    def _make_ahead(self) -> None:
        try:
            slab = np.empty(_BLOCKS * BLOCK_BYTES, np.uint8)
            slab[::_PAGE] = 0
            self._keep(_cut(slab))
        finally:
            self._making = False


def _cut(slab: Buffer) -> list[Buffer]:
    return [slab[start : start + BLOCK_BYTES] for start in range(0, slab.nbytes, BLOCK_BYTES)]
