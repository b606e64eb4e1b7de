"""A store for trajectories: recorded as they happen, committed durably, sliced lazily, readable by any Zarr library."""

from __future__ import annotations

from trajstore.__about__ import __version__

__all__ = ["__version__"]
