"""New columns and fields, made from what a store holds, without rewriting the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trajstore.dataset import Dataset, Place, Trajectory
from trajstore.dataset import open as open_dataset
from trajstore.engine.index import spans
from trajstore.errors import AlreadyExistsError, NotFoundError, SchemaError
from trajstore.format.encoding import column_layout, field_layout
from trajstore.format.expression import Expression
from trajstore.format.layout import ArrayLayout, field_array
from trajstore.format.schema import CODED, Column, Field, dtype_name
from trajstore.media.shardfile import write_shard
from trajstore.operations.amendment import Amendment, amending
from trajstore.operations.assembly import make_folder, write_table

Array = np.ndarray[Any, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]

#: Rows (sum of lengths, *shape) of a field for trajectories of a dataset, end to end; see :func:`add_field`.
Compute = Callable[[Dataset, Ints], Array]


def add_column(
    place: Place,
    name: str,
    values: Array | Sequence[Any] | str | Callable[[Trajectory], Any],
    *,
    dtype: str | None = None,
    default: float | int | bool | None = None,
) -> None:
    """Give every trajectory of a store a value in a new column.

    Parameters
    ----------
    values : an expression over the columns, such as ``"length < 100"`` or ``"score / length"``; a function of a
        trajectory; or an array (n,), in the order of the store's trajectories (``trajstore.open(place)``).
    dtype : of the column; by default that of the values.
    default : for trajectories that are appended later without a value; without one, each must give it.

    Raises
    ------
    AlreadyExistsError
        There is a column or field of that name.
    SchemaError
        The values do not fit.
    LockedError
        A writer has the store open.
    """
    with amending(place) as amendment:
        schema = amendment.snapshot.manifest.schema
        _refuse_known(amendment, name)
        live = open_dataset(amendment.storage)
        every = live + live.deleted
        rows = every.locate(np.arange(len(every), dtype=np.int64))[1]
        found = _values(values, live, every)
        if found.dtype.kind not in "biuf":
            raise SchemaError(f"column {name!r} holds numbers or bools, and these values are {found.dtype}")
        column = Column(dtype or dtype_name(found.dtype), default)
        schema = replace(schema, columns={**schema.columns, name: column})
        layout = column_layout(name, column)
        table = np.full(amendment.snapshot.table_rows, layout.fill, layout.dtype)
        table[rows[: len(found)]] = _exactly(f"column {name!r}", found, layout.dtype)
        amendment.storage.remove(layout.path)  # what an attempt before this one left, which no commit names
        amendment.storage.make_folder(layout.path)
        shards = write_table(amendment.storage, layout, table, amendment.disk)()
        amendment.commit(
            schema=schema,
            arrays={layout.path: (layout, len(table))},
            shards=shards,
        )


def _values(values: Any, live: Dataset, every: Dataset) -> Array:
    if isinstance(values, str):
        parsed = Expression(values, values=True)
        parsed.check(list(every.table))
        found = parsed.evaluate({name: every.table[name] for name in parsed.names})
        return np.broadcast_to(np.asarray(found), (len(every),))
    if callable(values):
        return np.array([values(trajectory) for trajectory in every])
    found = np.asarray(values)
    if found.shape != (len(live),):
        raise SchemaError(f"a column of {len(live)} trajectories takes ({len(live)},) values, not {found.shape}")
    return found


def _exactly(what: str, values: Array, dtype: np.dtype[Any]) -> Array:
    """The values in another dtype; floats may be rounded to other floats, and nothing else may change."""
    with np.errstate(invalid="ignore"):
        found = values.astype(dtype)
        rounded = values.dtype.kind in "fc" and dtype.kind in "fc"
        if not rounded and not np.array_equal(found.astype(values.dtype), values):
            raise SchemaError(f"{what} has values that {dtype} cannot hold", hint="give another dtype, or round them")
    return found


def _refuse_known(amendment: Amendment, name: str) -> None:
    schema = amendment.snapshot.manifest.schema
    if name in schema.columns or name in schema.fields:
        raise AlreadyExistsError(
            f"{amendment.snapshot.place} has a column or field {name!r}", hint="choose another name"
        )


# -- fields ------------------------------------------------------------------------------------------------------------


def add_field(
    place: Place,
    path: str,
    compute: Compute,
    *,
    like: str,
    dtype: str | None = None,
    shape: Sequence[int] | None = None,
) -> None:
    """Add a field whose rows are computed from the others, on the clock of the field ``like``.

    Parameters
    ----------
    compute : called with a dataset and numbers of trajectories in it, int64 (k,): their rows, end to end, as many as
        ``like`` has (a trajectory that is longer than a shard is computed once for each of its shards). See
        :class:`ReturnsToGo`, :class:`Advantages` and :func:`each`.
    dtype, shape : of the new field; by default those of what is computed for the first trajectory.

    Raises
    ------
    AlreadyExistsError
        There is a column or field of that name.
    NotFoundError
        There is no field ``like``.
    SchemaError
        What is computed does not fit.
    LockedError
        A writer has the store open.
    """
    with amending(place) as amendment:
        _refuse_known(amendment, path)
        head = amendment.head
        if like not in head.schema.fields:
            raise NotFoundError(
                f"{amendment.snapshot.place} has no field {like!r}",
                hint=f"it has {', '.join(head.schema.fields) or 'none'}",
            )
        model = head.schema.fields[like]
        live = open_dataset(amendment.storage)
        every = live + live.deleted
        pairs = every.field_pairs(like)
        order = np.argsort(pairs[:, 0], kind="stable")
        order = order[pairs[order, 0] < pairs[order, 1]]
        if (dtype is None or shape is None) and len(order):
            sample = compute(every, order[:1].astype(np.int64))
            dtype, shape = dtype or dtype_name(sample.dtype), shape if shape is not None else sample.shape[1:]
        spec = Field(dtype or "float32", tuple(shape or ()), model.clock, array=_free_array(amendment, path))
        if spec.dtype in CODED:
            raise SchemaError(f"field {path!r} cannot be computed as {spec.dtype}", hint="as float32, say")
        layout = field_layout(spec, head.arrays[model.array][0].codec)
        schema = head.schema.with_field(path, spec)
        make_folder(amendment.storage, layout.path)
        shards = [
            write_shard(amendment.storage, layout, number, chunks)
            for number, chunks in _computed(layout, every, order, pairs, compute, path)
        ]
        amendment.commit(
            schema=schema,
            arrays={layout.path: (layout, head.arrays[model.array][1])},
            shards=[(layout.path, shard) for shard in shards],
        )


def _free_array(amendment: Amendment, path: str) -> str:
    """An array that no commit names and no dead session began."""
    name, number = field_array(path), 0
    while name in amendment.head.names or amendment.storage.list(name):
        number += 1
        name = f"{field_array(path)}.{number}"
    return name


def _computed(
    layout: ArrayLayout, dataset: Dataset, order: Ints, pairs: Ints, compute: Compute, path: str
) -> Iterator[tuple[int, Iterator[tuple[int, Array]]]]:
    """Each shard that holds rows, with its chunks."""
    starts, stops = pairs[order, 0], pairs[order, 1]
    reached = np.maximum.accumulate(stops) if len(stops) else stops
    height = layout.shard_rows
    for number in range(int(reached[-1] - 1) // height + 1 if len(reached) else 0):
        first, last = number * height, (number + 1) * height
        low, high = np.searchsorted(reached, first, side="right"), np.searchsorted(starts, last, side="left")
        chosen = order[low:high].astype(np.int64)
        if len(chosen):
            yield number, _chunks(layout, dataset, chosen, pairs[chosen], compute, path, first)


def _chunks(
    layout: ArrayLayout, dataset: Dataset, chosen: Ints, pairs: Ints, compute: Compute, path: str, first: int
) -> Iterator[tuple[int, Array]]:
    rows = spans(pairs[:, 0], pairs[:, 1]) - first
    found = compute(dataset, chosen)
    if found.shape != (len(rows), *layout.row_shape):
        raise SchemaError(
            f"field {path!r} was computed with the shape {found.shape}, expected {(len(rows), *layout.row_shape)}"
        )
    inside = (rows >= 0) & (rows < layout.shard_rows)
    shard = np.full((layout.shard_rows, *layout.row_shape), layout.fill, layout.dtype)
    shard[rows[inside]] = _exactly(f"field {path!r}", found[inside], layout.dtype)
    size = layout.chunk_rows
    for chunk in np.unique(rows[inside] // size).tolist():
        yield chunk, shard[chunk * size : (chunk + 1) * size]


def each(function: Callable[[Trajectory], Any]) -> Compute:
    """A ``Compute`` from a function of one trajectory that gives its rows."""

    def compute(dataset: Dataset, numbers: Ints) -> Array:
        return np.concatenate([np.asarray(function(dataset[number])) for number in numbers.tolist()])

    return compute


@dataclass(frozen=True)
class ReturnsToGo:
    """The discounted sum of a trajectory's rewards from each step on: G_t = r_t + discount · G_(t+1)."""

    reward: str = "reward"
    discount: float = 1.0

    def __post_init__(self) -> None:
        _check_share("discount", self.discount)

    def __call__(self, dataset: Dataset, numbers: Ints) -> Array:
        rewards = _floats(dataset, self.reward, numbers)
        pairs = dataset.field_pairs(self.reward)[numbers]
        return backward(rewards, pairs[:, 1] - pairs[:, 0], np.full(len(rewards), self.discount))


