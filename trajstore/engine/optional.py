"""Packages that one method needs and the rest does without."""

from __future__ import annotations

import importlib
from typing import Any

from trajstore.errors import MissingDependencyError


def optional(module: str, extra: str) -> Any:
    """A module, imported now. Raises ``MissingDependencyError``, which names the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.split(".")[0]
        raise MissingDependencyError(
            f"this needs {name}", hint=f"pip install 'trajstore[{extra}]'", name=name
        ) from error
