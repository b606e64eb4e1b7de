"""What recording a step of many environments costs the loop that it serves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

import trajstore
from bench.rows import OURS, Bench, Claim, Ratio, WrongResultError, peak_of, row

_ENVS = 4096
_PACE = 0.02  # seconds between two steps: the environments' own work


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
    """A recorder as they are: for each environment and key, a copy of a row appended to that environment's list.

    Isaac Lab's walks the same loops with torch tensors, and ``clone`` for ``copy``.
    """

    def __init__(self) -> None:
        self.episodes: list[dict[str, list[Any]]] = [{} for _ in range(_ENVS)]

    def step(self, **values: Any) -> None:
        for env in range(_ENVS):
            episode = self.episodes[env]
            for key, value in values.items():
                row = value[env]
                episode.setdefault(key, []).append(row.copy() if isinstance(value, np.ndarray) else row.clone())
            if values["terminated"][env] or values["truncated"][env]:
                self.episodes[env] = {}


def _tensors(values: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(value) for name, value in values.items()}


@row("recording")
def recording(bench: Bench) -> Iterator[Claim]:
    """One step of 4,096 environments and five keys, against bare batched copies and loops over environments."""
    rng = np.random.default_rng(0)
    arrays = [_step_values(rng) for _ in range(8)]
    steps: dict[str, list[dict[str, Any]]] = {"arrays": arrays}
    try:
        steps["torch tensors"] = [_tensors(values) for values in arrays]
    except ImportError:
        pass
    count, rounds = (60, 3) if bench.short else (120, 7)
    for kind, given in steps.items():
        taken = _Taken()
        with trajstore.create(bench.scratch("recording") / "s", profile="fast") as writer:
            recorder = trajstore.Recorder(writer, _ENVS, memory_bytes=1 << 30)
            for _ in range(rounds):
                taken.add(*_round(recorder, given, count))
            _, peak = peak_of(lambda recorder=recorder, first=given[0]: recorder.step(**first))
            recorder.close()
            stalled = recorder.stats["stall_seconds"]
        _check_recording(bench.folder / "recording" / "s", arrays, count, rounds)
        held, worst = (statistics.median(values) * 1e6 for values in (taken.ours, taken.worst))
        note = f"median {held:.0f} µs, 99th percentile {worst:.0f} µs a step, {stalled:.1f} s waited in all"
        peaks = {OURS: peak, "peer": taken.peak}
        work = f"recording a step, {_ENVS:,} envs × 5 keys, {kind}"
        yield Claim(work, "bare copies", taken.ratio("ours", "bare"), "<= 3", note)
        tensors = kind != "arrays"
        peer = "Isaac Lab's loop over envs and keys" if tensors else "the same loop with NumPy's cheaper copies"
        note = f"{statistics.median(taken.loop) * 1e3:.0f} ms a step"
        yield Claim(work, peer, taken.ratio("loop", "ours"), ">= 300" if tensors else "", note, peaks)


@row("short-episodes")
def short_episodes(bench: Bench) -> Iterator[Claim]:
    """Episodes of three steps, as fast as they come, until all are durable; 10,000 a second are to be kept up with."""
    envs, steps = 1_000, 90 if bench.short else 300
    count = envs * (steps // 3)
    values = np.random.default_rng(0).standard_normal((steps, envs, 8), np.float32)
    seconds, waited = [], 0.0

    def record() -> None:
        nonlocal waited
        with trajstore.create(bench.scratch("short") / "s") as writer:
            with trajstore.Recorder(writer, envs) as recorder:
                for t in range(steps):
                    recorder.step(obs=values[t], terminated=np.full(envs, t % 3 == 2))
            waited = recorder.stats["stall_seconds"]

    _, peak = peak_of(record)
    for _ in range(bench.repeats):
        begun = time.perf_counter()
        record()
        seconds.append(time.perf_counter() - begun)
    ds = trajstore.open(bench.folder / "short" / "s")
    if len(ds) != count or not np.array_equal(ds[-1]["obs"][:], values[-3:, int(ds.table["env"][-1])]):
        raise WrongResultError("the episodes are not stored as they were")
    rate = [count / each for each in seconds]
    note = f"{statistics.median(rate):,.0f} trajectories/s; the caller waited for {waited:.2f} s of the last round"
    yield Claim(
        f"{count:,} episodes of three steps, recorded and durable",
        "10,000 a second",
        Ratio.of([each / 10_000 for each in rate]),
        ">= 1",
        note,
        {OURS: peak},
    )


class _Taken:
    """Seconds of a step, round by round; ``worst`` is our 99th percentile, ``peak`` the loop's growth in bytes."""

    def __init__(self) -> None:
        self.bare: list[float] = []
        self.ours: list[float] = []
        self.worst: list[float] = []
        self.loop: list[float] = []
        self.peak = 0

    def add(self, bare: list[float], ours: list[float], loop: float, peak: int) -> None:
        self.bare.append(statistics.median(bare))
        self.ours.append(statistics.median(ours))
        self.worst.append(float(np.percentile(ours, 99)))
        self.loop.append(loop)
        self.peak = max(self.peak, peak)

    def ratio(self, over: str, under: str) -> Ratio:
        return Ratio.of([a / b for a, b in zip(getattr(self, over), getattr(self, under))])


def _round(
    recorder: trajstore.Recorder, steps: list[dict[str, Any]], count: int
) -> tuple[list[float], list[float], float, int]:
    ring = {name: np.zeros((64, *value.shape), np.asarray(value).dtype) for name, value in steps[0].items()}
    bare, ours = [], []
    for t in range(count):
        values = steps[t % len(steps)]
        time.sleep(_PACE)
        begun = time.perf_counter()
        for name, value in values.items():
            ring[name][t % 64] = value
        bare.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        recorder.step(**values)
        ours.append(time.perf_counter() - begun)
    slow = _Loop()

    def loop() -> float:
        begun = time.perf_counter()
        for values in steps[:3]:
            slow.step(**values)
        return (time.perf_counter() - begun) / 3

    return bare, ours, *peak_of(loop)


def _check_recording(path: Any, steps: list[dict[str, Any]], count: int, rounds: int) -> None:
    ds = trajstore.open(path)
    whole = [*(steps[t % len(steps)] for _ in range(rounds) for t in range(count)), steps[0]]
    if int(ds.lengths.sum()) != _ENVS * len(whole):
        raise WrongResultError(f"{int(ds.lengths.sum())} of {_ENVS * len(whole)} rows were stored")
    for env in (0, 17, _ENVS - 1):
        mine = ds[ds.table["env"] == env]
        if not np.array_equal(mine.read("obs"), np.stack([values["obs"][env] for values in whole])):
            raise WrongResultError(f"environment {env} is not stored as it was")
