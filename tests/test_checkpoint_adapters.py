"""Checkpoints in other people's loops, each with the real library where it is installed."""

from __future__ import annotations

import json
import pickle
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from trajstore.checkpoint import Checkpoints
from trajstore.checkpoint.loop import Every
from trajstore.checkpoint.single import is_checkpoint, load_state, save_state, verify_state
from trajstore.errors import CorruptionError, NotFoundError, SchemaError, StateError


def steps(ckpts):
    return [checkpoint.step for checkpoint in ckpts.list()]


# --- one's own loop -----------------------------------------------------------------------------


def test_every_so_many_steps(tmp_path):
    made = []
    with Checkpoints(tmp_path, keep_last=None) as ckpts:
        save = Every(ckpts, steps=100)
        for step in range(0, 1000, 64):  # 64 environments a step: multiples are passed, not met
            save(step, lambda step=step: made.append(step) or {"step": step}, {"r": step})
        save.final(1000, {"step": 1000})
        assert steps(ckpts) == [128, 256, 320, 448, 512, 640, 704, 832, 960, 1000]
        assert made == steps(ckpts)[:-1], "the state was made when no save was due"
        assert ckpts.latest().final
    with Checkpoints(tmp_path, keep_last=None) as ckpts:
        save = Every(ckpts, steps=100)
        ckpts.restore(step=320)
        assert not save.due(384) or save(384, {}), "a run that goes back counts from there"
        assert not save(330, {})
        assert save(402, {})


def test_every_so_many_seconds(tmp_path, monkeypatch):
    from trajstore.checkpoint import loop

    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    with Checkpoints(tmp_path) as ckpts:
        save = Every(ckpts, seconds=60)
        assert not save(1, {})
        now[0] = 61.0
        assert save(2, {}) and not save(3, {})
        for bad in ({}, {"steps": 0}, {"seconds": -1}):
            with pytest.raises(SchemaError):
                Every(ckpts, **bad)


def test_one_state_at_a_path_of_ones_own(tmp_path):
    save_state(tmp_path / "a" / "state", {"x": {"y": np.arange(5)}}, step=3)
    save_state(tmp_path / "a" / "state", {"x": {"y": np.arange(6)}})
    assert np.array_equal(load_state(tmp_path / "a" / "state")["x"]["y"], np.arange(6))
    assert np.array_equal(load_state(tmp_path / "a" / "state", "x/y"), np.arange(6))
    assert verify_state(tmp_path / "a" / "state") == 5 and is_checkpoint(tmp_path / "a" / "state")
    assert not is_checkpoint(tmp_path / "a")
    with pytest.raises(NotFoundError):
        load_state(tmp_path / "b")
    chunk = tmp_path / "a/state/x.int64/c.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(CorruptionError):
        load_state(tmp_path / "a" / "state")


# --- Stable-Baselines3 --------------------------------------------------------------------------


