"""Datasets and the loader for torch: workers of every kind, exact resume, bfloat16, nested and TensorDict batches."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import trajstore  # noqa: E402
from trajstore.errors import ConfigMismatchError, SchemaError  # noqa: E402
from trajstore.torch import (  # noqa: E402
    Batches,
    Loader,
    Order,
    StepDataset,
    Stream,
    TrajectoryDataset,
    TransitionDataset,
    Transitions,
    Window,
    WindowDataset,
    collate,
)

LENGTHS = [9, 4, 17, 6, 1, 11, 8, 8]
STEPS = sum(LENGTHS)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torch") / "store"
    rng = np.random.default_rng(0)
    with trajstore.create(path) as writer:
        first = 0
        for number, length in enumerate(LENGTHS):
            writer.append(
                {
                    "obs": {"image": rng.integers(0, 255, (length + 1, 3, 4, 4), np.uint8)},
                    "logprob": torch.arange(length, dtype=torch.bfloat16) / 7,
                    "action": np.arange(first, first + length),
                    "reward": np.ones(length, np.float32),
                    "terminated": np.arange(length) == length - 1,
                },
                level=number,
            )
            first += length
    return path


@pytest.fixture
def steps(store: Path) -> StepDataset:
    return StepDataset(trajstore.open(store))


def actions(batches: Any) -> list[int]:
    return [n for batch in batches for n in batch["action"].reshape(len(batch["action"]), -1)[:, 0].tolist()]


def test_a_batch_is_one_gather_of_nested_tensors(steps: StepDataset) -> None:
    fetched = steps.__getitems__([0, 5, 9])
    batch = collate(fetched)
    assert batch["obs"]["image"].shape == (3, 3, 4, 4) and batch["obs"]["image"].dtype == torch.uint8
    assert batch["action"].tolist() == [0, 5, 9]
    assert len(fetched) == 3 and [sample["action"].item() for sample in fetched] == [0, 5, 9]
    assert steps[5]["action"].item() == 5 and steps[5]["obs"]["image"].shape == (3, 4, 4)
    with pytest.raises(IndexError):
        fetched[3]


def test_bfloat16_comes_back_bit_by_bit(steps: StepDataset) -> None:
    logprob = steps.batch(range(9))["logprob"]
    assert logprob.dtype == torch.bfloat16
    assert torch.equal(logprob, torch.arange(9, dtype=torch.bfloat16) / 7)


def test_a_plain_data_loader_takes_it(steps: StepDataset) -> None:
    for function in (None, collate):
        loader = torch.utils.data.DataLoader(steps, batch_size=10, collate_fn=function)
        assert actions(loader) == list(range(STEPS))


def test_tensordict_on_request(store: Path) -> None:
    tensordict = pytest.importorskip("tensordict")
    dataset = WindowDataset(trajstore.open(store), 3, tensordict=True)
    batch = dataset.batch([0, 1])
    assert isinstance(batch, tensordict.TensorDict) and batch.batch_size == (2,)
    assert batch["obs", "image"].shape == (2, 3, 3, 4, 4)
    assert dataset[1]["action"].tolist() == [1, 2, 3]


def test_windows_transitions_and_a_transform(store: Path) -> None:
    dataset = trajstore.open(store)
    windows = WindowDataset(dataset, Window(4, before=1), fields=["action"], columns=["level"])
    batch = windows.batch([0, 1])
    assert batch["action"].tolist() == [[0, 0, 1, 2], [0, 1, 2, 3]]
    assert batch["mask"].tolist() == [[False, True, True, True], [True] * 4]
    moves = TransitionDataset(dataset, Transitions("obs/image", 2, 0.5), transform=lambda b: b["next"])
    assert moves.batch([0])["obs"]["image"].shape == (1, 3, 4, 4)
    scaled = StepDataset(dataset, fields=["action"], transform=lambda b: {"action": b["action"] * 2})
    assert actions([scaled.batch([3])]) == [6]
    pairs = StepDataset(dataset, fields=["action"], transform=lambda b: (b["action"], b["action"] + 1))
    assert [n.item() for n in pairs[3]] == [3, 4]
    loader = torch.utils.data.DataLoader(pairs, batch_size=4)
    assert [part.tolist() for part in next(iter(loader))] == [[0, 1, 2, 3], [1, 2, 3, 4]]


def test_whole_trajectories_padded_and_nested(store: Path) -> None:
    dataset = trajstore.open(store)
    padded = TrajectoryDataset(dataset, fields=["action", "logprob"])
    batch = padded.batch([1, 0])
    assert batch["action"].shape == (2, 9) and batch["count"]["action"].tolist() == [4, 9]
    assert batch["logprob"].dtype == torch.bfloat16
    jagged = TrajectoryDataset(dataset, fields=["action", "obs/image"], nested=True).batch([1, 0])
    assert [row.tolist() for row in jagged["action"].unbind()] == [list(range(9, 13)), list(range(9))]
    assert jagged["obs"]["image"].size(0) == 2
    loader = Loader(TrajectoryDataset(dataset, fields=["action"]), 2, bucket=True)
    assert [batch["action"].shape[0] for batch in loader] == [2] * 4


@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork"), (1, "spawn"), (1, "forkserver")])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_order_is_that_of_the_seed_for_any_workers(store: Path, workers: int, context: str | None) -> None:
    dataset = StepDataset(trajstore.open(store), fields=["action"])
    dataset.batch([0])  # files and caches are in use when the workers are made
    loader = Loader(dataset, 8, seed=3, workers=workers, context=context, drop_last=False)
    assert actions(loader) == Order(STEPS, 3).at(0, np.arange(STEPS)).tolist()
    assert loader.epoch == 1
    if context in (None, "fork"):
        assert actions(loader) == Order(STEPS, 3).at(1, np.arange(STEPS)).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_has_the_same_order_for_any_workers(steps: StepDataset, workers: int) -> None:
    stream = Stream(steps, Batches(Order(STEPS, 3), 8))
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers)
    assert actions(loader) == Order(STEPS, 3).at(0, np.arange(STEPS)).tolist()[: 8 * len(stream)]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_state_counts_what_came_out_not_what_was_prepared(steps: StepDataset) -> None:
    expected = Order(STEPS, 3).at(0, np.arange(STEPS)).tolist()
    for prefetch, workers in ((0, 0), (4, 0), (2, 2)):
        loader = Loader(steps, 4, seed=3, prefetch=prefetch, workers=workers)
        iterator = iter(loader)
        taken = actions(next(iterator) for _ in range(3))
        state = json.loads(json.dumps(loader.state_dict()))
        iterator.close()
        again = Loader(steps, 8, seed=3, workers=0)
        again.load_state_dict(state)
        taken += actions(again)
        assert taken == expected[: 12 + (STEPS - 12) // 8 * 8]
        assert taken[:12] + actions(loader) == expected[: STEPS // 4 * 4]  # the first one can go on as well


def test_ranks_are_those_of_torch_distributed(steps: StepDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    taken: list[int] = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
        taken += actions(Loader(steps, 5, seed=3))
    assert sorted(taken) == sorted(Order(STEPS, 3).at(0, np.arange(60)).tolist())


def test_weights_and_what_does_not_go_together(store: Path, steps: StepDataset) -> None:
    loader = Loader(steps, 16, weights="level == 2")
    assert set(actions(loader)) <= set(range(13, 30))
    with pytest.raises(SchemaError, match="the order's own"):
        Loader(steps, 4, order=Order(STEPS), weights="level")
    with pytest.raises(SchemaError, match="the order is of 5 samples"):
        Loader(steps, 4, order=Order(5))
    with trajstore.create(store.parent / "other") as writer:
        writer.append({"action": np.arange(STEPS)})
    other = Loader(StepDataset(trajstore.open(store.parent / "other")), 4)
    with pytest.raises(ConfigMismatchError, match="commits, trajectories differ"):
        Loader(steps, 4).load_state_dict(other.state_dict())


def test_an_error_in_the_prefetching_thread_reaches_the_caller(steps: StepDataset) -> None:
    def broken(batch: Any) -> Any:
        raise ValueError("in the transform")

    loader = Loader(StepDataset(steps.samples.dataset, transform=broken), 4)
    with pytest.raises(ValueError, match="in the transform"):
        next(iter(loader))


TRAIN = """
    import json, os, sys, time
    import trajstore
    from trajstore.torch import Loader, StepDataset

    store, log, state, rank, world, batch, workers = sys.argv[1:4] + [int(word) for word in sys.argv[4:]]
    data = StepDataset(trajstore.open(store), fields=["action"])
    loader = Loader(data, batch, seed=5, rank=rank, world_size=world, workers=workers, drop_last=False)
    if os.path.exists(state):
        loader.load_state_dict(json.load(open(state)))
    with open(log, "a") as out:
        for number, batch in enumerate(loader):
            print(*batch["action"].tolist(), file=out, flush=True)
            with open(f"{state}.{rank}", "w") as file:
                json.dump(loader.state_dict(), file)
            os.replace(f"{state}.{rank}", f"{state}.{rank}.done{number}")
            time.sleep(0.2 if rank >= 0 and "SLOW" in os.environ else 0)
