"""Training input for torch: datasets, a loader that resumes exactly, and a replay buffer on disk.

Importing this imports torch; nothing below it does.
"""

from __future__ import annotations

from trajstore.cutting import Transitions
from trajstore.replay import Priorities
from trajstore.sampler import Batches, Order, quality
from trajstore.torch.datasets import StepDataset, Stream, TrajectoryDataset, TransitionDataset, WindowDataset
from trajstore.torch.loader import Loader
from trajstore.torch.replay import ReplayBuffer
from trajstore.torch.tensors import collate, to_device, to_tensordict, to_tensors
from trajstore.windows import Window

__all__ = [
    "Batches",
    "Loader",
    "Order",
    "Priorities",
    "ReplayBuffer",
    "StepDataset",
    "Stream",
    "TrajectoryDataset",
    "TransitionDataset",
    "Transitions",
    "Window",
    "WindowDataset",
    "collate",
    "quality",
    "to_device",
    "to_tensordict",
    "to_tensors",
]
