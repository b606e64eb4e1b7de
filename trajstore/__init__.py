"""A store for trajectories: recorded as they happen, committed durably, sliced lazily, readable by any Zarr library."""

from __future__ import annotations

import typing

from trajstore.__about__ import __version__
from trajstore.dataset import Dataset, Trajectory, open
from trajstore.errors import TrajstoreError
from trajstore.format.layout import Codec
from trajstore.format.schema import Clock, Column, Field
from trajstore.writer import Writer, create

__all__ = [
    "Clock",
    "Codec",
    "Column",
    "Dataset",
    "Field",
    "Recorder",
    "Trajectory",
    "TrajstoreError",
    "Writer",
    "__version__",
    "create",
    "load_routes",
    "open",
    "run_dir",
]


if typing.TYPE_CHECKING:
    from trajstore.collect.recorder import Recorder
    from trajstore.compat.routes import load_routes
    from trajstore.run import run_dir


def __getattr__(name: str) -> object:
    if name == "Recorder":
        from trajstore.collect.recorder import Recorder

        return Recorder
    if name == "load_routes":
        from trajstore.compat.routes import load_routes

        return load_routes
    if name == "run_dir":
        from trajstore.run import run_dir

        return run_dir
    raise AttributeError(f"module 'trajstore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
