"""A replay buffer on disk: trajectories in through a writer, batches out of what it has stored."""

from __future__ import annotations

import os
import threading
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from trajstore.dataset import Dataset
from trajstore.engine.cache import ChunkCache
from trajstore.engine.intake import flatten
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import SchemaError, StateError
from trajstore.media.storage import Storage
from trajstore.operations.merge import merge
from trajstore.sampling.cutting import Cut, Shape
from trajstore.sampling.replayindex import LiveIndex
from trajstore.sampling.sampler import below, key, uniform
from trajstore.sampling.samples import CutSamples
from trajstore.sampling.sumtree import PriorityRing
from trajstore.sampling.windows import Ints
from trajstore.writer import create

Array = np.ndarray[Any, Any]

CACHE_BYTES = 256 << 20
STATE = "replay"
FRESH = ("commit", "memory")
_HELD_BYTES = 256 << 20  # rows held in memory for sampling before a commit; beyond, one is made
_STORED = 1 << 22  # priorities that a manifest takes
_COMPACT = 1024  # trajectories that left, before their places are forgotten

INDEX, WEIGHT, DEMONSTRATION = "index", "weight", "demonstration"


@dataclass(frozen=True)
class Priorities:
    """Prioritised sampling (Schaul et al. 2016): in proportion to ``priority ** alpha``.

    A sample that was never drawn has the highest priority given so far. Batches hold ``weight``, the importance
    weights ``(N * probability) ** -beta``, divided by their maximum in the batch.
    """

    alpha: float = 0.6
    beta: float = 0.4
    epsilon: float = 1e-6


