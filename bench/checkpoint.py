"""Checkpoints of a trained actor-critic, about 200 MB with Adam: what saving holds up, what it brings, what it costs.

``python -m bench.checkpoint`` measures the rows of this module alone.
"""

from __future__ import annotations

import copy
import io
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the rows belong to the module that others import, not to this copy of it
    from bench.checkpoint import main

    sys.exit(main())

import numpy as np

from bench import data
from bench.rows import ROWS, Bench, Claim, Ratio, row
from trajstore.checkpoint import Checkpoints
from trajstore.media.storage import LocalStorage

try:
    import torch
except ImportError as error:
    raise ImportError("checkpoint rows need torch: pip install 'trajstore[bench]'") from error


class ActorCritic(torch.nn.Module):
    """Convolutions and an MLP over 64×64 frames, 15 million parameters."""

    def __init__(self, width: int = 2048) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(3, 32, 8, 4), torch.nn.ReLU(), torch.nn.Conv2d(32, 64, 4, 2), torch.nn.ReLU(),
            torch.nn.Conv2d(64, 64, 3), torch.nn.ReLU(), torch.nn.Flatten(),
            torch.nn.Linear(64 * 4 * 4, width), torch.nn.ReLU(), torch.nn.Linear(width, 3 * width), torch.nn.ReLU(),
        )  # fmt: skip
        self.actor = torch.nn.Linear(3 * width, 15)
        self.critic = torch.nn.Linear(3 * width, 1)

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(frames)
        return self.actor(features), self.critic(features).squeeze(-1)


class Training:
    """An actor-critic on recorded CoinRun routes: advantage-weighted imitation, returns for the critic, Adam."""

    def __init__(self, width: int = 2048) -> None:
        torch.manual_seed(0)
        self.model = ActorCritic(width)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-4)
        routes = data.routes(2000)
        self.frames = torch.from_numpy(np.concatenate([r["obs"] for r in routes]).astype(np.float32))
        self.actions = torch.from_numpy(np.concatenate([r["actions"] for r in routes]))
        self.returns = torch.from_numpy(np.concatenate([_discounted(r["rewards"]) for r in routes]))
        self.iterations = 0

    def step(self, batch: int = 16) -> None:
        chosen = torch.randint(len(self.frames), (batch,))
        logits, values = self.model(self.frames[chosen])
        returns = self.returns[chosen]
        advantage = (returns - values).detach().clamp(-1, 1).exp()
        loss = torch.nn.functional.cross_entropy(logits, self.actions[chosen], reduction="none").mul(advantage).mean()
        loss = loss + 0.5 * (values - returns).pow(2).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()
        self.iterations += 1

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "iteration": self.iterations}

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iterations,
        }


def _discounted(rewards: Any, gamma: float = 0.99) -> Any:
    returns = np.zeros(len(rewards), np.float32)
    total = 0.0
    for t in range(len(rewards) - 1, -1, -1):
        total = float(rewards[t]) + gamma * total
        returns[t] = total
    return returns


