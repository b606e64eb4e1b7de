"""Collecting: many environments, many processes, one call a step."""

from __future__ import annotations

from trajstore.collect.bar import ProgressBar
from trajstore.collect.padded import append_padded
from trajstore.collect.recorder import Recorder
from trajstore.collect.seeds import SeedDispenser, split_seeds
from trajstore.collect.tensordict import TensorDictRecorder

__all__ = ["ProgressBar", "Recorder", "SeedDispenser", "TensorDictRecorder", "append_padded", "split_seeds"]
