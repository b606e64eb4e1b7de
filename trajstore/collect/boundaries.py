"""Where the episodes of many environments begin and end: flags in, pairs of steps out; pure, and no loop over them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]

#: Where the observation after an episode's last step is to be found.
NOWHERE, NEXT_ROW, GIVEN = 0, 1, 2


@dataclass(frozen=True)
class Episodes:
    """Episodes that have ended; arrays (n,).

    env : environment. first, last : steps, counted from the recorder's first, both inside the episode.
    terminated, truncated : how it ended. ended : by its flags; else it was cut off.
    final : ``NOWHERE``, ``NEXT_ROW`` or ``GIVEN``.
    """

    env: Ints
    first: Ints
    last: Ints
    terminated: Bools
    truncated: Bools
    final: Ints
    ended: Bools

    def __len__(self) -> int:
        return len(self.env)

    def __getitem__(self, key: Any) -> Episodes:
        return Episodes(*(getattr(self, name)[key] for name in self.__dataclass_fields__))

    def without_row(self, step: int) -> Episodes:
        """These, where there is no row ``step`` that could hold a final observation."""
        return replace(self, final=np.where((self.final == NEXT_ROW) & (self.last + 1 >= step), NOWHERE, self.final))

    @property
    def lengths(self) -> Ints:
        return self.last - self.first + 1

    def shortened(self) -> Episodes:
        """Without the last step of those whose final observation is nowhere: its observation becomes the final one."""
        cut = self.final == NOWHERE
        shorter = replace(
            self,
            last=self.last - cut,
            terminated=self.terminated & ~cut,
            truncated=self.truncated | cut,
            final=np.where(cut, NEXT_ROW, self.final),
        )
        return shorter[shorter.last >= shorter.first]


class Boundaries:
    """Follows every environment through the steps, chunk after chunk.

    Parameters
    ----------
    next_step : the step after an episode's last one resets the environment and belongs to no episode (Gymnasium's
        ``NEXT_STEP``); else it is the first of the next episode (``SAME_STEP``, ``DISABLED``).

    Attributes
    ----------
    running : bool (num_envs,), whether an episode is under way after the last step scanned.
    start : int64 (num_envs,), its first step, where one is.
    """

    def __init__(self, num_envs: int, *, next_step: bool) -> None:
        self.next_step = next_step
        self.scanned = 0
        self.running = np.zeros(num_envs, np.bool_)
        self.start = np.zeros(num_envs, np.int64)
        self._resetting = np.zeros(num_envs, np.bool_)
        self._never = np.zeros(num_envs, np.bool_)

    def scan(
        self, terminated: Bools, truncated: Bools, active: Bools, fresh: Bools, fresh_after: Bools | None = None
    ) -> Episodes:
        """Go on by a chunk of steps; the episodes that end in it, in the order of their ends.

        Parameters
        ----------
        terminated, truncated : bool (steps, num_envs).
        active : rows that count; an episode under way ends where they cease to.
        fresh : rows that begin an episode, whatever came before; ``fresh_after`` is the row after the chunk, if known.
        """
        first = self.scanned
        done = terminated | truncated
        real = self._real(done, active, fresh)
        done &= real
        before = np.concatenate([self.running[None], (real & ~done)[:-1]])  # under way before each step
        cut = before & (~real | fresh)
        begin = real & (~before | fresh)
        ends = self._ends(done, cut)
        envs, starts = np.nonzero(begin.T)
        running = np.flatnonzero(self.running)
        envs = np.concatenate([running, envs])
        starts = np.concatenate([self.start[running] - first, starts])
        order = np.lexsort((starts, envs))
        envs, starts = envs[order], starts[order]
        episodes = self._pair(envs, starts, *ends)

        self.running = real[-1] & ~done[-1]
        self._resetting = done[-1].copy()
        self.start[envs] = starts + first  # of an environment's several, the last assignment stays
        self.scanned += len(done)
        how = done[episodes[2], episodes[0]] & (episodes[2] >= 0)
        env, begun, last = episodes
        after = np.concatenate([fresh, [self._never if fresh_after is None else fresh_after]])
        ready = np.where(after[last + 1, env], NOWHERE, NEXT_ROW)  # a fresh row's observation is the next episode's
        final = np.where(how & (not self.next_step), GIVEN, ready)
        found = Episodes(
            env, begun + first, last + first, how & terminated[last, env], ~how | truncated[last, env], final, how
        )
        return found[np.lexsort((env, last))]

    def finish(self) -> Episodes:
        """The episodes under way, as if they were truncated by the last step scanned."""
        env = np.flatnonzero(self.running)
        none = np.zeros(len(env), np.bool_)
        last = np.full(len(env), self.scanned - 1, np.int64)
        self.running = np.zeros_like(self.running)
        return Episodes(env, self.start[env], last, none, ~none, np.full(len(env), NOWHERE), none)

    def _real(self, done: Bools, active: Bools, fresh: Bools) -> Bools:
        """Which rows are steps of an episode."""
        if not self.next_step:
            return active.copy()
        real = active & (~np.concatenate([self._resetting[None], done[:-1]]) | fresh)
        resetting = np.concatenate([self._resetting[None], (done & real)[:-1]])
        if np.array_equal(real, active & (~resetting | fresh)):
            return real
        # A row that resets an environment says that it is done, or one that does not count: step by step, then.
        past = self._resetting
        for t in range(len(done)):
            real[t] = active[t] & (~past | fresh[t])
            past = done[t] & real[t]
        return real

    @staticmethod
    def _ends(done: Bools, cut: Bools) -> tuple[Ints, Ints]:
        done_env, done_row = np.nonzero(done.T)
        cut_env, cut_row = np.nonzero(cut.T)
        env, row = np.concatenate([done_env, cut_env]), np.concatenate([done_row, cut_row - 1])
        order = np.lexsort((row, env))
        return env[order], row[order]

    def _pair(self, begin_env: Ints, begin: Ints, end_env: Ints, end: Ints) -> tuple[Ints, Ints, Ints]:
        """Each end with its begin: both are sorted by environment, and in each they alternate."""
        envs = len(self.running)
        begins_before = np.cumsum(np.bincount(begin_env, minlength=envs)) - np.bincount(begin_env, minlength=envs)
        ends_before = np.cumsum(np.bincount(end_env, minlength=envs)) - np.bincount(end_env, minlength=envs)
        rank = np.arange(len(end)) - ends_before[end_env]
        return end_env, begin[begins_before[end_env] + rank], end
