"""The sum tree against plain arrays."""

from __future__ import annotations

import numpy as np
import pytest

from trajstore.errors import SchemaError, StateError
from trajstore.sampling.sampler import uniform
from trajstore.sampling.sumtree import PriorityRing, SumTree


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000])
def test_it_finds_what_a_running_sum_finds(size: int) -> None:
    rng = np.random.default_rng(size)
    tree, plain = SumTree(size), np.zeros(size)
    for _ in range(30):
        leaves = rng.integers(0, size, rng.integers(1, 2 * size))
        values = rng.integers(0, 5, len(leaves)).astype(float)
        tree.set(leaves, values)
        for leaf, value in zip(leaves, values):
            plain[leaf] = value
        assert tree.total == plain.sum()
        assert (tree.get(np.arange(size)) == plain).all()
        cut = int(rng.integers(0, size + 1))
        assert tree.before(cut) == plain[:cut].sum()
        if plain.sum():
            places = rng.random(50) * plain.sum()
            assert (tree.find(places) == np.searchsorted(np.cumsum(plain), places, side="right")).all()


def test_draws_follow_priorities_as_they_change() -> None:
    tree = SumTree(100)
    tree.set(np.arange(100), 1.0)
    tree.set(np.arange(0, 100, 2), np.arange(50) / 10)
    priorities = tree.get(np.arange(100))
    draws = 200_000
    observed = np.bincount(tree.find(uniform(np.arange(draws), 5) * tree.total), minlength=100)
    assert observed[priorities == 0].sum() == 0
    kept = priorities > 0
    expected = draws * priorities[kept] / priorities.sum()
    statistic = ((observed[kept] - expected) ** 2 / expected).sum()
    assert abs(statistic - 98) < 4 * np.sqrt(2 * 98)


def test_rounding_never_leads_to_a_leaf_of_priority_zero() -> None:
    tree = SumTree(8)
    tree.set(np.arange(8), [0.1, 0.0, 0.2, 0.0, 1e-17, 0.3, 0.0, 0.0])
    found = tree.find(np.array([0.0, tree.total, np.nextafter(tree.total, 9), 0.1, 0.30000000000000004]))
    assert (tree.get(found) > 0).all()


def test_what_is_no_priority_is_refused() -> None:
    tree = SumTree(4)
    for leaves, values in (([0], -1.0), ([0], np.nan), ([4], 1.0), ([-1], 1.0)):
        with pytest.raises(SchemaError):
            tree.set(np.array(leaves), values)
    with pytest.raises(StateError, match="every priority is 0"):
        tree.find(np.array([0.0]))
    with pytest.raises(SchemaError):
        SumTree(0)


def test_the_ring_of_priorities_is_as_a_plain_list() -> None:
    rng = np.random.default_rng(0)
    slots, plain = PriorityRing(), np.zeros(0)
    low = 0
    for _ in range(60):
        count = int(rng.integers(1, 300))
        high = len(plain) + count
        slots.make_room(low, high)
        plain = np.r_[plain, rng.integers(0, 3, count)]
        slots.set(np.arange(high - count, high), plain[high - count :])
        gone = min(low + int(rng.integers(0, 400)), high - 1)
        slots.set(np.arange(low, gone), 0.0)
        plain[low:gone], low = 0, gone
        first = int(rng.integers(low, high))
        total = plain[first:].sum()
        assert slots.mass(first, high) == total
        if total:
            places = rng.random(40)
            expected = first + np.searchsorted(np.cumsum(plain[first:]), places * total, side="right")
            assert (slots.draw(places, first, high) == expected).all()
    assert len(plain) > 5000
