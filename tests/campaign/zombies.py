"""Two writers of one store whose locks lie: each is paused between any two operations while the other goes on."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tests.campaign.disk import Disk, Tapped
from tests.campaign.explorer import Violation
from tests.campaign.workload import State, one_by_one, open_writer, recover, rows_of, tiny_shards, trajectory
from trajstore.errors import AlreadyExistsError, ConflictError, StorageError
from trajstore.format.layout import ROOT

REFUSED = (AlreadyExistsError, ConflictError)
PATIENCE = 120.0  # seconds after which a writer that does not go on is taken for stuck


class Actor:
    """A writer in a thread of its own that stops before a given operation until it is told to go on."""

    def __init__(self, stage: Stage, seeds: Sequence[int], stop_at: int, resume: bool) -> None:
        self.stage = stage
        self.seeds = seeds
        self.stop_at = stop_at
        self.resume = resume
        self.operations = 0
        self.acknowledged: list[int] = []
        self.again = 0  # calls that were made twice
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
            self.stage.look(self)
        return result

    def _asked_again(self, call: Callable[[], Any]) -> Any:
        """A call that may find an unfinished file removed, by a writer that has not committed: nothing is lost."""
        try:
            return call()
        except StorageError:
            self.again += 1
            return call()

    def _run(self) -> None:
        try:
            storage: Any = Tapped(self.stage.disk.storage(), self._tap)
            writer = self._asked_again(lambda: open_writer(storage, resume=self.resume))
            try:
                for seed in self.seeds:
                    writer.append(trajectory(seed), seed=seed)
                    self._asked_again(writer.commit)
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
        self._last: Actor | None = None
        self._seen: dict[int, Any] = {}
        self._guard = threading.Lock()

    def look(self, who: Actor) -> None:
        """Commits only follow one another, and no committed row ever changes.

        Rows are read when another writer than the last one has committed, and in the end.
        """
        with self._guard:
            try:
                root = json.loads(self.disk.storage().read(ROOT))
                number = root["attributes"]["trajstore"]["commit"]["number"]
                if number < self._newest:
                    self.failures.append(Violation(f"commit {number} stands where {self._newest} stood"))
                self._newest = max(number, self._newest)
                if who is not self._last:
                    self._read()
                self._last = who
            except Exception as error:
                self.failures.append(error)

    def _read(self) -> None:
        found = recover(self.disk.storage())
        assert isinstance(found, State)
        for seed, *rows in found.trajectories:
            if self._seen.setdefault(seed, rows) != rows:
                self.failures.append(Violation(f"the rows of seed {seed} have changed"))


FIRST, SECOND = [1, 2, 5], [11, 12, 15]  # seeds
LONG = [*SECOND, 18, 21]  # until the number of a commit of the first is free again


def play(stop_first: int, stop_second: int, seeds: Sequence[int] = SECOND) -> tuple[Actor, Actor]:
    """The first runs to its stop; the second to its own; the first to its end; the second to its end.

    What either was told is durable must be there in the end. Raises ``Violation``.
    """
    with tiny_shards(), one_by_one():
        stage = Stage()
        first = Actor(stage, FIRST, stop_first, resume=False)
        second = Actor(stage, seeds, stop_second, resume=True)
        first.start()
        second.start()
        first.finish()
        second.finish()
        if stage.failures:
            raise Violation(f"stopped at {stop_first} and {stop_second}: {stage.failures[0]!r}") from stage.failures[0]
        try:
            with open_writer(stage.disk.storage(), resume=True) as third:
                third.append(trajectory(30), seed=30)
            found = recover(stage.disk.storage())
            assert isinstance(found, State)
        except Exception as error:
            raise Violation(f"stopped at {stop_first} and {stop_second}: {error!r}") from error
    seeds = [rows[0] for rows in found.trajectories]
    lost = {*first.acknowledged, *second.acknowledged, 30} - set(seeds)
    if lost or len(set(seeds)) < len(seeds) or any(rows != rows_of(rows[0]) for rows in found.trajectories):
        raise Violation(f"stopped at {stop_first} and {stop_second}: {found}, lost {lost}")
    return first, second


def operations(seeds: Sequence[int] = SECOND) -> tuple[int, int]:
    """How many operations each of the two makes when nobody stops it."""
    first, second = play(1 << 30, 1 << 30, seeds)
    return first.operations, second.operations


def pairs(seeds: Sequence[int] = SECOND) -> list[tuple[int, int]]:
    """Every pair of stops."""
    first, second = operations(seeds)
    return [(i, j) for i in range(1, first + 1) for j in [*range(1, second + 1), 1 << 30]]


def some(chosen: Iterable[tuple[int, int]], seeds: Sequence[int] = SECOND) -> Counter[str]:
    """Play at these pairs of stops."""
    counts: Counter[str] = Counter()
    for pair in chosen:
        for actor in play(*pair, seeds):
            counts["refused"] += actor.refused is not None
            counts["calls made again"] += actor.again
            counts["commits acknowledged"] += len(actor.acknowledged)
        counts["schedules"] += 1
    return counts


def campaign(count: int, seed: int = 0) -> Counter[str]:
    """Play at so many pairs of stops at random, the second writer making five commits."""
    return some(random.Random(seed).sample(pairs(LONG), count), LONG)