@cache
def trained(short: bool) -> Training:
    """Some hundred steps; made once for all rows. A short run's is a sixth as large."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    training = Training(_width(short))
    for _ in range(25 if short else 300):
        training.step()
    return training


def _width(short: bool) -> int:
    return 768 if short else 2048


@cache
def states(short: bool) -> dict[str, Any]:
    """Trained and not, with what Adam keeps and without."""
    training, fresh = trained(short), Training(_width(short))
    fresh.step()
    return {
        "trained weights and Adam": training.state(),
        "trained weights alone": training.model.state_dict(),
        "weights and Adam after one step": fresh.state(),
        "untrained weights alone": ActorCritic(_width(short)).state_dict(),
    }


class _Unsynced(LocalStorage):
    """For folders whose size or number counts, not how they came about."""

    def write(self, key: str, pieces: Any, *, base: Any = None, sync: bool = True) -> None:
        super().write(key, pieces, base=base, sync=False)

    def append(self, key: str, data: Any, *, sync: bool = True) -> None:
        super().append(key, data, sync=False)

    def sync_folder(self, folder: str) -> None:
        pass


def flat_tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    items = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for item in items for tensor in flat_tensors(item)]


# --- how long the caller is held ----------------------------------------------------------------


@row("checkpoint-held")
def held(bench: Bench) -> Iterator[Claim]:
    """The time that a save keeps the loop from going on, nothing else running."""
    training = trained(bench.short)
    state = training.state()
    tensors = flat_tensors(state)
    size = sum(tensor.nbytes for tensor in tensors)
    warm = [torch.empty_like(tensor) for tensor in tensors]
    ckpts = Checkpoints(bench.scratch("held") / "c", keep_last=2, on_signal="ignore")
    lazy = Checkpoints(bench.scratch("held-lazy") / "c", keep_last=2, on_signal="ignore")
    lazy.stage_lazily(training.optimizer)
    for one in (ckpts, lazy):
        one.prepare(training.parts())
    step = iter(range(1_000_000))
    memory = np.empty(size, np.uint8)
    source = np.random.default_rng(0).integers(0, 255, size, np.uint8)
    scratch = bench.scratch("held-peers")

    def memcpy() -> None:
        np.copyto(memory, source)

    def copy_tensors() -> None:
        for target, tensor in zip(warm, tensors):
            target.copy_(tensor)

    def settle(_: str) -> None:
        ckpts.wait()
        lazy.wait()
        dcp.wait()
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()

    work: dict[str, Callable[[], Any]] = {
        "trajstore": lambda: ckpts.save(next(step), training.parts()) and None,
        "trajstore, lazy": lambda: lazy.save(next(step), training.parts()) and None,
        "memcpy": memcpy,
        "copies of the tensors": copy_tensors,
        "deepcopy": lambda: copy.deepcopy(state) and None,
        "torch.save": lambda: torch.save(state, scratch / "c.pt"),
        "the LZ4 saver's copies": lambda: _lz4_saver_copy(state) and None,
    }
    try:
        from safetensors.torch import save_file

        named = {str(number): tensor.contiguous() for number, tensor in enumerate(tensors)}
        work["safetensors"] = lambda: save_file(named, scratch / "c.safetensors")
    except ImportError:
        pass
    try:
        from torchrl.checkpoint import Checkpoint

        torchrl = Checkpoint(model=training.model, optimizer=training.optimizer)
        work["torchrl.checkpoint"] = lambda: torchrl.save(scratch / "rl") and None
    except ImportError:
        pass
    dcp = _DcpAsync(scratch, state)
    work["dcp.async_save"] = dcp.save
    times = bench.compare(work, prepare=settle, repeats=3 if bench.short else 10)
    dcp.close()
    ckpts.close()
    lazy.close()
    what = f"checkpoint save, time the caller is held ({size / 1e6:.0f} MB)"
    yield times.claim(what, "memcpy", "<= 1.25")
    yield times.claim(what, "copies of the tensors", "<= 1.25")
    yield times.claim(what, "deepcopy", ">= 5")
    for peer, bar in (("torchrl.checkpoint", ">= 14"), ("torch.save", ""), ("safetensors", ""), ("dcp.async_save", ""),
                      ("the LZ4 saver's copies", "")):  # fmt: skip
        if peer in work:
            yield times.claim(what, peer, bar)
    lazily = times.median("trajstore, lazy")
    yield Claim("the same, staged lazily", "0.3 ms", Ratio.of([t / 3e-4 for t in times.seconds["trajstore, lazy"]]),
                "<= 1", f"median {lazily * 1e3:.2f} ms")  # fmt: skip


def _lz4_saver_copy(state: dict[str, Any]) -> dict[str, Any]:
    """What the users' saver copies: tensors at the top and one level below; what lies deeper stays shared."""
    result: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            result[key] = {k: v.cpu().clone().detach() if isinstance(v, torch.Tensor) else v for k, v in value.items()}
        else:
            result[key] = value
    return result