class ReplayBuffer:
    """A store that is written and sampled at once.

    Parameters
    ----------
    path : of the store; with ``world_size`` above 1, of a folder in which every rank has a part of its own.
    shape : what a sample is: a ``Window``, ``Transitions``, or a single step.
    fields : which to read; by default all but strings and documents.
    capacity, capacity_steps : trajectories, and steps, that are kept: the oldest leave by being deleted from the
        dataset; ``compact`` gives their bytes back.
    recent, recent_steps : draw from the newest so many trajectories, or from those that hold the newest so many steps.
    priorities : draw by priority; see ``update_priorities``.
    weights : draw in proportion to this column: each sample has its trajectory's value.
    demonstrations : another dataset that ``share`` of each batch is drawn from, uniformly; the batch's
        ``demonstration`` tells which.
    fresh : when a trajectory can be drawn: after a ``"commit"``, or at once, from ``"memory"`` (costs a copy of it).
    cache_bytes : bound of the memory for decoded chunks.
    prefetch : batches that are drawn and read ahead by a thread. They do not see what comes in meanwhile.
    seed : of all draws; ranks draw different ones.
    bits : give bfloat16 as its bits, uint16, instead of as float32.
    options : of ``trajstore.create``; ``resume`` is on.

    Notes
    -----
    A draw is a function of the seed and of how many came before; ``commit`` stores that number, and the priorities,
    with the data. Resumed, the buffer draws what it would have drawn, from the data of that commit. Priorities take up
    to five bytes a sample in the manifest: commit often by the timer, and by ``commit`` where the state counts. Of more
    than four million samples they are not stored; a resumed buffer then begins with equal ones.
    Any thread may add; one thread samples.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Storage,
        shape: Shape = None,
        *,
        fields: Sequence[str] | None = None,
        capacity: int | None = None,
        capacity_steps: int | None = None,
        recent: int | None = None,
        recent_steps: int | None = None,
        priorities: Priorities | None = None,
        weights: str | None = None,
        demonstrations: Dataset | None = None,
        share: float = 0.5,
        fresh: str = "commit",
        cache_bytes: int = CACHE_BYTES,
        prefetch: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        bits: bool = False,
        **options: Any,
    ) -> None:
        if fresh not in FRESH:
            raise SchemaError(f"trajectories are fresh from {fresh!r}", hint="'commit' or 'memory'")
        if priorities is not None and weights is not None:
            raise SchemaError("priorities and weights exclude each other")
        limits = (capacity, capacity_steps, recent, recent_steps)
        if not 0 <= share <= 1 or any(limit is not None and limit < 1 for limit in limits):
            raise SchemaError("share is from 0 to 1; capacities and recent are 1 or more")
        if world_size > 1:
            options["part"] = f"rank{rank}"
        self.writer = create(path, **{"resume": True, **options})
        self.priorities, self.seed, self.rank = priorities, seed, rank
        self._capacity, self._capacity_steps = capacity, capacity_steps
        self._recent, self._recent_steps = recent, recent_steps
        self._weights, self._fresh = weights, fresh
        self._demonstrations, self._share = demonstrations, share if demonstrations is not None else 0.0
        self._demos: CutSamples | None = None
        self._cut, self._bits = Cut(shape), bits
        self._cache = ChunkCache(cache_bytes)
        self._index = LiveIndex(self._cut, fields, bits=bits)
        self._slots = PriorityRing() if priorities is not None or weights is not None else None
        self._highest = 1.0
        self._drawn = self._delivered = 0
        self._unread: dict[int, int] = {}  # the lowest slot of each batch that is drawn and not read yet
        self._guard = threading.RLock()
        self._prefetch = prefetch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trajstore-replay") if prefetch else None
        self._ahead: deque[tuple[int, Future[dict[str, Array]]]] = deque()
        self._seen = -1
        self._closed = False
        try:
            state = self.writer.state.get(STATE)
            self.refresh()
            if state is not None:
                self._restore(state)
        except BaseException:
            self.writer.abandon()
            raise
        self.writer.attach(_Keeper(self))

    # -- what there is ---------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Trajectories that can be sampled."""
        return len(self._index)

    @property
    def samples(self) -> int:
        """Samples that can be drawn, before any limit to the newest."""
        low, high = self._index.span
        return high - low

    @property
    def steps(self) -> int:
        """Steps of the trajectories that can be sampled."""
        return self._index.steps

    @property
    def stats(self) -> dict[str, float]:
        """Figures of the buffer, and those of its writer."""
        figures = {"trajectories": len(self), "samples": self.samples, "steps": self.steps, "drawn": self._delivered}
        return {**figures, "cache_bytes": self._cache.used, "held_bytes": self._index.held_bytes, **self.writer.stats}

    # -- in --------------------------------------------------------------------------------------------------------

    def add(self, trajectory: Mapping[str, Any], /, **columns: Any) -> int | None:
        """Append a trajectory as ``Writer.append`` does; its id.

        Raises what that raises, and ``NotFoundError`` if the first one lacks a field that the samples need.
        """
        if not len(self.writer):  # later ones have the fields of the first
            self._cut.check(flatten(trajectory, columns, self.writer.schema))
        if self._fresh == "commit":
            return self.writer.append(trajectory, **columns)
        if self._index.held_bytes > _HELD_BYTES:
            self.writer.commit()
        with self._guard:
            number = self.writer.append(trajectory, **columns)
            self.refresh()
            if number is not None and number not in self._index.ids[-1:]:  # else a commit by the timer was faster
                before = len(self._index.ids)
                self._index.add(number, trajectory, columns, self.writer.schema)
                self._came(before, columns.get(self._weights) if self._weights else None)
            self._evict()
        return number

    def extend(self, trajectories: Iterable[Mapping[str, Any]]) -> None:
        """Append several trajectories."""
        for trajectory in trajectories:
            self.add(trajectory)

    def refresh(self) -> None:
        """Take in what the writer has committed; ``sample`` and ``add`` do so by themselves."""
        head = self.writer.head
        if head is None or head.commit.number == self._seen:
            return
        with self._guard:
            before = len(self._index.ids)
            self._index.refresh(Snapshot(self.writer.storage, head, self._cache))
            self._seen = head.commit.number
            self._came(before, None)
            self._evict()

    def _came(self, before: int, weight: Any) -> None:
        """Trajectories from the place ``before`` on are new."""
        index = self._index
        if self._slots is None or before == len(index.ids):
            return
        low, high = index.slot(before), index.slot(len(index.ids))
        self._slots.make_room(index.slot(index.low), high)
        if self._weights is None:
            self._slots.set(np.arange(low, high), self._highest**self._alpha)
            return
        rows = index.rows[before:]
        if index.snapshot is not None and bool((rows >= 0).all()):
            values = index.snapshot.column(self._weights, rows)
        else:
            values = np.array([self.writer.schema.columns[self._weights].fill if weight is None else weight])
        counts = np.diff(index.ends[before:], prepend=low)
        self._slots.set(np.arange(low, high), np.repeat(values, counts))

    @property
    def _alpha(self) -> float:
        return self.priorities.alpha if self.priorities is not None else 1.0

    def _evict(self) -> None:
        index = self._index
        count = max(len(index) - self._capacity, 0) if self._capacity is not None else 0
        if self._capacity_steps is not None and index.steps > self._capacity_steps:
            count = max(count, index.within(self._capacity_steps) - index.low)
        if not count:
            return
        low = index.slot(index.low)
        self.writer.delete(index.drop(count).tolist())
        if self._slots is not None:
            self._slots.set(np.arange(low, index.slot(index.low)), 0.0)
        if index.low > max(_COMPACT, len(index)) or index.held_bytes > _HELD_BYTES:
            # What was drawn and is not read yet may be of trajectories that have left since.
            oldest = min(self._unread.values(), default=None)
            index.compact(index.low if oldest is None else min(index.low, int(index.locate(np.array([oldest]))[0][0])))

    # -- out -------------------------------------------------------------------------------------------------------

    def sample(self, size: int) -> dict[str, Array]:
        """A batch of ``size`` samples, drawn with replacement: by path, (size, ...).

        ``index`` names each sample for ``update_priorities``, -1 for demonstrations. Raises ``StateError`` while there
        is nothing to draw from.
        """
        if size < 1:
            raise SchemaError(f"a batch of {size} samples")
        if self._thread is None:
            self.refresh()
            batch = self._read(*self._draw(size))
        else:
            while self._ahead and self._ahead[0][0] != size:
                self._forget_ahead()
            while len(self._ahead) <= self._prefetch:
                self.refresh()
                self._ahead.append((size, self._thread.submit(self._read, *self._draw(size))))
            batch = self._ahead.popleft()[1].result()
        self._delivered += size
        return batch

    def _forget_ahead(self) -> None:
        wait([future for _, future in self._ahead])
        self._ahead.clear()
        self._drawn = self._delivered

    def _draw(self, size: int) -> tuple[int, Ints, Array | None, Ints]:
        """A name for the draw, slots, their importance weights, and numbers of demonstrations."""
        with self._guard:
            noise = np.arange(self._drawn, self._drawn + size)
            word = key(self.seed, self.rank, "replay")
            demos = round(size * self._share)
            mine, others = noise[demos:], noise[:demos]
            low, high = self._window()
            if len(mine) and low == high:
                raise StateError(
                    f"there is nothing to sample in {self.writer.path}",
                    hint="" if self._fresh == "memory" else "commit first, or make the buffer with fresh='memory'",
                )
            weights = None
            if self._slots is None:
                slots = low + below(mine, word, high - low) if len(mine) else mine
            else:
                slots = self._slots.draw(uniform(mine, word), low, high)
                if self.priorities is not None:
                    weights = self._importance(slots, low, high)
            chosen = others
            if demos:
                samples = self._demo_samples()
                chosen = below(others, key(self.seed, self.rank, "demonstrations"), len(samples))
            name = self._drawn
            self._drawn += size
            if len(slots):
                self._unread[name] = int(slots.min())
            return name, slots, weights, chosen

    def _window(self) -> tuple[int, int]:
        """The slots to draw from."""
        index = self._index
        first, count = index.low, len(index.ids)
        if self._recent is not None:
            first = max(first, count - self._recent)
        if self._recent_steps is not None:
            first = max(first, index.holding(self._recent_steps))
        return index.slot(first), index.slot(count)

    def _importance(self, slots: Ints, low: int, high: int) -> Array:
        assert self._slots is not None and self.priorities is not None
        share = self._slots.get(slots) / self._slots.mass(low, high)
        weights = ((high - low) * share) ** -self.priorities.beta
        scaled: Array = (weights / weights.max(initial=0.0)).astype(np.float32)
        return scaled

    def _demo_samples(self) -> CutSamples:
        if self._demos is None:
            assert self._demonstrations is not None
            fields = list(self._index.sources) or None
            self._demos = CutSamples(self._demonstrations, self._cut.shape, fields=fields, bits=self._bits)
            if not len(self._demos):
                raise StateError("the demonstrations have no sample of this shape")
        return self._demos

    def _read(self, name: int, slots: Ints, weights: Array | None, demos: Ints) -> dict[str, Array]:
        batch: dict[str, Array] = {}
        with self._guard:
            index = self._index
            try:
                if len(slots):
                    places, numbers = index.locate(slots)
                    anchors = self._cut.window.anchors(numbers)
                    batch = self._cut.read(index.sources, index.lengths, index.usable, places, anchors)
            finally:
                self._unread.pop(name, None)
        if len(demos):
            given = self._demo_samples().get(demos)
            batch = {path: _joined(batch.get(path), values) for path, values in given.items()}
        batch[INDEX] = np.r_[slots, np.full(len(demos), -1)]
        if weights is not None:
            batch[WEIGHT] = np.r_[weights, np.ones(len(demos), np.float32)]
        if self._demonstrations is not None:
            batch[DEMONSTRATION] = np.r_[np.zeros(len(slots), np.bool_), np.ones(len(demos), np.bool_)]
        return batch

    def update_priorities(self, index: Any, priorities: Any) -> None:
        """Give samples, by a batch's ``index``, new priorities (absolute TD errors, say).

        Those that have left the buffer, and demonstrations, are skipped.
        """
        if self._slots is None or self.priorities is None:
            raise StateError("this buffer has no priorities", hint="make it with priorities=Priorities()")
        with self._guard:
            slots = np.asarray(index, np.int64)
            values = np.broadcast_to(np.asarray(priorities, np.float64), slots.shape) + self.priorities.epsilon
            low, high = self._index.span
            there = (slots >= low) & (slots < high)
            self._slots.set(slots[there], values[there] ** self._alpha)
            self._highest = max(self._highest, float(values[there].max(initial=0.0)))

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """How far the draws have come, and the priorities; a commit's manifest can hold it."""
        state: dict[str, Any] = {"seed": self.seed, "drawn": self._delivered}
        low, high = self._index.span
        if self.priorities is not None and self._slots is not None and high - low <= _STORED:
            index = self._index
            places = slice(index.low, len(index.ids))
            values = self._slots.get(np.arange(low, high)).astype(np.float32)
            counts = np.diff(index.ends[places], prepend=low)
            state["priorities"] = {
                "highest": self._highest,
                "ids": zlib.compress(index.ids[places].tobytes()),
                "counts": zlib.compress(counts.astype(np.int64).tobytes()),
                "values": zlib.compress(values.tobytes(), 1),
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as ``state_dict`` was; trajectories that came since have the highest priority."""
        self._forget_ahead()
        with self._guard:
            self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.seed = int(state["seed"])
        self._drawn = self._delivered = int(state["drawn"])
        stored = state.get("priorities")
        if stored is None or self._slots is None or self.priorities is None:
            return
        self._highest = float(stored["highest"])
        ids = np.frombuffer(zlib.decompress(stored["ids"]), np.int64)
        counts = np.frombuffer(zlib.decompress(stored["counts"]), np.int64)
        values = np.frombuffer(zlib.decompress(stored["values"]), np.float32).astype(np.float64)
        index = self._index
        low, high = index.span
        self._slots.set(np.arange(low, high), self._highest**self._alpha)
        mine = index.ids[index.low :]
        own = np.diff(index.ends[index.low :], prepend=low)
        _, here, there = np.intersect1d(mine, ids, assume_unique=True, return_indices=True)
        same = own[here] == counts[there]
        here, there = here[same], there[same]
        starts, theirs = low + np.cumsum(own) - own, np.cumsum(counts) - counts
        within = np.arange(own[here].sum()) - np.repeat(np.cumsum(own[here]) - own[here], own[here])
        self._slots.set(
            np.repeat(starts[here], own[here]) + within, values[np.repeat(theirs[there], own[here]) + within]
        )

    def commit(self) -> int:
        """Make all that was added, and the state, durable; the number of the commit."""
        number = self.writer.commit()
        self.refresh()
        return number

    def save(self, path: str | os.PathLike[str]) -> None:
        """Make a new store of what can be sampled now, with the state: a buffer opened on it draws what this one would.

        Shard files are shared with this store where the file system can, so it costs hardly any bytes; what either
        does later does not touch the other. Raises ``AlreadyExistsError`` if there is something at ``path``.
        """
        with self._guard:
            self.commit()
            merge(self.writer.path, path, provenance=False)
            state = dict(self.writer.state)
            state[STATE] = mine = dict(state[STATE])
            if "priorities" in mine:
                ids = np.arange(len(self), dtype=np.int64)  # as the new store counts them
                mine["priorities"] = {**mine["priorities"], "ids": zlib.compress(ids.tobytes())}
            with create(path, resume=True, commit_every=None, handle_signals=False) as writer:
                writer.state = state

    def close(self) -> None:
        """Commit and release the store."""
        if self._closed:
            return
        self._stop()
        self.writer.close()

    def abandon(self) -> None:
        """Release the store without another commit: what came since the last one is dropped."""
        self._stop()
        self.writer.abandon()

    def _stop(self) -> None:
        self._closed = True
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> ReplayBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ReplayBuffer {self.writer.path}: {len(self)} trajectories, {self.samples} samples>"


class _Keeper:
    """Has the state stored with every commit that is asked for: by a call, by ``close``, by a signal."""

    def __init__(self, buffer: ReplayBuffer) -> None:
        self._buffer = buffer

    def flush(self, timeout: float | None = None) -> bool:
        buffer = self._buffer
        if not buffer._guard.acquire(timeout=-1 if timeout is None else timeout):
            return False
        try:
            buffer.writer.state[STATE] = buffer.state_dict()
        finally:
            buffer._guard.release()
        return True

    def close(self) -> None:
        self.flush()

    def abandon(self) -> None:
        pass


def _joined(mine: Array | None, given: Array) -> Array:
    return given if mine is None else np.concatenate([mine, given])
