"""Tensors on a device: the caller never waits for them, and what it does to them afterwards is not stored.

The same code runs with a device that the tests have made up (tensors on the CPU, copied late, in a thread) and, where
there is one, with CUDA.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore.collect import Recorder, TensorDictRecorder
from trajstore.engine import device
from trajstore.errors import QueueFullError, SchemaError

torch = pytest.importorskip("torch")


class LateDevice:
    """Copies when its thread comes to it. Until then a target holds rubbish, and a source must stay as it is."""

    gate = threading.Event()

    def __init__(self) -> None:
        self.jobs: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        while True:
            sources, targets, done = self.jobs.get()
            self.gate.wait()
            time.sleep(0.001)
            for source, target in zip(sources, targets):
                target.copy_(source)
            done.set()

    def clone(self, tensor: Any) -> Any:
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    def copy(self, sources: Sequence[Any], targets: Sequence[Any]) -> Any:
        done = LateEvent()
        self.jobs.put((sources, targets, done))
        return done

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Any:
        rubbish = torch.empty(shape, dtype=dtype)
        rubbish.view(torch.uint8).fill_(1) if dtype != torch.bool else rubbish.fill_(True)
        return rubbish


class LateEvent(threading.Event):
    def synchronize(self) -> None:
        assert threading.current_thread() is not threading.main_thread(), "the caller waits for the device"
        assert self.wait(30)


class OnDevice(torch.Tensor):
    """A tensor that says it lies on a device."""


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("the caller asks the device for a value, and waits")


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No value of a tensor may be looked at."""
    for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__array__"):
        monkeypatch.setattr(OnDevice, name, refuse, raising=False)


@pytest.fixture(params=["made up", pytest.param("cuda", marks=pytest.mark.cuda)])
def on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that moves an array to the device."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs CUDA")
        yield lambda values: torch.as_tensor(values).cuda()
        return
    LateDevice.gate = threading.Event()
    LateDevice.gate.set()
    monkeypatch.setattr(device, "Cuda", LateDevice)
    monkeypatch.setattr(device, "on_device", lambda value: isinstance(value, OnDevice))
    yield lambda values: torch.as_tensor(values).as_subclass(OnDevice)


def test_trajectories_are_stored_as_they_were_and_in_order(tmp_path: Path, on: Any) -> None:
    expected = []
    with trajstore.create(tmp_path / "s") as writer:
        obs = on(torch.zeros(50, 3))
        for i in range(40):
            length = 1 + i % 7
            obs[:length] = i
            if i % 5 == 4:
                given: Any = np.full((length, 3), i, np.float32)  # from the host, in between
            else:
                given = obs[:length]
            number = writer.append({"obs": given, "n": {"t": np.arange(length)}, "note": f"{i}"}, seed=i)
            assert number == i
            obs.fill_(-1)  # in the order of the caller's stream, so after the copy
            expected.append(np.full((length, 3), i, np.float32))
    ds = trajstore.open(tmp_path / "s")
    assert ds.table["seed"].tolist() == list(range(40))
    for i, rows in enumerate(expected):
        np.testing.assert_array_equal(ds[i]["obs"][:], rows)
        assert ds[i]["note"] == str(i)


def test_the_caller_does_not_wait(tmp_path: Path, on: Any) -> None:
    with trajstore.create(tmp_path / "s", commit_every=None) as writer:
        writer.append({"obs": on(torch.zeros(5, 3))})
        LateDevice.gate.clear()
        for i in range(10):
            assert writer.append({"obs": on(torch.full((5, 3), float(i)))}) == i + 1
        with pytest.raises(SchemaError, match="'obs' has rows of shape"):
            writer.append({"obs": on(torch.zeros(5, 4))})
        with pytest.raises(SchemaError, match="dtype float64"):
            writer.append({"obs": on(torch.zeros(5, 3, dtype=torch.float64))})
        LateDevice.gate.set()
        writer.commit()
        assert len(trajstore.open(tmp_path / "s")) == 11


def test_a_seed_on_its_way_is_taken_once(tmp_path: Path, on: Any) -> None:
    with trajstore.create(tmp_path / "s", unique="seed", commit_every=None) as writer:
        writer.append({"x": on(torch.zeros(2))}, seed=0)
        LateDevice.gate.clear()
        assert writer.append({"x": on(torch.ones(2))}, seed=1) == 1
        assert writer.append({"x": on(torch.ones(2))}, seed=1) is None
        LateDevice.gate.set()
    assert trajstore.open(tmp_path / "s").table["seed"].tolist() == [0, 1]


