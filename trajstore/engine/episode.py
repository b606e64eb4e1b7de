"""One trajectory that grows step by step, for those who collect one environment at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from trajstore.errors import SchemaError, StateError

_FLAGS = ("terminated", "truncated")
_FIRST_ROWS = 16


class _Rows:
    """A field's rows so far, in a buffer that doubles; tensors of a device stay there."""

    def __init__(self) -> None:
        self.count = 0
        self._buffer: np.ndarray[Any, Any] | None = None
        self._tensors: list[Any] = []

    def add(self, path: str, value: Any) -> None:
        if hasattr(value, "detach"):
            # The caller may change it in place; a clone comes before that in its own stream.
            self._tensors.append(value.detach().clone())
            return
        row = np.asarray(value)
        if self._buffer is None:
            self._buffer = np.empty((_FIRST_ROWS, *row.shape), row.dtype)
        buffer = self._buffer
        if row.shape != buffer.shape[1:] or (row.dtype != buffer.dtype and not np.can_cast(row.dtype, buffer.dtype)):
            raise SchemaError(
                f"field {path!r} is {row.dtype} {row.shape} now, and was {buffer.dtype} {buffer.shape[1:]} before"
            )
        if self.count == len(buffer):
            self._buffer = np.empty((2 * len(buffer), *buffer.shape[1:]), buffer.dtype)
            self._buffer[: len(buffer)] = buffer
        self._buffer[self.count] = row
        self.count += 1

    def array(self) -> Any:
        if self._tensors:
            return sys.modules["torch"].stack(self._tensors)
        return None if self._buffer is None else self._buffer[: self.count]


class Episode:
    """A trajectory under way; made by :meth:`Writer.episode`, used as a context manager.

    Leaving the block appends what was recorded. An exception drops it, or, with ``on_error="truncate"``, keeps it as
    truncated. An episode without a step is not appended.

    Attributes
    ----------
    id : of the trajectory, once it is appended; ``None`` before, and for one that was dropped.
    columns : its columns; set them as you like until the block ends.

    Example: ``with writer.episode(seed=7) as episode: episode.step(obs=obs, action=action, reward=reward)``
    """

    def __init__(self, append: Callable[..., int | None], columns: Mapping[str, Any], on_error: str) -> None:
        if on_error not in ("drop", "truncate"):
            raise SchemaError(f"on_error is 'drop' or 'truncate', not {on_error!r}")
        self.id: int | None = None
        self.columns = dict(columns)
        self._append = append
        self._on_error = on_error
        self._fields: dict[str, _Rows] = {}
        self._steps = 0
        self._closed = False

    def __len__(self) -> int:
        """Number of steps so far."""
        return self._steps

    def step(self, **fields: Any) -> None:
        """Record one step: a value for each field, nested dicts as you like.

        ``terminated`` and ``truncated`` become columns, with the value of the last step. A field that some steps lack
        has fewer rows, on a clock of its own: which steps they are of is not kept.
        """
        for name in _FLAGS:
            if name in fields:
                self.columns[name] = bool(fields.pop(name))
        self._add(fields, "")
        self._steps += 1

    def final(self, **fields: Any) -> None:
        """Record what comes after the last step: the final observation, a bootstrap value."""
        self._add(fields, "")

    def _add(self, values: Mapping[str, Any], prefix: str) -> None:
        if self._closed:
            raise StateError("the episode is over: it was appended or dropped")
        for name, value in values.items():
            if isinstance(value, Mapping):
                self._add(value, f"{prefix}{name}/")
            else:
                self._fields.setdefault(prefix + name, _Rows()).add(prefix + name, value)

    def __enter__(self) -> Episode:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed = True
        if error is not None and self._on_error == "drop":
            return
        if set(_FLAGS) & self.columns.keys():
            ended = any(self.columns.get(name) for name in _FLAGS)
            self.columns = {"terminated": False, **self.columns}
            self.columns["truncated"] = bool(self.columns.get("truncated")) or not ended
        if self._steps:
            self.id = self._append({path: rows.array() for path, rows in self._fields.items()}, **self.columns)
