"""TorchRL: an adapter for ``torchrl.checkpoint.Checkpoint`` that writes a component's state as a checkpoint here.

from torchrl.checkpoint import Checkpoint
from trajstore.checkpoint.torchrl import StateAdapter

checkpoint = Checkpoint()
checkpoint.register("policy", policy, adapter=StateAdapter())
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrl.checkpoint import CheckpointAdapter

from trajstore.checkpoint import tensors
from trajstore.checkpoint.single import load_state, save_state


class StateAdapter(CheckpointAdapter):  # type: ignore[misc]
    """Any component with ``state_dict`` and ``load_state_dict``."""

    adapter_id = "trajstore"
    format_version = 1

    def save(self, component: Any, path: Path, *, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        state = component.state_dict(*args, **kwargs)
        save_state(Path(path) / "state", state)
        return state

    def load(
        self, component: Any, path: Path, *, map_location: Any, tensor_load_kwargs: Mapping[str, Any],
        args: tuple[Any, ...], kwargs: Mapping[str, Any],
    ) -> Any:  # fmt: skip
        state = tensors.moved(load_state(Path(path) / "state"), map_location)
        component.load_state_dict(state, *args, **kwargs)
