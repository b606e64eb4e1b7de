"""``python -m bench --profile ingest``: where the time goes, as shares of a sampling profiler's samples.

Where ``perf`` may be used, it is: the kernel samples what the processors do, and each sample counts for the library
and symbol that it met. Elsewhere py-spy samples all threads with native frames, and each sample counts for the
innermost frame that says what is done; it stops the threads meanwhile, which inflates what happens around the
interpreter's lock. ``python -m bench.profiles WORK FOLDER [FIFO]`` is the child that is sampled.
"""

from __future__ import annotations

import os
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

PERF = "perf (the kernel's samples of what the processors do)"
PY_SPY = "py-spy (it stops all threads for each sample: what happens around the interpreter's lock weighs too much)"

_WORKS = {
    "ingest": ("ingest, balanced", "ingest, fast"),
    "gather": ("scan, balanced", "scan, fast", "256 random frames, balanced", "256 random frames, fast"),
}

_PACKING, _COPY = "packing and its check, or unpacking", "copy of rows"
_REST = "Python, NumPy's and numcodecs' wrappers, threads"

# Of perf's "symbol (library)", the first that matches.
_SYMBOLS = {
    "codec": r"numcodecs|blosc|lz4|zstd|shuffle",
    "the kernel: files, page faults, scheduling": r"\[kernel|\[vdso|\[guest",
    "copy of rows, checksums": r"mem(move|cpy|set)|crc32|contig_to_contig",
    _PACKING: r"^([A-Z]{3,}_|_aligned_|npy_half|\w*([Tt]ake|strided)).*multiarray",
    _REST: "",
}

# Of py-spy's frames, by the innermost that matches; what none matches is Python's and NumPy's own.
_FRAMES = {
    "codec": r"blosc|LZ4|ZSTD|HUF_|FSE_|BIT_|shuffle|XXH|zstd",
    _PACKING: r"encoding\.py",
    "checksum": r"crc32|checksum\.py",
    "write, sync, read": r"storage\.py|\b(pread|pwrite|write|writev|fdatasync|fsync|open)(64)? \(libc",
    _COPY: r"memcpy|memmove|contig_to_contig|_aligned_|strided_to|array_take|TakeFrom|fasttake",
}
_GIL = "waiting for the interpreter's lock"
_IDLE = r"acquire_lock|SimpleQueue_get|_listen \(|lock_timed|\bselect|\bpoll|nanosleep"


def profile(name: str, bench: Bench) -> tuple[str, dict[str, dict[str, float]]]:
    """The profiler, and the share of its samples by kind of work for each workload of ``"ingest"`` or ``"gather"``."""
    for profiler, sampled in ((PERF, _by_perf), (PY_SPY, _by_py_spy)):
        found = {}
        for work in _WORKS[name]:
            if (by_kind := sampled(work, bench.scratch("profile"))) is None:
                break
            found[work] = by_kind
        else:
            return profiler, found
    raise SkipRow("neither perf nor py-spy can be used here: pip install py-spy")


def _by_perf(work: str, folder: Path) -> dict[str, float] | None:
    perf = shutil.which("perf")
    if perf is None:
        return None
    control, found = folder / "control", folder / "samples"
    os.mkfifo(control)
    command = [perf, "record", "-F", "499", "-e", "cpu-clock", "-D", "-1", "--control", f"fifo:{control}"]
    child = [sys.executable, "-m", "bench.profiles", work, str(folder), str(control)]
    done = subprocess.run([*command, "-o", str(found), "--", *child], capture_output=True, text=True, check=False)
    if done.returncode or not found.exists():
        return None
    fields = [perf, "script", "-i", str(found), "-F", "ip,sym,dso"]
    return symbol_shares(subprocess.run(fields, capture_output=True, text=True, check=False).stdout.splitlines())


def symbol_shares(lines: Iterable[str]) -> dict[str, float] | None:
    """By kind, from perf's lines: an address, a symbol, and its library in brackets. ``None`` if there are none."""
    counts = Counter(
        next(kind for kind, pattern in _SYMBOLS.items() if re.search(pattern, line.split(maxsplit=1)[-1]))
        for line in lines
        if line.strip()
    )
    total = sum(counts.values())
    return {kind: counts[kind] / total for kind in _SYMBOLS} if total else None


def _by_py_spy(work: str, folder: Path) -> dict[str, float] | None:
    spy = shutil.which("py-spy") or str(Path(sys.executable).with_name("py-spy"))
    if not Path(spy).exists():
        return None
    raw = folder / "samples"
    command = [spy, "record", "--native", "--rate", "250", "--format", "raw", "--output", str(raw), "--"]
    child = [sys.executable, "-m", "bench.profiles", work, str(folder)]
    subprocess.run([*command, *child], capture_output=True, check=False)
    return shares(raw.read_text().splitlines()) if raw.exists() else None


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
    return {kind: counts[kind] / total for kind in (*_FRAMES, _GIL, _REST)}


def _kind(frames: list[str]) -> str:
    if any("cond_timedwait" in frame for frame in frames[:2]):
        return _GIL
    python = next((frame for frame in frames if ".py:" in frame), "")
    for frame in frames:
        for kind, pattern in _FRAMES.items():
            if re.search(pattern, frame):
                unpacks = kind == _COPY and re.search(_FRAMES[_PACKING], python)  # by a table: NumPy's take
                return _PACKING if unpacks else kind
        if ".py:" in frame:
            return _REST
    return _REST


_SECONDS = 8.0


class _Work:
    """What is sampled: some seconds of one call, over and over; perf is told where they begin and end."""

    def __init__(self, control: Path | None) -> None:
        self._control = control

    def __call__(self, call: Callable[[], object]) -> None:
        self._tell("enable")
        _sampled(call, _SECONDS)
        self._tell("disable")

    def _tell(self, word: str) -> None:
        if self._control is not None:
            self._control.write_text(f"{word}\n")


def _sampled(call: Callable[[], object], seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        call()


def main(work: str, folder: Path, control: Path | None = None) -> None:
    """The child: one workload for some seconds."""
    what, level = work.split(", ")
    run = _Work(control)
    routes = data.routes(24_000 if what == "ingest" else 4_000)
    if what == "ingest":
        from bench.ingest import collect

        number = count()
        run(lambda: collect(folder / f"s{next(number)}", routes, level))
        return
    with trajstore.create(folder / "s", profile=level, commit_every=None) as writer:
        for route in routes:
            writer.append({"obs": route["obs"]})
    dataset = trajstore.open(folder / "s", cache_bytes=0)
    reader = dataset.snapshots[0].field("obs")
    out = np.empty((reader.rows, *routes[0]["obs"].shape[1:]), np.float16)
    rng = np.random.default_rng(0)
    if what == "scan":
        run(lambda: reader.read(0, reader.rows, out=out))
    else:
        run(lambda: reader.take(rng.integers(0, reader.rows, 256)))


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
