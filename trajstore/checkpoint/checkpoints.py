"""Checkpoints of a training run: saved in the background, kept by rule, restored from the newest that is whole."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trajstore.checkpoint.chunks import Pool
from trajstore.checkpoint.folder import read_rules
from trajstore.checkpoint.reading import Reader, verify_checkpoint
from trajstore.checkpoint.restoring import check_into, fillable, put_into
from trajstore.checkpoint.retention import Best, Retention
from trajstore.checkpoint.rng import set_rng_state
from trajstore.checkpoint.saver import Branch, Options, Saver
from trajstore.checkpoint.shelf import HISTORY, Checkpoint, Shelf
from trajstore.errors import (
    CorruptionError,
    FormatError,
    NotFoundError,
    SchemaError,
    StateError,
    TrajstoreError,
)
from trajstore.media.history import History
from trajstore.media.storage import LocalStorage, Storage
from trajstore.versions import version_hint

Which = int | str | None
List = list  # the class has a method of that name


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint that does not verify was stepped over."""


@dataclass(frozen=True)
class Restored:
    """What :meth:`Checkpoints.restore` found: the checkpoint, and its whole state as it was saved."""

    checkpoint: Checkpoint
    state: Any

    @property
    def step(self) -> int:
        return self.checkpoint.step

    @property
    def metrics(self) -> dict[str, Any]:
        return self.checkpoint.metrics

    @property
    def meta(self) -> dict[str, Any]:
        return self.checkpoint.meta


