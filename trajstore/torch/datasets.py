"""Map-style datasets of steps, windows, transitions and whole trajectories, and a stream of their batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from trajstore.dataset import Dataset
from trajstore.sampling.cutting import Transitions
from trajstore.sampling.sampler import Batches
from trajstore.sampling.samples import CutSamples, Samples, TrajectorySamples
from trajstore.sampling.windows import Window
from trajstore.torch.tensors import Fetched, each, to_tensordict, to_tensors

Transform = Callable[[Any], Any]


class SampleDataset(torch.utils.data.Dataset[Any]):
    """Samples as tensors: what a ``DataLoader`` takes as a map-style dataset.

    A ``DataLoader`` asks for a whole batch at once (``__getitems__``), which is one gather for each field; give it
    ``collate_fn=trajstore.torch.collate``, or the batch is taken apart and put together again.

    Attributes
    ----------
    samples : the same in NumPy.

    Notes
    -----
    Works in workers that are forked, spawned or made by a fork server; each opens the store by itself and has a cache
    of its own.
    """

    def __init__(self, samples: Samples, *, tensordict: bool = False, transform: Transform | None = None) -> None:
        self.samples = samples
        self._tensordict, self._transform = tensordict, transform

    @property
    def bfloat16(self) -> list[str]:
        """Paths that a batch holds as bfloat16 bits."""
        coded = [path for path, rows in self.samples.fields.items() if rows.dtype == "bfloat16"]
        return [*coded, *(f"next/{path}" for path in coded)]

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, numbers: Any) -> Any:
        """The samples of these numbers as one batch: nested dicts of tensors, or a TensorDict."""
        batch = self._finish(self.samples.get(numbers))
        if self._tensordict:
            batch = to_tensordict(batch, len(numbers))
        return batch if self._transform is None else self._transform(batch)

    def _finish(self, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
        return to_tensors(arrays, self.bfloat16)

    def __getitem__(self, number: int) -> Any:
        batch = self.batch(np.array([number]))
        return batch[0] if self._tensordict else each(batch, lambda values: values[0])

    def __getitems__(self, numbers: Sequence[int]) -> Fetched:
        return Fetched(self.batch(np.asarray(numbers, np.int64)), len(numbers))

    def weights(self, what: Any) -> np.ndarray[Any, Any]:
        """A weight for each sample from a column, a filter or an array; see ``samples.Samples.weights``."""
        return self.samples.weights(what)


class StepDataset(SampleDataset):
    """Single steps: every field as (n, *shape).

    Parameters
    ----------
    fields, columns : names to read; by default all fields that go by the step, and no columns.
    tensordict : give TensorDicts instead of nested dicts.
    transform : applied to each batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        fields: Sequence[str] | None = None,
        columns: Sequence[str] = (),
        tensordict: bool = False,
        transform: Transform | None = None,
    ) -> None:
        samples = CutSamples(dataset, fields=fields, columns=columns, bits=True)
        super().__init__(samples, tensordict=tensordict, transform=transform)


class WindowDataset(SampleDataset):
    """Windows of steps: every field as (n, h, *shape), and a mask where they are padded.

    Parameters
    ----------
    window : its shape; or a number of steps.
    """

    def __init__(
        self,
        dataset: Dataset,
        window: Window | int,
        *,
        fields: Sequence[str] | None = None,
        columns: Sequence[str] = (),
        tensordict: bool = False,
        transform: Transform | None = None,
    ) -> None:
        shape = Window(window) if isinstance(window, int) else window
        samples = CutSamples(dataset, shape, fields=fields, columns=columns, bits=True)
        super().__init__(samples, tensordict=tensordict, transform=transform)


class TransitionDataset(SampleDataset):
    """Steps with n-step returns and the observations after them; see ``Transitions``."""

    def __init__(
        self,
        dataset: Dataset,
        transitions: Transitions,
        *,
        fields: Sequence[str] | None = None,
        columns: Sequence[str] = (),
        tensordict: bool = False,
        transform: Transform | None = None,
    ) -> None:
        samples = CutSamples(dataset, transitions, fields=fields, columns=columns, bits=True)
        super().__init__(samples, tensordict=tensordict, transform=transform)


class TrajectoryDataset(SampleDataset):
    """Whole trajectories: padded with zeros to the longest of a batch, with ``count``; or, if asked, nested tensors.

    nested : every field as one ``torch.nested`` tensor of jagged layout (n, j, *shape), without padding.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        fields: Sequence[str] | None = None,
        columns: Sequence[str] = (),
        nested: bool = False,
        tensordict: bool = False,
        transform: Transform | None = None,
    ) -> None:
        samples = TrajectorySamples(dataset, fields=fields, columns=columns, bits=True)
        super().__init__(samples, tensordict=tensordict, transform=transform)
        self._nested = nested

    def batch(self, numbers: Any) -> Any:
        if not self._nested:
            return super().batch(numbers)
        chosen = np.asarray(numbers, np.int64)
        assert isinstance(self.samples, TrajectorySamples)
        found = self.samples.end_to_end(chosen)
        flat = to_tensors({path: rows for path, (rows, _) in found.items()}, self.bfloat16)
        ends = to_tensors({path: np.cumsum(np.r_[0, counts]) for path, (_, counts) in found.items()})
        batch = _jagged(flat, ends)
        return batch if self._transform is None else self._transform(batch)


def _jagged(values: Any, offsets: Any) -> Any:
    if isinstance(values, dict):
        return {name: _jagged(value, offsets[name]) for name, value in values.items()}
    return torch.nested.nested_tensor_from_jagged(values, offsets)


class Stream(IterableDataset[Any]):
    """The batches of an epoch as an iterable dataset, in the same order for any number of workers.

    Give it to ``DataLoader(stream, batch_size=None, num_workers=...)``. Each iteration goes through the epoch and from
    the position that ``batches`` has when it begins; ``Loader`` also keeps count of what was delivered.
    """

    def __init__(self, dataset: SampleDataset, batches: Batches) -> None:
        self.dataset, self.batches = dataset, batches

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        spans = islice(self.batches.spans(self.batches.position), first, None, every)
        for start, stop, _ in spans:
            yield self.dataset.batch(self.batches.order.at(self.batches.epoch, np.arange(start, stop)))

    def __len__(self) -> int:
        return sum(1 for _ in self.batches.spans(self.batches.position))
