"""Power failures: every image of every moment of every short workload, and of some long ones (tests/campaign)."""

from __future__ import annotations

import importlib.util
import random

import pytest

from tests.campaign import reworks, share, shelves
from tests.campaign.explorer import Explorer, Violation, workloads

SHORT = list(workloads(3))
random.Random(0).shuffle(SHORT)
PARTS = 9


def test_every_image_of_every_workload_of_up_to_three_operations() -> None:
    explorer = Explorer()
    for operations in SHORT:
        explorer.workload(operations)
    share.count("every image", explorer.counts)
    assert explorer.counts["workloads"] == len(SHORT) == 156
    assert explorer.counts["covered"] > 10_000_000_000


@pytest.mark.parametrize("part", share.mine(range(PARTS)))
def test_images_built_one_by_one(part: int) -> None:
    """A million different ones in all; on some a writer is resumed, crashes again, or zarr-python reads them."""
    zarr = importlib.util.find_spec("zarr") is not None
    explorer = Explorer(seed=part, build=220, resumes=0.1, again=0.05, foreign=0.22 if zarr else 0)
    for operations in SHORT[part::PARTS]:
        explorer.workload(operations)
    share.count("images", explorer.counts)
    assert explorer.counts["images"] > 80_000  # more than a million in the nine parts: some workloads have more moments
    assert explorer.counts["resumed"] > 60
    assert explorer.counts["opened by zarr-python"] > 250 or not zarr


@pytest.mark.parametrize("seed", share.mine(range(6)))
def test_long_workloads_on_several_clocks(seed: int) -> None:
    draw = random.Random(seed)
    explorer = Explorer(seed=seed, build=2, resumes=0.05)
    for _ in range(2):
        explorer.workload("".join(draw.choices("aafbrcd", k=draw.randint(5, 8))), wide=True)
    print(dict(explorer.counts))
    assert explorer.counts["covered"] > 100_000


@pytest.mark.parametrize("name", reworks.OPERATIONS)
def test_every_image_of_operations_on_whole_stores(name: str) -> None:
    counts = reworks.power_failures(name, 0, 0, cover=True)
    share.count("every image of reworks", counts)
    assert counts["moments covered"] > 40 and counts["covered"] > 500_000


def test_an_operation_that_leaves_out_its_syncs_would_be_seen() -> None:
    with pytest.raises(Violation):
        reworks.power_failures("merge", 0, 0, cover=True, wrap=reworks.unsynced)


def test_every_image_of_checkpoints() -> None:
    counts = shelves.explore(resumes=30)
    share.count("every image of checkpoints", counts)
    assert counts["covered"] > 1_000_000


@pytest.mark.parametrize("mutant", shelves.MUTANTS)
def test_checkpoints_that_leave_out_a_sync_would_be_seen(mutant: str) -> None:
    with pytest.raises(Violation):
        shelves.explore(5, mutant)
