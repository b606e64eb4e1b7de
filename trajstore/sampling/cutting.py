"""Cutting samples out of trajectories: from fields' rows, wherever they lie, to the arrays of a batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from trajstore.errors import NotFoundError, SchemaError
from trajstore.format.schema import Clock
from trajstore.sampling.windows import Bools, Ints, Window, returns_of_n_steps, ticks

Array = np.ndarray[Any, Any]

MASK, NEXT, DISCOUNT = "mask", "next", "discount"


class RowSource(Protocol):
    """Rows of one field of numbered trajectories.

    counts : rows of each trajectory, int64 (n,), -1 where it lacks the field. clock : how they lie against the steps.
    """

    shape: tuple[int, ...]

    @property
    def counts(self) -> Ints: ...

    @property
    def clock(self) -> Clock: ...

    def take(self, trajectories: Ints, rows: Ints) -> Array:
        """Row ``rows[i]`` of trajectory ``trajectories[i]``, (n, *shape)."""


Sources = Mapping[str, RowSource]


@dataclass(frozen=True)
class Transitions:
    """Samples that are single steps with what came of them.

    A batch holds each field at the step, (n, *shape), and: under ``reward``'s name the discounted sum of the rewards
    of up to ``n`` steps; ``next/<observation>`` the observation after them; ``discount`` what the value of that
    observation is multiplied by: ``discount ** steps``, 0 where the trajectory has terminated before.

    Parameters
    ----------
    observations : fields that are also given as they are after the step.
    reward, terminated : names of these fields.

    Notes
    -----
    Where observations have as many rows as steps (and not one more), the one after a truncated trajectory's last step
    was not recorded: returns stop before that step, which is no sample itself. After a termination none is needed.
    """

    observations: Sequence[str]
    n: int = 1
    discount: float = 0.99
    reward: str = "reward"
    terminated: str = "terminated"

    def __post_init__(self) -> None:
        names = self.observations
        object.__setattr__(self, "observations", (names,) if isinstance(names, str) else tuple(names))
        if self.n < 1:
            raise SchemaError(f"a return of {self.n} steps")

    @property
    def needed(self) -> tuple[str, ...]:
        return (*self.observations, self.reward, self.terminated)


Shape = Window | Transitions | None


class Cut:
    """How trajectories are cut into samples: windows, transitions, or (``None``) single steps."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.window = shape if isinstance(shape, Window) else Window()

    @property
    def reserved(self) -> tuple[str, ...]:
        """Names that fields cannot have."""
        return (NEXT, DISCOUNT) if isinstance(self.shape, Transitions) else (MASK,)

    @property
    def named(self) -> Collection[str]:
        """Fields that offsets or transitions name."""
        return self.shape.needed if isinstance(self.shape, Transitions) else self.window.offsets or ()

    def check(self, sources: Collection[str]) -> None:
        """Raise ``NotFoundError`` if offsets or transitions name a field that is not read."""
        for path in self.named:
            if path not in sources:
                raise NotFoundError(
                    f"there is no field {path!r} among those to read", hint="there are " + ", ".join(sources)
                )

    def usable(self, sources: Sources, lengths: Ints, trajectories: Ints) -> Ints:
        """Steps of these trajectories from which samples are cut, int64 (n,); 0 where a field is missing."""
        usable = lengths[trajectories].copy()
        for rows in sources.values():
            usable[rows.counts[trajectories] < 0] = 0
        shape = self.shape
        if isinstance(shape, Transitions) and not self.all_after(sources):
            there = np.flatnonzero(usable > 0)
            last = sources[shape.terminated].take(trajectories[there], usable[there] - 1)
            usable[there[~last.reshape(len(there), -1).any(1)]] -= 1
        return usable

    def all_after(self, sources: Sources) -> bool:
        """Whether the observation after the last step was recorded as well."""
        shape = self.shape
        return isinstance(shape, Transitions) and all(
            sources[path].clock.relation == "last_row_extra" for path in shape.observations
        )

    def counts(self, usable: Ints) -> Ints:
        """Samples of trajectories of so many usable steps."""
        return self.window.counts(usable)

    def read(
        self, sources: Sources, lengths: Ints, usable: Ints, trajectories: Ints, anchors: Ints
    ) -> dict[str, Array]:
        """Samples by trajectory and anchor step, by path.

        lengths, usable : of all trajectories. trajectories, anchors : of each sample, int64 (n,).
        """
        if isinstance(self.shape, Transitions):
            return self._transitions(self.shape, sources, lengths, usable, trajectories, anchors)
        return self._windows(sources, lengths[trajectories], trajectories, anchors)

    def _windows(self, sources: Sources, lengths: Ints, trajectories: Ints, anchors: Ints) -> dict[str, Array]:
        batch: dict[str, Array] = {}
        window = self.window
        known: dict[str | None, tuple[Ints, Bools]] = {}  # None: of the fields that have a row for each step
        for path, rows in sources.items():
            key = path if rows.clock.relation != "main" or path in (window.offsets or {}) else None
            if key not in known:
                known[key] = ticks(rows.clock, window.steps(path, anchors), lengths, rows.counts[trajectories])
            place, real = known[key]
            values = _take(rows, trajectories, place)
            if window.pad == "zero":
                values[~real] = 0
            if window.before or window.after:
                batch[f"{MASK}/{path}" if window.offsets else MASK] = real
            batch[path] = values[:, 0] if self.shape is None and place.shape[1] == 1 else values
        return batch

    def _transitions(
        self, shape: Transitions, sources: Sources, lengths: Ints, usable: Ints, trajectories: Ints, at: Ints
    ) -> dict[str, Array]:
        def read(path: str, steps: Ints) -> Array:
            """A field at steps (n, h) that exist: (n, h, *shape)."""
            rows = sources[path]
            place, _ = ticks(rows.clock, steps, lengths[trajectories], rows.counts[trajectories])
            return _take(rows, trajectories, place)

        steps = at[:, None] + np.arange(shape.n)
        limit = usable[trajectories][:, None]
        real, inside = steps < limit, np.minimum(steps, limit - 1)
        rewards = read(shape.reward, inside)
        ended = read(shape.terminated, inside).reshape(*inside.shape, -1)
        if rewards.size != inside.size:
            raise SchemaError(f"rewards of shape {rewards.shape[2:]} make no return: it needs one a step")
        sums, count, factor = returns_of_n_steps(
            rewards.reshape(inside.shape), real, np.any(ended, axis=2), shape.discount
        )
        batch: dict[str, Array] = {}
        for path, rows in sources.items():
            if path in shape.observations:
                both = read(path, np.stack([at, at + count], 1))
                batch[path], batch[f"{NEXT}/{path}"] = both[:, 0], both[:, 1]
            elif path == shape.reward:
                batch[path] = sums.reshape(len(at), *rows.shape)
            elif path == shape.terminated:
                batch[path] = ended[:, 0].reshape(len(at), *rows.shape)
            else:
                values = read(path, at[:, None])
                batch[path] = values[:, 0] if values.shape[1] == 1 else values
        batch[DISCOUNT] = factor.astype(np.float32)
        return batch


def known_clock(clocks: set[Clock], counts: Ints, lengths: Ints) -> Clock:
    """The clock of a field, of those that stores declare for it.

    One that says nothing, but on which every trajectory has as many rows as steps (or one more), counts as such a one.
    """
    if len(clocks) == 1 and (known := next(iter(clocks))).relation != "none":
        return known
    there = counts >= 0
    if bool((counts == lengths)[there].all()):
        return Clock("main")
    if bool((counts == lengths + 1)[there].all()):
        return Clock("last_row_extra")
    return Clock("none")


def _take(rows: RowSource, trajectories: Ints, place: Ints) -> Array:
    n, h = place.shape
    values = rows.take(np.repeat(trajectories, h) if h > 1 else trajectories, place.reshape(-1))
    return values.reshape(n, h, *rows.shape)
