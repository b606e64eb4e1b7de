"""The table of a store against itself and its arrays: clocks, ids, counts; and whose rows a damaged shard held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trajstore.engine.snapshot import Snapshot
from trajstore.errors import CorruptionError, FormatError, StorageError
from trajstore.format import typedjson
from trajstore.format.intervals import IntervalSet
from trajstore.format.layout import CLOCKS, ROOT, TABLE_DIMENSION, ArrayLayout, clock_array, column_array
from trajstore.format.schema import ID, MAIN_CLOCK
from trajstore.operations.damage import Damage, Ints
from trajstore.operations.shardcheck import Fault

_BLOCK = 1 << 16  # rows of the table looked at together
_LISTED = 1 << 24  # trajectories that one damage lists at the most


class TableCheck:
    """Checks the table of one commit, and turns the faults of shards into damage of trajectories.

    Parameters
    ----------
    rows, live : rows of the table that are trajectories, and those of them that are not deleted.
    faults : by array, what its shards' files were found to lack.
    shards : by array, the numbers of the shards that the commit names.
    deep : decode strings and documents too.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        rows: IntervalSet,
        live: IntervalSet,
        faults: Mapping[str, Sequence[Fault]],
        shards: Mapping[str, Sequence[int]],
        *,
        deep: bool,
    ) -> None:
        self.snapshot = snapshot
        self.manifest = snapshot.manifest
        self.faults = faults
        self.shards = shards
        # Rows that no file of the table can hold are damage, and a forged number of them must not cost a loop.
        self.rows = rows & IntervalSet(self._held(column_array(ID)))
        self.named = len(rows)
        self.live = live
        self.deep = deep
        self.damages: list[Damage] = []
        self.steps = 0  # of the trajectories that are not deleted

    def run(self) -> list[Damage]:
        """All damage, table first."""
        for path, (layout, rows) in self.manifest.arrays.items():
            if layout.dimension == TABLE_DIMENSION:
                self._table_faults(path, layout, rows)
        counted = self.manifest.counts["trajectories"]
        if self.named != counted:
            self._add("count", ROOT, f"the manifest counts {counted} trajectories and names {self.named}")
        self._ids()
        unique = self.manifest.progress.get("unique")
        if isinstance(unique, str) and unique in self.manifest.schema.columns and unique != ID:
            self._distinct(unique)
        for clock in self.manifest.schema.clocks:
            self._clock(clock)
        return self.damages

    def _add(self, kind: str, file: str, message: str, **where: Any) -> None:
        self.damages.append(Damage(kind, self.snapshot.place, file, message, **where))

    def _add_rows(self, message: str, rows: Ints, **where: Any) -> None:
        """Damage of the trajectories at these rows of the table."""
        rows = rows[self.live.contains(rows)]
        if len(rows):
            self._add("table", "", message, trajectories=self.live.rank(rows), spans=nowhere(len(rows)), **where)

    def _blocks(self, array: str) -> Iterator[tuple[Ints, Any]]:
        """Rows of the table that are trajectories, with an array's values; those that cannot be read are left out."""
        if array not in self.manifest.arrays:
            return
        reader = self.snapshot.reader(array)
        for first in range(0, len(self.rows), _BLOCK):
            rows = self.rows.nth(np.arange(first, min(first + _BLOCK, len(self.rows))))
            rows = rows[rows < reader.rows]
            try:
                yield rows, reader.take(rows)
            except (CorruptionError, StorageError):
                chunks = rows // reader.layout.chunk_rows
                for chunk in np.unique(chunks).tolist():
                    mine = rows[chunks == chunk]
                    try:
                        yield mine, reader.take(mine)
                    except (CorruptionError, StorageError):
                        pass  # the shard's own fault says so

    def _held(self, array: str) -> list[tuple[int, int]]:
        """The rows that an array's known shards can hold."""
        if array not in self.manifest.arrays:
            return []
        size = self.manifest.arrays[array][0].shard_rows
        return [(number * size, (number + 1) * size) for number in self.shards.get(array, ())]

    def _unnamed(self, layout: ArrayLayout, rows: int) -> Iterator[Fault]:
        """Shards below an array's end that the commit does not name: no trajectory may have rows there."""
        next_number = 0
        for number in [*sorted(self.shards.get(layout.path, ())), -(-rows // layout.shard_rows)]:
            if next_number < number:
                start, stop = next_number * layout.shard_rows, number * layout.shard_rows
                yield Fault("lost", start, stop, f"the commit names no file of {layout.path} for these rows", "", False)
            next_number = number + 1

    # -- columns ---------------------------------------------------------------------------------------------------

    def _table_faults(self, path: str, layout: ArrayLayout, rows: int) -> None:
        faults = list(self.faults.get(path, ()))
        if path in (column_array(ID), clock_array(MAIN_CLOCK)):
            faults += self._unnamed(layout, rows)
        else:  # younger than the table perhaps: a chunk that is not there is fill
            faults = [fault for fault in faults if fault.sure]
        folder, name = path.split("/", 1)
        for fault in faults:
            low, high = (self.live.rank(min(row, rows)) for row in (fault.start, fault.stop))
            if fault.sure or low < high:
                numbers = np.arange(low, min(high, low + _LISTED))
                self._add(
                    fault.kind,
                    fault.file,
                    fault.message,
                    rows=(fault.start, min(fault.stop, rows)),
                    trajectories=numbers,
                    spans=nowhere(len(numbers)),
                    **({"clock": name} if folder == CLOCKS else {"column": name}),
                )

    def _ids(self) -> None:
        upper = self.manifest.counts["next_id"]
        for rows, ids in self._blocks(column_array(ID)):
            wrong = (ids < 0) | (ids >= upper)
            if wrong.any():
                self._add_rows(f"an id that was never given out: the next is {upper}", rows[wrong], column=ID)
        self._distinct(ID)

    def _distinct(self, column: str) -> None:
        path = column_array(column)
        last: Any = None
        for _, values in self._blocks(path):
            if len(values) and not ((last is None or values[0] > last) and bool((np.diff(values) > 0).all())):
                break
            last = values[-1] if len(values) else last
        else:
            return  # ascending, as collectors mostly leave them
        found = list(self._blocks(path))
        rows = np.concatenate([rows for rows, _ in found])
        values, inverse, counts = np.unique(
            np.concatenate([values for _, values in found]), return_inverse=True, return_counts=True
        )
        for again in np.flatnonzero(counts > 1).tolist():
            message = f"{counts[again]} trajectories have the {column} {values[again]}"
            self._add_rows(message, rows[inverse == again], column=column)

    # -- clocks ----------------------------------------------------------------------------------------------------

    def _clock(self, clock: str) -> None:
        manifest = self.manifest
        arrays = {
            field: manifest.arrays[manifest.schema.fields[field].array] for field in manifest.schema.on_clock(clock)
        }
        pending: list[tuple[str, Fault, list[tuple[Ints, Ints]]]] = []
        for field, (layout, length) in arrays.items():
            if layout.row_bytes:
                faults = [*self.faults.get(layout.path, ()), *self._unnamed(layout, length)]
                pending += [(field, fault, []) for fault in faults]
        if clock_array(clock) not in manifest.arrays and self.rows and arrays:
            self._add("table", ROOT, f"the manifest names no array for the clock {clock}", clock=clock)
        end = min((length for _, length in arrays.values()), default=None)
        ascending, reached, steps, read = True, -1, 0, 0
        for rows, pairs in self._blocks(clock_array(clock)):
            read += len(rows)
            rows, pairs = self._sound(clock, rows, pairs, end)
            lengths = pairs[:, 1] - pairs[:, 0]
            steps += int(lengths.sum())
            if clock == MAIN_CLOCK:
                self.steps += int(lengths[self.live.contains(rows)].sum())
            taken = pairs[pairs[:, 0] < pairs[:, 1]]
            if len(taken):
                ascending &= bool(taken[0, 0] >= reached) and bool((taken[1:, 0] >= taken[:-1, 1]).all())
                reached = taken[-1, 1]
            for _, fault, hits in pending:
                hits.extend(self._hits(rows, pairs, fault))
            if self.deep:
                self._values(clock, rows, pairs)
        if not ascending:
            self._overlaps(clock, end)
        self._add_hits(pending)
        if clock == MAIN_CLOCK and read == self.named and steps != manifest.counts["steps"]:
            self._add("count", ROOT, f"the manifest counts {manifest.counts['steps']} steps, there are {steps}")

    def _sound(self, clock: str, rows: Ints, pairs: Ints, end: int | None) -> tuple[Ints, Ints]:
        """The trajectories of a block that are on a clock; those that name rows that do not exist are damage."""
        starts, stops = pairs[:, 0], pairs[:, 1]
        absent = (starts == -1) & (stops == -1)
        wrong = ~absent & ((starts < 0) | (stops < starts))
        if end is not None:
            wrong |= stops > end
        if wrong.any() and not self._reported(wrong, clock):
            self._add_rows(f"the clock names rows beyond the {end} there are", rows[wrong], clock=clock)
        good = ~absent & ~wrong
        return rows[good], pairs[good]

    def _reported(self, wrong: Any, clock: str) -> bool:
        return bool(self.damages) and self.damages[-1].kind == "table" and self.damages[-1].clock == clock

    def _hits(self, rows: Ints, pairs: Ints, fault: Fault) -> Iterator[tuple[Ints, Ints]]:
        """Numbers and spans of the trajectories of a block that a fault touches."""
        if not len(rows) or pairs[:, 0].min() >= fault.stop or pairs[:, 1].max() <= fault.start:
            return
        touched = np.flatnonzero((pairs[:, 0] < fault.stop) & (pairs[:, 1] > fault.start) & (pairs[:, 0] < pairs[:, 1]))
        touched = touched[self.live.contains(rows[touched])]
        if len(touched):
            yield self.live.rank(rows[touched]), np.clip(pairs[touched], fault.start, fault.stop) - pairs[touched, :1]

    def _add_hits(self, pending: Sequence[tuple[str, Fault, list[tuple[Ints, Ints]]]]) -> None:
        for field, fault, hits in pending:
            if fault.sure or hits:
                numbers = np.concatenate([np.empty(0, np.int64), *(numbers for numbers, _ in hits)])
                spans = np.concatenate([nowhere(0), *(spans for _, spans in hits)])
                rows = (fault.start, fault.stop)
                self._add(
                    fault.kind, fault.file, fault.message, field=field, rows=rows, trajectories=numbers, spans=spans
                )

    def _overlaps(self, clock: str, end: int | None) -> None:
        found = [self._sound(clock, rows, pairs, end) for rows, pairs in self._blocks(clock_array(clock))]
        rows = np.concatenate([rows for rows, _ in found])
        pairs = np.concatenate([pairs for _, pairs in found])
        order = np.argsort(pairs[:, 0], kind="stable")
        order = order[(pairs[:, 0] < pairs[:, 1])[order]]
        rows, pairs = rows[order], pairs[order]
        reached = np.maximum.accumulate(pairs[:, 1])
        for late in (np.flatnonzero(pairs[1:, 0] < reached[:-1]) + 1).tolist():
            early = int(np.searchsorted(reached[:late], pairs[late, 0], side="right"))
            start, stop = int(pairs[late, 0]), int(min(pairs[late, 1], reached[late - 1]))
            self._add_rows(f"two trajectories have the rows {start}..{stop}", rows[[early, late]], clock=clock)

    # -- values ----------------------------------------------------------------------------------------------------

    def _values(self, clock: str, rows: Ints, pairs: Ints) -> None:
        """Decode the strings and documents of a block of trajectories."""
        mine = self.live.contains(rows)
        numbers = self.live.rank(rows[mine])
        for field in self.manifest.schema.on_clock(clock):
            spec = self.manifest.schema.fields[field]
            if not spec.whole:
                continue
            reader = self.snapshot.reader(spec.array)
            for number, (start, stop) in zip(numbers.tolist(), pairs[mine].tolist()):
                try:
                    _decode(spec.dtype, reader.read(start, stop).tobytes())
                except (CorruptionError, StorageError):
                    pass  # the shard's own fault says so
                except (UnicodeDecodeError, FormatError) as error:
                    self._add(
                        "value",
                        "",
                        f"no valid {spec.dtype}: {error}",
                        field=field,
                        rows=(start, stop),
                        trajectories=np.array([number]),
                        spans=np.array([[0, stop - start]]),
                    )


def _decode(dtype: str, data: bytes) -> None:
    if dtype == "string":
        data.decode("utf-8", "surrogatepass")
    else:
        typedjson.loads(data)


def nowhere(count: int) -> Ints:
    """The spans of trajectories that a damage hits elsewhere than in a field's rows."""
    return np.zeros((count, 2), np.int64)
