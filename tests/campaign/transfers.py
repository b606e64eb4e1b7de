"""Imports, exports, verifications and reworks of whole stores, killed: what they make is there and whole, or not there.

Each runs in a child that is forked from a process with everything imported, and dies by SIGKILL before its n-th
operation on the storage, or at a random moment. Then its source has not changed, its destination is whole or not
there, and the same call made again works.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trajstore
from tests.campaign.disk import CHANGES, SYNCS
from tests.campaign.explorer import Violation
from tests.campaign.workload import OPTIONS, room, trajectory
from trajstore.exporters.hdf5 import export_hdf5
from trajstore.exporters.routes import export_routes
from trajstore.importers.hdf5 import import_hdf5
from trajstore.importers.routes import import_routes
from trajstore.media.storage import LocalStorage
from trajstore.operations.compact import compact
from trajstore.operations.merge import merge
from trajstore.operations.repair import repair
from trajstore.operations.split import split
from trajstore.operations.verify import verify

ROUTES = Path(__file__).resolve().parent.parent / "data/coinrun_routes.npz"

Digest = Callable[[Path], str]


def digest(dataset: trajstore.Dataset) -> str:
    """Every value of every field and column."""
    whole = hashlib.sha256(repr((len(dataset), sorted(dataset.fields))).encode())
    for name in ("id", "seed"):
        if name in dataset.columns:
            whole.update(dataset.column(name).tobytes())
    for path in sorted(dataset.fields):
        pairs = dataset.field_pairs(path)
        whole.update((pairs[:, 1] - pairs[:, 0]).tobytes())
        for trajectory_ in dataset:
            whole.update(repr(getattr(trajectory_[path], "dtype", "")).encode())
            value = trajectory_[path]
            whole.update(value[:].tobytes() if hasattr(value, "dtype") else repr(value).encode())
    return whole.hexdigest()


def bytes_of(place: Path) -> str:
    """Every byte of a file, or of the files of a folder; ``""`` if there is nothing. Locks are not looked at."""
    if place.is_file():
        return hashlib.sha256(place.read_bytes()).hexdigest()
    whole = hashlib.sha256()
    for file in sorted(file for file in place.rglob("*") if file.is_file() and file.name != "lock"):
        whole.update(file.relative_to(place).as_posix().encode() + b"\0" + file.read_bytes())
    return whole.hexdigest() if place.exists() else ""


def store_at(place: Path) -> str:
    """The digest of a store, once ``verify`` has found nothing wrong; ``""`` if there is nothing at its path."""
    if not os.path.lexists(place):
        return ""
    if place.suffix != ".h5" and not verify(place, deep=True).ok:
        raise Violation(f"{place.name} is damaged")
    return digest(trajstore.open(place))


def parts_at(place: Path) -> str:
    """The digest of the two parts of a split."""
    found = [store_at(place / name) for name in ("first", "rest")]
    if ("" in found) and any(found):
        raise Violation("one part of a split without the other")
    return "" if not all(found) else hashlib.sha256(repr(found).encode()).hexdigest()


def _export_hdf5(start: Path, out: Path) -> None:
    export_hdf5(trajstore.open(start / "source"), out)


def _import_hdf5(start: Path, out: Path) -> None:
    import_hdf5(start / "source.h5", out)


def _export_routes(start: Path, out: Path) -> None:
    export_routes(start / "routes", out)


def _import_routes(start: Path, out: Path) -> None:
    import_routes(ROUTES, out)


def _merge(start: Path, out: Path) -> None:
    merge([start / "source", start / "other"], out)


def _compact(start: Path, out: Path) -> None:
    compact(start / "source", out)


def _split(start: Path, out: Path) -> None:
    split(start / "source", out, first=11)


def _repair(start: Path, out: Path) -> None:
    repair(start / "source", out)


def _verify(start: Path, out: Path) -> None:
    if not verify(start / "source", deep=True).ok:
        raise Violation("verify finds damage where there is none")
    aside = out.with_name("tmp.verified")  # the word is the harness's own: it must be whole too
    aside.write_text("verified")
    aside.rename(out)


JOBS: dict[str, tuple[Callable[[Path, Path], None], str, Digest]] = {
    "export of HDF5": (_export_hdf5, "out.h5", store_at),
    "import of HDF5": (_import_hdf5, "out", store_at),
    "export of routes": (_export_routes, "out.npz", bytes_of),
    "import of routes": (_import_routes, "out", store_at),
    "merge": (_merge, "out", store_at),
    "compact": (_compact, "out", store_at),
    "split": (_split, "out", parts_at),
    "repair": (_repair, "out", store_at),
    "verify": (_verify, "out", bytes_of),
}
if importlib.util.find_spec("h5py") is None or importlib.util.find_spec("hdf5plugin") is None:
    JOBS = {name: job for name, job in JOBS.items() if "HDF5" not in name}


def in_child(function: Callable[[], str], after: float | None = None) -> str | None:
    """What a forked child returns; ``None`` if it was killed, by itself or ``after`` so many seconds.

    Raises ``Violation`` for what it raises.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks in processes that have threads
        child = os.fork()
    if child == 0:
        code = 70
        try:
            answer = function()
            code = 0
        except BaseException as error:
            answer = repr(error)
        try:
            os.write(writing, answer.encode())
        finally:
            os._exit(code)
    os.close(writing)
    try:
        if after is not None:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
        answer_ = b""
        while data := os.read(reading, 1 << 16):
            answer_ += data
    finally:
        os.close(reading)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 70:
        raise Violation(answer_.decode())
    return answer_.decode() if status == 0 else None


