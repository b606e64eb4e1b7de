"""The RLlib script's checkpoint manager: its names, its files, and none of its losses."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import warnings
from datetime import datetime
from pathlib import Path

import pytest

from trajstore.compat.rllib import CheckpointManager, load_metrics_history, plot_training_metrics
from trajstore.errors import CorruptionError, LockedError, NotFoundError, StateError


class Algorithm:
    """What the manager needs of an RLlib algorithm: ``save`` into a folder, ``restore`` from it."""

    def __init__(self, weight=0):
        self.weight = weight

    def save(self, path):
        path = Path(path)
        (path / "policies" / "seeker_policy").mkdir(parents=True)
        (path / "algorithm_state.pkl").write_bytes(pickle.dumps({"weight": self.weight}))
        (path / "policies" / "seeker_policy" / "policy_state.pkl").write_bytes(b"s" * 100)
        (path / "rllib_checkpoint.json").write_text("{}")
        return str(path)

    def restore(self, path):
        self.weight = pickle.loads((Path(path) / "algorithm_state.pkl").read_bytes())["weight"]


def save_the_old_way(folder, iteration, metrics, history, keep_last_n=10):
    """What the users' script leaves: Ray's files, metadata, an index written in place, a clean-up."""
    folder = Path(folder)
    path = folder / f"checkpoint_{iteration:06d}"
    if path.exists():
        shutil.rmtree(path)
    Algorithm(iteration).save(path)
    stamp = datetime.now().isoformat()
    metadata = {"iteration": iteration, "timestamp": stamp, "checkpoint_path": str(path), **metrics}
    (path / "metadata.json").write_text(json.dumps(metadata, indent=2))
    history.append({"iteration": iteration, "path": path.name, "timestamp": stamp})
    for entry in history[:-keep_last_n] if keep_last_n else []:
        shutil.rmtree(folder / entry["path"], ignore_errors=True)
    if keep_last_n:
        del history[:-keep_last_n]
    (folder / "checkpoint_index.json").write_text(json.dumps({"checkpoints": history, "last_updated": stamp}))


def metrics(iteration):
    return {
        "reward_mean": 100.0 + iteration, "seeker_reward": -5.0, "hider_reward": 48.9, "episode_len_mean": 135.0,
        "episodes_completed": 30 * iteration, "seeker_kl": 0.01, "hider_kl": 0.02,
    }  # fmt: skip


def manager(path, **kwargs):
    return CheckpointManager(path, **{"verbose": False, "plot": False, **kwargs})


def test_the_names_and_files_are_those_of_the_script(tmp_path):
    checkpoints = manager(tmp_path / "c", plot=pytest.importorskip("matplotlib") is not None)
    for iteration in (10, 20):
        path = checkpoints.save_checkpoint(Algorithm(iteration), iteration, metrics(iteration))
        assert path == str(tmp_path / "c" / f"checkpoint_{iteration:06d}")
    names = {p.name for p in (tmp_path / "c").iterdir()} - {"__trajstore"}
    assert names == {
        "checkpoint_000010", "checkpoint_000020", "checkpoint_index.json", "metrics_iter_10.json",
        "metrics_iter_20.json",
        "training_metrics_iter_10.png", "training_metrics_iter_20.png",
    }  # fmt: skip
    folder = tmp_path / "c/checkpoint_000020"
    inside = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert inside == {"algorithm_state.pkl", "policies", "policies/seeker_policy",
                      "policies/seeker_policy/policy_state.pkl", "rllib_checkpoint.json", "metadata.json"}  # fmt: skip
    metadata = json.loads((tmp_path / "c/checkpoint_000020/metadata.json").read_text())
    assert metadata["checkpoint_path"] == path and metadata["reward_mean"] == 120.0 and metadata["versions"]["python"]
    index = json.loads((tmp_path / "c/checkpoint_index.json").read_text())
    assert [(e["iteration"], e["path"]) for e in index["checkpoints"]] == [
        (10, "checkpoint_000010"),
        (20, "checkpoint_000020"),
    ]
    assert [e["iteration"] for e in json.loads((tmp_path / "c/metrics_iter_20.json").read_text())] == [10, 20]
    assert (tmp_path / "c/training_metrics_iter_20.png").read_bytes().startswith(b"\x89PNG")


def test_it_goes_on_where_the_script_was(tmp_path):
    history: list = []
    for iteration in (10, 20, 30):
        save_the_old_way(tmp_path, iteration, metrics(iteration), history)
    checkpoints = manager(tmp_path)
    assert checkpoints.get_latest_checkpoint() == str(tmp_path / "checkpoint_000030")
    assert checkpoints.get_checkpoint_by_iteration(20) == str(tmp_path / "checkpoint_000020")
    assert checkpoints.get_checkpoint_by_iteration(25) is None
    assert [m["reward_mean"] for m in checkpoints.list_checkpoints()] == [110.0, 120.0, 130.0]
    algorithm = Algorithm()
    assert checkpoints.restore(algorithm) == 30 and algorithm.weight == 30
    checkpoints.save_checkpoint(Algorithm(40), 40, metrics(40))
    assert len(manager(tmp_path).checkpoint_history) == 4


def test_the_clean_up_after_a_resume_deletes_what_is_old_not_what_is_new(tmp_path):
    first = manager(tmp_path, keep_last_n=4)
    for iteration in range(10, 110, 10):
        first.save_checkpoint(Algorithm(iteration), iteration, metrics(iteration))
    first._lock.release()
    second = manager(tmp_path, keep_last_n=4)  # goes on from 70: 80 and 90 are saved again
    for iteration in (80, 90):
        second.save_checkpoint(Algorithm(-iteration), iteration, metrics(iteration))
    assert [e["iteration"] for e in second.checkpoint_history] == [70, 100, 80, 90]
    folders = sorted(p.name for p in tmp_path.glob("checkpoint_0*"))
    assert folders == sorted(
        e["path"] for e in json.loads((tmp_path / "checkpoint_index.json").read_text())["checkpoints"]
    )
    algorithm = Algorithm()
    assert second.restore(algorithm) == 90 and algorithm.weight == -90
    second.save_checkpoint(Algorithm(1), 100, metrics(100))
    assert [e["iteration"] for e in second.checkpoint_history] == [70, 80, 90, 100]


def test_an_index_that_names_what_is_gone_or_is_torn_is_mended(tmp_path):
    history: list = []
    for iteration in (10, 20, 30):
        save_the_old_way(tmp_path, iteration, metrics(iteration), history)
    shutil.rmtree(tmp_path / "checkpoint_000020")
    assert [e["iteration"] for e in manager(tmp_path).checkpoint_history] == [10, 30]
    (tmp_path / "checkpoint_index.json").write_text('{"checkpoints": [{"itera')
    assert [e["iteration"] for e in manager(tmp_path).checkpoint_history] == [10, 30]
    (tmp_path / "checkpoint_index.json").write_text('{"checkpoints": [{"path": "../../etc", "iteration": 1}]}')
    assert [e["iteration"] for e in manager(tmp_path).checkpoint_history] == [10, 30]


def test_the_best_can_be_kept_and_nan_is_never_best(tmp_path):
    checkpoints = manager(tmp_path, keep_last_n=2, keep_best=("reward_mean", "max", 1))
    for iteration, reward in enumerate([1.0, 9.0, math.nan, 3.0, 2.0, 1.0], 1):
        checkpoints.save_checkpoint(Algorithm(), iteration, {"reward_mean": reward})
    assert [e["iteration"] for e in checkpoints.checkpoint_history] == [2, 5, 6]
    assert checkpoints.get_best_checkpoint() == str(tmp_path / "checkpoint_000002")
    everything = manager(tmp_path / "all", keep_last_n=0)
    for iteration in range(15):
        everything.save_checkpoint(Algorithm(), iteration)
    assert len(everything.checkpoint_history) == 15


def test_a_save_that_fails_leaves_no_half_checkpoint(tmp_path):
    class Dies(Algorithm):
        def save(self, path):
            super().save(path)
            raise KeyboardInterrupt

    checkpoints = manager(tmp_path)
    checkpoints.save_checkpoint(Algorithm(1), 1, {})
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save_checkpoint(Dies(), 2, {})
    assert [p.name for p in tmp_path.glob("checkpoint_0*")] == ["checkpoint_000001"]
    assert not list((tmp_path / "__trajstore").glob("tmp.*"))
    checkpoints.save_checkpoint(Algorithm(2), 2, {"episode_len_mean": 3, "interrupted": True})
    assert checkpoints.list_checkpoints()[-1]["interrupted"] is True
    assert (tmp_path / "metrics_interrupted_iter_2.json").exists()
    checkpoints.save_checkpoint(Algorithm(3), 3, {"final": True})
    assert len(json.loads((tmp_path / "final_metrics.json").read_text())) == 3


def test_listings_make_managers_while_one_trains_but_only_one_saves(tmp_path):
    training = manager(tmp_path)
    training.save_checkpoint(Algorithm(), 1, {})
    other = manager(tmp_path)
    assert other.get_latest_checkpoint() is not None
    with pytest.raises(LockedError):
        other.save_checkpoint(Algorithm(), 2, {})


def test_a_restore_that_fails_names_both_versions(tmp_path):
    class Newer(Algorithm):
        def restore(self, path):
            raise ValueError("unknown key 'env_runner_v3'")

    checkpoints = manager(tmp_path)
    checkpoints.save_checkpoint(Algorithm(), 1, {})
    file = tmp_path / "checkpoint_000001/metadata.json"
    metadata = json.loads(file.read_text())
    metadata["versions"]["ray"] = "2.50.0"
    file.write_text(json.dumps(metadata))
    with pytest.raises(StateError, match=r"env_runner_v3[\s\S]*saved with .*ray 2\.50\.0.*; now .*ray "):
        checkpoints.restore(Newer())
    with pytest.raises(NotFoundError):
        checkpoints.restore(Algorithm(), 77)
    with pytest.raises(NotFoundError):
        checkpoints.restore(Algorithm(), str(tmp_path / "nothing"))


def test_rot_is_found_before_ray_reads_it(tmp_path):
    import os

    checkpoints = manager(tmp_path)
    checkpoints.save_checkpoint(Algorithm(), 1, {})
    file = tmp_path / "checkpoint_000001/policies/seeker_policy/policy_state.pkl"
    status = file.stat()
    file.write_bytes(b"s" * 99 + b"t")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CorruptionError, match="policy_state"):
        checkpoints.restore(Algorithm())


def test_the_history_comes_from_the_right_file(tmp_path):
    """Theirs took the first file in the alphabet: metrics_iter_10 before metrics_iter_9, and the oldest of all."""
    full = [{"iteration": i, "reward_mean": i} for i in range(1, 31)]
    for iteration in (9, 10, 20, 30):
        (tmp_path / f"metrics_iter_{iteration}.json").write_text(json.dumps(full[:iteration]))
    assert [e["iteration"] for e in load_metrics_history(tmp_path)] == list(range(1, 31))
    assert [e["iteration"] for e in load_metrics_history(tmp_path, 20)] == list(range(1, 21))
    (tmp_path / "metrics_iter_30.json").write_text("[{")
    with pytest.warns(UserWarning, match="metrics_iter_30"):
        assert len(load_metrics_history(tmp_path)) == 20
    assert load_metrics_history(tmp_path / "nothing") == []


def test_the_plot_takes_any_history(tmp_path):
    pytest.importorskip("matplotlib")
    for number, history in enumerate([[], [metrics(1)], [{"reward_mean": math.nan}], [{"other": "text"}] * 3]):
        plot_training_metrics(history, tmp_path, number, verbose=False)
        assert (tmp_path / f"training_metrics_iter_{number}.png").stat().st_size > 1000


def test_without_matplotlib_there_are_no_plots_and_one_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    checkpoints = manager(tmp_path, plot=None)
    with pytest.warns(UserWarning, match="matplotlib"):
        checkpoints.save_checkpoint(Algorithm(), 1, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoints.save_checkpoint(Algorithm(), 2, {})


def test_a_real_algorithm(tmp_path):
    pytest.importorskip("ray.rllib")
    ppo = pytest.importorskip("ray.rllib.algorithms.ppo")
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
        try:

            def build():
                return (
                    ppo.PPOConfig().environment("CartPole-v1").env_runners(num_env_runners=0)
                    .training(train_batch_size=200, minibatch_size=100, num_epochs=1)
                ).build_algo()  # fmt: skip

            algorithm = build()
            algorithm.train()
            checkpoints = manager(tmp_path)
            path = checkpoints.save_checkpoint(algorithm, 1, {"reward_mean": 1.0})
            assert "ray" in json.loads((Path(path) / "metadata.json").read_text())["versions"]
            weights = algorithm.get_module().state_dict()
            other = build()
            assert checkpoints.restore(other) == 1
            assert all((weights[key] == value).all() for key, value in other.get_module().state_dict().items())
            assert other.iteration == algorithm.iteration == 1
            algorithm.stop()
            other.stop()
        finally:
            ray.shutdown()
