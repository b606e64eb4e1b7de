"""The crash-image explorer: runs workloads, builds every image of every moment, and recovers from each."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tests.campaign.disk import Disk, Image, Looking
from tests.campaign.images import Point, Replay
from tests.campaign.workload import (
    NO_STORE,
    Run,
    State,
    one_by_one,
    open_writer,
    recover,
    rows_of,
    tiny_shards,
    trajectory,
)
from trajstore.errors import NotFoundError
from trajstore.format.layout import ROOT, metadata_key

LETTERS = "afrdc"


def _name(point: Point, image: Image) -> int:
    """A number for an image, the same for the same image of one replay."""
    folders = sorted((folder, id(names)) for folder, names in image.folders.items())
    return hash((tuple(folders), tuple(image.files[node] for node in point.data)))


class Violation(AssertionError):
    """An image from which something else was recovered than what was promised."""


def workloads(longest: int, letters: str = LETTERS) -> Iterator[str]:
    """Every sequence of up to so many operations."""
    for length in range(longest + 1):
        for chosen in itertools.product(letters, repeat=length):
            yield "".join(chosen)


class Memo:
    """A function of a storage, remembered by what it asked and what it was answered.

    A reader is deterministic: two images that give the same answers to all its questions give the same result. So the
    questions make a tree, and an image is led down it until a leaf, or the reader itself, gives the result.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function
        self.runs = 0
        self._tree: dict[object, Any] = {}
        self._first: Any = None

    def __call__(self, image: Any) -> Any:
        node = self._first
        while node is not None:
            question, answers = node
            if question is None:
                return answers
            node = answers.get(image.look(question))
        return self._run(image)

    def _run(self, image: Any) -> Any:
        storage = Looking(image)
        try:
            result = self.function(storage)
        except Exception as error:
            result = error
        self.runs += 1
        steps = storage.asked
        if self._first is None:
            self._first = (steps[0][0], {})
        node = self._first
        leaf = (None, result)
        for at, (question, answer) in enumerate(steps):
            assert node[0] == question, "the reader is not deterministic"
            following = (steps[at + 1][0], {}) if at + 1 < len(steps) else leaf
            node = node[1].setdefault(answer, following)
        return result


def leads(array: str, storage: Any) -> bool:
    """Whether an array's own metadata name more rows than the root says there are: they may lag, and never lead."""
    try:
        own = json.loads(storage.read(metadata_key(array)))["shape"][0]
    except NotFoundError:
        return False
    try:
        known = json.loads(storage.read(ROOT))["consolidated_metadata"]["metadata"].get(array)
    except NotFoundError:
        known = None
    return bool(own > (known["shape"][0] if known else 0))


_ARRAYS = ("steps/x", "clocks/steps", "trajectories/id", "trajectories/seed", "integrity/seals")


