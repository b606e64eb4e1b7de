"""What `info` says of a store agrees with what is in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import trajstore
from trajstore.errors import NotFoundError
from trajstore.operations.info import info


def test_an_empty_store_has_no_lengths(tmp_path: Path) -> None:
    trajstore.create(tmp_path / "s", handle_signals=False).close()
    found = info(tmp_path / "s")
    assert (found.trajectories, found.length_min, found.length_mean, found.current_seed) == (0, None, None, None)
    assert (found.target, found.remaining, found.ratio, found.rate_steps) == (None, None, None, None)


def test_sizes_count_what_trajectories_name_and_not_the_gaps_between_sessions(tmp_path: Path) -> None:
    rows = 0
    for session in range(3):
        with trajstore.create(tmp_path / "s", resume=True, handle_signals=False) as writer:
            for seed in range(4):
                steps = 2 + seed
                frames = (np.arange(steps * 192).reshape(steps, 3, 8, 8) % 256 / 255).astype(np.float16)
                writer.append({"obs": frames, "text": "ab", "extra": np.zeros(seed)}, seed=10 * session + seed)
                rows += steps
    found = info(tmp_path / "s")
    fields = {field.name: field for field in found.fields}
    assert (fields["obs"].rows, fields["obs"].bytes_raw, fields["obs"].stored) == (rows, rows * 192 * 2, "uint8")
    assert (fields["text"].rows, fields["text"].bytes_raw) == (24, 24)
    assert fields["extra"].rows == 3 * (0 + 1 + 2 + 3)
    files = [file for file in (tmp_path / "s").rglob("c.*") if "__trajstore" not in file.parts]
    assert found.bytes_disk == sum(file.stat().st_size for file in files)
    assert found.parts[0].files == len(files)
    assert found.bytes_raw == sum(field.bytes_raw for field in found.fields) + 12 * (8 + 8)
    assert {clock.name: clock.rows for clock in found.clocks}["steps"] == found.steps == rows
    assert (found.current_seed, found.seeds_attempted) == (24, 12)


def test_parts_are_summed(tmp_path: Path) -> None:
    for rank in range(3):
        with trajstore.create(tmp_path, part=f"rank{rank}", target=5, handle_signals=False) as writer:
            for seed in range(rank + 1):
                writer.append({"x": np.zeros(4)}, seed=100 * rank + seed)
    found = info(tmp_path)
    assert (found.trajectories, found.steps, found.target, found.remaining) == (6, 24, 15, 9)
    assert [part.trajectories for part in found.parts] == [1, 2, 3]
    assert found.bytes_disk == sum(part.bytes_disk for part in found.parts) > 0
    assert found.current_seed == 203 and found.path == str(tmp_path)


def test_the_rate_is_of_the_last_session(tmp_path: Path) -> None:
    for session in range(2):
        with trajstore.create(tmp_path / "s", resume=True, handle_signals=False) as writer:
            for _ in range(10 + session):
                writer.append({"x": np.zeros(3)})
    (part,) = info(tmp_path / "s").parts
    assert (part.session_trajectories, part.session_steps) == (11, 33)
    assert part.session_seconds > 0 and part.age >= 0 and part.writer is None


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        info(tmp_path / "nothing")
