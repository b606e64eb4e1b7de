"""Interval sets against Python's own sets, and against hostile input."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trajstore.errors import FormatError, NotFoundError, SchemaError
from trajstore.format.intervals import IntervalBuilder, IntervalSet

LOWEST, HIGHEST = -(2**63), 2**63 - 2
near = st.integers(-20, 20)  # close together, so that intervals touch and join
anywhere = st.one_of(near, st.integers(LOWEST, HIGHEST), st.sampled_from([LOWEST, LOWEST + 1, HIGHEST - 1, HIGHEST]))
members = st.sets(st.one_of(near, anywhere), max_size=40)


def holds(made: IntervalSet, model: set[int]) -> None:
    """`made` has exactly the members of `model`, in canonical form."""
    ascending = sorted(model)
    assert list(made) == ascending
    assert len(made) == len(model)
    assert bool(made) is bool(model)
    edges = made.pairs.reshape(-1)
    assert edges.dtype == np.int64
    assert all(a < b for a, b in zip(edges.tolist(), edges.tolist()[1:]))  # disjoint, and none touch
    with pytest.raises(ValueError, match="read-only"):
        made.pairs[:] = 0


@given(members, members)
def test_operations_are_those_of_sets(a: set[int], b: set[int]) -> None:
    left, right = IntervalSet.of(a), IntervalSet.of(sorted(b, reverse=True) + list(b))
    holds(left, a)
    holds(right, b)
    holds(left | right, a | b)
    holds(left & right, a & b)
    holds(left - right, a - b)
    assert (left == right) is (a == b)
    if a == b:
        assert hash(left) == hash(right)


@given(members, anywhere)
def test_membership_rank_and_selection(a: set[int], value: int) -> None:
    made, ascending = IntervalSet.of(a), sorted(a)
    assert (value in made) is (value in a)
    assert made.rank(value) == sum(member < value for member in a)
    probes = np.array([*ascending, value, 2**63 - 1])
    assert made.contains(probes).tolist() == [probe in a for probe in probes.tolist()]
    assert made.rank(probes).tolist() == [sum(m < probe for m in a) for probe in probes.tolist()]
    assert made.nth(np.arange(len(a))).tolist() == ascending
    assert [made.nth(k) for k in range(len(a))] == ascending
    assert made.first(3).tolist() == ascending[:3]
    assert made.first(10**9).tolist() == ascending
    if a:
        assert (made.min(), made.max()) == (ascending[0], ascending[-1])


@given(members, anywhere)
def test_adding_one_leaves_the_set_itself_alone(a: set[int], value: int) -> None:
    made = IntervalSet.of(a)
    holds(made.add(value), a | {value})
    holds(made, a)


@given(members, st.lists(st.tuples(st.booleans(), st.one_of(near, anywhere)), max_size=60), members)
def test_builder_follows_a_set_step_by_step(a: set[int], steps: list[tuple[bool, int]], more: set[int]) -> None:
    builder, model = IntervalBuilder(a), set(a)
    before = builder.freeze()
    for adding, value in steps:
        changed = builder.add(value) if adding else builder.discard(value)
        assert changed is ((value not in model) if adding else (value in model))
        (model.add if adding else model.discard)(value)
        assert (value in builder) is adding
        assert len(builder) == len(model)
    holds(builder.freeze(), model)
    builder.update(more)
    holds(builder.freeze(), model | more)
    assert len(builder) == len(model | more)
    holds(before, a)


@given(st.lists(st.tuples(near, near).map(sorted), max_size=12))
def test_pairs_in_any_order_are_joined(pairs: list[list[int]]) -> None:
    holds(IntervalSet(pairs), {value for start, stop in pairs for value in range(start, stop)})


@given(members)
def test_json_and_pickle_give_the_set_back(a: set[int]) -> None:
    made = IntervalSet.of(a)
    assert IntervalSet.from_json(json.loads(json.dumps(made.to_json()))) == made
    copy = pickle.loads(pickle.dumps(made))
    assert copy == made
    holds(copy, a)


@given(st.integers(-9, 9), st.integers(-9, 9), st.sampled_from([-3, -1, 1, 2]))
def test_ranges_and_spans(start: int, stop: int, step: int) -> None:
    holds(IntervalSet.of(range(start, stop, step)), set(range(start, stop, step)))
    holds(IntervalSet.span(start, stop), set(range(start, stop)))


def test_a_span_of_billions_costs_one_interval() -> None:
    seeds = IntervalSet.of(range(10**15)) - IntervalSet.of([5, 10**14])
    assert len(seeds) == 10**15 - 2
    assert seeds.pairs.shape == (3, 2)
    assert seeds.nth(10**14) == 10**14 + 2
    assert seeds.first(7).tolist() == [0, 1, 2, 3, 4, 6, 7]


def test_a_million_seeds_one_by_one_stay_one_interval() -> None:
    """Each step handles one interval, whatever has been added before: linear by construction."""
    builder = IntervalBuilder()
    for seed in range(1_000_000):
        builder.add(seed)
    assert builder.freeze().to_json() == [[0, 1_000_000]]
    seeds = IntervalSet()
    for seed in range(100_000):
        seeds = seeds.add(seed)
    assert seeds.to_json() == [[0, 100_000]]


def test_arrays_of_every_integer_dtype() -> None:
    for dtype in "bBhHiIlLqQ":
        assert IntervalSet.of(np.array([3, 1, 2], dtype)).to_json() == [[1, 4]]
    assert IntervalSet.of(value for value in (3, 1)).to_json() == [[1, 2], [3, 4]]
    made = IntervalSet.span(1, 4)
    assert IntervalSet.of(made) is made
    assert made.contains(np.array([[0, 1], [3, 4]], np.uint8)).tolist() == [[False, True], [True, False]]


def test_membership_of_what_is_no_integer() -> None:
    made = IntervalSet.span(0, 5)
    assert np.int32(3) in made
    assert "3" not in made
    assert None not in made
    assert 2**70 not in made
    assert made != {0, 1, 2, 3, 4}
    with pytest.raises(TypeError):
        made | {7}  # type: ignore[operator]


@pytest.mark.parametrize(
    "values",
    [
        [1.5],
        [1, 2.0],
        ["1"],
        [True],
        [2**63 - 1],
        [2**63],
        [-(2**63) - 1],
        [None],
        [[1], [2, 3]],
        np.array([2**64 - 1], "u8"),
    ],
    ids=repr,
)
def test_what_is_not_int64_is_refused(values: Any) -> None:
    with pytest.raises(SchemaError):
        IntervalSet.of(values)


@pytest.mark.parametrize("value", [1.0, "1", None, 2**63 - 1, -(2**63) - 1], ids=repr)
def test_adding_what_is_not_int64_is_refused(value: Any) -> None:
    for target in (IntervalSet.span(0, 3), IntervalBuilder([1])):
        with pytest.raises(SchemaError, match="interval set"):
            target.add(value)


@pytest.mark.parametrize("pairs", [[(3, 1)], [1, 2], [(1, 2, 3)], [(0.0, 1.0)], [(LOWEST, 2**63 - 1)]], ids=repr)
def test_pairs_that_are_no_intervals_are_refused(pairs: Any) -> None:
    with pytest.raises(SchemaError):
        IntervalSet(pairs)


def test_too_many_members_for_a_length_are_refused() -> None:
    half = IntervalSet.span(LOWEST, -1)
    with pytest.raises(SchemaError, match="fewer than"):
        half | IntervalSet.span(0, 5)
    assert len(IntervalSet.span(LOWEST, -1)) == 2**63 - 1


def test_members_that_do_not_exist() -> None:
    made = IntervalSet.of([4, 9])
    for k in (-1, 2, 2**62):
        with pytest.raises(NotFoundError, match="2 members"):
            made.nth(k)
    for ask in (IntervalSet().min, IntervalSet().max, lambda: IntervalSet().nth(np.array([0]))):
        with pytest.raises(NotFoundError):
            ask()
    assert IntervalSet().nth(np.array([], np.int64)).tolist() == []
    assert IntervalSet().rank(7) == 0
    assert made.first(-3).tolist() == []


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (None, "list"),
        ({"0": [1, 2]}, "list"),
        ("ab", "list"),
        ([1, 2], r"\$\[0\]"),
        ([[0, 1], [2]], r"\$\[1\]"),
        ([[0, 1, 2]], r"\$\[0\]"),
        ([[0, True]], r"\$\[0\]"),
        ([[0, 1.0]], r"\$\[0\]"),
        ([["0", "1"]], r"\$\[0\]"),
        ([[0, 0]], r"\$\[0\]"),
        ([[5, 3]], r"\$\[0\]"),
        ([[0, 2**63]], r"\$\[0\]"),
        ([[-(2**63) - 1, 0]], r"\$\[0\]"),
        ([[0, 10**400]], r"\$\[0\]"),
        ([[5, 7], [0, 2]], r"\$\[1\]"),
        ([[0, 7], [6, 9]], r"\$\[1\]"),
        ([[LOWEST, 0], [0, 2**63 - 1]], "fewer"),
    ],
    ids=repr,
)
def test_hostile_json_is_refused_by_place(value: object, place: str) -> None:
    with pytest.raises(FormatError, match=place):
        IntervalSet.from_json(value)


def test_touching_pairs_of_another_writer_are_joined() -> None:
    assert IntervalSet.from_json([[0, 2], [2, 4]]).to_json() == [[0, 4]]


def test_repr_stays_short() -> None:
    assert repr(IntervalSet.of([1, 2, 5])) == "IntervalSet([[1, 3], [5, 6]])"
    assert repr(IntervalSet.of(range(0, 2000, 2))).endswith("… 1000 intervals])")
