"""A sum tree: numbers drawn in proportion to priorities that change all the time; batched, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from trajstore.errors import SchemaError, StateError

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


class SumTree:
    """A complete binary tree over ``size`` leaves; each node is the sum of its two children.

    Updating or finding m leaves costs O(m log size), in log size NumPy calls. A parent is always added up anew from
    its children, so rounding errors do not gather over time. Not locked.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise SchemaError(f"a sum tree of {size} leaves")
        self.size = size
        self._depth = (size - 1).bit_length()
        self._first = 1 << self._depth
        self._nodes = np.zeros(2 * self._first, np.float64)

    @property
    def total(self) -> float:
        return float(self._nodes[1])

    def __len__(self) -> int:
        return self.size

    def get(self, leaves: Ints) -> Floats:
        return self._nodes[self._first + leaves]

    def set(self, leaves: Ints, priorities: Any) -> None:
        """Set priorities; of a leaf named twice, the last one counts. Raises ``SchemaError`` for a negative one."""
        leaves = np.asarray(leaves, np.int64)
        values = np.broadcast_to(np.asarray(priorities, np.float64), leaves.shape)
        if not np.isfinite(values).all() or bool((values < 0).any()):
            raise SchemaError("a priority is a finite number, 0 or more")
        if len(leaves) and not (int(leaves.min()) >= 0 and int(leaves.max()) < self.size):
            raise SchemaError(f"there are {self.size} leaves, and priorities for others are given")
        self._nodes[self._first + leaves] = values
        in_order = bool((leaves[1:] >= leaves[:-1]).all())
        nodes = _halved(self._first + (leaves if in_order else np.sort(leaves)))
        for _ in range(self._depth):
            self._nodes[nodes] = self._nodes[2 * nodes] + self._nodes[2 * nodes + 1]
            nodes = _halved(nodes)

    def find(self, places: Floats) -> Ints:
        """The leaf in which each place falls, when all priorities are laid end to end from 0 to ``total``.

        Leaves of priority 0 are never found. Raises ``StateError`` if there is no other.
        """
        if not self.total > 0:
            raise StateError("every priority is 0: nothing can be drawn")
        places = np.array(places, np.float64)
        nodes = np.ones(len(places), np.int64)
        for _ in range(self._depth):
            nodes *= 2
            left = self._nodes[nodes]
            # Rounding may carry a place beyond the last priority; an empty branch is never entered.
            right = (places >= left) & (self._nodes[nodes + 1] > 0)
            places -= np.where(right, left, 0.0)
            nodes += right
        return nodes - self._first

    def before(self, leaf: int) -> float:
        """The sum of the priorities of the leaves below ``leaf``."""
        node, below = self._first + leaf, 0.0
        if leaf >= self._first:
            return self.total
        while node > 1:
            if node & 1:
                below += float(self._nodes[node - 1])
            node >>= 1
        return below


class PriorityRing:
    """Priorities of slots, which only ever grow in number, in a sum tree used as a ring."""

    def __init__(self) -> None:
        self._tree = SumTree(1 << 10)

    def make_room(self, low: int, high: int) -> None:
        """Have a leaf for each slot of ``[low, high)``."""
        size = self._tree.size
        while size < high - low:
            size *= 2
        if size == self._tree.size:
            return
        larger = SumTree(size)
        slots = np.arange(low, low + self._tree.size)
        larger.set(slots % size, self.get(slots))
        self._tree = larger

    def set(self, slots: Ints, values: Any) -> None:
        self._tree.set(slots % self._tree.size, values)

    def get(self, slots: Ints) -> Floats:
        return self._tree.get(slots % self._tree.size)

    def _edges(self, low: int, high: int) -> tuple[float, float]:
        tree = self._tree
        first, last = tree.before(low % tree.size), tree.before((high - 1) % tree.size + 1)
        return first, last if low % tree.size <= (high - 1) % tree.size else last + tree.total

    def mass(self, low: int, high: int) -> float:
        """The sum of the priorities of slots ``[low, high)``."""
        first, last = self._edges(low, high)
        return last - first

    def draw(self, places: Floats, low: int, high: int) -> Ints:
        """Slots of ``[low, high)`` at places from 0 to 1 of their priorities laid end to end."""
        if not len(places):
            return np.empty(0, np.int64)
        first, last = self._edges(low, high)
        if not last > first:
            raise StateError("every priority is 0: nothing can be drawn")
        at = first + places * (last - first)
        total = self._tree.total
        leaves = self._tree.find(np.where(at >= total, at - total, at))
        # Rounding may step over an edge by one leaf.
        found: Ints = low + np.minimum((leaves - low) % self._tree.size, high - low - 1)
        return found


def _halved(nodes: Ints) -> Ints:
    """The parents of ascending nodes, each once (np.unique hashes them, which takes longer)."""
    parents = nodes >> 1
    return parents[np.flatnonzero(np.diff(parents, prepend=-1))]
