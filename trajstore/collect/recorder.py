"""The step recorder: one call for each step of many environments; episodes are split and stored in the background."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np

from trajstore.collect.background import Background
from trajstore.collect.ring import Ring, leaves
from trajstore.collect.splitter import ACTIVE, COLUMN, FINAL, FRESH
from trajstore.engine import device
from trajstore.engine.intake import as_array
from trajstore.errors import SchemaError, TrajstoreError
from trajstore.format.schema import ID, MAIN_CLOCK, Clock, check_path, unknown
from trajstore.writer import Writer

Array = np.ndarray[Any, Any]

AUTORESET = ("next_step", "same_step", "disabled")
_RING_BYTES = 64 << 20


class Recorder:
    """Records the steps of ``num_envs`` environments and appends each episode to a writer when it ends.

    Parameters
    ----------
    autoreset : what the environments do after an episode's last step, as Gymnasium names it. ``"next_step"``: the
        next step resets, and is part of no episode. ``"same_step"``: the next step is the next episode's first.
        ``"disabled"``: the same, once the caller has reset the environment.
    observations : ``"T"``: one for each step, the one its action was chosen on. ``"T+1"``: also the one after the
        last step.
    boundary : the fields that are observations, with all that lies inside them.
    flags : ``"columns"``: ``terminated`` and ``truncated`` are one value for each trajectory. ``"fields"``: one for
        each step.
    on_close : what becomes of episodes that have not ended: ``"truncate"`` keeps, ``"drop"`` forgets them.
    memory_bytes : bound of the rows held in memory, the ring included. Unfinished episodes beyond it wait in the
        store's scratch folder.

    Raises
    ------
    SchemaError
        A step does not fit the first one, or what the store holds; it is not recorded.
    StorageError
        The disk refused a commit, or scratch, in the background. Nothing is lost: make room, and call
        ``writer.commit()``.
    ConflictError, StateError
        Something failed for good; every later call raises it.

    Notes
    -----
    One thread records. ``step`` copies and returns: it waits only while the ring is full, because the encoders or the
    disk are behind, and nothing is ever dropped. Each trajectory has the column ``env``, the environment's number;
    trajectories are stored in the order in which they ended. ``Writer.commit`` and ``Writer.close`` take in what has
    been recorded before.
    """

    def __init__(
        self,
        writer: Writer,
        num_envs: int,
        *,
        autoreset: str = "same_step",
        observations: str = "T",
        boundary: Sequence[str] = ("obs",),
        flags: str = "columns",
        on_close: str = "truncate",
        memory_bytes: int = 512 << 20,
    ) -> None:
        _check_choice("autoreset", autoreset, AUTORESET)
        _check_choice("observations", observations, ("T", "T+1"))
        _check_choice("flags", flags, ("columns", "fields"))
        _check_choice("on_close", on_close, ("truncate", "drop"))
        if not isinstance(num_envs, (int, np.integer)) or num_envs < 1:
            raise SchemaError(f"{num_envs!r} environments cannot be recorded")
        if not isinstance(memory_bytes, (int, np.integer)):
            raise SchemaError(f"memory_bytes is {memory_bytes!r}", hint="a whole number of bytes")
        self.writer = writer
        self.num_envs = num_envs
        self.autoreset = autoreset
        self._pid = os.getpid()
        self._closed = False
        self._boundary = tuple(boundary) if observations == "T+1" else ()
        writer.attach(self)  # before a thread is started: it may refuse
        ring_bytes = min(memory_bytes // 2, _RING_BYTES)
        self._ring = Ring(num_envs, ring_bytes)
        self._background = Background(
            writer,
            self._ring,
            next_step=autoreset == "next_step",
            boundary=self._boundary,
            flags=flags,
            memory_bytes=memory_bytes - ring_bytes,
            keep_unfinished=on_close == "truncate",
        )
        self._splitter = self._background.splitter
        self._row: dict[str, Any] = {}  # the first step's values, until it is complete
        self._begun: set[str] = set()  # fields that the present step has already
        self._columns: dict[str, Array] = {}
        self._active = np.ones(num_envs, np.bool_)
        self._fresh = np.zeros(num_envs, np.bool_)
        self._any_fresh = False
        self._never = np.zeros(num_envs, np.bool_)

    # -- recording -------------------------------------------------------------------------------------------------

    def put(self, **fields: Any) -> None:
        """Record some fields of the present step before it is complete: the observation and the action, say, before
        the environments overwrite the former. The copies are made when this returns.
        """
        self._background.check()
        self._store(dict(leaves(fields)), whole=False)

    def step(
        self,
        *,
        terminated: Any,
        truncated: Any = None,
        final_obs: Any = None,
        columns: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        """Record one step of every environment.

        Parameters
        ----------
        terminated, truncated : bool (num_envs,), whether the episode ends with this step.
        final_obs : ``"T+1"`` where the observation after an episode's last step is in no later step (``"same_step"``,
            ``"disabled"``): (num_envs, …) or a dict of such, of which only the rows that end are read.
        columns : values (num_envs,) for the trajectories, kept until they are set again; a trajectory has those of
            its last step.
        fields : (num_envs, …) arrays, tensors or dicts of them, the same in every step. ``obs`` is what the action
            was chosen on.
        """
        self._background.check()
        if columns:
            self.set(**columns)
        values = dict(leaves(fields))
        values["terminated"] = terminated
        values["truncated"] = self._never if truncated is None else truncated
        self._flags(values)
        if self._boundary and self.autoreset != "next_step":
            self._give(final_obs, values)
        values[ACTIVE], values[FRESH] = self._active, self._fresh
        for name, column in self._columns.items():
            values[COLUMN + name] = column
        self._store(values, whole=True)
        self._advance()

    def steps(self, *, terminated: Any, truncated: Any = None, **fields: Any) -> None:
        """Record several steps at once: every value has the steps first, (steps, num_envs, …)."""
        values = dict(leaves(fields))
        for t in range(len(terminated)):
            self.step(
                terminated=terminated[t],
                truncated=None if truncated is None else truncated[t],
                **{path: value[t] for path, value in values.items()},
            )

    def set(self, envs: Any = None, /, **columns: Any) -> None:
        """Set columns of the trajectories under way, or, between episodes, of the next: all, or those of ``envs``.

        ``envs`` : a mask or indices. Every column must be set before the first step.
        """
        chosen = slice(None) if envs is None else self._numbers(envs)
        for name, value in columns.items():
            values = _on_host(f"column {name!r}", value)
            if values.dtype.kind not in "biuf":
                raise SchemaError(f"column {name!r} holds numbers or bools, not {type(value).__name__}")
            column = self._columns.get(name)
            if column is None:
                if self._head:
                    raise SchemaError(f"column {name!r} was not set before the first step", hint="set it there")
                dtype = np.dtype(np.int64) if isinstance(value, int) and not isinstance(value, bool) else values.dtype
                column = self._columns[name] = np.zeros(self.num_envs, dtype)
            if values.shape not in ((), column[chosen].shape):
                raise SchemaError(f"column {name!r} has the shape {values.shape}, expected {column[chosen].shape}")
            if values.dtype.kind != column.dtype.kind:
                with np.errstate(invalid="ignore"):
                    same = bool((values.astype(column.dtype) == values).all())
                if not same:
                    raise SchemaError(
                        f"column {name!r} was {column.dtype} when it was first set, which cannot hold {value!r:.60}",
                        hint="set it to floats from the beginning, or to NaN",
                    )
            column[chosen] = values

    def _numbers(self, envs: Any) -> Array:
        """The numbers of the environments that a mask or indices choose."""
        try:
            numbers: Array = np.arange(self.num_envs)[_on_host("the choice of environments", envs)]
            return numbers
        except IndexError:
            raise SchemaError(
                f"{envs!r:.60} chooses no environments of the {self.num_envs} there are",
                hint=f"a bool mask ({self.num_envs},), or numbers from 0 to {self.num_envs - 1}",
            ) from None

    def reset(self, envs: Any = None, *, final_obs: Any = None) -> None:
        """The next step begins an episode in all environments, or in ``envs``; one under way there ends, truncated.

        Its final observation is that of ``final_obs``, (num_envs, …), or what was ``put`` in this step already, if
        that did not come from a device. Without one the episode ends a step earlier.
        """
        chosen = slice(None) if envs is None else self._numbers(envs)
        if self._head and self._boundary:
            numbers = np.unique(np.arange(self.num_envs)[chosen])
            rows = self._put_rows(numbers) if final_obs is None else self._given_rows(final_obs, numbers)
            if rows:
                self._splitter.give(self._head - 1, numbers, rows)
        self._fresh[chosen] = True
        self._any_fresh = True

    def _put_rows(self, numbers: Array) -> dict[str, Array]:
        """The observations that were put in this step already, of some environments."""
        at = self._head % self._ring.steps
        slots = [self._ring.slots[path] for path in self._begun if self._splitter.has_boundary(path)]
        if any(slot.tensor is not None for slot in slots):
            return {}  # they are on their way, and those of the next episode follow them to the same place
        return {slot.path: slot.array[at][numbers] for slot in slots}

    def _given_rows(self, final_obs: Any, numbers: Array) -> dict[str, Array]:
        """Final observations of some environments; what comes from a device is there when the step is taken out."""
        rows, sources, targets = {}, [], []
        backend = self._ring.backend
        for path, value in self._boundary_values(final_obs).items():
            if backend is None or not device.on_device(value):
                rows[path] = as_array(path, value)[numbers]
                continue
            sources.append(value[numbers.tolist()])
            targets.append(backend.pinned(tuple(sources[-1].shape), value.dtype))
            rows[path] = device.host_view(targets[-1])
        if backend is not None and sources:
            self._background.transfers.append((self._head, device.Transfer(backend, sources, targets)))
        return rows

    def give(self, envs: Any, **fields: Any) -> None:
        """Give the final observations of those environments whose episode ends with the present step.

        ``envs`` : indices, ascending. ``fields`` : (len(envs), …), or dicts of such. For those who have them one by
        one; the others pass ``final_obs`` to ``step``.
        """
        self._background.check()
        rows = {path: np.array(as_array(path, value)) for path, value in leaves(fields)}
        self._splitter.give(self._head, np.asarray(envs), rows)

    def stop(self, envs: Any) -> None:
        """Record nothing more of some environments; an episode under way there ends, truncated."""
        self._active[self._numbers(envs)] = False

    def start(self, envs: Any) -> None:
        """Record environments again that were stopped; their next step begins an episode."""
        self._active[self._numbers(envs)] = True

    def _flags(self, values: dict[str, Any]) -> None:
        for name in ("terminated", "truncated"):
            value = values[name]
            if device.on_device(value):
                values[name] = value.bool()
            elif type(value) is not np.ndarray or value.dtype != np.bool_:
                array = as_array(name, value)
                values[name] = array if array.dtype == np.bool_ else array != 0
            if not self._ring.steps and tuple(values[name].shape) != (self.num_envs,):  # later ones are as the first
                raise SchemaError(
                    f"{name!r} has the shape {tuple(values[name].shape)}, expected ({self.num_envs},): one each env",
                    hint="flags (num_envs, 1) are given as flags[:, 0]",
                )

    def _give(self, final_obs: Any, values: dict[str, Any]) -> None:
        """Keep the final observations of the environments that end; a device's are not looked at, but sent along."""
        if final_obs is None:
            flags = [values["terminated"], values["truncated"]]
            if self._head not in self._splitter.given and any(not device.on_device(f) and f.any() for f in flags):
                raise SchemaError(
                    "an episode ends and final_obs is not given",
                    hint="give it with the step, or record observations='T'",
                )
            return
        found = self._boundary_values(final_obs)
        for path, value in found.items():
            slot = self._ring.slots.get(path)
            given: Any = values.get(path, self._row.get(path)) if slot is None else None
            shape = tuple(np.shape(given)) if slot is None else slot.row_shape
            if tuple(np.shape(value)) != shape:
                raise SchemaError(
                    f"final_obs has the shape {tuple(np.shape(value))}, and field {path!r} has {shape}",
                    hint="it has a row for each env; those that do not end are not read",
                )
        terminated, truncated = values["terminated"], values["truncated"]
        if any(device.on_device(value) for value in (terminated, truncated, *found.values())):
            values.update((f"{FINAL}{path}", value) for path, value in found.items())
            return
        envs = np.flatnonzero(terminated | truncated)
        if len(envs):
            rows = {path: as_array(path, value).take(envs, axis=0) for path, value in found.items()}
            self._splitter.give(self._head, envs, rows)

    def _boundary_values(self, final_obs: Any) -> dict[str, Any]:
        """Final observations by path: of the one boundary field, or a dict by the names of several."""
        return dict(leaves(final_obs if len(self._boundary) > 1 else {self._boundary[0]: final_obs}))

    def _store(self, values: Mapping[str, Any], *, whole: bool) -> None:
        """Copy values to the present row of the ring."""
        ring = self._ring
        if not ring.steps:
            self._row.update((path, _own(value)) for path, value in values.items())
            if not whole:
                return
            values, self._row = self._row, {}
            self._open(values)
        else:
            self._background.wait_for_room()
        known = len(self._begun - values.keys()) if whole else None
        transfer = ring.put(self._head, values, known)
        if transfer is not None:
            self._background.transfers.append((self._head, transfer))
        if not whole:
            self._begun.update(values)

    def _open(self, values: Mapping[str, Any]) -> None:
        """Take the fields from the first step; say now, not in the background, what the store cannot take."""
        stored = self.writer.schema.fields
        for path in values:
            if not path.startswith((ACTIVE, FRESH, COLUMN, FINAL)):
                check_path(path, "field")
        self._ring.open(values, stored)
        fields = {path: self._ring.slots[path].spec for path in self._splitter.fields()}
        try:
            for name in self._boundary:
                if not any(path == name or path.startswith(f"{name}/") for path in fields):
                    raise SchemaError(
                        f"there is no field {name!r} to have an observation after the last step",
                        hint="name the observations: Recorder(..., boundary=('state', 'image'))",
                    )
            if stored:
                self._check_names("field", fields, stored, [*stored])
                columns = self.writer.schema.columns
                required = [name for name, column in columns.items() if name != ID and column.default is None]
                self._check_names("column", self._splitter.columns(), columns, required)
                return
            clocks = {MAIN_CLOCK: Clock("main")}
            if self._boundary:
                clocks[self._boundary[0].replace("/", ".")] = Clock("last_row_extra")
            names = list(clocks)
            self.writer.declare(
                fields={
                    path: replace(spec, clock=names[-1] if self._splitter.has_boundary(path) else MAIN_CLOCK)
                    for path, spec in fields.items()
                },
                clocks=clocks,
            )
        except BaseException:
            self._ring.close()
            raise

    def _check_names(self, what: str, given: Iterable[str], known: Iterable[str], required: Iterable[str]) -> None:
        for name in given:
            if name not in known:
                raise unknown(name, known, what)
        for name in required:
            if name not in given:
                raise SchemaError(f"{what} {name!r} is missing", hint=f"{self.writer.path} has it")

    def _advance(self) -> None:
        self._begun.clear()
        if self._any_fresh:
            self._fresh[...] = False
            self._any_fresh = False
        self._background.advance()

    # -- the end ---------------------------------------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> bool:
        """Hand every episode that has ended to the writer; False if that took longer than ``timeout`` seconds.

        Not durable before the writer's next commit. No lock is taken: a signal's thread may call this.
        """
        return self._background.flush(timeout)

    def close(self, final_obs: Any = None) -> None:
        """Store what has been recorded, unfinished episodes as ``on_close`` says. The writer stays open.

        Parameters
        ----------
        final_obs : ``"T+1"``: the observations after the last step, (num_envs, …), unless they were ``put`` already.
            Without them each episode that needs one ends a step earlier, as truncated.

        Raises what failed in the background.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        try:
            if self._boundary and self._ring.steps and not self._background.failed:
                self._put_final_row(final_obs)
        finally:
            self._background.close()
            self.writer.detach(self)
        if self._background.failed:
            self._background.refuse()

    def abandon(self) -> None:
        """Drop what the writer has not been given yet."""
        self._closed = True
        self._background.close(abandon=True)
        self.writer.detach(self)

    def _put_final_row(self, final_obs: Any) -> None:
        values = {} if final_obs is None else self._boundary_values(final_obs)
        wanted = {path for path in self._ring.slots if self._splitter.has_boundary(path)}
        if not wanted <= values.keys() | self._begun:
            return
        none = np.zeros(self.num_envs, np.bool_)
        values |= {"terminated": none, "truncated": none, ACTIVE: none, FRESH: none}
        self._store(values, whole=False)
        self._background.advance_to_end()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except TrajstoreError:
            if error is None:  # the error that ended the block matters more
                raise

    @property
    def stats(self) -> dict[str, float]:
        """Figures of this recorder: steps and trajectories, bytes held and spilled, seconds that ``step`` waited."""
        background, splitter = self._background, self._splitter
        return {
            "steps": background.head - background.final_row,
            "trajectories": splitter.trajectories,
            "stored_steps": splitter.stored_steps,
            "queued_steps": background.head - background.done,
            "ring_bytes": self._ring.nbytes,
            "stall_seconds": background.stalled,
            **splitter.remains.figures,
        }

    def __repr__(self) -> str:
        done = self._splitter.trajectories
        return f"<Recorder of {self.num_envs} environments: {self._head} steps, {done} trajectories>"

    @property
    def _head(self) -> int:
        """Number of the present step."""
        return self._background.head


def _own(value: Any) -> Any:
    """A first step's value, which waits until the step is complete while its owner may change it."""
    if device.on_device(value):
        return value.detach().clone()
    if hasattr(value, "numpy") and hasattr(value, "detach"):
        return value.detach().clone()
    return value.copy() if isinstance(value, np.ndarray) else value


def _on_host(what: str, value: Any) -> Array:
    if device.on_device(value):
        raise SchemaError(
            f"{what} lies in a device's memory, and is needed on the host in this call",
            hint="pass value.cpu(), which waits for the device; what may come later can be recorded as a field",
        )
    return np.asarray(value)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise SchemaError(f"{name} is {value!r}", hint="one of " + ", ".join(choices))
