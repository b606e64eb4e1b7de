"""A PPO-like collector in NumPy: what docs/collect.md shows and ``trajstore demo --vector`` runs."""

from __future__ import annotations

from typing import Any

import numpy as np

import trajstore
from trajstore.collect import Recorder
from trajstore.errors import MissingDependencyError
from trajstore.monitor import PerformanceMonitor

try:
    import gymnasium
except ImportError as error:
    raise MissingDependencyError(
        "the demonstration plays in Gymnasium", hint="pip install 'trajstore[demo]'"
    ) from error

Array = np.ndarray[Any, Any]


class Policy:
    """A linear softmax policy with a linear value, improved by clipped policy gradients."""

    def __init__(self, inputs: int, actions: int, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.weights = np.zeros((inputs + 1, actions))
        self.value_weights = np.zeros(inputs + 1)

    def __call__(self, obs: Array) -> tuple[Array, Array, Array]:
        """Actions, their log-probabilities and the values of observations (n, inputs)."""
        log_p = self.log_probabilities(obs)
        action = (np.exp(log_p).cumsum(1) > self.rng.random((len(obs), 1))).argmax(1)
        return action, log_p[np.arange(len(obs)), action], _with_one(obs) @ self.value_weights

    def log_probabilities(self, obs: Array) -> Array:
        logits = _with_one(obs) @ self.weights
        return np.asarray(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))

    def update(self, obs: Array, action: Array, log_p: Array, advantage: Array, returns: Array) -> None:
        """A few steps of PPO's clipped objective on one rollout, all of it (n, …)."""
        x = _with_one(obs)
        chosen = np.eye(self.weights.shape[1])[action]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        for _ in range(10):
            now = self.log_probabilities(obs)
            ratio = np.exp((now * chosen).sum(1) - log_p)
            free = np.where(advantage > 0, ratio < 1.2, ratio > 0.8)
            self.weights += 0.3 * x.T @ ((chosen - np.exp(now)) * (free * ratio * advantage)[:, None]) / len(x)
        ridge = 1e-3 * len(x) * np.eye(x.shape[1])
        self.value_weights = np.linalg.solve(x.T @ x + ridge, x.T @ returns)


def collect(path: str, *, num_envs: int = 32, iterations: int = 12, horizon: int = 64, seed: int = 0) -> dict[str, Any]:
    """Train and record; run it again on the same path and the dataset goes on."""
    envs = gymnasium.make_vec("CartPole-v1", num_envs, vectorization_mode="sync")
    policy, monitor = Policy(4, 2, seed), PerformanceMonitor()
    config = {"env": "CartPole-v1", "num_envs": num_envs, "horizon": horizon}
    with (
        trajstore.create(path, resume=True, config=config) as writer,
        Recorder(writer, num_envs, autoreset="next_step", observations="T+1") as recorder,
    ):
        recorder.set(iteration=0)
        obs, _ = envs.reset(seed=seed)
        resets = np.zeros(num_envs, bool)  # Gymnasium resets an environment with the step after its last
        for iteration in range(iterations):
            rollout: dict[str, list[Array]] = {name: [] for name in ("obs", "action", "log_p", "value", "reward", "go")}
            for _ in range(horizon):
                action, log_p, value = policy(obs)
                with monitor.timer("env"):
                    after, reward, terminated, truncated, _ = envs.step(action)
                with monitor.timer("record"):
                    recorder.step(
                        obs=obs,
                        action=action,
                        reward=reward,
                        log_p=log_p,
                        value=value,
                        terminated=terminated,
                        truncated=truncated,
                        columns={"iteration": iteration},
                    )
                done = terminated | truncated
                row = {"obs": obs, "action": action, "log_p": log_p, "value": value, "reward": reward}
                for name, values in {**row, "go": ~(done | resets)}.items():
                    rollout[name].append(values)
                obs, resets = after, done
            with monitor.timer("update"):
                learn(policy, {name: np.array(values) for name, values in rollout.items()}, policy(obs)[2])
        recorder.close(final_obs=obs)
        writer.commit()
        stats = {**writer.stats, **recorder.stats}
    envs.close()
    return {"timers": monitor.get_stats(), "summary": monitor.get_summary(), "stats": stats}


def learn(policy: Policy, rollout: dict[str, Array], bootstrap: Array, gamma: float = 0.99, lam: float = 0.95) -> None:
    """Generalised advantages over a rollout of (steps, envs) arrays, then the policy's update."""
    advantage = np.zeros_like(rollout["reward"])
    after, carried = bootstrap, np.zeros_like(bootstrap)
    for t in reversed(range(len(advantage))):
        delta = rollout["reward"][t] + gamma * after * rollout["go"][t] - rollout["value"][t]
        advantage[t] = carried = delta + gamma * lam * rollout["go"][t] * carried
        after = rollout["value"][t]
    flat = {name: rollout[name].reshape(-1, *rollout[name].shape[2:]) for name in ("obs", "action", "log_p")}
    policy.update(**flat, advantage=advantage.ravel(), returns=(advantage + rollout["value"]).ravel())


def _with_one(obs: Array) -> Array:
    return np.concatenate([obs, np.ones((len(obs), 1))], axis=1)


def run(path: str, **options: Any) -> dict[str, Any]:
    """The demonstration: collect, then read back what the policy has learnt; every figure that it prints.

    Returns ``trajectories``, ``steps``, ``mean_length`` (of the first and the last iteration), ``record_share`` (of the
    time of environment and recording) and ``summary`` (the timers, for a person).
    """
    report = collect(path, **options)
    ds = trajstore.open(path)
    iteration, lengths = ds.table["iteration"], ds.lengths
    timers = report["timers"]
    record, env = (timers[name]["total"] for name in ("record", "env"))
    return {
        "path": path,
        "trajectories": len(ds),
        "steps": int(lengths.sum()),
        "mean_length": [float(lengths[iteration == i].mean()) for i in (iteration.min(), iteration.max())],
        "record_share": record / (record + env),
        "ratio": report["stats"]["ratio"],
        "summary": report["summary"],
    }
