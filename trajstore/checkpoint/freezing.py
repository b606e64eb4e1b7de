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

    state : its containers are copies; so are all its tensors and arrays but ``later``: by section, tensors and the
    versions by which to tell whether they are still what they were. memory : what the copies lie in, to be given back.
    """

    state: Any = None
    later: list[tuple[str, list[Any], list[int]]] = field(default_factory=list)
    memory: Bytes | None = None

    def changed(self) -> str | None:
        """A section of which a tensor is not what it was."""
        for section, those, versions in self.later:
            if [tensor._version for tensor in those] != versions:
                return section
        return None


class Owned:
    """The tensors on the host that only an optimizer's step changes, and how to tell them and what lies with them.

    ids : of the tensors. starts : where they begin in memory. storages : the keys of theirs.
    """

    def __init__(self, found: list[Any]) -> None:
        torch = sys.modules["torch"]
        self._tensors = [tensor for tensor in found if tensor.is_cpu and tensor.layout is torch.strided]
        self._pointers = [tensor.data_ptr() for tensor in self._tensors]
        self.ids = frozenset(map(id, self._tensors))
        self.starts = frozenset(self._pointers) - {0}
        self.storages = frozenset(map(tensors.storage_key, self._tensors))

    def __bool__(self) -> bool:
        return bool(self._tensors)

    def still(self) -> bool:
        """Whether each lies where it lay: another tensor may come to lie where one of them did."""
        return [tensor.data_ptr() for tensor in self._tensors] == self._pointers


class Freezing:
    """The walk that freezes a state; ``owned`` may be copied later.

    Raises
    ------
    NotFrozen : see there. Nothing is refused here that :class:`tree.Flattening` would take.
    """

    def __init__(self, state: Any, owned: Owned, snapshots: Snapshots) -> None:
        self._owned = owned
        self._later: list[Any] = []
        self._torch = sys.modules["torch"]
        self._tensor_kinds = frozenset((self._torch.Tensor, self._torch.nn.Parameter))
        self._immutable = _PLAIN | {self._torch.Size, self._torch.dtype, self._torch.device}
        self._eager: dict[int, Any] = {}  # id: tensor
        self._arrays: dict[int, Any] = {}  # id: (array, copy)
        self.frozen = Frozen()
        try:
            walked = self._top(state) if type(state) is dict else self._section("state", state)
        except RecursionError as error:
            raise NotFrozen from error
        copies = self._copies(snapshots) if self._eager else {}
        self.frozen.state = _replaced(walked, copies) if copies else walked

    def _top(self, state: dict[Any, Any]) -> dict[Any, Any]:
        return {_key(key): self._section(key, value) for key, value in state.items()}

    def _section(self, name: str, value: Any) -> Any:
        self._later = []
        walked = self._walk(value)
        if self._later:
            self.frozen.later.append((name, self._later, [tensor._version for tensor in self._later]))
        return walked

    def _walk(self, value: Any) -> Any:
        kind = type(value)
        if kind in self._immutable:
            return value
        if kind in self._tensor_kinds:
            return self._tensor(value)
        if kind is dict:
            if value and self._owned.ids.issuperset(map(id, value.values())):  # a parameter's moments
                self._later += value.values()
                return {_key(key): item for key, item in value.items()}
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
        if id(tensor) not in self._owned.ids and not self._shares(tensor):
            self._eager[id(tensor)] = tensor
        else:
            self._later.append(tensor)
        return tensor

    def _shares(self, tensor: Any) -> bool:
        """Whether a tensor lies in a storage that is owned."""
        if not tensor.is_cpu or tensor.layout is not self._torch.strided or tensor.is_quantized:
            raise NotFrozen
        return tensor.data_ptr() in self._owned.starts or tensors.storage_key(tensor) in self._owned.storages

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