class Mortal:
    """Has the process die before the n-th change of any storage; counts them."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.made = 0
        for name in (*CHANGES, *SYNCS):
            setattr(LocalStorage, name, self._counted(getattr(LocalStorage, name)))

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.made += 1
            if self.made == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*args, **options)

        return counted


class Workshop:
    """A folder with sources, and one kind of job that is killed there again and again."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.do, target, self.look = JOBS[name]
        self.out = folder / "outs" / target
        self.out.parent.mkdir(exist_ok=True)
        started = time.monotonic()
        self.operations = int(in_child(lambda: self._run(1 << 60)) or 0)
        self.seconds = time.monotonic() - started
        self.expected = self._found()
        self.sources = self._sources()
        self.clear()
        if not self.expected:
            raise Violation(f"{name} made nothing")

    def _run(self, at: int) -> str:
        mortal = Mortal(at)
        self.do(self.folder, self.out)
        return str(mortal.made)

    def _found(self) -> str:
        return in_child(lambda: self.look(self.out)) or ""

    def _sources(self) -> list[str]:
        return [bytes_of(path) for path in sorted(self.folder.iterdir()) if path.name != "outs"]

    def clear(self) -> None:
        LocalStorage(self.out.parent.parent).remove("outs")
        self.out.parent.mkdir()

    def killed(self, at: int, after: float | None = None) -> bool:
        """One run that is killed, and one that is not if it is needed; whether there was anything to kill."""
        what = f"{self.name}, killed " + (f"after {after:.4f} s" if after is not None else f"at operation {at}")
        try:
            ended = in_child(lambda: self._run(at), after)
            found = self._found()
            if found not in ("", self.expected):
                raise Violation("the destination is neither whole nor absent")
            if not found:
                if ended is not None:
                    raise Violation("it ended, and made nothing")
                in_child(lambda: self._run(1 << 60))
                if self._found() != self.expected:
                    raise Violation("the second run made something else")
            if self._sources() != self.sources:
                raise Violation("a source was changed")
        except Violation as error:
            raise Violation(f"{what}: {error}") from error
        self.clear()
        return ended is None


def sources(start: Path) -> str:
    """Make what the jobs start from."""
    for name, seeds in (("source", range(60)), ("other", range(100, 120))):
        with trajstore.create(start / name, **OPTIONS) as writer:
            for seed in seeds:
                writer.append(trajectory(seed, True), seed=seed)
                if seed % 20 == 19:
                    writer.commit()
    if "export of HDF5" in JOBS:
        export_hdf5(trajstore.open(start / "source"), start / "source.h5")
    import_routes(ROUTES, start / "routes")
    return ""


def campaign(each: int, seed: int = 0, names: tuple[str, ...] = ()) -> Counter[str]:
    """Each job killed so many times, half of them before an operation, half at a random moment."""
    sys.stdout.flush()
    draw = random.Random(seed)
    counts: Counter[str] = Counter()
    with room() as folder:
        in_child(lambda: sources(folder))
        for name in names or JOBS:
            workshop = Workshop(folder, name)
            for number in range(each):
                if number % 2 == 0 and workshop.operations:
                    dead = workshop.killed(draw.randint(1, workshop.operations))
                else:
                    dead = workshop.killed(0, draw.uniform(0, workshop.seconds))
                counts[f"{name}: killed" if dead else f"{name}: ended first"] += 1
                counts["killed"] += dead
    return counts
