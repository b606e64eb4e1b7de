"""What recording costs the loop that it serves: the stall of an append, a vectorised step, and durable commits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import trajstore
from bench import data
from bench.rows import Bench, Claim, Ratio, WrongResultError, row

_ENVS = 4096
_PACE = 0.02  # seconds between two steps or trajectories: the environments' own work, while which nothing is measured


def _step_values(rng: np.random.Generator) -> dict[str, Any]:
    """One step of five keys: a simulator's proprioception, actions, rewards and flags."""
    return {
        "obs": rng.standard_normal((_ENVS, 48), np.float32),
        "action": rng.standard_normal((_ENVS, 12), np.float32),
        "reward": rng.standard_normal(_ENVS, np.float32),
        "terminated": rng.random(_ENVS) < 0.01,
        "truncated": rng.random(_ENVS) < 0.002,
    }


class _Loop:
    """A recorder as they are: for each environment and key, a row appended to that environment's list."""

    def __init__(self) -> None:
        self.episodes: list[dict[str, list[Any]]] = [{} for _ in range(_ENVS)]

    def step(self, **values: Any) -> None:
        for env in range(_ENVS):
            episode = self.episodes[env]
            for key, value in values.items():
                episode.setdefault(key, []).append(value[env].copy())
            if values["terminated"][env] or values["truncated"][env]:
                self.episodes[env] = {}


@row("recording")
def recording(bench: Bench) -> Iterator[Claim]:
    """One step of 4,096 environments and five keys, against bare batched copies and a loop over environments."""
    rng = np.random.default_rng(0)
    steps = [_step_values(rng) for _ in range(8)]
    ring = {name: np.zeros((64, *value.shape), value.dtype) for name, value in steps[0].items()}
    count, rounds = (60, 3) if bench.short else (200, 7)
    bare, ours, loop, worst = [], [], [], []
    folder = bench.scratch("recording")
    with trajstore.create(folder / "s", profile="fast") as writer:
        recorder = trajstore.Recorder(writer, _ENVS, memory_bytes=1 << 30)
        for _ in range(rounds):
            taken: dict[str, list[float]] = {"bare": [], "ours": []}
            for t in range(count):
                values = steps[t % len(steps)]
                time.sleep(_PACE)
                begun = time.perf_counter()
                for name, value in values.items():
                    ring[name][t % 64] = value
                taken["bare"].append(time.perf_counter() - begun)
                begun = time.perf_counter()
                recorder.step(**values)
                taken["ours"].append(time.perf_counter() - begun)
            bare.append(statistics.median(taken["bare"]))
            ours.append(statistics.median(taken["ours"]))
            worst.append(float(np.percentile(taken["ours"], 99)))
            slow = _Loop()
            begun = time.perf_counter()
            for values in steps[:3]:
                slow.step(**values)
            loop.append((time.perf_counter() - begun) / 3)
        recorder.close()
        stalled = recorder.stats["stall_seconds"]
    _check_recording(folder / "s", steps, count, rounds)
    note = f"median {1e6 * statistics.median(ours):.0f} µs, p99 {1e6 * statistics.median(worst):.0f} µs a step"
    work = f"recording a step, {_ENVS:,} envs × 5 keys"
    yield Claim(work, "bare copies", Ratio.of([a / b for a, b in zip(ours, bare)]), "<= 3", note)
    yield Claim(
        work, "loop over envs", Ratio.of([b / a for a, b in zip(ours, loop)]), ">= 300", f"waited {stalled:.1f} s"
    )


def _check_recording(path: Any, steps: list[dict[str, Any]], count: int, rounds: int) -> None:
    ds = trajstore.open(path)
    whole = [steps[t % len(steps)] for _ in range(rounds) for t in range(count)]
    if int(ds.lengths.sum()) != _ENVS * len(whole):
        raise WrongResultError(f"{int(ds.lengths.sum())} of {_ENVS * len(whole)} rows were stored")
    for env in (0, 17, _ENVS - 1):
        mine = ds[ds.table["env"] == env]
        if not np.array_equal(mine.read("obs"), np.stack([values["obs"][env] for values in whole])):
            raise WrongResultError(f"environment {env} is not stored as it was")


@row("append-stall")
def append_stall(bench: Bench) -> Iterator[Claim]:
    """The 99th percentile of the time that ``append`` holds its caller, against copying the same bytes."""
    trajectories = data.routes(1000 if bench.short else 4000)
    fields = [{k: v for k, v in t.items() if np.ndim(v)} for t in trajectories]
    warm = {name: np.zeros((4096, *value.shape[1:]), value.dtype) for name, value in fields[0].items()}
    ratios, notes = [], []
    for number in range(3 if bench.short else 7):
        with trajstore.create(bench.scratch("stall") / f"{number}") as writer:
            held, copied = [], []
            for trajectory in fields:
                time.sleep(_PACE * 3)
                begun = time.perf_counter()
                for name, value in trajectory.items():
                    warm[name][: len(value)] = value
                copied.append(time.perf_counter() - begun)
                begun = time.perf_counter()
                writer.append(trajectory)
                held.append(time.perf_counter() - begun)
        p99, copy = float(np.percentile(held[1:], 99)), float(np.percentile(copied[1:], 99))
        ratios.append(max(p99 - 1e-4, 0) / copy)
        notes.append(1e3 * p99)
    note = f"p99 {statistics.median(notes):.2f} ms; 0.1 ms are granted beside the copy"
    yield Claim(
        "time that append() holds the caller, p99", "memcpy of the same bytes", Ratio.of(ratios), "<= 1.5", note
    )


@row("commit-cost")
def commit_cost(bench: Bench) -> Iterator[Claim]:
    """Ingest with durable commits each second, and at the default timer, against a single commit at the end."""
    seconds = 4 if bench.short else 25
    rng = np.random.default_rng(1)
    length = 500
    trajectory = {
        "obs": rng.standard_normal((length, 17), np.float32),
        "action": rng.standard_normal((length, 6), np.float32),
        "reward": rng.standard_normal(length),
    }
    folder = bench.scratch("commits")
    count = _fill(folder / "probe", trajectory, None, seconds=1.0) * seconds
    flush = _flush_seconds(folder)
    timers = {"each second": (1.0, "<= 1.05")}
    if not bench.short:
        timers["at the default timer"] = (10.0, "<= 1.02")
    names: dict[str, Callable[[], Any]] = {"trajstore": lambda: _fill(folder / "none", trajectory, None, count=count)}
    for name, (every, _) in timers.items():
        names[name] = lambda every=every: _fill(folder / "timed", trajectory, every, count=count)
    times = bench.compare(names, prepare=lambda _: bench.scratch("commits"), repeats=3)
    for name, (_, bar) in timers.items():
        note = f"a flush of the disk: {1e3 * flush:.1f} ms"
        yield times.claim(f"ingest with durable commits {name}", "trajstore", bar, ours=name, note=note)


def _fill(
    path: Any, trajectory: dict[str, Any], commit_every: float | None, *, count: int = 0, seconds: float = 0.0
) -> int:
    """Append one trajectory so many times, or for so long; how often it was."""
    done, end = 0, time.perf_counter() + seconds
    with trajstore.create(path, commit_every=commit_every) as writer:
        while done < count or (not count and time.perf_counter() < end):
            writer.append(trajectory)
            done += 1
    return done


def _flush_seconds(folder: Any) -> float:
    """What it takes to make a file durable here."""
    import os

    taken = []
    for number in range(5):
        begun = time.perf_counter()
        with open(folder / f"flush{number}", "wb") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)
