"""The replay buffer: what is drawn, in what proportion, from what; what leaves; what a resumed one goes on with."""

from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore.errors import NotFoundError, SchemaError, StateError
from trajstore.sampling import replay
from trajstore.sampling.cutting import Transitions
from trajstore.sampling.replay import Priorities, ReplayBuffer
from trajstore.sampling.windows import Window


def episode(number: int, length: int = 10) -> dict[str, Any]:
    return {
        "obs": {"x": np.full((length + 1, 4), number, np.float32) + np.arange(length + 1)[:, None]},
        "action": np.arange(length) + 1000 * number,
        "reward": np.ones(length, np.float32),
        "terminated": np.arange(length) == length - 1,
    }


def filled(path: Path, count: int, shape: Any = None, **options: Any) -> ReplayBuffer:
    buffer = ReplayBuffer(path, shape, commit_every=None, **options)
    for number in range(count):
        buffer.add(episode(number), level=float(number))
    return buffer


def surprise(observed: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations a chi-square statistic lies off."""
    freedom = len(observed) - 1
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def numbers(batch: dict[str, Any]) -> np.ndarray:
    return batch["action"].reshape(len(batch["action"]), -1)[:, 0] // 1000


@pytest.mark.parametrize("fresh", ["commit", "memory"])
def test_trajectories_are_drawn_once_they_are_fresh(tmp_path: Path, fresh: str) -> None:
    with ReplayBuffer(tmp_path / "s", fresh=fresh, commit_every=None) as buffer:
        with pytest.raises(StateError, match="nothing to sample"):
            buffer.sample(4)
        buffer.add(episode(0))
        assert len(buffer) == (fresh == "memory")
        buffer.commit()
        assert len(buffer) == 1
        buffer.add(episode(1))
        seen = set(numbers(buffer.sample(200)).tolist())
        assert seen == ({0, 1} if fresh == "memory" else {0})
        buffer.commit()
        assert set(numbers(buffer.sample(200)).tolist()) == {0, 1}
        assert buffer.stats["held_bytes"] == 0


@pytest.mark.parametrize("fresh", ["commit", "memory"])
def test_rows_from_memory_and_from_disk_are_the_same(tmp_path: Path, fresh: str) -> None:
    lengths = [3, 9, 1, 14, 6]
    shape = Window(4, before=3, after=3)
    with ReplayBuffer(tmp_path / "s", shape, fresh="memory", commit_every=None, seed=4) as buffer:
        for number, length in enumerate(lengths):
            buffer.add(episode(number, length))
            if fresh == "commit" or number == 1:
                buffer.commit()
        batch = buffer.sample(300)
    steps = batch["action"] % 1000
    assert (batch["obs"]["x"] if "obs" in batch else batch["obs/x"]).shape == (300, 4, 4)
    assert (batch["action"] // 1000 == numbers(batch)[:, None]).all(), "two trajectories in one window"
    real = batch["mask"]
    x = batch["obs/x"][..., 0]
    assert (x[real] == (numbers(batch)[:, None] + steps)[real]).all()
    assert not real.all() and (np.diff(steps, axis=1)[real[:, 1:] & real[:, :-1]] == 1).all()


@pytest.mark.parametrize("fresh", ["commit", "memory"])
def test_draws_are_uniform_over_samples(tmp_path: Path, fresh: str) -> None:
    lengths = [5, 20, 1, 10]
    with ReplayBuffer(tmp_path / "s", fresh=fresh, commit_every=None, seed=1) as buffer:
        for number, length in enumerate(lengths):
            buffer.add(episode(number, length))
        if fresh == "commit":
            buffer.commit()
        drawn = np.concatenate([buffer.sample(64)["index"] for _ in range(200)])
    assert abs(surprise(np.bincount(drawn, minlength=36), np.full(36, 12_800 / 36))) < 4


def test_weights_are_those_of_the_column(tmp_path: Path) -> None:
    with filled(tmp_path / "s", 6, weights="level", fresh="memory", seed=2) as buffer:
        for _ in range(2):
            drawn = np.concatenate([numbers(buffer.sample(64)) for _ in range(150)])
            observed = np.bincount(drawn, minlength=6)
            assert observed[0] == 0
            assert abs(surprise(observed[1:], 9600 * np.arange(1, 6) / 15)) < 4
            buffer.commit()
    with ReplayBuffer(tmp_path / "s", weights="level", commit_every=None) as buffer:
        assert (numbers(buffer.sample(500)) > 0).all()


def test_priorities_are_followed_as_they_change(tmp_path: Path) -> None:
    with filled(tmp_path / "s", 3, priorities=Priorities(alpha=0.5, beta=1.0), fresh="memory", seed=3) as buffer:
        buffer.update_priorities(np.arange(30), np.arange(30.0) ** 2)
        batches = [buffer.sample(64) for _ in range(200)]
        drawn = np.concatenate([batch["index"] for batch in batches])
        weight = np.concatenate([batch["weight"] for batch in batches])
        share = np.sqrt(np.arange(30.0) ** 2 + 1e-6) / np.sqrt(np.arange(30.0) ** 2 + 1e-6).sum()
        assert abs(surprise(np.bincount(drawn, minlength=30)[1:], 12_800 * share[1:])) < 4
        one = batches[0]
        expected = 1 / share[one["index"]]
        assert np.allclose(one["weight"], expected / expected.max(), rtol=1e-5)
        assert weight.dtype == np.float32
        buffer.update_priorities([0, 999, -1], 900.0)  # two of them are not there
        buffer.add(episode(3), level=0.0)
        drawn = np.concatenate([buffer.sample(64)["index"] for _ in range(100)])
        new = np.bincount(drawn, minlength=40)[30:]
        assert abs(surprise(new, np.full(10, new.sum() / 10))) < 4 and new.sum() > 0.35 * len(drawn)


def test_only_the_newest_are_drawn(tmp_path: Path) -> None:
    for kind in ({}, {"priorities": Priorities()}):
        with filled(tmp_path / f"a{len(kind)}", 9, recent=2, fresh="memory", **kind) as buffer:
            assert set(numbers(buffer.sample(200)).tolist()) == {7, 8}
        with filled(tmp_path / f"b{len(kind)}", 9, recent_steps=25, fresh="memory", **kind) as buffer:
            assert set(numbers(buffer.sample(200)).tolist()) == {6, 7, 8}


@pytest.mark.parametrize("fresh", ["commit", "memory"])
@pytest.mark.parametrize("limit", [{"capacity": 3}, {"capacity_steps": 39}])
def test_the_oldest_leave(tmp_path: Path, fresh: str, limit: dict[str, int]) -> None:
    with filled(tmp_path / "s", 8, fresh=fresh, priorities=Priorities(), **limit) as buffer:
        buffer.commit()
        assert len(buffer) == 3 and buffer.steps == 30 and buffer.samples == 30
        assert set(numbers(buffer.sample(200)).tolist()) == {5, 6, 7}
        buffer.add(episode(8), level=1.0)
        buffer.commit()
        assert set(numbers(buffer.sample(200)).tolist()) == {6, 7, 8}
    assert [t.id for t in trajstore.open(tmp_path / "s")] == [6, 7, 8]


def test_a_long_life_at_a_small_capacity(tmp_path: Path) -> None:
    options: dict[str, Any] = {"capacity": 5, "priorities": Priorities(), "fresh": "memory", "seed": 1}
    with ReplayBuffer(tmp_path / "s", commit_every=None, **options) as buffer:
        for number in range(2500):
            buffer.add({"action": np.full(3, number)})
            if number % 700 == 0:
                buffer.commit()
            if number % 250 == 0:
                batch = buffer.sample(50)
                assert set(batch["action"].tolist()) == set(range(max(number - 4, 0), number + 1))
                buffer.update_priorities(batch["index"], 0.5)
        assert len(buffer._index.ids) < 2000
    assert [t.id for t in trajstore.open(tmp_path / "s")] == list(range(2495, 2500))


def test_transitions(tmp_path: Path) -> None:
    with filled(tmp_path / "s", 2, Transitions(("obs/x",), 3, 0.5), fresh="memory") as buffer:
        buffer.add(episode(2), level=2.0)
        batch = buffer.sample(100)
    step = batch["action"] % 1000
    assert (batch["next/obs/x"][:, 0] == numbers(batch) + np.minimum(step + 3, 10)).all()
    assert (batch["discount"] == np.where(step >= 7, 0, 0.125)).all()


def test_half_of_a_batch_comes_from_demonstrations(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "demos") as writer:
        for number in range(100, 103):
            writer.append(episode(number))
    demos = trajstore.open(tmp_path / "demos")
    with filled(tmp_path / "s", 2, demonstrations=demos, fresh="memory", priorities=Priorities()) as buffer:
        batch = buffer.sample(90)
        assert batch["demonstration"].sum() == 45
        assert ((numbers(batch) >= 100) == batch["demonstration"]).all()
        assert ((batch["index"] < 0) == batch["demonstration"]).all() and batch["weight"].max() == 1
        buffer.update_priorities(batch["index"], 2.0)


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("kind", [{}, {"priorities": Priorities()}])
def test_a_resumed_buffer_draws_what_it_would_have_drawn(tmp_path: Path, kind: dict[str, Any], prefetch: int) -> None:
    options = {"seed": 8, "prefetch": prefetch, "commit_every": None, **kind}
    with filled(tmp_path / "s", 5, **{k: v for k, v in options.items() if k != "commit_every"}) as buffer:
        buffer.commit()
        for _ in range(3):
            batch = buffer.sample(16)
            if kind and not prefetch:
                buffer.update_priorities(batch["index"], np.arange(16.0))
        state = buffer.commit()
        assert state
        expected = [buffer.sample(16)["index"].tolist() for _ in range(4)]
        buffer.abandon()  # as a kill does: nothing of the last draws is stored
    with ReplayBuffer(tmp_path / "s", **options) as buffer:
        assert [buffer.sample(16)["index"].tolist() for _ in range(4)] == expected


@pytest.mark.parametrize("kind", [{}, {"priorities": Priorities()}])
def test_a_saved_buffer_draws_the_same(tmp_path: Path, kind: dict[str, Any]) -> None:
    with filled(tmp_path / "s", 8, capacity=5, seed=8, fresh="memory", **kind) as buffer:
        if kind:
            buffer.update_priorities(buffer.sample(30)["index"], np.arange(30.0))
        buffer.save(tmp_path / "saved")
        assert trajstore.open(tmp_path / "saved").table["level"].tolist() == [3, 4, 5, 6, 7]
        expected = [buffer.sample(20)["action"].tolist() for _ in range(3)]
        with pytest.raises(FileExistsError):
            buffer.save(tmp_path / "saved")
    with ReplayBuffer(tmp_path / "saved", **kind) as saved:
        assert [saved.sample(20)["action"].tolist() for _ in range(3)] == expected
        saved.add(episode(9), level=0.0)


def test_priorities_of_trajectories_that_came_later(tmp_path: Path) -> None:
    with filled(tmp_path / "s", 2, priorities=Priorities(alpha=1, epsilon=0), fresh="memory") as buffer:
        buffer.update_priorities(np.arange(20), 0.25)
        state = buffer.state_dict()
        buffer.add(episode(2), level=0.0)
        buffer.load_state_dict(state)
        assert buffer._slots is not None
        assert buffer._slots.get(np.arange(30)).tolist() == [0.25] * 20 + [1.0] * 10


@pytest.mark.parametrize("seed", range(4))
def test_a_random_life_against_a_plain_list(tmp_path: Path, seed: int) -> None:
    """Rows come from commits, from memory, from fields that appear, vanish and part from their clock."""
    rng = np.random.default_rng(seed)
    fresh = ("commit", "memory")[seed % 2]
    capacity = int(rng.integers(3, 30))
    window = Window(int(rng.integers(1, 4)), before=0)
    options: dict[str, Any] = {"fresh": fresh, "capacity": capacity, "commit_every": None, "seed": seed}
    if seed % 3 == 0:
        options["priorities"] = Priorities()
    buffer = ReplayBuffer(tmp_path / "s", window, fields=["action", "extra"], **options)
    lives: list[tuple[int, int, bool]] = []  # id, length, whether it has the field
    committed = 0
    for _ in range(90):
        what = rng.random()
        if what < 0.5:
            number, length, has = len(lives), int(rng.integers(1, 20)), bool(rng.random() < 0.8 or not lives)
            action = np.arange(length) + 1000 * number
            assert buffer.add({"action": action, "extra": action * 2.0 if has else None}) == number
            lives.append((number, length, has))
        elif what < 0.65:
            buffer.commit()
            committed = len(lives)
        elif what < 0.7:
            buffer.close()
            committed = len(lives)
            buffer = ReplayBuffer(tmp_path / "s", window, fields=["action", "extra"], **options)
        else:
            # A field that parts from its clock makes a commit of its own.
            seen = len(lives) if fresh == "memory" else max(committed, buffer.writer.committed)
            there = lives[max(0, seen - capacity) : seen]
            possible = {number for number, length, has in there if has and length >= window.length}
            assert buffer.samples == sum(max(lives[number][1] - window.length + 1, 0) for number in possible)
            if possible:
                batch = buffer.sample(40)
                assert set((batch["action"] // 1000).ravel().tolist()) <= possible
                assert (batch["extra"] == batch["action"] * 2.0).all()
                assert (np.diff(batch["action"], axis=1) == 1).all()
    buffer.close()


@pytest.mark.parametrize("fresh", ["commit", "memory"])
def test_one_thread_adds_while_another_samples(tmp_path: Path, fresh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_COMPACT", 8)
    options: dict[str, Any] = {"fresh": fresh, "capacity": 40, "prefetch": 2, "priorities": Priorities()}
    with ReplayBuffer(tmp_path / "s", Window(3), commit_every=0.05, **options) as buffer:
        first = np.arange(20)
        buffer.add({"action": first, "twice": first * 2.0})
        buffer.commit()
        done = threading.Event()

        def collect() -> None:
            try:
                for number in range(1, 250):
                    action = np.arange(5 + number % 20) + 1000 * number
                    buffer.add({"action": action, "twice": action * 2.0})
            finally:
                done.set()

        thread = threading.Thread(target=collect)
        thread.start()
        count = 0
        while not done.is_set() or count < 20:
            batch = buffer.sample(32)
            assert (np.diff(batch["action"], axis=1) == 1).all()
            assert (batch["twice"] == batch["action"] * 2.0).all()
            buffer.update_priorities(batch["index"], np.ones(32))
            count += 1
        thread.join()
        buffer.load_state_dict(buffer.state_dict())
        buffer.commit()
        assert len(buffer) == 40 and len(buffer._index.ids) < 140
    assert trajstore.open(tmp_path / "s").table["id"].tolist() == list(range(210, 250))


def test_the_state_is_stored_with_the_writers_own_commits(tmp_path: Path) -> None:
    with filled(tmp_path / "s", 3, seed=1) as buffer:
        buffer.commit()
        buffer.sample(5)
        buffer.add(episode(3), level=0.0)
        buffer.writer.commit()
        assert trajstore.open(tmp_path / "s").snapshots[0].manifest.progress["state"]["replay"]["drawn"] == 5
        assert buffer.writer._committer._on_signal() is None
        buffer.sample(4)
    assert trajstore.open(tmp_path / "s").snapshots[0].manifest.progress["state"]["replay"]["drawn"] == 9


def test_ranks_have_parts_and_draws_of_their_own(tmp_path: Path) -> None:
    drawn = []
    for rank in range(2):
        with filled(tmp_path / "s", 3, rank=rank, world_size=2, fresh="memory", seed=1) as buffer:
            drawn.append(buffer.sample(20)["index"].tolist())
    assert drawn[0] != drawn[1]
    assert len(trajstore.open(tmp_path / "s")) == 6


def test_memory_stays_within_the_cache_budget(tmp_path: Path) -> None:
    budget, batch = 2 << 20, 8
    with ReplayBuffer(tmp_path / "s", cache_bytes=budget, commit_every=None, prefetch=2) as buffer:
        frames = np.zeros((90, 64, 64, 3), np.uint8)
        for number in range(40):
            frames[:] = number
            buffer.add({"action": np.arange(90), "frame": frames})
        buffer.commit()
        assert 40 * frames.nbytes > 20 * budget
        buffer.sample(batch)
        tracemalloc.start()
        try:
            for _ in range(60):
                drawn = buffer.sample(batch)
                assert (drawn["frame"] == drawn["frame"][:, :1, :1, :1]).all()
                assert buffer._cache.used <= budget
            assert buffer._cache.used > 0
            # Beside the cache: three batches ahead, and the chunks that are being decoded.
            assert tracemalloc.get_traced_memory()[1] < budget + 3 * batch * (64 * 64 * 3) + (1 << 20)
        finally:
            tracemalloc.stop()


def test_none_fields_and_late_fields(tmp_path: Path) -> None:
    with ReplayBuffer(tmp_path / "s", fields=["action", "extra"], fresh="memory", commit_every=None) as buffer:
        buffer.add({"action": np.arange(4), "extra": np.ones(4)})
        buffer.add({"action": np.arange(4) + 1000, "extra": None})
        buffer.add({"action": np.arange(4) + 2000, "extra": np.ones(4)})
        assert set(numbers(buffer.sample(100)).tolist()) == {0, 2}
        buffer.commit()
        assert set(numbers(buffer.sample(100)).tolist()) == {0, 2}


@pytest.mark.parametrize(
    "wrong",
    [{"fresh": "now"}, {"share": 2.0}, {"capacity": 0}, {"priorities": Priorities(), "weights": "level"}],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(SchemaError):
        ReplayBuffer(tmp_path / "s", **wrong)
    assert not (tmp_path / "s").exists()


def test_an_unknown_field_is_refused(tmp_path: Path) -> None:
    with ReplayBuffer(tmp_path / "s", commit_every=None) as buffer:
        with pytest.raises(StateError, match="no priorities"):
            buffer.update_priorities([0], 1.0)
        with pytest.raises(SchemaError, match="a batch of 0"):
            buffer.sample(0)


@pytest.mark.parametrize("fresh", ["memory", "commit"])
def test_a_first_trajectory_without_what_the_samples_need_is_not_taken(tmp_path: Path, fresh: str) -> None:
    steps = {"obs": np.zeros((3, 2)), "action": np.zeros(3)}
    with ReplayBuffer(tmp_path / "s", Transitions(["obs"]), fresh=fresh) as buffer:
        for _ in range(2):
            with pytest.raises(NotFoundError, match=r"no field 'reward'.*there are obs, action"):
                buffer.add(steps)
        buffer.add({**steps, "reward": np.ones(3), "terminated": np.zeros(3, bool)})
        buffer.commit()
        assert len(buffer) == 1 and buffer.sample(2)["reward"].tolist() == [1, 1]
