"""Each precaution of the engine taken out in turn: the harness must see that it is gone."""

from __future__ import annotations

import pytest

from tests.campaign import ablations, zombies
from tests.campaign.explorer import Explorer, Violation
from trajstore.errors import TrajstoreError

WORKLOADS = ("aac", "afra", "rara", "ffca")


def explore() -> None:
    explorer = Explorer(seed=1, resumes=0.3)
    for operations in WORKLOADS:
        explorer.workload(operations)


def wake() -> None:
    zombies.campaign(150, seed=2)


def damage() -> None:
    from tests.campaign import damage

    damage.lost_and_old_files()


def test_the_engine_itself_passes_what_the_mutants_fail() -> None:
    explore()  # and tests/test_zombies.py, the schedules
    damage()


@pytest.mark.parametrize("mutant", ablations.BY_CRASHES, ids=lambda mutant: mutant.__name__)
def test_a_power_failure_shows_that(mutant: ablations.Mutant) -> None:
    with mutant(), pytest.raises((Violation, TrajstoreError)):
        explore()


@pytest.mark.parametrize("mutant", ablations.BY_ZOMBIES, ids=lambda mutant: mutant.__name__)
def test_a_writer_that_wakes_shows_that(mutant: ablations.Mutant) -> None:
    with mutant(), pytest.raises(Violation):
        wake()


@pytest.mark.parametrize("mutant", ablations.BY_DAMAGE, ids=lambda mutant: mutant.__name__)
def test_damaged_files_show_that(mutant: ablations.Mutant) -> None:
    with mutant(), pytest.raises(Violation):
        damage()


def test_there_are_enough_of_them() -> None:
    assert len([*ablations.BY_CRASHES, *ablations.BY_ZOMBIES, *ablations.BY_DAMAGE]) >= 12
