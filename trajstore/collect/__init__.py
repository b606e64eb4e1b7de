"""Collecting: many environments, many processes, one call a step."""

from __future__ import annotations

from trajstore.collect.recorder import Recorder
from trajstore.collect.seeds import SeedDispenser, split_seeds

__all__ = ["Recorder", "SeedDispenser", "split_seeds"]