@dataclass(frozen=True)
class Advantages:
    """Generalised advantage estimates (Schulman et al., 2016, arXiv:1506.02438), with the values that were recorded.

    value : a field with a row for each step, or one more; the last is then the value of the state after the last step.
        With no more rows, that state counts as 0.
    terminated : a bool field; the state after such a step counts as 0, whatever its value. ``""`` for none.
    """

    reward: str = "reward"
    value: str = "value"
    terminated: str = ""
    discount: float = 0.99
    decay: float = 0.95

    def __post_init__(self) -> None:
        _check_share("discount", self.discount)
        _check_share("decay", self.decay)

    def __call__(self, dataset: Dataset, numbers: Ints) -> Array:
        rewards = _floats(dataset, self.reward, numbers)
        pairs = dataset.field_pairs(self.reward)[numbers]
        counts = pairs[:, 1] - pairs[:, 0]
        held = dataset.field_pairs(self.value)[numbers]
        extra = held[:, 1] - held[:, 0] - counts
        if ((extra != 0) & (extra != 1)).any():
            bad = int(np.flatnonzero((extra != 0) & (extra != 1))[0])
            rewarded, valued = int(counts[bad]), int(counts[bad] + extra[bad])
            raise SchemaError(
                f"trajectory {int(numbers[bad])} has {rewarded} rewards and {valued} values",
                hint="values have as many rows as rewards, or one more",
            )
        values = _floats(dataset, self.value, numbers)
        if values[:1].size != rewards[:1].size:
            raise SchemaError(
                f"rows of {self.value!r} have the shape {values.shape[1:]}, of {self.reward!r} {rewards.shape[1:]}",
                hint="give a field with a value for each reward",
            )
        values = values.reshape(-1, *rewards.shape[1:])
        starts = np.cumsum(counts + extra) - (counts + extra)
        here = spans(starts, starts + counts)
        last = np.cumsum(counts) - 1
        following = np.zeros_like(rewards)
        following[:-1] = values[here[1:]]
        following[last[counts > 0]] = 0
        bootstrapped = (extra == 1) & (counts > 0)
        following[last[bootstrapped]] = values[(starts + counts)[bootstrapped]]
        goes_on = np.ones(len(rewards))
        if self.terminated:
            ended = _floats(dataset, self.terminated, numbers).astype(np.float64)
            if len(ended) != len(rewards):
                raise SchemaError(
                    f"field {self.terminated!r} has {len(ended)} rows, and {self.reward!r} {len(rewards)}",
                    hint="give a field with a row for each reward",
                )
            goes_on = 1.0 - ended.reshape(len(rewards), -1)[:, 0]
        weight = goes_on.reshape(-1, *(1,) * (rewards.ndim - 1))
        surprise = rewards + self.discount * weight * following - values[here]
        return backward(surprise, counts, self.discount * self.decay * goes_on)


