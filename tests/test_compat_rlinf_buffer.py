"""RLinf's buffer: the same draws as a plain reading of its files, and none of what it loses."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from trajstore.compat.rlinf import TrajectoryReplayBuffer  # noqa: E402
from trajstore.compat.rlinf.buffer import main  # noqa: E402
from trajstore.errors import NotFoundError, SchemaError, StateError, StorageError  # noqa: E402
from trajstore.importers.rlinf import import_rlinf  # noqa: E402

DATA = Path(__file__).parent / "data" / "rlinf_replay"
STATISTICS = {"num_trajectories", "total_samples", "cache_size"}


@dataclass
class Trajectory:
    """As RLinf's: tensors or None."""

    max_episode_length: int = 0
    model_weights_id: str = ""
    actions: Any = None
    rewards: Any = None
    terminations: Any = None
    dones: Any = None
    prev_values: Any = None
    prev_logprobs: Any = None
    curr_obs: Any = None


def trajectory(number: int, steps: int = 6, envs: int = 2, epochs: int = 1) -> Trajectory:
    generator = torch.Generator().manual_seed(number)
    ids = torch.arange(steps * envs).reshape(steps, envs, 1) + 10_000 * number
    return Trajectory(
        steps,
        f"weights-{number}",
        actions=ids.float(),
        rewards=torch.rand((steps, envs, 4), generator=generator),
        dones=torch.rand((steps + epochs, envs, 1), generator=generator) < 0.5,
        prev_values=torch.rand((steps + epochs, envs, 1), generator=generator),
        prev_logprobs=torch.rand((steps, envs, 3), generator=generator).to(torch.bfloat16),
        curr_obs={"image": torch.randint(0, 255, (steps, envs, 4, 4, 3), generator=generator, dtype=torch.uint8)},
    )


def flat_rows(value: dict[str, Any]) -> dict[str, Any]:
    """A batch file's rows [T * B, ...] by path, one row after another in plain Python."""
    steps, envs = value["rewards"].shape[:2]
    rows: dict[str, list[Any]] = {}
    for name, item in value.items():
        for path, tensor in (
            {f"{name}/{k}": v for k, v in item.items()} if isinstance(item, dict) else {name: item}
        ).items():
            if not isinstance(tensor, torch.Tensor):
                continue
            epochs = len(tensor) - steps
            for t in range(steps):
                at = t
                if epochs:
                    at += t // (steps // epochs) + (0 if name == "prev_values" else 1)
                for b in range(envs):
                    rows.setdefault(path, []).append(tensor[at, b])
    return {path: torch.stack(values) for path, values in rows.items()}


def reference(batches: list[dict[str, Any]], seed: int, sizes: list[int]) -> list[dict[str, Any]]:
    """The draws of RLinf's algorithm, one transition after another."""
    flats = [flat_rows(batch) for batch in batches]
    counts = [len(flat["rewards"]) for flat in flats]
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for size in sizes:
        found: dict[str, list[Any]] = {}
        for number in torch.randint(0, sum(counts), (size,), generator=generator).tolist():
            which = 0
            while number >= counts[which]:
                number -= counts[which]
                which += 1
            for path, rows in flats[which].items():
                found.setdefault(path, []).append(rows[number])
        drawn.append({path: torch.stack(rows) for path, rows in found.items()})
    return drawn


