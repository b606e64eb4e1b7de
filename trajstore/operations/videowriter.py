"""Frames into MP4 files, an episode behind the other: H.264 in RGB, which loses nothing, unless a loss is asked for."""

from __future__ import annotations

import os
from fractions import Fraction
from typing import Any

import numpy as np

from trajstore.engine.optional import optional
from trajstore.errors import SchemaError

_FILE_BYTES = 200 << 20  # as LeRobot's own default
_KEY_FRAMES = "2"  # LeRobot's too: a random frame costs two decoded ones at most


class VideoWriter:
    """The files ``<folder>/chunk-000/file-<k>.mp4`` of one camera. A context manager; ``end`` makes the last one whole.

    Parameters
    ----------
    fps : frames a second.
    crf : 0 keeps every bit (RGB, 4:4:4); more is smaller and lossy (H.264's rate factor, YUV 4:2:0).
    """

    def __init__(self, folder: str, fps: float, crf: int = 0) -> None:
        self._av = optional("av", "video")
        self._folder = os.path.join(folder, "chunk-000")
        self._rate = Fraction(fps).limit_denominator(100_000)
        self._crf = crf
        self._container: Any = None
        self._stream: Any = None
        self._file = -1
        self._frames = 0
        os.makedirs(self._folder)

    @property
    def _path(self) -> str:
        return os.path.join(self._folder, f"file-{self._file:03d}.mp4")

    def add(self, frames: np.ndarray[Any, Any]) -> tuple[int, float, float]:
        """Append one episode's frames, uint8 (n, H, W, 3); number of the file, and seconds where they begin and end."""
        if self._container is None or os.path.getsize(self._path) > _FILE_BYTES:
            self.end()
            self._begin(*frames.shape[1:3])
        for rows in frames:
            frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(rows), format="rgb24")
            self._container.mux(self._stream.encode(frame))
        start, self._frames = self._frames, self._frames + len(frames)
        return self._file, float(start / self._rate), float(self._frames / self._rate)

    def _begin(self, height: int, width: int) -> None:
        if self._crf and (height % 2 or width % 2):
            raise SchemaError(
                f"lossy videos have even heights and widths, and these are {height} × {width}", hint="crf=0 takes any"
            )
        self._file += 1
        self._frames = 0
        self._container = self._av.open(self._path, "w")
        if self._crf:
            settings = {"crf": str(self._crf), "g": _KEY_FRAMES}
            self._stream = self._container.add_stream("libx264", rate=self._rate, options=settings)
            self._stream.pix_fmt = "yuv420p"
        else:
            settings = {"qp": "0", "g": _KEY_FRAMES, "preset": "veryfast"}
            self._stream = self._container.add_stream("libx264rgb", rate=self._rate, options=settings)
            self._stream.pix_fmt = "rgb24"
        self._stream.width, self._stream.height = width, height

    def end(self) -> None:
        """Finish the file that is being written, if one is."""
        if self._container is not None:
            self._container.mux(self._stream.encode())
            self._container.close()
            self._container = None

    def about(self) -> dict[str, Any]:
        """What LeRobot's ``info.json`` says of such a video."""
        return {
            "video.codec": "h264",
            "video.pix_fmt": "yuv420p" if self._crf else "gbrp",
            "video.fps": float(self._rate),
            "video.channels": 3,
            "video.is_depth_map": False,
            "has_audio": False,
        }
