"""Reading ``.npz`` files that may be larger than memory, and may mean harm."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from trajstore.errors import CorruptionError, FormatError, NotFoundError, StorageError
from trajstore.npz.boxes import rows
from trajstore.npz.content import Content
from trajstore.npz.header import read_header
from trajstore.npz.stream import Stream
from trajstore.npz.unpickling import Block, NotStreamableError, Unpickler

__all__ = ["Member", "NpzReader"]

_MAX_WHOLE = 2 << 30  # raw bytes of a key that cannot be streamed
_MAX_RATIO = 1040  # deflate's own limit is 1,032 to 1
_BLOCK = 1 << 20
_HINT = "the file is incomplete or damaged: restore it from a copy, or write it again"

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Member:
    """One key of the file, as its header describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    raw_bytes: int
    """Uncompressed, header included."""
    stored_bytes: int
    header_bytes: int


class NpzReader:
    """The keys of an ``.npz`` file, read one by one or element by element.

    Nothing in a file can make this run code or allocate what the file does not contain.
    Several keys can be iterated at once; large ones are inflated some MiB ahead, in a thread.
    A context manager; not safe to share between threads.

    Raises
    ------
    NotFoundError : there is no such file, or no such key in it.
    FormatError : it is no ``.npz`` file, or holds what is not read (another compression, a
        structured dtype, a pickle of anything but arrays and plain values).
    CorruptionError : it is cut off or damaged; the message names file and key.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115 closed by close()
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no file {self.path}", hint="check the path") from error
        except OSError as error:
            raise StorageError(f"could not open {self.path}: {error.strerror}", errno=error.errno) from error
        try:
            self._zip = self._open_zip()
        except BaseException:
            self._file.close()
            raise
        self._size = os.fstat(self._file.fileno()).st_size
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="trajstore-inflate")
        self._infos = {i.filename[:-4]: i for i in self._zip.infolist() if i.filename.endswith(".npy")}
        self._members: dict[str, Member] = {}

    def _open_zip(self) -> zipfile.ZipFile:
        try:
            magic = self._file.read(4)
        except OSError as error:
            raise StorageError(f"could not read {self.path}: {error.strerror}", errno=error.errno) from error
        if magic not in (b"PK\x03\x04", b"PK\x05\x06"):
            raise FormatError(
                f"{self.path} is not an npz file (it does not begin like a zip archive)",
                hint="give a file that numpy.savez or savez_compressed wrote",
            )
        try:
            return zipfile.ZipFile(self._file)
        except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
            raise CorruptionError(f"{self.path} is cut off or damaged: {error}", hint=_HINT) from error

    def __enter__(self) -> NpzReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._zip.close()
        self._file.close()

    @property
    def names(self) -> list[str]:
        """The keys, in the file's order."""
        return list(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def member(self, name: str) -> Member:
        """What the header says of a key; nothing else of it is read."""
        if name not in self._members:
            with self._opened(name):
                pass
        return self._members[name]

    def check(self) -> None:
        """Read every key to its end and compare its checksum, keeping nothing. Raises ``CorruptionError``."""
        for name in self.names:
            with self._opened(name) as (file, _):
                while file.read(_BLOCK):
                    pass

    def read(self, name: str, *, dtype: np.dtype[Any] | str | None = None) -> Array:
        """A whole key.

        An object array comes as NumPy gives it, but for boxed numbers: one of two or more
        dimensions comes as a 1-D object array of rows, as of :meth:`iterate`.
        """
        member = self.member(name)
        if not member.dtype.hasobject:
            return self._plain(name)
        if not member.shape:
            return self._whole(name)
        array: Array = np.empty(member.shape[0], object)
        try:
            for i, element in enumerate(self.iterate(name, dtype=dtype)):
                array[i] = element
        except NotStreamableError:
            return self._whole(name)
        return array

    def iterate(self, name: str, *, dtype: np.dtype[Any] | str | None = None) -> Iterator[Any]:
        """The elements of a key along its first axis, in order, one at a time.

        Memory is bounded by the largest element where the elements are arrays, or dicts and lists of
        them, as NumPy writes them. Where they are not told apart until later (elements that are tuples
        of arrays), or one refers to another far behind, ``FormatError`` is raised, perhaps after some
        were given: ``read`` takes those, up to 2 GiB.  Arrays are read-only.

        Parameters
        ----------
        dtype : what boxed rows become: an object array of two or more dimensions holds Python
            numbers where arrays were meant (``np.asarray(list_of_arrays, dtype=object)`` makes it
            when all lengths are equal).  They come back as arrays of this dtype, or of the smallest
            wider one that holds every value exactly; by default float32, int64, or bool.
        """
        member = self.member(name)
        if not member.dtype.hasobject:
            yield from self._plain_rows(name)
        elif not member.shape:
            yield self._whole(name).item()
        elif len(member.shape) == 1:
            yield from self._elements(name, blocks=False)
        else:
            wanted = None if dtype is None else np.dtype(dtype)
            yield from rows(self._elements(name, blocks=True), member.shape, wanted)

    def _elements(self, name: str, blocks: bool) -> Iterator[Any]:
        """The elements of an object array, as many as its shape says."""
        given = 0
        with self._opened(name) as (file, member):
            stream = self._stream(file, member)
            unpickler = Unpickler(stream)
            for element in unpickler.elements(blocks=blocks):
                given += len(element.values) if type(element) is Block else 1
                if given > math.prod(member.shape):
                    break
                yield element
            else:
                self._drain(file, name, stream)
            if unpickler.shape != member.shape or given != math.prod(member.shape):
                raise CorruptionError(
                    f"{self._place(name)} holds {given} elements of shape {unpickler.shape}, "
                    f"its header says {member.shape}",
                    hint=_HINT,
                )

    def _whole(self, name: str) -> Array:
        with self._opened(name) as (file, member):
            if member.raw_bytes > _MAX_WHOLE:
                raise FormatError(
                    f"{self._place(name)} cannot be read element by element, and its {member.raw_bytes:,} bytes "
                    f"are more than the {_MAX_WHOLE:,} that are loaded at once",
                    hint="load it with numpy where memory suffices, and save it in smaller files",
                )
            stream = self._stream(file, member)
            value = Unpickler(stream).load()
            self._drain(file, name, stream)
        if not isinstance(value, np.ndarray) or value.shape != member.shape:
            raise CorruptionError(f"{self._place(name)} holds no array of shape {member.shape}", hint=_HINT)
        return value

    def _plain(self, name: str) -> Array:
        with self._opened(name) as (file, member):
            array = np.empty(member.shape[::-1] if member.fortran else member.shape, member.dtype)
            if array.size:
                self._fill(file, array.reshape(-1).view(np.uint8).data, name)
            self._drain(file, name)
        return array.T if member.fortran else array

    def runs(self, name: str, counts: Iterable[int]) -> Iterator[Array]:
        """The rows of a plain key, so many at a time as ``counts`` says; those that it leaves over are passed by."""
        member = self.member(name)
        if member.dtype.hasobject or not member.shape:
            raise FormatError(f"{self._place(name)} is no plain array with rows", hint="read() it")
        if member.fortran and len(member.shape) > 1:
            array, at = self._plain(name), 0
            for count in counts:
                yield array[at : at + count]
                at += count
            return
        given = 0
        with self._opened(name) as (file, _):
            for count in counts:
                given += count
                rows = np.empty((count, *member.shape[1:]), member.dtype)
                if rows.size:
                    self._fill(file, rows.reshape(-1).view(np.uint8).data, name)
                yield rows
            if given < member.shape[0]:
                file.skip(member.raw_bytes)
            self._drain(file, name)

    def _plain_rows(self, name: str) -> Iterator[Any]:
        member = self.member(name)
        if not member.shape:
            raise FormatError(f"{self._place(name)} is one value, without elements", hint="read() it")
        for row in self.runs(name, (1 for _ in range(member.shape[0]))):
            yield row[0]

    def _fill(self, file: Content, target: memoryview, name: str) -> None:
        done = 0
        while done < len(target):
            data = file.read(min(_BLOCK, len(target) - done))
            if not data:
                raise CorruptionError(f"{self._place(name)} ends after {done:,} of {len(target):,} bytes", hint=_HINT)
            target[done : done + len(data)] = data
            done += len(data)

    def _drain(self, file: Content, name: str, stream: Stream | None = None) -> None:
        """Read to the end, which is where zipfile compares the checksum."""
        if file.read(1) or (stream is not None and stream.ahead):
            raise CorruptionError(f"{self._place(name)} has bytes beyond its end", hint=_HINT)

    def _stream(self, file: Content, member: Member) -> Stream:
        return Stream(file.read, member.raw_bytes, self._place(member.name))

    def _place(self, name: str) -> str:
        return f"{self.path}, key {name!r}"

    @contextmanager
    def _opened(self, name: str) -> Iterator[tuple[Content, Member]]:
        """A key's stream, behind its header; what goes wrong inside is one of our errors."""
        info = self._infos.get(name)
        if info is None:
            raise NotFoundError(f"{self.path} has no key {name!r}", hint=f"it has {', '.join(self.names) or 'none'}")
        if not 0 <= info.header_offset < self._size or info.compress_size > self._size:
            raise CorruptionError(f"{self._place(name)} lies beyond the file's end", hint=_HINT)
        if info.file_size > _MAX_RATIO * (info.compress_size + 1):
            raise CorruptionError(
                f"{self._place(name)} declares {info.file_size:,} bytes out of {info.compress_size:,}, "
                "more than its compression can hold",
                hint=_HINT,
            )
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FormatError(f"{self._place(name)} is encrypted or in a compression that NumPy does not write")
        try:
            file = Content(self._file.fileno(), info, self._pool)
            if name in self._members:
                file.skip(self._members[name].header_bytes)
            else:
                self._members[name] = self._header(file, info)
            yield file, self._members[name]
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise CorruptionError(f"{self._place(name)} is cut off or damaged: {error}", hint=_HINT) from error
        except FormatError as error:
            if not isinstance(error, (CorruptionError, NotStreamableError)) and self._is_damaged(info):
                raise CorruptionError(f"{self._place(name)} is damaged: its checksum differs", hint=_HINT) from error
            raise
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"could not read {self._place(name)}: {error.strerror}", errno=error.errno) from error

    def _is_damaged(self, info: zipfile.ZipInfo) -> bool:
        """Whether nonsense was met because the bytes are not those that were written."""
        try:
            Content(self._file.fileno(), info, self._pool).skip(info.file_size + 1)
        except (zipfile.BadZipFile, zlib.error, OSError):
            return True
        return False

    def _header(self, file: Content, info: zipfile.ZipInfo) -> Member:
        name = info.filename[:-4]
        try:
            shape, fortran, dtype = read_header(file)
        except ValueError as error:
            raise FormatError(f"{self._place(name)} does not begin as an npy array does: {error}") from error
        if dtype.names is not None or dtype.subdtype is not None:
            raise FormatError(f"{self._place(name)} has the structured dtype {dtype}, which is not read")
        if not all(0 <= n < 1 << 62 for n in shape) or len(shape) > 32:
            raise FormatError(f"{self._place(name)} has the impossible shape {shape}")
        if not dtype.hasobject and (not dtype.itemsize or math.prod(shape) * dtype.itemsize > info.file_size):
            raise CorruptionError(f"{self._place(name)} is shorter than its header's {dtype} {shape}", hint=_HINT)
        sizes = (info.file_size, info.compress_size, file.position)
        return Member(name, shape, dtype, fortran, *sizes)
