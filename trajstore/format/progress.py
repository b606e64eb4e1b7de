"""How far a collection has come: its target, the seeds attempted and completed, and the caller's own state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from trajstore.errors import SchemaError
from trajstore.format import typedjson
from trajstore.format.intervals import IntervalBuilder, IntervalSet


class Progress:
    """Mutable while a writer is open; each commit stores a copy with the data it belongs to.

    target : how many trajectories are wanted, or ``None``.
    attempted : seeds that need not be tried again, whether they yielded a trajectory or not.
    completed : seeds that a stored trajectory has.
    state : anything of the caller's that JSON (docs/spec.md, "Tagged JSON") can hold.
    """

    def __init__(
        self, target: int | None, attempted: IntervalSet, completed: IntervalSet, state: dict[str, Any]
    ) -> None:
        self.target = target
        self.attempted = IntervalBuilder(attempted)
        self.completed = IntervalBuilder(completed)
        self.state = state
        self.version = 0

    def to_json(self) -> dict[str, Any]:
        return {"target": self.target, "state": json.loads(typedjson.dumps(self.state))}

    @staticmethod
    def state_from_json(value: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
        target = value.get("target")
        state = typedjson.loads(json.dumps(value.get("state", {})).encode())
        return (target if isinstance(target, int) else None), state if isinstance(state, dict) else {}

    def attempt(self, seeds: Any, *, completed: bool = False) -> None:
        """Mark seeds (an int, a range or an array of them) as attempted, and as completed if asked."""
        if isinstance(seeds, (int, np.integer)):
            self.attempted.add(int(seeds))
            if completed:
                self.completed.add(int(seeds))
        else:
            found = IntervalSet.span(seeds.start, seeds.stop) if _is_plain(seeds) else IntervalSet.of(seeds)
            self.attempted.update(found)
            if completed:
                self.completed.update(found)
        self.version += 1

    def remaining(self, seeds: range) -> IntervalSet:
        """The seeds of a range that were not attempted."""
        if seeds.step < 1:
            raise SchemaError(f"{seeds!r} does not ascend")
        wanted = IntervalSet.span(seeds.start, seeds.stop) if seeds.step == 1 else IntervalSet.of(seeds)
        return wanted - self.attempted.freeze()


def _is_plain(seeds: Any) -> bool:
    return isinstance(seeds, range) and seeds.step == 1
