"""How far a collection has come: its target, the seeds attempted and completed, and the caller's own state."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from trajstore.errors import SchemaError
from trajstore.format import typedjson
from trajstore.format.arguments import check_count
from trajstore.format.intervals import IntervalBuilder, IntervalSet

_TRIES = 8


class State(dict[str, Any]):
    """Values of the caller's own, by name.

    What JSON (docs/spec.md, "Tagged JSON") cannot hold is refused where it is given, with a ``SchemaError`` that says
    where in the value it lies; what is put into a value later is looked at when it is stored.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        if not isinstance(values, Mapping):
            raise SchemaError(f"the writer's state is a dict, not {type(values).__name__}", hint="name your values")
        self.update(values)

    def __setitem__(self, key: str, value: Any) -> None:
        _encoded({key: value})
        super().__setitem__(key, value)

    def update(self, *values: Any, **named: Any) -> None:
        given = dict(*values, **named)
        _encoded(given)
        super().update(given)

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def __ior__(self, values: Any) -> State:  # type: ignore[override,misc]  # of dict, it takes pairs as well
        self.update(values)
        return self

    def encoded(self) -> bytes:
        """All of it as one JSON document. Raises ``SchemaError``."""
        for left in reversed(range(_TRIES)):
            try:
                return _encoded(dict(self))
            except RuntimeError:  # a dict or set in it has changed meanwhile, in another thread
                if not left:
                    raise
        raise AssertionError


def _encoded(values: dict[str, Any]) -> bytes:
    try:
        return typedjson.dumps(values)
    except SchemaError as error:
        raise SchemaError(f"the writer's state cannot be stored: {error.message}", hint=error.hint) from None


class Progress:
    """Mutable while a writer is open; each commit stores a copy with the data it belongs to.

    target : how many trajectories are wanted, or ``None``.
    attempted : seeds that need not be tried again, whether they yielded a trajectory or not.
    completed : seeds that a stored trajectory has.
    state : anything of the caller's that JSON can hold.
    """

    def __init__(
        self, target: int | None, attempted: IntervalSet, completed: IntervalSet, state: Mapping[str, Any]
    ) -> None:
        self.target = target
        self.attempted = IntervalBuilder(attempted)
        self.completed = IntervalBuilder(completed)
        self.state = State(state)

    @property
    def target(self) -> int | None:
        return self._target

    @target.setter
    def target(self, value: int | None) -> None:
        if value is not None:
            check_count("a target is a number of trajectories, and this one", value)
        self._target = None if value is None else operator.index(value)

    @staticmethod
    def to_json(target: int | None, state: bytes) -> dict[str, Any]:
        """What the manifest says of a target and an encoded state."""
        return {"target": target, "state": json.loads(state)}

    @staticmethod
    def state_from_json(value: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
        target = value.get("target")
        state = typedjson.loads(json.dumps(value.get("state", {})).encode())
        return (max(target, 0) if isinstance(target, int) else None), state if isinstance(state, dict) else {}

    def attempt(self, seeds: Any, *, completed: bool = False) -> None:
        """Mark seeds (an int, a range or an array of them) as attempted, and as completed if asked."""
        if isinstance(seeds, (int, np.integer)):
            self.attempted.add(int(seeds))
            if completed:
                self.completed.add(int(seeds))
        else:
            try:
                found = IntervalSet.span(seeds.start, seeds.stop) if _is_plain(seeds) else IntervalSet.of(seeds)
            except TypeError:
                raise SchemaError(f"seeds are whole numbers, not {seeds!r:.60}") from None
            self.attempted.update(found)
            if completed:
                self.completed.update(found)

    def remaining(self, seeds: range) -> IntervalSet:
        """The seeds of a range that were not attempted."""
        if not isinstance(seeds, range):
            raise SchemaError(f"seeds come from a range, not from {seeds!r:.60}", hint="range(0, 1000), say")
        if seeds.step < 1:
            raise SchemaError(f"{seeds!r} does not ascend")
        wanted = IntervalSet.span(seeds.start, seeds.stop) if seeds.step == 1 else IntervalSet.of(seeds)
        return wanted - self.attempted.freeze()


def _is_plain(seeds: Any) -> bool:
    return isinstance(seeds, range) and seeds.step == 1
