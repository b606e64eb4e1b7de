"""The folders of RLinf's embodied replay buffer: what lies in them, and how its batches are trajectories of a store.

A file there holds a *batch*: tensors ``[T, B, …]`` of B environments that ran side by side for T steps, in E rollout
epochs of T / E. In a store each environment's column is a trajectory of its own, so that windows, returns and filters
mean one environment, and B may differ from batch to batch; the columns ``batch`` and ``env`` say which belong
together. Row ``t · B + b`` of a batch, the order in which its buffer samples, is step t of the trajectory ``env == b``.
One trajectory of T · B rows for a batch would cost as much (bytes within 2 %, random rows within 5 %, measured on their
batches of 64 × 64 images) and mean nothing to a window; one with rows of shape (B, …) would fix B for ever.
"""

from __future__ import annotations

from trajstore.rlinf.batch import Batch, batch_of, fields_of, joined
from trajstore.rlinf.files import load_batch, save_batch
from trajstore.rlinf.folder import Folder, find_ranks, read_folder, write_index
from trajstore.rlinf.rearrange import merge_folders, split_folder

__all__ = [
    "Batch",
    "Folder",
    "batch_of",
    "fields_of",
    "find_ranks",
    "joined",
    "load_batch",
    "merge_folders",
    "read_folder",
    "save_batch",
    "split_folder",
    "write_index",
]
