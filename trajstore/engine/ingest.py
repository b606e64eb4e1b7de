"""All arrays of a store that one writer session fills: rows in under one lock, commits out."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trajstore.__about__ import __version__
from trajstore.engine.appender import Appender
from trajstore.engine.arraywriter import ArrayWriter
from trajstore.engine.budget import Budget
from trajstore.engine.buffers import Buffers
from trajstore.engine.catalogue import Catalogue
from trajstore.engine.commit import Session
from trajstore.engine.encoders import Encoders, Job, finish
from trajstore.engine.identity import Identity
from trajstore.engine.intake import ABSENT
from trajstore.engine.pool import Pool
from trajstore.engine.repack import unpack
from trajstore.engine.seals import SealWriter
from trajstore.engine.sets import SetWriter
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import NotFoundError
from trajstore.format.encoding import clock_layout, column_layout, field_layout, packer
from trajstore.format.intervals import IntervalBuilder, IntervalSet
from trajstore.format.layout import CLOCKS, SEALS, TABLE, ArrayLayout, Codec, clock_array, column_array, field_array
from trajstore.format.manifest import Commit, Manifest, Shard
from trajstore.format.schema import ID, Clock, Rule, Schema

_DISK_THREADS = 16  # they wait for the disk, not for a core
_DEAD_FACTOR, _DEAD_BYTES = 4, 8 << 20
_TABLE_BATCH = 256  # rows of the table that are turned into arrays at once


@dataclass
class Cut:
    """Where every array stood between two trajectories; what one commit makes visible."""

    schema: Schema
    clock_rows: dict[str, int]
    table_rows: int
    counts: dict[str, int]
    rows: IntervalSet
    appenders: dict[str, Appender]
    jobs: list[Job]
    seals: SealWriter | None
    orphans: dict[str, Shard]

    def ends(self) -> dict[str, int]:
        """The row at which each array ends."""
        fields = {spec.array: self.clock_rows[str(spec.clock)] for spec in self.schema.fields.values()}
        return {path: fields.get(path, self.table_rows) for path in self.appenders}


class Ingest:
    """The growing arrays of one store.

    Parameters
    ----------
    codec : of the fields' arrays that are made from now on.
    lock : the writer's, re-entrant; ``append``, ``declare``, ``split`` and ``cut`` are called while it is held.

    Attributes
    ----------
    disk_failed : a shard that became full could not be written; whether it can be now, a commit shows.

    Notes
    -----
    ``commit`` is called in one thread at a time, without the lock: rows go on coming in meanwhile.
    """

    def __init__(
        self,
        session: Session,
        codec: Codec,
        *,
        threads: int,
        queue_bytes: int,
        lock: AbstractContextManager[None],
        clock: Callable[[], float],
    ) -> None:
        head = session.head
        self.session = session
        self.storage = session.storage
        self.budget = Budget(queue_bytes)
        self.schema = head.schema if head else Schema()
        self.counts = dict(head.counts) if head else {"trajectories": 0, "steps": 0, "next_id": 0}
        self._codec = codec
        self._lock = lock
        self._clock = clock
        self.disk_failed = False
        self._disk = Pool(_DISK_THREADS, thread_name_prefix="trajstore-disk")
        self._buffers = Buffers(self._disk)
        self._rows = IntervalBuilder(Snapshot(self.storage, head).set("rows") if head else ())
        self._clock_rows = {name: _rows_on(head, name) for name in self.schema.clocks} if head else {}
        self._table_rows = head.arrays[column_array(ID)][1] if head and column_array(ID) in head.arrays else 0
        self._catalogue = Catalogue(self.storage, head.names if head else ())
        self._appenders: dict[str, Appender] = {}
        self._seals: SealWriter | None = None
        self._orphans: dict[str, Shard] = {}
        self._sets = SetWriter(self.storage, session.uuid, self._disk)
        self._begun = False
        self._opened = len(self._rows), self.counts["next_id"]
        self._earlier: Identity | None = None
        self._torn = False  # an append was interrupted midway
        self._table: list[list[Any]] = []  # start and stop on each clock, then columns, of the last trajectories
        self._plan: tuple[Any, ...] = ()
        self._encoders = Encoders(threads)  # at the very end: nobody would stop them if anything above failed

    def close(self) -> None:
        """Stop the threads; what was not committed is dropped."""
        self._encoders.close()
        self._disk.shutdown(cancel_futures=True)

    # -- opening arrays --------------------------------------------------------------------------------------------

    def declare(self, schema: Schema) -> None:
        """Take a schema that holds the present one, and open the arrays that it adds; on an error, nothing of it."""
        self._write_table()
        with self._all_or_nothing():
            self.schema = schema
            for name in schema.clocks:
                self._clock_rows.setdefault(name, 0)
            if self._begun:
                self._open_arrays()
            else:
                self._begin()

    def _begin(self) -> None:
        """Open every array; the session's rows begin where no other session has made a shard (rule B)."""
        with self._all_or_nothing():
            head = self.session.head
            self._seals = SealWriter(self.storage, self.session.uuid, self._disk, head)
            self._catalogue.enter(SEALS)
            # The tails that a session before this one left will not grow again.
            self._orphans = dict(head.tails) if head else {}
            self._open_arrays()
            self._begun = True

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """A commit names what is open here: of arrays that could be opened in part only, none may be."""
        before = self.schema, self._seals, self._orphans, dict(self._appenders)
        try:
            yield
        except BaseException:
            self.schema, self._seals, self._orphans, self._appenders = before
            raise

    def _open_arrays(self) -> None:
        for clock in self.schema.clocks:
            self._open_fields(clock)
        layouts = [clock_layout(name) for name in self.schema.clocks]
        layouts += [column_layout(name, spec) for name, spec in self.schema.columns.items()]
        new = [self._array_writer(layout) for layout in layouts if layout.path not in self._appenders]
        if not new:
            return
        opened = [self._appenders[layout.path] for layout in layouts if layout.path in self._appenders]
        taken = max(writer.existing_shards() * writer.layout.shard_rows for writer in new)
        if not opened or taken > self._table_rows:
            self._table_rows = _aligned(max(self._table_rows, taken), new)
            for appender in opened:
                appender.leap(self._table_rows)
        for writer in new:
            self._appenders[writer.layout.path] = self._appender(writer, writer.layout.dtype, self._table_rows)

    def _open_fields(self, clock: str) -> None:
        new = {}
        for path in self.schema.on_clock(clock):
            spec = self.schema.fields[path]
            if spec.array not in self._appenders:
                head = self.session.head
                known = head.arrays.get(spec.array) if head else None
                layout = known[0] if known else field_layout(spec, self._codec)
                pack = packer(spec.dtype, spec.rule) if spec.rule.kind == "divide" else None
                new[path] = self._array_writer(layout, pack)
        if not new:
            return
        taken = max(writer.existing_shards() * writer.layout.shard_rows for writer in new.values())
        row = self._clock_rows[clock] = _aligned(max(self._clock_rows[clock], taken), list(new.values()))
        for path, writer in new.items():
            self._appenders[writer.layout.path] = self._appender(writer, self.schema.fields[path].in_memory, row, path)

    def _array_writer(self, layout: ArrayLayout, pack: Any = None) -> ArrayWriter:
        writer = ArrayWriter(layout, self.storage, self.session.uuid, self._disk, pack, self._note_failure)
        writer.make_folder()
        self._catalogue.enter(layout.path)
        return writer

    def _note_failure(self) -> None:
        self.disk_failed = True

    def _appender(self, writer: ArrayWriter, dtype: np.dtype[Any], first: int, path: str = "") -> Appender:
        return Appender(
            writer,
            dtype,
            first,
            encoders=self._encoders,
            budget=self.budget,
            buffers=self._buffers,
            clock=self._clock,
            on_misfit=(lambda: self._plain_writer(path)) if writer.pack is not None else None,
        )

    # -- rows in ---------------------------------------------------------------------------------------------------

    def append(self, arrays: list[Any], lengths: list[int], columns: list[Any]) -> int:
        """Take the rows of one trajectory, as ``intake.Checker`` gives them; its id."""
        if not self._begun:
            self._begin()
        if self._torn:
            self._mend()
        if not self._plan or self._plan[0] is not self.schema:
            self._plan = self.schema, [self._appenders[spec.array].write for spec in self.schema.fields.values()]
        self._torn = True
        clock_rows, counts = self._clock_rows, self.counts
        for write, rows in zip(self._plan[1], arrays):
            if rows is not None:
                write(rows)
        record: list[Any] = []
        for name, count in zip(self.schema.clocks, lengths):
            start = clock_rows[name]
            if count > 0:
                clock_rows[name] = start + count
            record.append((-1, -1) if count == ABSENT else (start, start + count))
        number = counts["next_id"]
        record.append(number)
        record += columns
        steps = max(lengths[0], 0)
        # No interrupt falls between these: Python looks for one after calls only.
        counts["next_id"] = number + 1
        counts["trajectories"] += 1
        counts["steps"] += steps
        self._table.append(record)
        self._torn = False
        if len(self._table) >= _TABLE_BATCH:
            self._write_table()
        return number

    def _write_table(self) -> None:
        """Bring the table up to the last trajectory; interrupted midway, it is done again at new shards."""
        if not self._table:
            return
        if self._torn:
            self._mend()
        self._torn = True
        rows = zip(*self._table)
        for clock in self.schema.clocks:
            self._appenders[clock_array(clock)].write(np.array(next(rows), np.int64))
        ids = next(rows)
        for name, spec in self.schema.columns.items():
            values = ids if name == ID else next(rows)
            self._appenders[column_array(name)].write(np.array(values, spec.dtype))
        end = self._table_rows + len(self._table)
        self._rows.update(IntervalSet.span(self._table_rows, end))
        self._table_rows, self._table = end, []
        self._torn = False

    def append_many(
        self, arrays: list[Any], lengths: list[np.ndarray[Any, Any] | None], columns: list[Any], count: int
    ) -> int:
        """Take ``count`` trajectories, end to end, as ``batch.Batch`` gives them; the first one's id."""
        if not self._begun:
            self._begin()
        if self._torn:
            self._mend()
        self._write_table()
        steps = int(lengths[0].sum()) if lengths[0] is not None else 0
        self._torn = True
        appenders, schema, clock_rows, counts = self._appenders, self.schema, self._clock_rows, self.counts
        for spec, rows in zip(schema.fields.values(), arrays):
            if rows is not None:
                appenders[spec.array].write(rows)
        for name, rows in zip(schema.clocks, lengths):
            pairs = np.full((count, 2), -1, np.int64)
            if rows is not None:
                pairs[:, 1] = clock_rows[name] + np.cumsum(rows)
                pairs[:, 0] = pairs[:, 1] - rows
                clock_rows[name] = int(pairs[-1, 1])
            appenders[clock_array(name)].write(pairs)
        first = counts["next_id"]
        values = iter(columns)
        for name in schema.columns:
            appenders[column_array(name)].write(np.arange(first, first + count) if name == ID else next(values))
        self._rows.update(IntervalSet.span(self._table_rows, self._table_rows + count))
        # No interrupt falls between these: Python looks for one after calls only.
        self._table_rows += count
        counts["next_id"] = first + count
        counts["trajectories"] += count
        counts["steps"] += steps
        self._torn = False
        return first

    def rows_of(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Rows of the table of trajectories by id, those not committed yet included. Raises ``NotFoundError``."""
        self._write_table()
        rows = self._rows.freeze()
        count, first = self._opened
        beyond = (ids < 0) | (ids >= self.counts["next_id"])
        if beyond.any():
            raise NotFoundError(f"{self.storage.describe()} has no trajectory of the id {ids[beyond][0]}")
        found = np.empty(len(ids), np.int64)
        new = ids >= first
        found[new] = rows.nth(count + ids[new] - first)
        if not new.all():
            head = self.session.head
            if self._earlier is None and head is not None:
                opened = rows & IntervalSet.span(0, rows.nth(count - 1) + 1) if count else IntervalSet()
                self._earlier = Identity(Snapshot(self.storage, head), opened)
            if self._earlier is not None:
                found[~new] = self._earlier.rows_of(ids[~new])
        return found

    def _mend(self) -> None:
        """After an append that was interrupted midway, so that arrays differ in length: all go on at new shards."""
        for clock in self.schema.clocks:
            self._leap_clock(clock, past=True)
        self._rows = IntervalBuilder(self._rows.freeze() - IntervalSet.span(self._table_rows, 1 << 62))
        table = [a for path, a in self._appenders.items() if path.startswith((f"{CLOCKS}/", f"{TABLE}/"))]
        self._table_rows = _aligned(max(appender.row for appender in table), [a.target for a in table])
        for appender in table:
            appender.leap(self._table_rows)
        self._torn = False

    def _leap_clock(self, clock: str, *, past: bool = False) -> None:
        arrays = [self.schema.fields[path].array for path in self.schema.on_clock(clock)]
        appenders = [self._appenders[array] for array in arrays if array in self._appenders]
        if appenders:
            row = max([self._clock_rows[clock], *(appender.row for appender in appenders if past)])
            self._clock_rows[clock] = _aligned(row, [appender.target for appender in appenders])
            for appender in appenders:
                appender.leap(self._clock_rows[clock])

    def split(self, path: str) -> None:
        """Give a field a clock of its own, from the next trajectory on. All rows so far must be committed."""
        if not self._begun:
            self._begin()
        spec = self.schema.fields[path]
        name = self.free_clock(path)
        pairs = self._committed_pairs(str(spec.clock))
        self._clock_rows[name] = self._appenders[spec.array].row
        fields = {**self.schema.fields, path: replace(spec, clock=name)}
        self.declare(replace(self.schema, fields=fields, clocks={**self.schema.clocks, name: Clock("none")}))
        appender = self._appenders[clock_array(name)]
        appender.target.encode(pairs, 0)
        appender.preset(pairs)

    def free_clock(self, path: str) -> str:
        """A name for a clock of a field's own; a dead session may have left an array of the first choice."""
        name = path.replace("/", ".")
        taken = {clock.casefold() for clock in self.schema.clocks}
        while name.casefold() in taken or self.storage.list(clock_array(name)):
            name += ".clock"
        return name

    def free_array(self, path: str) -> str:
        """A name for a new field's array; one that moved to plain storage may have taken the first choice."""
        return self._catalogue.free(field_array(path))

    def _committed_pairs(self, clock: str) -> np.ndarray[Any, Any]:
        head = self.session.head
        path = clock_array(clock)
        if head is None or path not in head.arrays:
            return np.empty((0, 2), np.int64)
        return Snapshot(self.storage, head).reader(path).read(0, head.arrays[path][1])

    # -- commits out -----------------------------------------------------------------------------------------------

    def cut(self) -> Cut:
        """Hand all rows to the encoders, and note where everything stands."""
        self._write_table()
        if self._torn:
            self._mend()
        self._leap_over_garbage()
        self.disk_failed = False
        jobs = [job for appender in self._appenders.values() for job in appender.freeze()]
        return Cut(
            self.schema,
            dict(self._clock_rows),
            self._table_rows,
            dict(self.counts),
            self._rows.freeze(),
            dict(self._appenders),
            jobs,
            self._seals,
            dict(self._orphans),
        )

    def _leap_over_garbage(self) -> None:
        for clock in self.schema.clocks:
            arrays = [self.schema.fields[path].array for path in self.schema.on_clock(clock)]
            if any(_wasteful(self._appenders[array].target) for array in arrays if array in self._appenders):
                self._leap_clock(clock)

    def commit(self, cut: Cut, sets: Mapping[str, IntervalSet], extra: Mapping[str, Any]) -> Manifest:
        """Make a cut durable and visible. ``extra`` goes into the manifest as it is.

        Raises ``StorageError`` (nothing was published; call again with a newer cut), ``ConflictError``,
        ``StateError``.
        """
        session, head = self.session, self.session.head
        session.check()
        finish(cut.jobs)
        ends = cut.ends()
        writers = {path: self._settle(cut, path, end) for path, end in list(ends.items())}
        self._flush({writer: ends[path] for path, writer in writers.items()})
        taken = {writer: writer.take_sealed() for writer in writers.values()}
        try:
            # Of the cut, not of now: a first append may open the arrays while this commit is on its way.
            if cut.seals is not None:
                cut.seals.add(self._new_seals(cut, taken))
            self._catalogue.sync()
            clocks = {spec.array: str(spec.clock) for spec in cut.schema.fields.values()}
            opened = {writer.layout.path: (_on(writer.layout, clocks), ends[path]) for path, writer in writers.items()}
            tails = {writer.layout.path: writer.tail(ends[path]) for path, writer in writers.items()}
            if cut.seals is not None:
                opened[SEALS] = cut.seals.layout, cut.seals.rows
            elif head is not None:
                opened, tails = dict(head.arrays), dict(head.tails)
            manifest = Manifest(
                commit=Commit(
                    session.next_number(),
                    uuid.uuid4().hex,
                    head.commit.uuid if head else "",
                    session.clock(),
                    session.uuid,
                    f"trajstore {__version__}",
                ),
                schema=cut.schema,
                arrays=opened,
                names=self._catalogue.names,
                tails={path: tail for path, tail in tails.items() if tail is not None},
                seals=cut.seals.shards if cut.seals else (head.seals if head else ()),
                sets=self._sets.store({**sets, "rows": cut.rows}),
                counts=cut.counts,
                **extra,
            )
            session.publish(manifest)
        except BaseException:
            for writer, sealed in taken.items():
                writer.give_back(sealed)
            raise
        for path in cut.orphans:
            self._orphans.pop(path, None)
        self._sets.forget()
        return manifest

    def _new_seals(self, cut: Cut, taken: Mapping[ArrayWriter, list[Shard]]) -> list[tuple[int, Shard]]:
        place = {name: i for i, name in enumerate(self._catalogue.names)}
        new = [(place[path], tail) for path, tail in cut.orphans.items()]
        return new + [(place[writer.layout.path], shard) for writer, sealed in taken.items() for shard in sealed]

    def _flush(self, ends: Mapping[ArrayWriter, int]) -> None:
        futures = [self._disk.submit(writer.flush, end) for writer, end in ends.items()]
        wait(futures)
        for future in futures:
            future.result()

    # -- figures ---------------------------------------------------------------------------------------------------

    def _writers(self) -> list[ArrayWriter]:
        return [appender.target for appender in list(self._appenders.values())]

    def rewritten_bytes(self) -> int:
        """Bytes that a commit now would copy from the last shards."""
        return sum(sum(writer.tail_bytes) for writer in self._writers())

    def new_bytes(self, raw: int) -> float:
        """An estimate of the compressed bytes that ``raw`` new bytes make."""
        frames = sum(writer.frame_bytes for writer in self._writers())
        taken = sum(appender.taken_bytes for appender in list(self._appenders.values()))
        return raw * (frames / taken if frames and taken else 1.0)

    def disk_figures(self) -> dict[str, float]:
        writers = self._writers()
        return {
            "frame_bytes": sum(writer.frame_bytes for writer in writers),
            "written_bytes": sum(writer.written_bytes for writer in writers),
            "copied_bytes": sum(writer.copied_bytes for writer in writers),
        }

    # -- misfits ---------------------------------------------------------------------------------------------------

    def _plain_writer(self, path: str) -> ArrayWriter:
        """A new array for a field whose packing does not fit any more."""
        spec = self.schema.fields[path]
        plain = replace(spec, rule=Rule(), array=self._catalogue.free(spec.array))
        layout = field_layout(plain, self._codec)
        # Runs of rows are handed over in whole chunks of the packed array, and must be whole chunks here too.
        packed = self._appenders[spec.array].target.layout
        return self._array_writer(replace(layout, chunk_rows=min(layout.chunk_rows, packed.chunk_rows)))

    def _settle(self, cut: Cut, array: str, end: int) -> ArrayWriter:
        """The writer that holds an array's rows; after a misfit, when they have all been moved to the new one."""
        appender = cut.appenders[array]
        target, replaced = appender.settled()
        if replaced is None:
            return target
        path = next(path for path, spec in cut.schema.fields.items() if spec.array == array)
        with self._lock:
            # Rows after the cut may have been packed too: none may come meanwhile, and all must have been encoded.
            finish(appender.freeze())
            replaced.flush(appender.row)
            unpack(replaced, target, cut.schema.fields[path], appender.row)
            appender.replaced = None
            self._appenders[target.layout.path] = self._appenders.pop(array)
            self.schema = _moved(self.schema, path, target.layout.path)
        self._orphans.pop(array, None)
        cut.orphans.pop(array, None)
        cut.schema = _moved(cut.schema, path, target.layout.path)
        return target


def _moved(schema: Schema, path: str, array: str) -> Schema:
    fields = {**schema.fields, path: replace(schema.fields[path], rule=Rule(), array=array)}
    return replace(schema, fields=fields)


def _on(layout: ArrayLayout, clocks: Mapping[str, str]) -> ArrayLayout:
    """A layout whose time axis is named after the clock that its field goes by now; a split gave it another."""
    clock = clocks.get(layout.path, layout.dimension)
    return layout if clock == layout.dimension else replace(layout, dimension=clock)


def _wasteful(writer: ArrayWriter) -> bool:
    live, dead = writer.tail_bytes
    return dead > max(_DEAD_FACTOR * live, _DEAD_BYTES)


def _aligned(row: int, writers: list[ArrayWriter]) -> int:
    """The first row at or after ``row`` at which every one of these arrays begins a shard."""
    widest = max(writer.layout.shard_rows for writer in writers)
    return -(-row // widest) * widest


def _rows_on(head: Manifest, clock: str) -> int:
    return max((head.arrays[head.schema.fields[path].array][1] for path in head.schema.on_clock(clock)), default=0)
