"""What differs between two checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trajstore.checkpoint import tensors
from trajstore.checkpoint.folder import OwnFolder, find, open_folder
from trajstore.checkpoint.reading import Reader
from trajstore.checkpoint.tree import leaves
from trajstore.errors import UnsupportedFormatError


@dataclass(frozen=True)
class Difference:
    """One leaf that differs.

    path : keys joined by ``/``. left, right : values, or what a tensor is (``float32 (3, 4)``); ``None`` where one has
    none. largest : greatest absolute difference of two tensors of one shape; relative : norm of the difference over
    the norm of the left one.
    """

    path: str
    left: Any
    right: Any
    largest: float | None = None
    relative: float | None = None


def diff_checkpoints(path: str | Path, left: str | int, right: str | int) -> tuple[list[Difference], int]:
    """Compare two checkpoints leaf by leaf, reading only what may differ.

    Returns the differences, metrics first, and the number of leaves that are equal.

    Raises
    ------
    NotFoundError, CorruptionError. UnsupportedFormatError : of a layout that is not opened here.
    """
    folder = open_folder(path)
    if not isinstance(folder, OwnFolder):
        raise UnsupportedFormatError(
            f"checkpoints of kind {folder.kind} are not opened here: they are pickles",
            hint="import them first (ckpt import)",
        )
    sides = [find(folder, which) for which in (left, right)]
    readers = [Reader(folder.storage.child(c.name), folder.shelf.record(c.name), folder.pool) for c in sides]
    differences = [
        Difference(f"metrics/{key}", sides[0].metrics.get(key), sides[1].metrics.get(key))
        for key in dict.fromkeys([*sides[0].metrics, *sides[1].metrics])
        if repr(sides[0].metrics.get(key)) != repr(sides[1].metrics.get(key))
    ]
    nodes = [dict(leaves(reader.node)) for reader in readers]
    equal = 0
    for name in dict.fromkeys([*nodes[0], *nodes[1]]):
        a, b = (side.get(name) for side in nodes)
        if name not in nodes[0] or name not in nodes[1]:
            differences.append(
                Difference(name, _describe(a) if name in nodes[0] else None, _describe(b) if name in nodes[1] else None)
            )
            continue
        found = _compare(name, readers[0].build(a), readers[1].build(b), a, b)
        if found is None:
            equal += 1
        else:
            differences.append(found)
    return differences, equal


def _compare(name: str, left: Any, right: Any, a: Any, b: Any) -> Difference | None:
    x, y = _array(left), _array(right)
    if x is None or y is None:
        same = type(left) is type(right) and repr(left) == repr(right)
        return None if same else Difference(name, _describe(a, left), _describe(b, right))
    if x.dtype != y.dtype or x.shape != y.shape:
        return Difference(name, _describe(a), _describe(b))
    if x.tobytes() == y.tobytes():
        return None
    if x.dtype.kind not in "biufc":
        return Difference(name, _describe(a), _describe(b))
    wide = np.complex128 if x.dtype.kind == "c" else np.float64
    gap = np.abs(y.astype(wide) - x.astype(wide))
    norm = float(np.linalg.norm(x.astype(wide).ravel()))
    relative = float(np.linalg.norm(gap.ravel())) / norm if norm else float("inf")
    return Difference(name, _describe(a), _describe(b), float(gap.max()), relative)


def _array(value: Any) -> np.ndarray[Any, Any] | None:
    if tensors.is_tensor(value):
        value = value.detach().resolve_conj().resolve_neg()
        if str(value.dtype) in ("torch.bfloat16",) or "float8" in str(value.dtype):
            value = value.float()
        return np.asarray(value.numpy())
    return value if isinstance(value, np.ndarray) else None


def _describe(node: Any, value: Any = None) -> Any:
    kind = node[0] if isinstance(node, list) and node else None
    if kind == "tensor":
        return f"{node[2]} {tuple(node[4])}"
    if kind == "array":
        return f"{np.dtype(node[2]) if isinstance(node[2], str) else 'structured'} {tuple(node[3])}"
    if kind in ("bytes", "file"):
        return f"{len(value):,} bytes" if isinstance(value, bytes) else "bytes"
    return value if value is not None else node