def sb3_model(kind, seed=0):
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    if kind == "PPO":
        env = VecNormalize(make_vec_env("CartPole-v1", 4, seed=seed))
        return sb3.PPO("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=1, device="cpu", seed=seed)
    env = make_vec_env("Pendulum-v1", 2, seed=seed)
    return sb3.SAC("MlpPolicy", env, learning_starts=50, buffer_size=1000, device="cpu", seed=seed)


def same_parameters(left, right):
    import torch

    for name, state in left.get_parameters().items():
        other = right.get_parameters()[name]
        flat = [state, other]
        while flat:
            b, a = flat.pop(), flat.pop()
            if isinstance(a, dict):
                assert a.keys() == b.keys()
                for key in a:
                    flat += [a[key], b[key]]
            elif isinstance(a, list):
                flat += [item for pair in zip(a, b, strict=True) for item in pair]
            elif isinstance(a, torch.Tensor):
                assert torch.equal(a, b)
            else:
                assert a == b


def test_stable_baselines3_counts_environment_steps(tmp_path):
    pytest.importorskip("stable_baselines3")
    from trajstore.checkpoint.sb3 import CheckpointCallback, restore_model

    model = sb3_model("PPO")
    with Checkpoints(tmp_path, keep_last=None) as ckpts:
        model.learn(512, callback=CheckpointCallback(ckpts, save_freq=100))
        ckpts.wait()
        assert steps(ckpts) == [100, 200, 300, 400, 500, 512]
        assert ckpts.latest().final and "ep_rew_mean" in ckpts.latest().metrics
        other = sb3_model("PPO", seed=1)
        restored = restore_model(ckpts, other)
        same_parameters(model, other)
        assert other.num_timesteps == restored.step == 512 and other._n_updates == model._n_updates
        assert np.array_equal(other.get_env().obs_rms.mean, model.get_env().obs_rms.mean)
        other.learn(128, callback=CheckpointCallback(ckpts, save_freq=100), reset_num_timesteps=False)
        ckpts.wait()
        assert steps(ckpts)[-2:] == [600, 640]
        with pytest.raises(SchemaError, match="no replay buffer"):
            model.learn(10, callback=CheckpointCallback(ckpts, save_freq=100, save_replay_buffer=True))


def test_stable_baselines3_off_policy(tmp_path):
    pytest.importorskip("stable_baselines3")
    from trajstore.checkpoint.sb3 import CheckpointCallback, restore_model

    model = sb3_model("SAC")
    with Checkpoints(tmp_path) as ckpts:
        extra = lambda model: {"cursor": 12}  # noqa: E731
        model.learn(120, callback=CheckpointCallback(ckpts, save_freq=50, save_replay_buffer=True, extra=extra))
        other = sb3_model("SAC", seed=1)
        restored = restore_model(ckpts, other)
        same_parameters(model, other)
        assert np.array_equal(other.log_ent_coef.detach().numpy(), model.log_ent_coef.detach().numpy())
        assert other.replay_buffer.pos == model.replay_buffer.pos
        assert np.array_equal(other.replay_buffer.observations, model.replay_buffer.observations)
        assert restored.state["extra"] == {"cursor": 12}
        other.learn(20, reset_num_timesteps=False)


# --- Lightning ----------------------------------------------------------------------------------


def lightning_run(folder, epochs, ckpt=None, callback=None, plugins=()):
    import lightning.pytorch as pl
    import torch

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"lr": 0.01})
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 1))

        def training_step(self, batch, _):
            loss = self.net(batch).pow(2).mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), self.hparams.lr)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    torch.manual_seed(0)
    module = Module()
    data = torch.utils.data.DataLoader(torch.randn(24, 4), batch_size=4)
    trainer = pl.Trainer(
        max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        callbacks=[callback] if callback else None, plugins=list(plugins), default_root_dir=folder,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=False if ckpt else None)
    return module, trainer


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_where_it_was(tmp_path):
    pytest.importorskip("lightning.pytorch")
    import torch

    from trajstore.checkpoint.lightning import CheckpointCallback, CheckpointIO

    with Checkpoints(tmp_path / "c", keep_last=None) as ckpts:
        callback = CheckpointCallback(ckpts, every_n_steps=5)
        assert callback.path() is None
        module, trainer = lightning_run(tmp_path, 2, callback=callback, plugins=[CheckpointIO()])
        ckpts.wait()
        assert steps(ckpts) == [5, 10, 12] and "loss" in ckpts.latest().metrics
        resumed, other = lightning_run(tmp_path, 2, ckpt=callback.path(), callback=callback, plugins=[CheckpointIO()])
        assert other.global_step == trainer.global_step == 12
        for key, value in module.state_dict().items():
            assert torch.equal(resumed.state_dict()[key], value)
        _, longer = lightning_run(tmp_path, 4, ckpt=callback.path(12), callback=callback, plugins=[CheckpointIO()])
        assert longer.global_step == 24 and longer.optimizers[0].state_dict()["state"][0]["step"] == 24
        assert ckpts.restore().state["hyper_parameters"] == {"lr": 0.01}
        with pytest.raises(SchemaError):
            CheckpointCallback(ckpts)

        trainer.save_checkpoint(tmp_path / "mine.ckpt")  # Lightning's own saving through the plugin
        assert is_checkpoint(tmp_path / "mine.ckpt")
        _, third = lightning_run(tmp_path, 2, ckpt=tmp_path / "mine.ckpt", plugins=[CheckpointIO()])
        assert third.global_step == 12
        trainer.strategy.remove_checkpoint(tmp_path / "mine.ckpt")
        assert not (tmp_path / "mine.ckpt").exists()


