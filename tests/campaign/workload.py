"""What is done to a store in a campaign, the model of what it must then hold, and how it is read back."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import trajstore
from trajstore.engine import ingest
from trajstore.format import encoding
from trajstore.media.storage import Storage

Rows = tuple[Any, ...]  # one trajectory: seed, and the bytes of each of its fields


@dataclass(frozen=True)
class State:
    """All that a reader can see of a store: its trajectories in order, and the seeds completed."""

    trajectories: tuple[Rows, ...] = ()

    def __repr__(self) -> str:
        return f"seeds {[rows[0] for rows in self.trajectories]}"


NO_STORE = "no store"


@contextlib.contextmanager
def tiny_shards() -> Iterator[None]:
    """Chunks of 2 rows and shards of 4, for fields and for the table: every commit crosses a border of something."""
    sizes = {"_NARROW_ROWS": 2, "_SHARD_ROWS": 4, "_TABLE_CHUNK_ROWS": 2, "_TABLE_SHARD_ROWS": 4}
    with contextlib.ExitStack() as stack:
        for name, value in sizes.items():
            assert hasattr(encoding, name), name
            stack.enter_context(mock.patch.object(encoding, name, value))
        yield


@contextlib.contextmanager
def room() -> Iterator[Path]:
    """A folder for real files: in memory where that can be had, since what a kill leaves does not hang on the disk."""
    memory = "/dev/shm"
    spacious = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 256 << 20
    with tempfile.TemporaryDirectory(dir=memory if spacious else None) as folder:
        yield Path(folder)


class Inline:
    """An executor without threads: whoever hands work over does it."""

    def __init__(self, threads: int = 1, thread_name_prefix: str = "") -> None:
        pass

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(function(*arguments, **options))
        except Exception as error:
            done.set_exception(error)
        return done

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass


@contextlib.contextmanager
def one_by_one() -> Iterator[None]:
    """The work of a commit one piece after the other, in the thread that commits: a log is the same each time."""
    with mock.patch.object(ingest, "Pool", Inline):
        yield


def trajectory(seed: int, wide: bool = False) -> dict[str, Any]:
    """The trajectory of a seed: 1 to 3 steps; ``wide`` adds fields on other clocks and of other shapes."""
    steps = 1 + seed % 3
    data: dict[str, Any] = {"x": np.arange(seed * 16, seed * 16 + steps, dtype=np.int32) + 1}
    if wide:
        data["obs"] = {"image": np.full((steps + 1, 2, 3), seed % 251 + 1, np.uint8)}
        data["note"] = f"seed {seed}"
    return data


def rows_of(seed: int, wide: bool = False) -> Rows:
    """A trajectory as ``recover`` finds it."""
    data = trajectory(seed, wide)
    found: list[Any] = [seed, data["x"].tobytes()]
    if wide:
        found += [data["obs"]["image"].tobytes(), data["note"].encode()]
    return tuple(found)


def recover(storage: Storage) -> State | str:
    """What a reader finds. Raises what a reader raises where it should find something."""
    try:
        dataset = trajstore.open(storage)
    except trajstore.errors.NotFoundError:
        return NO_STORE
    return state_of(dataset)


def state_of(dataset: trajstore.Dataset) -> State:
    count = len(dataset)
    if not count:
        return State()
    seeds = dataset.column("seed").tolist()
    parts: list[list[bytes]] = [[] for _ in range(count)]
    for path in ("x", "obs/image", "note"):
        if path in dataset.fields:
            pairs = dataset.field_pairs(path)
            rows = dataset.snapshots[0].field(path).read_runs(*pairs.T)
            ends = np.cumsum(pairs[:, 1] - pairs[:, 0])
            for found, values in zip(parts, np.split(rows, ends[:-1])):
                found.append(values.tobytes())
    return State(tuple((seed, *found) for seed, found in zip(seeds, parts)))


OPTIONS: dict[str, Any] = {"commit_every": None, "handle_signals": False, "threads": 1}


def open_writer(storage: Storage, **options: Any) -> trajstore.Writer:
    return trajstore.create(storage, **{**OPTIONS, **options})  # type: ignore[arg-type]


@dataclass
class Run:
    """Carries out operations on a disk, marking in its log what was attempted and what acknowledged.

    Operations are letters: ``a`` append one trajectory and commit; ``f`` append until the fields' shard is full and
    the next begun, and commit; ``b`` append without a commit; ``c`` close; ``r`` resume, as after a kill;
    ``d`` delete the first trajectory. The store is created first.
    """

    disk: Any
    wide: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    states: list[State | str] = field(default_factory=list)
    writer: trajstore.Writer | None = None

    def __post_init__(self) -> None:
        self._seeds = itertools.count()
        self._model: list[tuple[int, Rows]] = []  # by id
        self._buffered: list[tuple[int, Rows]] = []

    def __call__(self, operations: str) -> Run:
        with tiny_shards(), one_by_one():
            self._open(resume=False)
            for letter in operations:
                getattr(self, f"_{letter}")()
            if self.writer is not None:
                self.writer.abandon()
        return self

    def _attempt(self) -> None:
        self.states.append(State(tuple(rows for _, rows in self._model + self._buffered)))
        self.disk.mark(("attempt", len(self.states) - 1))

    def _acknowledge(self) -> None:
        self._model += self._buffered
        self._buffered = []
        self.disk.mark(("ack", len(self.states) - 1))

    def _open(self, resume: bool) -> None:
        self._attempt()
        self.writer = open_writer(self.disk.storage(), resume=resume, **self.options)
        self._acknowledge()

    def _need(self) -> trajstore.Writer:
        if self.writer is None:
            self._open(resume=True)
        assert self.writer is not None
        return self.writer

    def _append(self) -> None:
        seed = next(self._seeds)
        number = self._need().append(trajectory(seed, self.wide), seed=seed)
        assert number is not None
        self._buffered.append((number, rows_of(seed, self.wide)))

    def _commit(self) -> None:
        self._attempt()
        self._need().commit()
        self._acknowledge()

    def _a(self) -> None:
        self._append()
        self._commit()

    def _f(self) -> None:
        for _ in range(4):
            self._append()
        self._commit()

    def _b(self) -> None:
        self._append()

    def _d(self) -> None:
        if not self._model:
            self._a()
        writer = self._need()
        number, _ = self._model.pop(0)
        writer.delete(number)
        self._commit()

    def _c(self) -> None:
        if self.writer is not None:
            self._attempt()
            self.writer.close()
            self._acknowledge()
            self.writer = None

    def _r(self) -> None:
        if self.writer is not None:
            self.writer.abandon()
            self._buffered = []
        self._open(resume=True)
