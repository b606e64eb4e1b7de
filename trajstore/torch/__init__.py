"""Training input for torch: datasets, a loader that resumes exactly, and a replay buffer on disk.

Importing this imports torch; nothing below it does.
"""

from __future__ import annotations

from trajstore.sampling.cutting import Transitions
from trajstore.sampling.replay import Priorities
from trajstore.sampling.sampler import Batches, Order, quality
from trajstore.sampling.windows import Window
from trajstore.torch.datasets import StepDataset, Stream, TrajectoryDataset, TransitionDataset, WindowDataset
from trajstore.torch.loader import Loader
from trajstore.torch.replay import ReplayBuffer
from trajstore.torch.tensors import collate, to_device, to_tensordict, to_tensors

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
