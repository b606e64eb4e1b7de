"""Replay and training input: low-dimensional windows, one file for each trajectory, loaders, a training loop."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import trajstore
from bench import data
from bench.rows import Bench, Claim, SkipRow, WrongResultError, row
from trajstore.sampling.samples import CutSamples
from trajstore.sampling.windows import Window

_LENGTH = 16


def _rollout_store(bench: Bench, count: int, steps: int) -> tuple[Path, list[dict[str, Any]]]:
    rollouts = data.rollouts(count, steps)
    path = bench.folder / f"rollouts.{count}"
    if not path.exists():
        with trajstore.create(path) as writer:
            for rollout in rollouts:
                writer.append(rollout)
    return path, rollouts


@row("windows-lowdim")
def windows_lowdim(bench: Bench) -> Iterator[Claim]:
    """256 windows of 16 steps of observations, actions, rewards and ends."""
    count, steps = (200, 250) if bench.short else (800, 250)
    path, rollouts = _rollout_store(bench, count, steps)
    samples = CutSamples(trajstore.open(path, cache_bytes=256 << 20), Window(_LENGTH))
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, len(samples), 256) for _ in range(8)]
    turns = {name: iter(range(1 << 30)) for name in ("ours", "h5py", "memmap")}
    names = list(rollouts[0])

    def ours() -> Any:
        return samples.get(drawn[next(turns["ours"]) % len(drawn)])

    work: dict[str, Callable[[], Any]] = {"trajstore": ours}
    try:
        import h5py
    except ImportError:
        pass
    else:
        with h5py.File(bench.folder / "rollouts.hdf5", "w") as file:
            for name in names:
                rows = np.concatenate([rollout[name] for rollout in rollouts])
                file.create_dataset(name, data=rows, chunks=(1024, *rows.shape[1:]))
        opened = h5py.File(bench.folder / "rollouts.hdf5", "r")

        def windows_of_h5py() -> Any:
            found = samples.locate(drawn[next(turns["h5py"]) % len(drawn)])
            starts = (found[0] * steps + found[1]).tolist()
            return {name: np.stack([opened[name][start : start + _LENGTH] for start in starts]) for name in names}

        work["h5py"] = windows_of_h5py
    mapped = {}
    for name in names:
        rows = np.concatenate([rollout[name] for rollout in rollouts])
        rows.tofile(bench.folder / f"rollouts.{name}")
        mapped[name] = np.memmap(bench.folder / f"rollouts.{name}", rows.dtype, "r", shape=rows.shape)

    def windows_of_memmap() -> Any:
        found = samples.locate(drawn[next(turns["memmap"]) % len(drawn)])
        places = (found[0] * steps + found[1])[:, None] + np.arange(_LENGTH)
        return {name: mapped[name][places] for name in names}

    work["memmap"] = windows_of_memmap
    times = bench.compare(work, check=lambda a, b: all((a[name] == b[name]).all() for name in names), inner=3)
    note = f"{times.median() * 1e3:.2f} ms"
    if "h5py" in work:
        yield times.claim("256 windows × 16 low-dim steps", "h5py", ">= 10", note=note)
    yield times.claim("256 windows × 16 low-dim steps", "memmap", note=note)
    theirs = _slices(bench, rollouts)

    def check(a: Any, b: Any) -> bool:
        return bool(a["obs"].shape == (256, _LENGTH, 17) and b["obs"].shape == (256 * _LENGTH, 17))

    times = bench.compare({"trajstore": ours, "TorchRL SliceSampler": theirs}, check=check)
    yield times.claim("256 windows × 16 low-dim steps", "TorchRL SliceSampler", ">= 10", note="LazyMemmapStorage")


def _slices(bench: Bench, rollouts: list[dict[str, Any]]) -> Callable[[], Any]:
    try:
        import torch
        from tensordict import TensorDict
        from torchrl.data import LazyMemmapStorage, ReplayBuffer, SliceSampler
    except ImportError as error:
        raise SkipRow(str(error)) from error
    steps = sum(len(rollout["reward"]) for rollout in rollouts)
    storage = LazyMemmapStorage(steps, scratch_dir=str(bench.scratch("torchrl")))
    buffer = ReplayBuffer(
        storage=storage,
        sampler=SliceSampler(slice_len=_LENGTH, traj_key="episode", cache_values=True),
        batch_size=256 * _LENGTH,
    )
    rows = {name: torch.from_numpy(np.concatenate([r[name] for r in rollouts])) for name in rollouts[0]}
    rows["episode"] = torch.repeat_interleave(
        torch.arange(len(rollouts)), torch.tensor([len(r["reward"]) for r in rollouts])
    )
    buffer.extend(TensorDict(rows, batch_size=[steps]))
    return buffer.sample


def _batch(number: int) -> dict[str, Any]:
    """A batch as the embodied-RL buffer gets it: eight steps of two environments, with small frames."""
    import torch

    generator = torch.Generator().manual_seed(number)

    def floats(*shape: int) -> Any:
        return torch.rand(shape, generator=generator)

    frames = torch.randint(0, 255, (9, 2, 24, 24, 3), generator=generator, dtype=torch.uint8)
    return {
        "max_episode_length": 8,
        "model_weights_id": "00000000-0000-0000-1234-567812345678",
        "actions": floats(8, 2, 28),
        "rewards": floats(8, 2, 4),
        "dones": floats(9, 2, 1) < 0.1,
        "prev_logprobs": floats(8, 2, 28).to(torch.bfloat16),
        "curr_obs": {"main_images": frames[:-1], "states": floats(8, 2, 14)},
        "next_obs": {"main_images": frames[1:], "states": floats(8, 2, 14)},
    }


@row("replay")
def replay(bench: Bench) -> Iterator[Claim]:
    """Add, sample, save and load, with ten thousand batches there, against a file for each and a JSON index."""
    try:
        from bench.peers.one_file_each import OneFileEach
        from trajstore.compat.rlinf import TrajectoryReplayBuffer
    except ImportError as error:
        raise SkipRow(str(error)) from error
    count, more = (1_000, 50) if bench.short else (10_000, 100)
    batches = [_batch(number) for number in range(200)]

    def given(number: int) -> dict[str, Any]:
        return batches[number % len(batches)]

    theirs = OneFileEach(bench.scratch("each"), cache_size=100, window=100)
    path = bench.scratch("each.store")
    settings = {"auto_save": True, "auto_save_path": str(path), "trajectory_format": "store"}
    ours = TrajectoryReplayBuffer(1234, True, 100, 100, **settings)
    # Their index alone would take minutes on the way here; it is written once, as the last of these adds would.
    finish, theirs._write_index = theirs._write_index, lambda folder: None  # type: ignore[method-assign]
    for number in range(count):
        theirs.add([given(number)])
        ours.add_trajectories([given(number)])
    theirs.finish()
    theirs._write_index = finish  # type: ignore[method-assign]
    theirs._write_index(theirs.folder)

    def add_theirs() -> None:
        for number in range(more):
            theirs.add([given(number)])
        theirs.finish()

    def add_ours() -> None:
        for number in range(more):
            ours.add_trajectories([given(number)])
        ours._own.writer.commit()

    name = f"{count:,} batches: "
    peer = "one .pt each, JSON index"
    times = bench.compare({"trajstore": add_ours, peer: add_theirs}, repeats=3)
    note = f"{times.median() / more * 1e3:.2f} ms an add, durable; theirs {times.median(peer) / more * 1e3:.1f} ms"
    yield times.claim(name + "add", peer, ">= 10", note=note)

    times = bench.compare(
        {"trajstore": lambda: ours.sample(256), peer: lambda: theirs.sample(256)}, check=_agree, inner=5
    )
    yield times.claim(name + "sample 256, cached", peer, ">= 1", note=f"{times.median() * 1e3:.2f} ms")

    ours.save_checkpoint(str(bench.scratch("each.checkpoint")))
    theirs.finish()
    turn = iter(range(1 << 30))
    ours.sample_window_size = theirs.window = 0

    def save_ours() -> None:
        ours.save_checkpoint(str(bench.folder / f"save.{next(turn)}"))

    def save_theirs() -> None:
        theirs.save(bench.folder / f"save.{next(turn)}")

    def clean(_: str) -> None:
        for folder in bench.folder.glob("save.*"):
            shutil.rmtree(folder)

    times = bench.compare({"trajstore": save_ours, peer: save_theirs}, repeats=3, prepare=clean)
    yield times.claim(name + "save all", peer, ">= 10", note=f"{times.median():.2f} s, files shared")
    clean("")

    def load_ours() -> Any:
        loaded = TrajectoryReplayBuffer(1234, True, 5, 5)
        loaded.load_checkpoint(str(bench.folder / "each.checkpoint"))
        return loaded

    def load_theirs() -> Any:
        return OneFileEach.load(theirs.folder, cache_size=5, window=5)

    def same(ours: Any, theirs: Any) -> bool:
        ours.random_generator.manual_seed(0)  # a checkpoint brings its state back, theirs does not
        theirs.generator.manual_seed(0)
        return _agree(ours.sample(64), theirs.sample(64))

    times = bench.compare({"trajstore": load_ours, peer: load_theirs}, check=same)
    yield times.claim(name + "load, 5 of them into memory", peer, note=f"{times.median() * 1e3:.0f} ms")
    ours.close()
    for folder in ("each", "each.store", "each.checkpoint", "unused"):
        shutil.rmtree(bench.folder / folder, ignore_errors=True)


@row("replay-uncached")
def replay_uncached(bench: Bench) -> Iterator[Claim]:
    """256 transitions of batches on disk: 24 steps of two environments, real frames of 64 × 64, as their users have."""
    try:
        import torch

        from bench.peers.one_file_each import OneFileEach
        from trajstore.compat.rlinf import TrajectoryReplayBuffer
    except ImportError as error:
        raise SkipRow(str(error)) from error
    count = 150 if bench.short else 300
    frames = torch.from_numpy(np.ascontiguousarray(data.stored_frames(2_000).transpose(0, 2, 3, 1)))
    theirs = OneFileEach(bench.scratch("frames.each"), cache_size=0, window=0)
    settings = {"auto_save": True, "auto_save_path": str(bench.scratch("frames.store")), "trajectory_format": "store"}
    ours = TrajectoryReplayBuffer(1, False, 0, 0, **settings)
    for number in range(count):
        first = number * 48 % (len(frames) - 50)
        rows = frames[first : first + 50].reshape(25, 2, 64, 64, 3)
        batch = _batch(number)
        wide = {
            name: value.repeat_interleave(3, 0) for name, value in batch.items() if hasattr(value, "repeat_interleave")
        }
        wide["dones"] = torch.zeros((25, 2, 1), dtype=torch.bool)
        wide |= {"max_episode_length": 24, "model_weights_id": batch["model_weights_id"]}
        wide |= {"curr_obs": {"main_images": rows[:-1]}, "next_obs": {"main_images": rows[1:]}}
        theirs.add([wide])
        ours.add_trajectories([wide])
    theirs.finish()
    ours._own.writer.commit()
    theirs.generator.manual_seed(1)
    peer = "one .pt each, JSON index"
    times = bench.compare({"trajstore": lambda: ours.sample(256), peer: lambda: theirs.sample(256)}, check=_agree)
    note = f"{times.median() * 1e3:.0f} ms; theirs {times.median(peer) * 1e3:.0f} ms"
    yield times.claim(f"sample 256 of {count} batches with frames, uncached", peer, ">= 20", note=note)
    ours.close()
    shutil.rmtree(theirs.folder)


def _agree(a: dict[str, Any], b: dict[str, Any]) -> bool:
    import torch

    return all(
        _agree(value, b[name]) if isinstance(value, dict) else torch.equal(value, b[name]) for name, value in a.items()
    )


@row("loader")
def loader(bench: Bench) -> Iterator[Claim]:
    """Windows of 4 frames through a ``DataLoader``, 0 and 2 workers, against h5py a window at a time."""
    try:
        import h5py
        import torch
        from torch.utils.data import DataLoader

        from trajstore.torch import Loader, WindowDataset, collate
    except ImportError as error:
        raise SkipRow(str(error)) from error
    steps, batch, length = (600, 32, 4) if bench.short else (2_500, 64, 4)
    rounds = 2 if bench.short else 3
    frames = data.stored_frames(steps)
    path = bench.folder / f"loader.{steps}"
    if not path.exists():
        with trajstore.create(path) as writer:
            for first in range(0, steps, 100):
                rows = frames[first : first + 100]
                writer.append({"obs": rows, "actions": np.arange(first, first + len(rows))})
    dataset = WindowDataset(trajstore.open(path, cache_bytes=1 << 30), length)
    cold = WindowDataset(trajstore.open(path, cache_bytes=0), length)
    with h5py.File(bench.folder / "loader.hdf5", "w") as file:
        file.create_dataset("obs", data=frames, chunks=(4, *frames.shape[1:]), compression="lzf", shuffle=True)
        file.create_dataset("actions", data=np.arange(steps))

    class Windows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        """As h5py datasets for torch are mostly written: opened in the worker, a window at a time."""

        file: Any = None

        def __len__(self) -> int:
            return len(dataset)

        def __getitem__(self, number: int) -> Any:
            if self.file is None:
                self.file = h5py.File(bench.folder / "loader.hdf5", "r")
            per = 100 - length + 1
            start = number // per * 100 + number % per
            return {name: self.file[name][start : start + length] for name in ("obs", "actions")}

    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = order[: len(order) // batch * batch]

    def through(what: Any, workers: int, function: Any) -> Callable[[], Any]:
        groups = [chosen[i : i + batch] for i in range(0, len(chosen), batch)]

        def run() -> int:
            loaded = DataLoader(what, batch_sampler=groups, num_workers=workers, collate_fn=function)
            return sum(int(part["actions"].sum()) for part in loaded)

        return run

    def with_thread() -> int:
        return sum(int(part["actions"].sum()) for part in Loader(dataset, batch, seed=0))

    def first(what: Any, function: Any) -> Any:
        return next(iter(DataLoader(what, batch_sampler=[chosen[:batch]], collate_fn=function)))

    if not _agree(first(Windows(), None), first(cold, collate)):
        raise WrongResultError("trajstore and h5py gave different windows")
    for workers in (0, 2):
        work = {"trajstore": through(cold, workers, collate), "h5py": through(Windows(), workers, None)}
        times = bench.compare(work, repeats=rounds)
        rate = len(chosen) / times.median()
        yield times.claim(
            f"DataLoader, {workers} workers, windows of 4 frames, cold", "h5py", note=f"{rate:,.0f} windows/s"
        )
    work = {"trajstore": with_thread, "DataLoader, 2 workers": through(dataset, 2, collate)}
    times = bench.compare(work, repeats=rounds, check=lambda a, b: True)
    rate = len(dataset) / times.median()
    yield times.claim("Loader with a thread", "DataLoader, 2 workers", note=f"{rate:,.0f} windows/s")
    yield from _training(bench, dataset, batch)


def _training(bench: Bench, dataset: Any, batch: int) -> Iterator[Claim]:
    """Iterations of a small convolutional policy, its frames from the loader or all in memory beforehand."""
    import torch

    from trajstore.torch import Loader

    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 5, 4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16 * 15 * 15, 8)
    )
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)

    def train(batches: Any) -> None:
        for part in batches:
            frames = part["obs"].flatten(0, 1).float() / 255
            loss = network(frames).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    held = list(Loader(dataset, batch, seed=0))
    work = {"trajstore": lambda: train(Loader(dataset, batch, seed=0)), "all in memory beforehand": lambda: train(held)}
    times = bench.compare(work, repeats=2 if bench.short else 3)
    note = f"{len(held) / times.median():.0f} iterations/s"
    yield times.claim("training on frames", "all in memory beforehand", note=note)
