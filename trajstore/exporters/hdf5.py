"""A dataset into one HDF5 file that ``trajstore.open`` opens: frames are moved as they are, not compressed again."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trajstore.__about__ import __version__
from trajstore.dataset import Dataset
from trajstore.engine.gather import ArrayReader
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import CorruptionError, SchemaError
from trajstore.format.checksum import crc32
from trajstore.format.encoding import clock_layout, column_layout, field_layout
from trajstore.format.intervals import IntervalSet
from trajstore.format.layout import ArrayLayout
from trajstore.format.manifest import SET_NAMES, Commit, Manifest
from trajstore.format.schema import ID, MAIN_CLOCK, Field, Schema
from trajstore.format.union import Union, unite
from trajstore.media.hdf5storage import BLOSC_FILTER, CHECKSUM, MANIFEST, Hdf5Storage, h5py_module
from trajstore.media.shard import encode_frame
from trajstore.operations.carriage import EVERYTHING
from trajstore.operations.output import Exported, counted, made_aside
from trajstore.operations.roles import chosen

CARRIES = {"hdf5": EVERYTHING}
_COMPRESSORS = {"blosclz": 0, "lz4": 1, "lz4hc": 2, "zlib": 4, "zstd": 5}


@dataclass(frozen=True)
class Moved(Exported):
    """What ``export_hdf5`` did. moved, encoded : chunks taken over as they were, and chunks compressed again."""

    moved: int = 0
    encoded: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class _Source:
    """The rows of one store on one clock, and where they go."""

    snapshot: Snapshot
    pairs: np.ndarray[Any, Any]  # of the chosen trajectories, int64 (n, 2)
    shift: int  # to be added to a row number


def export_hdf5(
    dataset: Dataset,
    path: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Moved:
    """Write a dataset, or a selection of one, into one HDF5 file.

    Chunks go over byte for byte where a store's layout is that of the first; the neighbours of a chosen row in its
    chunk go with it, unnamed. ``h5py`` with ``hdf5plugin`` reads the file, and so does ``trajstore.open``.

    Parameters
    ----------
    fields : only these.
    progress : is called with arrays written and arrays there are.

    Raises
    ------
    AlreadyExistsError
        Something stands at ``path``.
    SchemaError
        The stores do not agree on a field, or nothing was ever appended to them.
    """
    if not any(snapshot.manifest.arrays for snapshot in dataset.snapshots):
        place = dataset.snapshots[0].place
        raise SchemaError(f"nothing was ever appended to {place}", hint="append a trajectory first")
    union = _united(dataset, fields)
    with made_aside(path) as aside:
        with h5py_module().File(aside, "w", libver="latest") as file:
            counts, sources = _write(file, dataset, union, progress)
        _verify(aside, dataset, union, sources)
        size = os.path.getsize(aside)
    return Moved(len(dataset), int(np.maximum(dataset.lengths, 0).sum()), (), *counts, size)


def _united(dataset: Dataset, fields: Sequence[str] | None) -> Union:
    """What the stores hold together, of these fields, and the clocks that those go by."""
    snapshots = dataset.snapshots
    union = unite([s.manifest.schema for s in snapshots], [s.place for s in snapshots])
    kept = {path: union.schema.fields[path] for path in chosen(dataset, fields)}
    used = {MAIN_CLOCK, *(str(spec.clock) for spec in kept.values())}
    clocks = {name: clock for name, clock in union.schema.clocks.items() if name in used}
    absent = snapshots[0].manifest.schema.absent if len(snapshots) == 1 else frozenset()
    schema = Schema(kept, clocks, union.schema.columns, absent)
    return Union(schema, {name: union.clocks[name] for name in clocks})


def _pairs(dataset: Dataset, union: Union, clock: str) -> np.ndarray[Any, Any]:
    """Start and stop of every trajectory on a clock of them all, rows of its own store, int64 (n, 2)."""
    part, row = dataset.locate(np.arange(len(dataset), dtype=np.int64))
    pairs = np.full((len(row), 2), -1, np.int64)
    for number, (snapshot, name) in enumerate(zip(dataset.snapshots, union.clocks[clock])):
        if name is not None:
            pairs[part == number] = snapshot.pairs(name, row[part == number])
    return pairs


def _write(
    file: Any, dataset: Dataset, union: Union, progress: Callable[[int, int], None] | None
) -> tuple[tuple[int, int], dict[str, list[_Source]]]:
    schema = union.schema
    layouts = {path: _layout(dataset, path, spec) for path, spec in schema.fields.items()}
    sources: dict[str, list[_Source]] = {}
    rows: dict[str, int] = {}
    for clock in schema.clocks:
        mine = [layouts[path] for path in schema.on_clock(clock)]
        sources[clock], rows[clock] = _place(
            dataset, _pairs(dataset, union, clock), max([layout.chunk_rows for layout in mine], default=1)
        )
    total = len(schema.fields) + len(schema.clocks) + len(schema.columns)
    arrays: dict[str, tuple[ArrayLayout, int]] = {}
    moved = encoded = 0
    for path, spec in counted(schema.fields.items(), progress, total):
        layout = layouts[path]
        target = _dataset(file, layout, rows[str(spec.clock)], {"dtype": spec.dtype, "rule": spec.rule.kind})
        for source in sources[str(spec.clock)]:
            counts = _move(target, layout, source, path)
            moved, encoded = moved + counts[0], encoded + counts[1]
        arrays[layout.path] = layout, rows[str(spec.clock)]
    for layout, values in counted(_table(dataset, union, sources), progress, total, len(schema.fields)):
        target = _dataset(file, layout, len(values), {})
        for chunk, frame in _encoded(layout, values):
            _put(target, layout, chunk, frame)
        arrays[layout.path] = layout, len(values)
    data = _manifest(dataset, schema, arrays).to_bytes()
    stored = file.create_dataset(MANIFEST, data=np.frombuffer(data, np.uint8))
    stored.attrs[CHECKSUM] = crc32(data)
    return (moved, encoded), sources


def _layout(dataset: Dataset, path: str, spec: Field) -> ArrayLayout:
    """The layout of the first store that holds the field as it is to be stored."""
    for snapshot in dataset.snapshots:
        known = snapshot.manifest.schema.fields.get(path)
        if known is not None and known.rule == spec.rule:
            return snapshot.manifest.arrays[known.array][0].with_path(spec.array)
    first = next(s for s in dataset.snapshots if path in s.manifest.schema.fields)
    codec = first.manifest.arrays[first.manifest.schema.fields[path].array][0].codec
    return field_layout(spec, codec)


def _place(dataset: Dataset, pairs: np.ndarray[Any, Any], chunk: int) -> tuple[list[_Source], int]:
    """Each store's rows on a clock moved by whole chunks, so that they follow the store before without its gaps."""
    part, _ = dataset.locate(np.arange(len(dataset), dtype=np.int64))
    found = []
    end = 0
    for number, snapshot in enumerate(dataset.snapshots):
        mine = pairs[part == number]
        held = mine[mine[:, 0] >= 0]
        low = int(held[:, 0].min()) if len(held) else 0
        start = low - low % chunk
        shift = -(-end // chunk) * chunk - start
        found.append(_Source(snapshot, mine, shift))
        end = max(end, int(held[:, 1].max()) + shift if len(held) else 0)
    return found, end


def _table(
    dataset: Dataset, union: Union, sources: Mapping[str, list[_Source]]
) -> Iterator[tuple[ArrayLayout, np.ndarray[Any, Any]]]:
    part, _ = dataset.locate(np.arange(len(dataset), dtype=np.int64))
    for clock in union.clocks:
        pairs = _pairs(dataset, union, clock)
        shifts = np.array([source.shift for source in sources[clock]], np.int64)[part]
        pairs[pairs[:, 0] >= 0] += shifts[pairs[:, 0] >= 0, None]
        yield clock_layout(clock), pairs
    for name, spec in union.schema.columns.items():
        values = np.arange(len(dataset)) if name == ID and len(dataset.snapshots) > 1 else dataset.column(name)
        yield column_layout(name, spec), values


def _dataset(file: Any, layout: ArrayLayout, rows: int, attributes: Mapping[str, str]) -> Any:
    shape = (rows, *layout.row_shape)
    if not layout.row_bytes:
        return file.create_dataset(layout.path, shape, layout.dtype)
    codec = layout.codec
    settings = (2, 2, layout.dtype.itemsize, layout.chunk_bytes, codec.clevel)
    target = file.create_dataset(
        layout.path,
        shape,
        layout.dtype,
        maxshape=(None, *layout.row_shape),
        chunks=(layout.chunk_rows, *layout.row_shape),
        compression=BLOSC_FILTER,
        compression_opts=(*settings, codec.shuffle_code, _COMPRESSORS[codec.cname]),
        allow_unknown_filter=True,
        fillvalue=np.asarray(layout.fill).astype(layout.dtype)[()],
    )
    for name, value in attributes.items():
        target.attrs[name] = value
    return target


def _move(target: Any, layout: ArrayLayout, source: _Source, path: str) -> tuple[int, int]:
    """One store's chunks of a field; how many were moved, and how many compressed again."""
    spec = source.snapshot.manifest.schema.fields.get(path)
    if spec is None or not layout.row_bytes:
        return 0, 0
    chunks = _covering(source.pairs, layout.chunk_rows)
    reader = source.snapshot.reader(spec.array)
    ahead = source.shift // layout.chunk_rows
    same = (reader.layout.dtype, reader.layout.chunk_rows) == (layout.dtype, layout.chunk_rows)
    if same:
        for chunk, frame in reader.frames(chunks):
            _put(target, layout, chunk + ahead, frame)
        return len(chunks), 0
    values = source.snapshot.field(path) if spec.rule.kind == "divide" else reader
    for chunk in chunks.tolist():
        _put(target, layout, chunk + ahead, encode_frame(_whole(values, layout, chunk), layout.codec))
    return 0, len(chunks)


def _whole(reader: ArrayReader, layout: ArrayLayout, chunk: int) -> np.ndarray[Any, Any]:
    rows = np.zeros((layout.chunk_rows, *layout.row_shape), layout.dtype)
    start = chunk * layout.chunk_rows
    stop = min(start + layout.chunk_rows, reader.rows)
    rows[: stop - start] = reader.read(start, stop)
    return rows


def _covering(pairs: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """Numbers of the chunks that hold a row of these runs, ascending."""
    held = pairs[pairs[:, 1] > pairs[:, 0]]
    spans = IntervalSet(np.stack([held[:, 0] // size, (held[:, 1] - 1) // size + 1], axis=1))
    return spans.first(len(spans))


def _encoded(layout: ArrayLayout, values: np.ndarray[Any, Any]) -> Iterator[tuple[int, bytes]]:
    for chunk in range(-(-len(values) // layout.chunk_rows)):
        part = values[chunk * layout.chunk_rows : (chunk + 1) * layout.chunk_rows]
        rows = np.full((layout.chunk_rows, *layout.row_shape), layout.fill, layout.dtype)
        rows[: len(part)] = part
        yield chunk, encode_frame(rows, layout.codec)


def _put(target: Any, layout: ArrayLayout, chunk: int, frame: bytes) -> None:
    start = chunk * layout.chunk_rows
    if start < target.shape[0]:
        target.id.write_direct_chunk((start,) + (0,) * len(layout.row_shape), frame)


def _manifest(dataset: Dataset, schema: Schema, arrays: Mapping[str, tuple[ArrayLayout, int]]) -> Manifest:
    first = dataset.snapshots[0].manifest
    alone = len(dataset.snapshots) == 1
    steps = int(np.maximum(dataset.lengths, 0).sum())
    next_id = first.counts["next_id"] if alone else len(dataset)
    empty = dict.fromkeys(SET_NAMES, IntervalSet())
    kept = {name: dataset.snapshots[0].set(name) for name in ("attempted", "completed")} if alone else {}
    return Manifest(
        commit=replace(
            first.commit, number=1, uuid=uuid.uuid4().hex, parent=first.commit.uuid, software=f"trajstore {__version__}"
        )
        if alone
        else Commit(1, uuid.uuid4().hex, "", first.commit.time, "", f"trajstore {__version__}"),
        created=first.created,
        schema=schema,
        arrays=arrays,
        names=tuple(arrays),
        sets={**empty, **kept, "rows": IntervalSet.span(0, len(dataset))},
        counts={"trajectories": len(dataset), "steps": steps, "next_id": next_id},
        session=dict(first.session),
        config=dict(first.config),
        progress=dict(first.progress),
    )


def _verify(path: str, dataset: Dataset, union: Union, sources: Mapping[str, list[_Source]]) -> None:
    """The table reads back as it is, and every frame of a chosen row is in its place and whole."""
    snapshot = Snapshot.of(Hdf5Storage(path))
    rows = np.arange(len(dataset), dtype=np.int64)
    for layout, values in _table(dataset, union, sources):
        if not np.array_equal(snapshot.reader(layout.path).take(rows), values, equal_nan=values.dtype.kind == "f"):
            raise CorruptionError(f"{layout.path} reads back differently from {path}", hint="try again")
    for spec in union.schema.fields.values():
        reader = snapshot.reader(spec.array)
        if reader.layout.row_bytes:
            for _ in reader.frames(_covering(snapshot.pairs(str(spec.clock), rows), reader.layout.chunk_rows)):
                pass
