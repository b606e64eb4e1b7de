"""Takes steps out of the ring: episodes that have ended go to the writer, rows of those that have not are set aside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trajstore.collect.boundaries import GIVEN, NOWHERE, Boundaries, Episodes
from trajstore.collect.remains import Remains
from trajstore.collect.ring import Ring
from trajstore.collect.scratch import SpillLog
from trajstore.errors import SchemaError
from trajstore.writer import Writer

Array = np.ndarray[Any, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]

# Slots of the ring that are no fields of their own; no user's field can begin so.
ACTIVE, FRESH, COLUMN, FINAL = ".active", ".fresh", ".column/", ".final/"
FLAGS = ("terminated", "truncated")
# Of rows taken in hand at once. NumPy holds the interpreter's lock while it spreads indices, and the caller waits for
# it: at 64 Ki rows, a fraction of a millisecond.
_GROUP_BYTES = 16 << 20
_GROUP_ROWS = 64 << 10


@dataclass(frozen=True)
class Given:
    """Final observations that were given with one step: ``rows[path][i]`` is that of ``envs[i]``, ascending."""

    envs: Ints
    rows: Mapping[str, Array]


class Splitter:
    """Runs in the recorder's thread; the caller's only reads ``tail``.

    Parameters
    ----------
    boundary : fields with an observation after the last step, by the names at the top.
    memory_bytes : bound of the rows set aside in memory.
    append : takes fields, lengths and columns of many trajectories.

    Attributes
    ----------
    tail : steps below it have left the ring.
    given : final observations by step, until they have been read.
    """

    def __init__(
        self,
        writer: Writer,
        ring: Ring,
        boundaries: Boundaries,
        *,
        boundary: tuple[str, ...],
        flags: str,
        memory_bytes: int,
        append: Callable[[Mapping[str, Array], Ints, Mapping[str, Array]], None],
    ) -> None:
        self.tail = 0
        self.trajectories = 0
        self.stored_steps = 0
        self.remains = Remains(ring.num_envs, memory_bytes, lambda: SpillLog(writer.storage, writer.session))
        self._append_to_writer = append
        self._ring = ring
        self._boundaries = boundaries
        self._boundary = boundary
        self._flags_as_fields = flags == "fields"
        self.given: dict[int, list[Given]] = {}

    def fields(self) -> list[str]:
        """Paths of what is stored as fields."""
        hidden = () if self._flags_as_fields else FLAGS
        return [path for path in self._ring.slots if not path.startswith(".") and path not in hidden]

    def columns(self) -> list[str]:
        """Names of what each trajectory has one value of."""
        own = ["env"] if self._flags_as_fields else ["env", *FLAGS]
        return own + [path[len(COLUMN) :] for path in self._ring.slots if path.startswith(COLUMN)]

    def has_boundary(self, path: str) -> bool:
        """Whether a field has a row after the last step."""
        return any(path == name or path.startswith(f"{name}/") for name in self._boundary)

    # -- steps to episodes -----------------------------------------------------------------------------------------

    def scan(self, stop: int, head: int) -> Episodes:
        """The episodes that end before step ``stop``, at most one chunk away (``next_stop``); ``head`` are recorded."""
        start = self._boundaries.scanned % self._ring.steps
        rows = slice(start, start + stop - self._boundaries.scanned)
        slots = self._ring.slots
        terminated, truncated, active, fresh = (slots[path].array[rows] for path in (*FLAGS, ACTIVE, FRESH))
        after = slots[FRESH].array[stop % self._ring.steps] if stop < head else None
        return self._boundaries.scan(terminated, truncated, active, fresh, after)

    def next_stop(self, limit: int) -> int:
        """How far to scan at once: a quarter of the ring at most, and not beyond its end."""
        first, steps = self._boundaries.scanned, self._ring.steps
        chunk = max(min(steps // 4, _GROUP_ROWS // self._ring.num_envs), 1)
        return min(limit, first + chunk, first - first % steps + steps)

    def store(self, episodes: Episodes) -> None:
        """Hand episodes to the writer, and forget their rows."""
        if self._boundary:
            stored = self._with_given(episodes).shortened()
            self._check_given(stored)
        else:
            stored = episodes
        fields = self.fields()
        row_bytes = sum(self._ring.slots[path].step_bytes for path in fields) // self._ring.num_envs
        group_rows = max(min(_GROUP_BYTES // max(row_bytes, 1), _GROUP_ROWS), 1)
        groups = np.cumsum(stored.lengths) // group_rows
        for group in np.split(np.arange(len(stored)), np.flatnonzero(np.diff(groups)) + 1):
            if len(group):
                self._append(stored[group], fields)
        if len(episodes):
            self.remains.drop(np.unique(episodes.env))
        # The next row may tell that an episode ended with the last one scanned.
        for step in [step for step in list(self.given) if step < self._boundaries.scanned - 1]:
            del self.given[step]

    def _append(self, episodes: Episodes, fields: list[str]) -> None:
        rows = _Rows(episodes, 0)
        longer = _Rows(episodes, 1)
        values = {}
        for path in fields:
            final = self.has_boundary(path)
            values[path] = self._gather(path, longer if final else rows)
            if final:
                self._put_given(path, values[path], longer, episodes)
        if self._flags_as_fields:
            ends = np.cumsum(episodes.lengths) - 1
            values["terminated"][ends] = episodes.terminated
            values["truncated"][ends] = episodes.truncated
        self._append_to_writer(values, episodes.lengths, self._columns(episodes))
        self.trajectories += len(episodes)
        self.stored_steps += int(episodes.lengths.sum())

    def _columns(self, episodes: Episodes) -> dict[str, Array]:
        columns: dict[str, Array] = {"env": episodes.env.astype(np.int32)}
        if not self._flags_as_fields:
            columns |= {"terminated": episodes.terminated, "truncated": episodes.truncated}
        index = episodes.last % self._ring.steps * self._ring.num_envs + episodes.env
        for path in self._ring.slots:
            if path.startswith(COLUMN):
                columns[path[len(COLUMN) :]] = self._ring.take(path, index)
        return columns

    def _gather(self, path: str, rows: _Rows) -> Array:
        ring, slot = self._ring, self._ring.slots[path]
        inside = rows.step >= self.tail
        index = rows.step % ring.steps * ring.num_envs + rows.env
        if inside.all():
            return ring.take(path, index)
        out = np.empty((len(index), *slot.spec.shape), slot.array.dtype)
        here = np.flatnonzero(inside)
        if len(here):
            out[here] = ring.take(path, index[here])
        aside = np.flatnonzero(~inside)
        taken = np.empty((len(aside), *slot.spec.shape), slot.array.dtype)
        self.remains.take(path, rows.env[aside], rows.step[aside], taken)
        out[aside] = taken
        return out

    # -- final observations ----------------------------------------------------------------------------------------

    def give(self, step: int, envs: Ints, rows: Mapping[str, Array]) -> None:
        """Note final observations of a step; called by the caller's thread, before the next step is complete.

        Those that an environment has already stay. ``rows`` may still be on their way from a device.
        """
        self.given.setdefault(step, []).append(Given(envs, rows))

    def _is_given(self, step: int, envs: Ints) -> Array:
        """Of which environments a final observation was given with a step, bool (n,)."""
        known = [given.envs for given in self.given.get(step, ())]
        return np.isin(envs, np.concatenate(known)) if known else np.zeros(len(envs), np.bool_)

    def _with_given(self, episodes: Episodes) -> Episodes:
        """Episodes that were cut off have a final observation where one was given all the same."""
        final = episodes.final.copy()
        cut = np.flatnonzero(final == NOWHERE)
        for step in np.unique(episodes.last[cut]).tolist():
            mine = cut[episodes.last[cut] == step]
            final[mine[self._is_given(step, episodes.env[mine])]] = GIVEN
        return replace(episodes, final=final)

    def _check_given(self, episodes: Episodes) -> None:
        wanted = episodes.final == GIVEN
        if any(path.startswith(FINAL) for path in self._ring.slots) or not wanted.any():
            return
        for step in np.unique(episodes.last[wanted]).tolist():
            envs = episodes.env[wanted & (episodes.last == step)]
            if not self._is_given(step, envs).all():
                raise SchemaError(
                    f"step {step} ended an episode whose final observation was not given",
                    hint="pass final_obs with the step, or record observations='T'",
                )

    def _put_given(self, path: str, values: Array, rows: _Rows, episodes: Episodes) -> None:
        wanted = np.flatnonzero(episodes.final == GIVEN)
        if not len(wanted):
            return
        slot = self._ring.slots.get(f"{FINAL}{path}")
        if slot is not None:
            index = episodes.last[wanted] % self._ring.steps * self._ring.num_envs + episodes.env[wanted]
            values[rows.ends[wanted]] = self._ring.take(slot.path, index)
        for step in np.unique(episodes.last[wanted]).tolist():
            mine = wanted[episodes.last[wanted] == step]
            for given in reversed(self.given.get(step, ())):  # of several for one environment, the first is the one
                if path not in given.rows:
                    raise SchemaError(f"final_obs has no {path!r}")
                here = mine[np.isin(episodes.env[mine], given.envs)]
                values[rows.ends[here]] = given.rows[path][np.searchsorted(given.envs, episodes.env[here])]

    # -- making room -----------------------------------------------------------------------------------------------

    def release(self, head: int) -> bool:
        """Let steps leave the ring: those that no episode needs, and, while it is more than half full, the oldest."""
        before = self.tail
        running = self._boundaries.running
        scanned = self._boundaries.scanned
        oldest = int(self._boundaries.start[running].min()) if running.any() else scanned
        # A later row may tell that an episode ended two rows before what was scanned, and its columns are read there.
        scanned -= 2
        self.tail = max(self.tail, min(oldest, scanned))
        half = self._ring.steps // 2
        if head - self.tail > half:
            stop = min(scanned, self.tail + min(half, max(2 * _GROUP_ROWS // self._ring.num_envs, 1)))
            if stop > self.tail:
                self._set_aside(stop)
                self.tail = stop
        return self.tail > before

    def _set_aside(self, stop: int) -> None:
        boundaries, ring = self._boundaries, self._ring
        envs = np.flatnonzero(boundaries.running & (boundaries.start < stop))
        if not len(envs):
            return
        begin = np.maximum(boundaries.start[envs], self.tail)
        env, step = _spread(envs, begin, stop - begin)
        index = step % ring.steps * ring.num_envs + env
        self.remains.add(self.tail, stop, envs, begin, {path: ring.take(path, index) for path in self.fields()})

    def close(self) -> None:
        self.remains.close()


class _Rows:
    """Environment and step of each row of episodes, end to end; ``extra`` rows more after each.

    ends : position of each episode's last row.
    """

    def __init__(self, episodes: Episodes, extra: int) -> None:
        lengths = episodes.lengths + extra
        self.env, self.step = _spread(episodes.env, episodes.first, lengths)
        self.ends = np.cumsum(lengths) - 1
        if extra:
            # The row after a last step whose observation was given holds another episode's: any row will do.
            given = episodes.final == GIVEN
            self.step[self.ends[given]] -= 1


def _spread(env: Ints, first: Ints, lengths: Ints) -> tuple[Ints, Ints]:
    starts = np.cumsum(lengths) - lengths
    return np.repeat(env, lengths), np.repeat(first - starts, lengths) + np.arange(int(lengths.sum()))
