"""A cursor into a store of trajectories, kept in a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest

import trajstore
from trajstore.checkpoint import Checkpoints
from trajstore.checkpoint.cursor import cursor, open_at
from trajstore.errors import ConflictError, FormatError


def fill(writer, seeds):
    for seed in seeds:
        writer.append({"obs": np.full((seed % 5 + 1, 3), seed, np.float32)}, seed=seed)


def test_the_dataset_is_as_it_was(tmp_path):
    with Checkpoints(tmp_path / "c", rng=False) as ckpts:
        with trajstore.create(tmp_path / "replay.zarr") as writer:
            fill(writer, range(10))
            writer.commit()
            ckpts.save(1, {}, meta={"replay": cursor(trajstore.open(tmp_path / "replay.zarr"))})
            fill(writer, range(10, 30))
        place = ckpts.restore().meta["replay"]
    replay = open_at(place)
    assert len(replay) == 10 and replay.table["seed"][:].tolist() == list(range(10))
    assert replay[7]["obs"][0, 0] == 7 and len(trajstore.open(tmp_path / "replay.zarr")) == 30
    (tmp_path / "replay.zarr").rename(tmp_path / "moved.zarr")
    assert len(open_at(place, tmp_path / "moved.zarr")) == 10


def test_parts(tmp_path):
    for part in ("rank0", "rank1"):
        with trajstore.create(tmp_path / "root.zarr", part=part) as writer:
            fill(writer, range(4))
    place = cursor(trajstore.open(tmp_path / "root.zarr"))
    with trajstore.create(tmp_path / "root.zarr", part="rank1", resume=True) as writer:
        fill(writer, range(4, 9))
    replay = open_at(place)
    assert len(replay) == 8 and sorted(replay.table["seed"][:].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_another_store_is_refused(tmp_path):
    for name, count in (("a", 9), ("b", 3)):
        with trajstore.create(tmp_path / name) as writer:
            fill(writer, range(count))
    with pytest.raises(ConflictError, match="fewer trajectories"):
        open_at(cursor(trajstore.open(tmp_path / "a")), tmp_path / "b")
    with pytest.raises(FormatError):
        open_at({"stores": 5})
