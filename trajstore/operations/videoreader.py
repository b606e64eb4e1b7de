"""Frames out of MP4 files in which episodes stand one behind the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from trajstore.engine.optional import optional
from trajstore.errors import CorruptionError, NotFoundError

#: Pixel formats in which RGB frames come back as they went in.
_EXACT = ("gbrp", "rgb24", "bgr24", "rgb0", "bgr0")


class VideoReader:
    """One camera's files, read forwards. A context manager.

    ``exact`` : whether all that was read came back bit for bit as RGB; a YUV format does not give that.
    """

    def __init__(self) -> None:
        self._av = optional("av", "video")
        self._path = ""
        self._container: Any = None
        self._frames: Iterator[Any] = iter(())
        self._ahead: Any = None
        self.exact = True

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._container is not None:
            self._container.close()

    def read(self, path: str, start: float, count: int, fps: float) -> np.ndarray[Any, Any]:
        """``count`` frames from ``start`` seconds on, uint8 (count, H, W, 3); each call goes on behind the last one."""
        try:
            if path != self._path:
                self._open(path)
            while self._ahead is not None and self._ahead.time < start - 0.5 / fps:
                self._ahead = next(self._frames, None)
            rows: list[np.ndarray[Any, Any]] = []
            while len(rows) < count and self._ahead is not None:
                self.exact &= self._ahead.format.name in _EXACT
                rows.append(self._ahead.to_ndarray(format="rgb24"))
                self._ahead = next(self._frames, None)
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no video {path}") from error
        except (self._av.error.FFmpegError, OSError) as error:
            raise CorruptionError(f"{path} cannot be decoded: {error}") from error
        if len(rows) < count:
            raise CorruptionError(f"{path} ends {count - len(rows)} frames too early for the episode at {start} s")
        return np.stack(rows)

    def _open(self, path: str) -> None:
        self.__exit__()
        self._container = None
        self._container = self._av.open(path)
        self._container.streams.video[0].thread_type = "AUTO"
        self._frames = iter(self._container.decode(video=0))
        self._ahead = next(self._frames, None)
        self._path = path
