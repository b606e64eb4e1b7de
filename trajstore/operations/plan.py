"""The plan of a new store: trajectories chosen from stores → where their rows go → which shards are moved or made.

A plan is integers: it reads the tables of its sources, and no row of a field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from trajstore.dataset import Dataset
from trajstore.engine.seals import by_shard
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import SchemaError
from trajstore.format.encoding import field_layout
from trajstore.format.intervals import IntervalSet
from trajstore.format.layout import ArrayLayout, Codec
from trajstore.format.manifest import Shard
from trajstore.format.schema import MAIN_CLOCK, Field
from trajstore.format.union import Union, unite

Ints = np.ndarray[Any, np.dtype[np.int64]]
Layouts = Callable[[Field, Codec], ArrayLayout]

_LONG = 16  # chunks; so long a run is worth a gap that lets it keep its chunks
_GAP = 4  # a source is linked if its gaps are no more than a quarter of its rows
PART, START, STOP, TARGET = range(4)  # columns of runs: rows [start, stop) of a store's clock lie at target


@dataclass(frozen=True)
class Linked:
    """A shard file that the new store takes over as it is. part : number of the store it comes from."""

    layout: ArrayLayout
    number: int
    part: int
    array: str
    source: int
    shard: Shard


@dataclass(frozen=True)
class Encoded:
    """A shard that is made from rows. runs : int64 (k, 4), see ``PART``; their targets lie in this shard.

    plainly : for each store, whether its stored rows are stored rows here (one rule), or values must be.
    chunkwise : for each store, whether its chunks can be taken over as they are, where they keep their borders.
    """

    layout: ArrayLayout
    number: int
    path: str
    runs: Ints
    plainly: tuple[bool, ...]
    chunkwise: tuple[bool, ...]

    @property
    def raw_bytes(self) -> int:
        return int((self.runs[:, STOP] - self.runs[:, START]).sum()) * self.layout.row_bytes


@dataclass(frozen=True)
class Axis:
    """A clock of the new store. pairs : int64 (n, 2), of every trajectory. rows : where the clock ends."""

    pairs: Ints
    runs: Ints
    rows: int


@dataclass(frozen=True)
class Plan:
    """What a new store will be.

    snapshots : of the stores that trajectories come from. asked : of all, also those of which none was chosen.
    part, row : of each trajectory, the place of its store among ``snapshots``, and its row in the table there.
    """

    snapshots: tuple[Snapshot, ...]
    asked: tuple[Snapshot, ...]
    part: Ints
    row: Ints
    union: Union
    axes: Mapping[str, Axis]
    layouts: Mapping[str, ArrayLayout]
    linked: Sequence[Linked]
    encoded: Sequence[Encoded]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.part)

    @property
    def steps(self) -> int:
        pairs = self.axes[MAIN_CLOCK].pairs
        return int((pairs[:, 1] - pairs[:, 0]).sum())

    def summary(self) -> dict[str, Any]:
        """Counts and bytes, in all and of each field; what ``--dry-run`` prints."""
        fields = {
            path: {"linked_shards": 0, "linked_bytes": 0, "encoded_shards": 0, "encoded_raw_bytes": 0}
            for path in self.layouts
        }
        path_of = {spec.array: path for path, spec in self.union.schema.fields.items()}
        for link in self.linked:
            entry = fields[path_of[link.layout.path]]
            entry["linked_shards"] += 1
            entry["linked_bytes"] += link.shard.length
        for task in self.encoded:
            entry = fields[task.path]
            entry["encoded_shards"] += 1
            entry["encoded_raw_bytes"] += task.raw_bytes
        names = ("linked_shards", "linked_bytes", "encoded_shards", "encoded_raw_bytes")
        return {
            "stores": len(self.snapshots),
            "trajectories": len(self),
            "steps": self.steps,
            **{name: sum(entry[name] for entry in fields.values()) for name in names},
            "fields": fields,
            "notes": list(self.notes),
        }


def plan(
    dataset: Dataset,
    *,
    rewrite: bool = False,
    strict: bool = False,
    codec: Codec | None = None,
    layouts: Layouts | None = None,
    fill: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan a store of a dataset's trajectories, in its order.

    Shard files are linked where the rows of a store can keep their places within shards, which costs gaps of no more
    than a quarter of the rows; all else is encoded anew.

    Parameters
    ----------
    rewrite : make every shard anew, without gaps, trajectory after trajectory.
    strict : link only shards of which every row is chosen, so that no other row travels along.
    codec, layouts : of a rewritten store's fields; by default the codec that they have, in live shards. Without another
        codec, chunks that keep their borders are taken over as they are.
    fill : see ``union.unite``.

    Raises
    ------
    SchemaError
        The stores do not fit together.
    """
    part, row = dataset.locate(np.arange(len(dataset), dtype=np.int64))
    chosen = np.unique(part)
    if not len(chosen):
        chosen = np.arange(len(dataset.snapshots))
    snapshots = tuple(dataset.snapshots[p] for p in chosen.tolist())
    part = np.searchsorted(chosen, part)
    if not rewrite and len(np.unique(part * (row.max(initial=0) + 1) + row)) < len(part):
        raise SchemaError(
            "a trajectory is chosen more than once, and no two can share their rows",
            hint="pass rewrite=True: each then gets rows of its own",
        )
    union = unite([s.manifest.schema for s in snapshots], [s.place for s in snapshots], fill)
    sources = [_Source(snapshot) for snapshot in snapshots]
    groups = [np.flatnonzero(part == p) for p in range(len(snapshots))]
    axes: dict[str, Axis] = {}
    chosen_layouts: dict[str, ArrayLayout] = {}
    linked: list[Linked] = []
    encoded: list[Encoded] = []
    for clock, clocks in union.clocks.items():
        paths = union.schema.on_clock(clock)
        wanted = (layouts or field_layout) if rewrite else None
        mine = {path: _layout(path, union.schema.fields[path], sources, codec, wanted) for path in paths}
        pairs = _source_pairs(sources, clocks, groups, row)
        if rewrite:
            axis = _packed(pairs, part, 1 if codec is not None else _step(mine))
        else:
            axis = _aligned(pairs, part, groups, [_alignments(source, mine) for source in sources])
        axes[clock] = axis
        for path, layout in mine.items():
            chosen_layouts[path] = layout
            moving = codec is None
            _divide(path, union.schema.fields[path], layout, axis, sources, rewrite, strict, moving, linked, encoded)
    return Plan(snapshots, dataset.snapshots, part, row, union, axes, chosen_layouts, linked, encoded)


