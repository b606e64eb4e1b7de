"""``python -m bench --profile ingest``: where the time goes, as shares of a sampling profiler's samples.

py-spy samples a child process with native frames, all threads, those that wait left out. Each sample counts for the
innermost frame that says what is done. ``python -m bench.profiles WORK FOLDER`` is that child.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path

import numpy as np

import trajstore
from bench import data
from bench.rows import Bench, SkipRow

_WORKS = {
    "ingest": ("ingest, balanced", "ingest, fast"),
    "gather": ("scan, balanced", "scan, fast", "256 random frames, balanced", "256 random frames, fast"),
}

_PACKING, _COPY = "packing and its check, or unpacking", "copy of rows"
# By the innermost frame that matches; what none matches is Python's and NumPy's own.
_KINDS = {
    "codec": r"blosc|LZ4|ZSTD|HUF_|FSE_|BIT_|shuffle|XXH|zstd",
    _PACKING: r"encoding\.py",
    "checksum": r"crc32|checksum\.py",
    "write, sync, read": r"storage\.py|\b(pread|pwrite|write|writev|fdatasync|fsync|open)(64)? \(libc",
    _COPY: r"memcpy|memmove|contig_to_contig|_aligned_|strided_to|array_take|TakeFrom|fasttake",
}
_GIL = "waiting for the interpreter's lock"
_REST = "Python, NumPy's and numcodecs' wrappers, threads"
_IDLE = r"acquire_lock|SimpleQueue_get|_listen \(|lock_timed|\bselect|\bpoll|nanosleep"


def profile(name: str, bench: Bench) -> dict[str, dict[str, float]]:
    """Share of samples by kind of work, for each workload of ``"ingest"`` or ``"gather"``."""
    spy = shutil.which("py-spy") or str(Path(sys.executable).with_name("py-spy"))
    if not Path(spy).exists():
        raise SkipRow("py-spy is not installed: pip install py-spy")
    found = {}
    for work in _WORKS[name]:
        folder = bench.scratch("profile")
        raw = folder / "samples"
        command = [spy, "record", "--native", "--rate", "250", "--format", "raw", "--output", str(raw), "--"]
        child = [sys.executable, "-m", "bench.profiles", work, str(folder)]
        done = subprocess.run([*command, *child], capture_output=True, text=True, check=False)
        if not raw.exists():
            raise SkipRow(f"py-spy failed: {done.stderr.strip()[-200:]}")
        found[work] = shares(raw.read_text().splitlines())
    return found


def shares(lines: Iterable[str]) -> dict[str, float]:
    """By kind, from py-spy's raw lines: frames from the outermost on, joined by ``;``, and a number of samples."""
    counts: Counter[str] = Counter()
    for line in lines:
        stack, _, samples = line.rpartition(" ")
        frames = stack.split(";")[::-1]
        in_work = any(frame.startswith("_sampled ") for frame in frames)
        if any("<module>" in frame for frame in frames) and not in_work:
            continue  # imports, and making the data
        if not any(".py:" in frame for frame in frames):
            continue  # the interpreter's end
        if not any(re.search(_IDLE, frame) for frame in frames[:4]):
            counts[_kind(frames)] += int(samples)
    total = max(sum(counts.values()), 1)
    return {kind: counts[kind] / total for kind in (*_KINDS, _GIL, _REST)}


def _kind(frames: list[str]) -> str:
    if any("cond_timedwait" in frame for frame in frames[:2]):
        return _GIL
    python = next((frame for frame in frames if ".py:" in frame), "")
    for frame in frames:
        for kind, pattern in _KINDS.items():
            if re.search(pattern, frame):
                unpacks = kind == _COPY and re.search(_KINDS[_PACKING], python)  # by a table: NumPy's take
                return _PACKING if unpacks else kind
        if ".py:" in frame:
            return _REST
    return _REST


_SECONDS = 8.0


def _sampled(call: Callable[[], object], seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        call()


def main(work: str, folder: Path) -> None:
    """The child: one workload for some seconds."""
    what, level = work.split(", ")
    routes = data.routes(24_000 if what == "ingest" else 4_000)
    if what == "ingest":
        from bench.ingest import collect

        number = count()
        _sampled(lambda: collect(folder / f"s{next(number)}", routes, level), _SECONDS)
        return
    with trajstore.create(folder / "s", profile=level, commit_every=None) as writer:
        for route in routes:
            writer.append({"obs": route["obs"]})
    dataset = trajstore.open(folder / "s", cache_bytes=0)
    reader = dataset.snapshots[0].field("obs")
    out = np.empty((reader.rows, *routes[0]["obs"].shape[1:]), np.float16)
    rng = np.random.default_rng(0)
    if what == "scan":
        _sampled(lambda: reader.read(0, reader.rows, out=out), _SECONDS)
    else:
        _sampled(lambda: reader.take(rng.integers(0, reader.rows, 256)), _SECONDS)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
