"""Sets of 64-bit integers kept as sorted intervals: seeds attempted and completed, rows deleted.

A set is the ascending array of its *edges*: ``start, stop, start, stop, …`` of disjoint,
non-touching half-open intervals. A value is a member where an odd number of edges lie at or
below it, and turning one value in or out flips the two edges ``value`` and ``value + 1``:
every operation here follows from these two facts.

Memory and time depend on the number of intervals K, never on the number of members.
Members lie in ``[-2**63, 2**63 - 1)``, so that every ``stop`` is an int64, and a set has fewer than ``2**63`` of them.
"""

from __future__ import annotations

import operator
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from trajstore.errors import FormatError, NotFoundError, SchemaError

_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]

_FEW = 4
_LOWEST = -(2**63)
_HIGHEST_STOP = 2**63 - 1


class IntervalSet:
    """An immutable set of integers, hashable and picklable.

    Parameters
    ----------
    pairs : (K, 2) array-like of int
        Half-open ``start, stop``, in any order; overlapping and touching ones are joined, empty ones vanish.

    Raises
    ------
    SchemaError
        Not integers, out of range, or a stop before its start.
    """

    __slots__ = ("_edges", "_preceding")

    _edges: _Ints
    _preceding: _Ints | None

    def __init__(self, pairs: npt.ArrayLike | Sequence[Sequence[int]] = ()) -> None:
        given = _integers(pairs)
        if given.size and (given.ndim != 2 or given.shape[1] != 2):
            raise SchemaError(f"intervals are (K, 2) start, stop pairs, and this has shape {given.shape}")
        given = given.reshape(-1, 2)
        if bool((given[:, 1] < given[:, 0]).any()):
            raise SchemaError("an interval stops before it starts", hint="intervals are half-open: start, stop")
        self._hold(_joined(given[given[:, 0] < given[:, 1]]))

    def _hold(self, edges: _Ints) -> None:
        sizes = (edges[1::2] - edges[::2]).view(np.uint64)  # the int64 difference may wrap; as uint64 it is exact
        if int(sizes.sum()) >= 2**63:
            raise SchemaError("an interval set holds fewer than 2**63 members")
        edges.setflags(write=False)
        self._edges = edges
        self._preceding = None

    @classmethod
    def _from_edges(cls, edges: _Ints) -> IntervalSet:
        made = cls.__new__(cls)
        made._hold(edges)
        return made

    @classmethod
    def of(cls, values: IntervalSet | Iterable[int] | npt.NDArray[Any]) -> IntervalSet:
        """The set of the given integers: any iterable or array, in any order, repeats allowed."""
        if isinstance(values, IntervalSet):
            return values
        if isinstance(values, range):
            ascending = values if values.step > 0 else values[::-1]
            if ascending.step == 1 or len(ascending) < 2:
                return cls.span(ascending[0], ascending[-1] + 1) if ascending else cls()
        if not hasattr(values, "__array__"):
            values = list(values)
        members = np.sort(_integers(values), axis=None)
        members = members[np.diff(members, prepend=members[:1] - 1) != 0]  # np.unique hashes, which takes far longer
        if members.size and members[-1] == _HIGHEST_STOP:
            raise SchemaError(f"{_HIGHEST_STOP} is too large for an interval set: members lie below 2**63 - 1")
        last = np.flatnonzero(np.diff(members) != 1)
        edges = np.empty(2 * (len(last) + 1 if members.size else 0), np.int64)
        if members.size:
            edges[::2] = members[np.concatenate(([0], last + 1))]
            edges[1::2] = members[np.concatenate((last, [members.size - 1]))] + 1
        return cls._from_edges(edges)

    @classmethod
    def span(cls, start: int, stop: int) -> IntervalSet:
        """The integers of ``range(start, stop)``; empty where ``stop <= start``."""
        return cls([(start, stop)] if start < stop else ())

    @classmethod
    def from_json(cls, value: object) -> IntervalSet:
        """Read what `to_json` wrote, trusting nothing.

        Raises
        ------
        FormatError
            Not a list of ``[start, stop]`` pairs of int64, ascending and disjoint; the message names the pair.
        """
        if not isinstance(value, list):
            raise FormatError(f"an interval set is a list of [start, stop] pairs, not {type(value).__name__}")
        reached: int | None = None
        for number, pair in enumerate(value):
            # `type`, not isinstance: JSON's true is no integer.
            if not (isinstance(pair, list) and len(pair) == 2 and all(type(edge) is int for edge in pair)):
                raise FormatError(f"interval set, $[{number}]: a [start, stop] pair of integers is expected here")
            start, stop = pair
            if not _LOWEST <= start < stop <= _HIGHEST_STOP:
                raise FormatError(f"interval set, $[{number}]: start and stop must be int64, start before stop")
            if reached is not None and start < reached:
                raise FormatError(f"interval set, $[{number}]: starts before the previous interval stops")
            reached = stop
        try:
            return cls(value)
        except SchemaError as error:
            raise FormatError(error.message) from None

    def to_json(self) -> list[list[int]]:
        """``[[start, stop], …]``, ascending, disjoint and not touching."""
        pairs: list[list[int]] = self.pairs.tolist()
        return pairs

    @property
    def pairs(self) -> _Ints:
        """(K, 2) int64, read-only: ``start, stop`` of each interval, ascending."""
        return self._edges.reshape(-1, 2)

    def __len__(self) -> int:
        return int(self._sizes_before()[-1])

    def __bool__(self) -> bool:
        return bool(self._edges.size)

    def __iter__(self) -> Iterator[int]:
        for start, stop in self.pairs.tolist():
            yield from range(start, stop)

    def __contains__(self, value: object) -> bool:
        try:
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            return False
        if not _LOWEST <= number < _HIGHEST_STOP:
            return False
        return bool(self._edges.searchsorted(number, side="right") & 1)

    def contains(self, values: npt.ArrayLike) -> _Bools:
        """For each integer of an array, whether it is a member; bool, of the same shape."""
        return (self._edges.searchsorted(_integers(values), side="right") & 1).astype(np.bool_)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IntervalSet):
            return NotImplemented
        return np.array_equal(self._edges, other._edges)

    def __hash__(self) -> int:
        return hash(self._edges.tobytes())

    def __or__(self, other: IntervalSet) -> IntervalSet:
        return self._combined(other, np.bitwise_or)

    def __and__(self, other: IntervalSet) -> IntervalSet:
        return self._combined(other, np.bitwise_and)

    def __sub__(self, other: IntervalSet) -> IntervalSet:
        return self._combined(other, np.greater)  # member of the one and not of the other: True > False

    def _combined(self, other: IntervalSet, rule: Callable[[_Bools, _Bools], _Bools]) -> IntervalSet:
        """The set whose members `rule` chooses; it can only change at an edge of either set."""
        if not isinstance(other, IntervalSet):
            return NotImplemented
        edges = np.concatenate((self._edges, other._edges))
        order = np.argsort(edges, kind="stable")  # two ascending runs, which it merges
        edges = edges[order]
        mine = np.cumsum(order < len(self._edges))  # edges of this set up to each place
        last = np.flatnonzero(np.concatenate((edges[1:] != edges[:-1], [True][: len(edges)])))
        mine, both = mine[last], last + 1
        member = rule((mine & 1).astype(np.bool_), ((both - mine) & 1).astype(np.bool_))
        return self._from_edges(edges[last][np.diff(member, prepend=False)])

    def add(self, value: int) -> IntervalSet:
        """This set and one more member: O(log K) to find the place and a copy of the K intervals.

        To add many one by one to a set of many intervals, use `IntervalBuilder`.
        """
        number = _member(value)
        if self._edges.size and self._edges[-1] == number:  # a counter's next value: no search, no check of sizes
            grown = self._edges.copy()
            grown[-1] = number + 1
            return self._from_edges(grown)
        place = int(self._edges.searchsorted(number, side="right"))
        if place & 1:
            return self
        flipped, low, high = _flip(self._edges, place, number)
        return self._from_edges(np.concatenate((self._edges[:low], np.array(flipped, np.int64), self._edges[high:])))

    def _sizes_before(self) -> _Ints:
        """(K + 1,): the number of members before each interval, and of all."""
        if self._preceding is None:
            sizes = self._edges[1::2] - self._edges[::2]
            self._preceding = np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))
        return self._preceding

    @overload
    def nth(self, k: int) -> int: ...
    @overload
    def nth(self, k: npt.NDArray[Any]) -> _Ints: ...
    def nth(self, k: int | npt.NDArray[Any]) -> int | _Ints:
        """The k-th smallest member, from 0; an array of k gives an array of members.

        Raises
        ------
        NotFoundError
            k is negative or not below the number of members.
        """
        places = _integers(k)
        before = self._sizes_before()
        if places.size and (places.min() < 0 or places.max() >= before[-1]):
            raise NotFoundError(f"an interval set of {len(self)} members has no member number {k}")
        interval = before.searchsorted(places, side="right") - 1
        members = self.pairs[interval, 0] + (places - before[interval])
        return members if isinstance(k, np.ndarray) else int(members)

    @overload
    def rank(self, value: int) -> int: ...
    @overload
    def rank(self, value: npt.NDArray[Any]) -> _Ints: ...
    def rank(self, value: int | npt.NDArray[Any]) -> int | _Ints:
        """The number of members below `value`; an array of values gives an array of numbers."""
        values = _integers(value)
        flat = values.reshape(-1)
        edges = self._edges.searchsorted(flat, side="left")
        ranks = self._sizes_before().take((edges + 1) // 2)
        inside = np.flatnonzero(edges & 1)  # there the whole interval was counted: take off its rest, from the value on
        ranks[inside] -= self._edges[edges[inside]] - flat[inside]
        return ranks.reshape(values.shape) if isinstance(value, np.ndarray) else int(ranks[0])

    def min(self) -> int:
        """The smallest member; NotFoundError where there is none."""
        return self.nth(0)

    def max(self) -> int:
        """The largest member; NotFoundError where there is none."""
        return self.nth(len(self) - 1)

    def first(self, n: int) -> _Ints:
        """The `n` smallest members, or all where there are fewer; int64, ascending."""
        return self.nth(np.arange(min(max(n, 0), len(self))))

    def __repr__(self) -> str:
        shown = ", ".join(f"[{start}, {stop}]" for start, stop in self.pairs[:4].tolist())
        more = f", … {len(self.pairs)} intervals" if len(self.pairs) > 4 else ""
        return f"IntervalSet([{shown}{more}])"

    def __reduce__(self) -> tuple[type[IntervalSet], tuple[_Ints]]:
        return IntervalSet, (self.pairs,)


class IntervalBuilder:
    """A mutable set of integers that changes one by one and freezes to an `IntervalSet`.

    Adding near the end costs O(log K); in the middle it also moves the edges behind (16 bytes an interval).

    Notes
    -----
    Not locked: one thread at a time.
    """

    __slots__ = ("_edges", "_size")

    def __init__(self, members: IntervalSet | Iterable[int] = ()) -> None:
        self._replace(IntervalSet.of(members))

    def _replace(self, members: IntervalSet) -> None:
        self._edges = array("q", members.pairs.tobytes())
        self._size = len(members)

    def __len__(self) -> int:
        return self._size

    def __contains__(self, value: int) -> bool:
        return bool(bisect_right(self._edges, value) & 1)

    def add(self, value: int) -> bool:
        """Put a member in; returns whether it was new."""
        edges = self._edges
        if type(value) is int and edges and edges[-1] == value < _HIGHEST_STOP - 1:
            edges[-1] += 1  # one after the last member: what collectors do
            self._size += 1
            return True
        return self._turn(value, member=True)

    def discard(self, value: int) -> bool:
        """Take a member out; returns whether it was there."""
        return self._turn(value, member=False)

    def _turn(self, value: int, *, member: bool) -> bool:
        number = _member(value)
        place = bisect_right(self._edges, number)
        if bool(place & 1) is member:
            return False
        flipped, low, high = _flip(self._edges, place, number)
        self._edges[low:high] = array("q", flipped)
        self._size += 1 if member else -1
        return True

    def update(self, members: IntervalSet | Iterable[int]) -> None:
        """Put many members in at once, in time O(K + their number); a few are added one by one."""
        found = IntervalSet.of(members)
        if len(found) <= _FEW:
            for member in found:
                self.add(member)
        else:
            self._replace(self.freeze() | found)

    def freeze(self) -> IntervalSet:
        """The members as they stand now; later changes here do not touch it."""
        return IntervalSet._from_edges(np.array(self._edges, np.int64))


def _flip(edges: Sequence[int] | _Ints, place: int, value: int) -> tuple[list[int], int, int]:
    """What replaces ``edges[low:high]`` when `value`, found at `place`, changes sides.

    The edges ``value`` and ``value + 1`` vanish where they stand and appear where they do not.
    """
    starts_here = place > 0 and edges[place - 1] == value
    stops_here = place < len(edges) and edges[place] == value + 1
    flipped = [value] * (not starts_here) + [value + 1] * (not stops_here)
    return flipped, place - starts_here, place + stops_here


def _joined(pairs: _Ints) -> _Ints:
    """The edges of the union of non-empty intervals."""
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    reached = np.maximum.accumulate(pairs[:, 1])
    apart = pairs[1:, 0] > reached[:-1]
    first = np.concatenate(([True], apart))[: len(pairs)]
    last = np.concatenate((apart, [True]))[: len(pairs)]
    return np.stack((pairs[first, 0], reached[last]), axis=1).reshape(-1)


def _member(value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise SchemaError(f"a member of an interval set is an integer, not {value!r}") from None
    if not _LOWEST <= number < _HIGHEST_STOP:
        raise SchemaError(f"{number} is too large for an interval set: members lie in [-2**63, 2**63 - 1)")
    return number


def _integers(values: object) -> _Ints:
    """An int64 array of the same shape; anything that is not integers is refused, not rounded."""
    try:
        given: npt.NDArray[Any] = np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise SchemaError(f"integers are expected here: {error}") from None
    if given.size == 0:
        return np.zeros(given.shape, np.int64)
    if given.dtype.kind not in "iu":
        raise SchemaError(f"integers within int64 are expected here, not {given.dtype}")
    if given.dtype == np.uint64 and given.max() > _HIGHEST_STOP:
        raise SchemaError(f"{given.max()} does not fit in int64")
    return given.astype(np.int64, copy=False)