# --- RLlib --------------------------------------------------------------------------------------


class Algorithm:
    def __init__(self, weight=0):
        self.weight = weight

    def save_to_path(self, path):
        (Path(path) / "learner").mkdir(parents=True)
        (Path(path) / "learner" / "state.pkl").write_bytes(pickle.dumps(self.weight))

    def restore_from_path(self, path):
        self.weight = pickle.loads((Path(path) / "learner" / "state.pkl").read_bytes())


def test_rllib_files_travel_unopened(tmp_path):
    from trajstore.checkpoint.rllib import SaveOnTrainResult, restore_algorithm

    save = pickle.loads(pickle.dumps(SaveOnTrainResult(tmp_path / "c", every=2, keep_last=None)))
    for iteration in range(1, 7):
        runners = {"episode_return_mean": float(iteration), "episode_len_mean": 9.0}
        save(
            algorithm=Algorithm(iteration),
            result={"training_iteration": iteration, "env_runners": runners},
            metrics_logger=None,
        )
    save.close()
    with Checkpoints(tmp_path / "c", keep_last=None) as ckpts:
        assert steps(ckpts) == [2, 4, 6] and ckpts.latest().metrics == {"reward_mean": 6.0, "episode_len_mean": 9.0}
        algorithm = Algorithm()
        assert restore_algorithm(ckpts, algorithm, 4).step == 4 and algorithm.weight == 4
        algorithm.restore_from_path = lambda path: 1 / 0
        with pytest.raises(StateError, match=r"could not be restored[\s\S]*versions"):
            restore_algorithm(ckpts, algorithm)


@pytest.mark.filterwarnings("ignore")
def test_a_real_rllib_algorithm(tmp_path):
    ppo = pytest.importorskip("ray.rllib.algorithms.ppo")
    import ray

    from trajstore.checkpoint.rllib import SaveOnTrainResult, restore_algorithm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
        try:

            def build(callback=None):
                config = (
                    ppo.PPOConfig().environment("CartPole-v1").env_runners(num_env_runners=0)
                    .training(train_batch_size=200, minibatch_size=100, num_epochs=1)
                )  # fmt: skip
                return (config.callbacks(on_train_result=callback) if callback else config).build_algo()

            algorithm = build(SaveOnTrainResult(tmp_path / "c", every=1, on_signal="ignore"))
            algorithm.train()
            weights = {key: value.clone() for key, value in algorithm.get_module().state_dict().items()}
            other = build()
            with Checkpoints(tmp_path / "c", read_only=True) as ckpts:
                while not ckpts.list():  # saved in the background of Ray's process; the test's own limit ends it
                    time.sleep(0.1)
                restored = restore_algorithm(ckpts, other)
            assert restored.step == 1 and "ray" in restored.meta["versions"]
            assert all((weights[key] == value).all() for key, value in other.get_module().state_dict().items())
            algorithm.stop()
            other.stop()
        finally:
            ray.shutdown()


# --- TorchRL ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_torchrl_components(tmp_path):
    rl = pytest.importorskip("torchrl.checkpoint")
    import torch

    from trajstore.checkpoint.torchrl import StateAdapter

    def build():
        policy = torch.nn.Linear(3, 3)
        optimizer = torch.optim.Adam(policy.parameters())
        checkpoint = rl.Checkpoint()
        checkpoint.register("policy", policy, adapter=StateAdapter())
        checkpoint.register("optimizer", optimizer, adapter=StateAdapter())
        return policy, optimizer, checkpoint

    policy, optimizer, checkpoint = build()
    policy(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path / "ckpt")
    assert "trajstore" in json.dumps(rl.Checkpoint.manifest(tmp_path / "ckpt"))
    other, other_optimizer, loading = build()
    loading.load(tmp_path / "ckpt")
    assert torch.equal(other.weight, policy.weight)
    assert other_optimizer.state_dict()["state"][0]["step"] == 1
