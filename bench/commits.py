"""What durable commits cost, in time, bytes and flushes; and what a kill leaves."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import trajstore
from bench import data
from bench.ingest import collect
from bench.rows import Bench, Claim, Ratio, row
from trajstore.media.storage import LocalStorage, Piece
from trajstore.writer import COMMIT_EVERY, Writer


@row("commits")
def commits(bench: Bench) -> Iterator[Claim]:
    """Throughput of a collection with durable commits, beside one that commits at its end only.

    Both are made side by side, slice by slice in turn: two whole collections one after the other differ by more than a
    commit costs. The commits come in the background, as a timer's do, but after so many trajectories as are collected
    in that time, so that each falls into the middle of a slice of its own collection.
    """
    flush = _flush_seconds(bench)
    trajectories = [data.trajectory(route) for route in data.routes(24_000)]
    begun = time.perf_counter()
    collect(bench.scratch("commits") / "s", data.routes(24_000), "balanced", commit_every=None)
    rate = len(trajectories) / (time.perf_counter() - begun)
    for title, every, slices, seconds, rounds, bar in (
        ("durable commits each second", 1.0, 2, 5.0, 2 if bench.short else 5, "<= 1.05"),
        ("durable commits at the default timer", COMMIT_EVERY, 8, COMMIT_EVERY, 4, "<= 1.02"),
    ):
        if bench.short and every > 1.0:
            continue
        part = int(rate * every / slices)
        found = [
            _beside(bench.scratch("commits"), trajectories, part, slices, int(seconds / every)) for _ in range(rounds)
        ]
        clock, cpu = (Ratio.of([each[which][0] / each[which][1] for each in found]) for which in range(2))
        length = statistics.median(each[0][1] for each in found)
        note = f"collections of {length:.0f} s, in slices; a flush of the disk takes {flush * 1e3:.1f} ms"
        yield Claim(title, "no commits", clock, bar, note, cpu=cpu)
    bench.scratch("commits")


def _beside(
    folder: Path, trajectories: Sequence[tuple[Any, Any]], part: int, slices: int, count: int
) -> tuple[list[float], list[float]]:
    """Seconds, and processor seconds, of a collection with ``count`` commits and of one without.

    part : trajectories in a slice. slices : from one commit to the next.
    """
    clock, cpu = [0.0, 0.0], [0.0, 0.0]
    due = part * slices
    with (
        trajstore.create(folder / "0", commit_every=None, commit_trajectories=due) as committing,
        trajstore.create(folder / "1", commit_every=None) as bare,
    ):
        writers, after = (committing, bare), (due, math.inf)
        for writer in writers:
            _collect(writer, trajectories[: part // 2], math.inf)  # from here on, commits fall into the middle
        source = itertools.cycle(trajectories)
        for number in range(slices * count):
            given = list(itertools.islice(source, part))
            for which in (0, 1) if number % 2 else (1, 0):
                begun, used = time.perf_counter(), time.process_time()
                _collect(writers[which], given, after[which])
                clock[which] += time.perf_counter() - begun
                cpu[which] += time.process_time() - used
        if committing.stats["commits"] <= count or bare.stats["commits"] > 1:
            raise ValueError("the commits did not come when they were due")
    return clock, cpu


def _collect(writer: Writer, trajectories: Sequence[tuple[Any, Any]], due: float) -> None:
    """Append, and wait until all is encoded, and committed where ``due`` trajectories wait for it."""
    for fields, columns in trajectories:
        writer.append(fields, **columns)
    while writer.stats["queue_bytes"] or len(writer) - writer.committed >= due:
        time.sleep(0.001)


def _flush_seconds(bench: Bench) -> float:
    """A small file, written and flushed."""
    folder = bench.scratch("flush")
    begun = time.perf_counter()
    for number in range(5):
        LocalStorage(folder).write(f"f{number}", [b"x" * 4096])
    return (time.perf_counter() - begun) / 5


class CountingStorage(LocalStorage):
    """A local folder that counts what is written and synced, and may take longer over a sync."""

    def __init__(self, root: str | Path, delay: float = 0.0) -> None:
        super().__init__(root)
        self.delay = delay
        self.written = self.syncs = 0

    def write(
        self, key: str, pieces: Sequence[Piece], *, base: tuple[str, int] | None = None, sync: bool = True
    ) -> None:
        self.written += sum(len(memoryview(piece).cast("B")) for piece in pieces) + (base[1] if base else 0)
        self.syncs += sync
        if sync and self.delay:
            time.sleep(self.delay)
        super().write(key, pieces, base=base, sync=sync)

    def sync_folder(self, folder: str) -> None:
        self.syncs += 1
        if self.delay:
            time.sleep(self.delay)
        super().sync_folder(folder)


class Costs(NamedTuple):
    """Of one paced collection: bytes written and flushes, new compressed bytes, commits."""

    written: int
    syncs: int
    new: int
    commits: int


def paced(path: Path, batch: Callable[[Any], None], *, batches: int, every: float, delay: float) -> Costs:
    """Give a batch to a writer ``batches`` times, one for each interval of its commit timer."""
    storage = CountingStorage(path, delay)
    with trajstore.create(storage, commit_every=every) as writer:
        for _ in range(batches):
            begun = time.perf_counter()
            batch(writer)
            time.sleep(max(every - (time.perf_counter() - begun), 0.0))
    stats = writer.stats
    return Costs(storage.written, storage.syncs, int(stats["frame_bytes"]), max(int(stats["commits"]), 1))


_EVERY = 0.2  # seconds of the timer here: a fiftieth of the default


@row("amplification")
def amplification(bench: Bench) -> Iterator[Claim]:
    """Bytes written for each new compressed byte, and flushes, by the rate of the data and of the commits.

    An interval of the timer is squeezed into a fifth of a second, and gets the rows of a whole one: ten seconds of
    collecting at the default timer, one where commits come each second.
    """
    intervals = 10 if bench.short else 30
    route = data.routes(1_000)
    rows = np.random.default_rng(0).normal(size=(10_000, 8)).astype(np.float32)

    def frames(steps: int) -> Callable[[Any], None]:
        def append(writer: Any) -> None:
            left = steps
            for one in route:
                writer.append({"obs": one["obs"][:left], "rewards": one["rewards"][:left]})
                left -= len(one["obs"][:left])
                if not left:
                    return

        return append

    def low_dim(steps: int) -> Callable[[Any], None]:
        def append(writer: Any) -> None:
            for start in range(0, steps, 1_000):
                writer.append({"obs": rows[:1_000][: steps - start]})

        return append

    for title, batch, delay, bar in (
        ("frames, 100 steps/s, default timer", frames(1_000), 0.0, "<= 4"),
        ("frames, 100 steps/s, a commit each second", frames(100), 0.0, ""),
        ("frames, 100 steps/s, default timer, each sync 20 ms", frames(1_000), 0.02, "<= 4"),
        ("low-dim, 10,000 steps/s, default timer", low_dim(100_000), 0.0, "<= 4"),
        ("low-dim, 10,000 steps/s, a commit each second", low_dim(10_000), 0.0, ""),
        ("low-dim, 10,000 steps/s, default timer, each sync 20 ms", low_dim(100_000), 0.02, "<= 4"),
        ("low-dim, 10 steps/s, default timer", low_dim(100), 0.0, ""),
    ):
        # Twice as long: what is written again must not grow with the store.
        half, whole = (
            paced(bench.scratch("paced") / "s", batch, batches=n, every=_EVERY, delay=delay)
            for n in (intervals // 2, intervals)
        )
        found = [costs.written / costs.new for costs in (half, whole)]
        written, new = (value / whole.commits / 2**20 for value in (whole.written, whole.new))
        note = (
            f"{whole.commits} commits in {intervals} intervals; each writes {written:.2f} MiB, {new:.2f} of it new, "
            f"with {whole.syncs / whole.commits:.0f} syncs; {found[0]:.2f}× at half the time"
        )
        yield Claim(f"write amplification: {title}", "1", Ratio(found[1], min(found), max(found)), bar, note)


@row("kills")
def kills(bench: Bench) -> Iterator[Claim]:
    """What 100 kills leave of a collection, ours beside the users' layout."""
    from bench.kills import campaign

    number = 10 if bench.short else 100

    def killed(way: str) -> dict[str, Any]:
        folder = bench.scratch(f"kills.{way}") / "s"
        return campaign(way, folder, number, 4 * number, random.Random(0), watch=False)

    with ThreadPoolExecutor(2) as pool:  # side by side: nothing is timed
        ours, theirs = pool.map(killed, ("Trajstore", "NpzShards"))
    note = f"of {ours['episodes']} routes, resumed after each kill; nothing tells theirs of what it skips"
    for what, title in (("lost", "reported saved, then lost"), ("twice", "repeated"), ("missing", "skipped")):
        peer = f"npz shards + manifest.json: {theirs[what]}"
        ratio = Ratio.of([float(ours[what])])
        yield Claim(f"routes {title} over {number} SIGKILLs", peer, ratio, "<= 0", note)
