"""Every state that a power failure could leave at each point of a disk's log."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.campaign.disk import ABOVE, Disk, Image

Change = tuple[int, tuple[tuple[str, int], ...]]  # number of the operation, and (name, node or 0) in this folder


@dataclass
class Point:
    """One moment of a log, with what a power failure could leave there.

    choices : the possible contents of each folder. data : the possible contents of each file that is not synced.
    acked, attempted : the last marks before this moment, of commits acknowledged and begun.
    """

    position: int
    choices: dict[int, list[dict[str, int]]]
    files: dict[int, bytes]
    data: dict[int, list[bytes]]
    acked: int
    attempted: int
    _free: dict[int, int] = field(default_factory=dict)
    _below: dict[int, list[int]] = field(default_factory=dict)  # the folders in each possible content of a folder

    def count(self, chosen: Chosen | None = None) -> int:
        """How many images there are, of those that agree with what is chosen."""
        return self._count(ABOVE, chosen or Chosen(self))

    def _count(self, folder: int, chosen: Chosen) -> int:
        free = folder not in chosen.touched
        if free and folder in self._free:
            return self._free[folder]
        total = 0
        for names in chosen.folders.get(folder, self.choices[folder]):
            ways = 1
            for node in names.values():
                if node in self.choices:
                    ways *= self._count(node, chosen)
                elif node in self.data and node not in chosen.files:
                    ways *= len(self.data[node])
            total += ways
        if free:
            self._free[folder] = total
        return total

    def cover(self, function: Callable[[Any], Any], chosen: Chosen | None = None) -> Iterator[tuple[Any, Chosen]]:
        """A function's results over all images, and which images have them: only what it asks for is told apart."""
        chosen = chosen or Chosen(self)
        try:
            result = function(chosen)
        except Undecided as open_question:
            for part in open_question.parts:
                yield from self.cover(function, part)
        else:
            yield result, chosen

    def all(self) -> Iterator[Image]:
        """Each image once."""
        for folders in self._trees([ABOVE], {}):
            yield from self._with_data(folders)

    def _trees(self, waiting: list[int], chosen: dict[int, dict[str, int]]) -> Iterator[dict[int, dict[str, int]]]:
        if not waiting:
            yield dict(chosen)
            return
        folder, rest = waiting[0], waiting[1:]
        for names in self.choices[folder]:
            chosen[folder] = names
            yield from self._trees(rest + [node for node in names.values() if node in self.choices], chosen)
        del chosen[folder]

    def _with_data(self, folders: dict[int, dict[str, int]]) -> Iterator[Image]:
        loose = self._loose(folders)
        if not loose:
            yield Image(folders, self.files)
            return
        for contents in itertools.product(*(self.data[node] for node in loose)):
            yield Image(folders, {**self.files, **dict(zip(loose, contents))})

    def _loose(self, folders: dict[int, dict[str, int]]) -> list[int]:
        if not self.data:
            return []
        return sorted({node for names in folders.values() for node in names.values() if node in self.data})

    def some(self, count: int, draw: random.Random) -> Iterator[Image]:
        """Images at random; the same one may come twice."""
        choices, below = self.choices, self._below
        number = draw.random
        for _ in range(count):
            folders: dict[int, dict[str, int]] = {}
            waiting = [ABOVE]
            while waiting:
                folder = waiting.pop()
                possible = choices[folder]
                names = possible[int(number() * len(possible))] if len(possible) > 1 else possible[0]
                folders[folder] = names
                inside = below.get(id(names))
                if inside is None:
                    inside = below[id(names)] = [node for node in names.values() if node in choices]
                waiting += inside
            loose = self._loose(folders)
            files = {**self.files, **{node: draw.choice(self.data[node]) for node in loose}} if loose else self.files
            yield Image(folders, files)


class Undecided(BaseException):
    """A reader asked for something of which it is not decided yet what a crash left; the answers part the images."""

    def __init__(self, parts: list[Chosen]) -> None:
        super().__init__()
        self.parts = parts


class Chosen:
    """Images that agree in what was asked for so far; looked at as one image is, until it matters which.

    folders : the contents that are still possible, of each folder that was asked for. files : likewise, decided.
    touched : these folders, and all above them.
    """

    def __init__(self, point: Point) -> None:
        self.point = point
        self.folders: dict[int, list[dict[str, int]]] = {}
        self.files: dict[int, bytes] = {}
        self.touched: frozenset[int] = frozenset()

    def _with(self, inside: list[int]) -> Chosen:
        more = Chosen(self.point)
        more.folders, more.files, more.touched = dict(self.folders), dict(self.files), self.touched | set(inside)
        return more

    def _decide(self, folder: int, inside: list[int], ask: Callable[[dict[str, int]], Any]) -> Any:
        """What a folder answers, if its possible contents agree."""
        choices = self.folders.get(folder) or self.point.choices.get(folder)
        if choices is None:
            return None
        answers: dict[Any, list[dict[str, int]]] = {}
        for names in choices:
            answers.setdefault(ask(names), []).append(names)
        if len(answers) == 1:
            return next(iter(answers))
        parts = []
        for possible in answers.values():
            part = self._with(inside)
            part.folders[folder] = possible
            parts.append(part)
        raise Undecided(parts)

    def look(self, question: str) -> object:
        node, inside = ABOVE, [ABOVE]
        for name in question.rstrip("/").split("/"):
            node = self._decide(node, inside, lambda names, name=name: names.get(name, 0)) or 0  # type: ignore[misc]
            if not node:
                return None
            inside.append(node)
        if question.endswith("/"):
            return self._decide(node, inside, frozenset)
        if node in self.point.data and node not in self.files:
            parts = []
            for data in self.point.data[node]:
                part = self._with(inside)
                part.files[node] = data
                parts.append(part)
            raise Undecided(parts)
        return self.files.get(node, self.point.files.get(node))

    def some(self, draw: random.Random) -> Image:
        """One of these images."""
        point = self.point
        data = {**point.data, **{node: [content] for node, content in self.files.items()}}
        choices = {**point.choices, **self.folders}
        narrowed = Point(point.position, choices, point.files, data, point.acked, point.attempted)
        return next(narrowed.some(1, draw))


