"""Seeds for many collectors: none lost, none repeated, whoever dies."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore.collect import SeedDispenser, split_seeds
from trajstore.errors import ConfigMismatchError, CorruptionError, LockedError, SchemaError, StateError

HOUSE = Path(__file__).resolve().parent.parent


def test_ranks_share_a_range() -> None:
    shares = [split_seeds(range(10, 33), rank, 4) for rank in range(4)]
    assert [seed for share in shares for seed in share] == list(range(10, 33))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with pytest.raises(SchemaError, match="rank 4"):
        split_seeds(range(3), 4, 4)


def test_two_collectors_get_every_seed_once(tmp_path: Path) -> None:
    writers = [trajstore.create(tmp_path / "run", part=f"rank{i}") for i in range(2)]
    dispensers = [SeedDispenser(writer, range(100, 123), block=4) for writer in writers]
    iterators = [iter(dispenser) for dispenser in dispensers]
    rng = random.Random(1)
    while iterators:
        i = rng.randrange(len(iterators))
        seed = next(iterators[i], None)
        if seed is None:
            del iterators[i], writers[i]
        elif seed % 5:
            writers[i].append({"x": np.array([seed])}, seed=seed)
    for dispenser in dispensers:
        assert dispenser.take(5).tolist() == []
        dispenser._writer.close()
    ds = trajstore.open(tmp_path / "run")
    assert sorted(ds.table["seed"].tolist()) == [seed for seed in range(100, 123) if seed % 5]


def test_what_a_dead_collector_did_not_commit_is_handed_out_again(tmp_path: Path) -> None:
    dead = trajstore.create(tmp_path / "run", part="rank0", commit_every=None)
    seeds = iter(SeedDispenser(dead, range(12), block=4))
    for _ in range(2):
        dead.append({"x": np.zeros(1)}, seed=next(seeds))
    dead.commit()
    dead.append({"x": np.zeros(1)}, seed=next(seeds))
    living = trajstore.create(tmp_path / "run", part="rank1", commit_every=None)
    dispenser = SeedDispenser(living, range(12), block=4)
    assert dispenser.take(100).tolist() == list(range(4, 12))  # the other one lives
    dead.abandon()
    assert dispenser.take(100).tolist() == [2, 3]
    assert dispenser.take(100).tolist() == []
    living.close()  # without having stored any: they are free once more
    with trajstore.create(tmp_path / "run", part="rank0", resume=True) as again:
        assert SeedDispenser(again, range(14), block=99).take(100).tolist() == [12, 13, 2, 3, *range(4, 12)]


def test_nobody_waits_for_seeds_that_are_stored(tmp_path: Path) -> None:
    """Two collectors that have finished, and are both still open."""
    writers = [trajstore.create(tmp_path / "run", part=f"rank{i}", commit_every=None) for i in range(2)]
    dispensers = [SeedDispenser(writer, range(8), block=4, wait=True, poll=0.01) for writer in writers]
    for writer, dispenser in zip(writers, dispensers):
        writer.mark_attempted(dispenser.take(4).tolist())
        writer.commit()
    assert [dispenser.take(1).tolist() for dispenser in dispensers] == [[], []]
    for writer in writers:
        writer.close()


def test_a_collector_that_commits_and_ends_while_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = [trajstore.create(tmp_path / "run", part=f"rank{i}", commit_every=None) for i in range(3)]
    dispensers = [SeedDispenser(writer, range(8), block=4) for writer in writers]
    for writer, dispenser in zip(writers[:2], dispensers):
        for seed in dispenser.take(4).tolist():
            writer.append({"x": np.zeros(1)}, seed=seed)
    is_over = SeedDispenser._is_over

    def last_moment(self: SeedDispenser, owner: Any) -> bool:
        writers[int(owner.part[-1])].close()
        return is_over(self, owner)

    monkeypatch.setattr(SeedDispenser, "_is_over", last_moment)
    assert dispensers[2].take(8).tolist() == []
    writers[2].close()


def test_another_machine_is_given_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock may not be seen from here."""
    remote = trajstore.create(tmp_path / "run", part="rank0", commit_every=None)
    with monkeypatch.context() as there:
        there.setattr("trajstore.collect.seeds.gethostname", lambda: "elsewhere")
        assert SeedDispenser(remote, range(4), block=4).take(4).tolist() == [0, 1, 2, 3]
    remote.abandon()
    with trajstore.create(tmp_path / "run", part="rank1") as writer:
        assert SeedDispenser(writer, range(4)).take(4).tolist() == []
        assert SeedDispenser(writer, range(4), grace=0.0).take(4).tolist() == [0, 1, 2, 3]


def test_a_part_that_was_removed_gives_its_seeds_back(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "run", part="rank0") as writer:
        for seed in SeedDispenser(writer, range(3)):
            writer.append({"x": np.zeros(1)}, seed=seed)
    shutil.rmtree(tmp_path / "run" / "rank0")
    with trajstore.create(tmp_path / "run", part="rank1") as writer:
        assert SeedDispenser(writer, range(3)).take(9).tolist() == [0, 1, 2]


