"""The admission of trajectories: checked, numbered, none of them twice; singly, many at once, or from a device."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from trajstore.engine import device
from trajstore.engine.batch import Batch
from trajstore.engine.committer import Committer
from trajstore.engine.ingest import Ingest
from trajstore.engine.intake import AbsentField, Checker, LateField, extend, flatten, infer
from trajstore.engine.ledger import Ledger
from trajstore.engine.mutex import Mutex
from trajstore.engine.staging import Staging
from trajstore.errors import NotFoundError, QueueFullError, SchemaError, StateError
from trajstore.format.schema import MAIN_CLOCK, Clock, Schema

Ints = np.ndarray[Any, np.dtype[np.int64]]

_SEED_STOP = 2**63 - 1


class Admission:
    """Turns what a writer is given into rows, and marks the seeds that these complete.

    Parameters
    ----------
    declared : fields, clocks and columns that the caller has declared.
    lock : the writer's; it is taken here.
    patient : whether to wait for room in the queue, or to raise ``QueueFullError``.

    Attributes
    ----------
    closed : nothing more is taken; set under the lock.
    """

    def __init__(
        self, ingest: Ingest, ledger: Ledger, committer: Committer, lock: Mutex, declared: Schema, *, patient: bool
    ) -> None:
        self.closed = False
        self._ingest, self._ledger, self._committer = ingest, ledger, committer
        self._lock = lock
        self._order = threading.Lock()  # of appends, once some are on their way from a device; taken before the other
        self._staging: Staging | None = None
        self._reserved = -1  # the last id given to a trajectory on its way
        self._declared = declared
        self._patient = patient
        self._place = ingest.storage.describe()
        self._checker: Checker | None = None
        if ingest.schema.columns:  # a store that nothing was appended to has none, and learns them
            self._grow(extend(ingest.schema, declared, self._place))

    def check(self) -> None:
        """Raise ``StateError`` if nothing more is taken: a caller under the lock would be told that it was."""
        if self.closed:
            raise StateError(f"the writer of {self._place} is closed")

    @property
    def stalled(self) -> float:
        """Seconds for which callers have waited for copies from a device."""
        return self._staging.stalled if self._staging else 0.0

    # -- one at a time ---------------------------------------------------------------------------------------------

    def append(self, trajectory: Mapping[str, Any], columns: Mapping[str, Any]) -> int | None:
        """Take one trajectory; its id, or ``None`` for one that is there already."""
        with self._lock:
            if self._checker is None or not (self._staging or device.holds(trajectory)):
                return self._append(trajectory, columns)
        return self._stage(trajectory, columns)

    def _append(self, trajectory: Mapping[str, Any], columns: Mapping[str, Any]) -> int | None:
        self.check()
        checker = self._checker or self._learn(trajectory, columns)
        flat = flatten(trajectory, columns, checker.schema)
        try:
            arrays, lengths, values = checker.rows(flat)
        except AbsentField as absent:
            self._split(absent.path)
            return self._append(trajectory, columns)
        except LateField as late:
            self._add_late(late.paths, flat)
            return self._append(trajectory, columns)
        seed = self._seed_of(flat)
        if self._ledger.unique is not None and seed is not None and seed in self._ledger.progress.completed:
            return None
        return self._admit(checker.nbytes(lengths), seed, self._ingest.append, arrays, lengths, values)

    def _admit(self, nbytes: int, seeds: Any, take: Callable[..., int], *rows: Any) -> int:
        """Hand rows to the ingest and mark their seeds, an int or an array of them; the first id."""
        budget = self._ingest.budget
        if not self._patient and not budget.has_room(nbytes):
            raise QueueFullError(
                f"{budget.used} bytes wait for the encoders, and {nbytes} more do not fit",
                hint="append it again later, or raise queue_bytes",
            )
        counts = self._ingest.counts
        if seeds is not None:
            self._ledger.owe(seeds, counts["next_id"])
        try:
            first = take(*rows)
        finally:
            if seeds is not None:
                self._ledger.settle(counts["next_id"])
        self._committer.took(nbytes)
        return first

    def _seed_of(self, flat: Mapping[str, Any]) -> int | None:
        """The seed that a trajectory completes: the unique column's value, or that of one called ``seed``.

        A negative value stands for none. Raises ``SchemaError`` before anything is stored.
        """
        unique = self._ledger.unique
        value = flat.get(unique or "seed")
        if not isinstance(value, int) and getattr(value, "shape", None) == ():
            value = value.item()  # type: ignore[union-attr]  # of NumPy, or a tensor
        if isinstance(value, int) and not isinstance(value, bool):
            _check_seed(unique or "seed", value)
            return value if value >= 0 else None
        if unique is None:
            return None
        what = "is missing" if value is None else f"is {type(value).__name__}"
        raise SchemaError(f"the column {unique!r}, declared unique, {what}", hint="give an integer")

    # -- many at once ----------------------------------------------------------------------------------------------

    def append_many(self, trajectories: Mapping[str, Any], lengths: Any, columns: Mapping[str, Any]) -> Ints:
        """Take trajectories that are given end to end; their ids, -1 for those that are there already."""
        with self._settled():
            self.check()
            known = self._checker.schema if self._checker is not None else self._declared
            batch = Batch(flatten(trajectories, {}, known), lengths, columns)
            if not batch.count:
                return np.empty(0, np.int64)
            if self._checker is None:
                schema = batch.infer(self._declared)
                batch.rows(schema)
                self._grow(schema)
            return self._append_many(batch)

    def _append_many(self, batch: Batch) -> Ints:
        schema = self._ingest.schema
        arrays, lengths, values = batch.rows(schema)
        seeds = self._seeds_of(batch)
        numbers = np.full(batch.count, -1, np.int64)
        kept = np.arange(batch.count)
        if self._ledger.unique is not None and seeds is not None:
            again = np.ones(batch.count, np.bool_)
            again[np.unique(seeds, return_index=True)[1]] = False
            again |= self._ledger.progress.completed.freeze().contains(seeds)
            again &= seeds >= 0
            kept = np.flatnonzero(~again)
            if not len(kept):
                return numbers
            if len(kept) < batch.count:
                batch = batch.without(schema, again)
                arrays, lengths, values = batch.rows(schema)
                seeds = seeds[kept]
        nbytes = sum(rows.nbytes for rows in arrays if rows is not None)
        new = None if seeds is None else seeds[seeds >= 0]
        first = self._admit(nbytes, new, self._ingest.append_many, arrays, lengths, values, batch.count)
        numbers[kept] = np.arange(first, first + batch.count)
        return numbers

    def _seeds_of(self, batch: Batch) -> Ints | None:
        """The same of a batch: (count,), or ``None`` where it has no such column."""
        unique = self._ledger.unique
        seeds = batch.columns.get(unique or "seed")
        if seeds is not None and seeds.dtype.kind in "iu":
            _check_seed(unique or "seed", int(seeds.max()))
            return seeds
        if unique is None:
            return None
        what = "is missing" if seeds is None else f"is {seeds.dtype}"
        raise SchemaError(f"the column {unique!r}, declared unique, {what}", hint="give integers")

    # -- from a device ---------------------------------------------------------------------------------------------

    def _stage(self, trajectory: Mapping[str, Any], columns: Mapping[str, Any]) -> int | None:
        """Append a trajectory of device tensors without waiting for them, or another one behind those."""
        with self._order:
            if device.holds(trajectory):
                staging = self._open_staging()
                try:
                    with self._lock:
                        found = self._reserve(staging, trajectory, columns)
                    if found is None:
                        return None
                    number, flat, seed = found
                    staging.put({path: _owned(value) for path, value in flat.items()}, {}, seed)
                    self._reserved = number
                    return number
                except (AbsentField, LateField):
                    pass  # the schema is about to change: wait for the values, this once
            if self._staging is not None:
                self._staging.flush()
            with self._lock:
                return self._append(trajectory, columns)

    def _open_staging(self) -> Staging:
        if self._staging is None:
            self._staging = Staging(self._append_staged, self._ingest.budget.limit)
            self._committer.attach(self._staging)
        return self._staging

    def _reserve(
        self, staging: Staging, trajectory: Mapping[str, Any], columns: Mapping[str, Any]
    ) -> tuple[int, dict[str, Any], int | None] | None:
        """Check a trajectory by shapes and dtypes alone; its id, its values by path, and its seed."""
        self.check()
        checker = self._checker
        assert checker is not None
        flat = flatten(trajectory, columns, checker.schema)
        _, lengths, _ = checker.rows(
            {path: device.stand_in(value) if device.on_device(value) else value for path, value in flat.items()}
        )
        seed = None if self._ledger.unique is None else self._seed_of(flat)
        if seed is not None and (seed in self._ledger.progress.completed or seed in staging.keys):
            return None
        if not self._patient and not staging.has_room(checker.nbytes(lengths)):
            raise QueueFullError("the copies from the device are behind", hint="append it again later")
        return max(self._ingest.counts["next_id"], self._reserved + 1), flat, seed

    def _append_staged(self, trajectory: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
        with self._lock:
            self._append(trajectory, columns)

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """The writer's lock, once nothing is on its way from a device."""
        if self._staging is None:
            with self._lock:
                yield
            return
        with self._order:
            self._staging.flush()
            with self._lock:
                yield

    # -- the schema ------------------------------------------------------------------------------------------------

    def _grow(self, schema: Schema) -> Checker:
        if schema != self._ingest.schema:
            self._ingest.declare(schema)
        self._checker = Checker(schema)
        return self._checker

    def _learn(self, trajectory: Mapping[str, Any], columns: Mapping[str, Any]) -> Checker:
        """Take what the first trajectory shows into the schema."""
        flat = flatten(trajectory, columns, self._declared)
        schema = infer(flat, set(columns), self._declared)
        Checker(schema).rows({name: flat.get(name) for name in [*schema.fields, *flat]})
        return self._grow(schema)

    def _add_late(self, paths: list[str], flat: Mapping[str, Any]) -> None:
        """Fields that no trajectory had so far get their arrays, each on a clock of its own."""
        schema = self._ingest.schema
        for path in paths:
            declared = {path: self._declared.fields[path]} if path in self._declared.fields else {}
            found = infer({path: flat[path]}, {path}, Schema(declared))
            if path in found.columns:
                raise SchemaError(
                    f"column {path!r} was None until now, and a column has a value for every trajectory",
                    hint=f"resume with columns={{{path!r}: Column({found.columns[path].dtype!r}, default=...)}}",
                )
            spec = found.fields[path]
            spec = replace(spec, clock=self._ingest.free_clock(path), array=self._ingest.free_array(path))
            schema = schema.with_field(path, spec, Clock())
        self._grow(schema)

    def declare(self, new: Schema) -> None:
        """Take declarations beyond the present ones. Raises ``SchemaError`` where they contradict what is stored."""
        with self._lock:
            self.check()
            before = self._declared
            if self._checker is not None:
                self._grow(extend(self._ingest.schema, new, self._place))
            else:
                extend(before, replace(new, columns={}), self._place)
            self._declared = Schema(
                {**new.fields, **before.fields}, {**new.clocks, **before.clocks}, {**new.columns, **before.columns}
            )

    def split(self, path: str) -> None:
        """Give a field a clock of its own. Raises ``NotFoundError``."""
        with self._lock:
            self.check()
            if path not in self._ingest.schema.fields:
                raise NotFoundError(f"{self._place} has no field {path!r}")
            self._split(path)

    def _split(self, path: str) -> None:
        with self._committer.paused():
            schema = self._ingest.schema
            clock = str(schema.fields[path].clock)
            if len(schema.on_clock(clock)) > 1:
                self._committer.commit()
                self._ingest.split(path)
                self._checker = Checker(self._ingest.schema)
            elif clock != MAIN_CLOCK:  # it has one already, which is bound to the steps no more
                self._grow(replace(schema, clocks={**schema.clocks, clock: Clock()}))


def _check_seed(name: str, value: int) -> None:
    """Raise ``SchemaError`` for a seed that the sets of seeds cannot hold."""
    if value >= _SEED_STOP:
        raise SchemaError(
            f"column {name!r} is {value}, and seeds lie below 2**63 - 1",
            hint="name the column otherwise",
        )


def _owned(value: Any) -> Any:
    """A value that its caller may change from now on."""
    if device.on_device(value) or isinstance(value, (str, int, float, bool, type(None))):
        return value
    return copy.deepcopy(value.detach() if hasattr(value, "detach") else value)