class _DcpAsync:
    """``dcp.async_save`` in a process group of one, as its tutorial has it."""

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        import torch.distributed as dist

        self._folder, self._state, self._future, self._number = folder, state, None, 0
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def save(self) -> None:
        import torch.distributed.checkpoint as dcp

        self._number += 1
        self._future = dcp.async_save(self._state, checkpoint_id=str(self._folder / f"dcp{self._number}"))

    def wait(self) -> None:
        if self._future is not None:
            self._future.result()
            self._future = None

    def close(self) -> None:
        import torch.distributed as dist

        self.wait()
        if dist.is_initialized():
            dist.destroy_process_group()


# --- how a loop feels it ------------------------------------------------------------------------


@row("checkpoint-stall")
def stall(bench: Bench) -> Iterator[Claim]:
    """The longest pause of a loop of short Python steps while one checkpoint is written behind it."""
    training = trained(bench.short)
    state = training.state()
    folder = bench.scratch("stall")
    ckpts = Checkpoints(folder / "c", keep_last=2, on_signal="ignore")
    ckpts.prepare(training.parts())
    dcp = _DcpAsync(folder, state)
    worst: dict[str, list[float]] = {"trajstore": [], "dcp.async_save": [], "nothing": []}

    def spin(busy: Callable[[], bool]) -> float:
        longest, last, end = 0.0, time.perf_counter(), time.perf_counter() + 30
        value = 0
        while busy() and last < end:
            for i in range(200):
                value += i
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        return longest

    for number in range(3 if bench.short else 10):
        ckpts.save(number, training.parts())
        worst["trajstore"].append(spin(lambda: bool(ckpts.stats["pending"])))
        ckpts.wait()
        dcp.save()
        future = dcp._future
        worst["dcp.async_save"].append(spin(lambda future=future: not future.done()))
        dcp.wait()
        shutil.rmtree(folder / f"dcp{dcp._number}", ignore_errors=True)
        until = time.perf_counter() + 0.2
        worst["nothing"].append(spin(lambda until=until: time.perf_counter() < until))
    dcp.close()
    ckpts.close()
    ratio = Ratio.of([a / b for a, b in zip(worst["trajstore"], worst["dcp.async_save"])])
    medians = {name: statistics.median(values) * 1e3 for name, values in worst.items()}
    note = ", ".join(f"{name} {value:.1f} ms" for name, value in medians.items())
    yield Claim("worst stall of a loop while one is persisted", "dcp.async_save", ratio, "<= 1", note)


@row("checkpoint-training")
def training_rate(bench: Bench) -> Iterator[Claim]:
    """Training iterations a second with a save every few, by each way in turn, round after round.

    Torch has the same number of threads in all, one core less than there are. A save falls into the middle of each
    stretch, so that what is done behind the loop is done while the loop is timed.
    """
    training = Training(512) if bench.short else copy.deepcopy(trained(bench.short))
    every, saves, rounds = (10, 2, 3) if bench.short else (20, 1, 6)
    folder = bench.scratch("training")
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
    training.step()

    def loop(save: Callable[[], Any] | None) -> None:
        for iteration in range(every * saves):
            training.step()
            if save is not None and iteration % every == every // 4:
                save()

    ckpts = Checkpoints(folder / "c", keep_last=2, on_signal="ignore")
    lazy = Checkpoints(folder / "lazy", keep_last=2, on_signal="ignore")
    for one in (ckpts, lazy):
        one.prepare(training.parts())
    lazy.stage_lazily(training.optimizer)
    step = iter(range(1_000_000))
    saver: Any = None
    try:
        saver = _Lz4Saver(folder)
    except ImportError:
        pass
    work: dict[str, Callable[[], Any]] = {
        "none": lambda: loop(None),
        "trajstore": lambda: loop(lambda: ckpts.save(next(step), training.parts()) and None),
        "trajstore, lazy": lambda: loop(lambda: lazy.save(next(step), training.parts()) and None),
        "torch.save": lambda: loop(lambda: torch.save(training.state(), folder / "c.pt")),
    }
    if saver is not None:
        work["the LZ4 saver's way"] = lambda: loop(lambda: saver.save(training.state()))

    def settle(_: str) -> None:
        ckpts.wait()
        lazy.wait()
        if saver is not None:
            saver.wait()

    times = bench.compare(work, prepare=settle, repeats=rounds)
    settle("")
    ckpts.close()
    lazy.close()
    torch.set_num_threads(before)
    alone = times.median("none")
    for name in work:
        if name != "none":
            bar = ">= 0.98" if name == "trajstore, lazy" else ""
            what = f"training iterations/s, a save every {every}: {name}"
            cost = (times.median(name) - alone) / saves
            note = f"{cost * 1e3:.0f} ms a save; {every * saves / alone:.1f} iterations/s without"
            yield Claim(what, "no saves", times.ratio("none", name), bar, note, cpu=times.cpu_ratio("none", name))