class _Source:
    """A store as the planner sees it."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.fields = snapshot.manifest.schema.fields
        self.shards: dict[str, dict[int, Shard]] = {}
        for (array, number), shard in by_shard(snapshot.seals, snapshot.manifest).items():
            self.shards.setdefault(array, {})[number] = shard
        for array, tail in snapshot.manifest.tails.items():
            self.shards.setdefault(array, {})[tail.number] = tail

    def array(self, path: str) -> tuple[ArrayLayout, int]:
        return self.snapshot.manifest.arrays[self.fields[path].array]

    def bytes(self, path: str) -> int:
        return sum(shard.length for shard in self.shards.get(self.fields[path].array, {}).values())

    def fits(self, path: str, layout: ArrayLayout) -> bool:
        """Whether this store's shards could stand in an array of that layout. Frames name their own compressor."""
        return self.chunks_fit(path, layout) and self.array(path)[0].shard_rows == layout.shard_rows

    def chunks_fit(self, path: str, layout: ArrayLayout) -> bool:
        """Whether this store's chunks could."""
        if path not in self.fields:
            return False
        own = self.array(path)[0]
        return (own.dtype, own.row_shape, own.chunk_rows, own.fill) == (
            layout.dtype,
            layout.row_shape,
            layout.chunk_rows,
            layout.fill,
        )


def _layout(
    path: str, spec: Field, sources: Sequence[_Source], codec: Codec | None, layouts: Layouts | None
) -> ArrayLayout:
    """The layout that most of the field's bytes have already, or the one wanted for a rewritten store."""
    having = [source for source in sources if path in source.fields]
    fullest = max(having, key=lambda source: source.bytes(path)).array(path)[0]
    if layouts is not None:
        return layouts(spec, codec or fullest.codec)
    if fullest.dtype != spec.stored:
        return field_layout(spec, fullest.codec)
    return replace(fullest, path=spec.array, dimension=str(spec.clock))