@pytest.mark.parametrize("on_full", ["wait", "error"])
def test_what_is_on_its_way_is_bounded(tmp_path: Path, on: Any, on_full: str) -> None:
    with trajstore.create(tmp_path / "s", on_full=on_full, queue_bytes=1000, commit_every=None) as writer:
        writer.append({"x": on(torch.zeros(200))})
        stored = refused = 0
        for i in range(1, 30):
            try:
                writer.append({"x": on(torch.full((200,), float(i)))})
                stored += 1
            except QueueFullError:
                refused += 1
        assert on_full == "error" or not refused
    assert len(trajstore.open(tmp_path / "s")) == stored + 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "uint8", "bool"])
@pytest.mark.usefixtures("unasked")
def test_recording_from_a_device(tmp_path: Path, on: Any, dtype: str) -> None:
    """Also a collector that hands out the same tensors each time, whose flags are on the device too."""
    num_envs, steps = 5, 60
    rng = np.random.default_rng(2)
    obs, done = on(torch.zeros(num_envs, 4, dtype=getattr(torch, dtype))), on(torch.zeros(num_envs, dtype=torch.bool))
    episodes: list[Any] = [[] for _ in range(num_envs)]
    ended = []
    with trajstore.create(tmp_path / "s") as writer, Recorder(writer, num_envs, memory_bytes=4096) as recorder:
        for _ in range(steps):
            values = torch.as_tensor(rng.integers(0, 2 if dtype == "bool" else 200, (num_envs, 4)))
            obs.copy_(values)
            ends = rng.random(num_envs) < 0.1
            done.copy_(torch.as_tensor(ends))
            recorder.step(obs=obs, reward=rng.random(num_envs), terminated=done)
            obs.fill_(1)
            done.fill_(True)
            for n in range(num_envs):
                episodes[n].append(values[n].numpy())
                if ends[n]:
                    ended.append((n, np.array(episodes[n]), True))
                    episodes[n] = []
    ended += [(n, np.array(rows), False) for n, rows in enumerate(episodes) if rows]
    ds = trajstore.open(tmp_path / "s")
    assert [(int(e), bool(t)) for e, t in zip(ds.table["env"], ds.table["terminated"])] == [(n, t) for n, _, t in ended]
    for i, (_, rows, _) in enumerate(ended):
        np.testing.assert_array_equal(ds[i]["obs"][:].astype(np.int64), rows)
    assert ds.fields["obs"].dtype == dtype


@pytest.mark.usefixtures("unasked")
def test_final_observations_from_a_device(tmp_path: Path, on: Any) -> None:
    with trajstore.create(tmp_path / "s") as writer, Recorder(writer, 3, observations="T+1") as recorder:
        for t in range(12):
            recorder.step(
                obs=on(torch.full((3, 2), float(t))),
                terminated=on(torch.full((3,), t % 4 == 3)),
                final_obs=on(torch.full((3, 2), 100.0 + t)),
            )
        recorder.close(final_obs=on(torch.full((3, 2), 7.0)))
    ds = trajstore.open(tmp_path / "s")
    assert len(ds) == 9
    assert ds[0]["obs"][:, 0].tolist() == [0, 1, 2, 3, 103]
    assert ds[8]["obs"][:, 0].tolist() == [8, 9, 10, 11, 111]


@pytest.mark.usefixtures("unasked")
def test_a_reset_takes_its_final_observations_from_a_device(tmp_path: Path, on: Any) -> None:
    with trajstore.create(tmp_path / "s") as writer, Recorder(writer, 3, observations="T+1") as recorder:
        for t in range(12):
            if t == 4:
                recorder.reset([2, 0], final_obs=on(torch.tensor([[50.0], [51.0], [52.0]]).expand(3, 2)))
                recorder.reset([1, 2], final_obs=np.full((3, 2), 60, np.float32))
            if t == 8:
                recorder.reset(final_obs=on(torch.full((3, 2), 70.0)))
            recorder.step(
                obs=on(torch.full((3, 2), float(t))),
                terminated=on(torch.tensor([False, False, t == 9])),
                final_obs=on(torch.full((3, 2), 100.0 + t)),
            )
        recorder.close(final_obs=on(torch.full((3, 2), 7.0)))
    ds = trajstore.open(tmp_path / "s")
    found = sorted((int(t["env"]), t["obs"][:, 0].tolist()) for t in ds)
    first, second, third = [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]
    assert found == [
        (0, [*first, 50]),
        (0, [*second, 70]),
        (0, [*third, 7]),
        (1, [*first, 60]),
        (1, [*second, 70]),
        (1, [*third, 7]),
        (2, [*first, 52]),
        (2, [*second, 70]),
        (2, [8, 9, 109]),
        (2, [10, 11, 7]),
    ]


