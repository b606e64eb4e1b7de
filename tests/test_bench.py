"""The bench's own honesty: results are compared, ratios face the right way, and every row is named once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.__main__ import _with_table, table
from bench.data import COLUMNS, routes, trajectory
from bench.rows import Bench, Claim, Ratio, Times, WrongResultError


def test_contestants_that_read_different_bytes_are_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, short=True)
    with pytest.raises(WrongResultError, match="other and trajstore differ"):
        bench.compare({"trajstore": lambda: np.zeros(3), "other": lambda: np.array([0, 0, -0.0])})
    with pytest.raises(WrongResultError):
        bench.compare({"trajstore": lambda: {"a": np.zeros(3)}, "other": lambda: {"b": np.zeros(3)}})


def test_every_contestant_is_prepared_before_each_of_its_calls(tmp_path: Path) -> None:
    done: list[str] = []
    names = ("trajstore", "other")
    work = {name: lambda name=name: done.append(f"call {name}") for name in names}
    Bench(tmp_path, short=True).compare(work, prepare=lambda name: done.append(f"prepare {name}"), repeats=2)
    assert done == [f"{what} {name}" for _ in range(3) for name in names for what in ("prepare", "call")]


def test_ratios_say_how_many_times_better_or_how_many_times_the_cost() -> None:
    times = Times({"trajstore": [1.0, 2.0, 1.0], "peer": [10.0, 10.0, 30.0]}, {"trajstore": 0, "peer": 0})
    faster = times.claim("w", "peer", ">= 10")
    assert faster.ratio == Ratio(10.0, 5.0, 30.0)
    assert faster.reached
    assert not times.claim("w", "peer", ">= 11").reached
    cost = times.claim("w", "peer", "<= 0.05")
    assert cost.ratio.median == 0.1
    assert not cost.reached
    assert times.claim("w", "peer").reached is None


def test_the_table_keeps_what_stands_around_it() -> None:
    claim = Claim("work", "peer", Ratio(2.0, 1.0, 3.0), ">= 4", "note", {"trajstore": 1 << 20, "peer": 0})
    report = {"short": True, "versions": {"numpy": "2"}, "skipped": {"row": "why"}}
    page = "before\n<!-- begin: python -m bench -->\nold\n<!-- end -->\nafter\n"
    made = _with_table(page, report, [("row", claim)])
    assert made.startswith("before\n")
    assert made.endswith("after\n")
    assert "old" not in made
    assert table([claim]) in made
    assert "0 of 1 bars reached" in made
    assert _with_table(made, report, [("row", claim)]) == made


def test_the_samples_are_as_long_as_asked_for() -> None:
    found = routes(200)
    assert sum(len(route["obs"]) for route in found) >= 200
    fields, columns = trajectory(found[0])
    assert set(columns) == set(COLUMNS)
    assert {len(value) for value in fields.values()} == {len(found[0]["obs"])}
    assert len({int(route["seed"]) for route in found}) == len(found)
