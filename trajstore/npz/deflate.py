"""One deflate stream, compressed on all cores.

Blocks of 1 MiB are compressed independently but for the window: each begins
with the last 32 KiB of the one before as its dictionary, and ends on a byte
boundary (``Z_SYNC_FLUSH``), so that the concatenation is one valid stream of
about the size that a single pass gives.  This is how pigz does it.  zlib
releases the interpreter lock.  The bytes do not depend on the number of threads.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from trajstore.engine import crew

__all__ = ["Deflater"]

_LEVEL = 6  # as np.savez_compressed has it
_BLOCK = 1 << 20
_WINDOW = 1 << 15


class Deflater:
    """Compresses any number of streams, one after the other; memory is about ``4 + 4 * threads`` MiB.

    Parameters
    ----------
    threads : by default as many as this process may use cores.
    """

    def __init__(self, threads: int | None = None) -> None:
        threads = threads or crew.SIZE
        self._ahead = 2 * threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="trajstore-deflate")
        self._pending: deque[Future[bytes]] = deque()
        self._block = bytearray()
        self._window = b""

    def compress(self, data: bytes | memoryview) -> Iterator[bytes]:
        """Take ``data``, which may be changed afterwards; gives what is ready. Must be exhausted."""
        start = 0
        while start < len(data):
            piece = data[start : start + _BLOCK - len(self._block)]
            self._block += piece
            start += len(piece)
            if len(self._block) == _BLOCK:
                self._submit(zlib.Z_SYNC_FLUSH)
                while len(self._pending) > self._ahead:
                    yield self._pending.popleft().result()

    def finish(self) -> Iterator[bytes]:
        """End the stream; the next ``compress`` begins another. Must be exhausted."""
        self._submit(zlib.Z_FINISH)
        self._window = b""
        while self._pending:
            yield self._pending.popleft().result()

    def close(self) -> None:
        """Let go of the threads; what was not finished is lost."""
        self._pending.clear()
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, flush: int) -> None:
        block = bytes(self._block)
        self._block.clear()
        self._pending.append(self._pool.submit(_deflate, block, self._window, flush))
        self._window = block[-_WINDOW:]


def _deflate(block: bytes, window: bytes, flush: int) -> bytes:
    if window:
        stream = zlib.compressobj(_LEVEL, zlib.DEFLATED, -15, zdict=window)
    else:
        stream = zlib.compressobj(_LEVEL, zlib.DEFLATED, -15)
    return stream.compress(block) + stream.flush(flush)
