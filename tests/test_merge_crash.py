"""Merges, splits, moves, deletions and derived arrays that are killed, or lose power, at any of their operations."""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.campaign.disk import CHANGES, SYNCS, Tapped
from tests.campaign.reworks import (
    OPERATIONS,
    Killed,
    begun,
    contents,
    copied,
    mortal,
    power_failures,
    sees,
    small_and_in_order,
)
from trajstore.errors import StorageError

MOMENTS, IMAGES = 60, 2  # at which the power fails, and images tried at each


@pytest.fixture(autouse=True)
def in_order() -> Iterator[None]:
    with small_and_in_order():
        yield


@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_at_any_operation_it_runs_again_to_the_same_end(name: str) -> None:
    do, check = OPERATIONS[name]
    first = begun()
    whole = copied(first)
    storage, changes = mortal(sees(whole), 1 << 30)
    do(storage)
    assert check(sees(whole))
    expected = contents(whole)
    moments = list(range(len(changes)))
    if len(moments) > 20:
        moments = random.Random(1).sample(moments, 20)
    for moment in moments:
        disk = copied(first)
        storage, _ = mortal(sees(disk), moment)
        with pytest.raises(Killed):
            do(storage)
        if not check(sees(disk)):
            do(sees(disk))
            assert check(sees(disk))
        if name == "derive":  # it begins another array where a dead session had begun one
            continue
        found = contents(disk)
        assert found.keys() >= expected.keys() and all(found[key] == expected[key] for key in expected)
        names = [name for name in disk.storage().list("") if name.startswith("tmp.")]
        assert not names, "a finished run leaves no scaffold"


@pytest.mark.parametrize("name", OPERATIONS)
def test_after_a_power_failure_at_any_moment_it_is_whole_or_not_there(name: str) -> None:
    counts = power_failures(name, MOMENTS, IMAGES)
    print(dict(counts))
    assert counts["images"] > 60


@pytest.mark.parametrize("for_ever", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_fails_surfaces_and_harms_nothing(name: str, for_ever: bool) -> None:
    do, check = OPERATIONS[name]
    first = begun()
    whole = copied(first)
    storage, changes = mortal(sees(whole), 1 << 30)
    do(storage)
    for moment in random.Random(2).sample(range(len(changes)), 8):
        disk = copied(first)
        calls = itertools.count()

        def tap(name: str, key: str, call: Callable[[], Any], moment: int = moment, calls: Any = calls) -> Any:
            if name in CHANGES or name in SYNCS:
                number = next(calls)
                if number == moment or (for_ever and number > moment):
                    raise StorageError("the disk is full", errno=errno.ENOSPC)
            return call()

        try:
            do(Tapped(sees(disk), tap))  # type: ignore[arg-type]
        except StorageError:
            check(sees(disk))
        else:
            assert check(sees(disk)), "it found another way"
