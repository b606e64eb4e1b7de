"""The order of samples: uniform, weighted, shared out among ranks, resumed. Seeds are fixed: nothing here is chance."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest

from trajstore.errors import ConfigMismatchError, SchemaError
from trajstore.sampling.sampler import _SORTED_UP_TO, Batches, Order, Permutation, below, key, quality, uniform


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations the statistic lies from its mean (Wilson and Hilferty's normal approximation)."""
    freedom = len(observed) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 4096, 5000])
def test_an_epoch_names_each_sample_once(n: int) -> None:
    for kind in ("shuffle", "blocks", "sequential"):
        order = Order(n, 3, kind=kind, block=8, pool=3)
        assert sorted(order.at(0, np.arange(n)).tolist()) == list(range(n))
    assert (order.at(5, np.arange(n)) == np.arange(n)).all()


@pytest.mark.parametrize("n", [1, 2, 5, 63, 64, 65, 1000])
def test_the_network_permutes(n: int) -> None:
    permutation = Permutation(n, 11)
    permutation._held = None
    assert sorted(permutation(np.arange(n)).tolist()) == list(range(n))


def test_a_long_permutation_is_not_held() -> None:
    n = 3 * _SORTED_UP_TO + 1
    permutation = Permutation(n, 1)
    assert permutation._held is None
    found = permutation(np.arange(0, n, 97))
    assert len(np.unique(found)) == len(found) and found.min() >= 0 and found.max() < n
    counts = np.bincount(found * 64 // n, minlength=64)
    assert abs(chi_square(counts, np.full(64, len(found) / 64))) < 4
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02


def test_all_orders_of_four_are_equally_likely() -> None:
    seen = Counter(tuple(Order(4, seed).at(0, np.arange(4)).tolist()) for seed in range(6000))
    observed = np.array([seen[order] for order in itertools.permutations(range(4))])
    assert abs(chi_square(observed, np.full(24, 250.0))) < 4


def test_each_sample_stands_equally_often_at_each_place() -> None:
    order = Order(50, 7)
    table = np.zeros((50, 50))
    for epoch in range(2000):
        table[np.arange(50), order.at(epoch, np.arange(50))] += 1
    assert abs(chi_square(table.ravel(), np.full(2500, 40.0))) < 4


def test_blocks_reach_every_place_too() -> None:
    order = Order(60, 7, kind="blocks", block=5, pool=3)
    counts = np.zeros((60, 60))
    for epoch in range(2000):
        counts[np.arange(60), order.at(epoch, np.arange(60))] += 1
    assert abs(chi_square(counts.ravel(), np.full(3600, 2000 / 60))) < 4


def test_weights_draw_in_proportion() -> None:
    weights = np.arange(20, dtype=float)
    order = Order(20, 1, weights=weights, draws=60_000)
    observed = np.bincount(order.at(4, np.arange(60_000)), minlength=20)
    assert observed[0] == 0
    assert abs(chi_square(observed[1:], 60_000 * weights[1:] / weights.sum())) < 4


def test_noise_is_uniform_and_serially_independent() -> None:
    values = uniform(np.arange(100_000), key("a"))
    assert abs(chi_square(np.bincount((values * 100).astype(int)), np.full(100, 1000.0))) < 4
    pairs = (values[::2] * 10).astype(int) * 10 + (values[1::2] * 10).astype(int)
    assert abs(chi_square(np.bincount(pairs), np.full(100, 500.0))) < 4
    assert below(np.arange(1000), 3, 7).max() == 6


def test_the_order_does_not_change_from_one_version_to_the_next() -> None:
    assert Order(10, 42).at(0, np.arange(10)).tolist() == [4, 2, 9, 8, 1, 3, 0, 5, 6, 7]
    assert Order(10, 42, kind="blocks", block=2, pool=2).at(1, np.arange(10)).tolist() == [9, 8, 6, 7, 1, 0, 5, 4, 3, 2]
    permutation = Permutation(10, 42)
    permutation._held = None
    assert permutation(np.arange(10)).tolist() == [5, 8, 7, 6, 1, 0, 2, 4, 9, 3]


def test_quality_tells_good_shuffles_from_bad_ones() -> None:
    n, batch = 64_000, 32
    exact = quality(Order(n, 5).at(0, np.arange(n)), batch)
    blocks = quality(Order(n, 5, kind="blocks", block=64, pool=64).at(0, np.arange(n)), batch)
    none = quality(np.arange(n), batch)
    assert exact["batch_variance"] == pytest.approx(1, abs=0.1) and abs(exact["neighbours"]) < 0.02
    assert blocks["batch_variance"] < 2
    assert none["batch_variance"] == pytest.approx(batch, rel=0.01) and none["neighbours"] > 0.999


def test_buckets_put_equal_lengths_together() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 4096)
    order = Order(4096, 2, lengths=lengths, block=64, pool=8)
    numbers = order.at(0, np.arange(4096))
    assert sorted(numbers.tolist()) == list(range(4096))
    batches = lengths[numbers].reshape(-1, 32)
    padding = 1 - lengths.sum() / (batches.max(1) * 32).sum()
    assert padding < 0.1  # a third without buckets


