"""Collecting: many environments, many processes, one call a step."""

from __future__ import annotations

from trajstore.collect.recorder import Recorder

__all__ = ["Recorder"]
