"""Torch tensors as spans of bytes: which storage they lie in, which part of it, and copies of that.

Nothing here imports torch: a state without tensors needs none, and one with tensors has it loaded already.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from trajstore.errors import MissingDependencyError, SchemaError

if TYPE_CHECKING:
    import torch

Bytes = npt.NDArray[np.uint8]


def is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError("this checkpoint holds torch tensors", hint="pip install torch") from error
    return torch


_known: dict[Any, tuple[str, int, bool]] = {}


def known_dtypes() -> dict[Any, tuple[str, int, bool]]:
    """``{dtype: (name, bytes of an element, whether it is complex)}`` of the dtypes met so far."""
    return _known


def check_tensor(tensor: torch.Tensor, place: str) -> tuple[str, int, bool]:
    """Refuse what has no plain bytes; what :func:`known_dtypes` says of its dtype. Raises ``SchemaError``."""
    torch = sys.modules["torch"]
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise SchemaError(
            f"{place} is a {type(tensor).__name__}, not a plain tensor",
            hint="save its to_local() or full_tensor(), or use trajstore.checkpoint.dcp for sharded states",
        )
    if tensor.layout is not torch.strided:
        raise SchemaError(
            f"{place} is a sparse tensor ({tensor.layout})", hint="save its indices and values, or to_dense()"
        )
    if tensor.is_quantized:
        raise SchemaError(f"{place} is a quantised tensor", hint="save its int_repr(), scale and zero point")
    if tensor.is_meta:
        raise SchemaError(f"{place} is a meta tensor: it has no values", hint="materialise the module first")
    known = _known[tensor.dtype] = (dtype_name(tensor), tensor.itemsize, tensor.is_complex())
    return known


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype)[6:]  # "torch.float32"


def dtype_of(name: str) -> torch.dtype:
    loaded = import_torch()
    dtype = getattr(loaded, name, None)
    if not isinstance(dtype, loaded.dtype):
        raise SchemaError(f"this torch ({loaded.__version__}) has no dtype {name!r}", hint="upgrade torch")
    return cast("torch.dtype", dtype)


def hull(tensor: torch.Tensor, size: int, contiguous: bool) -> tuple[int, int]:
    """``[start, stop)`` in bytes of its storage between a tensor's first and last element, of ``size`` bytes each."""
    start = int(tensor.storage_offset()) * size
    if contiguous:
        return start, start + tensor.numel() * size
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride())) if tensor.numel() else -1
    return start, start + (last + 1) * size


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for tensors that lie in one storage, as long as that lives."""
    return int(tensor.untyped_storage()._cdata)


def storage_bytes(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """A uint8 tensor over the bytes ``[start, stop)`` of a tensor's storage, on its device."""
    loaded = import_torch()
    view = loaded.empty(0, dtype=loaded.uint8, device=tensor.device)
    return cast("torch.Tensor", view.set_(tensor.untyped_storage(), start, (stop - start,), (1,)))


def storage_over(data: Bytes) -> torch.UntypedStorage:
    """A storage over the memory of ``data``, without a copy; it keeps that memory alive."""
    loaded = import_torch()
    flat = loaded.from_numpy(data) if data.size else loaded.empty(0, dtype=loaded.uint8)
    return cast("torch.UntypedStorage", flat.untyped_storage())


def tensor_in(
    storage: torch.UntypedStorage, dtype: str, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    """A tensor in a storage; ``offset`` in bytes, ``stride`` in elements."""
    result = import_torch().empty(0, dtype=dtype_of(dtype))
    return cast("torch.Tensor", result.set_(storage, offset // result.itemsize, size, stride))


def as_parameter(tensor: torch.Tensor, kind: str, requires_grad: bool) -> torch.Tensor:
    """The tensor as the ``Parameter`` that it was, or as a leaf that requires a gradient."""
    if kind == "Parameter":
        return cast("torch.Tensor", import_torch().nn.Parameter(tensor, requires_grad))
    return tensor.requires_grad_(requires_grad)


def moved(value: Any, device: Any) -> Any:
    """A loaded state with its tensors on a device, named as ``torch.device`` takes it; else they stay on the host."""
    if device is None or callable(device) or isinstance(device, dict):
        return value
    if is_tensor(value):
        return value.to(device)
    if isinstance(value, dict):
        for key in value:
            value[key] = moved(value[key], device)
    elif isinstance(value, list):
        value[:] = [moved(item, device) for item in value]
    elif type(value) is tuple:
        return tuple(moved(item, device) for item in value)
    return value


class Snapshots:
    """Copies of tensors on the host that keep who shares a storage with whom; their memory is used again.

    A fresh copy of 200 MB costs more in page faults than in copying. Not locked.
    """

    def __init__(self) -> None:
        self._free: list[Bytes] = []

    def take(self, tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], Bytes]:
        """Copies of ``tensors``, and the memory they lie in, to be given back with :meth:`release`."""
        spans: dict[int, list[int]] = {}
        plain = [tensor.detach().resolve_conj().resolve_neg() for tensor in tensors]
        for tensor in plain:
            key = storage_key(tensor)
            start, stop = hull(tensor, tensor.itemsize, tensor.is_contiguous())
            span = spans.setdefault(key, [start, stop])
            span[0], span[1] = min(span[0], start), max(span[1], stop)
        total, places = 0, {}
        for key, (start, stop) in spans.items():
            places[key] = total
            total += -(-(stop - start) // 64) * 64
        memory = self._memory(total)
        copied: dict[int, torch.UntypedStorage] = {}
        torch = sys.modules["torch"]
        result = []
        for tensor in plain:
            key = storage_key(tensor)
            start, stop = spans[key]
            if key not in copied:
                copy = memory[places[key] : places[key] + stop - start]
                if stop > start:
                    torch.from_numpy(copy).copy_(storage_bytes(tensor, start, stop))
                copied[key] = storage_over(copy)
            offset = int(tensor.storage_offset()) * tensor.itemsize - start
            result.append(
                tensor_in(copied[key], dtype_name(tensor), offset, tuple(tensor.shape), tuple(tensor.stride()))
            )
        return result, memory

    def _memory(self, size: int) -> Bytes:
        for position, memory in enumerate(self._free):
            if memory.size >= size:
                return self._free.pop(position)
        self._free.clear()  # all too small: the state has grown
        return np.empty(size, np.uint8)

    def release(self, memory: Bytes) -> None:
        self._free.append(memory)
