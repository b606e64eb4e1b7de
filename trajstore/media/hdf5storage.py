"""A store inside one HDF5 file, seen through the storage port: the same reader then reads both.

The file holds the arrays as chunked datasets whose chunks are the store's own frames, byte for byte (Blosc is HDF5's
filter 32001, and it does not look beyond the Blosc buffer, so the frame's crc32c may stay behind it), and the manifest
as a dataset of bytes. Shards exist only here: a shard's frames are where they lie in the file, and its index, which
begins at ``_INDEX``, is made from HDF5's own table of chunks.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from trajstore.errors import (
    CorruptionError,
    FormatError,
    MissingDependencyError,
    NotFoundError,
    StateError,
    TrajstoreError,
)
from trajstore.format.checksum import crc32, crc32c
from trajstore.format.layout import MISSING, ROOT, ArrayLayout
from trajstore.media.readonly import ReadOnly
from trajstore.media.storage import LocalStorage, Storage

SIGNATURE = b"\x89HDF\r\n\x1a\n"
MANIFEST = "manifest"
CHECKSUM = "crc32"
BLOSC_FILTER = 32001

_INDEX = 1 << 50  # where the index of every shard begins: beyond any file


def is_hdf5(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a file that begins as HDF5 files do."""
    folder, name = os.path.split(os.path.abspath(os.fspath(path)))
    storage = LocalStorage(folder)
    return bool(name) and storage.size(name) is not None and storage.read(name, 0, len(SIGNATURE)) == SIGNATURE


def h5py_module() -> Any:
    """h5py. Raises ``MissingDependencyError``."""
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError(
            "HDF5 files need h5py", hint="pip install 'trajstore[hdf5]'", name="h5py"
        ) from error
    return h5py