@dataclass
class Explorer:
    """Checks crash images and counts them; raises ``Violation`` with the workload, the moment and the files.

    Every image of every moment is covered: images that differ only in what a reader does not look at are checked
    together, and counted by arithmetic (``covered``). So many as ``build`` allows are also built and checked one by
    one, each different from the others of its workload (``images``).

    build : images of one moment to build; where there are more, they are drawn at random.
    resumes, foreign : images of one moment on which a writer is resumed, or that zarr-python opens.
    again : share of the resumed ones all of whose moments are explored in their turn.
    """

    seed: int = 0
    build: int = 0
    resumes: float = 0
    foreign: float = 0
    again: float = 0
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    def workload(self, operations: str, **options: Any) -> Run:
        """Run a workload and check every image of it."""
        run = Run(Disk(), **options)(operations)
        self.log(run.disk, run.states, operations, wide=run.wide)
        self.counts["workloads"] += 1
        return run

    def log(
        self, disk: Disk, states: list[State | str], name: str, start: Disk | None = None, *, wide: bool = False
    ) -> None:
        """Check every image of a disk's log; its marks say which of the states may be found when."""
        memo, children = Memo(recover), [Memo(partial(leads, array)) for array in _ARRAYS]
        seen: set[int] = set()
        with tiny_shards(), one_by_one():
            for point in Replay(disk).points(start):
                self.counts["moments"] += 1
                allowed = set(states[max(point.acked, 0) : point.attempted + 1])
                if point.acked < 0:
                    allowed.add(NO_STORE)
                for found, which in point.cover(memo):
                    self.counts["covered"] += point.count(which)
                    if isinstance(found, Exception) or found not in allowed:
                        raise Violation(self._say(name, point, which.some(self.draw), found, allowed))
                for child in children:
                    for ahead, which in point.cover(child):
                        if ahead:
                            raise Violation(self._say(name, point, which.some(self.draw), child.function, allowed))
                known = len(seen)
                for image in self._built(point):
                    found = memo(image)
                    if isinstance(found, Exception) or found not in allowed:
                        raise Violation(self._say(name, point, image, found, allowed))
                    seen.add(_name(point, image))
                self.counts["images"] += len(seen) - known
                for image in point.some(self._times(self.resumes), self.draw):
                    self.resume(name, point, image, memo(image), allowed, wide)
                for image in point.some(self._times(self.foreign), self.draw):
                    self.open_foreign(image, memo(image))
        self.counts["readings"] += memo.runs

    def _times(self, number: float) -> int:
        return int(number) + (self.draw.random() < number % 1)

    def _built(self, point: Point) -> Iterator[Image]:
        return point.all() if point.count() <= self.build else point.some(self.build, self.draw)

    def open_foreign(self, image: Image, found: State | str) -> None:
        if isinstance(found, State):
            from tests.campaign import foreign

            foreign.check(image.tree(), found)
            self.counts["opened by zarr-python"] += 1

    def resume(
        self, name: str, point: Point, image: Image, found: State | str, allowed: set[State | str], wide: bool = False
    ) -> None:
        """A writer goes on from an image, and a reader finds what was there and what it added; also after a crash."""
        self.counts["resumed"] += 1
        name = f"{name}, crashed at {point.position}, resumed"
        disk = image.disk()
        states: list[State | str] = [found, found, found, found]
        disk.mark(("ack" if isinstance(found, State) else "attempt", 0))
        disk.mark(("attempt", 1))
        try:
            writer = open_writer(disk.storage(), resume=True)
            # A commit that was claimed and is not the root yet is gone on from: it was attempted.
            present = recover(disk.storage())
            if not isinstance(present, State) or present not in (allowed | {State()} if found == NO_STORE else allowed):
                raise Violation(f"after the resume {present}")
            now = present.trajectories
            states[1:] = present, State((*now, rows_of(90, wide))), State((*now, rows_of(90, wide), rows_of(92, wide)))
            disk.mark(("ack", 1))
            writer.append(trajectory(90, wide), seed=90)
            disk.mark(("attempt", 2))
            writer.commit()
            disk.mark(("ack", 2))
            writer.append(trajectory(92, wide), seed=92)
            disk.mark(("attempt", 3))
            writer.close()
            disk.mark(("ack", 3))
            after = recover(disk.storage())
            if after != states[3]:
                raise Violation(f"{after} instead of {states[3]}")
        except Exception as error:
            raise Violation(self._say(name, point, image, error, {found})) from error
        if self.draw.random() < self.again:
            self.counts["crashed again"] += 1
            once = replace(self, build=0, resumes=0, foreign=0)
            once.log(disk, states, name, image.disk(), wide=wide)

    def _say(self, name: str, point: Point, image: Image, found: object, allowed: object) -> str:
        files = "\n  ".join(f"{key} {len(data)}" for key, data in sorted(image.tree().items()))
        when = f"workload {name!r}, after effect {point.position}"
        return f"{when}: recovered {found!r}, allowed {allowed}; files\n  {files}"
