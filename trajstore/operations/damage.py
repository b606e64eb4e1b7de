"""What a verification found: damage, each with the trajectories and rows that it takes away."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]


def _no_trajectories() -> Ints:
    return np.empty(0, np.int64)


def _no_rows() -> Ints:
    return np.empty((0, 2), np.int64)


@dataclass(frozen=True, eq=False)
class Damage:
    """One thing that is not as it was committed.

    kind : ``manifest``, ``set``, ``seals``, ``missing``, ``short``, ``checksum``, ``index``, ``chunk``, ``lost``,
        ``unreadable``, ``clock``, ``table``, ``count``, ``value`` or ``metadata`` (docs/verify.md).
    store : the store's place. file : key of the file in the store, ``""`` where it is no single file.
    field : path of the field that is hit; ``""`` where no field's rows are.
    column, clock : likewise, of a column's values or a clock's pairs.
    rows : half-open rows of the array that cannot be trusted.
    trajectories : int64 (n,), numbers of the trajectories that are hit, as ``trajstore.open(store)`` counts them.
    spans : int64 (n, 2), the half-open rows of each of those trajectories that are hit; zeros where it is no field.
    message : what is wrong, without the place.
    """

    kind: str
    store: str
    file: str
    message: str
    field: str = ""
    column: str = ""
    clock: str = ""
    rows: tuple[int, int] = (0, 0)
    trajectories: Ints = dataclasses.field(default_factory=_no_trajectories)
    spans: Ints = dataclasses.field(default_factory=_no_rows)

    @property
    def what(self) -> str:
        """The field, column or clock, in words."""
        for kind, name in (("field", self.field), ("column", self.column), ("clock", self.clock)):
            if name:
                return f"{kind} {name}"
        return self.kind

    def lines(self) -> list[str]:
        """One line for each trajectory that is hit: ``trajectory 17, field obs, rows 12..20, file …: message``."""
        place = f"file {self.file}: {self.message}" if self.file else self.message
        if not len(self.trajectories):
            return [f"{self.what}, {place}"]
        if not self.field:
            return [f"trajectory {number}, {self.what}, {place}" for number in self.trajectories.tolist()]
        return [
            f"trajectory {number}, {self.what}, rows {start}..{stop}, {place}"
            for number, (start, stop) in zip(self.trajectories.tolist(), self.spans.tolist())
        ]


@dataclass(frozen=True, eq=False)
class StoreReport:
    """What the verification of one store found.

    commit : number of the commit that was verified, ``None`` where the manifest cannot be read.
    trajectories, steps : not deleted; steps that could be counted.
    files, bytes, chunks : shard files, their committed bytes and their chunks that were checked.
    orphans, temporaries : files that no commit names, and what was cut off while being written; neither is damage.
    """

    store: str
    commit: int | None
    trajectories: int
    steps: int
    files: int
    bytes: int
    chunks: int
    damages: tuple[Damage, ...]
    orphans: int = 0
    orphan_bytes: int = 0
    temporaries: int = 0
    temporary_bytes: int = 0

    @property
    def ok(self) -> bool:
        return not self.damages

    @property
    def damaged_trajectories(self) -> Ints:
        """Numbers of the trajectories that are not whole, ascending."""
        found = [damage.trajectories for damage in self.damages]
        return np.unique(np.concatenate(found)) if found else _no_trajectories()

    def damaged_rows(self) -> dict[str, list[tuple[int, int]]]:
        """By field, the half-open rows of its array that cannot be trusted, ascending and joined."""
        joined: dict[str, list[tuple[int, int]]] = {}
        for damage in sorted(self.damages, key=lambda damage: damage.rows):
            if damage.field and damage.rows[0] < damage.rows[1]:
                ranges = joined.setdefault(damage.field, [])
                start, stop = damage.rows
                if ranges and start <= ranges[-1][1]:
                    ranges[-1] = (ranges[-1][0], max(stop, ranges[-1][1]))
                else:
                    ranges.append((start, stop))
        return joined


@dataclass(frozen=True, eq=False)
class Report:
    """What a verification found, store by store. deep : whether every chunk was decoded too."""

    stores: tuple[StoreReport, ...]
    deep: bool

    @property
    def ok(self) -> bool:
        return all(store.ok for store in self.stores)
