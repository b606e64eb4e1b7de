"""A collection killed at random moments until it is complete, and compared with one that nobody disturbed.

    python -m tests.killed_collection --gigabytes 2 --kills 20

The collector is a process of its own that asks the store which seeds remain, as a user's would; every second seed
yields nothing. Exit status 1 if a seed is missing, doubled, or not what it should be.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import trajstore

_STEPS = 64
_FRAME = (3, 64, 64)


def episode(seed: int) -> dict[str, np.ndarray] | None:
    """What the environment gives for a seed: smooth float16 frames, or nothing."""
    if seed % 2:
        return None
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, 2 * _STEPS))
    scene = rng.integers(0, 256, (3, 8, 8)).repeat(8, 1).repeat(8, 2)
    drift = rng.integers(-2, 3, (length, 1, 1, 1)).cumsum(0)
    return {
        "obs": (((scene + drift) % 256) / 255).astype(np.float16),
        "actions": rng.integers(0, 15, length),
        "rewards": rng.standard_normal(length).astype(np.float32),
    }


def collect(path: str, seeds: int) -> None:
    """The collector: goes on with whatever the store says is left."""
    with trajstore.create(path, resume=True, config={"env": "scene"}, commit_every=0.5, profile="fast") as writer:
        for seed in writer.seeds(range(seeds)):
            found = episode(seed)
            if found is not None:
                writer.append(found, seed=seed)


def check(path: str, seeds: int) -> list[str]:
    """What is wrong with a finished collection."""
    ds = trajstore.open(path)
    found = ds.table["seed"].tolist()
    expected = [seed for seed in range(seeds) if episode_length(seed)]
    wrong = [f"seed {seed} is missing" for seed in sorted(set(expected) - set(found))]
    wrong += [f"seed {seed} is there twice" for seed in sorted({s for s in found if found.count(s) > 1})]
    for trajectory in ds:
        original = episode(int(trajectory["seed"]))
        if original is None or any(trajectory[k][:].tobytes() != v.tobytes() for k, v in original.items()):
            wrong.append(f"seed {trajectory['seed']} differs")
    return wrong


def episode_length(seed: int) -> int:
    return 0 if seed % 2 else int(np.random.default_rng(seed).integers(1, 2 * _STEPS))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="raw float16 bytes to collect")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--collect", nargs=2, metavar=("PATH", "SEEDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.collect:
        collect(options.collect[0], int(options.collect[1]))
        return 0
    bytes_a_seed = _STEPS / 2 * int(np.prod(_FRAME)) * 2
    seeds = int(options.gigabytes * 1e9 / bytes_a_seed)
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "run.zarr")
        command = [sys.executable, "-m", "tests.killed_collection", "--collect", path, str(seeds)]
        kills = 0
        while True:
            child = subprocess.Popen(command)
            if kills < options.kills:
                try:
                    child.wait(moments.uniform(0.4, 1.2))
                except subprocess.TimeoutExpired:
                    child.send_signal(signal.SIGKILL)
                    child.wait()
                    kills += 1
                    continue
            if child.wait() == 0:
                break
            return 1
        began = time.time()
        wrong = check(path, seeds)
        ds = trajstore.open(path)
        size = sum(os.path.getsize(file) for file in Path(path).rglob("*") if file.is_file())
        raw = int(ds.lengths.sum()) * int(np.prod(_FRAME)) * 2
        print(
            f"{kills} kills; {len(ds)} trajectories of {seeds} seeds, "
            f"{raw / 1e9:.2f} GB raw, {size / 1e6:.0f} MB stored"
        )
        print(f"compared with an undisturbed run in {time.time() - began:.0f} s: {len(wrong)} differences")
        for line in wrong[:20]:
            print(" ", line)
        return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
