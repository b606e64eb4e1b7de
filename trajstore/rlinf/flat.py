"""A batch's tensors as one row for each sample, and back; row ``t * B + b`` is step t of environment b."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from trajstore.errors import SchemaError
from trajstore.rlinf.batch import VALUES, Batch

Tensors = dict[str, torch.Tensor]
Ints = np.ndarray[Any, np.dtype[np.int64]]

_WORTH_THREADS = 16 << 20  # bytes; below, waking torch's threads costs more than they save


def flatten(batch: Batch, place: str) -> tuple[Tensors, Tensors]:
    """The samples' rows [T * B, …] by path, views where that can be, and the rows [E, B, …] that belong to no sample.

    Of the fields with a row more for each epoch, that is the first one, the state before any step; of ``prev_values``
    the last one, the value of the state that the epoch ended in. Raises ``SchemaError`` for epochs of unequal length.
    """
    flat: Tensors = {}
    extra: Tensors = {}
    for path, tensor in batch.tensors.items():
        epochs = tensor.shape[0] - batch.steps
        if epochs:
            if batch.steps % epochs:
                raise SchemaError(
                    f"{place}: {batch.steps} steps are no {epochs} epochs of one length, as {path!r} says"
                )
            by_epoch = tensor.reshape(epochs, batch.steps // epochs + 1, *tensor.shape[1:])
            kept, left = (slice(0, -1), -1) if path == VALUES else (slice(1, None), 0)
            extra[path] = by_epoch[:, left]
            tensor = by_epoch[:, kept]
            flat[path] = tensor.reshape(batch.steps * batch.envs, *tensor.shape[3:])
        else:
            flat[path] = tensor.reshape(batch.steps * batch.envs, *tensor.shape[2:])
    return flat, extra


def restore(flat: Mapping[str, torch.Tensor], extra: Mapping[str, torch.Tensor], steps: int, envs: int) -> Tensors:
    """The batch's tensors [T, B, …], and [T + E, B, …], that ``flatten`` took apart."""
    whole: Tensors = {}
    for path, rows in flat.items():
        tensor = rows.reshape(steps, envs, *rows.shape[1:])
        if path in extra:
            left = extra[path].unsqueeze(1)
            by_epoch = tensor.reshape(len(left), steps // len(left), *tensor.shape[1:])
            both = (by_epoch, left) if path == VALUES else (left, by_epoch)
            tensor = torch.cat(both, 1).reshape(steps + len(left), *tensor.shape[1:])
        whole[path] = tensor
    return whole


def take(tensor: torch.Tensor, rows: Ints) -> torch.Tensor:
    """Rows of a tensor, (n, …), in new memory."""
    out = torch.empty((len(rows), *tensor.shape[1:]), dtype=tensor.dtype)
    if out.nbytes > _WORTH_THREADS:
        return torch.index_select(tensor, 0, torch.from_numpy(rows), out=out)
    np.take(_plain(tensor), rows, axis=0, out=_plain(out), mode="clip")
    return out


def put(tensor: torch.Tensor, places: Ints | slice, rows: torch.Tensor) -> None:
    """Assign rows of a tensor."""
    _plain(tensor)[places] = _plain(rows)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in memory of its own."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    put(copy, slice(None), tensor)
    return copy


def _plain(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor as an array of the same memory; of bfloat16, which NumPy lacks, its bits."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    array: np.ndarray[Any, Any] = tensor.numpy()
    return array


def assembled(count: int, parts: list[tuple[Ints, Tensors]]) -> Tensors:
    """One batch of parts, each with its places in it; the fields that all parts have."""
    made: Tensors = {}
    for path, like in parts[0][1].items():
        if all(path in rows for _, rows in parts):
            made[path] = torch.empty((count, *like.shape[1:]), dtype=like.dtype)
            for places, rows in parts:
                put(made[path], places, rows[path])
    return made
