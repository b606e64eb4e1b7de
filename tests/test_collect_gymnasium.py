"""Real Gymnasium environments in every autoreset mode, against what each sub-environment itself has seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore

gymnasium = pytest.importorskip("gymnasium")

from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv  # noqa: E402

from trajstore.collect.gymnasium import record, tree  # noqa: E402

MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]


class Witness(gymnasium.Wrapper):
    """Ends episodes at random, and writes down every one as the environment saw it."""

    def __init__(self, env: Any, number: int, seen: list[Any]) -> None:
        super().__init__(env)
        self.number = number
        self.seen = seen
        self.rng = np.random.default_rng(number)
        self.episode: dict[str, Any] | None = None

    def reset(self, **kwargs: Any) -> Any:
        self.end()
        obs, info = self.env.reset(**kwargs)
        self.episode = {"env": self.number, "obs": [obs], "action": [], "reward": [], "seed": kwargs.get("seed")}
        return obs, info

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = self.env.step(action)
        chance = self.rng.random()
        terminated, truncated = terminated or chance < 0.08, truncated or chance > 0.95
        assert self.episode is not None
        for name, value in {"obs": obs, "action": action, "reward": reward}.items():
            self.episode[name].append(value)
        if terminated or truncated:
            self.end(terminated=terminated, truncated=truncated)
        return obs, reward, terminated, truncated, info

    def end(self, *, terminated: bool = False, truncated: bool = True) -> None:
        """An episode that is reset before its end was truncated."""
        if self.episode is not None and self.episode["action"]:
            self.seen.append({**self.episode, "terminated": terminated, "truncated": truncated})
        self.episode = None


def timed(env: Any) -> Any:
    return gymnasium.wrappers.TimeAwareObservation(env, flatten=False)


ENVIRONMENTS: dict[str, Callable[[], Any]] = {
    "CartPole": lambda: gymnasium.make("CartPole-v1"),
    "Pendulum": lambda: gymnasium.make("Pendulum-v1"),
    "FrozenLake": lambda: gymnasium.make("FrozenLake-v1"),
    "Blackjack, a Tuple": lambda: gymnasium.make("Blackjack-v1"),
    "CartPole, a Dict": lambda: timed(gymnasium.make("CartPole-v1")),
}


def leaves(value: Any, prefix: str) -> dict[str, np.ndarray]:
    if isinstance(value, dict):
        found = {}
        for name, inner in value.items():
            found.update(leaves(inner, f"{prefix}/{name}"))
        return found
    return {prefix: np.asarray(value)}


def stacked(values: list[Any], name: str) -> dict[str, np.ndarray]:
    rows = [leaves(tree(value), name) for value in values]
    return {path: np.stack([row[path] for row in rows]) for path in rows[0]}


def check(path: Path, seen: list[Any], observations: str) -> None:
    ds = trajstore.open(path)
    assert len(ds) == len(seen)
    # One environment's episodes are in their order; which environment comes first within a step is no matter.
    order = {env: iter(np.flatnonzero(ds.table["env"] == env).tolist()) for env in set(ds.table["env"].tolist())}
    for episode in seen:
        i = next(order[episode["env"]])
        assert (ds.table["terminated"][i], ds.table["truncated"][i]) == (episode["terminated"], episode["truncated"])
        assert ds.table["seed"][i] == (-1 if episode["seed"] is None else episode["seed"])
        if observations == "T":
            episode = {**episode, "obs": episode["obs"][:-1]}
        for name in ("obs", "action", "reward"):
            for field, rows in stacked(episode[name], name).items():
                stored = ds[i][field][:]
                np.testing.assert_array_equal(stored, rows.astype(stored.dtype), err_msg=f"trajectory {i}, {field}")
                assert stored.shape == rows.shape


def run(env: Any, steps: int, mode: AutoresetMode) -> None:
    env.reset(seed=7)
    env.action_space.seed(3)
    for t in range(steps):
        result = env.step(env.action_space.sample())
        for value in leaves(tree(result[0]), "").values():
            value[...] = 0  # what the caller does to its arrays afterwards is not recorded
        done = np.logical_or(result[2], result[3])
        if t == steps // 2:
            env.reset(seed=100)  # in the midst of the episodes
        elif mode is AutoresetMode.DISABLED and done.any():
            env.reset(options={"reset_mask": done})
        elif mode is AutoresetMode.DISABLED and t % 17 == 0:
            mask = np.zeros(env.num_envs, bool)
            mask[t % env.num_envs] = True
            env.reset(options={"reset_mask": mask})  # one of them, in the midst of its episode


@pytest.mark.parametrize("observations", ["T", "T+1"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_episode_is_what_its_environment_saw(
    tmp_path: Path, name: str, mode: AutoresetMode, observations: str
) -> None:
    seen: list[Any] = []
    witnesses: list[Witness] = []

    def make(number: int) -> Callable[[], Witness]:
        def one() -> Witness:
            witnesses.append(Witness(ENVIRONMENTS[name](), number, seen))
            return witnesses[-1]

        return one

    env = record(
        SyncVectorEnv([make(i) for i in range(4)], autoreset_mode=mode),
        tmp_path / "s",
        observations=observations,
        memory_bytes=2048,
    )
    run(env, 130, mode)
    for witness in witnesses:
        witness.end()
    env.close()
    check(tmp_path / "s", seen, observations)


@pytest.mark.parametrize("mode", MODES[:2], ids=lambda mode: mode.name)
def test_environments_that_share_one_buffer(tmp_path: Path, mode: AutoresetMode) -> None:
    """Processes, shared memory, and observations that are overwritten in place."""
    env = AsyncVectorEnv(
        [ENVIRONMENTS["CartPole"]] * 3, shared_memory=True, copy=False, autoreset_mode=mode, context="spawn"
    )
    plain = SyncVectorEnv([ENVIRONMENTS["CartPole"]] * 3, autoreset_mode=mode)
    for one, path in ((env, "async"), (plain, "sync")):
        recorded = record(one, tmp_path / path)
        recorded.reset(seed=1)
        rng = np.random.default_rng(0)
        for _ in range(80):
            recorded.step(rng.integers(0, 2, 3))
        recorded.close()
    a, b = trajstore.open(tmp_path / "async"), trajstore.open(tmp_path / "sync")
    assert len(a) == len(b) > 10
    for field in ("obs", "action", "reward"):
        np.testing.assert_array_equal(a.read(field), b.read(field))


@pytest.mark.parametrize("observations", ["T", "T+1"])
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_single_environment(tmp_path: Path, name: str, observations: str) -> None:
    seen: list[Any] = []
    witness = Witness(ENVIRONMENTS[name](), 0, seen)
    env = record(witness, tmp_path / "s", observations=observations)
    env.action_space.seed(3)
    for seed in range(12):
        env.reset(seed=seed)
        for _ in range(15):
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            if terminated or truncated:
                break
    witness.end()
    env.close()
    check(tmp_path / "s", seen, observations)


class Informed(gymnasium.Wrapper):
    """Says how it ended where it succeeded, and nothing else, as many environments do."""

    def step(self, action: Any) -> Any:
        obs, reward, _, _, info = self.env.step(action)
        ends = action == 1
        return obs, reward, ends, False, {**info, "success": True, "task": "reach"} if ends else info


@pytest.mark.parametrize("mode", [None, *MODES])
def test_an_info_that_is_not_there_is_not_zero(tmp_path: Path, mode: Any) -> None:
    def make() -> Any:
        return Informed(gymnasium.make("CartPole-v1", max_episode_steps=100))

    envs = make() if mode is None else SyncVectorEnv([make, make], autoreset_mode=mode)
    env = record(envs, tmp_path / "s", info=["success", "sucess"])
    for action in (1, 0):  # one episode that succeeds, and one that is still under way at the end
        env.reset(seed=0)
        env.step(action if mode is None else np.array([action, action]))
    env.close()
    table = trajstore.open(tmp_path / "s").table
    assert np.array_equal(np.sort(table["success"])[: 1 if mode is None else 2], np.ones(1 if mode is None else 2))
    assert np.isnan(table["success"]).sum() == (1 if mode is None else 2) and np.isnan(table["sucess"]).all()
    env = record(make() if mode is None else SyncVectorEnv([make], autoreset_mode=mode), tmp_path / "t", info=["task"])
    env.reset(seed=0)
    with pytest.raises(trajstore.TrajstoreError, match=r"the info 'task' is .*, no number"):
        env.step(1 if mode is None else np.array([1]))
    env.close()


def test_infos_become_columns(tmp_path: Path) -> None:
    for mode in MODES[:2]:
        vector = SyncVectorEnv([ENVIRONMENTS["CartPole"]] * 2, autoreset_mode=mode)
        path = tmp_path / mode.name
        env = record(gymnasium.wrappers.vector.RecordEpisodeStatistics(vector), path)
        counted = record(
            SyncVectorEnv([lambda: Counting(gymnasium.make("CartPole-v1"))] * 2, autoreset_mode=mode),
            tmp_path / f"{mode.name} counted",
            info=["count"],
        )
        for one in (env, counted):
            one.reset(seed=1)
            for _ in range(60):
                one.step(np.array([1, 0]))
            one.close()
        ds = trajstore.open(tmp_path / f"{mode.name} counted")
        np.testing.assert_array_equal(ds.table["count"], ds.lengths)


class Counting(gymnasium.Wrapper):
    def reset(self, **kwargs: Any) -> Any:
        self.count = 0
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> Any:
        self.count += 1
        obs, reward, terminated, truncated, _ = self.env.step(action)
        return obs, reward, terminated, truncated, {"count": self.count}
