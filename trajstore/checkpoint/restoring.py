"""Putting a loaded state into live objects: all of it fits, or none of it is touched."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, MutableSequence
from typing import Any

import numpy as np

from trajstore.checkpoint import tensors
from trajstore.errors import NotFoundError, SchemaError


def check_into(into: Any, state: Any, path: str = "state") -> None:
    """See that every part of ``into`` has a counterpart that fits.

    Raises
    ------
    NotFoundError : a key that the state has not. SchemaError : a shape, dtype or kind that differs.
    """
    if _loads(into):
        return
    if isinstance(into, Mapping):
        if not isinstance(state, Mapping):
            raise SchemaError(f"{path} was saved as a {type(state).__name__}, not as a mapping")
        for key, value in into.items():
            if key not in state:
                names = ", ".join(map(str, list(state)[:20])) or "nothing"
                raise NotFoundError(f"the checkpoint has no {path}[{key!r}]", hint=f"it has {names}")
            check_into(value, state[key], f"{path}[{key!r}]")
    elif isinstance(into, (list, tuple)):
        if not isinstance(state, (list, tuple)) or len(state) != len(into):
            raise SchemaError(f"{path} was not saved as {len(into)} elements")
        for index, value in enumerate(into):
            check_into(value, state[index], f"{path}[{index}]")
    elif tensors.is_tensor(into) or isinstance(into, np.ndarray):
        if not tensors.is_tensor(state) and not isinstance(state, np.ndarray):
            raise SchemaError(f"{path} was saved as a {type(state).__name__}, not as a tensor")
        if tuple(into.shape) != tuple(state.shape) or str(into.dtype) != str(state.dtype):
            raise SchemaError(
                f"{path} was saved as {state.dtype} {tuple(state.shape)}, not {into.dtype} {tuple(into.shape)}"
            )


def put_into(into: Any, state: Any) -> None:
    """Load ``state`` into ``into``: ``load_state_dict`` where there is one, tensors and arrays in place.

    Plain values in a dict or list are replaced; keys of the state that ``into`` has not are left alone.
    """
    if _loads(into):
        into.load_state_dict(state)
    elif tensors.is_tensor(into):
        with tensors.import_torch().no_grad():
            into.copy_(state)
    elif isinstance(into, np.ndarray):
        into[...] = state
    elif isinstance(into, Mapping):
        for key, value in into.items():
            if fillable(value):
                put_into(value, state[key])
            elif isinstance(into, MutableMapping):
                into[key] = state[key]
    elif isinstance(into, (list, tuple)):
        for index, value in enumerate(into):
            if fillable(value):
                put_into(value, state[index])
            elif isinstance(into, MutableSequence):
                into[index] = state[index]


def _loads(value: Any) -> bool:
    return callable(getattr(value, "load_state_dict", None))


def fillable(value: Any) -> bool:
    """Whether a value can take a part of a state in place."""
    return _loads(value) or tensors.is_tensor(value) or isinstance(value, (np.ndarray, Mapping, list, tuple))
