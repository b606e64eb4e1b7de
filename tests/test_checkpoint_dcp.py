"""torch.distributed.checkpoint into a checkpoint folder, with one process and with many."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")

from trajstore.checkpoint import Checkpoints  # noqa: E402
from trajstore.checkpoint.dcp import Reader, Writer  # noqa: E402
from trajstore.checkpoint.retention import Retention  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore::FutureWarning", "ignore:.*no_dist"
)


def a_state(value):
    torch.manual_seed(value)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.BatchNorm1d(30))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 20)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": value,
        "bf16": torch.randn(5).bfloat16(),
    }


def same(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return left == right


@pytest.mark.parametrize("how", ["save", "async_save"])
def test_one_process(tmp_path, how, monkeypatch):
    if how == "async_save":
        import torch.distributed as dist

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for step in (1, 2, 3):
            writer = Writer(tmp_path, step, metrics={"r": step}, retention=Retention(keep_last=2))
            done = getattr(dcp, how)(a_state(step), storage_writer=writer)
            if how == "async_save":
                done.result()
        into = a_state(9)
        dcp.load(into, storage_reader=Reader(tmp_path))
        assert same(into, a_state(3))
        dcp.load(into, storage_reader=Reader(tmp_path, 2))
        assert same(into, a_state(2))
    finally:
        if how == "async_save":
            dist.destroy_process_group()
    ckpts = Checkpoints(tmp_path, read_only=True)
    assert [c.step for c in ckpts.list()] == [2, 3] and ckpts.verify() == [] and ckpts.latest().metrics == {"r": 3}
    assert torch.equal(ckpts.restore().state["model.0.weight"], a_state(3)["model"]["0.weight"])
    with pytest.raises(dcp.api.CheckpointException, match="no checkpoint 7"):  # torch wraps what a rank raises
        dcp.load(into, storage_reader=Reader(tmp_path, 7))


def test_a_path_of_ones_own(tmp_path):
    dcp.save(a_state(5), checkpoint_id=tmp_path / "elsewhere" / "mine", storage_writer=Writer(tmp_path))
    into = a_state(1)
    dcp.load(into, checkpoint_id=tmp_path / "elsewhere" / "mine", storage_reader=Reader(tmp_path))
    assert same(into, a_state(5))


def test_damage_is_found_and_missing_files_are_stepped_over(tmp_path):
    for step in (1, 2):
        dcp.save(a_state(step), storage_writer=Writer(tmp_path, step))
    chunk = tmp_path / "step-000000000002" / "rank0.float32" / "c.0"
    good = chunk.read_bytes()
    chunk.write_bytes(good[:50] + bytes([good[50] ^ 1]) + good[51:])
    into = a_state(9)
    with pytest.raises(dcp.api.CheckpointException, match=r"c\.0 is damaged"):
        dcp.load(into, storage_reader=Reader(tmp_path))
    chunk.unlink()
    dcp.load(into, storage_reader=Reader(tmp_path))
    assert same(into, a_state(1))


RANKS = """
    import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
    from trajstore.checkpoint.dcp import Reader, Writer
    how, path = sys.argv[1:]

    def be_rank(rank, world, what):
        dist.init_process_group("gloo", init_method=f"file://{path}.{world}", rank=rank, world_size=world)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        rows = torch.arange(101 * 7, dtype=torch.float32).reshape(101, 7)
        columns = torch.arange(6 * 50).reshape(6, 50)
        def make(fill):
            a, b, c = rows * fill, columns * fill, torch.arange(9.) * fill
            return {"rows": distribute_tensor(a, mesh, [Shard(0)]),
                    "deep": {"columns": distribute_tensor(b, mesh, [Shard(1)])},
                    "replicated": distribute_tensor(c, mesh, [Replicate()]),
                    "plain": torch.full((3,), 5.0 * fill), "n": 7 * fill}
        state = make(what != "load")
        if what == "save":
            dcp.save(state, storage_writer=Writer(path, 10))
        elif what == "async_save":
            dcp.async_save(state, storage_writer=Writer(path, 10)).result()
        else:
            dcp.load(state, storage_reader=Reader(path))
            assert torch.equal(state["rows"].full_tensor(), rows)
            assert torch.equal(state["deep"]["columns"].full_tensor(), columns)
            assert torch.equal(state["replicated"].full_tensor(), torch.arange(9.))
            assert torch.equal(state["plain"], torch.full((3,), 5.0)) and state["n"] == 7
        dist.barrier()
        dist.destroy_process_group()

    def forked(*rank):
        child = os.fork()  # torch takes seconds to import, and has begun no threads yet
        if child == 0:
            try:
                be_rank(*rank)
                os._exit(0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
            finally:
                os._exit(1)
        return child

    for world, what in ((2, how), (1, "load"), (3, "load")):
        ranks = [forked(rank, world, what) for rank in range(world)]
        if any([os.waitpid(rank, 0)[1] for rank in ranks]):
            sys.exit(f"{what} with {world} ranks failed")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("how", ["save", "async_save"])
def test_ranks_save_and_other_numbers_of_ranks_load(tmp_path, how):
    """Ranks meet at a file: a port could be taken by another test."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(RANKS), how, str(tmp_path / "c")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    ckpts = Checkpoints(tmp_path / "c", read_only=True)
    assert ckpts.verify() == [] and {s[:4] for s in ckpts.latest().sections} == {"rank"}
