"""Rows of the table: what is measured, how a ratio comes about, and the list of all rows.

A row is a function that takes a :class:`Bench` and yields :class:`Claim` s. Put it into a module of this package,
decorate it, and name the module in ``bench.__main__.MODULES``::

    @row("scan")
    def scan(bench: Bench) -> Iterator[Claim]:
        times = bench.compare({"trajstore": ours, "zarr-python": theirs})
        yield times.claim("whole scan of a field", "zarr-python", ">= 8")

Callables are timed in turn, round after round, so that whatever else the machine does meets all of them; the ratio is
taken within each round. What they return is compared, outside of the time.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import shutil
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

OURS = "trajstore"


class WrongResultError(Exception):
    """Two contestants did not read or write the same bytes: their times mean nothing."""


class SkipRow(Exception):
    """The row cannot be measured here; the message says what is missing."""


@dataclass(frozen=True)
class Ratio:
    """Median of several measured ratios, with the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Ratio:
        return cls(float(statistics.median(values)), float(min(values)), float(max(values)))


@dataclass(frozen=True)
class Claim:
    """One line of the table.

    work, peer : what was done, and against whom.
    ratio : how many times better than the peer, or, where ``bar`` begins with ``<=``, how many times its cost.
    bar : what it must reach, such as ``">= 20"`` or ``"<= 1.5"``; ``""`` where it is only recorded.
    peak : of each contestant, bytes by which its resident memory grew at most.
    cpu : the ratio of processor seconds, all threads together, where times were compared: on a machine that others use
        too, it says more than the clock does, but nothing of how well the cores were kept busy.
    """

    work: str
    peer: str
    ratio: Ratio
    bar: str = ""
    note: str = ""
    peak: Mapping[str, int] = field(default_factory=dict)
    cpu: Ratio | None = None

    @property
    def reached(self) -> bool | None:
        if not self.bar:
            return None
        sign, value = self.bar.split()
        return bool(self.ratio.median >= float(value) if sign == ">=" else self.ratio.median <= float(value))


@dataclass
class Times:
    """Seconds of each contestant in each round, on the clock and of processors, and growth of its resident memory."""

    seconds: dict[str, list[float]]
    peak: dict[str, int]
    cpu: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, over: str, under: str = OURS) -> Ratio:
        """Time of ``over`` divided by that of ``under``, round by round."""
        return Ratio.of([a / b for a, b in zip(self.seconds[over], self.seconds[under])])

    def cpu_ratio(self, over: str, under: str = OURS) -> Ratio | None:
        """Processor time of ``over`` divided by that of ``under``, round by round."""
        if not self.cpu or not all(self.cpu[under]):
            return None
        return Ratio.of([a / b for a, b in zip(self.cpu[over], self.cpu[under])])

    def median(self, name: str = OURS) -> float:
        return statistics.median(self.seconds[name])

    def claim(self, work: str, peer: str, bar: str = "", *, ours: str = OURS, note: str = "") -> Claim:
        """A claim about time: ``>=`` bars ask how many times faster, ``<=`` bars how many times the peer's time."""
        over, under = (ours, peer) if bar.startswith("<=") else (peer, ours)
        peak = {name: self.peak[name] for name in (ours, peer)}
        return Claim(work, peer, self.ratio(over, under), bar, note, peak, self.cpu_ratio(over, under))


class Bench:
    """What a row gets: a place to work in, and how thorough to be."""

    def __init__(self, folder: Path, *, short: bool) -> None:
        self.folder = folder
        self.short = short
        folder.mkdir(parents=True, exist_ok=True)
        self.repeats = 3 if short else 7

    def scratch(self, name: str) -> Path:
        """An empty folder; what was there under this name is gone."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def compare(
        self,
        work: Mapping[str, Callable[[], Any]],
        *,
        prepare: Callable[[str], None] | None = None,
        check: Callable[[Any, Any], bool] | None = None,
        repeats: int | None = None,
        inner: int = 1,
    ) -> Times:
        """Time each callable ``repeats`` times, in turn.

        prepare : called with the contestant's name before each of its calls, outside of the time.
        check : whether two results agree; by default as arrays. A first, untimed round is checked, and most of the
            memory is seen in it: what the process holds and does not use is given back before each call there, so
            that growth is not hidden by what the contestant before left behind.
        inner : calls in one timed stretch, for work of microseconds.
        """
        check = check or _same
        first: Any = None
        times = Times({name: [] for name in work}, dict.fromkeys(work, 0), {name: [] for name in work})
        for number, (name, call) in enumerate(work.items()):
            if prepare:
                prepare(name)
            found, times.peak[name] = peak_of(call)
            if number == 0:
                first = found
            elif not check(first, found):
                raise WrongResultError(f"{name} and {next(iter(work))} differ")
        first = found = None
        for _ in range(repeats or self.repeats):
            for name, call in work.items():
                if prepare:
                    prepare(name)
                gc.collect()
                before = _reset_peak()
                begun, used = time.perf_counter(), time.process_time()
                for _ in range(inner):
                    call()
                times.seconds[name].append((time.perf_counter() - begun) / inner)
                times.cpu[name].append((time.process_time() - used) / inner)
                times.peak[name] = max(times.peak[name], _peak() - before)
        return times


def second_thread() -> float:
    """How many times the work of one thread two do: 2 on cores of their own, less where processors share one."""
    packed = zlib.compress(np.random.default_rng(0).integers(0, 16, 4 << 20, np.uint8).tobytes(), 1)

    def inflated(_: int) -> float:
        begun = time.thread_time()
        zlib.decompress(packed)
        return time.thread_time() - begun

    def seconds(threads: int) -> float:
        with ThreadPoolExecutor(threads) as pool:
            return statistics.mean(pool.map(inflated, range(4 * threads)))

    return float(statistics.median(2 * seconds(1) / seconds(2) for _ in range(5)))


def peak_of(call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call returns, and the bytes by which the process grew at most meanwhile."""
    gc.collect()
    _give_back()
    before = _reset_peak()
    return call(), _peak() - before


def fresh_peak(call: Callable[..., Any], *arguments: Any) -> int:
    """Bytes by which a new process grows at most in one call of a function that can be imported."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_grow, call, arguments).result()


def _grow(call: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    before = _reset_peak()
    call(*arguments)
    return _peak() - before


def _same(a: Any, b: Any) -> bool:
    if a is None and b is None:
        return True
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _give_back() -> None:
    """Return to the system what was freed (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    return 0


def _reset_peak() -> int:
    """Begin a new high-water mark (Linux); the resident bytes now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return 0


def _peak() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        return 0


Row = Callable[[Bench], Iterator[Claim]]
ROWS: dict[str, Row] = {}


def row(name: str) -> Callable[[Row], Row]:
    """Enter a function into the list of rows under a name that ``--only`` takes."""

    def enter(function: Row) -> Row:
        if name in ROWS:
            raise ValueError(f"two rows are called {name!r}")
        ROWS[name] = function
        return function

    return enter
