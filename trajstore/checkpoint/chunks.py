"""The chunk files of a checkpoint: encoded, hard-linked where nothing changed, checked and decoded."""

from __future__ import annotations

import queue
import struct
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numcodecs import blosc

from trajstore.checkpoint.record import CODEC, Chunk, FlatArray
from trajstore.checkpoint.tensors import Bytes
from trajstore.errors import CorruptionError, StorageError, TrajstoreError
from trajstore.format.checksum import crc32c
from trajstore.media.shard import decode_frame
from trajstore.media.storage import Storage

_CRC = struct.Struct("<I")  # as Zarr's codec crc32c puts it behind a chunk


class Pool:
    """A few threads that run calls, and end with it; with none, calls run where they are made.

    An executor of the standard library takes no work once the interpreter is leaving, which is when the last
    checkpoint is often written.
    """

    def __init__(self, threads: int) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        for _ in range(threads):
            threading.Thread(target=_run, args=(self._calls,), name="trajstore-checkpoint", daemon=True).start()
        self._threads = threads
        self._finalizer = weakref.finalize(self, _stop, self._calls, threads)
        self._finalizer.atexit = False

    def map(self, function: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> list[Any]:
        """``[function(*item), ...]``; after an error the rest is not begun, and the first error is raised."""
        arguments = list(items)
        if len(arguments) == 1 or not self._threads:
            return [function(*item) for item in arguments]
        results: list[Any] = [None] * len(arguments)
        errors: list[BaseException] = []
        left = threading.Semaphore(0)

        def call(index: int) -> None:
            try:
                if not errors:
                    results[index] = function(*arguments[index])
            except BaseException as error:  # raised below
                errors.append(error)
            left.release()

        for index in range(len(arguments)):
            self._calls.put(lambda index=index: call(index))  # type: ignore[misc]
        for _ in arguments:
            left.acquire()
        if errors:
            error = errors[0]
            errors.clear()  # else the error, its traceback and this frame hold each other, and the files they name
            try:
                raise error
            finally:
                del error
        return results

    def close(self) -> None:
        """End the threads; calls run where they are made from then on."""
        self._threads = 0
        self._finalizer()


def _run(calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while True:
        call = calls.get()
        if call is None:
            return
        call()


def _stop(calls: queue.SimpleQueue[Callable[[], None] | None], threads: int) -> None:
    for _ in range(threads):
        calls.put(None)


def chunk_key(array: str, number: int) -> str:
    return f"{array}/c.{number}"


def write_chunk(
    storage: Storage, folder: str, array: FlatArray, number: int, data: Bytes, before: tuple[str, Chunk] | None
) -> tuple[Chunk, bool]:
    """Write one chunk's file; returns what the record says of it, and whether it is a link.

    Parameters
    ----------
    data : the chunk's bytes, fewer at the array's end.
    before : the folder of the previous checkpoint and what its record says of the same chunk, or ``None``.
    """
    raw = crc32c(data)
    key = chunk_key(f"{folder}/{array.name}", number)
    if before is not None and before[1].raw == raw and _unchanged(storage, before, array, number, data):
        try:
            storage.link(chunk_key(f"{before[0]}/{array.name}", number), key)
            return before[1], True
        except StorageError:
            pass  # no links here, or too many to one file: write it
    values = data.view(array.stored)
    if len(values) < array.chunk:
        whole = np.zeros(array.chunk, array.stored)
        whole[: len(values)] = values
        values = whole
    body = _encode(values)
    crc = crc32c(body)
    # In two pieces: joining them would hold every other thread for as long as 4 MB take to copy.
    storage.write(key, [body, _CRC.pack(crc)])
    return Chunk(len(body) + _CRC.size, crc, raw), False


def _encode(values: np.ndarray[Any, Any]) -> bytes:
    """A Blosc frame."""
    if values.dtype.kind in "bc":  # the codec takes its type size from the buffer, and some buffers do not say
        values = values.view(f"V{values.itemsize}" if values.dtype.kind == "c" else np.uint8)
    body: bytes = blosc.compress(values, CODEC.cname.encode(), CODEC.clevel, CODEC.shuffle_code, CODEC.blocksize)
    return body


def _unchanged(storage: Storage, before: tuple[str, Chunk], array: FlatArray, number: int, data: Bytes) -> bool:
    """Whether the previous chunk decodes to ``data``: equal checksums make it likely, the bytes decide."""
    try:
        return bool(np.array_equal(read_chunk(storage, before[0], array, number, before[1]), data))
    except TrajstoreError:
        return False  # damaged or gone: write it anew


def read_chunk(storage: Storage, folder: str, array: FlatArray, number: int, chunk: Chunk) -> Bytes:
    """The bytes of a chunk, without the padding of the last one. Raises ``CorruptionError`` naming the file."""
    out = np.empty(array.chunk_size(number), np.uint8)
    read_chunk_into(storage, folder, array, number, chunk, out)
    return out


def read_chunk_into(storage: Storage, folder: str, array: FlatArray, number: int, chunk: Chunk, out: Bytes) -> None:
    """Check one chunk's file against the record and decode it into ``out``, which ends where the array does."""
    key = chunk_key(f"{folder}/{array.name}" if folder else array.name, number)
    try:
        frame = np.frombuffer(storage.read(key), np.uint8)  # of which parts are views
        # Whether the frame is what its own checksum says, decoding sees; here, whether it is the one that was written.
        if len(frame) != chunk.length or int.from_bytes(frame[-_CRC.size :].tobytes(), "little") != chunk.crc:
            raise CorruptionError("it is not the file that the record names")
        whole = out
        if len(out) < array.chunk * array.itemsize:
            whole = np.empty(array.chunk * array.itemsize, np.uint8)
        decode_frame(frame, whole)
        if whole is not out:
            out[:] = whole[: len(out)]
        if crc32c(out) != chunk.raw:
            raise CorruptionError("it decodes to other bytes than were saved")
    except (CorruptionError, LookupError) as error:
        raise CorruptionError(
            f"{storage.describe(key)} is damaged: {getattr(error, 'message', error)}",
            hint="restore steps back to the newest checkpoint that verifies",
        ) from error
