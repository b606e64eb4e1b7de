"""TensorDicts of TorchRL collectors, and finished trajectories padded to one length."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore.collect import TensorDictRecorder, append_padded
from trajstore.errors import SchemaError

torch = pytest.importorskip("torch")


class Fake:
    """As much of a TensorDict as the adapter uses."""

    def __init__(self, batch_size: tuple[int, ...], **values: Any) -> None:
        self.batch_size = batch_size
        self.values = values

    def keys(self) -> Any:
        return self.values.keys()

    def get(self, key: Any, default: Any = None) -> Any:
        if isinstance(key, tuple):
            inner = self.values.get(key[0])
            return default if inner is None else inner.get(key[1], default)
        return self.values.get(key, default)


def batches(num_envs: int, steps: int, count: int, ended: list[Any], episodes: list[Any]) -> Any:
    """Batches of one stream, each environment counting its own steps; ids that change now and then without a flag."""
    rng = np.random.default_rng(4)
    counter, ids, fresh = np.zeros(num_envs, int), np.arange(num_envs), num_envs
    for _ in range(count):
        rows: dict[str, list[Any]] = {name: [] for name in ("obs", "after", "ids", "done", "terminated")}
        for _ in range(steps):
            rows["obs"].append(counter.copy())
            rows["after"].append(counter + 1)
            rows["ids"].append(ids.copy())
            terminated, truncated = rng.random(num_envs) < 0.1, rng.random(num_envs) < 0.05
            rows["done"].append(terminated | truncated)
            rows["terminated"].append(terminated)
            cut = terminated | truncated | (rng.random(num_envs) < 0.05)
            for n in range(num_envs):
                episodes[n].append(counter[n])
                if cut[n]:
                    ended.append((n, [*episodes[n], counter[n] + 1], bool(terminated[n])))
                    episodes[n] = []
                    ids[n] = fresh = fresh + 1
            counter = np.where(cut, counter + 100, counter + 1)
        yield {name: torch.as_tensor(np.stack(values, 1)) for name, values in rows.items()}


def test_a_stream_of_batches_is_split_by_flags_and_ids(tmp_path: Path) -> None:
    num_envs, steps = 4, 7
    same: Any = None
    ended: list[Any] = []
    rest: list[Any] = [[] for _ in range(num_envs)]
    with trajstore.create(tmp_path / "s") as writer, TensorDictRecorder(writer) as recorder:
        for rows in batches(num_envs, steps, 12, ended, rest):
            new = Fake(
                (2, 2, steps),
                obs=Fake((2, 2, steps), x=rows["obs"].reshape(2, 2, steps)),
                action=rows["obs"].reshape(2, 2, steps, 1).float(),
                done=torch.zeros(2, 2, steps, 1, dtype=torch.bool),
                collector=Fake((2, 2, steps), traj_ids=rows["ids"].reshape(2, 2, steps)),
                next=Fake(
                    (2, 2, steps),
                    obs=Fake((2, 2, steps), x=rows["after"].reshape(2, 2, steps)),
                    reward=rows["obs"].reshape(2, 2, steps, 1).double(),
                    done=rows["done"].reshape(2, 2, steps, 1),
                    terminated=rows["terminated"].reshape(2, 2, steps, 1),
                ),
            )
            if same is None:
                same = new
            else:  # the collector hands out the same object, and has written over its tensors
                same.values["obs"].values["x"].copy_(new.values["obs"].values["x"])
                same.values["action"].copy_(new.values["action"])
                same.values["collector"].values["traj_ids"].copy_(new.get(("collector", "traj_ids")))
                for name in ("reward", "done", "terminated"):
                    same.values["next"].values[name].copy_(new.get(("next", name)))
                same.values["next"].values["obs"].values["x"].copy_(new.get("next").get("obs").get("x"))
            recorder.extend(same)
    ended += [(n, [*rows, rows[-1] + 1], False) for n, rows in enumerate(rest) if rows]
    ds = trajstore.open(tmp_path / "s")
    assert len(ds) == len(ended)
    for n in range(num_envs):
        mine = [episode for episode in ended if episode[0] == n]
        stored = np.flatnonzero(ds.table["env"] == n).tolist()
        assert len(mine) == len(stored)
        for i, (_, obs, terminated) in zip(stored, mine):
            assert ds[i]["obs/x"][:].tolist() == obs
            assert ds[i]["action"][:, 0].tolist() == obs[:-1]
            assert ds[i]["reward"][:].tolist() == obs[:-1]
            assert bool(ds.table["terminated"][i]) == terminated


def test_batches_that_are_none(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s") as writer, TensorDictRecorder(writer, observations="T") as recorder:
        with pytest.raises(SchemaError, match="without batch axes"):
            recorder.extend(Fake(()))
        with pytest.raises(SchemaError, match="the batch has no"):
            recorder.extend(Fake((3,), x=torch.zeros(3), next=Fake((3,))))
        recorder.extend(
            Fake((3,), x=torch.arange(3), next=Fake((3,), x=torch.ones(3), done=torch.tensor([0, 1, 0]) > 0))
        )
        done = torch.zeros(2, 3, dtype=torch.bool)
        with pytest.raises(SchemaError, match="2 environments, expected 1"):
            recorder.extend(Fake((2, 3), x=torch.zeros(2, 3), next=Fake((2, 3), done=done)))
    ds = trajstore.open(tmp_path / "s")
    assert [ds[i]["x"][:].tolist() for i in range(len(ds))] == [[0, 1], [2]]


@pytest.mark.slow
@pytest.mark.parametrize("same", [False, True])
def test_a_torchrl_collector(tmp_path: Path, same: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchrl")
        pytest.importorskip("gymnasium")
        from torchrl.collectors import Collector
        from torchrl.envs import GymEnv, SerialEnv

        env = SerialEnv(3, lambda: GymEnv("CartPole-v1"))
        collector = Collector(env, None, frames_per_batch=60, total_frames=600, return_same_td=same)
        with trajstore.create(tmp_path / "s") as writer, TensorDictRecorder(writer) as recorder:
            for batch in collector:
                recorder.extend(batch)
        collector.shutdown()
    ds = trajstore.open(tmp_path / "s")
    assert int(ds.lengths.sum()) == 600
    for trajectory in ds:
        obs = trajectory["observation"][:]
        assert len(obs) == len(trajectory["reward"]) + 1
        # CartPole's position moves by its velocity, so each trajectory is one.
        np.testing.assert_allclose(obs[1:, 0], obs[:-1, 0] + 0.02 * obs[:-1, 1], atol=1e-5)
        assert (np.abs(obs[0]) <= 0.05).all()


def test_padded_trajectories_lose_their_padding(tmp_path: Path) -> None:
    steps, count = 6, 5
    t = np.arange(steps + 1)[:, None] * 10 + np.arange(count)
    done = np.zeros((steps, count), bool)
    done[[2, 5, 0], [0, 1, 3]] = True
    done[4, 0] = True  # what follows the end is padding
    with trajstore.create(tmp_path / "s") as writer:
        fields = {"obs": {"x": torch.as_tensor(t)}, "action": t[:-1]}
        assert append_padded(writer, fields, done=done, env=np.arange(count)).tolist() == [0, 1, 2, 3, 4]
        append_padded(writer, fields, lengths=[1, 2, 3, 4, 5], env=0)
        with pytest.raises(SchemaError, match="neither"):
            append_padded(writer, fields)
        with pytest.raises(SchemaError, match="does not fit"):
            append_padded(writer, fields, lengths=[1, 2, 3, 4, 9], env=0)
        with pytest.raises(SchemaError, match="expected"):
            append_padded(writer, {"obs": {"x": t}, "action": t[:3]}, done=done, env=0)
    ds = trajstore.open(tmp_path / "s")
    assert ds.lengths.tolist() == [3, 6, 6, 1, 6, 1, 2, 3, 4, 5]
    for i, length in enumerate(ds.lengths.tolist()):
        assert ds[i]["action"][:].tolist() == t[:length, i % 5].tolist()
        assert ds[i]["obs/x"][:].tolist() == t[: length + 1, i % 5].tolist()
