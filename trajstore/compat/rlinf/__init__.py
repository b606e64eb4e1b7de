"""RLinf's ``TrajectoryReplayBuffer`` under its own name, and its tool that merges and splits buffer folders.

``python -m trajstore.compat.rlinf merge|split --source-path … --save-path … [--split-count N] [--copy]``
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["TrajectoryReplayBuffer"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # the buffer needs PyTorch; moving files does not
        return getattr(importlib.import_module("trajstore.compat.rlinf.buffer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
