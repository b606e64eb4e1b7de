"""TorchRL: what a collector yields, split into trajectories by its done flags and trajectory ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trajstore.collect.recorder import Recorder
from trajstore.errors import SchemaError
from trajstore.writer import Writer

_FLAGS = ("done", "terminated", "truncated")
_NEXT = "next"
_IDS = ("collector", "traj_ids")


@dataclass
class _Step:
    """One step of every environment, as ``Recorder.step`` takes it; ``ids`` of its trajectories."""

    values: dict[str, Any]
    final: Any
    ids: Any

    def clone(self) -> _Step:
        """The same, whatever the collector does to its tensors."""
        return _Step(*(_clone(value) for value in (self.values, self.final, self.ids)))


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
    is copied in the call: a collector may hand out the same TensorDict each time (``return_same_td=True``). A device is
    not waited for. Rewards lose their last axis of one. ``close`` keeps unfinished trajectories, with the final
    observation that is known.
    """

    def __init__(
        self, writer: Writer, *, observations: str = "T+1", exclude: tuple[str, ...] = ("collector",), **options: Any
    ) -> None:
        self.writer = writer
        self.recorder: Recorder | None = None
        self._observations = observations
        self._exclude = {*exclude, _NEXT, *_FLAGS, _IDS[0]}
        self._options = options
        self._held: _Step | None = None

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
            self.recorder = Recorder(
                self.writer,
                num_envs,
                observations=self._observations if boundary else "T",
                boundary=boundary,
                **self._options,
            )
        elif num_envs != self.recorder.num_envs:
            raise SchemaError(f"the batch is of {num_envs} environments, expected {self.recorder.num_envs}")
        ids = batch.get(_IDS, None)
        if ids is not None:
            ids = _time_first(ids, shape).reshape(steps, -1)
            done = flags["terminated"] | flags["truncated"]
            flags["truncated"][:-1] |= (ids[1:] != ids[:-1]) & ~done[:-1]
        self._record_held(None if ids is None else ids[0])
        for t in range(steps):
            values = {path: value[t] for path, value in fields.items()}
            step = _Step(
                {**values, **{name: flag[t] for name, flag in flags.items()}},
                self._final({path: after[path][t] for path in boundary}),
                None if ids is None else ids[t],
            )
            if t < steps - 1:
                self.recorder.step(**step.values, final_obs=step.final)
            else:
                self._held = step.clone()

    def _record_held(self, ids: Any) -> None:
        """Record the last step of the batch before: where the ids now are others, it was cut off.

        It was held back because only this batch can tell, and asking a device for its ids would wait for it.
        """
        held, self._held = self._held, None
        if held is None or self.recorder is None:
            return
        values = held.values
        if ids is not None and held.ids is not None:
            values["truncated"] = values["truncated"] | ((ids != held.ids) & ~values["terminated"])
        self.recorder.step(**values, final_obs=held.final)

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
            final = self._held.final if self._held else None
            self._record_held(None)
            self.recorder.close(final_obs=final)

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


def _clone(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _clone(inner) for name, inner in value.items()}
    return value if value is None else value.clone()


def _time_first(value: Any, shape: tuple[int, ...]) -> Any:
    """[*envs, time, …] as a view [time, envs, …]."""
    value = value.reshape(-1, shape[-1], *value.shape[len(shape) :])
    return value.transpose(0, 1)
