"""The loader: batches prepared ahead by a thread or by worker processes, and a state that counts what was delivered."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader

from trajstore.errors import SchemaError
from trajstore.sampling.sampler import Batches, Order
from trajstore.torch.datasets import SampleDataset
from trajstore.torch.tensors import collate, pinned, to_device


class Loader:
    """Goes through a dataset, an epoch for each iteration, and resumes exactly.

    Parameters
    ----------
    batch_size : of one rank.
    order : ``"shuffle"``, ``"blocks"`` (see ``sampler.Order``), ``"sequential"``, or an ``Order``.
    weights : draw with replacement in proportion: a column, a filter, or an array (``Samples.weights``).
    bucket : put trajectories of about one length into a batch.
    rank, world_size : by default those of ``torch.distributed``, or one of one.
    workers : processes that prepare batches; with 0 a thread does, which is often faster: reading runs outside the
        GIL on all cores, and nothing is copied between processes.
    prefetch : batches that are prepared ahead (of each worker); 0 for none.
    pin_memory : put them into page-locked memory. device : where they shall be; the next one is on its way already.
    context : how workers are made: ``"fork"``, ``"spawn"``, ``"forkserver"``.

    Examples
    --------
    >>> loader = Loader(WindowDataset(ds, 16), 64, seed=1)         # doctest: +SKIP
    >>> for epoch in range(10):                                    # doctest: +SKIP
    ...     for batch in loader:
    ...         train(batch)
    ...         checkpoint = {"loader": loader.state_dict()}       # as of this batch

    Notes
    -----
    ``state_dict`` counts the batches that came out, not those prepared. After ``load_state_dict``, with any number of
    ranks and workers, the next iteration goes on with the sample after the last one that the ranks had trained on.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        batch_size: int,
        *,
        seed: int = 0,
        order: str | Order = "shuffle",
        weights: Any = None,
        bucket: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        workers: int = 0,
        prefetch: int = 2,
        drop_last: bool = True,
        pin_memory: bool = False,
        device: torch.device | str | None = None,
        context: str | None = None,
    ) -> None:
        samples = dataset.samples
        if isinstance(order, str):
            order = Order(
                len(samples),
                seed,
                kind=order,
                block=samples.block,
                weights=None if weights is None else samples.weights(weights),
                lengths=samples.sample_lengths if bucket else None,
            )
        elif weights is not None or bucket:
            raise SchemaError("weights and buckets are the order's own", hint="give them to Order(...)")
        if order.n != len(samples):
            raise SchemaError(f"the order is of {order.n} samples, and the dataset has {len(samples)}")
        here, all_ranks = _ranks()
        self.dataset = dataset
        self.batches = Batches(
            order,
            batch_size,
            rank=here if rank is None else rank,
            world_size=all_ranks if world_size is None else world_size,
            drop_last=drop_last,
            identity=samples.identity,
        )
        if not len(self.batches) and len(samples):
            raise SchemaError(
                f"{len(samples)} samples do not fill one batch of {batch_size} on each rank",
                hint="make batches smaller, or pass drop_last=False",
            )
        if workers < 0 or prefetch < 0:
            raise SchemaError(f"{workers} workers, {prefetch} batches ahead")
        self._workers, self._prefetch, self._context = workers, prefetch, context
        self._pin, self._device = pin_memory, device
        self._numbers = _Numbers(self.batches)
        self._processes: DataLoader[Any] | None = None

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        return len(self.batches)

    @property
    def epoch(self) -> int:
        return self.batches.epoch

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ``ConfigMismatchError`` if the state is of other samples or another order."""
        self.batches.load_state_dict(state)

    def __iter__(self) -> Iterator[Any]:
        batches = self.batches
        epoch, position = batches.epoch, batches.position
        behind = (stop for _, _, stop in batches.spans(position))
        source = self._from_workers(epoch, position) if self._workers else self._from_thread(epoch, position)
        for batch, position in zip(_one_ahead(source, self._device), behind):
            batches.epoch, batches.position = epoch, position
            yield batch
        batches.epoch, batches.position = epoch + 1, 0

    def _from_thread(self, epoch: int, position: int) -> Iterator[Any]:
        numbers = (chosen for chosen, _ in self.batches.ahead(epoch, position))
        if not self._prefetch:
            yield from map(self._make, numbers)
            return
        waiting: deque[Future[Any]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="trajstore-loader") as thread:
            try:
                for chosen in numbers:
                    waiting.append(thread.submit(self._make, chosen))
                    if len(waiting) > self._prefetch:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _make(self, numbers: Any) -> Any:
        batch = self.dataset.batch(numbers)
        return pinned(batch) if self._pin else batch

    def _from_workers(self, epoch: int, position: int) -> Iterable[Any]:
        self._numbers.begin(epoch, position)
        if self._processes is None:
            self._processes = DataLoader(
                self.dataset,
                batch_sampler=self._numbers,
                num_workers=self._workers,
                collate_fn=collate,
                pin_memory=self._pin and torch.cuda.is_available(),
                prefetch_factor=max(self._prefetch, 1),
                multiprocessing_context=self._context,
                persistent_workers=True,
            )
        return self._processes


class _Numbers:
    """The rest of an epoch, as a ``DataLoader``'s batch sampler; the workers outlive the epoch."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self.begin(0, 0)

    def begin(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position

    def __iter__(self) -> Iterator[list[int]]:
        return (numbers.tolist() for numbers, _ in self._batches.ahead(self._epoch, self._position))

    def __len__(self) -> int:
        return sum(1 for _ in self._batches.spans(self._position))


def _one_ahead(source: Iterable[Any], device: torch.device | str | None) -> Iterator[Any]:
    """Batches on the device; the copy of the next one is begun before one is given out."""
    if device is None:
        yield from source
        return
    before: list[Any] = []
    for batch in source:
        before.append(to_device(batch, device))
        if len(before) > 1:
            yield before.pop(0)
    yield from before


def _ranks() -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
