"""Batches of arrays as nested dicts of tensors, and back to what a ``DataLoader`` expects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from trajstore.errors import MissingDependencyError
from trajstore.sampling.samples import nested

Batch = dict[str, Any]


def to_tensors(arrays: Mapping[str, np.ndarray[Any, Any]], bfloat16: Iterable[str] = ()) -> Batch:
    """Arrays by path as nested dicts of tensors that share their memory.

    bfloat16 : paths whose arrays are bfloat16 bits (uint16); they become ``torch.bfloat16``.
    """
    tensors = {
        path: torch.from_numpy(values) for path, values in arrays.items() if path not in (coded := set(bfloat16))
    }
    for path in coded & set(arrays):
        tensors[path] = torch.from_numpy(arrays[path].view(np.int16)).view(torch.bfloat16)
    return nested({path: tensors[path] for path in arrays})


def each(batch: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """A batch with ``function`` applied to every tensor in it."""
    if isinstance(batch, dict):
        return {name: each(value, function) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(each(value, function) for value in batch)
    return function(batch)


def to_device(batch: Any, device: torch.device | str | None) -> Any:
    """A batch on a device. From pinned memory the copy runs beside the host."""
    if device is None:
        return batch
    return each(batch, lambda values: values.to(device, non_blocking=True))


def pinned(batch: Any) -> Any:
    """A batch in page-locked memory, from which a GPU copies by itself; as it is where there is no GPU."""
    return each(batch, lambda values: values.pin_memory()) if torch.cuda.is_available() else batch


def to_tensordict(batch: Batch, size: int) -> Any:
    """A nested dict as a ``TensorDict`` of batch size (size,). Raises ``MissingDependencyError``."""
    try:
        from tensordict import TensorDict
    except ImportError as error:
        raise MissingDependencyError("TensorDict batches need tensordict", hint="pip install tensordict") from error
    return TensorDict(batch, batch_size=[size])


class Fetched(Sequence[Any]):
    """A whole batch that also reads as the list of its samples.

    ``collate`` takes the batch as it is; any other collate function finds the samples it expects.
    """

    def __init__(self, batch: Any, size: int) -> None:
        self.batch, self._size = batch, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, number: Any) -> Any:
        if not -self._size <= number < self._size:
            raise IndexError(number)
        return each(self.batch, lambda values: values[number])

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(self._size))


def collate(samples: Any) -> Any:
    """The ``collate_fn`` for a ``DataLoader`` over datasets of this package: a batch comes whole, from one gather."""
    return samples.batch if isinstance(samples, Fetched) else default_collate(samples)
