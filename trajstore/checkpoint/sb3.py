"""Stable-Baselines3: a callback that saves into ``Checkpoints``, and the way back into a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecNormalize, unwrap_vec_normalize

from trajstore.checkpoint.checkpoints import Checkpoints, Restored
from trajstore.errors import SchemaError

_COUNTERS = ("num_timesteps", "_total_timesteps", "_num_timesteps_at_start", "_n_updates", "_episode_num",
             "_current_progress_remaining")  # fmt: skip
_MOMENTS = ("mean", "var", "count")


class CheckpointCallback(BaseCallback):  # type: ignore[misc]
    """Saves the model's networks, optimizers, counters and normalisation every ``save_freq`` environment steps.

    Parameters
    ----------
    checkpoints : opened by the caller, who closes it.
    save_freq : in environment steps, of all environments together (SB3's own counts calls).
    save_replay_buffer : also the replay buffer's arrays; chunks that did not change since the last save are links.
        Where the transitions are in a store already, give its cursor with ``extra`` instead.
    extra : a function of the model that returns more to save under ``"extra"``.

    Notes
    -----
    Metrics of a checkpoint are the mean reward and length of the latest episodes (``ep_rew_mean``, ``ep_len_mean``).
    A model restored from it continues with the same weights, optimizer states, counters and normalisation; the
    environments start new episodes, as SB3 always does.
    """

    def __init__(
        self, checkpoints: Checkpoints, save_freq: int, *, save_replay_buffer: bool = False, extra: Any = None,
        verbose: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(verbose)
        if save_freq < 1:
            raise SchemaError(f"save_freq is {save_freq}: it counts environment steps, from 1")
        self._checkpoints = checkpoints
        self._save_freq = save_freq
        self._with_buffer = save_replay_buffer
        self._extra = extra
        self._last = 0

    def _on_training_start(self) -> None:
        self._last = self.model.num_timesteps
        if self._with_buffer:
            _buffer(self.model)

    def _on_step(self) -> bool:
        if self.num_timesteps // self._save_freq > self._last // self._save_freq:
            self._last = self.num_timesteps
            self._save(final=False)
        return not self._checkpoints.interrupted

    def _on_training_end(self) -> None:
        self._save(final=True)

    def _save(self, final: bool) -> None:
        state = model_state(self.model, replay_buffer=self._with_buffer)
        if self._extra is not None:
            state["extra"] = self._extra(self.model)
        self._checkpoints.save(self.num_timesteps, state, _metrics(self.model), final=final)
        if self.verbose >= 2:
            print(f"saved a checkpoint at {self.num_timesteps} steps")  # noqa: T201


def model_state(model: Any, *, replay_buffer: bool = False) -> dict[str, Any]:
    """An SB3 model's state: ``get_parameters()`` by name, ``counters``, ``normalisation``, ``replay_buffer``."""
    state: dict[str, Any] = dict(model.get_parameters())
    variables = {name: _attribute(model, name) for name in model._get_torch_save_params()[1]}
    state["variables"] = {name: value for name, value in variables.items() if value is not None}
    state["counters"] = {name: getattr(model, name) for name in _COUNTERS if hasattr(model, name)}
    normalise = unwrap_vec_normalize(model.get_env()) if model.get_env() is not None else None
    if normalise is not None:
        state["normalisation"] = _normalisation(normalise)
    if replay_buffer:
        buffer = _buffer(model)
        state["replay_buffer"] = {
            name: value for name, value in vars(buffer).items() if isinstance(value, (np.ndarray, bool, int))
        }
    return state


def restore_model(checkpoints: Checkpoints, model: Any, step: Any = None, **kwargs: Any) -> Restored:
    """Put a checkpoint into a model made with the same arguments; ``kwargs`` as in ``Checkpoints.restore``.

    Then go on with ``model.learn(total, reset_num_timesteps=False)``.
    """
    restored = checkpoints.restore(None, step, **kwargs)
    state = restored.state
    names = model._get_torch_save_params()[0]
    model.set_parameters({name: state[name] for name in names}, exact_match=True, device=model.device)
    for name, value in state["variables"].items():
        target = _attribute(model, name)
        target.data.copy_(value)
    for name, value in state["counters"].items():
        setattr(model, name, value)
    normalise = unwrap_vec_normalize(model.get_env()) if model.get_env() is not None else None
    if normalise is not None and "normalisation" in state:
        _set_normalisation(normalise, state["normalisation"])
    if "replay_buffer" in state:
        for name, value in state["replay_buffer"].items():
            setattr(_buffer(model), name, value.copy() if isinstance(value, np.ndarray) else value)
    return restored


def _normalisation(environment: VecNormalize) -> dict[str, Any]:
    observations: Any = environment.obs_rms
    if isinstance(observations, Mapping):
        moments: Any = {key: _moments(value) for key, value in observations.items()}
    else:
        moments = _moments(observations) if observations is not None else None
    return {"obs": moments, "ret": _moments(environment.ret_rms), "returns": environment.returns}


def _moments(running: Any) -> dict[str, Any]:
    return {name: np.asarray(getattr(running, name)) for name in _MOMENTS}


def _set_normalisation(environment: VecNormalize, state: dict[str, Any]) -> None:
    observations: Any = environment.obs_rms
    if isinstance(observations, Mapping):
        for key, running in observations.items():
            _set_moments(running, state["obs"][key])
    elif observations is not None:
        _set_moments(observations, state["obs"])
    _set_moments(environment.ret_rms, state["ret"])
    environment.returns = state["returns"].copy()


def _set_moments(running: Any, state: dict[str, Any]) -> None:
    for name in _MOMENTS:
        value = state[name]
        setattr(running, name, value.copy() if value.ndim else value.item())


def _metrics(model: Any) -> dict[str, float]:
    episodes = list(model.ep_info_buffer or ())
    if not episodes:
        return {}
    return {
        "ep_rew_mean": float(np.mean([episode["r"] for episode in episodes])),
        "ep_len_mean": float(np.mean([episode["l"] for episode in episodes])),
    }


def _buffer(model: Any) -> Any:
    buffer = getattr(model, "replay_buffer", None)
    if buffer is None:
        raise SchemaError("save_replay_buffer=True, but the model has no replay buffer", hint="leave it off")
    return buffer


def _attribute(model: Any, name: str) -> Any:
    for part in name.split("."):
        model = getattr(model, part, None)
    return model
