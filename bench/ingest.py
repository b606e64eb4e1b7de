"""Collecting: sustained ingest, bytes a step, and what the caller waits for."""

from __future__ import annotations

import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import trajstore
from bench import data
from bench.peers import users_layout
from bench.rows import Bench, Claim, Ratio, Times, peak_of, row
from trajstore.format.encoding import PROFILES, chunk_shape, packer
from trajstore.format.schema import Rule
from trajstore.media.shard import encode_frame

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
    routes = data.routes(4_600 if bench.short else 55_200)  # five times what a queue holds: what is sustained
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
    times = bench.compare(work, prepare=prepare, repeats=2 if bench.short else 3)
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


_COPIES = "copies of the same arrays"


@row("append")
def append(bench: Bench) -> Iterator[Claim]:
    """How long ``append`` holds its caller, beside bare copies of the same arrays in the same place of the same loop.

    What comes next, an append or copies, is drawn: both meet the encoders as often at work. Then both once more beside
    two threads that encode all the time, and the copies once with nothing else running.
    """
    trajectories = [data.trajectory(route) for route in data.routes(2_000)]
    count = 100 if bench.short else 200
    with trajstore.create(bench.scratch("append") / "s", commit_every=2.0) as writer:

        def stored(number: int) -> None:
            fields, columns = trajectories[number % len(trajectories)]
            writer.append(fields, **columns)

        def copied(number: int) -> None:
            for value in trajectories[number % len(trajectories)][0].values():
                value.copy()

        def rows(number: int) -> int:
            return len(trajectories[number % len(trajectories)][0]["obs"])

        stored(0)
        rounds: dict[str, list[Held]] = {"alone": [], "in turn": [], "busy": []}
        for turn in range(bench.repeats):
            writer.commit()
            rounds["alone"].append(_held(copied, copied, rows, count, turn))
            rounds["in turn"].append(_held(stored, copied, rows, count, turn))
            with _encoding(trajectories[0][0]["obs"]):
                rounds["busy"].append(_held(stored, copied, rows, count, turn))
        peak = peak_of(lambda: stored(1))[1], peak_of(lambda: copied(1))[1]
    stalls = [_seconds(lambda: users_layout.write(bench.scratch("stall"), data.routes(25 * _STEPS))) for _ in range(3)]
    held = [each.quantile(0.99, 0) for each in rounds["in turn"]]
    note = f"{statistics.median(stalls) * 1e3:.0f} ms every 25 routes"
    worst = Ratio.of([stall / wait for stall, wait in zip(stalls, held)])
    yield Claim("longest wait of a collector's caller, 99th percentile", USERS, worst, "", note)
    for title, quantile in (("median", 0.5), ("99th percentile", 0.99)):
        for peer, ours, theirs in (
            (f"{_COPIES}, in turn", "in turn", "in turn"),
            (f"{_COPIES}, both beside 2 threads that encode", "busy", "busy"),
            (f"{_COPIES}, nothing else running", "in turn", "alone"),
        ):
            pairs = [(a.quantile(quantile, 0), b.quantile(quantile, 1)) for a, b in zip(rounds[ours], rounds[theirs])]
            ratio = Ratio.of([max(held - _ALLOWED, 0.0) / bare for held, bare in pairs])
            held, bare = (statistics.median(values) * 1e3 for values in zip(*pairs))
            note = f"{held:.2f} ms a route against {bare:.2f}; 0.1 ms allowed besides"
            work = f"append of a route of {_STEPS} steps holds its caller, {title}"
            yield Claim(work, peer, ratio, "<= 1.5", note, dict(zip(("ours", "peer"), peak)))


_ALLOWED = 1e-4
_STEPS = 56
_PACE = 0.01  # seconds between two calls: the simulator's


class Held(NamedTuple):
    """Seconds of each call, as of a route of ``_STEPS`` steps; of the first work and of the second."""

    first: list[float]
    second: list[float]

    def quantile(self, quantile: float, which: int) -> float:
        return float(np.quantile(self[which], quantile))


def _seconds(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _held(
    first: Callable[[int], None], second: Callable[[int], None], rows: Callable[[int], int], count: int, seed: int
) -> Held:
    found = Held([], [])
    for number, which in enumerate(np.random.default_rng(seed).integers(0, 2, count).tolist()):
        time.sleep(_PACE)
        work = second if which else first
        begun = time.perf_counter()
        work(number)
        found[which].append((time.perf_counter() - begun) * _STEPS / rows(number))
    return found


@contextmanager
def _encoding(frames: np.ndarray[Any, Any]) -> Iterator[None]:
    """Two threads that encode until the block ends."""
    ended = threading.Event()

    def encode() -> None:
        while not ended.is_set():
            encode_frame(frames[:16], PROFILES["balanced"])

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(encode) for _ in range(2)]
        try:
            yield
        finally:
            ended.set()
        for done in running:
            done.result()


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