def all_ranks(batches: dict[int, Batches], steps: int) -> list[int]:
    """What all ranks together take in so many steps."""
    taken: list[int] = []
    iterators = [iter(one) for one in batches.values()]
    for _ in range(steps):
        for iterator in iterators:
            taken += next(iterator)
    return taken


def ranks(world: int, batch: int, order: Order, state: str = "") -> dict[int, Batches]:
    made = {rank: Batches(order, batch, rank=rank, world_size=world, identity={"uuid": "u"}) for rank in range(world)}
    for one in made.values():
        if state:
            one.load_state_dict(json.loads(state))
    return made


@pytest.mark.parametrize("kind", ["shuffle", "blocks"])
def test_after_a_kill_another_number_of_ranks_goes_on_exactly(kind: str) -> None:
    def order() -> Order:
        return Order(960, 9, kind=kind, block=10, pool=4)

    first = ranks(4, 6, order())
    taken = all_ranks(first, 7)  # then all four are killed
    state = json.dumps(first[2].state_dict())
    second = ranks(3, 8, order(), state)
    taken += all_ranks(second, 5)
    state = json.dumps(second[0].state_dict())
    third = ranks(1, 24, order(), state)
    taken += all_ranks(third, 28)
    assert taken == order().at(0, np.arange(960)).tolist()
    assert third[0].epoch == 0
    taken = all_ranks(ranks(2, 12, order(), json.dumps(third[0].state_dict())), 40)
    assert taken == order().at(1, np.arange(960)).tolist()


@pytest.mark.parametrize(
    ("n", "world", "batch"), [(10, 1, 4), (10, 2, 4), (10, 3, 3), (2, 3, 4), (12, 3, 4), (13, 4, 1)]
)
def test_ranks_share_all_samples_or_all_whole_steps(n: int, world: int, batch: int) -> None:
    for drop_last in (True, False):
        taken: list[int] = []
        for rank in range(world):
            one = Batches(Order(n, 1), batch, rank=rank, world_size=world, drop_last=drop_last)
            got = list(one)
            assert len(got) == len(one)
            taken += itertools.chain.from_iterable(got)
            assert one.epoch == 1
        kept = n - n % (world * batch) if drop_last else n
        assert sorted(taken) == sorted(Order(n, 1).at(0, np.arange(kept)).tolist())


def test_a_state_of_other_samples_is_refused() -> None:
    batches = Batches(Order(10, 1), 2, identity={"uuid": "a"})
    for other in (Batches(Order(10, 2), 2, identity={"uuid": "a"}), Batches(Order(10, 1), 2, identity={"uuid": "b"})):
        with pytest.raises(ConfigMismatchError, match="differ"):
            batches.load_state_dict(other.state_dict())
    weighted = Batches(Order(10, 1, weights=np.ones(10)), 2, identity={"uuid": "a"})
    with pytest.raises(ConfigMismatchError):
        batches.load_state_dict(weighted.state_dict())


@pytest.mark.parametrize(
    "wrong", [{"kind": "random"}, {"block": 0}, {"weights": [1, 2]}, {"weights": [-1.0] * 4}, {"draws": 5}]
)
def test_orders_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(SchemaError):
        Order(4, **wrong)  # type: ignore[arg-type]
