"""The copies from a device on a made-up CUDA: streams that run as early or as late as they are allowed to.

Its tensors hold rubbish until the stream that writes them has come so far, and memory that is let go is used again at
once. Each precaution of the path taken out in turn must show.
"""

from __future__ import annotations

import gc
import inspect
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore.collect import background
from trajstore.engine import device

RUBBISH = -77


class Stream:
    """Work in order; done when somebody waits for it, or, in an eager machine, as soon as its order allows."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name
        self.work: deque[Callable[[], None]] = deque()

    def enqueue(self, work: Callable[[], None]) -> None:
        self.work.append(work)
        if self is not self.machine.callers and self.machine.eager:
            self.run()

    def run(self) -> None:
        while self.work:
            self.work.popleft()()

    def wait_stream(self, other: Stream) -> None:
        so_far = len(other.work)
        mark = [other.work[-1]] if so_far else []

        def wait() -> None:  # the other comes at least to where it was when this was called
            while mark and mark[0] in other.work:
                other.work.popleft()()

        self.enqueue(wait)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.machine)
        event.record(self)
        return event


class Event:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.passed = True

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or self.machine.current
        self.passed = False
        self.stream.enqueue(self._pass)

    def _pass(self) -> None:
        self.passed = True

    def synchronize(self) -> None:
        assert not self.machine.in_call, "the caller waits for the device"
        assert self.stream is not self.machine.callers, "the caller's stream is synchronised"
        while not self.passed:
            self.stream.work.popleft()()


class Memory:
    """A tensor; on the device if ``machine`` is given."""

    def __init__(self, values: Any, machine: Machine, *, on_device: bool = True) -> None:
        self.values = np.array(values)
        self.machine, self.device, self.is_cuda = machine, "cuda:0", on_device
        if on_device:
            # What is allocated next in the caller's stream gets this memory: no other stream is waited for.
            values = self.values
            weakref.finalize(self, machine.callers.enqueue, lambda: values.fill(RUBBISH)).atexit = False

    def detach(self) -> Memory:
        return self

    resolve_conj = resolve_neg = detach

    def clone(self, **_: Any) -> Memory:
        made = Memory(np.full_like(self.values, RUBBISH), self.machine)
        self.machine.current.enqueue(_copy(made.values, self.values))
        return made

    def copy_(self, source: Memory, non_blocking: bool = False) -> None:
        assert not self.machine.in_call or non_blocking, "the caller waits for the device"
        self.machine.current.enqueue(_copy(self.values, source.values))

    def fill_(self, value: float) -> None:
        values = self.values
        self.machine.current.enqueue(lambda: values.fill(value))


def _copy(target: Any, source: Any) -> Callable[[], None]:
    return lambda: np.copyto(target, source)


class Machine(types.ModuleType):
    """As much of torch as the path uses."""

    contiguous_format = None

    def __init__(self, *, eager: bool) -> None:
        super().__init__("torch")
        self.eager = eager
        self.in_call = False
        self.callers = self.current = Stream(self, "the caller's")
        self.cuda = types.SimpleNamespace(
            Stream=lambda _: Stream(self, "side"),
            Event=lambda **_: Event(self),
            current_stream=lambda _: self.current,
            stream=self.stream,
        )

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


#: Which stream goes ahead as far as it may: the side one, neither before somebody waits, or the caller's.
ORDERS = ("side", "neither", "caller")


def transfers_keep_what_was_given(module: Any, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(eager=order == "side")
    monkeypatch.setitem(sys.modules, "torch", machine)
    backend = module.Cuda()
    sources = [Memory(np.full(3, RUBBISH), machine) for _ in range(2)]
    started = []
    for number in range(3):  # the same tensors each time, as some collectors hand out
        for source in sources:
            source.fill_(number)
        targets = [Memory(np.full(3, RUBBISH), machine, on_device=False) for _ in sources]
        machine.in_call = True
        started.append((number, module.Transfer(backend, sources, targets), targets))
        machine.in_call = False
        for source in sources:
            source.fill_(100)  # in place, after the call
    gc.collect()
    if order == "caller":
        machine.callers.run()
    for number, transfer, targets in started:
        transfer.wait()
        for target in targets:
            np.testing.assert_array_equal(target.values, np.full(3, number))
    machine.callers.run()


@pytest.mark.parametrize("order", ORDERS)
def test_what_was_given_arrives(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    transfers_keep_what_was_given(device, order, monkeypatch)


MUTANTS = {
    "the side stream does not wait for the caller's": ("side.wait_stream(torch.cuda.current_stream(device))", "pass"),
    "the copies are made in the caller's stream": ("with torch.cuda.stream(side):", "if True:"),
    "the caller waits for each copy": ("non_blocking=True", "non_blocking=False"),
    "nobody waits for the event": ("self._event.synchronize()", "pass"),
    "tensors are not cloned": ("[backend.clone(source) for source in sources]", "list(sources)"),
    "clones are let go before they are copied": (
        "backend.copy(self._clones, targets)",
        "backend.copy(self._clones, targets); self._clones = None",
    ),
    "the caller waits for the copies": (
        "backend.copy(self._clones, targets)",
        "backend.copy(self._clones, targets); self._event.synchronize()",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_precaution_taken_out_shows(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    source = inspect.getsource(device)
    old, new = MUTANTS[mutant]
    assert source.count(old) == 1
    module = types.ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", module)
    exec(compile(source.replace(old, new), "mutant", "exec"), module.__dict__)
    shown = 0
    for order in ORDERS:
        try:
            transfers_keep_what_was_given(module, order, monkeypatch)
        except AssertionError:
            shown += 1
    assert shown


# -- the recorder's ring -----------------------------------------------------------------------------------------------


class Gated:
    """A device that copies when its gate is open, and not before."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.jobs: list[tuple[Sequence[Any], Sequence[Any]]] = []

    def clone(self, tensor: Any) -> Any:
        return tensor.detach().clone()

    def copy(self, sources: Sequence[Any], targets: Sequence[Any]) -> Any:
        backend = self

        class Arrival:
            def synchronize(self) -> None:
                assert backend.gate.wait(60)
                for source, target in zip(sources, targets):
                    target.copy_(source)

        return Arrival()

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Any:
        import torch

        return torch.full(shape, RUBBISH, dtype=dtype)


