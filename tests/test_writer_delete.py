"""Deleting through a live writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import trajstore
from trajstore.errors import NotFoundError


def numbers(path: Path) -> list[int]:
    return [int(t["action"][0]) for t in trajstore.open(path)]


def test_deleted_trajectories_are_gone_with_the_next_commit(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with trajstore.create(path) as writer:
        for number in range(5):
            writer.append({"action": np.full(3, number)}, seed=number)
        writer.commit()
        writer.append({"action": np.full(3, 5)}, seed=5)
        writer.delete([1, 5])
        writer.delete(1)
        assert numbers(path) == [0, 1, 2, 3, 4]
        writer.commit()
        assert numbers(path) == [0, 2, 3, 4]
        for wrong in (6, -1):
            with pytest.raises(NotFoundError, match="no trajectory of the id"):
                writer.delete(wrong)
    with trajstore.create(path, resume=True) as writer:
        assert list(writer.remaining_seeds(range(7), 9)) == [6]
        assert writer.append({"action": np.full(3, 6)}, seed=6) == 6
        writer.delete(range(2, 4))
        writer.delete([6])
    assert numbers(path) == [0, 4]
    assert [t.id for t in trajstore.open(path)] == [0, 4]
    with trajstore.create(path, resume=True) as writer:
        writer.delete([4, 0])
        writer.append({"action": np.full(3, 7)}, seed=7)
    assert numbers(path) == [7]
