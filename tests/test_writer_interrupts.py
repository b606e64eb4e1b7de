"""Ctrl-C inside an append, where it raises at once: what was taken and what is said of it agree, at every moment."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import trajstore
from tests.campaign.workload import tiny_shards
from trajstore.engine import admission, ingest, ledger
from trajstore.format import intervals, progress

FILES = {module.__file__ for module in (admission, ingest, ledger, progress, intervals)}


def interrupted(call: Callable[[], Any], moment: int) -> bool:
    """Make a call with ``KeyboardInterrupt`` at its n-th moment at which Python looks for one; whether it came so far.

    Those moments are the beginnings of functions and the ends of calls, of which a profiler is told.
    """
    left = moment

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        if frame.f_code.co_filename in FILES and event in ("call", "return", "c_return"):
            left -= 1
            if left < 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


@pytest.mark.parametrize("unique", ["seed", None])
@pytest.mark.parametrize("many", [True, False])
def test_rows_counts_and_seeds_agree_wherever_an_interrupt_falls(
    tmp_path: Path, many: bool, unique: str | None
) -> None:
    path = tmp_path / "s"
    with tiny_shards(), trajstore.create(path, commit_every=None, handle_signals=False, unique=unique) as writer:
        writer.append({"x": np.full(2, -1)}, seed=0)
        seed, moment, coming = 1, 0, True
        while coming:
            seeds = [seed, seed + 1] if many else [seed]
            rows = np.repeat(seeds, 2)

            def append(seeds: list[int] = seeds, rows: Any = rows) -> None:
                if many:
                    writer.append_many({"x": rows}, lengths=[2] * len(seeds), seed=np.array(seeds))
                else:
                    writer.append({"x": rows}, seed=seeds[0])

            coming = interrupted(append, moment)
            seed, moment = seeds[-1] + 1, moment + 1
            if moment % 7 == 0:
                writer.commit()
        assert moment > 10
        count, steps, completed = len(writer), writer.steps, list(writer.completed)
    ds = trajstore.open(path)
    assert (len(ds), int(ds.lengths.sum())) == (count, steps)
    assert sorted(ds.table["seed"].tolist()) == completed
    assert ds.table["id"].tolist() == list(range(count))
    for trajectory in ds[1:]:
        assert trajectory["x"][:].tolist() == [trajectory["seed"]] * 2
