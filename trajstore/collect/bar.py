"""A progress bar for a collection, where somebody is looking."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TextIO

from trajstore.writer import Writer

_WIDTH = 24


class ProgressBar:
    """Shows how far a writer has come, on one line that is written over, until the block ends.

    Parameters
    ----------
    stream : where to; standard error by default. Nothing is written to what is no terminal.
    every : seconds between two looks.

    Example: ``with ProgressBar(writer): collect(writer)``
    """

    def __init__(self, writer: Writer, *, stream: TextIO | None = None, every: float = 0.5) -> None:
        self._writer = writer
        self._stream = sys.stderr if stream is None else stream
        self._every = every
        self._begun = time.monotonic()
        self._shown = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trajstore-bar", daemon=True)

    def line(self) -> str:
        """The line as it is now."""
        writer, stats = self._writer, self._writer.stats
        seconds = max(time.monotonic() - self._begun, 1e-9)
        done, target = len(writer), writer.target
        text = f"{done:,} trajectories"
        if target:
            full = min(int(_WIDTH * done / target), _WIDTH)
            text = f"[{'#' * full}{'.' * (_WIDTH - full)}] {done:,} of {target:,}"
            new = stats["trajectories"]
            if 0 < done < target and new:
                text += f", {_duration((target - done) * seconds / new)} left"
        text += f"  {stats['steps'] / seconds:,.0f} steps/s  {writer.committed:,} committed"
        return text + (f"  waited {stats['stall_seconds']:.1f} s" if stats["stall_seconds"] >= 0.1 else "")

    def _run(self) -> None:
        while not self._end.wait(self._every):
            self._show()

    def _show(self) -> None:
        line = self.line()
        self._stream.write("\r" + line.ljust(self._shown))
        self._stream.flush()
        self._shown = len(line)

    def __enter__(self) -> ProgressBar:
        if self._stream.isatty():
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread.is_alive():
            self._end.set()
            self._thread.join()
            self._show()
            self._stream.write("\n")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
