"""What durable commits cost, in time, bytes and flushes; and what a kill leaves."""

from __future__ import annotations

import random
import shutil
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


@row("commits")
def commits(bench: Bench) -> Iterator[Claim]:
    """Throughput of a collection with durable commits, beside one that commits at its end only.

    Each is as long as it takes for the timer to strike; in a short run only the one of a second does.
    """
    place = bench.scratch("commits") / "s"
    flush = _flush_seconds(bench)
    begun = time.perf_counter()
    collect(place, data.routes(8_000), "balanced", commit_every=None)
    rate = 8_000 / (time.perf_counter() - begun)
    for title, timer, seconds, repeats, bar in (
        ("durable commits each second", 1.0, 2.5 if bench.short else 5.0, 2 if bench.short else 5, "<= 1.05"),
        ("durable commits at the default timer", 10.0, 12.0, 2, "<= 1.02"),
    ):
        if bench.short and timer > seconds / 2:
            continue
        routes = data.routes(int(seconds * rate))

        def collected(timer: float | None, routes: list[dict[str, Any]] = routes) -> None:
            collect(place, routes, "balanced", commit_every=timer)

        work = {"trajstore": lambda timer=timer: collected(timer), "no commits": lambda: collected(None)}
        times = bench.compare(work, prepare=lambda _: shutil.rmtree(place, ignore_errors=True), repeats=repeats)
        note = f"collections of {times.median('no commits'):.0f} s; a flush of the disk takes {flush * 1e3:.1f} ms"
        yield times.claim(title, "no commits", bar, note=note)
    shutil.rmtree(place, ignore_errors=True)


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
    return Costs(storage.written, storage.syncs, stats["frame_bytes"], max(int(stats["commits"]), 1))


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
