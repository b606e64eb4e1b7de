"""Rows set aside and taken back: as they were, whatever was joined, rewritten or spilled meanwhile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trajstore.collect.remains import Remains
from trajstore.collect.scratch import SpillLog
from trajstore.errors import CorruptionError
from trajstore.format.layout import SCRATCH
from trajstore.media.storage import LocalStorage


def rows_of(envs: np.ndarray, begin: np.ndarray, stop: int) -> dict[str, np.ndarray]:
    """Rows that say whose they are."""
    pairs = [(env, step) for env, first in zip(envs, begin) for step in range(first, stop)]
    x = np.array(pairs, np.int64).reshape(-1, 2)
    return {"x": x, "wide": np.repeat(x[:, :1], 50, axis=1).astype(np.uint8)}


@pytest.mark.parametrize("limit", [0, 5_000, 1 << 30])
def test_rows_come_back_as_they_were(tmp_path: Path, limit: int) -> None:
    rng = np.random.default_rng(3)
    num_envs = 30
    storage = LocalStorage(tmp_path)
    remains = Remains(num_envs, limit, lambda: SpillLog(storage, "session"))
    start = np.zeros(num_envs, np.int64)
    patience = 10.0 ** rng.uniform(0, 3, num_envs)  # steps that an environment's episodes take
    most = 0
    for step in range(0, 1200, 4):
        stop = step + 4
        envs = np.flatnonzero(start < stop)
        begin = np.maximum(start[envs], step)
        remains.add(step, stop, envs, begin, rows_of(envs, begin, stop))
        remains.trim()
        ends = np.flatnonzero(rng.random(num_envs) < 4 / patience)
        for env in ends:
            steps = np.arange(start[env], stop)
            out = np.empty((len(steps), 2), np.int64)
            remains.take("x", np.full(len(steps), env), steps, out)
            np.testing.assert_array_equal(out, np.stack([np.full(len(steps), env), steps], axis=1))
            wide = np.empty((len(steps), 50), np.uint8)
            remains.take("wide", np.full(len(steps), env), steps, wide)
            assert (wide == env).all()
        remains.drop(ends)
        remains.trim()
        start[ends] = stop
        most = max(most, len(remains._pieces))
        held = {path.name for path in (tmp_path / SCRATCH).glob("*")}
        assert len(held) == sum(piece.spilled is not None for piece in remains._pieces)
        assert remains.memory_bytes <= limit
    assert most <= 18, "neighbours are joined"
    remains.close()
    assert not list((tmp_path / SCRATCH).glob("*"))


def test_damage_in_scratch_is_found(tmp_path: Path) -> None:
    remains = Remains(2, 0, lambda: SpillLog(LocalStorage(tmp_path), "session"))
    envs, begin = np.arange(2), np.zeros(2, np.int64)
    remains.add(0, 9, envs, begin, rows_of(envs, begin, 9))
    remains.trim()
    (file,) = (tmp_path / SCRATCH).iterdir()
    data = bytearray(file.read_bytes())
    data[-30] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptionError, match="crc32c"):
        remains.take("wide", np.zeros(9, int), np.arange(9), np.empty((9, 50), np.uint8))
