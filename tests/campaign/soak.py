"""A long recording: ``python tests/campaign/soak.py FOLDER --minutes 15``; its memory curve, and whether all is there.

4,096 environments of five keys, episodes of very different lengths, more unfinished rows than memory may hold, a writer
that is always behind, commits each second. Every minute the newest part of the store is read back and compared; at the
end all of it is. The resident memory is written to ``FOLDER/memory.csv`` and drawn to ``memory.png`` where matplotlib
is.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import shutil
import threading
import time
from pathlib import Path

import numpy as np

import trajstore

ENVS = 4096


def resident() -> float:
    """Resident memory in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


class _Malloc(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks".split()] + [
        (name, ctypes.c_size_t) for name in "uordblks fordblks keepcost".split()
    ]


def in_use() -> float:
    """Memory in MiB that the process has asked the C library for and not given back; 0 where it does not tell."""
    try:
        told = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 0.0
    told.restype = _Malloc
    found = told()
    return float(found.uordblks + found.hblkhd) / 2**20


class Curve(threading.Thread):
    """Notes memory, disk and queues once a second."""

    def __init__(self, path: Path, writer: trajstore.Writer, recorder: trajstore.Recorder) -> None:
        super().__init__(daemon=True)
        self.rows: list[list[float]] = []
        self.path, self.writer, self.recorder = path, writer, recorder
        self.end = threading.Event()

    def run(self) -> None:
        begun = time.monotonic()
        names = ["seconds", "resident_mib", "in_use_mib", "steps", "trajectories"]
        names += ["unfinished_mib", "spilled_mib", "stall_seconds"]
        with self.path.open("w", newline="") as file:
            sheet = csv.writer(file)
            sheet.writerow(names)
            while not self.end.wait(1.0):
                stats = self.recorder.stats
                row = [time.monotonic() - begun, resident(), in_use(), stats["steps"], stats["trajectories"]]
                row += [stats["unfinished_bytes"] / 2**20, stats["spilled_bytes"] / 2**20, stats["stall_seconds"]]
                self.rows.append(row)
                sheet.writerow([round(value, 2) for value in row])
                file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--memory", type=int, default=96, help="MiB for the recorder")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between steps")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    # From one step to ten thousand: a few environments hardly ever end, and their rows wait on disk.
    chance = 10.0 ** rng.uniform(-4, -0.5, ENVS)
    started = np.zeros(ENVS, np.int64)
    memory = options.memory << 20
    deadline = time.monotonic() + 60 * options.minutes
    step = ended = 0
    with (
        trajstore.create(options.folder / "store", profile="fast", commit_every=1.0, queue_bytes=32 << 20) as writer,
        trajstore.Recorder(writer, ENVS, memory_bytes=memory) as recorder,
    ):
        curve = Curve(options.folder / "memory.csv", writer, recorder)
        curve.start()
        while time.monotonic() < deadline:
            obs = np.empty((ENVS, 8), np.float32)
            obs[:, 0], obs[:, 1:] = step, np.arange(ENVS)[:, None]
            terminated = rng.random(ENVS) < chance
            recorder.step(
                obs=obs,
                step=np.full(ENVS, step),
                age=step - started,
                reward=obs[:, 1] * 0.5,
                terminated=terminated,
            )
            started[terminated] = step + 1
            ended += int(terminated.sum())
            step += 1
            if options.pause:
                time.sleep(options.pause)
        curve.end.set()
        curve.join()
        unfinished = int((started < step).sum())
        recorder.close()
        stats = recorder.stats
    check(options.folder / "store", step, ended + unfinished)
    memories = np.array([row[1] for row in curve.rows])
    half = len(memories) // 2
    growth = float(memories[half:].max() - memories[half // 2 : half].max())
    print(
        f"{step:,} steps of {ENVS:,} environments: {step * ENVS:,} rows, {ended + unfinished:,} trajectories, all there"
    )
    print(f"resident memory: median {np.median(memories):.0f} MiB, most {memories.max():.0f} MiB")
    print(f"growth from the second quarter to the second half: {growth:.0f} MiB")
    print({name: round(value, 1) for name, value in stats.items()})
    draw(options.folder / "memory.png", curve.rows)
    assert growth < 64, "memory grows"


def check(path: Path, steps: int, trajectories: int) -> None:
    """Every row once, and each trajectory's in order."""
    ds = trajstore.open(path)
    assert len(ds) == trajectories, (len(ds), trajectories)
    assert int(ds.lengths.sum()) == steps * ENVS
    total = 0
    for first in range(0, len(ds), 20_000):
        part = ds[first : first + 20_000]
        lengths = part.lengths
        age, step, obs = part.read("age"), part.read("step"), part.read("obs")
        starts = np.cumsum(lengths) - lengths
        assert np.array_equal(age, np.arange(len(age)) - np.repeat(starts, lengths))
        assert np.array_equal(step - np.repeat(step[starts], lengths), age)
        assert np.array_equal(obs[:, 0], step.astype(np.float32))
        assert np.array_equal(obs[:, 1], np.repeat(part.table["env"], lengths).astype(np.float32))
        total += int(step.sum())
    assert total == ENVS * steps * (steps - 1) // 2


def draw(path: Path, rows: list[list[float]]) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    values = np.array(rows)
    figure, axes = pyplot.subplots(figsize=(8, 4))
    axes.plot(values[:, 0] / 60, values[:, 1], label="resident")
    axes.plot(values[:, 0] / 60, values[:, 2], label="in use")
    axes.plot(values[:, 0] / 60, values[:, 5], label="unfinished rows in memory")
    axes.set_xlabel("minutes")
    axes.set_ylabel("MiB")
    axes.set_ylim(0, 1.2 * float(values[:, 1].max()))
    axes.legend(loc="upper center", ncols=3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
