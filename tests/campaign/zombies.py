"""Two writers of one store whose locks lie: each is paused between any two operations while the other goes on."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import trajstore
from tests.campaign.disk import Disk, Tapped
from tests.campaign.explorer import Violation
from tests.campaign.workload import State, one_by_one, open_writer, recover, rows_of, tiny_shards, trajectory
from trajstore.errors import AlreadyExistsError, ConflictError, StorageError
from trajstore.format.layout import ROOT

REFUSED = (AlreadyExistsError, ConflictError)
PATIENCE = 20.0  # seconds after which a writer that does not go on is taken for stuck


class Actor:
    """A writer in a thread of its own that stops before a given operation until it is told to go on."""

    def __init__(self, stage: Stage, seeds: list[int], stop_at: int, resume: bool) -> None:
        self.stage = stage
        self.seeds = seeds
        self.stop_at = stop_at
        self.resume = resume
        self.operations = 0
        self.acknowledged: list[int] = []
        self.again = 0  # commits that were asked for twice
        self.refused: Exception | None = None
        self._go = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Run to the stop, or to the end."""
        self._thread.start()
        if not self._stopped.wait(PATIENCE):
            raise Violation(f"stuck at operation {self.operations}")

    def finish(self) -> None:
        self._go.set()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            raise Violation(f"stuck at operation {self.operations}")

    def _tap(self, name: str, arguments: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        if name not in ("read", "size", "list"):
            self.operations += 1
            if self.operations == self.stop_at:
                self._stopped.set()
                self._go.wait(PATIENCE)
        result = call()
        if name == "rename" and arguments[1] == ROOT:
            self.stage.look()
        return result

    def _run(self) -> None:
        try:
            storage: Any = Tapped(self.stage.disk.storage(), self._tap)
            writer = open_writer(storage, resume=self.resume)
            try:
                for seed in self.seeds:
                    writer.append(trajectory(seed), seed=seed)
                    try:
                        writer.commit()
                    except StorageError:
                        # An unfinished file was removed by a writer that has not committed: nothing is lost.
                        self.again += 1
                        writer.commit()
                    self.acknowledged.append(seed)
            finally:
                writer.abandon()
        except REFUSED as error:
            self.refused = error
        except Exception as error:
            self.stage.failures.append(error)
        finally:
            self._stopped.set()


class Stage:
    """One disk, two actors, and a reader that looks whenever the root has changed."""

    def __init__(self) -> None:
        self.disk = Disk()
        self.disk.lying_locks = True
        self.failures: list[Exception] = []
        self._newest = 0
        self._seen: dict[int, Any] = {}
        self._guard = threading.Lock()

    def look(self) -> None:
        """Commits only follow one another, and no committed row ever changes."""
        with self._guard:
            try:
                dataset = trajstore.open(self.disk.storage())
                found = recover(self.disk.storage())
            except Exception as error:
                self.failures.append(error)
                return
            number = dataset.snapshots[0].manifest.commit.number
            if number < self._newest:
                self.failures.append(Violation(f"commit {number} stands where {self._newest} stood"))
            self._newest = max(number, self._newest)
            assert isinstance(found, State)
            for seed, *rows in found.trajectories:
                if self._seen.setdefault(seed, rows) != rows:
                    self.failures.append(Violation(f"the rows of seed {seed} have changed"))


def play(stop_first: int, stop_second: int) -> tuple[Actor, Actor]:
    """The first runs to its stop; the second to its own; the first to its end; the second to its end.

    What either was told is durable must be there in the end. Raises ``Violation``.
    """
    with tiny_shards(), one_by_one():
        stage = Stage()
        first = Actor(stage, [1, 2, 5], stop_first, resume=False)
        second = Actor(stage, [11, 12, 15, 18, 21], stop_second, resume=True)
        first.start()
        second.start()
        first.finish()
        second.finish()
        if stage.failures:
            raise Violation(f"stopped at {stop_first} and {stop_second}: {stage.failures[0]!r}") from stage.failures[0]
        with open_writer(stage.disk.storage(), resume=True) as third:
            third.append(trajectory(30), seed=30)
        found = recover(stage.disk.storage())
    assert isinstance(found, State)
    seeds = [rows[0] for rows in found.trajectories]
    lost = {*first.acknowledged, *second.acknowledged, 30} - set(seeds)
    if lost or len(set(seeds)) < len(seeds) or any(rows != rows_of(rows[0]) for rows in found.trajectories):
        raise Violation(f"stopped at {stop_first} and {stop_second}: {found}, lost {lost}")
    return first, second


def operations() -> tuple[int, int]:
    """How many operations each of the two makes when nobody stops it."""
    first, second = play(1 << 30, 1 << 30)
    return first.operations, second.operations


def campaign(count: int | None, seed: int = 0) -> Counter[str]:
    """Play at so many pairs of stops at random, or at all."""
    lengths = operations()
    pairs = [(i, j) for i in range(1, lengths[0] + 1) for j in [*range(1, lengths[1] + 1), 1 << 30]]
    random.Random(seed).shuffle(pairs)
    counts: Counter[str] = Counter()
    for pair in pairs[:count]:
        for actor in play(*pair):
            counts["refused"] += actor.refused is not None
            counts["commits asked for again"] += actor.again
            counts["commits acknowledged"] += len(actor.acknowledged)
        counts["schedules"] += 1
    counts["all schedules"] = len(pairs)
    return counts