def ring_keeps_its_rows(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    steps: int,
    before_arrival: Callable[[Any, threading.Thread], None],
) -> None:
    """Record with a ring of four steps while nothing arrives; then let it arrive, and look at what is stored."""
    torch = pytest.importorskip("torch")

    class OnDevice(torch.Tensor):  # type: ignore[misc,name-defined]
        pass

    gated = Gated()
    monkeypatch.setattr(device, "Cuda", lambda: gated)
    monkeypatch.setattr(device, "on_device", lambda value: isinstance(value, OnDevice))
    obs = torch.zeros(2, 3).as_subclass(OnDevice)
    with trajstore.create(folder / "s", commit_every=None) as writer:
        recorder = trajstore.Recorder(writer, 2, memory_bytes=1)

        def record() -> None:
            for t in range(steps):
                obs.fill_(t)
                recorder.step(obs=obs, count=np.full(2, t), terminated=np.full(2, t % 2 == 1))

        thread = threading.Thread(target=record)
        thread.start()
        try:
            before_arrival(recorder, thread)
        finally:
            gated.gate.set()
            thread.join(60)
            recorder.close()
    ds = trajstore.open(folder / "s")
    assert ds.lengths.tolist() == [2] * steps
    for trajectory in ds:
        np.testing.assert_array_equal(trajectory["obs"][:, 0], trajectory["count"][:])
    assert sorted(ds.read("count").tolist()) == sorted(2 * list(range(steps)))


def all_is_recorded(recorder: Any, thread: threading.Thread) -> None:
    thread.join(60)
    assert not thread.is_alive(), "the caller waits although there is room"


def nothing_is_handed_on(recorder: Any, thread: threading.Thread) -> None:
    all_is_recorded(recorder, thread)
    assert not recorder.flush(timeout=0.05)


def test_rows_wait_in_the_ring_until_they_have_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring_keeps_its_rows(tmp_path, monkeypatch, steps=4, before_arrival=nothing_is_handed_on)


def test_a_full_ring_makes_the_caller_wait_for_arrivals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring_keeps_its_rows(tmp_path, monkeypatch, steps=20, before_arrival=lambda *_: None)


def test_rows_that_are_taken_before_they_arrive_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_is_handed_on(recorder: Any, thread: threading.Thread) -> None:
        all_is_recorded(recorder, thread)
        if not recorder.flush(timeout=60):
            pytest.fail("this is no mutant")

    monkeypatch.setattr(background.Background, "_receive", lambda self, stop: None)
    with pytest.raises(AssertionError):
        ring_keeps_its_rows(tmp_path, monkeypatch, steps=4, before_arrival=all_is_handed_on)


def test_rows_that_are_written_over_before_they_are_taken_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background.Background, "wait_for_room", lambda self: None)
    with pytest.raises((AssertionError, trajstore.TrajstoreError)):
        ring_keeps_its_rows(tmp_path, monkeypatch, steps=20, before_arrival=all_is_recorded)
