"""The columns of a selection, one value for each trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trajstore.engine.optional import optional
from trajstore.engine.selection import Selection
from trajstore.errors import CorruptionError, NotFoundError
from trajstore.format.schema import LENGTH

Array = np.ndarray[Any, Any]


class Table(Mapping[str, Any]):
    """The columns of a dataset: name to values (n,); ``length`` and string fields among them."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._strings = [name for name, spec in selection.fields.items() if spec.dtype == "string"]

    def __getitem__(self, name: str) -> Array:
        if name in self._selection.columns:
            return self._selection.column(name)
        if name == LENGTH:
            return self._selection.lengths
        if name in self._strings:
            return self._texts(name)
        raise NotFoundError(f"there is no column {name!r}", hint="there are " + ", ".join(self))

    def _texts(self, name: str) -> Array:
        """A string field's values (n,), ``None`` where it is absent: one gather for all of them."""
        pairs = self._selection.field_pairs(name)
        stops = np.cumsum(pairs[:, 1] - pairs[:, 0])
        data = self._selection.read(name).tobytes()
        values = np.empty(len(pairs), object)
        start = 0
        try:
            for number, (stop, absent) in enumerate(zip(stops.tolist(), (pairs[:, 0] < 0).tolist())):
                values[number] = None if absent else data[start:stop].decode("utf-8", "surrogatepass")
                start = stop
        except UnicodeDecodeError as error:
            raise CorruptionError(f"{name!r} holds no string where a trajectory names one: {error}") from error
        return values

    def __iter__(self) -> Iterator[str]:
        yield from self._selection.columns
        yield LENGTH
        yield from self._strings

    def __len__(self) -> int:
        return len(list(iter(self)))

    def to_pandas(self) -> Any:
        """A pandas DataFrame, one row for each trajectory. Raises ``MissingDependencyError``."""
        return optional("pandas", "pandas").DataFrame({name: self[name] for name in self})

    def __repr__(self) -> str:
        return f"<Table of {len(self._selection)} trajectories: {', '.join(self)}>"
