"""Where batches lie that are not in memory: what a folder of files and a store have in common."""

from __future__ import annotations

from typing import Any, Protocol

from trajstore.rlinf.batch import WEIGHTS, Batch
from trajstore.rlinf.flat import Tensors
from trajstore.sampling.windows import Ints

Entry = dict[str, Any]

LENGTH = "max_episode_length"


class Backing(Protocol):
    """Batches on disk."""

    def rows(self, numbers: Ints, rows: Ints) -> Tensors:
        """Row ``rows[i]`` of batch ``numbers[i]``, by path; the fields that all of them have."""

    def whole(self, number: int) -> Batch:
        """A batch as it was given."""


def entry_of(number: int, batch: Batch) -> Entry:
    """What an index says of a batch."""
    shape = next(
        (batch.tensors[name].shape for name in ("prev_logprobs", "rewards", "actions") if name in batch.tensors),
        (batch.steps, batch.envs),
    )
    return {
        "num_samples": batch.steps * batch.envs,
        "trajectory_id": number,
        LENGTH: batch.plain.get(LENGTH),
        "shape": [int(n) for n in shape],
        WEIGHTS: str(batch.plain.get(WEIGHTS, "")),
    }
