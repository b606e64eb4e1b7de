"""TorchRL: what a collector yields, split into trajectories by its done flags and trajectory ids."""

from __future__ import annotations

from typing import Any

import numpy as np

from trajstore.collect.recorder import Recorder
from trajstore.errors import SchemaError
from trajstore.intake import as_array
from trajstore.writer import Writer

_FLAGS = ("done", "terminated", "truncated")
_NEXT = "next"
_IDS = ("collector", "traj_ids")


class TensorDictRecorder:
    """Records the batches of a TorchRL collector, or any TensorDicts of steps in order, ``[*envs, time]``.

    Parameters
    ----------
    observations : ``"T+1"``: what a step has both at the root and under ``next`` (the observations) gets the row after
        the last step; ``"T"``: it does not.
    exclude : names at the top that are not stored.
    recorder_options : of :class:`trajstore.Recorder`.

    Notes
    -----
    Works by the mapping interface alone (``keys``, ``get``), so that no TensorDict package is needed here. Everything
    is copied in the call: a collector may hand out the same TensorDict each time (``return_same_td=True``). Rewards
    lose their last axis of one. ``close`` keeps unfinished trajectories, with the final observation that is known.
    """

    def __init__(
        self, writer: Writer, *, observations: str = "T+1", exclude: tuple[str, ...] = ("collector",), **options: Any
    ) -> None:
        self.writer = writer
        self.recorder: Recorder | None = None
        self._observations = observations
        self._exclude = {*exclude, _NEXT, *_FLAGS, _IDS[0]}
        self._options = options
        self._names: list[str] = []
        self._last: tuple[Any, dict[str, Any], Any] | None = None  # ids, final observations, done: of the last step

    def extend(self, batch: Any) -> None:
        """Record a batch; its environments are those of the batches before, its first step follows their last.

        Raises ``SchemaError`` for a batch without ``("next", "done")`` or of another number of environments.
        """
        shape = tuple(batch.batch_size)
        if not shape:
            raise SchemaError("a TensorDict without batch axes is no batch of steps", hint="its last axis is time")
        steps, num_envs = shape[-1], int(np.prod(shape[:-1]))
        fields = {path: _time_first(value, shape) for path, value in _leaves(batch, self._exclude)}
        after = {path: _time_first(value, shape) for path, value in _leaves(batch.get(_NEXT), set(_FLAGS))}
        boundary = [path for path in fields if path in after]
        for path, value in after.items():
            if path not in fields:  # the reward, and what else a step yields
                fields[path] = value.squeeze(-1) if path.startswith("reward") and value.shape[-1:] == (1,) else value
        flags = self._flags(batch.get(_NEXT), shape)
        if self.recorder is None:
            self._names = boundary
            self.recorder = Recorder(
                self.writer,
                num_envs,
                observations=self._observations if boundary else "T",
                boundary=boundary,
                **self._options,
            )
        elif num_envs != self.recorder.num_envs:
            raise SchemaError(f"the batch is of {num_envs} environments, expected {self.recorder.num_envs}")
        self._follow(batch, flags, shape)
        for t in range(steps):
            final = {path: after[path][t] for path in boundary}
            self.recorder.step(
                terminated=flags["terminated"][t],
                truncated=flags["truncated"][t],
                final_obs=self._final(final),
                **{path: value[t] for path, value in fields.items()},
            )
        ends = flags["terminated"][-1] | flags["truncated"][-1]
        final = {path: after[path][-1].clone() for path in boundary}
        self._last = None if self._ids is None else self._ids[-1].clone(), final, ends.clone()

    def _follow(self, batch: Any, flags: dict[str, Any], shape: tuple[int, ...]) -> None:
        """Where the trajectory ids change without a flag, the trajectory was cut off: say so."""
        ids = batch.get(_IDS, None)
        self._ids = None if ids is None else _time_first(ids, shape).reshape(shape[-1], -1)
        if self._ids is None:
            return
        done = flags["terminated"] | flags["truncated"]
        flags["truncated"][:-1] |= (self._ids[1:] != self._ids[:-1]) & ~done[:-1]
        if self._last is not None and self._last[0] is not None and self.recorder is not None:
            cut = (self._ids[0] != self._last[0]) & ~self._last[2]
            if cut.any():
                self.recorder.reset(as_array("cut", cut), final_obs=self._final(self._last[1]))

    def _flags(self, after: Any, shape: tuple[int, ...]) -> dict[str, Any]:
        done = after.get("done", None)
        if done is None:
            raise SchemaError('the batch has no ("next", "done")', hint="record what a TorchRL collector yields")
        done = _time_first(done, shape).reshape(shape[-1], -1).clone()
        terminated = after.get("terminated", None)
        terminated = done if terminated is None else _time_first(terminated, shape).reshape(shape[-1], -1).clone()
        return {"terminated": terminated, "truncated": done & ~terminated}

    def _final(self, final: dict[str, Any]) -> Any:
        if not final or self._observations == "T":
            return None
        return final if len(final) > 1 else next(iter(final.values()))

    def close(self) -> None:
        """Store what is unfinished as truncated; the writer stays open."""
        if self.recorder is not None:
            self.recorder.close(final_obs=self._final(self._last[1]) if self._last else None)

    def __enter__(self) -> TensorDictRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _leaves(batch: Any, exclude: set[str]) -> list[tuple[str, Any]]:
    """Tensors by path, without those at the top that ``exclude`` names."""
    found = []
    for name in batch.keys():  # noqa: SIM118  # a TensorDict iterates over its first axis
        if name in exclude:
            continue
        value = batch.get(name)
        if hasattr(value, "batch_size"):
            found += [(f"{name}/{path}", inner) for path, inner in _leaves(value, set())]
        else:
            found.append((name, value))
    return found


def _time_first(value: Any, shape: tuple[int, ...]) -> Any:
    """[*envs, time, …] as a view [time, envs, …]."""
    value = value.reshape(-1, shape[-1], *value.shape[len(shape) :])
    return value.transpose(0, 1)
