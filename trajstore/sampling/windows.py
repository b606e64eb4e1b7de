"""Windows: which steps of which trajectory a sample is made of; vectorised arithmetic on integers, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trajstore.errors import NotFoundError, SchemaError
from trajstore.format.arguments import check_count, whole_numbers
from trajstore.format.schema import Clock

Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]

PADS = ("repeat", "zero")
_MOST_STEPS = 1 << 31
_OFF_STEP = 1e-3  # steps by which a time may miss one


@dataclass(frozen=True)
class Window:
    """The shape of a sample: a run of steps around an *anchor* step of one trajectory.

    Parameters
    ----------
    length : steps in a window, from the anchor on.
    stride : steps from one anchor to the next.
    dilation : steps from one row of a window to the next.
    before, after : steps by which a window may stick out of its trajectory, each at most a window's reach: no
        window is all padding.
    pad : what stands there: ``"repeat"`` the first or last row, or ``"zero"``; a mask tells which rows are real.
    offsets : for some fields, the steps to take relative to the anchor, before dilation: ``{"obs": (-1, 0)}``.
        The others take ``range(length)``.

    Notes
    -----
    ``before`` and ``after`` are diffusion-policy's ``pad_before`` and ``pad_after``; with the whole reach on both sides
    every step is an anchor, as with LeRobot's ``delta_timestamps`` (``of_seconds``).
    """

    length: int = 1
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0
    pad: str = "repeat"
    offsets: Mapping[str, Sequence[int]] | None = None

    def __post_init__(self) -> None:
        for name in ("length", "stride", "dilation"):
            check_count(f"a window's {name}", getattr(self, name), 1, _MOST_STEPS)
        check_count("before", self.before)
        check_count("after", self.after)
        if not isinstance(self.offsets or {}, Mapping):
            raise SchemaError(f"offsets are a dict of steps by field, not {self.offsets!r:.60}")
        for field, deltas in (self.offsets or {}).items():
            whole_numbers(f"the offsets of {field!r}", deltas)
        if self.pad not in PADS:
            raise SchemaError(f"a window is padded by 'repeat' or 'zero', not {self.pad!r}")
        if any(not len(deltas) for deltas in (self.offsets or {}).values()):
            raise SchemaError("a field with no offsets gives no rows", hint="leave it out of `fields` instead")
        low, high = self.reach
        if not (0 <= self.before <= high - low and 0 <= self.after <= high - low):
            raise SchemaError(
                f"a window that reaches over {high - low} steps is padded by 0 to {high - low}, "
                f"not by {self.before} and {self.after}"
            )

    @classmethod
    def of_seconds(cls, times: Mapping[str, Sequence[float]], rate: float, *, pad: str = "repeat") -> Window:
        """A window around every step, of fields at times relative to it, as LeRobot's ``delta_timestamps``.

        times : seconds for each field, negative before the step. rate : steps a second. Raises ``SchemaError`` for
        a time at which there is no step.
        """
        offsets = {}
        for field, seconds in times.items():
            steps = np.asarray(seconds, np.float64) * rate
            if bool((np.abs(steps - np.rint(steps)) > _OFF_STEP).any()):
                raise SchemaError(f"at {rate} steps a second there are none for {field!r} at {list(seconds)}")
            offsets[field] = tuple(np.rint(steps).astype(int).tolist())
        low, high = cls(offsets=offsets).reach
        return cls(before=-low, after=high, pad=pad, offsets=offsets)

    def of(self, field: str) -> Ints:
        """The steps of a field relative to the anchor, int64 (h,)."""
        deltas = (self.offsets or {}).get(field)
        steps = np.arange(self.length) if deltas is None else np.asarray(deltas)
        return steps.astype(np.int64) * self.dilation

    @property
    def reach(self) -> tuple[int, int]:
        """The first and the last step relative to the anchor, over all fields."""
        deltas = [delta for one in (self.offsets or {}).values() for delta in one]
        low, high = min([0, *deltas]), max([self.length - 1, *deltas])
        return low * self.dilation, high * self.dilation

    def counts(self, lengths: Ints) -> Ints:
        """How many windows trajectories of these lengths have, int64 (n,)."""
        low, high = self.reach
        room = lengths - (high - low) + self.before + self.after
        # Of a trajectory shorter than the dilation, a window that sticks out could step over every row.
        least = self.dilation if self.before or self.after else 1
        return np.where((lengths >= least) & (room > 0), -(-room // self.stride), 0)

    def anchors(self, numbers: Ints) -> Ints:
        """The anchor step of each window by its number in its trajectory; below 0 where it sticks out that far."""
        return numbers * self.stride - self.reach[0] - self.before

    def steps(self, field: str, anchors: Ints) -> Ints:
        """Step numbers of a field in windows, int64 (n, h); out of range where a window sticks out."""
        return anchors[:, None] + self.of(field)


def ticks(clock: Clock, steps: Ints, lengths: Ints, counts: Ints) -> tuple[Ints, Bools]:
    """Rows on a clock that belong to steps, and which of them are real; out-of-range steps give the nearest row.

    Parameters
    ----------
    steps : int64 (n, h). lengths : steps of each trajectory, int64 (n,). counts : its rows on the clock, int64 (n,).

    Returns
    -------
    rows, real : (n, h); of a clock with a ``rate`` of k, (n, h * k).

    Raises
    ------
    NotFoundError
        Nothing says how the clock lies against the steps.
    """
    if clock.relation == "last_row_extra":
        return np.clip(steps, 0, counts[:, None] - 1), (steps >= 0) & (steps < counts[:, None])
    inside = np.clip(steps, 0, lengths[:, None] - 1)
    real = inside == steps
    if clock.relation == "first_row_of_each_epoch_extra":
        epoch = np.maximum(lengths // np.maximum(counts - lengths, 1), 1)[:, None]
        return np.where((counts > lengths)[:, None], inside + inside // epoch + 1, inside), real
    if clock.relation == "rate":
        rows = inside[:, :, None] * clock.rate + np.arange(clock.rate)
        shape = (len(steps), steps.shape[1] * clock.rate)
        return rows.reshape(shape), np.repeat(real, clock.rate, axis=1)
    if clock.relation != "main":
        raise NotFoundError(
            f"a clock of the relation {clock.relation!r} does not say which of its rows belong to a step",
            hint="leave its fields out, or read whole trajectories",
        )
    return inside, real


class WindowIndex:
    """All windows of many trajectories, numbered trajectory after trajectory."""

    def __init__(self, window: Window, lengths: Ints) -> None:
        self.window = window
        self._ends = np.cumsum(window.counts(lengths))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, numbers: Ints) -> tuple[Ints, Ints]:
        """The trajectory and the anchor of windows by number, int64 (n,) each."""
        if len(numbers) and not (int(numbers.min()) >= 0 and int(numbers.max()) < len(self)):
            raise NotFoundError(f"there are {len(self)} samples, counted from 0, and {numbers.max()} is asked for")
        trajectory = np.searchsorted(self._ends, numbers, side="right")
        starts = np.where(trajectory > 0, self._ends[trajectory - 1], 0)
        return trajectory, self.window.anchors(numbers - starts)

    @property
    def counts(self) -> Ints:
        """Number of windows of each trajectory, int64 (n,)."""
        return np.diff(self._ends, prepend=0)


def returns_of_n_steps(
    rewards: np.ndarray[Any, Any], real: Bools, terminated: Bools, discount: float
) -> tuple[np.ndarray[Any, Any], Ints, np.ndarray[Any, Any]]:
    """Discounted sums of the next rewards, as n-step targets need them (Sutton & Barto, 2nd ed., section 7.1).

    Parameters
    ----------
    rewards, real, terminated : (b, n), from a window of n steps; a step that is not real, or comes after a
        termination, counts for nothing.

    Returns
    -------
    sums : (b,), of the rewards' dtype. steps : how many rewards each sums, int64 (b,). factor : what the value of
        the state after them is multiplied by, float64 (b,): ``discount ** steps``, and 0 after a termination.
    """
    ended = np.cumsum(terminated & real, axis=1)
    counted = real & (ended - (terminated & real) == 0)
    powers = discount ** np.arange(rewards.shape[1])
    steps = counted.sum(1)
    sums = (rewards.astype(np.float64) * powers * counted).sum(1).astype(rewards.dtype)
    done = (terminated & counted).any(1)
    return sums, steps, np.where(done, 0.0, discount**steps)
