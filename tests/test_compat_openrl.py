"""OpenRL's checkpoint callback: its names, its files, and none of its losses."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from trajstore.compat.openrl import CheckpointCallback, load_checkpoint  # noqa: E402
from trajstore.errors import CorruptionError, LockedError, NotFoundError, SchemaError  # noqa: E402


class Agent:
    """An OpenRL agent as the callback sees it: ``save`` makes a folder with a whole pickled module."""

    def __init__(self, env_num=500, keeps_count=True):
        self.module = torch.nn.Linear(2, 2)
        self.num_time_steps = 0
        self.env_num = env_num
        self.keeps_count = keeps_count
        self.logger = None

    def get_env(self):
        return None

    def save(self, path):
        Path(path).mkdir(parents=True, exist_ok=True)
        torch.save(self.module, Path(path) / "module.pt")

    def load(self, path):
        self.module = torch.load(Path(path) / "module.pt", weights_only=False)

    def train(self, calls, callback):
        callback.init_callback(self)
        if not self.keeps_count:
            self.num_time_steps = 0
        callback.on_training_start({}, {})
        for _ in range(calls):
            self.num_time_steps += self.env_num
            torch.nn.init.constant_(self.module.weight, self.num_time_steps)
            if not callback.on_step():
                break
        callback.on_training_end()


def names(path):
    return sorted((p.name for p in Path(path).iterdir() if p.name != "__trajstore"), key=lambda n: (len(n), n))


def free(callback):
    callback._lock.release()


def test_names_and_what_save_freq_counts(tmp_path):
    agent = Agent(env_num=500)
    agent.train(40, CheckpointCallback(10, tmp_path, name_prefix="mapush"))
    assert names(tmp_path) == [f"mapush_{steps}_steps" for steps in (5000, 10000, 15000, 20000)]
    assert torch.load(tmp_path / "mapush_10000_steps" / "module.pt", weights_only=False).weight[0, 0] == 10000


@pytest.mark.parametrize("keeps_count", [True, False])
def test_counters_go_on_after_a_resume(tmp_path, keeps_count):
    first = CheckpointCallback(3, tmp_path)
    Agent(10).train(7, first)
    free(first)
    agent = Agent(10, keeps_count)
    assert load_checkpoint(agent, tmp_path) == 60 and agent.module.weight[0, 0] == 60
    callback = CheckpointCallback(3, tmp_path)
    agent.train(6, callback)
    assert callback.n_calls == 12
    assert names(tmp_path) == [f"rl_model_{steps}_steps" for steps in (30, 60, 90, 120)]


def test_an_old_folder_is_resumed_too(tmp_path):
    old = Agent(500)
    for steps in (500_000, 9_000_000, 10_000_000):  # in the alphabet 9,000,000 comes last
        torch.nn.init.constant_(old.module.weight, steps)
        old.save(tmp_path / f"rl_model_{steps}_steps")
    agent = Agent(500)
    assert load_checkpoint(agent, tmp_path) == 10_000_000 and agent.module.weight[0, 0] == 10_000_000
    callback = CheckpointCallback(20_000, tmp_path)
    callback.init_callback(agent)
    callback.on_training_start({}, {})
    assert callback.n_calls == 20_000
    assert load_checkpoint(agent, tmp_path / "rl_model_500000_steps") == 500_000


def test_a_missing_path_raises(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(NotFoundError, match="no checkpoint"):
            load_checkpoint(Agent(), path)


def test_the_replay_buffer_is_saved_where_there_is_one(tmp_path):
    agent = Agent(1)
    agent.replay_buffer = {"obs": [1, 2, 3]}
    agent.train(2, CheckpointCallback(2, tmp_path, save_replay_buffer=True))
    assert pickle.loads((tmp_path / "rl_model_replay_buffer_2_steps.pkl").read_bytes()) == {"obs": [1, 2, 3]}
    with pytest.raises(SchemaError, match="no replay buffer"):
        Agent().train(1, CheckpointCallback(1, tmp_path / "b", save_replay_buffer=True))


def test_rules_clean_up_also_the_buffers(tmp_path):
    agent = Agent(10)
    agent.replay_buffer = [0]
    agent.train(12, CheckpointCallback(1, tmp_path, keep_last=2, keep_every=50, save_replay_buffer=True))
    kept = (50, 100, 110, 120)
    assert set(names(tmp_path)) == {f"rl_model_{s}_steps" for s in kept} | {
        f"rl_model_replay_buffer_{s}_steps.pkl" for s in kept
    }


def test_a_save_that_fails_leaves_no_half_checkpoint(tmp_path):
    agent = Agent(1)
    callback = CheckpointCallback(1, tmp_path)
    agent.train(1, callback)
    agent.save = lambda path: (Path(path).mkdir(parents=True), (Path(path) / "module.pt").write_bytes(b"half"), 1 / 0)
    free(callback)
    with pytest.raises(ZeroDivisionError):
        agent.train(1, CheckpointCallback(1, tmp_path))
    assert names(tmp_path) == ["rl_model_1_steps"] and not list((tmp_path / "__trajstore").glob("tmp.*"))


def test_rot_is_found(tmp_path):
    import os

    agent = Agent(1)
    agent.train(1, CheckpointCallback(1, tmp_path))
    file = tmp_path / "rl_model_1_steps" / "module.pt"
    status, data = file.stat(), bytearray(file.read_bytes())
    data[500] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CorruptionError):
        load_checkpoint(agent, tmp_path)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    Agent(1).train(1, first := CheckpointCallback(1, tmp_path))
    with pytest.raises(LockedError):
        Agent(1).train(1, CheckpointCallback(1, tmp_path))
    assert first.save() == str(tmp_path / "rl_model_1_steps")
    with pytest.raises(SchemaError):
        CheckpointCallback(0, tmp_path)
