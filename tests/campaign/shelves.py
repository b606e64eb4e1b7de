"""Checkpoints saved, linked, stripped, pruned and gone on from, on the disk in memory: every image of every moment."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from tests.campaign.disk import Disk, Image, Tapped
from tests.campaign.explorer import Memo, Violation
from tests.campaign.images import Replay
from trajstore.checkpoint import Checkpoints
from trajstore.checkpoint.chunks import Pool
from trajstore.checkpoint.reading import Reader, verify_checkpoint
from trajstore.checkpoint.shelf import Shelf
from trajstore.errors import TrajstoreError
from trajstore.media.storage import Storage

Found = tuple[tuple[int, int, bool], ...]  # of each checkpoint on the shelf: serial, step, whether it was stripped
OPTIONS: dict[str, Any] = {"rng": False, "threads": 1, "on_signal": "ignore"}
_POOL = Pool(0)


def value(step: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(step).standard_normal(40)


def state(step: int) -> dict[str, Any]:
    return {"model": {"w": value(step), "frozen": np.arange(30.0)}, "opt": {"step": step}}


class Acts:
    """What was saved and acknowledged; each change is a mark in the disk's log, that names it by number."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.attempted: list[frozenset[int]] = [frozenset()]
        self.newest = [-1]  # serial of the last checkpoint that was acknowledged

    def attempt(self, step: int) -> None:
        self.attempted.append(self.attempted[-1] | {step})
        self.disk.mark(("attempt", len(self.attempted) - 1))

    def acknowledge(self, serial: int) -> None:
        self.newest.append(serial)
        self.disk.mark(("ack", len(self.newest) - 1))


def session(storage: Storage, acts: Acts, steps: Iterable[int], back: int | None = None) -> None:
    """Save at these steps with retention, milestones and links. back : first resume there, and prune what follows."""
    with Checkpoints(storage, 2, ("r", "max", 1), 3, "model", **OPTIONS) as shelf:
        if back is not None:
            shelf.restore(step=back, abandoned="prune")
        for step in steps:
            acts.attempt(step)
            shelf.save(step, state(step), {"r": float(-abs(step - 2))})
            shelf.wait()
            newest = shelf.latest()
            assert newest is not None
            acts.acknowledge(newest.serial)


def workload(disk: Disk, saves: int, wrap: Callable[[Storage], Storage] = lambda storage: storage) -> Acts:
    """Saves, then a resume at an older step that prunes, and saves after it."""
    storage, acts = disk.storage(), Acts(disk)
    storage.make_root()
    session(wrap(storage), acts, range(saves))
    session(wrap(storage), acts, range(saves - 1, saves + 1), back=saves - 2)
    return acts


def look(storage: Storage) -> Found:
    """All checkpoints that are there, each verified and read. Raises ``TrajstoreError`` for damage."""
    shelf = Shelf(storage)
    found = []
    for name in sorted(shelf.names()):
        record = shelf.record(name)
        verify_checkpoint(storage.child(name), record, _POOL)
        if not np.array_equal(Reader(storage.child(name), record, _POOL).part(("model", "w")), value(record.step)):
            raise Violation(f"{name} holds another state")
        found.append((record.serial, record.step, bool(record.stripped)))
    return tuple(found)


def judge(found: Found | Exception, attempted: frozenset[int], newest: int) -> str:
    """What is wrong with what was found; ``""`` for nothing."""
    if isinstance(found, Exception):
        return repr(found)
    if any(step not in attempted for _, step, _ in found):
        return f"a step that was never saved: {found}"
    whole = [serial for serial, _, stripped in found if not stripped]
    if newest >= 0 and max(whole, default=-1) < newest:
        return f"the newest acknowledged, {newest}, is gone: {found}"
    return ""


def mutated(mutant: str, storage: Storage) -> Storage:
    """A storage that leaves out one of the things that durability rests on."""

    def tap(name: str, arguments: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        key = str(arguments[0]) if arguments else ""
        lost = {
            "no sync of the root": name == "sync_folder" and key == "",
            "no sync of arrays": name == "sync_folder" and key.count("/") == 2 and "tmp." in key,
            "no sync of the new folder": name == "sync_folder" and key.count("/") == 1 and "tmp." in key,
        }
        return None if lost.get(mutant) else call()

    class Forgetful(Tapped):
        def write(self, *arguments: Any, **options: Any) -> None:
            self.inner.write(*arguments, **{**options, "sync": mutant != "no data sync" and options.get("sync", True)})

    return Forgetful(storage, tap)  # type: ignore[return-value]


MUTANTS = ("no data sync", "no sync of the root", "no sync of arrays", "no sync of the new folder")


def explore(saves: int = 7, mutant: str = "", resumes: int = 0, seed: int = 0) -> Counter[str]:
    """Look at every image of every moment. resumes : images from which a training goes on. Raises ``Violation``."""
    disk, draw, counts = Disk(), random.Random(seed), Counter[str]()
    acts = workload(disk, saves, partial(mutated, mutant) if mutant else lambda storage: storage)
    memo = Memo(_answer)
    points = list(Replay(disk).points())
    for point in points:
        attempted, newest = acts.attempted[max(point.attempted, 0)], acts.newest[max(point.acked, 0)]
        counts["moments"] += 1
        for found, which in point.cover(memo):
            counts["covered"] += point.count(which)
            wrong = judge(found, attempted, newest)
            if wrong:
                raise Violation(f"after effect {point.position}: {wrong}")
    counts["readings"] = memo.runs
    while counts["resumed"] < resumes:
        image = next(draw.choice(points).some(1, draw))
        if _is_tree(image):
            go_on(image.disk())
            counts["resumed"] += 1
    return counts


def _is_tree(image: Image) -> bool:
    """Whether no folder has two names, as only half of a rename from one folder to another could leave it.

    Readers must stand that too, and are shown it; no file system that keeps a journal does it.
    """
    below = [node for names in image.folders.values() for node in names.values() if node not in image.files]
    return len(below) == len(set(below))


def _answer(storage: Storage) -> Found | Exception:
    try:
        return look(storage)
    except TrajstoreError as error:
        return error


def go_on(disk: Disk) -> None:
    """A training goes on from an image: it saves, restores and verifies, and what a dead one left is cleared away."""
    storage = disk.storage()
    storage.make_root()
    with Checkpoints(storage, 2, **OPTIONS) as shelf:
        before = shelf.latest()
        shelf.save(100, state(100), {"r": 0.0})
        shelf.wait()
        after = shelf.latest()
        assert after is not None and shelf.restore().step == 100
        if shelf.verify() or (before is not None and after.serial <= before.serial):
            raise Violation(f"a shelf that was gone on from holds {shelf.verify()}, {before}, {after}")
        left = [name for name in storage.list("__trajstore") if name.startswith("tmp.")]
        if left or storage.list("__trajstore/trash"):
            raise Violation(f"left behind: {left}, {storage.list('__trajstore/trash')}")


def campaign(seed: int = 0) -> Counter[str]:
    return explore(random.Random(seed).randint(3, 8), resumes=20, seed=seed)
