"""Costs against the number of trajectories, a thousand to a million, and of fields: rows, and lines of a chart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import trajstore
from bench.rows import OURS, Bench, Claim, Ratio, peak_of, row

COUNTS = (1_000, 10_000, 100_000, 1_000_000)
FIELDS = (1, 8, 64, 512)
_BATCH = 50_000


def make(path: Path, count: int) -> float:
    """A store of so many trajectories of one to five steps, two fields and three columns; seconds a trajectory."""
    rng = np.random.default_rng(0)
    begun = time.perf_counter()
    with trajstore.create(path, commit_every=None) as writer:
        for first in range(0, count, _BATCH):
            size = min(_BATCH, count - first)
            lengths = rng.integers(1, 6, size)
            total = int(lengths.sum())
            fields = {
                "obs": rng.normal(size=(total, 4)).astype(np.float32),
                "reward": rng.normal(size=total).astype(np.float32),
            }
            writer.append_many(
                fields,
                lengths=lengths,
                seed=np.arange(first, first + size),
                score=rng.normal(size=size),
                success=rng.integers(0, 2, size).astype(bool),
            )
    return (time.perf_counter() - begun) / count


def make_wide(path: Path, fields: int) -> None:
    """A store of so many fields of four floats a step, in 200 trajectories of 50 steps."""
    rows = np.random.default_rng(0).normal(size=(10_000, 4)).astype(np.float32)
    with trajstore.create(path, commit_every=None) as writer:
        given = {f"f{number}": rows for number in range(fields)}
        writer.append_many(given, lengths=np.full(200, 50), seed=np.arange(200))


Operations = dict[str, Callable[[], Any]]


def _of_many(path: Path, count: int) -> Operations:
    dataset = trajstore.open(path)
    rng = np.random.default_rng(1)
    trajectories, steps = rng.integers(0, count, 256), np.zeros(256, np.int64)
    numbers = rng.integers(0, count, 32).tolist()
    return {
        "open": lambda: trajstore.open(path),
        "open and read one": lambda: trajstore.open(path)[count // 2]["obs"][:],
        "resume": lambda: _resume(path),
        "32 trajectories, one by one": lambda: [dataset[i]["obs"][:] for i in numbers],
        "256 random steps": lambda: dataset.take("obs", trajectories, steps),
        "open and filter by two columns": lambda: trajstore.open(path).where("success & (score > 1)"),
    }


def _of_wide(path: Path, count: int) -> Operations:
    dataset = trajstore.open(path)
    rng = np.random.default_rng(1)
    trajectories, steps = rng.integers(0, 200, 256), rng.integers(0, 50, 256)
    names = [f"f{number}" for number in range(count)]
    return {
        "open": lambda: trajstore.open(path),
        "resume": lambda: _resume(path),
        "one trajectory, all fields": lambda: dataset[7].load(),
        "256 random steps of one field": lambda: dataset.take("f0", trajectories, steps),
        "256 random steps of all fields": lambda: [dataset.take(name, trajectories, steps) for name in names],
    }


def _resume(path: Path) -> None:
    trajstore.create(path, resume=True, commit_every=None, handle_signals=False).abandon()


def measure(
    bench: Bench, trajectories: tuple[int, ...] = COUNTS, fields: tuple[int, ...] = FIELDS
) -> dict[str, dict[str, Any]]:
    """Seconds of each operation by the number of trajectories, and of fields; the sizes in turn, round after round.

    ``rounds`` : by operation, for each round the seconds at each count. ``seconds`` : their medians.
    """
    found = {}
    for what, counts, make_store, operations in (
        ("trajectories", trajectories, make, _of_many),
        ("fields", fields, make_wide, _of_wide),
    ):
        paths = [bench.folder / f"scale.{what}.{count}" for count in counts]
        for path, count in zip(paths, counts):
            if not path.exists():
                make_store(path, count)
        by_count = [operations(path, count) for path, count in zip(paths, counts)]
        rounds = {name: _rounds([calls[name] for calls in by_count], bench.repeats) for name in by_count[0]}
        found[what] = {
            "counts": list(counts),
            "rounds": rounds,
            "seconds": {name: [statistics.median(each) for each in zip(*taken)] for name, taken in rounds.items()},
            "peak": [peak_of(calls["open"])[1] for calls in by_count],
            "files": [sum(file.is_file() for file in path.rglob("*")) for path in paths],
            "manifest_bytes": [(path / "zarr.json").stat().st_size for path in paths],
        }
    return found


def _rounds(calls: list[Callable[[], Any]], repeats: int) -> list[list[float]]:
    for call in calls:
        call()
    return [[_seconds(call) for call in calls] for _ in range(repeats)]


def _seconds(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


@row("scale")
def scale(bench: Bench) -> Iterator[Claim]:
    """A million trajectories against a thousand; 512 fields against 8."""
    many, wide = 100_000 if bench.short else 1_000_000, 64 if bench.short else 512
    found = measure(bench, (1_000, many), (8, wide))
    for what, bars in (
        ("trajectories", {"open": "<= 3", "open and read one": "<= 3", "resume": "<= 3"}),
        ("fields", {}),
    ):
        few, large = found[what]["counts"]
        small_peak, large_peak = found[what]["peak"]
        for name, rounds in found[what]["rounds"].items():
            small, big = found[what]["seconds"][name]
            note = f"{big * 1e3:.2f} ms against {small * 1e3:.2f} ms"
            ratio = Ratio.of([most / least for least, most in rounds])
            peak = {OURS: large_peak, "peer": small_peak} if name == "open" else {}
            yield Claim(f"{name}, {large:,} {what}", f"{few:,} {what}", ratio, bars.get(name, ""), note, peak)
    measured = found["trajectories"]
    for name in ("open", "resume", "open and filter by two columns"):
        ratio = Ratio.of([most / 0.2 for _, most in measured["rounds"][name]])
        note = f"{measured['files'][1]} files, manifest {measured['manifest_bytes'][1] >> 10} KiB"
        yield Claim(f"{name}, {many:,} trajectories", "0.2 s", ratio, "<= 1", note)