"""


def test_killed_training_goes_on_exactly_at_another_world_size(store: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(TRAIN))
    state = tmp_path / "state"

    def begin(rank: int, world: int, batch: int, workers: int, slow: bool) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **({"SLOW": "1"} if slow else {})}
        words = [store, tmp_path / f"log{world}.{rank}", state, rank, world, batch, workers]
        return subprocess.Popen([sys.executable, str(script), *map(str, words)], env=environment)

    running = [begin(rank, 2, 4, 0, slow=True) for rank in range(2)]
    steps_done = 3
    for rank, process in enumerate(running):
        wanted = tmp_path / f"state.{rank}.done{steps_done - 1}"
        while not wanted.exists():
            assert process.poll() is None
            time.sleep(0.02)
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (tmp_path / "state.0.done2").rename(state)
    trained = []
    for rank in range(2):
        lines = (tmp_path / f"log2.{rank}").read_text().splitlines()[:steps_done]
        trained.append([list(map(int, line.split())) for line in lines])
    taken = [n for step in zip(*trained) for batch in step for n in batch]
    resumed = begin(0, 1, 5, 2, slow=False)
    assert resumed.wait(60) == 0
    taken += [int(word) for word in (tmp_path / "log1.0").read_text().split()]
    assert taken == Order(STEPS, 5).at(0, np.arange(STEPS)).tolist()