class _Lz4Saver:
    """The users' saver, cut down to what it does: copies in the caller, torch.save and LZ4 at level 9 in a thread."""

    def __init__(self, folder: Path) -> None:
        import lz4.frame

        self._compress = lz4.frame.compress
        self._folder, self._number, self._thread = folder, 0, None

    def save(self, state: dict[str, Any]) -> None:
        frozen = copy.deepcopy(state)
        self.wait()
        self._number += 1
        self._thread = threading.Thread(target=self._write, args=(frozen, self._folder / f"l{self._number % 2}.pt.lz4"))
        self._thread.start()

    def _write(self, state: dict[str, Any], path: Path) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path.write_bytes(self._compress(buffer.getvalue(), compression_level=9))

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()


# --- what compression brings --------------------------------------------------------------------


@row("checkpoint-size")
def sizes(bench: Bench) -> Iterator[Claim]:
    """Bytes of a trained state by each way of storing it, over the raw bytes; and the honest part about LZ4."""
    for what, state in states(bench.short).items():
        raw = sum(tensor.nbytes for tensor in flat_tensors(state))
        ratios = {"trajstore": raw / _stored(bench, {"state": state})}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        ratios["torch.save"] = raw / len(buffer.getvalue())
        try:
            import lz4.frame

            ratios["torch.save and LZ4"] = raw / len(lz4.frame.compress(buffer.getvalue(), compression_level=9))
        except ImportError:
            pass
        if what == "trained weights and Adam":
            ratios["dcp with its zstd"] = raw / _dcp_zstd(bench, state)
            ratios["zipnn"] = raw / _zipnn(state)
        for peer, ratio in ratios.items():
            if ratio == ratio:
                bar = ">= 1.2" if (peer, what) == ("trajstore", "trained weights and Adam") else ""
                yield Claim(f"{what}: raw bytes over those of {peer}", "raw", Ratio.of([ratio]), bar)


def _stored(bench: Bench, state: dict[str, Any]) -> int:
    with Checkpoints(bench.scratch("size") / "c", rng=False, on_signal="ignore") as ckpts:
        ckpts.save(0, state)
        ckpts.wait()
        stored: int = ckpts.stats["stored_bytes"]
        return stored


def _dcp_zstd(bench: Bench, state: dict[str, Any]) -> float:
    try:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint._extension import ZStandard

        folder = bench.scratch("dcp-size")
        writer = dcp.FileSystemWriter(folder, _extensions=[ZStandard()])
        dcp.save(state, storage_writer=writer, no_dist=True)
        return sum(file.stat().st_size for file in folder.iterdir())
    except (ImportError, TypeError, ValueError):
        return float("nan")


def _zipnn(state: dict[str, Any]) -> float:
    try:
        from zipnn import ZipNN
    except ImportError:
        return float("nan")
    total = 0
    for tensor in flat_tensors(state):
        if tensor.nbytes > 1 << 16:
            coder = ZipNN(input_format="torch", bytearray_dtype="float32", method="zstd")
            total += len(coder.compress(tensor.detach().clone()))
        else:
            total += tensor.nbytes
    return total


