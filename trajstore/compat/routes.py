"""``load_routes``: what analysis scripts put in the place of ``np.load("routes.npz", allow_pickle=True)``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from trajstore.dataset import Dataset
from trajstore.dataset import open as open_dataset
from trajstore.errors import FormatError, NotFoundError
from trajstore.routes import META, RoutesView, ordered

__all__ = ["RoutesColumn", "RoutesFile", "load_routes"]

Array = np.ndarray[Any, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]


def load_routes(path: str | os.PathLike[str] | Dataset) -> RoutesFile:
    """Open routes as ``np.load`` opens a ``routes.npz``, decoding only what is touched.

    ``data["routes_seed"]`` is an array; ``data["routes_obs"]`` a column: ``column[i]`` one route's array,
    ``column[a:b]`` and ``column[mask]`` columns again; iterating reads ahead; ``np.asarray(column)`` is the
    object array that ``np.load`` gives. ``data["meta"].item()`` is the dict.

    Parameters
    ----------
    path : a store (finished, or being written: what is committed now is seen), the folder of a collector
        (``--ckpt_dir``), several stores under one folder, or a dataset.

    Raises
    ------
    NotFoundError, FormatError : there is no store, or it cannot be read.
    """
    if isinstance(path, Dataset):
        return RoutesFile(path)
    if os.path.isfile(path):
        raise FormatError(
            f"{os.fspath(path)} is a file, not a store", hint="np.load reads it, `trajstore import` makes a store of it"
        )
    if os.path.isdir(os.path.join(path, "shards")) and not any(name.endswith(".zarr") for name in os.listdir(path)):
        raise NotFoundError(
            f"{os.fspath(path)} holds shards, and no store", hint="`trajstore import` makes a store of them"
        )
    return RoutesFile(open_dataset(path))


class RoutesFile(Mapping[str, Any]):
    """Looks like NumPy's ``NpzFile``: ``files``, ``[key]``, ``in``, iteration over keys, ``with``, ``close``."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._view = RoutesView(dataset)
        self.files: list[str] = [*self._view.keys, META]

    def __getitem__(self, key: str) -> Any:
        if key == META:
            meta = np.empty((), object)
            meta[()] = self._view.meta()
            return meta
        if key not in self.files:
            raise _MissingKeyError(f"there is no key {key!r}", hint="there are " + ", ".join(ordered(self.files)))
        if self._view.is_column(key):
            return self._view.column(key).copy()
        return RoutesColumn(self._view, key, np.arange(len(self._view), dtype=np.int64))

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __contains__(self, key: object) -> bool:
        return key in self.files

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> RoutesFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<RoutesFile of {len(self._view)} routes with keys {', '.join(self.files)}>"


class _MissingKeyError(NotFoundError, KeyError):
    """``np.load(...)[key]`` raises ``KeyError``, and ``Mapping.get`` relies on it."""


class RoutesColumn:
    """One object key: looks like the 1-D object array that ``np.load`` gives, and decodes what is touched."""

    dtype = np.dtype(object)
    ndim = 1

    def __init__(self, view: RoutesView, key: str, numbers: Ints) -> None:
        self._view = view
        self._numbers = numbers
        self.key = key

    @property
    def shape(self) -> tuple[int]:
        return (len(self._numbers),)

    @property
    def size(self) -> int:
        return len(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, tuple) and len(key) == 1:
            key = key[0]
        chosen = self._numbers[key]  # IndexError as an array raises it
        if np.ndim(chosen) == 0:
            return next(iter(self._view.elements(self.key, np.array([chosen], np.int64))))
        return RoutesColumn(self._view, self.key, chosen)

    def __iter__(self) -> Iterator[Any]:
        return self._view.elements(self.key, self._numbers)

    def tolist(self) -> list[Any]:
        return list(self)

    def copy(self) -> Array:
        return np.asarray(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("a column is decoded into new memory; np.asarray(column) makes that copy")
        array = np.empty(len(self), object)
        for i, element in enumerate(self):
            array[i] = element
        return array if dtype is None else array.astype(dtype)

    def __repr__(self) -> str:
        return f"<RoutesColumn {self.key!r} of {len(self)} routes>"