def by_path(batch: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in batch.items():
        flat.update({f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value})
    return flat


def assert_same(batch: dict[str, Any], expected: dict[str, Any]) -> None:
    found = by_path(batch)
    assert set(found) == set(expected)
    for path, values in expected.items():
        assert found[path].dtype == values.dtype and torch.equal(found[path], values), path


def files_of(folder: Path) -> list[dict[str, Any]]:
    index = json.loads(next(folder.glob("traject*_index.json")).read_text())
    return [
        torch.load(next(folder.glob(f"trajectory_{number}_*.pt")), weights_only=True)
        for number in index["trajectory_id_list"]
    ]


@pytest.mark.parametrize("rank", ["rank_0", "rank_2"])
@pytest.mark.parametrize("cache", [0, 1, 5])
def test_batches_are_those_of_a_plain_reference(rank: str, cache: int, tmp_path: Path) -> None:
    buffer = TrajectoryReplayBuffer(
        7, enable_cache=cache > 0, cache_size=cache, sample_window_size=2, auto_save=True, auto_save_path=str(tmp_path)
    )
    buffer.load_checkpoint(str(DATA / rank))
    expected = reference(files_of(DATA / rank)[-2:], 1234, [16, 96, 5])  # the seed of their metadata
    for batch in expected:
        assert_same(buffer.sample(len(batch["rewards"])), batch)
    assert buffer.get_stats()["cache_size"] == min(cache, 2 if rank == "rank_2" else 3)
    buffer.close()


def test_a_store_of_their_folder_gives_the_same_batches(tmp_path: Path) -> None:
    import_rlinf(DATA / "rank_0", tmp_path / "store")
    for window in (2, 0):
        buffer = TrajectoryReplayBuffer(1234, sample_window_size=window, auto_save=False)
        buffer._preload = 0
        buffer.load_checkpoint(str(tmp_path / "store"))
        assert buffer.total_samples == 144
        for batch in reference(files_of(DATA / "rank_0")[-window:], 1234, [16, 50]):
            assert_same(buffer.sample(len(batch["rewards"])), batch)


def values(one: Trajectory) -> dict[str, Any]:
    return {name: value for name, value in vars(one).items() if value is not None}


@pytest.mark.parametrize("mode", ["memory", "pt", "pkl", "store"])
def test_added_batches_are_drawn_saved_and_loaded(mode: str, tmp_path: Path) -> None:
    shapes = [(6, 2, 1), (4, 3, 2), (9, 1, 3), (6, 2, 2), (2, 2, 1)]
    given = [trajectory(number, *shape) for number, shape in enumerate(shapes)]
    settings = {"auto_save": mode != "memory", "auto_save_path": str(tmp_path / "auto")}
    if mode != "memory":
        settings["trajectory_format"] = mode
    buffer = TrajectoryReplayBuffer(5, cache_size=2, sample_window_size=4, **settings)
    buffer.add_trajectories(given[:1])
    buffer.add_trajectories([values(one) for one in given[1:]])
    assert len(buffer) == 5 and buffer.total_samples == 12 + 12 + 9 + 12 + 4 and buffer.is_ready(5)
    assert set(buffer.get_stats()) == STATISTICS
    expected = reference([values(one) for one in given[1:]], 5, [20, 37, 8, 8])
    for batch in expected[:2]:
        assert_same(buffer.sample(len(batch["rewards"])), batch)
    buffer.save_checkpoint(str(tmp_path / "check"))
    third = buffer.sample(8)
    buffer.save_checkpoint(str(tmp_path / "check"))  # again, into the same folder
    assert_same(third, expected[2])
    buffer.close()

    again = TrajectoryReplayBuffer(99, sample_window_size=4)
    again.load_checkpoint(str(tmp_path / "check"))
    assert_same(again.sample(8), expected[3])  # the draws go on
    assert len(again) == (5 if mode == "store" else 4)
    if mode in ("memory", "pt"):
        for loaded, one in zip(files_of(tmp_path / "check"), given[1:]):
            assert set(loaded) == set(values(one))
            for path, tensor in by_path(values(one)).items():
                same = torch.equal(by_path(loaded)[path], tensor) if isinstance(tensor, torch.Tensor) else None
                assert same or by_path(loaded)[path] == tensor
    again.add_trajectories([trajectory(7)])
    assert 5 in again._entries


def test_ranks_load_contiguous_blocks() -> None:
    blocks = []
    for rank in range(2):
        buffer = TrajectoryReplayBuffer(sample_window_size=0)
        buffer.load_checkpoint(str(DATA / "rank_0"), is_distributed=True, local_rank=rank, world_size=2)
        blocks.append(list(buffer._entries))
    assert blocks == [[0, 1], [2]]
    with pytest.raises(SchemaError, match="rank 2 of 2"):
        buffer.load_checkpoint(str(DATA / "rank_0"), is_distributed=True, local_rank=2, world_size=2)


def test_asking_for_more_than_there_is(caplog: pytest.LogCaptureFixture) -> None:
    buffer = TrajectoryReplayBuffer()
    with pytest.raises(StateError, match="empty buffer"):
        buffer.sample(1)
    with pytest.raises(SchemaError):
        buffer.sample(0)
    buffer.add_trajectories([trajectory(0)])
    with caplog.at_level(logging.WARNING):
        assert len(buffer.sample(100)["actions"]) == 12
    assert "100 transitions asked for, and only 12 in the window" in caplog.text


def test_clear_empties_memory_and_never_disk(tmp_path: Path) -> None:
    path = tmp_path / "auto"
    buffer = TrajectoryReplayBuffer(auto_save=True, auto_save_path=str(path))
    buffer.add_trajectories([trajectory(0), trajectory(1)])
    buffer.sample(4)
    buffer.clear()
    assert len(buffer) == buffer.total_samples == buffer.get_stats()["cache_size"] == 0
    buffer.add_trajectories([trajectory(2)])
    buffer.close()
    assert sorted(p.name.split("_")[1] for p in path.glob("*.pt")) == ["0", "1", "2"]
    index = json.loads((path / "trajectory_index.json").read_text())
    assert index["trajectory_id_list"] == [0, 1, 2]
    resumed = TrajectoryReplayBuffer(auto_save=True, auto_save_path=str(path))
    resumed.add_trajectories([trajectory(3)])
    resumed.close()
    assert json.loads((path / "trajectory_index.json").read_text())["trajectory_id_list"] == [0, 1, 2, 3]


def test_clear_cache_keeps_what_is_nowhere_else(tmp_path: Path) -> None:
    memory = TrajectoryReplayBuffer()
    memory.add_trajectories([trajectory(0)])
    memory.clear_cache()
    assert len(memory.sample(5)["actions"]) == 5
    saved = TrajectoryReplayBuffer(auto_save=True, auto_save_path=str(tmp_path))
    saved.add_trajectories([trajectory(0)])
    before = saved.sample(200)
    saved.clear_cache()
    assert saved.get_stats()["cache_size"] == 0
    saved.load_checkpoint  # noqa: B018 (a name that their code calls)
    saved.random_generator.manual_seed(1234)
    assert_same(saved.sample(200), by_path(before))
    saved.close()


def test_the_index_names_only_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = TrajectoryReplayBuffer(auto_save=True, auto_save_path=str(tmp_path), cache_size=1)
    buffer.add_trajectories([trajectory(0), trajectory(1)])
    buffer.save_checkpoint(str(tmp_path / "first"))

    def full(*_: Any) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr("trajstore.rlinf.folderbacking.save_batch", full)
    buffer.add_trajectories([trajectory(2)])
    monkeypatch.undo()
    with pytest.raises(StorageError, match="the disk is full"):
        buffer.add_trajectories([trajectory(n) for n in range(3, 30)])
    buffer.close()
    index = json.loads((tmp_path / "trajectory_index.json").read_text())
    names = {path.name.split("_")[1] for path in tmp_path.glob("trajectory_*.pt")}
    assert {str(n) for n in index["trajectory_id_list"]} <= names and "2" not in names
    assert index == json.loads((tmp_path / "trajector_index.json").read_text())


def test_missing_files_are_said(tmp_path: Path) -> None:
    shutil.copytree(DATA / "rank_0", tmp_path / "rank_0")
    next((tmp_path / "rank_0").glob("trajectory_1_*")).unlink()
    buffer = TrajectoryReplayBuffer()
    with pytest.warns(UserWarning, match="not there: 1"):
        buffer.load_checkpoint(str(tmp_path / "rank_0"))
    assert list(buffer._entries) == [0, 2]
    with pytest.raises(NotFoundError, match=r"no metadata\.json"):
        buffer.load_checkpoint(str(tmp_path))


KILLED = """
import os, sys, torch
from trajstore.compat.rlinf import TrajectoryReplayBuffer

buffer = TrajectoryReplayBuffer(auto_save=True, auto_save_path=sys.argv[1])
for number in range(40):
    buffer.add_trajectories([{"model_weights_id": "w", "rewards": torch.full((3, 2, 1), float(number))}])
buffer._own._threads.shutdown()
if sys.argv[2] == "kill":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_batches_that_were_saved_are_found_after_a_kill_and_after_no_close(tmp_path: Path, end: str) -> None:
    words = [sys.executable, "-c", KILLED, str(tmp_path), end]
    done = subprocess.run(words, cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == (-9 if end == "kill" else 0)
    (tmp_path / "trajectory_40_w.pt").write_bytes(b"torn")
    buffer = TrajectoryReplayBuffer(sample_window_size=0)
    if end == "kill":
        with pytest.warns(UserWarning, match="newer batches that its index lacks"):
            buffer.load_checkpoint(str(tmp_path))
    else:
        buffer.load_checkpoint(str(tmp_path))
    assert len(buffer) == 40
    assert set(buffer.sample(240)["rewards"].flatten().tolist()) <= set(range(40))
    again = TrajectoryReplayBuffer(auto_save=True, auto_save_path=str(tmp_path))
    again.add_trajectories([{"rewards": torch.zeros((1, 1, 1))}])
    again.close()
    assert (tmp_path / "trajectory_41_.pt").exists()


def test_what_is_no_batch_is_refused_whole(tmp_path: Path) -> None:
    buffer = TrajectoryReplayBuffer()
    wrong = trajectory(0, 6, 2, 1)
    wrong.dones = torch.zeros((10, 2, 1))  # four epochs of six steps
    for bad in (wrong, Trajectory(), {"actions": torch.zeros((3, 2, 1)), "rewards": torch.zeros((4, 2, 1))}):
        with pytest.raises(SchemaError):
            buffer.add_trajectories([bad])
    assert len(buffer) == 0
    for settings in ({"trajectory_format": "npz"}, {"auto_save": True}):
        with pytest.raises(SchemaError):
            TrajectoryReplayBuffer(**settings)


def test_batches_of_all_lengths_pass_through_the_memory() -> None:
    rng = np.random.default_rng(0)
    buffer = TrajectoryReplayBuffer(sample_window_size=7)
    for number in range(120):
        buffer.add_trajectories([trajectory(number, int(rng.integers(1, 30)), int(rng.integers(1, 4)))])
        batch = buffer.sample(10_000)
        drawn = {int(action) // 10_000 for action in batch["actions"].reshape(-1)}
        assert list(buffer._entries) == list(range(max(0, number - 6), number + 1))
        assert drawn <= set(buffer._entries)
        for number_ in drawn:
            mine = batch["actions"].reshape(-1).long() // 10_000 == number_
            of = batch["actions"].reshape(-1).long()[mine] % 10_000
            assert torch.equal(batch["rewards"][mine], buffer._arena.batch(number_)["rewards"][of])
    held = sum(rows.nbytes for rows in buffer._arena._rows.values())
    assert held < 4 * buffer._arena.nbytes + 100_000


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--load-path", str(DATA / "rank_0"), "--num-chunks", "4", "--sample-window-size", "10"]
    done = subprocess.run(
        [sys.executable, "-m", "trajstore.compat.rlinf", *words, "--cache-size", "5", "--enable-cache"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "[sample] keys: [" in done.stdout and "curr_obs/main_images: uint8 [4, 8, 8, 3]" in done.stdout
    assert "'num_trajectories': 3, 'total_samples': 144, 'cache_size': 3" in done.stdout
    assert main(["--load-path", "nowhere"]) == 1
    assert "[sample] failed" in capsys.readouterr().out
