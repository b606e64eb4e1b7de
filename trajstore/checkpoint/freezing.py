"""A state as it is at a call, without a copy of the tensors that nothing but an optimizer's step changes."""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trajstore.checkpoint import tensors
from trajstore.checkpoint.tensors import Bytes, Snapshots
from trajstore.checkpoint.tree import FileContent

_PLAIN = frozenset((str, int, float, bool, complex, bytes, frozenset, FileContent, type(None)))
_SMALL = 1 << 20
"""Bytes below which memory of its own costs a copy less than looking for some that can be used again."""


class NotFrozen(Exception):
    """The state holds what is looked at more closely, or lies on a device: copy it at once."""


@dataclass
class Frozen:
    """A state that can be walked and copied later.

    state : its containers are copies; so are all its tensors and arrays but ``later``: (tensor, version, section), of
    which the version tells whether it is still what it was. memory : what the copies lie in, to be given back.
    """

    state: Any = None
    later: list[tuple[Any, int, str]] = field(default_factory=list)
    memory: Bytes | None = None


class Freezing:
    """The walk that freezes a state.

    Parameters
    ----------
    owned : the storages whose tensors may be copied later.
    ids : of tensors in them: a quicker look at the same thing.

    Raises
    ------
    NotFrozen : see there. Nothing is refused here that :class:`tree.Flattening` would take.
    """

    def __init__(self, state: Any, owned: frozenset[int], ids: frozenset[int], snapshots: Snapshots) -> None:
        self._owned = owned
        self._ids = ids
        self._section = "state"
        self._tensor_kinds = _tensor_kinds()
        self._immutable = _PLAIN | _torch_values()
        self._eager: dict[int, Any] = {}  # id: tensor
        self._arrays: dict[int, Any] = {}  # id: (array, copy)
        self.frozen = Frozen()
        try:
            walked = self._top(state) if type(state) is dict else self._walk(state)
        except RecursionError as error:
            raise NotFrozen from error
        copies = self._copies(snapshots) if self._eager else {}
        self.frozen.state = _replaced(walked, copies) if copies else walked

    def _top(self, state: dict[Any, Any]) -> dict[Any, Any]:
        result = {}
        for key, value in state.items():
            self._section = key
            result[key] = self._walk(value)
        return result

    def _walk(self, value: Any) -> Any:
        kind = type(value)
        if kind in self._immutable:
            return value
        if kind in self._tensor_kinds:
            return self._tensor(value)
        if kind is dict:
            return {_key(key): self._walk(item) for key, item in value.items()}
        if kind is list:
            return [self._walk(item) for item in value]
        if kind is tuple:
            return tuple([self._walk(item) for item in value])
        if kind is OrderedDict:
            result = OrderedDict((_key(key), self._walk(item)) for key, item in value.items())
            if hasattr(value, "_metadata"):
                result._metadata = self._walk(value._metadata)  # type: ignore[attr-defined]
            return result
        if kind is np.ndarray and not value.dtype.hasobject:
            if id(value) not in self._arrays:
                self._arrays[id(value)] = (value, value.copy(order="K"))
            return self._arrays[id(value)][1]
        if isinstance(value, np.generic):
            return value
        state_dict = getattr(value, "state_dict", None)
        if callable(state_dict) and not isinstance(value, type):
            return self._walk(state_dict())
        raise NotFrozen

    def _tensor(self, tensor: Any) -> Any:
        if id(tensor) not in self._ids:
            if not tensor.is_cpu or tensor.layout is not sys.modules["torch"].strided or tensor.is_quantized:
                raise NotFrozen
            if tensors.storage_key(tensor) not in self._owned:
                self._eager[id(tensor)] = tensor
                return tensor
        self.frozen.later.append((tensor, tensor._version, self._section))
        return tensor

    def _copies(self, snapshots: Snapshots) -> dict[int, Any]:
        """A copy of each tensor that may change at once, by the tensor's id; those that share a storage share one."""
        shared = Counter(map(tensors.storage_key, self._eager.values()))
        large: list[Any] = []
        copies: dict[int, Any] = {}
        for key, tensor in self._eager.items():
            alone = shared[tensors.storage_key(tensor)] == 1 and tensor.is_contiguous()
            if alone and tensor.nbytes < _SMALL:
                copies[key] = _like(tensor.detach().clone().resolve_conj().resolve_neg(), tensor)
            else:
                large.append(tensor)
        if large:
            taken, self.frozen.memory = snapshots.take(large)
            copies.update((id(tensor), _like(copy, tensor)) for tensor, copy in zip(large, taken))
        return copies


def _replaced(value: Any, copies: dict[int, Any]) -> Any:
    """A frozen walk's own containers, with the copies in the places of what they were made of."""
    kind = type(value)
    if kind is dict or kind is OrderedDict:
        for key, item in value.items():
            value[key] = _replaced(item, copies)
    elif kind is list:
        value[:] = [_replaced(item, copies) for item in value]
    elif kind is tuple:
        return tuple([_replaced(item, copies) for item in value])
    return copies.get(id(value), value)


def _like(copy: Any, tensor: Any) -> Any:
    if tensor.requires_grad or type(tensor) is not sys.modules["torch"].Tensor:
        return tensors.as_parameter(copy, type(tensor).__name__, tensor.requires_grad)
    return copy


def _key(key: Any) -> Any:
    if type(key) is not str and type(key) is not int:
        raise NotFrozen
    return key


def _tensor_kinds() -> frozenset[type]:
    torch = sys.modules["torch"]
    return frozenset((torch.Tensor, torch.nn.Parameter))


def _torch_values() -> frozenset[type]:
    torch = sys.modules["torch"]
    return frozenset((torch.Size, torch.dtype, torch.device))
