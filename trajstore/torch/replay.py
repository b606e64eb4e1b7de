"""The replay buffer with tensors in its batches."""

from __future__ import annotations

from typing import Any

import torch

from trajstore.sampling import replay
from trajstore.sampling.cutting import Shape
from trajstore.torch.tensors import pinned, to_device, to_tensordict, to_tensors


class ReplayBuffer(replay.ReplayBuffer):
    """A store that is written and sampled at once; batches are nested dicts of tensors.

    Parameters
    ----------
    device : where batches shall be; from page-locked memory if ``pin_memory``.
    tensordict : give TensorDicts.

    See Also
    --------
    trajstore.sampling.replay.ReplayBuffer : all other parameters, and the same in NumPy.
    """

    def __init__(
        self,
        path: Any,
        shape: Shape = None,
        *,
        device: torch.device | str | None = None,
        pin_memory: bool = False,
        tensordict: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(path, shape, bits=True, **options)
        self._device, self._pin, self._tensordict = device, pin_memory, tensordict

    def sample(self, size: int) -> Any:
        """A batch of ``size`` samples; see ``trajstore.sampling.replay.ReplayBuffer.sample``."""
        coded = [path for path, rows in self._index.sources.items() if rows.dtype == "bfloat16"]
        batch = to_tensors(super().sample(size), [*coded, *(f"next/{path}" for path in coded)])
        batch = to_device(pinned(batch) if self._pin else batch, self._device)
        return to_tensordict(batch, size) if self._tensordict else batch

    def update_priorities(self, index: Any, priorities: Any) -> None:
        """Tensors on any device, or arrays; see ``trajstore.sampling.replay.ReplayBuffer.update_priorities``."""
        super().update_priorities(_on_host(index), _on_host(priorities))


def _on_host(values: Any) -> Any:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