def _step(layouts: Mapping[str, ArrayLayout]) -> int:
    """Rows in a chunk of the field that holds most bytes."""
    return max(((layout.row_bytes, layout.chunk_rows) for layout in layouts.values()), default=(0, 1))[1]


def _source_pairs(sources: Sequence[_Source], clocks: Sequence[str | None], groups: Sequence[Ints], row: Ints) -> Ints:
    pairs = np.full((len(row), 2), -1, np.int64)
    for source, clock, mine in zip(sources, clocks, groups):
        if clock is not None and len(mine):
            pairs[mine] = source.snapshot.pairs(clock, row[mine])
    return pairs


# -- where rows go -----------------------------------------------------------------------------------------------------


def _packed(pairs: Ints, part: Ints, step: int) -> Axis:
    """Rows trajectory after trajectory, in the dataset's order, without gaps.

    Where a store's rows go on for long, they keep their places within chunks of ``step`` rows, so that whole chunks can
    be moved as they are; that costs fewer than ``step`` rows each time.
    """
    there = np.flatnonzero(pairs[:, 0] < pairs[:, 1])
    runs = np.column_stack((part[there], pairs[there], np.zeros(len(there), np.int64)))
    goes_on = (runs[1:, PART] == runs[:-1, PART]) & (runs[1:, START] == runs[:-1, STOP])
    first = np.flatnonzero(np.concatenate(([True], ~goes_on))[: len(runs)])
    inside = np.repeat(np.arange(len(first)), np.diff(np.concatenate((first, [len(runs)]))))
    stops = runs[np.concatenate((first[1:], [len(runs)])) - 1, STOP] if len(first) else runs[:, STOP]
    runs = runs[first]
    runs[:, STOP] = stops
    lengths = runs[:, STOP] - runs[:, START]
    runs[:, TARGET] = _laid(runs[:, START], lengths, step)
    found = np.where(pairs < 0, -1, 0)
    found[there] = pairs[there] + (runs[:, TARGET] - runs[:, START])[inside][:, None]
    return Axis(found, runs, int(runs[-1, TARGET] + lengths[-1]) if len(runs) else 0)


def _laid(starts: Ints, lengths: Ints, step: int) -> Ints:
    """Where runs begin that are laid end to end; the long ones where they keep their places within ``step`` rows."""
    long = lengths >= _LONG * step
    if step == 1 or not long.any():
        return np.cumsum(lengths) - lengths
    targets, at = [], 0
    for start, length, moves in zip(starts.tolist(), lengths.tolist(), long.tolist()):
        if moves:
            at += (start - at) % step
        targets.append(at)
        at += length
    return np.array(targets, np.int64)


def _alignments(source: _Source, layouts: Mapping[str, ArrayLayout]) -> list[int]:
    """The shard heights that could be kept, ascending."""
    return sorted({layout.shard_rows for path, layout in layouts.items() if source.fits(path, layout)})


