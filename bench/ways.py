"""Ways of storing a collection, as collectors in use do it on disk, and the process that collects with one of them."""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

Episodes = Iterator[tuple[int, dict[str, Any]]]

_FLUSH = 5  # episodes in a shard, or between two flushes


@cache
def episode(seed: int) -> dict[str, Any]:
    """Frames and actions that depend on the seed alone."""
    rng = np.random.default_rng(seed)
    steps = int(rng.integers(20, 60))
    frames = rng.integers(0, 8, (steps, 3, 8, 8), np.uint8) * 32
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
    """This library, a commit every twentieth of a second."""

    title = "trajstore"

    def __init__(self, folder: Path) -> None:
        import trajstore

        self.writer = trajstore.create(folder, resume=True, unique="seed", commit_every=0.05, handle_signals=False)
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
        rows = {name: dataset.read(name) for name in dataset.fields} if len(dataset) else {}
        ends = np.cumsum(dataset.lengths).tolist()
        for start, end, seed in zip([0, *ends], ends, dataset.table["seed"].tolist()):
            yield seed, {name: values[start:end] for name, values in rows.items()}


WAYS: dict[str, Any] = {way.__name__: way for way in (Trajstore, NpzShards, PickleFiles, Hdf5, ZarrAppend)}


def collect(way: str, folder: Path, count: int, told: Connection) -> None:
    """The child: collect up to seed ``count``, and tell which seeds are saved."""
    warnings.simplefilter("ignore")
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
            told.send(saved)
    for saved in store.close():
        told.send(saved)


def _replace(path: Path, text: str) -> None:
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)
