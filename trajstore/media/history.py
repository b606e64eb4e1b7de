"""A metrics history: lines appended to a file, each whole or ignored, that no resume rewrites."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from trajstore.errors import FormatError, SchemaError
from trajstore.format.checksum import crc32c
from trajstore.format.typedjson import dumps, loads
from trajstore.media.storage import Storage


class History:
    """The metrics of a run by step, in a file of JSON lines that only grows.

    A line is ``<crc32c in hex> <JSON>``. A line that a crash cut short fails its checksum and is not read; the next
    append begins a new one. Resuming at an older step appends a line saying so, and :meth:`read` then leaves the
    abandoned steps out; they stay in the file and come with ``abandoned=True``.

    Parameters
    ----------
    storage, key : the file; it need not exist.
    """

    def __init__(self, storage: Storage, key: str) -> None:
        self._storage = storage
        self._key = key

    def append(self, step: int, metrics: Mapping[str, Any], *, sync: bool = True) -> None:
        """Add the metrics of a step.

        Parameters
        ----------
        metrics : see :func:`plain`.
        sync : durable on return; without, it survives the process but not the machine.
        """
        self._append({"step": int(step), "time": time.time(), "metrics": plain(metrics)}, sync)

    def resume(self, step: int) -> None:
        """Say that the run goes on from ``step``: later steps written so far are abandoned."""
        self._append({"resume": int(step), "time": time.time()}, sync=True)

    def _append(self, line: dict[str, Any], sync: bool) -> None:
        text = dumps(line)
        created = self._storage.size(self._key) is None
        # The leading newline ends whatever a crash left of the line before.
        self._storage.append(self._key, b"\n%08x %s\n" % (crc32c(text), text), sync=sync)
        if created and sync:
            self._storage.sync_folder(self._key.rpartition("/")[0])

    def read(self, *, abandoned: bool = False) -> list[dict[str, Any]]:
        """``[{"step", "time", "metrics"}]`` in the order of writing; damaged lines are left out."""
        entries: list[dict[str, Any]] = []
        if self._storage.size(self._key) is None:
            return entries
        for raw in self._storage.read(self._key).split(b"\n"):
            checksum, _, text = raw.partition(b" ")
            try:
                if int(checksum, 16) != crc32c(text):
                    continue
                line = loads(text)
            except (ValueError, FormatError):
                continue
            if "resume" not in line:
                entries.append(line)
            elif not abandoned:
                entries = [entry for entry in entries if entry["step"] <= line["resume"]]
        return entries


def plain(metrics: Mapping[str, Any], path: str = "metrics") -> dict[str, Any]:
    """Metrics as plain Python: numbers (also of NumPy, and tensors of one element), strings, and mappings of them.

    Raises
    ------
    SchemaError : anything else; it names the key.
    """
    result: dict[str, Any] = {}
    for key, value in metrics.items():
        place = f"{path}[{key!r}]"
        if not isinstance(key, str):
            raise SchemaError(f"{place}: the name of a metric is a string")
        if isinstance(value, Mapping):
            result[key] = plain(value, place)
        elif value is None or isinstance(value, (bool, int, float, str)):
            result[key] = value if not isinstance(value, np.generic) else value.item()
        elif _elements(value) == 1:
            result[key] = value.item()
        else:
            raise SchemaError(f"{place} is a {type(value).__name__}", hint="a metric is a number or a string")
    return result


def _elements(value: Any) -> int:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.size
    numel = getattr(value, "numel", None)  # a tensor
    return int(numel()) if callable(numel) else 0