@row("checkpoint-delta")
def delta(bench: Bench) -> Iterator[Claim]:
    """What XOR against the checkpoint before would bring: the same codec over the difference of the bits."""
    training = copy.deepcopy(trained(bench.short))
    before = [tensor.detach().clone() for tensor in flat_tensors(training.state()) if tensor.numel() > 100]
    for steps in (1, 9) if bench.short else (1, 9, 90):
        for _ in range(steps):
            training.step()
        after = [tensor for tensor in flat_tensors(training.state()) if tensor.numel() > 100]
        plain = {"s": {str(i): tensor.detach() for i, tensor in enumerate(after)}}
        bits = [(a.view(torch.int32) ^ b.detach().view(torch.int32)) for a, b in zip(before, after)]
        xor = {"s": {str(i): tensor for i, tensor in enumerate(bits)}}
        gain = _stored(bench, plain) / _stored(bench, xor)
        total = {1: 1, 9: 10, 90: 100}[steps]
        yield Claim(
            f"bytes of a checkpoint over those of its XOR delta, {total} step{'s' * (total > 1)} later",
            "no delta",
            Ratio.of([gain]),
        )


# --- restoring, disks, listings -----------------------------------------------------------------


@row("checkpoint-restore")
def restore(bench: Bench) -> Iterator[Claim]:
    """Reading all of it with every checksum checked, against ``torch.load`` of the same state (which checks none)."""
    training = trained(bench.short)
    state = training.state()
    folder = bench.scratch("restore")
    torch.save(state, folder / "c.pt")
    ckpts = Checkpoints(folder / "c", on_signal="ignore", rng=False)
    ckpts.save(0, state)
    ckpts.wait()

    def same(a: Any, b: Any) -> bool:
        pairs = zip(flat_tensors(a), flat_tensors(b))
        return all(torch.equal(x, y) for x, y in pairs)

    times = bench.compare(
        {
            "trajstore": lambda: ckpts.restore().state,
            "torch.load": lambda: torch.load(folder / "c.pt", weights_only=True),
        },
        check=same,
    )
    ckpts.close()
    yield times.claim("restore with checksums", "torch.load", "<= 1.5")


@row("checkpoint-save-rate")
def save_rate(bench: Bench) -> Iterator[Claim]:
    """Bytes a second of a whole durable save, against the users' LZ4 level 9 and against ``torch.save`` with a sync."""
    folder = bench.scratch("rate")
    for what, state in states(bench.short).items():
        ckpts = Checkpoints(folder / what.replace(" ", "-"), keep_last=1, on_signal="ignore", rng=False, link=False)
        step = iter(range(1_000_000))

        def ours(ckpts: Checkpoints = ckpts, state: Any = state, step: Any = step) -> None:
            ckpts.save(next(step), {"state": state})
            ckpts.wait()

        def synced(data: Any, name: str) -> None:
            with open(folder / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

        def torch_save(state: Any = state) -> None:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            synced(buffer.getbuffer(), "t.pt")

        work: dict[str, Callable[[], Any]] = {"trajstore": ours, "torch.save, synced": torch_save}
        try:
            import lz4.frame

            def lz4_save(state: Any = state) -> None:
                buffer = io.BytesIO()
                torch.save(state, buffer)
                synced(lz4.frame.compress(buffer.getvalue(), compression_level=9), "t.lz4")

            work["torch.save and LZ4 level 9, synced"] = lz4_save
        except ImportError:
            pass
        raw = sum(tensor.nbytes for tensor in flat_tensors(state))
        times = bench.compare(work, repeats=1 if bench.short else 2)
        ckpts.close()
        rates = ", ".join(f"{name} {raw / times.median(name) / 1e6:.0f} MB/s" for name in work)
        for peer in list(work)[1:]:
            yield times.claim(f"durable save, {what} ({raw / 1e6:.0f} MB)", peer, note=rates)


@row("checkpoint-disk")
def disk(bench: Bench) -> Iterator[Claim]:
    """Disk for a run of many saves of a small actor-critic under each rule, over all as ``torch.save`` files."""
    count = 100 if bench.short else 1000
    rng = np.random.default_rng(0)
    frozen = {"encoder": torch.from_numpy(rng.standard_normal(200_000).astype("f4"))}
    rules: dict[str, dict[str, Any]] = {
        "all": {"keep_last": None},
        "the last 5": {"keep_last": 5},
        "the last 5 and the best 2": {"keep_last": 5, "keep_best": ("r", "max", 2)},
        "the last 5 and every 50th": {"keep_last": 5, "keep_every": 50},
        "the last 5 and every 50th's model": {"keep_last": 5, "keep_every": 50, "milestone": "model"},
    }
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8))
    optimizer = torch.optim.Adam(model.parameters())
    plain = io.BytesIO()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for a network this small, others would only wait for each other
    for what, rule in rules.items():
        path = bench.scratch("disk") / "c"
        with Checkpoints(_Unsynced(path), on_signal="ignore", rng=False, **rule) as ckpts:
            for step in range(count):
                model(torch.randn(32, 64)).pow(2).sum().backward()
                optimizer.step()
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "frozen": frozen}
                ckpts.save(step, state, {"r": float(rng.random())})
        if not plain.getbuffer().nbytes:
            torch.save(state, plain)
        seen: dict[int, int] = {}
        for file in path.rglob("*"):
            if file.is_file():
                status = file.stat()
                seen[status.st_ino] = status.st_blocks * 512
        total, theirs = sum(seen.values()), plain.getbuffer().nbytes * count
        yield Claim(f"disk after {count} saves keeping {what}", "torch.save of all", Ratio.of([theirs / total]),
                    note=f"{total / 1e6:.1f} MB of {theirs / 1e6:.0f} MB")  # fmt: skip
    torch.set_num_threads(threads)


