"""Checkpoints of a training run; see :class:`Checkpoints`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trajstore.checkpoint.checkpoints import Checkpoints as Checkpoints
    from trajstore.checkpoint.checkpoints import DamagedCheckpointWarning as DamagedCheckpointWarning
    from trajstore.checkpoint.checkpoints import Restored as Restored
    from trajstore.checkpoint.rng import rng_state as rng_state
    from trajstore.checkpoint.rng import set_rng_state as set_rng_state
    from trajstore.checkpoint.shelf import Checkpoint as Checkpoint
    from trajstore.checkpoint.tree import File as File
    from trajstore.checkpoint.tree import read_folder as read_folder
    from trajstore.checkpoint.tree import write_folder as write_folder

_ROOMS = {
    "Checkpoint": "shelf",
    "Checkpoints": "checkpoints",
    "DamagedCheckpointWarning": "checkpoints",
    "File": "tree",
    "Restored": "checkpoints",
    "read_folder": "tree",
    "rng_state": "rng",
    "set_rng_state": "rng",
    "write_folder": "tree",
}
__all__ = list(_ROOMS)


def __getattr__(name: str) -> Any:
    # Lazy: the compatibility modules use rooms of this package and need no more than those.
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