@contextmanager
def reading_hdf5(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Somebody's HDF5 file, open for reading.

    Raises ``NotFoundError``, ``FormatError`` for another kind of file, ``CorruptionError`` where it cannot be read.
    """
    place = os.fspath(path)
    with named_errors(place), open_hdf5(place) as file:
        yield file


def open_hdf5(path: str) -> Any:
    """An ``h5py.File`` for reading. Raises as :func:`reading_hdf5`."""
    if not os.path.isfile(path):
        raise NotFoundError(f"there is no file {path}", hint="check the path")
    if not is_hdf5(path):
        raise FormatError(f"{path} is no HDF5 file")
    with named_errors(path):
        return h5py_module().File(path, "r")


@contextmanager
def named_errors(path: str) -> Iterator[None]:
    """What h5py raises, as errors that name the file."""
    try:
        yield
    except TrajstoreError:
        raise
    except (OSError, RuntimeError) as error:
        raise CorruptionError(f"{path} cannot be read: {error}", hint="restore it from a copy") from error
    except (KeyError, ValueError) as error:
        raise FormatError(
            f"{path} is damaged, or does not hold what its format asks for: {error}", hint="restore it from a copy"
        ) from error


def leaves(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The datasets below a group, each with its path there. Raises ``CorruptionError`` for what is none."""
    for name, node in group.items():
        if isinstance(name, str) and hasattr(node, "items"):
            yield from leaves(node, f"{prefix}{name}/")
        elif isinstance(name, str) and _is_array(node):
            yield prefix + name, node
        else:
            raise CorruptionError(f"{group.file.filename} is damaged at {group.name}: {name!r} cannot be read")


def _is_array(node: Any) -> bool:
    try:
        return hasattr(node, "ndim") and node.dtype is not None
    except TypeError:  # a dtype that NumPy has not
        return False


class Hdf5Storage(ReadOnly):
    """The port's reading half, on a file that ``exporters.hdf5`` wrote; every writing operation is refused.

    Nothing grows here, so a shard's length is what ``size`` says.
    """

    gap = LocalStorage.gap
    streams = LocalStorage.streams

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(os.fspath(path))
        folder, self._name = os.path.split(self.path)
        self._files = LocalStorage(folder)
        self._layouts: dict[str, ArrayLayout] | None = None
        self._tables: dict[str, dict[int, bytes]] = {}
        self._guard = threading.Lock()

    def __reduce__(self) -> tuple[type[Hdf5Storage], tuple[str]]:
        return Hdf5Storage, (self.path,)

    def describe(self, key: str = "") -> str:
        return f"{self.path}:/{key}" if key else self.path

    def child(self, key: str) -> Storage:
        raise NotFoundError(f"{self.path} holds one store, and no part {key!r}")

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        if key == ROOT:
            return self._manifest()[start:stop]
        if start < _INDEX:
            return self._files.read(self._name, start, stop)
        array, shard = self._split(key)
        index = self._table(array).get(shard)
        if index is None:
            raise NotFoundError(f"there is no shard {key} in {self.path}")
        return index[start - _INDEX : None if stop is None else stop - _INDEX]

    def size(self, key: str) -> int | None:
        if key == ROOT:
            return len(self._manifest())
        array, shard = self._split(key)
        index = self._table(array).get(shard)
        return None if index is None else _INDEX + len(index)

    def list(self, folder: str) -> list[str]:
        return [ROOT] if not folder else []

    def _manifest(self) -> bytes:
        h5py = h5py_module()
        try:
            with h5py.File(self.path, "r") as file:
                if MANIFEST not in file:
                    raise FormatError(
                        f"{self.path} is an HDF5 file, but not one that trajstore wrote",
                        hint="`trajstore import` takes in those of Minari, robomimic and D4RL",
                    )
                data: bytes = file[MANIFEST][:].tobytes()
                expected = int(file[MANIFEST].attrs[CHECKSUM])
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CorruptionError(f"the HDF5 file {self.path} cannot be read: {error}") from error
        if crc32(data) != expected:
            raise CorruptionError(f"the manifest in {self.path} does not match its checksum")
        return data

    def _split(self, key: str) -> tuple[ArrayLayout, int]:
        if self._layouts is None:
            nodes = json.loads(self._manifest())["consolidated_metadata"]["metadata"]
            self._layouts = {
                path: ArrayLayout.from_metadata(path, node)[0]
                for path, node in nodes.items()
                if node["node_type"] == "array"
            }
        path, _, name = key.rpartition("/")
        layout = self._layouts.get(path)
        number = layout.shard_number(name) if layout is not None else None
        if layout is None or number is None:
            raise NotFoundError(f"there is no {key} in {self.path}")
        return layout, number

    def _table(self, layout: ArrayLayout) -> dict[int, bytes]:
        """The index of each shard of an array, by number."""
        with self._guard:
            table = self._tables.get(layout.path)
            if table is None:
                table = self._tables[layout.path] = _indexes(layout, self._chunks(layout))
            return table

    def _chunks(self, layout: ArrayLayout) -> np.ndarray[Any, Any]:
        """Number, offset in the file and length of every chunk of an array, int64 (n, 3), as HDF5 knows them."""
        found: list[tuple[int, int, int]] = []

        def one(info: Any) -> None:
            if info.filter_mask:
                raise FormatError(f"a chunk of {self.describe(layout.path)} is not compressed as the manifest says")
            found.append((info.chunk_offset[0] // layout.chunk_rows, info.byte_offset, info.size))

        h5py = h5py_module()
        try:
            with h5py.File(self.path, "r") as file:
                dataset = file[layout.path]
                if dataset.chunks is not None:
                    dataset.id.chunk_iter(one)
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise CorruptionError(f"the chunks of {self.describe(layout.path)} cannot be found: {error}") from error
        return np.array(found, np.int64).reshape(-1, 3)

    def _refuse(self) -> StateError:
        return StateError(
            f"{self.path} is a sealed HDF5 file, which is only read",
            hint="`trajstore import` makes a store of it, which can be written",
        )


def _indexes(layout: ArrayLayout, chunks: np.ndarray[Any, Any]) -> dict[int, bytes]:
    shards, inner = np.divmod(chunks[:, 0], layout.chunks_per_shard)
    indexes = {}
    for shard in np.unique(shards).tolist():
        entries = np.full((layout.chunks_per_shard, 2), MISSING, "<u8")
        mine = shards == shard
        entries[inner[mine]] = chunks[mine, 1:]
        body = entries.tobytes()
        indexes[shard] = body + struct.pack("<I", crc32c(body))
    return indexes
