"""Other people's HDF5 files, looked into where they lie: nothing is converted, only what is asked for is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trajstore.errors import FormatError, NotFoundError
from trajstore.media.hdf5storage import leaves, named_errors, open_hdf5

Array = np.ndarray[Any, Any]


def view(path: str | os.PathLike[str]) -> View:
    """Open a robomimic / Isaac Lab, Minari or D4RL file in place.

    Returns
    -------
    View
        ``v[i]["obs/q"][10:20]`` reads those rows. A context manager; it holds the file open.

    Raises
    ------
    NotFoundError, FormatError
        There is no such file, or it is none of these.
    """
    place = os.fspath(path)
    file = open_hdf5(place)
    try:
        with named_errors(place):
            for kind in (_Robomimic, _Minari, _Flat):
                if kind.fits(file):
                    return kind(place, file)
            names = ", ".join(file)
    except BaseException:
        file.close()
        raise
    file.close()
    raise FormatError(f"{place} holds no trajectories of robomimic, Minari or D4RL", hint=f"it has {names}")


class View:
    """Trajectories of a foreign file, as they are called there; read only.

    ``len(v)``, ``v[i]``, iteration, ``v.lengths``.
    """

    def __init__(self, path: str, file: Any) -> None:
        self.path = path
        self._file = file

    @staticmethod
    def fits(file: Any) -> bool:
        raise NotImplementedError

    @property
    def lengths(self) -> Array:
        """Number of steps of each trajectory, int64 (n,)."""
        raise NotImplementedError

    def _trajectory(self, number: int) -> ViewedTrajectory:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> ViewedTrajectory:
        if not -len(self) <= number < len(self):
            raise NotFoundError(f"{self.path} has no trajectory {number}", hint=f"it has {len(self)}, counted from 0")
        with named_errors(self.path):
            return self._trajectory(number % len(self))

    def __iter__(self) -> Iterator[ViewedTrajectory]:
        return (self[number] for number in range(len(self)))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        return view, (self.path,)

    def __repr__(self) -> str:
        return f"<View of {self.path}: {len(self)} trajectories>"


class ViewedTrajectory(Mapping[str, "ViewedRows"]):
    """One trajectory: paths to lazy rows. columns : what the file says of it as a whole."""

    def __init__(self, rows: Mapping[str, ViewedRows], columns: Mapping[str, Any]) -> None:
        self._rows = rows
        self.columns = columns

    def __getitem__(self, path: str) -> ViewedRows:
        try:
            return self._rows[path]
        except KeyError:
            raise NotFoundError(
                f"there is no field {path!r}", hint=f"there are {', '.join(self._rows) or 'none'}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class ViewedRows:
    """Rows ``[start, stop)`` of a dataset, read when they are asked for."""

    def __init__(self, dataset: Any, start: int, stop: int) -> None:
        self._dataset = dataset
        self._start, self._stop = start, stop

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._stop - self._start, *self._dataset.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        found: np.dtype[Any] = self._dataset.dtype
        return found

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, key: Any) -> Any:
        with named_errors(self._dataset.file.filename):
            return self._read(key)

    def _read(self, key: Any) -> Any:
        first, *rest = key if isinstance(key, tuple) else (key,)
        if isinstance(first, slice):
            low, high, step = first.indices(len(self))
            if step > 0:
                return self._dataset[(slice(self._start + low, self._start + max(low, high), step), *rest)]
        elif isinstance(first, (int, np.integer)):
            if not -len(self) <= first < len(self):
                raise NotFoundError(f"there is no row {first}, there are {len(self)}")
            return self._dataset[(self._start + int(first) % len(self), *rest)]
        return self._dataset[self._start : self._stop][key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[:], dtype)


def _rows(group: Any) -> Iterator[tuple[str, ViewedRows]]:
    return ((path, ViewedRows(node, 0, len(node))) for path, node in leaves(group) if node.ndim)


class _Groups(View):
    """One group for each trajectory, its number at the end of its name."""

    _prefix = ""
    _length = ""

    def __init__(self, path: str, file: Any) -> None:
        super().__init__(path, file)
        self._root = self._groups(file)
        self._names = sorted(
            (name for name in self._root if name.startswith(self._prefix)), key=lambda name: int(name.split("_")[-1])
        )
        self._lengths: Array | None = None

    @staticmethod
    def _groups(file: Any) -> Any:
        return file

    def __len__(self) -> int:
        return len(self._names)

    @property
    def lengths(self) -> Array:
        if self._lengths is None:
            with named_errors(self.path):
                self._lengths = np.array([self._root[name].attrs[self._length] for name in self._names], np.int64)
        return self._lengths

    def _trajectory(self, number: int) -> ViewedTrajectory:
        group = self._root[self._names[number]]
        return ViewedTrajectory(dict(_rows(group)), dict(group.attrs))


class _Robomimic(_Groups):
    _prefix, _length = "demo_", "num_samples"

    @staticmethod
    def fits(file: Any) -> bool:
        return (
            "data" in file and hasattr(file["data"], "items") and any(str(n).startswith("demo_") for n in file["data"])
        )

    @staticmethod
    def _groups(file: Any) -> Any:
        return file["data"]


class _Minari(_Groups):
    _prefix, _length = "episode_", "total_steps"

    @staticmethod
    def fits(file: Any) -> bool:
        return any(str(name).startswith("episode_") for name in file)


class _Flat(View):
    def __init__(self, path: str, file: Any) -> None:
        super().__init__(path, file)
        rows = len(file["actions"])
        ends = np.zeros(rows, bool)
        for name in ("terminals", "timeouts"):
            if name in file:
                ends |= file[name][()].astype(bool)
        stops = np.flatnonzero(ends) + 1
        if rows and (not len(stops) or stops[-1] != rows):
            stops = np.append(stops, rows)
        self._stops = stops.astype(np.int64)
        self._datasets = [(name, rows_._dataset) for name, rows_ in _rows(file) if len(rows_) == rows]

    @staticmethod
    def fits(file: Any) -> bool:
        return all(name in file and hasattr(file[name], "shape") for name in ("observations", "actions"))

    @property
    def lengths(self) -> Array:
        return np.diff(self._stops, prepend=0)

    def _trajectory(self, number: int) -> ViewedTrajectory:
        stop = int(self._stops[number])
        start = int(self._stops[number - 1]) if number else 0
        return ViewedTrajectory({name: ViewedRows(node, start, stop) for name, node in self._datasets}, {})
