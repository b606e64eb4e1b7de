"""Episodes recorded one step at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import trajstore
from trajstore.errors import SchemaError, StateError


def test_steps_become_a_trajectory(tmp_path: Path) -> None:
    obs = np.zeros((2, 3), np.float32)
    with trajstore.create(tmp_path / "s") as writer:
        for seed in range(3):
            with writer.episode(seed=seed) as episode:
                for t in range(40 + seed):
                    obs[...] = t
                    episode.step(
                        obs={"image": obs}, action=t % 4, reward=0.5 * t, terminated=t == 40, truncated=t == 41
                    )
                episode.final(obs={"image": obs + 1})
                episode.columns["success"] = seed == 1
            assert episode.id == seed
            assert len(episode) == 40 + seed
            with pytest.raises(StateError, match="over"):
                episode.step(obs={"image": obs}, action=0, reward=0.0)
    ds = trajstore.open(tmp_path / "s")
    assert ds.lengths.tolist() == [40, 41, 42]
    assert ds[2]["obs/image"][:, 1, 1].tolist() == [*range(42), 42]
    assert ds[1]["action"][:].tolist() == [t % 4 for t in range(41)]
    assert ds.table["terminated"].tolist() == [False, True, False]
    assert ds.table["truncated"].tolist() == [True, False, True]  # the first one was simply left off
    assert ds.table["success"].tolist() == [False, True, False]


@pytest.mark.parametrize("on_error", ["drop", "truncate"])
def test_an_exception_drops_or_truncates(tmp_path: Path, on_error: str) -> None:
    with trajstore.create(tmp_path / "s") as writer:

        def interrupted() -> None:
            with writer.episode(on_error=on_error) as episode:
                episode.step(x=1, terminated=False)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            interrupted()
        with writer.episode():
            pass
        with pytest.raises(SchemaError, match="on_error"):
            writer.episode(on_error="keep")
    ds = trajstore.open(tmp_path / "s")
    assert len(ds) == (on_error == "truncate")
    if len(ds):
        assert (bool(ds.table["truncated"][0]), bool(ds.table["terminated"][0])) == (True, False)


def test_a_field_that_changes_is_refused(tmp_path: Path) -> None:
    with trajstore.create(tmp_path / "s") as writer, writer.episode() as episode:
        episode.step(x=np.zeros(3, np.float32))
        with pytest.raises(SchemaError, match=r"'x' is float64 \(3,\) now"):
            episode.step(x=np.zeros(3))
        with pytest.raises(SchemaError, match=r"\(4,\) now"):
            episode.step(x=np.zeros(4, np.float32))
        episode.step(x=np.ones(3, np.float32))
    assert trajstore.open(tmp_path / "s")[0]["x"][:, 0].tolist() == [0, 1]


def test_tensors_that_change_in_place_are_stored_as_they_were(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    x = torch.zeros(2, dtype=torch.bfloat16)
    with trajstore.create(tmp_path / "s") as writer, writer.episode() as episode:
        for _ in range(5):
            x += 1
            episode.step(x=x)
    ds = trajstore.open(tmp_path / "s")
    assert ds[0]["x"][:, 0].tolist() == [1, 2, 3, 4, 5]
    assert ds.fields["x"].dtype == "bfloat16"