def test_parts_are_claimed_and_seen_as_they_come(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "run", part="rank0") as first:
        first.append({"x": np.zeros(2)}, rank=0)
        first.commit()
        ds = trajstore.open(tmp_path / "run")
        with pytest.raises(LockedError, match="being written by process"):
            trajstore.create(tmp_path / "run", part="rank0", resume=True)
        with trajstore.create(tmp_path / "run", part="rank1") as second:
            second.append({"x": np.zeros(3)}, rank=1)
        assert (len(ds), len(ds.refresh())) == (1, 2)
        assert ds.refresh().table["rank"].tolist() == [0, 1]


def test_the_same_rank_goes_on_where_it_was(tmp_path: Path) -> None:
    for session in range(5):
        writer = trajstore.create(tmp_path / "run", part="rank0", resume=session > 0, commit_every=None)
        for i, seed in enumerate(SeedDispenser(writer, range(10), block=3)):
            writer.append({"x": np.zeros(1)}, seed=seed)
            if i == 2:
                writer.commit()
            if i == 3:
                break
        writer.abandon() if session < 4 else writer.close()
    assert sorted(trajstore.open(tmp_path / "run").table["seed"].tolist()) == list(range(10))


def test_what_cannot_be_handed_out(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "alone") as writer, pytest.raises(StateError, match="no part"):
        SeedDispenser(writer, range(3))
    with trajstore.create(tmp_path / "run", part="rank0") as writer:
        dispenser = SeedDispenser(writer, range(3), block=1)
        with pytest.raises(SchemaError, match="cannot be handed out"):
            SeedDispenser(writer, range(0, 9, 3))
        with pytest.raises(ConfigMismatchError, match="start at 0, not at 5"):
            SeedDispenser(writer, range(5, 9))
        dispenser.take(2)
        claim = tmp_path / "run" / dispenser._folder / "0.0"
        claim.write_bytes(b"")
        with pytest.raises(CorruptionError, match="damaged"):
            dispenser.take(2)


COLLECTOR = """
import os, random, sys, time
import numpy as np, trajstore
from trajstore.collect import SeedDispenser
root, rank, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = random.Random()
with trajstore.create(root, part=f"rank{rank}", resume=True, commit_every=0.05, unique="seed") as writer:
    for seed in SeedDispenser(writer, range(stop), block=5, wait=True, poll=0.02):
        time.sleep(rng.random() / 300)
        while seed > stop // 2 and not os.path.exists(f"{root}.killed"):  # nobody ends before some have been killed
            time.sleep(0.01)
        if seed % 7:
            writer.append({"x": np.full(1 + seed % 4, seed)}, seed=seed, rank=rank)
"""


def start(root: Path, rank: int, stop: int) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": str(HOUSE)}
    return subprocess.Popen([sys.executable, "-c", COLLECTOR, str(root), str(rank), str(stop)], env=env)


def test_four_processes_and_kills_lose_no_seed_and_repeat_none(tmp_path: Path) -> None:
    root, stop, rng = tmp_path / "run", 400, random.Random(3)
    workers = [start(root, rank, stop) for rank in range(4)]
    kills = 0
    deadline = time.monotonic() + 300
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.3)
        rank = rng.randrange(4)
        if kills < 6 and (root / f"rank{rank}" / "zarr.json").exists() and workers[rank].poll() is None:
            workers[rank].send_signal(signal.SIGKILL)
            workers[rank].wait()
            kills += 1
            if kills != 3:  # one collector never comes back: the others take over
                workers[rank] = start(root, rank, stop)
            if kills == 4:
                root.with_name("run.killed").touch()
    codes = [worker.wait(60) for worker in workers]
    assert codes.count(0) >= 3
    assert kills >= 4
    ds = trajstore.open(root)
    assert sorted(ds.table["seed"].tolist()) == [seed for seed in range(stop) if seed % 7]
    for i in range(0, len(ds), 37):
        seed = int(ds.table["seed"][i])
        assert ds[i]["x"][:].tolist() == [seed] * (1 + seed % 4)


TORCHRUN = """
import sys
import numpy as np, torch, torch.distributed as dist, trajstore
from trajstore.collect import Recorder, split_seeds
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
with trajstore.create(sys.argv[1], part=f"rank{rank}") as writer:
    recorder = Recorder(writer, 2)
    for seeds in zip(*[iter(writer.seeds(split_seeds(range(40), rank, world)))] * 2):
        recorder.set(seed=np.array(seeds))
        for t in range(3):
            recorder.step(obs=torch.full((2, 4), float(t)), terminated=torch.full((2,), t == 2))
    recorder.close()
dist.barrier()
if rank == 0:
    ds = trajstore.open(sys.argv[1])
    assert sorted(ds.table["seed"].tolist()) == list(range(40)), ds.table["seed"]
    assert len(ds.snapshots) == world
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    script = tmp_path / "collect.py"
    script.write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "--local-addr=127.0.0.1", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(HOUSE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
