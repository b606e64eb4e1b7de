"""A batch of B environments and the B trajectories that it is in a store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trajstore.dataset import Dataset
from trajstore.errors import SchemaError
from trajstore.format.schema import MAIN_CLOCK, Clock, Field
from trajstore.operations.heritage import SOURCE

Array = np.ndarray[Any, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]

#: A row for each step of an epoch and one before its first step.
DONES = ("dones", "terminations", "truncations")
#: A row for each step of an epoch and one after its last step: the value of the state that it ended in.
VALUES = "prev_values"
EPOCHS, BOOTSTRAP = "epochs", "bootstrap"  # their clocks
CLOCKS = {
    MAIN_CLOCK: Clock("main"),
    EPOCHS: Clock("first_row_of_each_epoch_extra"),
    BOOTSTRAP: Clock("none"),
}
BATCH, ENV, RANK, NUMBER = "batch", "env", "rank", "trajectory_id"  # columns
WEIGHTS, ENTRY, MIDDLE, OTHER = "model_weights_id", "index_entry", "file_middle", "other"  # strings and documents

#: By the first of them that a batch has, its samples are counted.
LENGTH_FIELDS = ("rewards", "prev_logprobs", "actions")


@dataclass
class Batch:
    """One batch. steps, envs, epochs : T, B, E.

    tensors : by path (``curr_obs/main_images``), time first, then environments. plain : other values by name.
    """

    steps: int
    envs: int
    epochs: int
    tensors: dict[str, Any]
    plain: dict[str, Any] = field(default_factory=dict)

    def trajectories(self) -> Iterator[dict[str, Any]]:
        """Each environment's rows, by path."""
        for env in range(self.envs):
            yield {path: tensor[:, env] for path, tensor in self.tensors.items()}


def batch_of(value: Mapping[str, Any], place: str) -> Batch:
    """Check a batch file's dict. Raises ``SchemaError``, naming place and field, for what is no batch."""
    tensors: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            for inner, tensor in item.items():
                if tensor is not None:
                    tensors[f"{name}/{inner}"] = tensor
        elif hasattr(item, "shape") and len(item.shape) >= 2:
            tensors[name] = item
        elif item is not None:
            plain[name] = item
    first = next((tensors[name] for name in (*LENGTH_FIELDS, *tensors) if name in tensors), None)
    if first is None:
        raise SchemaError(f"{place} holds no tensors")
    steps, envs = (int(n) for n in first.shape[:2])
    extra = {int(tensor.shape[0]) - steps for path, tensor in tensors.items() if path in (*DONES, VALUES)} - {0}
    epochs = max(extra, default=0)
    for path, tensor in tensors.items():
        allowed = {steps, steps + epochs} if path in (*DONES, VALUES) else {steps}
        shape = tuple(getattr(tensor, "shape", ()))
        if len(shape) < 2 or shape[0] not in allowed or shape[1] != envs or epochs < 0:
            raise SchemaError(f"{place}: {path!r} has the shape {shape}, expected [{steps}, {envs}, …]")
    return Batch(steps, envs, epochs, tensors, plain)


def fields_of(batch: Batch) -> dict[str, Field]:
    """The declaration of each tensor's field in a store."""
    clocks = {**dict.fromkeys(DONES, EPOCHS), VALUES: BOOTSTRAP}
    return {
        path: Field(str(tensor.dtype), tuple(tensor.shape[2:]), clocks.get(path, MAIN_CLOCK))
        for path, tensor in batch.tensors.items()
    }


def groups(dataset: Dataset) -> Iterator[Ints]:
    """Numbers of the trajectories of each batch, in the order of its environments; a lone trajectory is a batch of one.

    Batches come in the order of their first trajectories.
    """
    if BATCH not in dataset.columns or ENV not in dataset.columns:
        yield from (np.array([number]) for number in range(len(dataset)))
        return
    envs = dataset.table[ENV]
    # Batches are counted in each import, and several may have been merged since.
    keys = [dataset.locate(np.arange(len(dataset), dtype=np.int64))[0]]
    keys += [dataset.table[name] for name in (SOURCE, RANK, NUMBER, BATCH) if name in dataset.columns]
    _, first, inverse = np.unique(np.stack(keys), axis=1, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    order = np.lexsort((envs, first[inverse]))
    edges = np.flatnonzero(np.diff(first[inverse][order])) + 1
    yield from np.split(order, edges) if len(order) else []


def joined(dataset: Dataset, numbers: Ints, fields: Iterable[str] | None = None) -> dict[str, Any]:
    """The batch file's dict of the trajectories of one batch: tensors ``[T, B, …]``, absent fields left out.

    ``fields`` : only these.

    Raises ``SchemaError`` if the trajectories differ in length.
    """
    import torch

    tensors: dict[str, Any] = {}
    for path in dataset.fields if fields is None else fields:
        spec = dataset.fields[path]
        if spec.whole:
            continue
        pairs = dataset.field_pairs(path)[numbers]
        counts = pairs[:, 1] - pairs[:, 0]
        if (pairs[:, 0] < 0).any():
            continue
        if (counts != counts[0]).any():
            raise SchemaError(
                f"field {path!r} has {sorted(set(counts.tolist()))} rows in the environments of one batch",
                hint="a batch holds environments that ran for the same number of steps",
            )
        rows = dataset.read(path, numbers)
        rows = rows.reshape(len(numbers), int(counts[0]), *rows.shape[1:]).swapaxes(0, 1)
        rows = np.ascontiguousarray(rows)
        if spec.dtype == "bfloat16":  # its upper half, bit for bit: a conversion would not keep every NaN
            tensor = torch.from_numpy((rows.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)).view(
                torch.bfloat16
            )
        else:
            tensor = torch.from_numpy(rows)
        tensors[path] = tensor
    return nested(tensors)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Values by path as their batches nest them, once."""
    value: dict[str, Any] = {}
    for path, tensor in flat.items():
        name, _, inner = path.partition("/")
        if inner:
            value.setdefault(name, {})[inner] = tensor
        else:
            value[name] = tensor
    return value
