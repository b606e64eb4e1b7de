"""Writing ``.npz`` files of any size in little memory."""

from __future__ import annotations

import errno
import io
import os
import uuid
import zlib
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import numpy as np
from numpy.lib import format as npy

from trajstore.errors import AlreadyExistsError, SchemaError, StateError, StorageError
from trajstore.media.storage import LocalStorage, local_path
from trajstore.npz import archive
from trajstore.npz.deflate import Deflater
from trajstore.npz.pickling import object_array

__all__ = ["NpzWriter"]

_BUFFER = 1 << 20


class NpzWriter:
    """Writes keys one after the other; the file appears under its name when all of it is durable.

    A context manager: left without an exception it publishes, otherwise nothing is left behind.
    Memory is a few MiB for each core, and the element being written.

    Parameters
    ----------
    path : of the file, whose missing folders are made.
    compress : deflate at zlib's level 6, as ``numpy.savez_compressed``; else stored.
    tmp_dir : where the unfinished file lies; by default beside the target. From another file
        system it is copied when it is finished.
    atomic : write under another name and rename. Without, an unfinished file can be seen under ``path``.
    overwrite : replace a file that stands at ``path``.
    threads : that compress; by default as many as this process may use cores. The bytes do not depend on it.

    Raises
    ------
    AlreadyExistsError : a file stands at ``path``.
    StorageError : a full disk, or another refusal of the operating system.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        compress: bool = True,
        tmp_dir: str | os.PathLike[str] | None = None,
        atomic: bool = True,
        overwrite: bool = False,
        threads: int | None = None,
    ) -> None:
        self.path = local_path(path)
        folder, name = os.path.split(self.path)
        self._target = LocalStorage(folder)
        self._name = name
        self._atomic = atomic
        self._overwrite = overwrite
        self._refuse_existing()
        self._target.make_root()
        aside = LocalStorage(os.fspath(tmp_dir)) if tmp_dir is not None and atomic else self._target
        aside.make_root()
        self._storage, self._key = aside, f".{name}.{uuid.uuid4().hex}.tmp" if atomic else name
        if not atomic:
            self._target.remove(name)
        self._storage.write(self._key, [], sync=False)
        self._buffer = bytearray()
        self._written = 0
        self._entries: list[archive.Entry] = []
        self._deflater = Deflater(threads=threads) if compress else None
        self._open = True

    def __enter__(self) -> NpzWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def array(self, name: str, array: Any) -> None:
        """A plain array, as ``np.save`` writes it. Raises ``SchemaError`` for object arrays."""
        array = np.asarray(array)
        if array.dtype.hasobject:
            raise SchemaError(f"key {name!r} is an object array", hint="objects() writes those")
        memory = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data] if array.size else []
        self._member(name, _npy_header(array.dtype, array.shape), memory)

    def rows(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], blocks: Iterable[Any]) -> None:
        """A plain array of ``shape`` whose rows come in blocks (n, *shape[1:]); ``SchemaError`` if they differ."""
        self._member(name, _npy_header(dtype, shape), _row_bytes(name, dtype, shape, blocks))

    def scalar_object(self, name: str, value: object) -> None:
        """One Python value as a 0-d object array: what ``np.load(...)[name].item()`` gives back."""
        self._member(name, _npy_header(np.dtype(object), ()), object_array((), [value], f"key {name!r}"))

    def objects(self, name: str, count: int, elements: Iterable[object]) -> None:
        """A 1-D object array of ``count`` elements, pickled while they come.

        Elements are arrays, dicts, lists and other plain values.
        Raises ``SchemaError`` for any other, and if they are not as many as ``count``.
        """
        pieces = object_array((count,), _counted(name, count, elements), f"key {name!r}")
        self._member(name, _npy_header(np.dtype(object), (count,)), pieces)

    def close(self) -> None:
        """Publish the file. Nothing happens if it is published or given up already."""
        if not self._open:
            return
        try:
            self._put(archive.directory(self._entries, self._written + len(self._buffer)))
            self._storage.append(self._key, bytes(self._buffer), sync=True)
            if self._atomic:
                self._publish()
            self._target.sync_folder("")
        except BaseException:
            self.abort()
            raise
        self._end()

    def abort(self) -> None:
        """Give the file up and leave nothing behind."""
        if self._open:
            self._end()
            self._storage.remove(self._key)

    def _end(self) -> None:
        self._open = False
        if self._deflater is not None:
            self._deflater.close()

    def _refuse_existing(self) -> None:
        if not self._overwrite and os.path.lexists(self.path):
            raise AlreadyExistsError(f"{self.path} exists", hint="give another name, or overwrite=True")

    def _publish(self) -> None:
        self._refuse_existing()
        if self._storage is not self._target:
            try:
                self._storage.rename(self._key, os.path.relpath(self.path, self._storage.root))
                return
            except StorageError as error:
                if error.errno != errno.EXDEV:
                    raise
            source, key = self._storage, self._key
            self._storage, self._key = self._target, f".{self._name}.{uuid.uuid4().hex}.tmp"
            try:
                _copy(source, key, self._storage, self._key)
            finally:
                source.remove(key)
        self._target.rename(self._key, self._name)

    # --- members ------------------------------------------------------------------------------

    def _member(self, name: str, head: bytes, pieces: Iterable[bytes | memoryview]) -> None:
        if not self._open:
            raise StateError(f"{self.path} is written or given up already", hint="make a new NpzWriter")
        name += ".npy"
        if any(entry.name == name for entry in self._entries):
            raise SchemaError(f"{self.path} has the key {name[:-4]!r} already")
        try:
            self._entries.append(self._write_member(name, head, pieces))
        except BaseException:
            self.abort()
            raise

    def _write_member(self, name: str, head: bytes, pieces: Iterable[bytes | memoryview]) -> archive.Entry:
        method = archive.STORED if self._deflater is None else archive.DEFLATED
        offset = self._written + len(self._buffer)
        self._put(archive.header(name, method))
        start = self._written + len(self._buffer)
        crc, raw = 0, 0
        for piece in _joined(head, pieces):
            crc = zlib.crc32(piece, crc)
            raw += len(piece)
            self._put_all([piece] if self._deflater is None else self._deflater.compress(piece))
        if self._deflater is not None:
            self._put_all(self._deflater.finish())
        entry = archive.Entry(name, method, offset, crc, self._written + len(self._buffer) - start, raw)
        self._put(archive.descriptor(entry))
        return entry

    def _put_all(self, pieces: Iterable[bytes | memoryview]) -> None:
        for piece in pieces:
            self._put(piece)

    def _put(self, data: bytes | memoryview) -> None:
        if len(self._buffer) + len(data) > _BUFFER:
            self._storage.append(self._key, bytes(self._buffer), sync=False)
            self._written += len(self._buffer)
            self._buffer.clear()
        if len(data) > _BUFFER:
            self._storage.append(self._key, data, sync=False)
            self._written += len(data)
        else:
            self._buffer += data


def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    head = io.BytesIO()
    fields = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(head, fields)
    return head.getvalue()


def _joined(head: bytes, pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Small pieces gathered, so that a pickle's opcodes do not each take the way to the disk."""
    gathered = bytearray(head)
    for piece in pieces:
        if len(piece) < 4096:
            gathered += piece
            if len(gathered) < 1 << 16:
                continue
            piece = b""
        yield bytes(gathered)
        gathered.clear()
        if len(piece):
            yield piece
    yield bytes(gathered)


def _counted(name: str, count: int, elements: Iterable[object]) -> Iterator[object]:
    given = 0
    for element in elements:
        given += 1
        if given <= count:
            yield element
    if given != count:
        raise SchemaError(f"key {name!r} was given {given} elements, {count} were announced")


def _copy(source: LocalStorage, key: str, target: LocalStorage, name: str) -> None:
    target.write(name, [], sync=False)
    size = source.size(key) or 0
    for start in range(0, size, _BUFFER):
        stop = min(start + _BUFFER, size)
        target.append(name, source.read(key, start, stop), sync=stop == size)


def _row_bytes(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], blocks: Iterable[Any]) -> Iterator[memoryview]:
    rows = 0
    for block in blocks:
        rows += len(block)
        if block.dtype != dtype or block.shape[1:] != shape[1:]:
            raise SchemaError(f"key {name!r} got rows {block.dtype} {block.shape[1:]}, expected {dtype} {shape[1:]}")
        if block.size:
            yield np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
    if rows != shape[0]:
        raise SchemaError(f"key {name!r} got {rows} rows, expected {shape[0]}")
