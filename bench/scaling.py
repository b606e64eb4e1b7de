"""Costs against the number of trajectories, from a thousand to a million: rows of the table, and lines of a chart."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import trajstore
from bench.rows import Bench, Claim, Ratio, row

COUNTS = (1_000, 10_000, 100_000, 1_000_000)
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


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    call()
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def _resume(path: Path) -> None:
    trajstore.create(path, resume=True, commit_every=None, handle_signals=False).abandon()


def measure(bench: Bench, counts: tuple[int, ...] = COUNTS) -> dict[str, Any]:
    """Seconds of each operation, files and bytes, by number of trajectories."""
    found: dict[str, Any] = {"trajectories": list(counts), "seconds": {}, "files": [], "manifest_bytes": []}
    for count in counts:
        path = bench.folder / f"scale.{count}"
        if not path.exists():
            make(path, count)
        dataset = trajstore.open(path)
        rng = np.random.default_rng(1)
        trajectories = rng.integers(0, count, 256)
        steps = np.zeros(256, np.int64)
        dataset.lengths  # noqa: B018 (read once, as a sampler does)
        numbers = rng.integers(0, count, 32).tolist()
        operations = {
            "open": lambda path=path: trajstore.open(path),
            "open and read one": lambda path=path, count=count: trajstore.open(path)[count // 2]["obs"][:],
            "resume": lambda path=path: _resume(path),
            "one trajectory": lambda dataset=dataset, numbers=numbers: [dataset[i]["obs"][:] for i in numbers],
            "256 random steps": lambda dataset=dataset, t=trajectories, s=steps: dataset.take("obs", t, s),
            "filter all": lambda path=path: trajstore.open(path).where("success & (score > 1)"),
        }
        for name, call in operations.items():
            seconds = _seconds(call, 3 if bench.short else 7) / (32 if name == "one trajectory" else 1)
            found["seconds"].setdefault(name, []).append(seconds)
        found["files"].append(sum(1 for file in path.rglob("*") if file.is_file()))
        found["manifest_bytes"].append((path / "zarr.json").stat().st_size)
    found["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return found


@row("scale")
def scale(bench: Bench) -> Iterator[Claim]:
    """A million trajectories against a thousand."""
    large = 100_000 if bench.short else 1_000_000
    found = measure(bench, (1_000, large))
    for name, bar in {"open": "<= 3", "open and read one": "<= 3", "resume": "<= 3", "one trajectory": ""}.items():
        small, big = found["seconds"][name]
        note = f"{big * 1e3:.2f} ms against {small * 1e3:.2f} ms"
        yield Claim(f"{name}, {large:,} trajectories", "1,000 trajectories", Ratio.of([big / small]), bar, note)
    seconds = found["seconds"]["filter all"][1]
    note = f"{seconds * 1e3:.0f} ms; {found['files'][1]} files, manifest {found['manifest_bytes'][1] >> 10} KiB"
    title = f"open and filter {large:,} trajectories by two columns"
    yield Claim(title, "0.2 s", Ratio.of([seconds / 0.2]), "<= 1", note)