class Checkpoints:
    """A folder of checkpoints that one process writes and any number reads.

    Parameters
    ----------
    path : the folder, made if it is not there (or a storage).
    keep_last : the newest so many stay; ``None`` for no such rule.
    keep_best : (metric, ``"max"`` or ``"min"``, n), or several: the n best by a metric stay. Nested metrics are
        ``"eval/return"``. NaN is worse than any number.
    keep_every : the first checkpoint at or after each multiple of so many steps stays.
    milestone : what a checkpoint that only ``keep_every`` keeps retains: ``"full"``, or one section (``"model"``),
        or several.
    on_busy : when both arenas are taken, ``"wait"`` for one or ``"skip"`` the save (counted in :attr:`stats`).
    on_signal : at SIGTERM and SIGINT ``"drain"`` (finish what was given to :meth:`save`, mark the newest interrupted,
        then let the process end as it would), ``"flag"`` (only set :attr:`interrupted`, for a loop that wants to save
        once more; a second signal drains), or ``"ignore"``.
    rng : save the states of the global random number generators with each checkpoint.
    link : write a chunk that did not change since the checkpoint before as a hard link to it.
    threads : that compress and write; ``None`` for half of the cores, at most 4, so that the loop keeps the others.
    read_only : take no lock and write nothing; many may read while one writes.

    With no rule at all (``keep_last=None``) everything stays. The newest is never deleted.

    Raises
    ------
    LockedError : another process writes here.

    Notes
    -----
    To be used by one thread. A forked child may not use it. A process that is killed leaves its checkpoints as of the
    last one whose save was done; :meth:`wait` says when that is.
    """

    def __init__(
        self,
        path: Any,
        keep_last: int | None = 3,
        keep_best: Best | Sequence[Best] = (),
        keep_every: int | None = None,
        milestone: str | Sequence[str] = "full",
        *,
        on_busy: str = "wait",
        on_signal: str = "drain",
        rng: bool = True,
        link: bool = True,
        threads: int | None = None,
        read_only: bool = False,
    ) -> None:
        if on_busy not in ("wait", "skip"):
            raise SchemaError(f"on_busy is {on_busy!r}", hint='"wait" or "skip"')
        self._rules = Retention(keep_last=keep_last, keep_best=keep_best, keep_every=keep_every)
        sections = (milestone,) if isinstance(milestone, str) else tuple(milestone)
        kept = frozenset() if sections == ("full",) else frozenset(sections)
        self._storage: Storage = path if hasattr(path, "sync_folder") else LocalStorage(path)
        self._shelf = Shelf(self._storage)
        self._history = History(self._storage, HISTORY)
        self._saver: Saver | None = None
        if read_only:
            self._rules = read_rules(self._storage)  # they say what is best
        else:
            threads = max(1, min((os.cpu_count() or 1) // 2, 4) if threads is None else threads)
            options = Options(on_busy, on_signal, rng, link, threads, kept)
            self._saver = Saver(self._shelf, self._history, self._rules, options)

    # --- saving -------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, Any] | None = None,
        meta: Mapping[str, Any] | None = None,
        *,
        final: bool = False,
    ) -> bool:
        """Copy a state and write it in the background.

        Parameters
        ----------
        step : counts what the run counts (environment steps, iterations), from 0.
        state : any nesting of dicts, lists and tuples of tensors, arrays, scalars, strings, bytes, :class:`File`;
            objects with a ``state_dict`` stand for it. The keys of its top level are its sections.
        metrics : numbers by name, may be nested; retention and listings use them.
        meta : JSON-like values to keep with it: a cursor into a replay store, a configuration.
        final : mark it as the run's last.

        Returns
        -------
        bool : ``False`` if it was skipped (``on_busy="skip"``). When it returns the state may change.

        Raises
        ------
        SchemaError : the state holds something that a checkpoint does not; names the path to it.
        StorageError, StateError : an earlier save failed.
        """
        return self._writing().save(step, state, metrics, meta, final)

    def prepare(self, state: Any) -> None:
        """Make the arenas for states like this one, so that the first saves need not."""
        self._writing().prepare(state)

    def stage_lazily(self, *optimizers: Any) -> None:
        """Copy what these torch optimizers own after :meth:`save` returns, while the loop goes on.

        Their parameters and states change in ``step()`` alone, so a hook before it waits for the copy; all else is
        copied at once as before. A tensor that something else changes in between is noticed: that save then fails.
        """
        self._writing().stage_lazily(*optimizers)

    def wait(self) -> None:
        """Until all that was given to :meth:`save` is durable. Raises what went wrong with any of it."""
        if self._saver is not None:
            self._saver.wait()

    @property
    def interrupted(self) -> bool:
        """Whether SIGTERM or SIGINT came (``on_signal="flag"``): time to save and stop."""
        return self._saver is not None and self._saver.interrupted

    @property
    def stats(self) -> dict[str, Any]:
        """Counts and sums over this session; none where nothing can be saved.

        saved, skipped, failed; raw_bytes before compression; stored_bytes written; linked_bytes that were not,
        because nothing had changed; held_seconds that :meth:`save` kept the caller; persist_seconds in the
        background; ``last``: the same of the last save; ``pending``: saves that are not done.
        """
        return self._saver.stats if self._saver is not None else {}

    def close(self) -> None:
        """Finish what was given to :meth:`save` and let go of the folder. Raises what went wrong."""
        if self._saver is not None:
            self._saver.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except TrajstoreError:
            if error is None:
                raise
            # The error that is on its way tells more than this one.

    def _writing(self) -> Saver:
        if self._saver is None:
            raise StateError("these checkpoints were opened read_only", hint="open them without it to save")
        return self._saver

    # --- reading ------------------------------------------------------------------------------

    def list(self) -> List[Checkpoint]:
        """All checkpoints, in the order of saving."""
        return self._shelf.checkpoints()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, or ``None``."""
        found = self._shelf.checkpoints()
        return found[-1] if found else None

    def best(self, metric: str | None = None, mode: str = "max") -> Checkpoint | None:
        """The best checkpoint by a metric (by the first ``keep_best`` rule if none is named), or ``None``."""
        try:
            return self._shelf.find("best", self._best_rule(metric, mode))
        except NotFoundError:
            return None

    def history(self, *, abandoned: bool = False) -> List[dict[str, Any]]:
        """``[{"step", "time", "metrics"}]`` of all saves of this run, also of checkpoints that are gone.

        Steps that a resume at an older step abandoned are left out unless ``abandoned``.
        """
        return self._history.read(abandoned=abandoned)

    def restore(
        self,
        into: Any = None,
        step: Which = None,
        *,
        rng: bool = True,
        abandoned: str = "keep",
        best: tuple[str, str] | None = None,
    ) -> Restored:
        """Load a checkpoint, and put it into what is given.

        Parameters
        ----------
        into : like the state that was saved, or some of its keys: modules and optimizers (``load_state_dict``),
            tensors and arrays (changed in place), containers of those. Nothing of it is touched before the whole
            checkpoint is read and verified, and found to fit. ``None``: only return the state.
        step : a step, a checkpoint's name, ``"best"``, or ``None`` for the newest that verifies: damaged ones are
            stepped over with a warning.
        rng : with ``into``, also set the global random number generators as they were.
        abandoned : what becomes of checkpoints newer than the one restored, once the next save is done: ``"keep"``
            (they stay, subject to the rules) or ``"prune"``.
        best : (metric, mode) for ``step="best"``; by default the first ``keep_best`` rule's.

        Raises
        ------
        NotFoundError : there is no such checkpoint, or it lacks a key of ``into``.
        CorruptionError : the one asked for is damaged, or all are.
        StateError : something in ``into`` did not take its part; names the library versions of then and now.
        """
        if abandoned not in ("keep", "prune"):
            raise SchemaError(f"abandoned is {abandoned!r}", hint='"keep" or "prune"')
        if into is not None and not fillable(into):
            raise SchemaError(
                f"a {type(into).__name__} takes no state", hint="into={'model': model, 'optimizer': optimizer, ...}"
            )
        self._settle()
        with _pool() as pool:
            checkpoint, reader, state = self._read(step, into, best, pool)
            generators = reader.rng_state() if rng and into is not None else None
        if into is not None:
            check_into(into, state)
            try:
                put_into(into, state)
            except TrajstoreError:
                raise
            except Exception as error:
                raise StateError(
                    f"{checkpoint.path} does not fit: {error}", hint=version_hint(checkpoint.versions)
                ) from error
            if generators is not None:
                set_rng_state(generators)
        if self._saver is not None:
            record = self._shelf.record(checkpoint.name)
            self._saver.go_on_from(Branch(checkpoint.step, record.serial, record.uuid, abandoned == "prune"))
        return Restored(checkpoint, state)

    def load(self, step: Which, section: str | Sequence[Any] = (), *, best: tuple[str, str] | None = None) -> Any:
        """A part of a checkpoint: a section, or deeper (``"model/conv.weight"``, ``("optimizer", "state", 0)``).

        Reads no more than the chunks that it lies in. ``step`` as in :meth:`restore`.
        """
        self._settle()
        path = section.split("/") if isinstance(section, str) else list(section)
        checkpoint = self._shelf.find("latest" if step is None else step, self._best_rule(None, "max", best))
        with _pool() as pool:
            return self._reader(checkpoint.name, pool).part(path)

    def verify(self, step: Which = None) -> List[tuple[Checkpoint | str, str]]:
        """Check every byte of one checkpoint, or of all.

        Returns ``[(checkpoint, what is wrong)]``, empty if all is well; a checkpoint whose record cannot be read is
        given by name.
        """
        self._settle()
        names = self._shelf.names() if step is None else [self._shelf.find(step, self._best_rule(None, "max")).name]
        marks, problems = self._shelf.marks(), []
        with _pool() as pool:
            for name in sorted(names):
                who: Checkpoint | str = name
                try:
                    record = self._shelf.record(name)
                    who = self._shelf.describe(name, record, marks.get(name, {}))
                    verify_checkpoint(self._storage.child(name), record, pool)
                except TrajstoreError as error:
                    problems.append((who, str(error)))
        return problems

    def _read(self, step: Which, into: Any, best: tuple[str, str] | None, pool: Pool) -> tuple[Checkpoint, Reader, Any]:
        if step is not None:
            checkpoint = self._shelf.find(step, self._best_rule(None, "max", best))
            reader = self._reader(checkpoint.name, pool)
            return checkpoint, reader, reader.state()
        tried = []
        for name in self._shelf.newest_first():
            try:
                record = self._shelf.record(name)
                if record.stripped and into is not None:
                    continue  # a milestone cannot be trained on
                reader = self._reader(name, pool)
                state = reader.state()
            except (CorruptionError, FormatError, NotFoundError) as error:
                tried.append(name)
                warnings.warn(f"stepping over {name}: {error}", DamagedCheckpointWarning, stacklevel=3)
                continue
            return self._shelf.describe(name, record, self._shelf.mark(name)), reader, state
        if tried:
            raise CorruptionError(f"none of the {len(tried)} checkpoints in {self._storage.describe()} verifies")
        raise NotFoundError(f"there is no checkpoint in {self._storage.describe()}")

    def _settle(self) -> None:
        if self._saver is not None and not self._saver.closed:
            self._saver.wait()

    def _reader(self, name: str, pool: Pool) -> Reader:
        return Reader(self._storage.child(name), self._shelf.record(name), pool)

    def _best_rule(self, metric: str | None, mode: str, given: tuple[str, str] | None = None) -> tuple[str, str] | None:
        if given is not None:
            return given
        if metric is not None:
            return metric, mode
        rules = self._rules.best_rules
        return (rules[0][0], rules[0][1]) if rules else None


@contextmanager
def _pool() -> Iterator[Pool]:
    """Threads for reading: nothing else runs meanwhile, so there are as many as cores."""
    pool = Pool(min(os.cpu_count() or 1, 8))
    try:
        yield pool
    finally:
        pool.close()
