"""The threads that encode: in order, to the end, and with their errors told."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

import trajstore
from trajstore.engine.budget import Budget
from trajstore.engine.encoders import Encoders, Job, finish

PATIENCE = 60.0


def test_calls_are_begun_in_their_order_and_waited_for() -> None:
    done: list[int] = []
    encoders = Encoders(1)
    jobs = [encoders.submit(done.append, number) for number in range(100)]
    finish(jobs)
    assert done == list(range(100)) and all(job.succeeded for job in jobs)
    encoders.close()


def test_the_first_error_is_raised_once_all_have_ended() -> None:
    gate, ended = threading.Event(), threading.Event()

    def slow() -> None:
        assert gate.wait(PATIENCE)
        ended.set()

    def fail(what: str) -> None:
        gate.set()
        raise ValueError(what)

    encoders = Encoders(2)
    jobs = [encoders.submit(slow), encoders.submit(fail, "first"), encoders.submit(fail, "second")]
    with pytest.raises(ValueError, match="first"):
        finish(jobs)
    assert ended.is_set() and [job.succeeded for job in jobs] == [True, False, False]
    encoders.close()


def test_a_job_that_is_over_keeps_nothing_of_what_it_was_given() -> None:
    class Rows:
        pass

    rows = Rows()
    kept = weakref.ref(rows)
    job = Job(id, rows)
    del rows
    assert kept() is not None and not job.succeeded
    job.run()
    assert kept() is None and job.succeeded


def test_closing_ends_the_threads_and_drops_what_nobody_has_begun() -> None:
    begun, gate = threading.Event(), threading.Event()
    done: list[int] = []

    def hold() -> None:
        begun.set()
        assert gate.wait(PATIENCE)

    class Opens:
        """Stands before the threads that are waited for."""

        def join(self) -> None:
            gate.set()

    encoders = Encoders(1)
    held = encoders.submit(hold)
    assert begun.wait(PATIENCE)
    dropped = encoders.submit(done.append, 1)
    encoders._threads.insert(0, Opens())  # type: ignore[arg-type]
    encoders.close()
    assert held.succeeded and not done and not dropped.succeeded
    assert not encoders._threads[1].is_alive()


def test_a_full_queue_makes_the_caller_wait_for_room() -> None:
    budget = Budget(10)
    budget.acquire(100, time.monotonic)  # more than the limit, and alone
    taken = threading.Event()

    def take() -> None:
        budget.acquire(4, time.monotonic)
        taken.set()

    thread = threading.Thread(target=take)
    thread.start()
    assert not budget.has_room(4) and not taken.is_set()
    budget.release(100, 2.0)
    thread.join(PATIENCE)
    assert taken.is_set() and (budget.used, budget.peak) == (4, 100)
    assert (budget.encoded_bytes, budget.encode_seconds) == (100, 2.0)


def test_a_writer_that_nobody_closed_still_has_its_threads_at_exit(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, trajstore\n"
        "writer = trajstore.create(sys.argv[1], commit_every=None)\n"
        "writer.append({'obs': np.arange(300_000).reshape(300, 1000)})\n"
    )
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path / "s")], check=True, cwd=root)
    assert trajstore.open(tmp_path / "s")[0]["obs"][299, 999] == 299_999
