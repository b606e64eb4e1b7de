"""``python -m bench.kills``: what is left of a collection that is killed with SIGKILL, for each way of storing it.

A child process collects one episode for each seed and says which ones its storage has reported saved. It is killed at a
random moment and started again where its own storage says it stands; the last child runs to the end. After each kill
everything is read and compared. The ways other than trajstore are those of collectors in use, cut down to what they do
on disk, in the same order; where the files cannot be opened after a kill, the child moves them away and begins again.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

Episodes = Iterator[tuple[int, dict[str, Any]]]

_FLUSH = 5  # episodes in a shard, or between two flushes


def episode(seed: int) -> dict[str, Any]:
    """Frames and actions that depend on the seed alone."""
    rng = np.random.default_rng(seed)
    steps = int(rng.integers(20, 60))
    frames = rng.integers(0, 8, (steps, 3, 64, 64), np.uint8) * 32
    return {"obs": frames, "action": rng.integers(0, 15, steps)}


class NpzShards:
    """Route collectors: compressed .npz shards, and a manifest that counts an episode before its shard is written."""

    title = "npz shards + manifest.json"

    def __init__(self, folder: Path) -> None:
        self.folder, self.buffer, self.saved = folder, [], []
        folder.mkdir(exist_ok=True)
        self.manifest = folder / "manifest.json"
        self.state = json.loads(self.manifest.read_text()) if self.manifest.exists() else {"seed": 0, "shards": 0}

    def next_seed(self) -> int:
        return self.state["seed"]

    def append(self, seed: int, rows: dict[str, Any]) -> list[int]:
        self.buffer.append((seed, rows))
        self.state["seed"] = seed + 1
        _replace(self.manifest, json.dumps(self.state))
        return self.flush() if len(self.buffer) >= _FLUSH else []

    def flush(self) -> list[int]:
        if not self.buffer:
            return []
        seeds = [seed for seed, _ in self.buffer]
        arrays = {"seed": np.array(seeds)}
        for i, (_, rows) in enumerate(self.buffer):
            arrays |= {f"{name}_{i}": value for name, value in rows.items()}
        np.savez_compressed(self.folder / "tmp.npz", **arrays)
        os.replace(self.folder / "tmp.npz", self.folder / f"shard_{self.state['shards']:06d}.npz")
        self.state["shards"] += 1
        self.buffer = []
        _replace(self.manifest, json.dumps(self.state))
        return seeds

    close = flush

    @staticmethod
    def read(folder: Path) -> Episodes:
        for file in sorted(folder.glob("shard_*.npz")):
            with np.load(file) as data:
                for i, seed in enumerate(data["seed"].tolist()):
                    yield seed, {name: data[f"{name}_{i}"] for name in ("obs", "action")}


class PickleFiles:
    """A replay buffer: the index is rewritten for each episode, which a background thread then pickles to a file."""

    title = "one pickle each + index.json"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.index = folder / "index.json"
        self.seeds: list[int] = json.loads(self.index.read_text()) if self.index.exists() else []
        self.pool = ThreadPoolExecutor(1)
        self.written: list[int] = []

    def next_seed(self) -> int:
        return max(self.seeds, default=-1) + 1

    def append(self, seed: int, rows: dict[str, Any]) -> list[int]:
        self.seeds.append(seed)
        self.index.write_text(json.dumps(self.seeds))
        self.pool.submit(self._write, seed, rows)
        return self._done()

    def _write(self, seed: int, rows: dict[str, Any]) -> None:
        with open(self.folder / f"trajectory_{seed}.pkl", "wb") as file:
            pickle.dump(rows, file)
        self.written.append(seed)

    def _done(self) -> list[int]:
        done, self.written = self.written, []
        return done

    def close(self) -> list[int]:
        self.pool.shutdown()
        return self._done()

    @staticmethod
    def read(folder: Path) -> Episodes:
        for seed in json.loads((folder / "index.json").read_text()):
            try:
                with open(folder / f"trajectory_{seed}.pkl", "rb") as file:
                    yield seed, pickle.load(file)
            except (OSError, EOFError, pickle.UnpicklingError):
                pass  # named by the index, and not there


class Hdf5:
    """One HDF5 file held open, a group for each episode, flushed every few."""

    title = "h5py, one file"

    def __init__(self, folder: Path) -> None:
        import h5py

        folder.mkdir(exist_ok=True)
        self.file = h5py.File(folder / "data.hdf5", "a")
        self.waiting: list[int] = []

    def next_seed(self) -> int:
        return max((int(name) for name in self.file), default=-1) + 1

    def append(self, seed: int, rows: dict[str, Any]) -> list[int]:
        group = self.file.create_group(str(seed))
        for name, value in rows.items():
            group.create_dataset(name, data=value, compression="gzip", compression_opts=1)
        self.waiting.append(seed)
        return self.flush() if len(self.waiting) >= _FLUSH else []

    def flush(self) -> list[int]:
        self.file.flush()
        done, self.waiting = self.waiting, []
        return done

    def close(self) -> list[int]:
        done = self.flush()
        self.file.close()
        return done

    @staticmethod
    def read(folder: Path) -> Episodes:
        import h5py

        with h5py.File(folder / "data.hdf5", "r") as file:
            for name, group in file.items():
                yield int(name), {key: value[:] for key, value in group.items()}


class ZarrAppend:
    """Arrays along time and their episodes' ends, each extended with zarr-python's ``append``."""

    title = "zarr-python append"

    def __init__(self, folder: Path) -> None:
        import zarr

        self.group = zarr.open_group(folder, mode="a")
        for name, like in episode(0).items():
            if name not in self.group:
                shape, chunks = (0, *like.shape[1:]), (64, *like.shape[1:])
                self.group.create_array(name, shape=shape, dtype=like.dtype, chunks=chunks)
        for name in ("episode_ends", "seed"):
            if name not in self.group:
                self.group.create_array(name, shape=(0,), dtype="int64", chunks=(1024,))
        _check_lengths(self.group)

    def next_seed(self) -> int:
        seeds = self.group["seed"][:]
        return int(seeds[-1]) + 1 if len(seeds) else 0

    def append(self, seed: int, rows: dict[str, Any]) -> list[int]:
        for name, value in rows.items():
            self.group[name].append(value)
        self.group["episode_ends"].append(np.array([self.group["obs"].shape[0]]))
        self.group["seed"].append(np.array([seed]))
        return [seed]

    def close(self) -> list[int]:
        return []

    @staticmethod
    def read(folder: Path) -> Episodes:
        import zarr

        group = zarr.open_group(folder, mode="r")
        _check_lengths(group)
        ends = group["episode_ends"][:].tolist()
        for start, end, seed in zip([0, *ends[:-1]], ends, group["seed"][:].tolist()):
            yield seed, {name: group[name][start:end] for name in ("obs", "action")}


def _check_lengths(group: Any) -> None:
    """What loaders of this layout assert."""
    ends, seeds = group["episode_ends"][:], group["seed"][:]
    end = int(ends[-1]) if len(ends) else 0
    if len(ends) != len(seeds) or any(group[name].shape[0] != end for name in ("obs", "action")):
        raise ValueError("the arrays have different lengths")


class Trajstore:
    """This library, a commit every quarter of a second."""

    title = "trajstore"

    def __init__(self, folder: Path) -> None:
        import trajstore

        self.writer = trajstore.create(folder, resume=True, unique="seed", commit_every=0.25, handle_signals=False)
        self.appended: list[int] = [-1] * self.writer.committed
        self.told = self.writer.committed

    def next_seed(self) -> int:
        return int(self.writer.remaining_seeds(range(1 << 20), 1)[0])

    def append(self, seed: int, rows: dict[str, Any]) -> list[int]:
        self.writer.append(rows, seed=seed)
        self.appended.append(seed)
        return self._done()

    def _done(self) -> list[int]:
        first, self.told = self.told, self.writer.committed
        return self.appended[first : self.told]

    def close(self) -> list[int]:
        self.writer.close()
        return self.appended[self.told :]

    @staticmethod
    def read(folder: Path) -> Episodes:
        import trajstore

        dataset = trajstore.open(folder)
        for trajectory in dataset:
            yield int(trajectory["seed"]), trajectory.load()


WAYS: dict[str, Any] = {way.__name__: way for way in (Trajstore, NpzShards, PickleFiles, Hdf5, ZarrAppend)}


def collect(way: str, folder: Path, count: int) -> None:
    """The child: collect up to seed ``count``, and say which seeds are saved."""
    try:
        store = WAYS[way](folder)
    except Exception as error:
        sys.stderr.write(f"  {WAYS[way].title}: {type(error).__name__}: {error}\n")
        folder.rename(folder.with_name(f"{folder.name}.unreadable.{time.time_ns()}"))
        store = WAYS[way](folder)
    for seed in range(store.next_seed(), count):
        rows = episode(seed)
        time.sleep(0.002)  # the environment
        for saved in store.append(seed, rows):
            _say(saved)
    for saved in store.close():
        _say(saved)


def _say(seed: int) -> None:
    sys.stdout.write(f"{seed}\n")
    sys.stdout.flush()


def _replace(path: Path, text: str) -> None:
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def campaign(way: str, folder: Path, kills: int, count: int, chance: random.Random) -> dict[str, Any]:
    """Kill a collection so many times, look after each kill at what can be read, let it end, and count."""
    saved: set[int] = set()
    live = unreadable = lost = 0
    for number in range(kills + 1):
        command = [sys.executable, "-m", "bench.kills", "--child", way, str(folder), str(count)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            if number < kills:
                # Some episodes further than the kill before, then any moment of the next ones.
                further = max((count - len(saved)) // (2 * (kills - number)), 1)
                _listen(child.stdout, saved, min(len(saved) + further, count - 1))
                time.sleep(chance.random() * 0.3)
                live += _seeds(way, folder) is None
                child.kill()
            _listen(child.stdout, saved, count + 1)
        if number == kills and child.returncode:
            raise RuntimeError(f"{way}: the child failed with status {child.returncode}")
        found = _seeds(way, folder)
        unreadable += found is None
        seeds = found or []
        lost += len(saved - set(seeds))
        saved &= set(seeds)
    return {
        "way": WAYS[way].title,
        "kills": kills,
        "live": live,
        "unreadable": unreadable,
        "lost": lost,
        "missing": len(set(range(count)) - set(seeds)),
        "twice": sum(number - 1 for number in Counter(seeds).values()),
        "episodes": count,
    }


def _seeds(way: str, folder: Path) -> list[int] | None:
    """The seeds whose episodes can be read and are right; ``None`` where the whole cannot be opened."""
    try:
        return [seed for seed, rows in WAYS[way].read(folder) if same(rows, episode(seed))]
    except Exception:
        return None


def _listen(lines: Iterable[bytes], saved: set[int], until: int) -> None:
    """Hear which seeds are saved, until so many are or nothing more is said."""
    for line in lines:
        if line.endswith(b"\n"):
            saved.add(int(line))
        if len(saved) >= until:
            return


def same(rows: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(np.array_equal(rows[name], value) for name, value in expected.items())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="for each way (default 20)")
    parser.add_argument("--episodes", type=int, default=200, help="to collect (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--only", action="append", choices=WAYS, help="this way only (repeatable)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=3, metavar=("WAY", "FOLDER", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        collect(options.child[0], Path(options.child[1]), int(options.child[2]))
        return 0
    results = []
    for way in options.only or WAYS:
        folder = Path(tempfile.mkdtemp(prefix="trajstore-kills."))
        try:
            chance = random.Random(options.seed)
            results.append(campaign(way, folder / "store", options.kills, options.episodes, chance))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if not options.json:
            print(results[-1], file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(results, indent=2))
        return 0
    kills, episodes = options.kills, options.episodes
    print(f"\n{episodes} episodes, kill -9 at {kills} random moments, resumed each time\n")
    print(
        "| stored as | cannot be read while written | cannot be opened after the kill "
        "| saved, then lost | missing at the end | stored twice |"
    )
    print("|---|---|---|---|---|---|")
    for r in results:
        counts = f"{r['live']} of {kills} | {r['unreadable']} of {kills} | {r['lost']} | {r['missing']} | {r['twice']}"
        print(f"| {r['way']} | {counts} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
