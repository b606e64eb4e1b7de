"""What recording a step of many environments costs the loop that it serves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

import trajstore
from bench.rows import Bench, Claim, Ratio, WrongResultError, row

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