def _check_share(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise SchemaError(f"a {name} is a number from 0 to 1, not {value!r:.60}")


def numeric(dataset: Dataset, field: str) -> str:
    """The name of a field, if there is one and its rows are numbers. Raises ``NotFoundError``, ``SchemaError``."""
    dataset.reader(field)
    if dataset.fields[field].whole:
        raise SchemaError(f"field {field!r} is a {dataset.fields[field].dtype}", hint="give a field of numbers")
    return field


def _floats(dataset: Dataset, field: str, numbers: Ints) -> Array:
    rows = dataset.read(numeric(dataset, field), numbers)
    return rows.astype(np.result_type(rows.dtype, np.float32))


def backward(values: Array, counts: Ints, factors: Array) -> Array:
    """``out[t] = values[t] + factors[t] · out[t + 1]`` within each run of ``counts[i]`` rows, from its end.

    values : (sum of counts, *shape). factors : (sum of counts,). Computed in float64, given in the dtype of ``values``.
    """
    out = values.astype(np.float64)
    weight = factors.reshape(-1, *(1,) * (values.ndim - 1))
    order = np.argsort(-counts, kind="stable")  # those that still have rows are then the first ones
    ends = np.cumsum(counts)[order]
    left = np.searchsorted(-counts[order], -np.arange(1, int(counts.max(initial=0))), side="left")
    for step, live in enumerate(left.tolist(), 2):
        at = ends[:live] - step
        out[at] += weight[at] * out[at + 1]
    return out.astype(values.dtype)
