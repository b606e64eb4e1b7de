"""Readers of four makes beside a writer that commits, is killed and resumes as fast as it can."""

from __future__ import annotations

import importlib.util

import pytest

from tests.campaign import readers


@pytest.mark.parametrize("seed", range(2))
def test_our_own_readers_and_their_old_snapshots(seed: int) -> None:
    counts = readers.campaign(5, seed, ("own", "own_held"))
    print(dict(counts))
    assert counts["own reader"] > 50


@pytest.mark.parametrize(
    ("kind", "package"), [("zarr_python", "zarr"), ("tensorstore", "tensorstore"), ("zarrs", "zarrs")]
)
def test_readers_of_other_makes(kind: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    counts = readers.campaign(5, 7, ("own", kind))
    print(dict(counts))
    assert sum(counts.values()) > 20
