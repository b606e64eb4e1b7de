"""Samples of a dataset, in NumPy, against plain loops over whole trajectories."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore.engine import gather
from trajstore.errors import NotFoundError, SchemaError
from trajstore.sampling.cutting import Transitions
from trajstore.sampling.sampler import Batches, Order
from trajstore.sampling.samples import CutSamples, TrajectorySamples, nested
from trajstore.sampling.windows import Window

LENGTHS = (7, 1, 12, 3, 30, 2)


def episode(length: int, number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    return {
        "obs": rng.random((length + 1, 3), np.float32),
        "curr": {"image": rng.integers(0, 255, (length, 8, 8), np.uint8)},
        "action": np.arange(length) + 1000 * number,
        "reward": rng.random(length, np.float32),
        "terminated": np.arange(length) == length - 1 if number % 2 else np.zeros(length, bool),
        "note": f"episode {number}",
    }


@pytest.fixture(scope="module")
def two_stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    for part in range(2):
        with trajstore.create(root / f"part{part}") as writer:
            for number in range(part * 3, part * 3 + 3):
                writer.append(episode(LENGTHS[number], number), success=bool(number % 2), level=number)
    return root


@pytest.fixture
def dataset(two_stores: Path) -> trajstore.Dataset:
    return trajstore.open(two_stores)


EPISODES = [episode(length, number) for number, length in enumerate(LENGTHS)]


def test_steps(dataset: trajstore.Dataset) -> None:
    samples = CutSamples(dataset, columns=["level"])
    assert len(samples) == sum(LENGTHS)
    assert set(samples.fields) == {"obs", "curr/image", "action", "reward", "terminated"}
    batch = samples.get(np.arange(len(samples)))
    assert (batch["action"] == np.concatenate([e["action"] for e in EPISODES])).all()
    assert (batch["curr/image"] == np.concatenate([e["curr"]["image"] for e in EPISODES])).all()
    assert (batch["obs"] == np.concatenate([e["obs"][:-1] for e in EPISODES])).all()
    assert (batch["level"] == np.repeat(range(6), LENGTHS)).all()
    assert (samples.get([-1])["action"] == EPISODES[-1]["action"][-1:]).all()
    with pytest.raises(NotFoundError, match="there are 55 samples"):
        samples.get([55])


@pytest.mark.parametrize("pad", ["repeat", "zero"])
def test_padded_windows(dataset: trajstore.Dataset, pad: str) -> None:
    window = Window(4, stride=2, dilation=2, before=3, after=5, pad=pad)
    samples = CutSamples(dataset, window, fields=["action", "obs"])
    numbers = np.random.default_rng(1).permutation(len(samples))
    batch = samples.get(numbers)
    trajectories, anchors = samples.locate(numbers)
    assert batch["action"].shape == (len(samples), 4) and batch["obs"].shape == (len(samples), 4, 3)
    for i, (trajectory, anchor) in enumerate(zip(trajectories.tolist(), anchors.tolist())):
        for j in range(4):
            step, of = anchor + 2 * j, EPISODES[trajectory]
            inside = min(max(step, 0), LENGTHS[trajectory] - 1)
            real = step == inside
            assert batch["mask"][i, j] == (0 <= step < len(of["obs"])) or batch["mask"][i, j] == real
            assert batch["action"][i, j] == (of["action"][inside] if real or pad == "repeat" else 0)
            if real:
                assert (batch["obs"][i, j] == of["obs"][step]).all()


def test_a_window_holds_one_trajectory_only(dataset: trajstore.Dataset) -> None:
    samples = CutSamples(dataset, Window(3), fields=["action"])
    actions = samples.get(np.arange(len(samples)))["action"]
    assert len(actions) == sum(max(n - 2, 0) for n in LENGTHS)
    assert (np.diff(actions, axis=1) == 1).all()


def test_fields_with_offsets_of_their_own(dataset: trajstore.Dataset) -> None:
    window = Window(offsets={"obs": (-1, 0), "action": range(3)}, before=1, after=2)
    samples = CutSamples(dataset, window, fields=["obs", "action", "reward"])
    assert len(samples) == sum(LENGTHS)
    batch = samples.get(np.arange(7))
    assert {path: values.shape[:2] for path, values in batch.items() if "mask" not in path} == {
        **{"obs": (7, 2), "action": (7, 3), "reward": (7, 1)},
    }
    assert batch["mask/obs"][0].tolist() == [False, True]
    assert batch["mask/action"][5].tolist() == [True, True, False]
    assert batch["action"][6].tolist() == [6, 6, 6]
    with pytest.raises(NotFoundError, match="no field 'reward' among"):
        CutSamples(dataset, Window(offsets={"reward": (0,)}), fields=["obs"])


@pytest.mark.parametrize("n", [1, 3])
def test_transitions(dataset: trajstore.Dataset, n: int) -> None:
    samples = CutSamples(dataset, Transitions(("obs",), n, 0.9))
    batch = samples.get(np.arange(len(samples)))
    row = 0
    for of, length in zip(EPISODES, LENGTHS):
        for t in range(length):
            k = min(n, length - t)
            expected = sum(0.9**i * float(of["reward"][t + i]) for i in range(k))
            assert batch["reward"][row] == pytest.approx(expected, rel=1e-5)
            assert (batch["obs"][row] == of["obs"][t]).all() and (batch["next/obs"][row] == of["obs"][t + k]).all()
            ended = of["terminated"][t : t + k].any()
            assert batch["discount"][row] == pytest.approx(0 if ended else 0.9**k)
            row += 1
    assert row == len(samples)


def test_after_a_truncation_no_observation_is_made_up(dataset: trajstore.Dataset) -> None:
    samples = CutSamples(dataset, Transitions("curr/image", 3, 1.0))
    of_each = np.bincount(samples.trajectory_of(np.arange(len(samples))), minlength=6)
    assert of_each.tolist() == [6, 1, 11, 3, 29, 2]  # the even ones were truncated
    batch = samples.get([4, 5])  # of the first one's seven steps, the fifth and the sixth
    assert (batch["next/curr/image"] == EPISODES[0]["curr"]["image"][[6, 6]]).all()
    assert batch["reward"][1] == EPISODES[0]["reward"][5] and batch["discount"].tolist() == [1, 1]


def test_whole_trajectories(dataset: trajstore.Dataset) -> None:
    samples = TrajectorySamples(dataset, fields=["obs", "action"])
    batch = samples.get([3, 0, 1])
    assert batch["obs"].shape == (3, 8, 3) and batch["action"].shape == (3, 7)
    assert batch["count/obs"].tolist() == [4, 8, 2] and batch["count/action"].tolist() == [3, 7, 1]
    for i, number in enumerate((3, 0, 1)):
        assert (batch["obs"][i, : LENGTHS[number] + 1] == EPISODES[number]["obs"]).all()
        assert not batch["obs"][i, LENGTHS[number] + 1 :].any()
    rows, counts = samples.end_to_end(np.array([3, 0]))["action"]
    assert counts.tolist() == [3, 7] and (rows == np.r_[EPISODES[3]["action"], EPISODES[0]["action"]]).all()


def test_weights(dataset: trajstore.Dataset) -> None:
    samples = CutSamples(dataset)
    assert (samples.weights("level") == np.repeat(range(6), LENGTHS)).all()
    assert (samples.weights("success & (length > 1)") == np.repeat([0, 0, 0, 1, 0, 1], LENGTHS)).all()
    assert (samples.weights(np.arange(6)) == np.repeat(range(6), LENGTHS)).all()
    assert samples.weights(np.ones(55)).shape == (55,)
    with pytest.raises(SchemaError, match="fit neither 55 samples nor 6"):
        samples.weights(np.ones(4))


def test_a_trajectory_without_a_field_gives_no_samples_of_it(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s") as writer:
        for number in range(3):
            extra = np.full(5, number) if number != 1 else None
            writer.append({"action": np.arange(5), "extra": extra})
    dataset = trajstore.open(tmp_path / "s")
    assert len(CutSamples(dataset, fields=["action"])) == 15
    samples = CutSamples(dataset, fields=["action", "extra"])
    assert samples.get(np.arange(len(samples)))["extra"].tolist() == [0] * 5 + [2] * 5
    assert TrajectorySamples(dataset).get([0, 1])["count/extra"].tolist() == [5, 0]


def test_what_cannot_be_sampled_is_said(dataset: trajstore.Dataset, tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="'note' holds string"):
        CutSamples(dataset, fields=["note"])
    with pytest.raises(NotFoundError, match="no field 'obz'"):
        CutSamples(dataset, fields=["obz"])
    with trajstore.create(tmp_path / "s") as writer:
        writer.append({"action": np.arange(5), "mask": np.arange(5), "odd": np.arange(3)})
        writer.append({"action": np.arange(5), "mask": np.arange(5), "odd": np.arange(4)})
    ragged = trajstore.open(tmp_path / "s")
    with pytest.raises(SchemaError, match="called 'mask' has no place"):
        CutSamples(ragged)
    assert list(CutSamples(ragged, fields=["action"]).fields) == ["action"]
    with pytest.raises(NotFoundError, match="does not say which of its rows"):
        CutSamples(ragged, fields=["odd"]).get([0])


def test_samples_pickle_and_know_what_they_are(dataset: trajstore.Dataset) -> None:
    samples = CutSamples(dataset, Window(3, before=1), fields=["action"])
    copy = pickle.loads(pickle.dumps(samples))
    assert copy.identity == samples.identity
    assert (copy.get([3, 1])["action"] == samples.get([3, 1])["action"]).all()
    assert CutSamples(dataset[:4], Window(3, before=1)).identity != samples.identity
    assert CutSamples(dataset, Window(3)).identity != samples.identity


def test_nested() -> None:
    assert nested({"a/b": 1, "c": 2, "a/d/e": 3}) == {"a": {"b": 1, "d": {"e": 3}}, "c": 2}


def test_blocks_decode_each_chunk_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with trajstore.create(tmp_path / "s") as writer:
        for number in range(40):
            writer.append({"frame": np.full((50, 64, 64, 3), number, np.uint8)})
    decoded: list[int] = []
    real = gather.decode_frames
    monkeypatch.setattr(gather, "decode_frames", lambda frames, out: decoded.append(len(frames)) or real(frames, out))

    def epoch(kind: str) -> int:
        samples = CutSamples(trajstore.open(tmp_path / "s", cache_bytes=4 << 20))
        assert samples.block == 64  # of chunks of 8 rows
        order = Order(len(samples), 1, kind=kind, block=16, pool=16)
        decoded.clear()
        for numbers, _ in Batches(order, 8).ahead(0, 0):
            samples.get(numbers)
        return sum(decoded)

    in_order = epoch("sequential")
    assert in_order >= 250 and epoch("blocks") <= 1.1 * in_order and epoch("shuffle") > 3 * in_order
