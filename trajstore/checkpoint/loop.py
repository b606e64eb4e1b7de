"""When to save, for a training loop of one's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from trajstore.checkpoint.checkpoints import Checkpoints
from trajstore.errors import SchemaError


class Every:
    """Saves when enough steps or seconds have passed since the last save, and at the end.

        with Checkpoints("ckpts") as ckpts:
            save = Every(ckpts, steps=10_000, seconds=600)
            while step < total:
                ...
                save(step, lambda: {"model": model, "optimizer": optimizer}, metrics)
            save.final(step, {"model": model, "optimizer": optimizer}, metrics)

    Parameters
    ----------
    steps : in what the loop counts (environment steps, say); a save is due when a multiple of it was reached or
        passed since the last one. seconds : wall time. At least one of the two.
    """

    def __init__(self, checkpoints: Checkpoints, *, steps: int | None = None, seconds: float | None = None) -> None:
        if steps is None and seconds is None:
            raise SchemaError("neither steps nor seconds is given", hint="Every(checkpoints, steps=10_000)")
        if (steps is not None and steps < 1) or (seconds is not None and seconds < 0):
            raise SchemaError(f"steps={steps}, seconds={seconds}: both count upwards")
        self._checkpoints = checkpoints
        self._steps = steps
        self._seconds = seconds
        latest = checkpoints.latest()
        self._last = latest.step if latest is not None else 0
        self._time = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a save at ``step`` is due, or the process was asked to stop (``on_signal="flag"``)."""
        by_steps = self._steps is not None and step // self._steps > self._last // self._steps
        by_time = self._seconds is not None and time.monotonic() - self._time >= self._seconds
        return by_steps or by_time or self._checkpoints.interrupted

    def __call__(
        self,
        step: int,
        state: Callable[[], Any] | Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> bool:
        """Save if it is due; ``state`` may be a function that is called only then. Returns whether it was saved."""
        if not self.due(step):
            # A run that went back to an older step counts from there.
            self._last = min(self._last, step)
            return False
        saved = self._checkpoints.save(step, state() if callable(state) else state, metrics, **kwargs)
        if saved:
            self._last, self._time = step, time.monotonic()
        return saved

    def final(self, step: int, state: Any, metrics: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Save the run's last state, marked final, and wait until it is durable."""
        while not self._checkpoints.save(step, state() if callable(state) else state, metrics, final=True, **kwargs):
            self._checkpoints.wait()  # on_busy="skip" is for those in between
        self._checkpoints.wait()
