"""From a device's memory to the host's without holding the caller up: a stream of its own, pinned memory, events.

Torch is never imported here: a tensor exists only where it has been.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class Event(Protocol):
    """A mark in a device's stream."""

    def synchronize(self) -> None:
        """Wait, on the host, until the device has come so far."""


class Backend(Protocol):
    """The few operations of a device; the tests have one that copies late, in a thread."""

    def clone(self, tensor: Any) -> Any:
        """A contiguous copy, made in the order of the caller's stream."""

    def copy(self, sources: Sequence[Any], targets: Sequence[Any]) -> Event:
        """Copy to pinned memory, after all that the caller's stream holds so far, without making it wait."""

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """A tensor in host memory that the device can write to directly."""


class Cuda:
    """Torch's CUDA; also what ROCm builds of it call so."""

    def __init__(self) -> None:
        self._streams: dict[Any, Any] = {}

    def clone(self, tensor: Any) -> Any:
        torch = sys.modules["torch"]
        return tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)

    def copy(self, sources: Sequence[Any], targets: Sequence[Any]) -> Event:
        torch = sys.modules["torch"]
        events = []
        for device in dict.fromkeys(source.device for source in sources):
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            side = self._streams[device]
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for source, target in zip(sources, targets):
                    if source.device == device:
                        target.copy_(source, non_blocking=True)
                event = torch.cuda.Event(blocking=True)  # a thread that spins would take a core from the environments
                event.record(side)
                events.append(event)
        return events[0] if len(events) == 1 else _All(events)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return sys.modules["torch"].empty(shape, dtype=dtype, pin_memory=True)


class _All:
    def __init__(self, events: Sequence[Event]) -> None:
        self._events = events

    def synchronize(self) -> None:
        for event in self._events:
            event.synchronize()


class Transfer:
    """Copies on their way to pinned memory.

    The clones are held until the copies are done: their memory must not go back to the allocator, whose next user
    may be the caller's stream, while another stream still reads it (what ``record_stream`` is for elsewhere).
    """

    __slots__ = ("_clones", "_event")

    def __init__(self, backend: Backend, sources: Sequence[Any], targets: Sequence[Any]) -> None:
        # What the caller's stream does to its tensors after this comes after the clones, so nothing it writes there
        # later can be stored; and it waits for no more than a copy within the device.
        self._clones: Sequence[Any] | None = [backend.clone(source) for source in sources]
        self._event: Event | None = backend.copy(self._clones, targets)

    def wait(self) -> None:
        """Wait until the bytes are in host memory; called in a background thread."""
        if self._event is not None:
            self._event.synchronize()
        self._event = self._clones = None


def on_device(value: Any) -> bool:
    """Whether a value is a tensor in the memory of a device that copies on streams (CUDA; ROCm calls itself so too)."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor) and value.is_cuda


def holds(trajectory: Any) -> bool:
    """Whether any value of a nested dict lies in a device's memory."""
    try:
        return "torch" in sys.modules and _holds(trajectory)
    except RecursionError:  # a dict that contains itself, which whoever takes it apart refuses
        return False


def _holds(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(type(inner) is not np.ndarray and _holds(inner) for inner in value.values())
    return on_device(value)


def stand_in(tensor: Any) -> Any:
    """A tensor of the same shape and dtype on the host that takes no memory; for checks that look at no value."""
    torch = sys.modules["torch"]
    return torch.empty((), dtype=tensor.dtype).expand(tensor.shape)


def host_view(tensor: Any) -> np.ndarray[Any, Any]:
    """The memory of a tensor on the host as an array; bfloat16 as its uint16 bits."""
    torch = sys.modules["torch"]
    if tensor.dtype == torch.bfloat16:
        view: np.ndarray[Any, Any] = tensor.view(torch.int16).numpy().view(np.uint16)
        return view
    array: np.ndarray[Any, Any] = tensor.numpy()
    return array
