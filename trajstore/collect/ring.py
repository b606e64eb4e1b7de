"""The ring that steps are recorded into: for each field one array [steps, envs, …], filled by one copy a step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trajstore.engine import device
from trajstore.engine.intake import array_dtype, as_array
from trajstore.errors import SchemaError
from trajstore.format.schema import Field

Array = np.ndarray[Any, Any]

_MAX_STEPS = 1024


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its path, nested dicts joined by ``/``."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name if prefix else name, value


class Slot:
    """One field's place in the ring.

    array : (steps, num_envs, *shape); bfloat16 as uint16. tensor : the same memory, pinned, where values come from a
        device.
    """

    __slots__ = ("array", "path", "row_shape", "spec", "tensor")

    def __init__(self, path: str, spec: Field, num_envs: int) -> None:
        self.path = path
        self.spec = spec
        self.row_shape = (num_envs, *spec.shape)
        self.array: Array = np.empty((0, *self.row_shape), spec.in_memory)
        self.tensor: Any = None

    @property
    def step_bytes(self) -> int:
        return self.spec.in_memory.itemsize * math.prod(self.row_shape)

    def allocate(self, steps: int, like: Any, backend: device.Backend | None) -> None:
        if backend is not None and device.on_device(like):
            self.tensor = backend.pinned((steps, *self.row_shape), like.dtype)
            self.array = device.host_view(self.tensor)
        else:
            self.array = np.zeros((steps, *self.row_shape), self.spec.in_memory)

    def put(self, at: int, value: Any) -> bool:
        """Copy one step's value; False where that is a device's work (``tensor[at]`` is where to)."""
        array = self.array
        if type(value) is np.ndarray and value.dtype == array.dtype and value.shape == self.row_shape:
            array[at] = value
            return True
        if self.tensor is not None and device.on_device(value):
            self._check(value, tuple(value.shape), str(value.dtype))
            return False
        rows = as_array(self.path, value)
        self._check(value, rows.shape, array_dtype(self.path, value, rows))
        array[at] = rows
        return True

    def _check(self, value: Any, shape: tuple[int, ...], dtype: str) -> None:
        if shape != self.row_shape:
            raise SchemaError(f"field {self.path!r} has the shape {shape}, expected {self.row_shape}")
        found = dtype.removeprefix("torch.")
        if found == self.spec.dtype:
            return
        # Python's own numbers have no dtype: a list of them takes the field's.
        if not isinstance(value, (list, tuple)):
            raise SchemaError(
                f"field {self.path!r} has the dtype {found}, expected {self.spec.dtype}",
                hint=f"convert it before recording: values.astype({self.spec.dtype!r})",
            )


class Ring:
    """Steps between the caller, who writes them, and the recorder's thread, which takes them out.

    Parameters
    ----------
    limit : bytes of all fields together; four steps are held whatever they take.
    """

    def __init__(self, num_envs: int, limit: int) -> None:
        self.num_envs = num_envs
        self.limit = limit
        self.steps = 0
        self.slots: dict[str, Slot] = {}
        self.backend: device.Backend | None = None

    def open(self, first: Mapping[str, Any], declared: Mapping[str, Field]) -> None:
        """Take fields, shapes and dtypes from a first step's values. Raises ``SchemaError``."""
        if any(device.on_device(value) for value in first.values()):
            self.backend = device.Cuda()
        slots = {}
        for path, value in first.items():
            slots[path] = Slot(path, self._spec(path, value, declared.get(path)), self.num_envs)
        step_bytes = max(sum(slot.step_bytes for slot in slots.values()), 1)
        self.steps = max(min(self.limit // step_bytes, _MAX_STEPS), 4)
        for path, slot in slots.items():
            slot.allocate(self.steps, first[path], self.backend)
        self.slots = slots

    def _spec(self, path: str, value: Any, declared: Field | None) -> Field:
        if device.on_device(value):
            shape, dtype = tuple(value.shape), str(value.dtype)
        else:
            rows = as_array(path, value)
            shape, dtype = rows.shape, array_dtype(path, value, rows)
        if shape[:1] != (self.num_envs,):
            raise SchemaError(
                f"field {path!r} has the shape {shape}, expected ({self.num_envs}, …): one row for each env"
            )
        spec = Field(dtype, shape[1:])
        if declared is not None and (declared.dtype, declared.shape) != (spec.dtype, spec.shape):
            if isinstance(value, (list, tuple)) and declared.shape == spec.shape:
                return Field(declared.dtype, declared.shape)
            raise SchemaError(
                f"field {path!r} is {spec.dtype} {spec.shape}, and the store holds {declared.dtype} {declared.shape}",
                hint=f"convert it before recording: values.astype({declared.dtype!r})",
            )
        return spec

    def close(self) -> None:
        """Forget the fields: the first step was refused."""
        self.steps = 0
        self.slots = {}

    @property
    def nbytes(self) -> int:
        return sum(slot.array.nbytes for slot in self.slots.values())

    def put(self, step: int, values: Mapping[str, Any], known: int | None = None) -> device.Transfer | None:
        """Copy a step's values to their places; what comes from a device is on its way when this returns.

        ``known`` : with these and so many that are there already, every field must have its value.
        Raises ``SchemaError``.
        """
        at = step % self.steps
        slots = self.slots
        sources, targets = [], []
        for path, value in values.items():
            slot = slots.get(path)
            if slot is None:
                raise SchemaError(f"field {path!r} was not in the first step", hint="record the same fields every step")
            if not slot.put(at, value):
                sources.append(value)
                targets.append(slot.tensor[at])
        if known is not None and len(values) + known != len(slots):
            missing = ", ".join(path for path in slots if path not in values and not path.startswith("."))
            raise SchemaError(f"a field is missing: one of {missing}", hint="record the same fields every step")
        if not sources or self.backend is None:
            return None
        return device.Transfer(self.backend, sources, targets)

    def take(self, path: str, index: Array, out: Array | None = None) -> Array:
        """Rows (n, *shape) by ``step % steps * num_envs + env``."""
        array = self.slots[path].array
        flat = array.reshape(len(array) * self.num_envs, *array.shape[2:])
        return flat.take(index, axis=0, out=out, mode="clip")
