"""When two values count as the same, for tests of what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def same(a: Any, b: Any) -> bool:
    """Same types, bits and order of keys, all the way down; NaN is NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (np.ndarray, np.generic)):
        if a.dtype.hasobject:
            return a.shape == b.shape and same(a.ravel().tolist(), b.ravel().tolist())
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, float):
        return a.hex() == b.hex()
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    return bool(a == b)


def loaded(path: Path) -> dict[str, Any]:
    """All of an npz file that a test has made, or that stands among its data."""
    with np.load(path, allow_pickle=True) as file:
        return {name: file[name] for name in file.files}


def objects(values: list[Any]) -> np.ndarray[Any, Any]:
    """Values as a 1-D array of objects, whatever they are."""
    array = np.empty(len(values), object)
    for i, value in enumerate(values):
        array[i] = value
    return array
