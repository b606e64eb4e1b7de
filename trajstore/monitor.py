"""Timers of a training loop, and what they say."""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class PerformanceMonitor:
    """Named timers with statistics over their latest values.

    All times are in seconds. Where CUDA is in use in this process, a timer
    measures device time: an event on the current stream at either end, read
    when statistics are asked for, so that timing never makes the loop wait.

    Parameters
    ----------
    cuda : ``None`` follows the process (events once torch is loaded and CUDA has been used),
        ``False`` measures wall time only.
    keep : values kept for each timer; older ones are forgotten. ``0`` keeps all.

    Notes
    -----
    Not locked: a timer belongs to the thread that runs it. Timers of different names may run in different threads.
    """

    def __init__(self, *, cuda: bool | None = None, keep: int = 0) -> None:
        self._cuda = cuda
        self._keep = keep
        self._values: defaultdict[str, list[float | tuple[Any, Any]]] = defaultdict(list)
        self._running: dict[str, tuple[float, Any]] = {}

    @property
    def timings(self) -> dict[str, list[float]]:
        """All kept values by timer, in seconds."""
        return {name: self._resolve(name, len(values)) for name, values in self._values.items()}

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Time the block and record it, also when it raises."""
        start = self._now()
        try:
            yield
        finally:
            self._add(name, self._span(start))

    def start_timer(self, name: str) -> None:
        """Start a timer; starting it again moves its start."""
        self._running[name] = self._now()

    def end_timer(self, name: str) -> float | None:
        """End a timer and record it; its seconds, or ``None`` if it was not running.

        Device time is not known yet when this returns, so under CUDA it is the wall time since the start.
        """
        start = self._running.pop(name, None)
        if start is None:
            return None
        self._add(name, self._span(start))
        return time.perf_counter() - start[0]

    def record(self, name: str, value: float) -> None:
        """Add a value that was measured elsewhere, in seconds."""
        self._add(name, float(value))

    def get_stats(self, window: int = 100) -> dict[str, dict[str, float]]:
        """``{timer: {mean, std, min, max, total, count}}`` over the last ``window`` values of each.

        ``std`` is the sample deviation (n - 1), 0 for a single value.
        """
        stats = {}
        for name in self._values:
            values = self._resolve(name, window)
            if not values:
                continue
            mean = math.fsum(values) / len(values)
            spread = math.fsum((value - mean) ** 2 for value in values)
            stats[name] = {
                "mean": mean,
                "std": math.sqrt(spread / (len(values) - 1)) if len(values) > 1 else 0.0,
                "min": min(values),
                "max": max(values),
                "total": math.fsum(values),
                "count": len(values),
            }
        return stats

    def get_summary(self, window: int = 100) -> str:
        """One line for each timer, in milliseconds, for a person."""
        lines = ["\n=== Performance Summary ==="]
        lines += [
            f"{name:25s}: {stat['mean'] * 1e3:7.2f} ms (±{stat['std'] * 1e3:5.2f} ms) "
            f"[{stat['min'] * 1e3:6.2f}, {stat['max'] * 1e3:6.2f}]"
            for name, stat in self.get_stats(window).items()
        ]
        return "\n".join(lines)

    def log_values(self, window: int = 100, prefix: str = "perf/") -> dict[str, float]:
        """``{"perf/<timer>": mean seconds}``: what a TensorBoard or W&B logger takes."""
        return {f"{prefix}{name}": stat["mean"] for name, stat in self.get_stats(window).items()}

    def log(self, target: Any, step: int | None = None, *, window: int = 100, stats: Mapping[str, float] = {}) -> None:
        """Send ``perf/<timer>`` means to a logger, and ``perf/<name>`` of other figures, ``writer.stats`` say.

        ``target`` : see :func:`log_values_to`.
        """
        values = {**self.log_values(window), **{f"perf/{name}": float(value) for name, value in stats.items()}}
        log_values_to(target, values, step)

    def reset(self) -> None:
        """Forget all values and running timers."""
        self._values.clear()
        self._running.clear()

    def _add(self, name: str, value: float | tuple[Any, Any]) -> None:
        values = self._values[name]
        values.append(value)
        if self._keep and len(values) > 2 * self._keep:
            del values[: -self._keep]

    def _now(self) -> tuple[float, Any]:
        return time.perf_counter(), self._event()

    def _span(self, start: tuple[float, Any]) -> float | tuple[Any, Any]:
        wall, event = start
        end = self._event() if event is not None else None
        return time.perf_counter() - wall if end is None else (event, end)

    def _event(self) -> Any:
        torch = sys.modules.get("torch")
        if self._cuda is False or torch is None or not torch.cuda.is_initialized():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _resolve(self, name: str, window: int) -> list[float]:
        values = self._values[name]
        first = max(len(values) - window, 0)
        for position in range(first, len(values)):
            value = values[position]
            if isinstance(value, tuple):
                start, end = value
                end.synchronize()
                values[position] = start.elapsed_time(end) / 1e3
        return list(values[first:])  # type: ignore[arg-type]  # all floats now


def log_values_to(target: Any, values: Mapping[str, float], step: int | None = None) -> None:
    """Log values by name to anything shaped like TensorBoard's ``SummaryWriter`` or a W&B run; neither is needed here.

    Parameters
    ----------
    target : has ``add_scalar(tag, value, step)``, or ``log(values, step=step)``, or is called with ``(values, step)``.

    Raises ``TypeError`` for anything else.
    """
    if hasattr(target, "add_scalar"):
        for name, value in values.items():
            target.add_scalar(name, value, step)
    elif hasattr(target, "log"):
        target.log(dict(values), step=step)
    elif callable(target):
        target(dict(values), step)
    else:
        raise TypeError(f"{type(target).__name__} has neither add_scalar nor log, and cannot be called")
