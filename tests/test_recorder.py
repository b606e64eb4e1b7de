"""The step recorder against a loop over environments, whatever the memory, and what it says when something is wrong."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore.collect import Recorder, background
from trajstore.collect.boundaries import GIVEN, NEXT_ROW, NOWHERE, Boundaries
from trajstore.collect.scratch import SpillLog
from trajstore.errors import SchemaError, StateError, StorageError
from trajstore.format.layout import SCRATCH


class Reference:
    """One list of rows for each environment; slow and plain."""

    def __init__(self, num_envs: int, *, next_step: bool, boundary: bool) -> None:
        self.next_step, self.boundary = next_step, boundary
        self.rows: list[list[Any]] = [[] for _ in range(num_envs)]
        self.resetting = [False] * num_envs
        self.waiting: list[Any] = [None] * num_envs  # an episode that ended and lacks its final observation
        self.done: list[Any] = []

    def step(self, t: int, obs: Any, reward: Any, flags: Any, active: Any, fresh: Any, final: Any, seed: Any) -> None:
        terminated, truncated = flags
        for n, rows in enumerate(self.rows):
            if self.waiting[n] is not None:
                episode, self.waiting[n] = self.waiting[n], None
                self.close(n, *episode, None if fresh[n] else obs[n])
            if rows and (fresh[n] or not active[n]):
                self.rows[n] = []
                self.close(n, rows, False, True, t - 1, None if fresh[n] else obs[n])
            rows = self.rows[n]
            real = active[n] and (not self.resetting[n] or fresh[n])
            self.resetting[n] = False
            if not real:
                continue
            rows.append((obs[n].copy(), reward[n], seed[n]))
            if terminated[n] or truncated[n]:
                self.rows[n] = []
                self.resetting[n] = self.next_step
                if self.next_step and self.boundary:
                    self.waiting[n] = (rows, terminated[n], truncated[n], t)
                else:
                    self.close(n, rows, terminated[n], truncated[n], t, None if final is None else final[n])

    def close(self, n: int, rows: Any, terminated: bool, truncated: bool, last: int, final: Any) -> None:
        obs = [row[0] for row in rows]
        if self.boundary and final is None:
            rows, terminated, truncated, last = rows[:-1], False, True, last - 1
            if not rows:
                return
        elif self.boundary:
            obs.append(final.copy())
        self.done.append((last, n, np.array(obs), [row[1] for row in rows], rows[-1][2], terminated, truncated))

    def finish(self, t: int, final: Any) -> None:
        for n, rows in enumerate(self.rows):
            if self.waiting[n] is not None:
                self.close(n, *self.waiting[n], None if final is None else final[n])
            if rows:
                self.close(n, rows, False, True, t - 1, None if final is None else final[n])


def compare(path: Path, reference: Reference) -> None:
    ds = trajstore.open(path)
    assert len(ds) == len(reference.done)
    for n in range(len(reference.rows)):
        stored = np.flatnonzero(ds.table["env"] == n).tolist()
        wanted = sorted((e for e in reference.done if e[1] == n), key=lambda episode: episode[0])
        assert len(stored) == len(wanted)
        for i, (_, _, obs, reward, seed, terminated, truncated) in zip(stored, wanted):
            np.testing.assert_array_equal(ds[i]["obs/x"][:], obs)
            np.testing.assert_array_equal(ds[i]["reward"][:], reward)
            assert ds.table["seed"][i] == seed
            assert (ds.table["terminated"][i], ds.table["truncated"][i]) == (terminated, truncated)


@pytest.mark.parametrize("memory_bytes", [1, 20_000, 1 << 24])
@pytest.mark.parametrize("observations", ["T", "T+1"])
@pytest.mark.parametrize("autoreset", ["same_step", "next_step"])
def test_recording_is_a_loop_over_environments(
    tmp_path: Path, autoreset: str, observations: str, memory_bytes: int
) -> None:
    rng = np.random.default_rng([len(autoreset), len(observations), memory_bytes])
    num_envs, boundary = 7, observations == "T+1"
    reference = Reference(num_envs, next_step=autoreset == "next_step", boundary=boundary)
    active, seed = np.ones(num_envs, bool), np.arange(num_envs)
    with trajstore.create(tmp_path / "s") as writer:
        recorder = Recorder(writer, num_envs, autoreset=autoreset, observations=observations, memory_bytes=memory_bytes)
        for t in range(400):
            obs, reward = rng.standard_normal((num_envs, 3)).astype(np.float32), rng.standard_normal(num_envs)
            likely = 0.02 if t % 100 < 50 else 0.3
            flags = rng.random(num_envs) < likely, rng.random(num_envs) < likely
            final = rng.standard_normal((num_envs, 3)).astype(np.float32)
            fresh = np.zeros(num_envs, bool)
            if t % 10 == 3:
                fresh = rng.random(num_envs) < 0.3
                recorder.reset(fresh)
            if t % 23 == 5:
                stopped = rng.random(num_envs) < 0.3
                recorder.stop(stopped)
                active = active & ~stopped
            elif t % 23 == 15:
                recorder.start(np.arange(num_envs))
                active = np.ones(num_envs, bool)
            chosen = rng.integers(0, num_envs, 2)
            seed = seed.copy()
            seed[chosen] = t
            recorder.set(chosen, seed=t) if t else recorder.set(seed=seed)
            same = boundary and autoreset == "same_step"
            recorder.step(
                obs={"x": obs},
                reward=reward,
                terminated=flags[0],
                truncated=flags[1],
                final_obs={"x": final} if same else None,
            )
            reference.step(t, obs, reward, flags, active, fresh, final if same else None, seed)
            for array in (obs, reward, *flags, final):
                array[...] = 0  # the recorder has its own copies
        last = rng.standard_normal((num_envs, 3)).astype(np.float32) if memory_bytes > 1 else None
        reference.finish(400, last)
        recorder.close(final_obs=None if last is None else {"x": last})
        assert (recorder.stats["spilled_bytes"] > 0) == (memory_bytes == 1)
    compare(tmp_path / "s", reference)


def test_unfinished_episodes_that_memory_cannot_hold_wait_on_disk(tmp_path: Path) -> None:
    """They alone exceed the bound many times over: nothing waits for ever, and nothing is lost."""
    num_envs, steps = 32, 300
    with trajstore.create(tmp_path / "s") as writer:
        scratch = tmp_path / "s" / SCRATCH
        with Recorder(writer, num_envs, memory_bytes=64 << 10) as recorder:
            for t in range(steps):
                frame = (
                    np.full((num_envs, 8, 8), t % 256, np.uint8) + np.arange(num_envs, dtype=np.uint8)[:, None, None]
                )
                ends = np.full(num_envs, t == steps - 1) & (np.arange(num_envs) > 2)
                recorder.step(obs=frame, step=np.full(num_envs, t), terminated=ends)
            recorder.flush()
            assert len(writer) == num_envs - 3
            stats = recorder.stats
            assert stats["spilled_bytes"] > 0
            assert stats["unfinished_peak_bytes"] + stats["ring_bytes"] < 3 * (64 << 10)
            assert list(scratch.iterdir())
        assert not list(scratch.iterdir())
    ds = trajstore.open(tmp_path / "s")
    assert len(ds) == num_envs
    for i in range(num_envs):
        env = int(ds.table["env"][i])
        np.testing.assert_array_equal(ds[i]["step"][:], np.arange(steps))
        np.testing.assert_array_equal(ds[i]["obs"][:, 0, 0], (np.arange(steps) + env).astype(np.uint8))


def test_scratch_of_a_dead_session_is_removed_at_the_next_resume(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s") as writer:
        writer.append({"x": np.arange(3)})
    left = tmp_path / "s" / SCRATCH
    left.mkdir(parents=True)
    (left / "dead.0").write_bytes(b"rows")
    trajstore.create(tmp_path / "s", resume=True).close()
    assert not left.exists()


@pytest.mark.parametrize("on_close", ["truncate", "drop"])
def test_what_is_unfinished_at_the_end(tmp_path: Path, on_close: str) -> None:
    with trajstore.create(tmp_path / "s") as writer, Recorder(writer, 3, on_close=on_close) as recorder:
        for t in range(5):
            recorder.step(x=np.arange(3) + 10 * t, terminated=np.arange(3) == t - 2)
    ds = trajstore.open(tmp_path / "s")
    found = [(int(ds.table["env"][i]), ds[i]["x"][:].tolist(), bool(ds.table["truncated"][i])) for i in range(len(ds))]
    ended = [(0, [0, 10, 20], False), (1, [1, 11, 21, 31], False), (2, [2, 12, 22, 32, 42], False)]
    assert found == ended + ([(0, [30, 40], True), (1, [41], True)] if on_close == "truncate" else [])


@pytest.mark.parametrize("autoreset", ["same_step", "next_step"])
def test_dropping_what_is_unfinished_keeps_what_has_ended(tmp_path: Path, autoreset: str) -> None:
    ends = np.array([True, False])
    with trajstore.create(tmp_path / "s") as writer:
        recorder = Recorder(writer, 2, observations="T+1", on_close="drop", autoreset=autoreset)
        for t in range(4):
            recorder.step(obs=np.full(2, t), terminated=ends & (t == 3), final_obs=np.full(2, t + 1))
        recorder.close(final_obs=np.full(2, 4))
    ds = trajstore.open(tmp_path / "s")
    assert len(ds) == 1
    assert ds[0]["obs"][:].tolist() == [0, 1, 2, 3, 4]


def test_flags_may_be_fields(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s") as writer, Recorder(writer, 2, flags="fields") as recorder:
        for t in range(3):
            recorder.step(x=np.arange(2), terminated=[t == 1, False])
    ds = trajstore.open(tmp_path / "s")
    assert [ds[i]["terminated"][:].tolist() for i in range(3)] == [[False, True], [False], [False] * 3]
    assert [ds[i]["truncated"][:].tolist() for i in range(3)] == [[False] * 2, [True], [False, False, True]]


def test_a_commit_takes_in_what_was_recorded(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s", commit_every=None) as writer:
        recorder = Recorder(writer, 4)
        for t in range(10):
            recorder.step(x=np.arange(4), terminated=np.full(4, t == 8))
        writer.commit()
        assert len(trajstore.open(tmp_path / "s")) == 4
    # The writer's end is the recorder's.
    assert len(trajstore.open(tmp_path / "s")) == 8
    with pytest.raises(StateError, match="closed"):
        recorder.step(x=np.arange(4), terminated=np.zeros(4, bool))


def test_abandoning_the_writer_drops_what_was_recorded(tmp_path: Path) -> None:
    writer = trajstore.create(tmp_path / "s", commit_every=None)
    recorder = Recorder(writer, 4)
    recorder.step(x=np.arange(4), terminated=np.ones(4, bool))
    writer.abandon()
    assert len(trajstore.open(tmp_path / "s")) == 0


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"x": np.zeros((4, 2)), "y": np.zeros(4)}, r"'x' has the shape \(4, 2\), expected \(4,\)"),
        ({"x": np.zeros(4, np.float32), "y": np.zeros(4)}, "'x' has the dtype float32, expected float64"),
        ({"x": np.zeros(4)}, "missing"),
        ({"x": np.zeros(4), "y": np.zeros(4), "z": np.zeros(4)}, "'z' was not in the first step"),
    ],
)
def test_a_step_that_does_not_fit_is_not_recorded(tmp_path: Path, second: Any, says: str) -> None:
    never = np.zeros(4, bool)
    with trajstore.create(tmp_path / "s") as writer, Recorder(writer, 4) as recorder:
        recorder.step(x=np.zeros(4), y=np.zeros(4), terminated=never)
        with pytest.raises(SchemaError, match=says):
            recorder.step(**second, terminated=never)
        recorder.step(x=np.ones(4), y=np.ones(4), terminated=never)
    assert trajstore.open(tmp_path / "s")[0]["x"][:].tolist() == [0, 1]


def test_a_first_step_that_does_not_fit_the_store_says_so_at_once(tmp_path: Path) -> None:
    never = np.zeros(4, bool)
    with trajstore.create(tmp_path / "s") as writer, Recorder(writer, 4) as recorder:
        with pytest.raises(SchemaError, match="one row for each env"):
            recorder.step(x=np.zeros(3), terminated=never)
        with pytest.raises(SchemaError, match="cannot name"):
            recorder.step(**{"..": np.zeros(4)}, terminated=never)
        recorder.step(x=np.zeros(4), terminated=never)
    with trajstore.create(tmp_path / "s", resume=True) as writer, Recorder(writer, 4) as recorder:
        with pytest.raises(SchemaError, match="the store holds float64"):
            recorder.step(x=np.zeros(4, int), terminated=never)
        with pytest.raises(SchemaError, match="unknown field 'y'"):
            recorder.step(x=np.zeros(4), y=np.zeros(4), terminated=never)
        recorder.set(level=3)
        with pytest.raises(SchemaError, match="unknown column 'level'"):
            recorder.step(x=np.zeros(4), terminated=never)
    with trajstore.create(tmp_path / "s", resume=True) as writer, Recorder(writer, 4) as recorder:
        recorder.step(x=np.ones(4), terminated=never)
    assert len(trajstore.open(tmp_path / "s")) == 8


def test_arguments_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s") as writer:
        for wrong in ({"autoreset": "x"}, {"observations": "T+2"}, {"flags": "x"}, {"on_close": "x"}):
            with pytest.raises(SchemaError, match="one of"):
                Recorder(writer, 4, **wrong)  # type: ignore[arg-type]
        with pytest.raises(SchemaError, match="0 environments"):
            Recorder(writer, 0)
        with pytest.raises(SchemaError, match="no field 'obs' to have an observation"):
            Recorder(writer, 1, observations="T+1").step(state=np.zeros(1), terminated=[False])
        recorder = Recorder(writer, 2, observations="T+1")
        with pytest.raises(SchemaError, match="final_obs is not given"):
            recorder.step(obs=np.zeros(2), terminated=[True, False])
        recorder.step(obs=np.zeros(2), terminated=[False, False])
        with pytest.raises(SchemaError, match="not set before the first step"):
            recorder.set(level=3)


def test_what_would_fail_in_the_background_is_refused_at_the_call(tmp_path: Path) -> None:
    never, obs = np.zeros(2, bool), np.zeros((2, 3))
    with trajstore.create(tmp_path / "s") as writer:
        for wrong in ({"num_envs": "2"}, {"num_envs": 2.0}, {"num_envs": 2, "memory_bytes": "1G"}):
            with pytest.raises(SchemaError):
                Recorder(writer, **wrong)  # type: ignore[arg-type]
        with Recorder(writer, 2, observations="T+1") as recorder:
            with pytest.raises(SchemaError, match=r"'terminated' has the shape \(2, 1\), expected \(2,\)"):
                recorder.step(obs=obs, terminated=never[:, None])
            for ends in (never, ~never):  # as the first step, and as a later one
                with pytest.raises(
                    SchemaError, match=r"final_obs has the shape \(2, 4\), and field 'obs' has \(2, 3\)"
                ):
                    recorder.step(obs=obs, terminated=~never, final_obs=np.zeros((2, 4)))
                recorder.step(obs=obs, terminated=ends, final_obs=obs)
    assert trajstore.open(tmp_path / "s").lengths.tolist() == [2, 2]


def test_a_column_takes_no_value_that_it_would_change(tmp_path: Path) -> None:
    never = np.zeros(2, bool)
    with trajstore.create(tmp_path / "s") as writer, Recorder(writer, 2) as recorder:
        with pytest.raises(SchemaError, match="column 'level' holds numbers or bools, not str"):
            recorder.set(level="maze")
        with pytest.raises(SchemaError, match=r"column 'level' has the shape \(3,\), expected \(2,\)"):
            recorder.set(level=[1, 2, 3])
        recorder.step(x=np.zeros(2), terminated=never, columns={"level": np.array([1, 2])})
        for value in (0.5, np.array([np.nan, 1])):
            with pytest.raises(SchemaError, match="column 'level' was int64 when it was first set"):
                recorder.step(x=np.zeros(2), terminated=~never, columns={"level": value})
        recorder.step(x=np.zeros(2), terminated=~never, columns={"level": np.array([3.0, 4.0])})
        for call in (recorder.stop, recorder.start, recorder.reset):
            with pytest.raises(SchemaError, match="chooses no environments of the 2"):
                call([2])
    assert trajstore.open(tmp_path / "s").table["level"].tolist() == [3, 4]


def test_a_disk_that_is_full_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with trajstore.create(tmp_path / "s", commit_every=None) as writer:
        recorder = Recorder(writer, 2, memory_bytes=4096)
        full = StorageError("the disk is full")
        recorder.step(x=np.arange(2), terminated=[True, True])
        recorder.flush()
        writer._committer.failure = full  # as a background commit leaves it
        steps = 1

        def record_for_ever() -> None:
            nonlocal steps
            while True:
                recorder.step(x=np.arange(2) + 2 * steps, terminated=[True, True])
                steps += 1

        with pytest.raises(StorageError, match="full"):
            record_for_ever()
        writer.commit()
        recorder.step(x=np.arange(2) + 2 * steps, terminated=[True, True])
        steps += 1
        recorder.close()
    ds = trajstore.open(tmp_path / "s")
    np.testing.assert_array_equal(ds.read("x"), np.arange(2 * steps))


def test_scratch_that_is_full_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with trajstore.create(tmp_path / "s", commit_every=None) as writer:
        recorder = Recorder(writer, 4, memory_bytes=4096)
        write, full = SpillLog.write, threading.Event()

        def refused(self: Any, *args: Any) -> Any:
            if full.is_set():
                raise StorageError("no space left for scratch")
            return write(self, *args)

        monkeypatch.setattr(SpillLog, "write", refused)
        steps, never = 0, np.zeros(4, bool)
        full.set()

        def record_for_ever() -> None:
            nonlocal steps
            while True:
                recorder.step(x=np.full((4, 10), steps), terminated=never)
                steps += 1

        with pytest.raises(StorageError, match="for scratch"):
            record_for_ever()
        full.clear()
        writer.commit()
        for _ in range(100):
            recorder.step(x=np.full((4, 10), steps), terminated=never)
            steps += 1
        recorder.close()
    ds = trajstore.open(tmp_path / "s")
    assert ds.lengths.tolist() == [steps] * 4
    for i in range(4):
        np.testing.assert_array_equal(ds[i]["x"][:, 3], np.arange(steps))


def test_a_slow_writer_makes_the_caller_wait_and_memory_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with trajstore.create(tmp_path / "s", commit_every=None) as writer:
        append_many, gate = writer.append_many, threading.Semaphore(0)

        def slow(*args: Any, **kwargs: Any) -> Any:
            gate.acquire()
            return append_many(*args, **kwargs)

        monkeypatch.setattr(writer, "append_many", slow)
        recorder = Recorder(writer, 16, memory_bytes=8192)

        class Clock:
            """Is asked for the time when the caller begins to wait, and lets the writer go on."""

            monotonic, sleep = staticmethod(time.monotonic), staticmethod(time.sleep)

            def perf_counter(self) -> float:
                gate.release(10_000)
                return time.perf_counter()

        monkeypatch.setattr(background, "time", Clock())
        for t in range(500):
            recorder.step(x=np.full(16, t), terminated=np.ones(16, bool))
        assert recorder.stats["stall_seconds"] > 0
        recorder.close()
    x = trajstore.open(tmp_path / "s").read("x")
    np.testing.assert_array_equal(x.reshape(500, 16), np.arange(500)[:, None].repeat(16, 1))


def test_several_steps_at_once(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s") as writer, Recorder(writer, 3) as recorder:
        done = np.zeros((6, 3), bool)
        done[2] = done[5] = True
        recorder.steps(x=np.arange(18).reshape(6, 3), terminated=done)
    ds = trajstore.open(tmp_path / "s")
    assert ds[0]["x"][:].tolist() == [0, 3, 6]
    assert ds[5]["x"][:].tolist() == [11, 14, 17]


def test_boundaries_do_not_depend_on_the_chunks() -> None:
    rng = np.random.default_rng(5)
    for next_step in (False, True):
        flags = rng.random((4, 200, 5)) < np.array([0.1, 0.1, 0.9, 0.05])[:, None, None]
        whole = Boundaries(5, next_step=next_step)
        expected = whole.scan(*flags)
        parts = Boundaries(5, next_step=next_step)
        found = []
        for first in range(0, 200, 7):
            after = flags[3][first + 7] if first + 7 < 200 else None
            found.append(parts.scan(*flags[:, first : first + 7], after))
        assert len(expected) > 50
        order = np.lexsort((expected.env, expected.last))
        for name in ("env", "first", "last", "terminated", "truncated", "ended", "final"):
            joined = np.concatenate([getattr(part, name) for part in found])
            key = np.concatenate([part.last for part in found]), np.concatenate([part.env for part in found])
            np.testing.assert_array_equal(joined[np.lexsort(key[::-1])], getattr(expected, name)[order], err_msg=name)
        assert set(np.unique(expected.final)) <= {NOWHERE, NEXT_ROW, GIVEN}
        np.testing.assert_array_equal(whole.running, parts.running)


def test_a_forked_child_may_not_record(tmp_path: Path) -> None:
    import os

    with trajstore.create(tmp_path / "s") as writer, Recorder(writer, 2) as recorder:
        recorder.step(x=np.arange(2), terminated=[False, False])
        pid = os.fork()
        if not pid:
            try:
                recorder.step(x=np.arange(2), terminated=[False, False])
            except StateError:
                os._exit(0)
            os._exit(1)
        deadline = time.monotonic() + 20
        done = 0
        while not done and time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.01)
        assert done == pid
        assert os.waitstatus_to_exitcode(status) == 0
