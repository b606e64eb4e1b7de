"""The states of the random number generators that a process has: Python's, NumPy's, torch's, CUDA's."""

from __future__ import annotations

import random
import sys
from array import array
from typing import Any

import numpy as np

from trajstore.errors import FormatError

Drawn = dict[str, Any]
"""The generators' states as the libraries give them; :func:`as_tree` makes of them what a checkpoint holds."""


def draw() -> Drawn:
    """Take the states of the global generators. torch's if torch is loaded, CUDA's if in use.

    No more than must be done before the loop goes on.
    """
    state: Drawn = {"python": random.getstate(), "numpy": np.random.get_state(legacy=True)}
    torch = sys.modules.get("torch")
    if torch is not None:
        state["torch"] = torch.get_rng_state()
        if torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def as_tree(drawn: Drawn) -> dict[str, Any]:
    """Drawn states as a tree for a checkpoint."""
    version, internal, gauss = drawn["python"]
    name, keys, position, has_gauss, cached = drawn["numpy"]
    return {
        **drawn,
        "python": [version, np.frombuffer(array("I", internal), np.uint32), gauss],
        "numpy": [name, np.array(keys), int(position), int(has_gauss), float(cached)],
    }


def rng_state() -> dict[str, Any]:
    """The states of the global generators, as a tree for a checkpoint. torch's if torch is loaded, CUDA's if in use."""
    return as_tree(draw())


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` gave. Raises ``FormatError`` if it is something else."""
    try:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal.tolist()), gauss))
        np.random.set_state(tuple(state["numpy"]))
        torch = sys.modules.get("torch")
        if torch is not None and "torch" in state:
            torch.set_rng_state(state["torch"])
            if "cuda" in state and torch.cuda.is_available():
                # A state for each device there was; on fewer devices the first ones.
                torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"not a state of random number generators: {error}") from error
