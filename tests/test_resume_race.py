"""A resumed session's first append may come while a commit without it is on its way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import trajstore
from trajstore.engine.commit import Session
from trajstore.format.manifest import Manifest


@pytest.mark.parametrize("step", ["check", "publish"])
def test_what_earlier_sessions_wrote_stays_readable(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with trajstore.create(tmp_path / "store") as writer:
        for seed in (1, 2):
            writer.append({"obs": np.full((3, 2), seed, np.float32)}, seed=seed)
    writer = trajstore.create(tmp_path / "store", resume=True, commit_every=None)
    real = getattr(Session, step)

    def append_first(self: Session, *given: Manifest) -> None:
        monkeypatch.setattr(Session, step, real)
        writer.append({"obs": np.full((4, 2), 3, np.float32)}, seed=3)
        real(self, *given)

    writer.state = {"changed": True}  # something to commit
    monkeypatch.setattr(Session, step, append_first)
    writer.commit()
    assert seeds(tmp_path / "store") == [1, 2], "the commit that was on its way"
    writer.commit()
    assert seeds(tmp_path / "store") == [1, 2, 3]
    writer.close()
    ds = trajstore.open(tmp_path / "store")
    assert ds.lengths.tolist() == [3, 3, 4] and [float(t["obs"][0, 0]) for t in ds] == [1, 2, 3]


def seeds(path: Path) -> list[int]:
    return [int(seed) for seed in trajstore.open(path).table["seed"]]