@row("checkpoint-listing")
def listing(bench: Bench) -> Iterator[Claim]:
    """``ls`` and ``prune --dry-run`` of 5,000 checkpoints against 50 of them: the cost of one."""
    from trajstore.checkpoint.listing import list_checkpoints, prune

    counts = (50, 500) if bench.short else (50, 5000)
    folders = {}
    for count in counts:
        folders[count] = path = bench.scratch(f"listing{count}") / "c"
        with Checkpoints(_Unsynced(path), keep_last=None, on_signal="ignore", rng=False) as ckpts:
            for step in range(count):
                ckpts.save(step, {"model": {"w": np.full(100, step)}}, {"reward_mean": float(step % 7)})
    work: dict[str, Callable[[], Any]] = {}
    for count, path in folders.items():
        work[f"ls {count}"] = lambda path=path: len(list_checkpoints(path).rows) and None
        work[f"prune {count}"] = lambda path=path: prune(path, keep_last=5, dry_run=True) and None
    times = bench.compare(work, repeats=3)
    for command in ("ls", "prune"):
        ratios = [
            a / b / (counts[1] / counts[0])
            for a, b in zip(times.seconds[f"{command} {counts[1]}"], times.seconds[f"{command} {counts[0]}"])
        ]
        note = f"{times.median(f'{command} {counts[1]}'):.2f} s for {counts[1]:,}"
        yield Claim(
            f"ckpt {command}, a checkpoint of {counts[1]:,}", f"one of {counts[0]}", Ratio.of(ratios), "<= 1.5", note
        )
    started = time.perf_counter()
    removed = prune(folders[counts[1]], keep_last=5, keep_best=[("reward_mean", "max", 2)])
    seconds = time.perf_counter() - started
    each = seconds / len(removed.removed) * 1e3
    yield Claim(f"ckpt prune, removing one of {len(removed.removed):,}", "1 ms", Ratio.of([each]), "",
                f"{seconds:.1f} s in all")  # fmt: skip


def main() -> int:
    """Measure the rows of this module; the arguments are those of ``python -m bench``."""
    from bench.__main__ import main as run

    names = [name for name in ROWS if name.startswith("checkpoint-")]
    return run([*(word for name in names for word in ("--only", name)), *sys.argv[1:]])