def _aligned(pairs: Ints, part: Ints, groups: Sequence[Ints], alignments: Sequence[list[int]]) -> Axis:
    """Rows of each store together, at places where as many of its shards as possible can stay what they are.

    The stores with the tallest shards come first, so that few gaps arise between one and the next.
    """
    needed = [IntervalSet(pairs[mine][pairs[mine, 0] >= 0]).pairs for mine in groups]
    heights = [_height(runs, heights) for runs, heights in zip(needed, alignments)]
    found = pairs.copy()
    pieces = []
    at = before = 0
    for p in sorted(range(len(groups)), key=lambda p: (-heights[p], p)):
        if not len(needed[p]):
            _place_empty(found, groups[p], pairs)
            continue
        at = -(-at // max(heights[p], before, 1)) * max(heights[p], before, 1)
        before = heights[p]
        covers = _covers(needed[p], max(heights[p], 1))
        targets = at + np.concatenate(([0], np.cumsum(covers[:, 1] - covers[:, 0])[:-1]))
        inside = np.searchsorted(covers[:, 0], needed[p][:, 0], side="right") - 1
        shift = (targets - covers[:, 0])[inside]
        runs = np.column_stack((np.full(len(shift), p), needed[p], needed[p][:, 0] + shift))
        pieces.append(runs)
        mine = groups[p]
        full = mine[pairs[mine, 0] < pairs[mine, 1]]
        moved = shift[np.searchsorted(needed[p][:, 0], pairs[full, 0], side="right") - 1]
        found[full] = pairs[full] + moved[:, None]
        _place_empty(found, mine, pairs)
        at = int(runs[-1, TARGET] + runs[-1, STOP] - runs[-1, START])
    runs = np.concatenate(pieces) if pieces else np.empty((0, 4), np.int64)
    return Axis(found, runs, at)


def _place_empty(found: Ints, mine: Ints, pairs: Ints) -> None:
    empty = mine[(pairs[mine, 0] == pairs[mine, 1]) & (pairs[mine, 0] >= 0)]
    found[empty] = 0


def _height(needed: Ints, heights: list[int]) -> int:
    """The tallest shards that stay whole at a cost of few gaps; 0 where none do."""
    live = int((needed[:, 1] - needed[:, 0]).sum())
    for height in reversed(heights):
        covers = _covers(needed, height)
        if (int((covers[:, 1] - covers[:, 0]).sum()) - live) * _GAP <= live:
            return height
    return 0


def _covers(needed: Ints, height: int) -> Ints:
    """The runs of whole blocks of ``height`` rows that hold the needed ones, int64 (k, 2)."""
    return IntervalSet(np.stack((needed[:, 0] // height, -(-needed[:, 1] // height)), axis=1)).pairs * height


# -- shards ------------------------------------------------------------------------------------------------------------


def _divide(
    path: str,
    spec: Field,
    layout: ArrayLayout,
    axis: Axis,
    sources: Sequence[_Source],
    rewrite: bool,
    strict: bool,
    moving: bool,
    linked: list[Linked],
    encoded: list[Encoded],
) -> None:
    """Each shard of a field: linked if it is one shard of one store, else encoded."""
    if not layout.row_bytes or not len(axis.runs):
        return
    runs, height = axis.runs, layout.shard_rows
    firsts = runs[:, TARGET]
    lasts = firsts + runs[:, STOP] - runs[:, START]
    offsets = firsts - runs[:, START]
    changes = np.cumsum(np.concatenate(([False], (offsets[1:] != offsets[:-1]) | (runs[1:, PART] != runs[:-1, PART]))))
    fits = [not rewrite and source.fits(path, layout) for source in sources]
    plainly = tuple(path in source.fields and source.fields[path].rule == spec.rule for source in sources)
    chunkwise = tuple(moving and source.chunks_fit(path, layout) for source in sources)
    blocks = IntervalSet(np.stack((firsts // height, -(-lasts // height)), axis=1))
    numbers = blocks.nth(np.arange(len(blocks)))
    lows = np.searchsorted(lasts, numbers * height, side="right")
    highs = np.searchsorted(firsts, (numbers + 1) * height, side="left")
    for number, low, high in zip(numbers.tolist(), lows.tolist(), highs.tolist()):
        part, offset = int(runs[low, PART]), int(offsets[low])
        first, last = number * height, (number + 1) * height
        if fits[part] and changes[low] == changes[high - 1] and offset % height == 0 and plainly[part]:
            source, origin = sources[part], number - offset // height
            array = source.fields[path].array
            shard = source.shards.get(array, {}).get(origin)
            held = min(last, source.array(path)[1] + offset) - first
            covered = int((np.minimum(lasts[low:high], last) - np.maximum(firsts[low:high], first)).sum())
            if shard is not None and (not strict or covered == held):
                linked.append(Linked(layout, number, part, array, origin, shard))
                continue
        clipped = runs[low:high].copy()
        clipped[:, START] += np.maximum(first - firsts[low:high], 0)
        clipped[:, STOP] -= np.maximum(lasts[low:high] - last, 0)
        clipped[:, TARGET] = np.maximum(firsts[low:high], first)
        encoded.append(Encoded(layout, number, path, clipped, plainly, chunkwise))
