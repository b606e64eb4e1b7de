"""Collecting: sustained ingest, bytes a step, what the caller waits for, and what commits cost."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import trajstore
from bench import data
from bench.peers import users_layout
from bench.rows import Bench, Claim, Ratio, Times, row
from trajstore.format.encoding import PROFILES, chunk_shape, packer
from trajstore.format.schema import Rule
from trajstore.media.shard import encode_frame
from trajstore.media.storage import LocalStorage, Piece

USERS = "np.savez_compressed, 25 routes a file"
ZARR = "zarr-python, one assignment"


def collect(path: Path, routes: Sequence[dict[str, Any]], profile: str, **options: Any) -> None:
    """Append all, durable on return."""
    with trajstore.create(path, profile=profile, **options) as writer:
        for route in routes:
            fields, columns = data.trajectory(route)
            writer.append(fields, **columns)


def nbytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def encode_all(frames: np.ndarray[Any, Any], profile: str, *, packed: bool) -> None:
    """What the codec alone takes for these frames, in one thread for each core; packed first, as a writer does it."""
    codec = PROFILES[profile]
    pack = packer("float16", Rule("divide", 255))
    dtype = np.dtype(np.uint8) if packed else frames.dtype
    rows, _ = chunk_shape(dtype, frames.shape[1:], codec)
    whole = len(frames) // rows * rows

    def encode(start: int) -> None:
        out = np.empty((rows, *frames.shape[1:]), np.uint8)
        for at in range(start, whole, 2 * rows):
            chunk = frames[at : at + rows]
            if packed and not pack(chunk, out):
                raise ValueError("these frames do not fit the rule")
            encode_frame(out if packed else chunk, codec)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(encode, (0, rows)))


def _codec(profile: str, *, packed: bool = False) -> str:
    return f"numcodecs {profile} in 2 threads, {'packed and verified' if packed else 'float16'}"


@row("ingest")
def ingest(bench: Bench) -> Iterator[Claim]:
    """Float16 frames and seven more fields, until all is durable, against the layout that collectors use today."""
    routes = data.routes(4_600 if bench.short else 9_200)
    steps = sum(len(route["obs"]) for route in routes)
    frames = np.concatenate([route["obs"] for route in routes])
    places = {name: bench.folder / f"ingest.{i}" for i, name in enumerate((USERS, *PROFILES, ZARR))}

    def prepare(name: str) -> None:
        if name in places:
            shutil.rmtree(places[name], ignore_errors=True)
            if name == USERS:
                places[name].mkdir()

    work: dict[str, Callable[[], Any]] = {
        profile: lambda profile=profile: collect(places[profile], routes, profile)
        for profile in ("balanced", "fast", "small")
    }
    work[USERS] = lambda: users_layout.write(places[USERS], routes)
    for profile in ("fast", "balanced"):
        work[_codec(profile)] = lambda profile=profile: encode_all(frames, profile, packed=False)
        work[_codec(profile, packed=True)] = lambda profile=profile: encode_all(frames, profile, packed=True)
    try:
        from bench.peers import zarr_python

        rows = chunk_shape(np.dtype(np.float16), frames.shape[1:], PROFILES["balanced"])
        work[ZARR] = lambda: zarr_python.create(
            places[ZARR], frames, chunk=rows[0], shard=rows[1], codec=PROFILES["balanced"]
        )
    except ImportError:
        pass
    times = bench.compare(work, prepare=prepare, repeats=2 if bench.short else 5)
    for profile in PROFILES:
        if not np.array_equal(trajstore.open(places[profile]).read("obs"), frames):
            raise ValueError("what was read is not what was appended")
    if not np.array_equal(users_layout.read_frames(places[USERS]), frames):
        raise ValueError("the users' files do not hold the frames")
    rate = {name: steps / times.median(name) for name in work}
    for profile, bar in {"balanced": ">= 12", "fast": ">= 20", "small": ""}.items():
        note = f"{rate[profile]:,.0f} steps/s against {rate[USERS]:,.0f}"
        title = f"ingest of float16 routes, durable ({profile})"
        yield times.claim(title, USERS, bar, ours=profile, note=note)
    for profile in ("balanced", "fast"):
        title = f"share of the codec's limit ({profile})"
        yield times.claim(title, _codec(profile), ">= 0.8", ours=profile)
        yield times.claim(title, _codec(profile, packed=True), "", ours=profile)
    if ZARR in work:
        yield times.claim("ingest of float16 frames", ZARR, ">= 3", ours="balanced")
    users = nbytes(places[USERS])
    for profile, bar in {"balanced": "<= 1", "fast": "", "small": ""}.items():
        size = nbytes(places[profile])
        note = f"{size / steps:,.0f} bytes a step against {users / steps:,.0f}"
        title = f"bytes a step, all fields ({profile})"
        yield Claim(title, USERS, Ratio.of([size / users]), bar, note)


@row("append")
def append(bench: Bench) -> Iterator[Claim]:
    """How long ``append`` holds its caller, beside bare copies of the same bytes."""
    routes = data.routes(2_000 if bench.short else 6_000)
    trajectories = [data.trajectory(route) for route in routes]
    held: list[tuple[float, float]] = []
    copied: list[tuple[float, float]] = []
    with trajstore.create(bench.scratch("append") / "s", commit_every=2.0) as writer:
        for number, (fields, columns) in enumerate(trajectories):
            time.sleep(0.02)  # a simulator at work
            begun, used = time.perf_counter(), time.thread_time()
            if number % 2:
                writer.append(fields, **columns)
            else:
                for value in fields.values():
                    value.copy()
            steps = len(fields["obs"])
            seconds = (time.perf_counter() - begun) / steps, (time.thread_time() - used) / steps
            (held if number % 2 else copied).append(seconds)
    for title, quantile in (("median", 0.5), ("99th percentile", 0.99)):
        # Of the caller's thread alone: what the encoders take meanwhile is no part of the wait.
        ours, ours_cpu = np.quantile(held[2:], quantile, axis=0)
        bare, bare_cpu = np.quantile(copied[2:], quantile, axis=0)
        note = f"{ours * 1e6:.1f} µs a step against {bare * 1e6:.1f}; 0.1 ms a route allowed besides"
        allowed = 1e-4 / 56
        ratio = Ratio.of([max(ours - allowed, 0.0) / bare])
        cpu = Ratio.of([max(ours_cpu - allowed, 0.0) / bare_cpu])
        work = f"append of a route holds its caller, {title}"
        yield Claim(work, "copies of the same arrays", ratio, "<= 1.5", note, cpu=cpu)


@row("append-small")
def append_small(bench: Bench) -> Iterator[Claim]:
    """Trajectories of ten steps, 12 fields and 7 columns."""
    rng = np.random.default_rng(0)
    fields: dict[str, Any] = {f"f{i}": rng.normal(size=(10, 4)).astype(np.float32) for i in range(8)}
    fields |= {"obs": {"a": rng.normal(size=(10, 17)).astype(np.float32), "b": rng.integers(0, 5, 10)}}
    fields |= {"reward": rng.normal(size=10).astype(np.float32), "done": np.zeros(10, np.bool_)}
    columns = {"success": True, "level": 3, "score": 1.5, "a": 0.1, "b": 0.2, "steps": 10}
    flat = [*(value for value in fields.values() if not isinstance(value, dict)), *fields["obs"].values()]
    count = 5_000 if bench.short else 20_000
    rounds: list[float] = []
    for _ in range(bench.repeats):
        with trajstore.create(bench.scratch("append-small") / "s") as writer:
            held = np.empty(count)
            for i in range(count):
                begun = time.perf_counter()
                writer.append(fields, seed=i, **columns)
                held[i] = time.perf_counter() - begun
        bare = np.empty(count)
        for i in range(count):
            begun = time.perf_counter()
            [value.copy() for value in flat]
            bare[i] = time.perf_counter() - begun
        rounds.append(float(np.median(held) / np.median(bare)))
        note = f"{np.median(held) * 1e6:.1f} µs median, {held.mean() * 1e6:.1f} mean"
    yield Claim("append of 10 steps, 12 fields, 7 columns", "copies of its arrays", Ratio.of(rounds), "", note)


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


@row("commits")
def commits(bench: Bench) -> Iterator[Claim]:
    """What durable commits cost a collection, beside one that commits at its end only."""
    routes = data.routes(3_000 if bench.short else 12_000)
    place = bench.scratch("commits") / "s"
    every: dict[str, float | None] = {"no commits": None, "default": 10.0, "second": 1.0}
    probe = bench.scratch("flush") / "file"
    begun = time.perf_counter()
    for number in range(5):
        LocalStorage(probe.parent).write(f"f{number}", [b"x" * 4096])
    flush = (time.perf_counter() - begun) / 5
    work = {
        name: lambda seconds=seconds: collect(place, routes, "balanced", commit_every=seconds)
        for name, seconds in every.items()
    }
    times = bench.compare(work, prepare=lambda _: shutil.rmtree(place, ignore_errors=True), repeats=bench.repeats)
    note = f"a flush of the disk takes {flush * 1e3:.1f} ms"
    yield times.claim("durable commits at the default timer", "no commits", "<= 1.02", ours="default", note=note)
    yield times.claim("durable commits each second", "no commits", "<= 1.05", ours="second", note=note)


def _paced(path: Path, delay: float, batch: Callable[[Any], None], commits: int, every: float) -> tuple[Any, Any]:
    storage = CountingStorage(path, delay)
    with trajstore.create(storage, commit_every=every) as writer:
        for _ in range(commits):
            begun = time.perf_counter()
            batch(writer)
            time.sleep(max(every - (time.perf_counter() - begun), 0.0))
        count = writer._session.head.commit.number if writer._session.head else 1
    return storage, (writer.stats, count)


@row("amplification")
def amplification(bench: Bench) -> Iterator[Claim]:
    """Bytes written for each new compressed byte, at the pace of ten seconds squeezed into a fifth of one."""
    every, rounds = 0.2, 12 if bench.short else 50
    route = data.routes(1_000)
    small = {"obs": np.random.default_rng(0).normal(size=(1000, 8)).astype(np.float32)}

    def frames(writer: Any) -> None:  # 100 steps a second, for ten seconds
        for one in route:
            writer.append({"obs": one["obs"], "rewards": one["rewards"]})

    def low_dim(writer: Any) -> None:  # 10,000 steps a second, for ten seconds
        for _ in range(100):
            writer.append(small)

    def rare(writer: Any) -> None:  # 10 steps a second
        writer.append({"obs": small["obs"][:100]})

    for title, batch, delay, bar in (
        ("frames, 100 steps/s", frames, 0.0, "<= 4"),
        ("low-dim, 10,000 steps/s", low_dim, 0.0, "<= 4"),
        ("low-dim, 10 steps/s", rare, 0.0, ""),
        ("frames, 100 steps/s, each sync 20 ms", frames, 0.02, "<= 4"),
    ):
        ratios = []
        note = ""
        for share in (2, 1):  # the second half as long again: bounded as the store grows
            storage, (stats, count) = _paced(bench.scratch("paced") / "s", delay, batch, rounds // share, every)
            ratios.append(storage.written / stats["frame_bytes"])
            note = f"{count} commits, {storage.syncs / count:.0f} syncs each, {stats['frame_bytes'] / 1e6:.1f} MB new"
        ratio = Ratio(ratios[-1], min(ratios), max(ratios))
        yield Claim(f"write amplification, default timer: {title}", "1", ratio, bar, note)


@row("vector-steps")
def vector_steps(bench: Bench) -> Iterator[Claim]:
    """4,096 environments, 5 keys: one batch of finished trajectories against a loop over them."""
    rng = np.random.default_rng(0)
    count, steps = 4096, 8
    lengths = np.full(count, steps)
    fields = {f"key{i}": rng.normal(size=(count * steps, 8)).astype(np.float32) for i in range(5)}
    split = {name: values.reshape(count, steps, 8) for name, values in fields.items()}

    def at_once() -> None:
        with trajstore.create(bench.scratch("many") / "s", commit_every=None) as writer:
            writer.append_many(fields, lengths=lengths, seed=np.arange(count))

    def one_by_one() -> None:
        with trajstore.create(bench.scratch("many") / "s", commit_every=None) as writer:
            for i in range(count):
                writer.append({name: values[i] for name, values in split.items()}, seed=i)

    times: Times = bench.compare({"trajstore": at_once, "append in a loop": one_by_one})
    note = f"{count / statistics.median(times.seconds['trajstore']):,.0f} trajectories/s, durable"
    yield times.claim("append_many of 4,096 trajectories", "append in a loop", "", note=note)
