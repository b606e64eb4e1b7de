"""Gymnasium: wrappers that record what an environment does, one line in a user's script."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

from trajstore.collect.recorder import Recorder
from trajstore.collect.ring import leaves
from trajstore.errors import SchemaError
from trajstore.writer import Writer, create

_MODES = {
    AutoresetMode.NEXT_STEP: "next_step",
    AutoresetMode.SAME_STEP: "same_step",
    AutoresetMode.DISABLED: "disabled",
}


def record(env: Any, writer: Writer | str | os.PathLike[str], **options: Any) -> Any:
    """Wrap an environment, single or vector, so that its episodes are recorded as it is used.

    Parameters
    ----------
    writer : an open writer, or a path, where a store is then made, and closed with the environment.
    options : of :class:`VectorRecorder` and :class:`EpisodeRecorder`.

    Example: ``env = record(gymnasium.make_vec("CartPole-v1", 64), "run.zarr")``
    """
    if isinstance(env, VectorEnv):
        return VectorRecorder(env, writer, **options)
    return EpisodeRecorder(env, writer, **options)


class VectorRecorder(VectorWrapper):
    """Records a vector environment, whatever its autoreset mode.

    Parameters
    ----------
    observations : ``"T+1"``: with each episode's final observation; ``"T"``: without.
    info : names in the infos that become columns, of float64; each trajectory has the value of its last step, NaN
        where that has none. Numbers and bools only: another raises ``SchemaError``.
    recorder_options : of :class:`trajstore.Recorder`.

    Notes
    -----
    Fields ``obs``, ``action`` and ``reward``; columns ``env``, ``terminated``, ``truncated`` and ``seed``, which is -1
    for an episode that an autoreset began. Dict and Tuple spaces become nested fields.
    """

    def __init__(
        self,
        env: Any,
        writer: Writer | str | os.PathLike[str],
        *,
        observations: str = "T+1",
        info: Sequence[str] = (),
        **recorder_options: Any,
    ) -> None:
        super().__init__(env)
        self._writer, self._owned = _opened(writer)
        self.mode = AutoresetMode(env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self.recorder = Recorder(
            self._writer, env.num_envs, autoreset=_MODES[self.mode], observations=observations, **recorder_options
        )
        self._finals = observations == "T+1" and self.mode is not AutoresetMode.NEXT_STEP
        self._info = tuple(info)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        mask = None if options is None else options.get("reset_mask")
        obs, infos = self.env.reset(seed=seed, options=options)
        self.recorder.reset(mask)
        self.recorder.put(obs=tree(obs))
        seeds = _seeds(seed, self.num_envs)
        self.recorder.set(mask, seed=seeds if mask is None else seeds[mask])
        return obs, infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        recorder = self.recorder
        recorder.put(action=tree(actions))
        result = self.env.step(actions)
        obs, reward, terminated, truncated, infos = result
        done = np.flatnonzero(np.logical_or(terminated, truncated))
        if len(done) and self._finals:
            if self.mode is AutoresetMode.SAME_STEP:
                recorder.give(done, obs=_final_rows(infos["final_obs"], done))
            else:
                recorder.give(done, obs=_rows(tree(obs), done))
        recorder.step(reward=reward, terminated=terminated, truncated=truncated, columns=self._columns(infos))
        if len(done):
            recorder.set(done, seed=-1)
        recorder.put(obs=tree(obs))
        return result

    def _columns(self, infos: dict[str, Any]) -> dict[str, Any]:
        found = {}
        final = infos.get("final_info", {})
        for name in self._info:
            values = np.full(self.num_envs, np.nan)
            if name in infos:
                mask = np.asarray(infos.get(f"_{name}", True))
                values[mask] = _numbers(name, infos[name], (self.num_envs,))[mask]
            if name in final:
                mask = np.asarray(final.get(f"_{name}", infos.get("_final_info")))
                values[mask] = _numbers(name, final[name], (self.num_envs,))[mask]
            found[name] = values
        return found

    def close(self, **kwargs: Any) -> None:
        """Close the environments, then store what was recorded; a writer that was given stays open."""
        try:
            super().close(**kwargs)
        finally:
            self.recorder.close()
            if self._owned:
                self._writer.close()


class EpisodeRecorder(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Records a single environment; parameters and fields are those of :class:`VectorRecorder`."""

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        writer: Writer | str | os.PathLike[str],
        *,
        observations: str = "T+1",
        info: Sequence[str] = (),
        **recorder_options: Any,
    ) -> None:
        super().__init__(env)
        self._writer, self._owned = _opened(writer)
        self.recorder = Recorder(self._writer, 1, autoreset="disabled", observations=observations, **recorder_options)
        self._finals = observations == "T+1"
        self._info = tuple(info)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        self.recorder.reset()
        self.recorder.put(obs=_one(tree(obs)))
        self.recorder.set(seed=-1 if seed is None else seed)
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        recorder = self.recorder
        recorder.put(action=_one(tree(action)))
        result = self.env.step(action)
        obs, reward, terminated, truncated, info = result
        after = _one(tree(obs))
        if self._finals and (terminated or truncated):
            recorder.give([0], obs=after)
        recorder.step(
            reward=np.array([reward], np.float64),
            terminated=np.array([terminated]),
            truncated=np.array([truncated]),
            columns={name: float(_numbers(name, info.get(name, np.nan), ())) for name in self._info},
        )
        recorder.put(obs=after)
        return result

    def close(self) -> None:
        """Close the environment, then store what was recorded; a writer that was given stays open."""
        try:
            super().close()
        finally:
            self.recorder.close()
            if self._owned:
                self._writer.close()


