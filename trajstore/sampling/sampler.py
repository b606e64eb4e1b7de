"""The order of samples: a pure function of (seed, epoch, position), so that a position is all there is to resume.

Nothing here keeps a random state. An order answers "which sample stands at these positions of this epoch", for any
positions, at any time, in any process: ranks and workers take their share by arithmetic on positions, and going on
with another number of them is the same arithmetic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from trajstore.errors import ConfigMismatchError, SchemaError

Ints = np.ndarray[Any, np.dtype[np.int64]]
Array = np.ndarray[Any, Any]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SORTED_UP_TO = 1 << 21  # a permutation of more is computed position by position instead of being held
_ROUNDS = 10
KINDS = ("shuffle", "blocks", "sequential")


def key(*words: object) -> int:
    """A 64-bit key from a seed, an epoch, a purpose…"""
    text = "\x1f".join(map(str, words)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def scramble(numbers: Array, of: int) -> Array:
    """Uniform uint64 noise at ``numbers``: the SplitMix64 sequence (Steele, Lea, Flood 2014) that starts at a key."""
    with np.errstate(over="ignore"):
        z = (numbers.astype(np.uint64) + np.uint64(1)) * _GOLDEN + np.uint64(of)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def uniform(numbers: Array, of: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Floats in [0, 1) at ``numbers``, of 53 random bits each."""
    return (scramble(numbers, of) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(numbers: Array, of: int, bounds: Any) -> Ints:
    """Integers in [0, bound) at ``numbers``; the bias for a bound b is below b / 2**53."""
    scaled = (uniform(numbers, of) * bounds).astype(np.int64)
    found: Ints = np.minimum(scaled, np.asarray(bounds, np.int64) - 1)
    return found


class Permutation:
    """A permutation of ``range(n)`` drawn by a key; ``permutation(positions)`` gives what stands there.

    Notes
    -----
    Up to two million it is the order of random 64-bit words, uniform over all permutations, and is held. Beyond, it
    is a Feistel network of ten rounds (Luby and Rackoff 1988) on the next power of four, walked along until it lands
    inside (Black and Rogaway 2002): nothing is held, and no statistic that a training run could feel tells it apart.
    """

    def __init__(self, n: int, of: int) -> None:
        self.n = n
        self._held = None
        if n <= _SORTED_UP_TO:
            self._held = np.argsort(scramble(np.arange(n, dtype=np.uint64), of), kind="stable").astype(np.int64)
        self._half = np.uint64(max((max(n - 1, 1)).bit_length() + 1, 2) // 2)
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = [key("round", r, of) for r in range(_ROUNDS)]

    def __call__(self, positions: Ints) -> Ints:
        if self._held is not None:
            return self._held[positions]
        found = self._network(positions.astype(np.uint64))
        while len(outside := np.flatnonzero(found >= np.uint64(self.n))):
            found[outside] = self._network(found[outside])
        return found.astype(np.int64)

    def _network(self, values: Array) -> Array:
        left, right = values >> self._half, values & self._mask
        for round_key in self._keys:
            left, right = right, left ^ (scramble(right, round_key) & self._mask)
        return (left << self._half) | right


class Order:
    """The order in which an epoch goes through ``n`` samples.

    Parameters
    ----------
    n : number of samples.
    seed : any int.
    kind : ``"shuffle"``: uniform over all orders. ``"blocks"``: runs of ``block`` neighbouring samples are shuffled,
        then the samples of each ``pool`` of runs among themselves, so that what lies together on disk is decoded
        once an epoch (``quality`` measures what that costs). ``"sequential"``.
    weights : of each sample, (n,), 0 or more: an epoch then is ``draws`` samples drawn with replacement.
    draws : samples in an epoch; by default ``n``. Without weights it cuts the epoch short.
    lengths : of each sample, (n,). Each ``pool * block`` samples of the order are sorted by them, up and down in
        turn, so that the samples of a batch are about as long (buckets).
    """

    def __init__(
        self,
        n: int,
        seed: int = 0,
        *,
        kind: str = "shuffle",
        block: int = 64,
        pool: int = 64,
        weights: Any = None,
        draws: int | None = None,
        lengths: Any = None,
    ) -> None:
        if kind not in KINDS:
            raise SchemaError(f"{kind!r} is no order", hint="one of " + ", ".join(KINDS))
        if block < 1 or pool < 1:
            raise SchemaError(f"a block of {block} samples and a pool of {pool} blocks")
        self.n, self.seed, self.kind, self.block, self.pool = n, int(seed), kind, block, pool
        self._weights = None if weights is None else _cumulated(weights, n)
        self._lengths = None if lengths is None else np.asarray(lengths)
        if draws is not None and (draws < 0 or (draws > n and weights is None)):
            raise SchemaError(f"an epoch of {draws} draws from {n} samples", hint="more than all needs weights")
        self._draws = n if draws is None else draws
        self._made: tuple[int, Callable[[Ints], Ints] | None] = (-1, None)

    def __len__(self) -> int:
        """Samples in an epoch."""
        return self._draws

    def at(self, epoch: int, positions: Ints) -> Ints:
        """Numbers of the samples at positions of an epoch, int64 (m,)."""
        positions = np.asarray(positions, np.int64)
        if self._lengths is not None:
            return self._bucketed(epoch, positions)
        return self._plain(epoch, positions)

    def _plain(self, epoch: int, positions: Ints) -> Ints:
        if self._weights is not None:
            places = uniform(positions, key(self.seed, epoch, "draw")) * self._weights[-1]
            drawn: Ints = np.minimum(np.searchsorted(self._weights, places, side="right"), self.n - 1)
            return drawn
        if self.kind == "sequential":
            return positions
        made, order = self._made
        if order is None or made != epoch:
            order = self._blocks(epoch) if self.kind == "blocks" else self._permutation(epoch)
            self._made = epoch, order
        return order(positions)

    def _permutation(self, epoch: int) -> Permutation:
        return Permutation(self.n, key(self.seed, epoch, "shuffle"))

    def _blocks(self, epoch: int) -> _Blocks:
        return _Blocks(self.n, self.block, self.pool, self.seed, epoch)

    def _bucketed(self, epoch: int, positions: Ints) -> Ints:
        assert self._lengths is not None
        size = self.block * self.pool
        found = np.empty(len(positions), np.int64)
        for bucket in np.unique(positions // size).tolist():
            mine = positions // size == bucket
            members = self._plain(epoch, np.arange(bucket * size, min((bucket + 1) * size, len(self))))
            ranked = members[np.argsort(self._lengths[members], kind="stable")]
            found[mine] = (ranked if bucket % 2 == 0 else ranked[::-1])[positions[mine] - bucket * size]
        return found

    def describe(self) -> dict[str, Any]:
        """What decides the order; two orders that agree in it are the same."""
        parts: dict[str, Any] = {"n": self.n, "seed": self.seed, "draws": self._draws, "kind": self.kind}
        if self.kind == "blocks" or self._lengths is not None:
            parts |= {"block": self.block, "pool": self.pool}
        for name, values in (("weights", self._weights), ("lengths", self._lengths)):
            if values is not None:
                parts[name] = hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()
        return parts


def _cumulated(weights: Any, n: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    values = np.asarray(weights, np.float64)
    if values.shape != (n,):
        raise SchemaError(f"weights of shape {values.shape} do not fit {n} samples")
    if not np.isfinite(values).all() or bool((values < 0).any()) or not values.sum() > 0:
        raise SchemaError("weights are finite, 0 or more, and not all 0")
    return np.cumsum(values)


class _Blocks:
    """A block shuffle of one epoch: blocks in random order, their samples shuffled pool by pool."""

    def __init__(self, n: int, block: int, pool: int, seed: int, epoch: int) -> None:
        self._block, self._pool = block, pool
        self._words = seed, epoch
        count = -(-n // block)
        self._order = Permutation(count, key(seed, epoch, "blocks"))(np.arange(count))
        sizes = np.where(self._order == count - 1, n - (count - 1) * block, block)
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        self._pools: dict[int, Permutation] = {}

    def __call__(self, positions: Ints) -> Ints:
        place = np.searchsorted(self._ends, positions, side="right")
        pools = place // self._pool
        found = np.empty(len(positions), np.int64)
        for pool in np.unique(pools).tolist():
            mine = pools == pool
            first = int(self._starts[pool * self._pool])
            last = int(self._ends[min((pool + 1) * self._pool, len(self._ends)) - 1])
            inside = self._shuffle(pool, last - first)(positions[mine] - first) + first
            place = np.searchsorted(self._ends, inside, side="right")
            found[mine] = self._order[place] * self._block + inside - self._starts[place]
        return found

    def _shuffle(self, pool: int, size: int) -> Permutation:
        if pool not in self._pools:
            if len(self._pools) > 4:
                self._pools.clear()
            self._pools[pool] = Permutation(size, key(*self._words, "pool", pool))
        return self._pools[pool]


def quality(numbers: Ints, batch_size: int) -> dict[str, float]:
    """How well an order is shuffled, against the uniform one.

    Returns
    -------
    dict
        ``batch_variance``: variance of the batches' mean number, divided by what uniform batches have: 1 for a
        uniform order, ``batch_size`` for none. By so much a gradient's noise grows, for a loss that drifts over the
        dataset. ``neighbours``: correlation of each number with the next: 0 when uniform, 1 when in order.
    """
    n = len(numbers)
    whole = numbers[: n - n % batch_size].reshape(-1, batch_size).astype(np.float64)
    expected = numbers.astype(np.float64).var() / batch_size * (n - batch_size) / max(n - 1, 1)
    neighbours = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
    return {"batch_variance": float(whole.mean(1).var() / expected), "neighbours": float(neighbours)}


class Batches:
    """Batches of sample numbers for one rank, epoch after epoch; what a ``DataLoader`` takes as ``batch_sampler``.

    Every step of all ranks together takes the next ``batch_size * world_size`` positions of the order, each rank its
    stretch of them. Which samples come next is thus told by the epoch and the number of positions that are spent, for
    any number of ranks and workers.

    Parameters
    ----------
    batch_size : of one rank.
    drop_last : leave out the samples at an epoch's end that fill no step; else they are shared out, which may leave
        ranks with batches of different sizes, or none.
    identity : names what is sampled (the commits' uuids, say); a state of something else is refused.

    Attributes
    ----------
    epoch : the epoch that the next iteration goes through. position : samples of it that all ranks have spent.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise SchemaError(f"a batch of {batch_size} samples")
        if not 0 <= rank < world_size:
            raise SchemaError(f"rank {rank} of {world_size}")
        self.order, self.batch_size, self.drop_last = order, batch_size, drop_last
        self.rank, self.world_size = rank, world_size
        self.identity = dict(identity or {})
        self.epoch = self.position = 0

    @property
    def step(self) -> int:
        """Samples that all ranks together take at once."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        whole, rest = divmod(len(self.order), self.step)
        return whole + (not self.drop_last and rest > self._share(rest)[0])

    def _share(self, rest: int) -> tuple[int, int]:
        """This rank's stretch of the samples that fill no step."""
        small, larger = divmod(rest, self.world_size)
        start = self.rank * small + min(self.rank, larger)
        return start, start + small + (self.rank < larger)

    def spans(self, position: int) -> Iterator[tuple[int, int, int]]:
        """For each step from ``position`` on: this rank's start and stop in the epoch, and where the step ends."""
        total, step = len(self.order), self.step
        while position + step <= total:
            start = position + self.rank * self.batch_size
            position += step
            yield start, start + self.batch_size, position
        if not self.drop_last and position < total:
            start, stop = self._share(total - position)
            if stop > start:
                yield position + start, position + stop, total

    def __iter__(self) -> Iterator[list[int]]:
        """The rest of the epoch; then the next one is due."""
        for numbers, position in self.ahead(self.epoch, self.position):
            self.position = position
            yield numbers.tolist()
        self.epoch, self.position = self.epoch + 1, 0

    def ahead(self, epoch: int, position: int) -> Iterator[tuple[Ints, int]]:
        """The batches of an epoch from a position on, each with the position behind it; nothing is remembered."""
        for start, stop, behind in self.spans(position):
            yield self.order.at(epoch, np.arange(start, stop, dtype=np.int64)), behind

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch from its start."""
        self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, on any number of ranks and workers; JSON can hold it."""
        return {"epoch": self.epoch, "position": self.position, "order": self.order.describe(), **self.identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken. Raises ``ConfigMismatchError`` if the samples or the order differ."""
        mine = self.state_dict()
        differences = {
            name: (state.get(name), mine[name])
            for name in mine
            if name not in ("epoch", "position") and state.get(name) != mine[name]
        }
        if differences:
            raise ConfigMismatchError(
                f"the state is of other samples or another order: {', '.join(differences)} differ",
                differences=differences,
                hint="open the dataset at the same commit with the same arguments, or begin anew with set_epoch()",
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        left = len(self.order) - self.position
        if left <= 0 or (self.drop_last and left < self.step):
            self.epoch, self.position = self.epoch + 1, 0
