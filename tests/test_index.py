"""Row arithmetic against the loops that it stands for."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trajstore.engine.index import bounds, locate, natural, pieces, runs, spans

pairs = st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 40)), max_size=30)
rows = st.lists(st.integers(0, 300), min_size=1, max_size=60)


def ints(values: object) -> np.ndarray:
    return np.array(values, np.int64).reshape(-1)


@given(pairs)
def test_spans_are_the_ranges_end_to_end(found: list[tuple[int, int]]) -> None:
    starts, counts = ints([start for start, _ in found]), ints([count for _, count in found])
    expected = [number for start, count in found for number in range(start, start + count)]
    assert spans(starts, starts + counts).tolist() == expected


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20))
def test_locate_finds_the_run_of_each_position(counts: list[int]) -> None:
    expected = [(run, place) for run, count in enumerate(counts) for place in range(count)]
    run, place = locate(np.arange(sum(counts)), ints(counts))
    assert list(zip(run.tolist(), place.tolist())) == expected


@given(st.integers(0, 50), st.slices(50))
def test_bounds_are_those_of_a_list(length: int, key: slice) -> None:
    assert bounds(key, length).tolist() == list(range(length))[key]


@given(rows, st.booleans())
def test_runs_are_the_longest_that_are_consecutive_on_both_sides(wanted: list[int], permuted: bool) -> None:
    targets = np.random.default_rng(len(wanted)).permutation(len(wanted)) if permuted else None
    starts, stops, places = runs(ints(wanted), targets)
    assert spans(starts, stops).tolist() == wanted
    assert spans(places, places + stops - starts).tolist() == list(range(len(wanted)) if targets is None else targets)
    goes_on = (stops[:-1] == starts[1:]) & ((places + stops - starts)[:-1] == places[1:])
    assert not goes_on.any()


@given(rows, st.sampled_from([1, 2, 3, 8, 64, 1024]))
def test_pieces_lie_in_one_chunk_each_and_bring_every_row_to_its_place(wanted: list[int], size: int) -> None:
    found = pieces(*runs(ints(wanted)), size)
    out = np.full(len(wanted), -1, np.int64)
    for chunk, inner, target, count in zip(*(part.tolist() for part in found)):
        assert count >= 1
        assert inner >= 0
        assert inner + count <= size
        assert (out[target : target + count] == -1).all()
        out[target : target + count] = chunk * size + inner + np.arange(count)
    assert out.tolist() == wanted
    assert (np.diff(found.chunk) >= 0).all()


def test_names_with_numbers_sort_by_their_numbers() -> None:
    names = ["rank10", "rank2", "rank_1", "b", "rank2a", "10", "9"]
    assert sorted(names, key=natural) == ["9", "10", "b", "rank2", "rank2a", "rank10", "rank_1"]
    for tied in (["rank2", "rank02"], ["rank02", "rank2"]):
        assert sorted(tied, key=natural) == ["rank02", "rank2"]