class Replay:
    """Goes through a log effect by effect, keeping what is durable apart from what may be."""

    def __init__(self, disk: Disk) -> None:
        self._log = disk.log
        self._durable: dict[int, dict[str, int]] = {ABOVE: {}}
        self._pending: dict[int, list[Change]] = {}
        self._files: dict[int, bytes] = {}
        self._synced: dict[int, bytes] = {}
        self._made: set[int] = set(disk.folders)
        self._acked = self._attempted = -1
        self._cache: dict[int, tuple[Any, list[dict[str, int]]]] = {}
        self._interned: dict[frozenset[tuple[str, int]], dict[str, int]] = {}

    def points(self, start: Disk | None = None) -> Iterator[Point]:
        """Every moment of the log, the one before its first effect included.

        start : the disk, all of it durable, on which the log began; an empty one if left out.
        """
        if start is not None:
            self._durable = {node: dict(names) for node, names in start.folders.items()}
            self._files = dict(start.files)
            self._synced = dict(start.files)
        for position, effect in enumerate(self._log):
            if effect[0] != "mark":
                yield self._point(position)
            self._apply(position, effect)
        yield self._point(len(self._log))

    def _apply(self, position: int, effect: Any) -> None:
        kind = effect[0]
        if kind == "names":
            by_folder: dict[int, list[tuple[str, int]]] = {}
            for folder, name, node in effect[1]:
                by_folder.setdefault(folder, []).append((name, node))
                if node in self._made:
                    self._durable.setdefault(node, {})
                elif node and node not in self._synced:
                    self._synced[node] = self._files[node] = b""
            for folder, changes in by_folder.items():
                self._pending.setdefault(folder, []).append((position, tuple(changes)))
        elif kind == "data":
            self._files[effect[1]] = effect[2]
        elif kind == "sync":
            self._synced[effect[1]] = self._files[effect[1]]
        elif kind == "syncdir":
            names = self._durable[effect[1]]
            for _, changes in self._pending.pop(effect[1], ()):
                _change(names, changes)
        elif effect[1][0] == "attempt":
            self._attempted = effect[1][1]
        elif effect[1][0] == "ack":
            self._acked = effect[1][1]

    def _point(self, position: int) -> Point:
        choices = {folder: self._choices(folder) for folder in self._durable}
        data = {
            node: _contents(self._synced[node], content)
            for node, content in self._files.items()
            if self._synced[node] is not content
        }
        return Point(position, choices, dict(self._files), data, self._acked, self._attempted)

    def _choices(self, folder: int) -> list[dict[str, int]]:
        pending = tuple(self._pending.get(folder, ()))
        stamp = (pending, len(self._durable[folder]), id(self._durable[folder]))
        known = self._cache.get(folder)
        if known is not None and known[0] == stamp and pending:
            return known[1]
        found: dict[frozenset[tuple[str, int]], dict[str, int]] = {}
        if len(pending) > 12:  # a folder as full as this is sampled: all, nothing, all but one, prefixes
            subsets: Any = [pending[:n] for n in range(len(pending) + 1)]
            subsets += [pending[:n] + pending[n + 1 :] for n in range(len(pending))]
            subsets += [(change,) for change in pending]
        else:
            subsets = itertools.chain.from_iterable(itertools.combinations(pending, n) for n in range(len(pending) + 1))
        for subset in subsets:
            names = dict(self._durable[folder])
            for _, changes in subset:
                _change(names, changes)
            key = frozenset(names.items())
            found[key] = self._interned.setdefault(key, names)
        choices = list(found.values())
        self._cache[folder] = stamp, choices
        return choices


def _change(names: dict[str, int], changes: tuple[tuple[str, int], ...]) -> None:
    for name, node in changes:
        if node:
            names[name] = node
        else:
            names.pop(name, None)


def _contents(synced: bytes, written: bytes) -> list[bytes]:
    """What may be in a file whose last bytes are not synced: nothing of them, half, zeros, all."""
    kept = written[: len(synced)] if written[: len(synced)] == synced else b""
    new = written[len(kept) :]
    options = [synced, kept + new[: len(new) // 2], kept + bytes(len(new)), written]
    return list(dict.fromkeys(options))