def test_what_is_needed_at_once_must_be_on_the_host(tmp_path: Path, on: Any) -> None:
    with trajstore.create(tmp_path / "s") as writer, Recorder(writer, 3) as recorder:
        with pytest.raises(SchemaError, match="column 'level' lies in a device's memory"):
            recorder.set(level=on(torch.arange(3)))
        for choose in (recorder.stop, recorder.start, recorder.reset):
            with pytest.raises(SchemaError, match="environments lies in a device's memory"):
                choose(on(torch.ones(3, dtype=torch.bool)))


class Batch(dict[str, Any]):
    """As much of a TensorDict as its recorder uses."""

    batch_size = (3, 5)

    def get(self, key: Any, default: Any = None) -> Any:
        if isinstance(key, tuple):
            return dict.get(self[key[0]], key[1], default) if key[0] in self else default
        return dict.get(self, key, default)


@pytest.mark.usefixtures("unasked")
def test_a_collector_that_hands_out_the_same_tensors(tmp_path: Path, on: Any) -> None:
    obs, after = on(torch.zeros(3, 5)), on(torch.zeros(3, 5))
    ids, done = on(torch.zeros(3, 5, dtype=torch.int64)), on(torch.zeros(3, 5, dtype=torch.bool))
    batch = Batch(obs=obs, collector=Batch(traj_ids=ids), next=Batch(obs=after, done=done))
    with trajstore.create(tmp_path / "s") as writer, TensorDictRecorder(writer) as recorder:
        for number in range(4):
            obs.copy_(torch.arange(5 * number, 5 * number + 5).expand(3, 5))
            after.copy_(obs + 1)
            ids.fill_(number // 2)  # others after two batches, without a flag
            done.copy_(torch.arange(15).reshape(3, 5) == 7)
            recorder.extend(batch)
            for tensor in (obs, after, done):
                tensor.fill_(1)
    ds = trajstore.open(tmp_path / "s")
    found = [ds[i]["obs"][:].tolist() for i in np.flatnonzero(ds.table["env"] == 0)]
    assert found == [[*range(10), 10], [*range(10, 20), 20]]
    middle = [ds[i]["obs"][:].tolist() for i in np.flatnonzero(ds.table["env"] == 1)]
    assert middle == [[0, 1, 2, 3], [*range(3, 9)], [8, 9, 10], [10, 11, 12, 13], [*range(13, 19)], [18, 19, 20]]


def test_batches_come_after_what_is_on_its_way(tmp_path: Path, on: Any) -> None:
    with trajstore.create(tmp_path / "s") as writer:
        writer.append({"x": on(torch.zeros(1))})
        for i in range(1, 20, 3):
            assert writer.append({"x": on(torch.full((1,), float(i)))}) == i
            assert writer.append_many({"x": np.float32([i + 1, i + 2])}, lengths=[1, 1]).tolist() == [i + 1, i + 2]
    np.testing.assert_array_equal(trajstore.open(tmp_path / "s").read("x"), np.arange(22))


def test_a_device_that_fails_is_told(tmp_path: Path, on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(device.Transfer, "wait", broken)
    with trajstore.create(tmp_path / "s", commit_every=None) as writer:
        writer.append({"x": np.zeros(2, np.float32)})
        writer.append({"x": on(torch.zeros(2))})
        with pytest.raises(trajstore.TrajstoreError, match="the device is gone"):
            writer.commit()
        writer.abandon()


def test_pinned_memory_on_the_host_is_copied_at_once(tmp_path: Path) -> None:
    pinned = torch.zeros(4, 2)
    if torch.cuda.is_available():
        pinned = pinned.pin_memory()
    with trajstore.create(tmp_path / "s") as writer:
        writer.append({"x": pinned})
        pinned.fill_(5)
        writer.append({"x": pinned})
    ds = trajstore.open(tmp_path / "s")
    assert ds[0]["x"][:].max() == 0
    assert ds[1]["x"][:].min() == 5


def test_a_writer_may_be_abandoned_while_something_is_on_its_way(
    tmp_path: Path, on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, abandoned = threading.Event(), threading.Event()
    wait, join = device.Transfer.wait, threading.Thread.join

    def late(self: Any) -> None:
        waiting.set()
        assert abandoned.wait(60)
        wait(self)

    def joined(self: Any, timeout: float | None = None) -> None:
        if self.name == "trajstore-staging":  # what waited has been dropped
            abandoned.set()
        join(self, timeout)

    monkeypatch.setattr(device.Transfer, "wait", late)
    monkeypatch.setattr(threading.Thread, "join", joined)
    writer = trajstore.create(tmp_path / "s", commit_every=None)
    writer.append({"x": np.zeros(2, np.float32)})
    writer.append({"x": on(torch.zeros(2))})
    assert waiting.wait(60)
    writer.abandon()
    assert len(trajstore.open(tmp_path / "s")) == 0