def tree(value: Any) -> Any:
    """A value of a Dict or Tuple space as nested dicts; a tuple's members are called 0, 1, …"""
    if isinstance(value, Mapping):
        return {name: tree(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return {str(i): tree(inner) for i, inner in enumerate(value)}
    if isinstance(value, np.ndarray) and value.dtype == object:
        raise SchemaError("an observation or action is an array of objects", hint="wrap the environment: record arrays")
    return value


def _numbers(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """What an info becomes in a column."""
    try:
        return np.broadcast_to(np.asarray(value).astype(np.float64), shape)
    except (TypeError, ValueError):
        raise SchemaError(
            f"the info {name!r} is {value!r:.60}, no number", hint="columns hold numbers and bools: leave it out"
        ) from None


def _opened(writer: Any) -> tuple[Writer, bool]:
    return (writer, False) if isinstance(writer, Writer) else (create(writer), True)


def _seeds(seed: Any, count: int) -> np.ndarray[Any, Any]:
    if seed is None:
        return np.full(count, -1, np.int64)
    if isinstance(seed, (int, np.integer)):
        return np.arange(seed, seed + count, dtype=np.int64)
    return np.array([-1 if one is None else one for one in seed], np.int64)


def _one(value: Any) -> Any:
    """A single environment's value as a batch of one; Python numbers as Gymnasium's spaces have them."""
    if isinstance(value, Mapping):
        return {name: _one(inner) for name, inner in value.items()}
    return np.array([value]) if np.ndim(value) == 0 else np.asarray(value)[None]


def _rows(value: Any, envs: np.ndarray[Any, Any]) -> Any:
    if isinstance(value, Mapping):
        return {name: _rows(inner, envs) for name, inner in value.items()}
    return np.asarray(value)[envs]


def _final_rows(final_obs: Any, envs: np.ndarray[Any, Any]) -> Any:
    """The final observations that ``infos`` has one by one, stacked."""
    rows = [dict(leaves({"obs": tree(final_obs[env])})) for env in envs]
    stacked = {path: np.stack([row[path] for row in rows]) for path in rows[0]}
    if set(stacked) == {"obs"}:
        return stacked["obs"]
    return {path.partition("/")[2]: values for path, values in stacked.items()}
