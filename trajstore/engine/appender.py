"""Rows in, chunks out: the buffers between the caller's thread and the encoders of one array."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from trajstore.engine.arraywriter import ArrayWriter, Misfit
from trajstore.engine.budget import Budget
from trajstore.engine.buffers import BLOCK_BYTES, Buffer, Buffers
from trajstore.engine.encoders import Encoders, Job

#: NumPy lets go of the interpreter's lock to copy so many values, and waits longer than it copies to get it back.
_LOCK_KEPT = 500


class _Run:
    """A stretch of rows in memory, which may be used again when it is full and no job reads it."""

    __slots__ = ("_bytes", "buffer", "first", "full", "jobs", "memory")

    def __init__(self, memory: Buffer, shape: tuple[int, ...], dtype: np.dtype[Any], first: int) -> None:
        self.memory = memory
        self.buffer: np.ndarray[Any, Any] = np.ndarray(shape, dtype, memory.data)
        self._bytes = memory.data
        self.first = first
        self.jobs = 0
        self.full = False

    def fill(self, at: int, rows: Any) -> None:
        """Copy rows, or anything that assigns to such an array, to the place ``at``."""
        buffer = self.buffer
        large = type(rows) is np.ndarray and rows.size >= _LOCK_KEPT
        if large and rows.dtype == buffer.dtype and rows.flags.c_contiguous:
            start = at * buffer.strides[0]
            self._bytes[start : start + rows.nbytes] = rows.reshape(-1).view(np.uint8).data
        else:
            buffer[at : at + len(rows)] = rows


class Appender:
    """Takes rows in the caller's thread with one copy and has them encoded in the background.

    Parameters
    ----------
    dtype : of the rows given, (n, *row_shape); the writer's layout says how they are stored.
    first : the absolute row at which this session begins.
    on_misfit : makes another ``ArrayWriter`` when rows cannot be packed; called once.

    Notes
    -----
    ``write`` and ``freeze`` are called under the writer's lock, never at once.
    """

    def __init__(
        self,
        target: ArrayWriter,
        dtype: np.dtype[Any],
        first: int,
        *,
        encoders: Encoders,
        budget: Budget,
        buffers: Buffers,
        clock: Callable[[], float],
        on_misfit: Callable[[], ArrayWriter] | None = None,
    ) -> None:
        self.target = target
        self.replaced: ArrayWriter | None = None
        self.dtype = dtype
        self.row = first
        self._first = first
        self.row_bytes = dtype.itemsize * max(int(np.prod(target.layout.row_shape)), 0)
        self._encoders = encoders
        self._budget = budget
        self._buffers = buffers
        self._clock = clock
        self._on_misfit = on_misfit
        self._run_rows = self._rows_in_run()
        self._run: _Run | None = None
        self._at = 0  # row within the run
        self._submitted = first  # rows below are with the encoders, a multiple of the chunk or the session's first row
        self._frozen = first  # rows below are with the encoders, the last chunk perhaps not whole
        self._jobs: deque[Job] = deque()
        self._failed: list[tuple[_Run, int, int, int]] = []
        self._guard = threading.Lock()

    def _rows_in_run(self) -> int:
        layout = self.target.layout
        rows = layout.chunk_rows
        while rows * 2 <= layout.shard_rows and rows * 2 * self.row_bytes <= BLOCK_BYTES:
            rows *= 2
        return rows

    # -- in the caller's thread ------------------------------------------------------------------------------------

    def write(self, rows: Any) -> None:
        """Append rows (n, *row_shape) of this dtype, or anything that assigns to such an array."""
        count = len(rows)
        run, at = self._run, self._at
        if run is not None and at + count < self._run_rows:
            run.fill(at, rows)
            self._at = at + count
            self.row += count
            return
        done = 0
        while done < count:
            run = self._run or self._begin()
            step = min(count - done, self._run_rows - self._at)
            run.fill(self._at, rows[done : done + step])
            self._at += step
            self.row += step
            done += step
            if self._at == self._run_rows:
                self._turn(run)

    def _begin(self) -> _Run:
        first = self.row - self.row % self._run_rows
        self._at = self.row - first
        memory = self._buffers.take(self._run_rows * self.row_bytes)
        self._run = run = _Run(memory, (self._run_rows, *self.target.layout.row_shape), self.dtype, first)
        if self._at:
            run.buffer[: self._at] = self.target.layout.fill
        return run

    def _turn(self, run: _Run) -> None:
        self._submit(run, run.first + self._run_rows)
        self._run = None
        self._at = 0

    def _submit(self, run: _Run, stop: int) -> None:
        chunk = self.target.layout.chunk_rows
        start = max(self._submitted - self._submitted % chunk, run.first)
        whole = stop - stop % chunk
        if stop > start:
            amount = (stop - start) * self.row_bytes
            self._budget.acquire(amount, self._clock)
            with self._guard:
                run.jobs += 1
                run.full = stop == run.first + self._run_rows  # not before the last job counts: its buffer is in use
            while self._jobs and self._jobs[0].succeeded:
                self._jobs.popleft()
            self._jobs.append(self._encoders.submit(self._encode, run, start, stop, amount))
        self._submitted = max(self._submitted, whole)

    def freeze(self) -> list[Job]:
        """Hand over every row written so far; the jobs to wait for before they can be flushed."""
        self._try_again()
        if self._run is not None and self.row > self._frozen:
            self._submit(self._run, self.row)
            self._frozen = self.row
        return list(self._jobs)

    def _try_again(self) -> None:
        """Hand over once more what could not be encoded, for want of memory say."""
        # In this order: a job is in ``_failed`` before it has its error, so none that is dropped here is not there.
        self._jobs = deque(job for job in self._jobs if job.error is None)
        with self._guard:
            failed, self._failed = self._failed, []
        for run, start, stop, amount in failed:
            self._budget.acquire(amount, self._clock)
            self._jobs.append(self._encoders.submit(self._encode, run, start, stop, amount))

    def leap(self, row: int) -> None:
        """Go on at ``row``, the beginning of a later shard; what lies between is a gap."""
        if self._run is not None:
            self._submit(self._run, self.row)
            self._run = None
            self._at = 0
        self.row = self._submitted = self._frozen = row

    def preset(self, rows: np.ndarray[Any, Any]) -> None:
        """Rows before the first one of an empty buffer, where the array begins in the middle of a run."""
        run = self._run or self._begin()
        run.buffer[: self._at] = rows[run.first : run.first + self._at]

    @property
    def taken_bytes(self) -> int:
        """Raw bytes that the encoders were given."""
        return (self._frozen - self._first) * self.row_bytes

    def settled(self) -> tuple[ArrayWriter, ArrayWriter | None]:
        """Where the rows go, and where they went before a misfit, if there was one."""
        with self._guard:
            return self.target, self.replaced

    # -- in the encoders' threads ----------------------------------------------------------------------------------

    def _encode(self, run: _Run, start: int, stop: int, amount: int) -> None:
        begun = self._clock()
        try:
            rows = run.buffer[start - run.first : stop - run.first]
            target = self.target
            try:
                target.encode(rows, start)
            except Misfit:
                self._replace_target(target)
                self.target.encode(rows, start)
        except BaseException:
            with self._guard:
                self._failed.append((run, start, stop, amount))  # the job counts on: its buffer is wanted again
            raise
        else:
            with self._guard:
                run.jobs -= 1
                done = run.full and not run.jobs
            if done:
                self._buffers.give(run.memory)
        finally:
            self._budget.release(amount, self._clock() - begun)

    def _replace_target(self, misfit: ArrayWriter) -> None:
        with self._guard:
            if self.target is misfit:
                if self._on_misfit is None:
                    raise Misfit(misfit.layout.path)
                self.replaced, self.target = misfit, self._on_misfit()
