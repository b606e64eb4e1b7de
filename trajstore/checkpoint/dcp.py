"""``torch.distributed.checkpoint`` into and out of a checkpoint folder, also ``async_save`` and other world sizes.

    import torch.distributed.checkpoint as dcp
    from trajstore.checkpoint.dcp import Reader, Writer

    dcp.save(state, storage_writer=Writer("ckpts", step=1000))
    dcp.load(state, storage_reader=Reader("ckpts"))

A checkpoint is a Zarr group as any other here: listed, verified, pinned and pruned by the same commands. Each rank
writes arrays of its own; the coordinator gathers the record and gives the folder its name.
"""

from __future__ import annotations

import io
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from trajstore.checkpoint import reading
from trajstore.checkpoint.arena import Arena
from trajstore.checkpoint.arena import plan as lay_out
from trajstore.checkpoint.chunks import Pool, chunk_key, write_chunk
from trajstore.checkpoint.record import CHUNK_BYTES, STRUCTURE, FlatArray, Record
from trajstore.checkpoint.retention import Retention, select
from trajstore.checkpoint.saving import finish_folder, publish
from trajstore.checkpoint.shelf import HISTORY, LOCK, Shelf, candidate
from trajstore.checkpoint.staging import copy_now
from trajstore.checkpoint.tree import Flattening
from trajstore.errors import CorruptionError, FormatError, NotFoundError, TrajstoreError
from trajstore.format import typedjson
from trajstore.format.layout import PRIVATE
from trajstore.media.history import History, plain
from trajstore.media.publish import discard, ensure_folder
from trajstore.media.storage import LocalStorage
from trajstore.versions import library_versions

_THREADS = 2


@dataclass
class _Written:
    """What a rank tells the coordinator of one item; the first also carries the rank's arrays and extents."""

    key: str
    node: Any
    arrays: tuple[FlatArray, ...] = ()
    places: tuple[tuple[str, int, int, int], ...] = ()


class Writer(StorageWriter):
    """A ``StorageWriter`` for ``dcp.save`` and ``dcp.async_save``.

    Parameters
    ----------
    folder : of the checkpoints; on a file system that all ranks share.
    step : names the checkpoint. ``dcp.save(checkpoint_id=...)`` overrides both with a path of its own.
    metrics, meta : as in ``Checkpoints.save``.
    retention : applied by the coordinator once the checkpoint is published; by default everything stays.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        step: int = 0,
        *,
        metrics: Mapping[str, Any] | None = None,
        meta: Mapping[str, Any] | None = None,
        retention: Retention | None = None,
    ) -> None:
        super().__init__()
        self._storage = LocalStorage(folder)
        self._name: str | None = None
        self._step = step
        self._metrics = plain(metrics or {})
        self._meta = dict(meta or {})
        self._retention = retention or Retention()
        self._rank = 0
        self._arena = Arena()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            folder, self._name = os.path.split(os.path.abspath(os.fspath(checkpoint_id)))
            self._storage = LocalStorage(folder)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            ensure_folder(self._storage, "")
            ensure_folder(self._storage, PRIVATE)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        # On the coordinator, before any rank writes: one scratch folder for all.
        temp = f"{PRIVATE}/tmp.{uuid.uuid4().hex[:12]}"
        self._storage.make_folder(temp)
        return [replace(plan, storage_data=(rank, temp)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        rank, temp = plan.storage_data
        keys, values = [], {}
        for item in plan.items:
            data = planner.resolve_data(item)
            key = item.index.fqn
            if item.type == WriteItemType.SHARD:
                key += str(list(item.index.offset or ()))
            keys.append(key)
            values[key] = data.getvalue() if isinstance(data, io.BytesIO) else data.detach()
        flat = Flattening(list(values.values()), f"rank{rank}")
        extents = flat.finish()
        layout = lay_out(extents)
        self._arena.prepare(layout.size, pinned=False)
        copy_now(self._arena, extents, layout)
        calls, storage, pool = [], self._storage, Pool(_THREADS)
        for array, start in zip(layout.arrays, layout.starts):
            storage.make_folder(f"{temp}/{array.name}")
            whole, size = self._arena.view(start, start + array.nbytes), array.chunk * array.itemsize
            calls += [(storage, temp, array, n, whole[n * size : (n + 1) * size], None) for n in range(array.count)]
        written = iter(pool.map(write_chunk, calls))
        pool.close()
        arrays = tuple(array.with_chunks([next(written)[0] for _ in range(array.count)]) for array in layout.arrays)
        places = tuple(
            (layout.arrays[number].name if number >= 0 else "", offset, extent.size if number >= 0 else 0, extent.start)
            for extent, (number, offset) in zip(extents, layout.places)
        )
        results: list[WriteResult] = []
        for item, key, node in zip(plan.items, keys, flat.node[1:]):
            first = (arrays, places) if not results else ((), ())
            results.append(WriteResult(item.index, places[node[1]][2], _Written(key, node, *first)))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        self._temp = temp
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        storage, temp = self._storage, self._temp
        arrays: list[FlatArray] = []
        places: list[Any] = []
        state: list[Any] = ["dict"]
        index: list[Any] = []
        for rank in results:
            base = len(places)
            for result in rank:
                written: _Written = result.storage_data
                arrays += written.arrays
                places += written.places
                node = [written.node[0], written.node[1] + base, *written.node[2:]]
                state += (written.key, node)
                offset = None if result.index.offset is None else list(result.index.offset)
                index.append([result.index.fqn, offset, result.index.index, node])
        document = typedjson.dumps(
            {"state": state, "rng": None, "extents": [list(place) for place in places],
             "dcp": {"metadata": _metadata_to_json(metadata), "index": index}}
        )  # fmt: skip
        shelf, pool = Shelf(storage), Pool(_THREADS)
        lock = storage.lock(LOCK)
        try:
            records = shelf.records()
            newest = list(records.values())[-1] if records else None
            arrays.append(_write_structure(storage, temp, document))
            record = Record(
                step=self._step, serial=newest.serial + 1 if newest else 1, uuid=uuid.uuid4().hex,
                parent=newest.uuid if newest else None, time=time.time(), metrics=self._metrics, meta=self._meta,
                versions=library_versions(), arrays=tuple(arrays),
            )  # fmt: skip
            name = self._name or shelf.free_name(self._step)
            discard(storage, name)
            finish_folder(storage, temp, record, pool)
            publish(storage, temp, name)
            History(storage, HISTORY).append(self._step, self._metrics)
            if not self._retention.keeps_all:
                found = shelf.checkpoints()
                kept = select(map(candidate, found), self._retention, newest_valid=name)
                for checkpoint in found:
                    if checkpoint.name not in kept:
                        shelf.discard(checkpoint.name)
        finally:
            lock.release()
            pool.close()

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self._storage.describe(self._name or ""), save_id=None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in os.fspath(checkpoint_id)


class Reader(StorageReader):
    """A ``StorageReader`` for ``dcp.load``; the world may be larger or smaller than the one that saved.

    Parameters
    ----------
    folder : of the checkpoints.
    step : a step or a checkpoint's name; ``None`` for the newest whose record is sound and whose files are there
        (every chunk is verified as it is read; one that does not verify raises ``CorruptionError`` on its rank).
    """

    def __init__(self, folder: str | os.PathLike[str], step: int | str | None = None) -> None:
        super().__init__()
        self._storage = LocalStorage(folder)
        self._step = step
        self._name: str | None = None
        self._nodes: dict[tuple[Any, ...], Any] = {}
        self._reader: reading.Reader | None = None
        self._pool = Pool(_THREADS)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._reader = None
        if checkpoint_id is not None:
            folder, self._name = os.path.split(os.path.abspath(os.fspath(checkpoint_id)))
            self._storage = LocalStorage(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        shelf = Shelf(self._storage)
        name = self._name or self._choose(shelf)
        child = self._storage.child(name)
        self._reader = reading.Reader(child, shelf.record(name), self._pool)
        try:
            document = self._reader.document["dcp"]
            index = document["index"]
        except KeyError as error:
            raise FormatError(
                f"{child.describe()} was not saved by torch.distributed.checkpoint",
                hint="Checkpoints(...).restore() reads it",
            ) from error
        # MetadataIndex compares by name and offset; its third part is a hint.
        self._nodes = {(fqn, _tuple(offset)): node for fqn, offset, _, node in index}
        return _metadata_from_json(document["metadata"], [entry[:3] for entry in index])

    def _choose(self, shelf: Shelf) -> str:
        if self._step is not None:
            return shelf.find(self._step).name
        for name, record in reversed(list(shelf.records().items())):
            files = (
                (chunk_key(f"{name}/{array.name}", number), chunk.length)
                for array in record.arrays
                for number, chunk in enumerate(array.chunks)
            )
            if not record.stripped and all(self._storage.size(key) == length for key, length in files):
                return name
        raise NotFoundError(f"there is no whole checkpoint in {self._storage.describe()}")

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if self._reader is None:
            self.read_metadata()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        reader = self._reader
        if reader is None:
            raise TrajstoreError("read_data before read_metadata")
        nodes = [self._nodes[_key(item.storage_index)] for item in plan.items]
        values = reader.build(["list", *nodes])
        for item, value in zip(plan.items, values):
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(value))
                continue
            for dimension, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths)):
                value = torch.narrow(value, dimension, offset, length)
            target = planner.resolve_tensor(item).detach()
            if target.size() != value.size():
                raise CorruptionError(
                    f"{item.storage_index.fqn} has the shape {tuple(value.size())}, not {tuple(target.size())}"
                )
            target.copy_(value)
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in os.fspath(checkpoint_id)


def _write_structure(storage: LocalStorage, temp: str, document: bytes) -> FlatArray:
    chunk = min(CHUNK_BYTES, len(document))
    array = FlatArray(STRUCTURE, STRUCTURE, "uint8", "uint8", len(document), chunk)
    storage.make_folder(f"{temp}/{STRUCTURE}")
    data = np.frombuffer(document, np.uint8)
    pieces = [data[number * chunk : (number + 1) * chunk] for number in range(array.count)]
    return array.with_chunks([write_chunk(storage, temp, array, n, piece, None)[0] for n, piece in enumerate(pieces)])


def _metadata_to_json(metadata: Metadata) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            entries[fqn] = None
        else:
            chunks = [[list(chunk.offsets), list(chunk.sizes)] for chunk in entry.chunks]
            properties = entry.properties
            entries[fqn] = [str(properties.dtype)[6:], list(entry.size), chunks, bool(properties.requires_grad)]
    return {"entries": entries, "planner": metadata.planner_data}


def _metadata_from_json(value: Mapping[str, Any], index: list[list[Any]]) -> Metadata:
    entries: dict[str, Any] = {}
    for fqn, entry in value["entries"].items():
        if entry is None:
            entries[fqn] = BytesStorageMetadata()
            continue
        dtype, size, chunks, requires_grad = entry
        properties = TensorProperties(dtype=getattr(torch, dtype), requires_grad=requires_grad)
        parts = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]
        entries[fqn] = TensorStorageMetadata(properties, torch.Size(size), parts)
    storage = {
        MetadataIndex(fqn, None if offset is None else torch.Size(offset), number): None
        for fqn, offset, number in index
    }
    return Metadata(state_dict_metadata=entries, planner_data=value["planner"], storage_data=storage)


def _key(index: MetadataIndex) -> tuple[Any, ...]:
    return index.fqn, _tuple(index.offset)


def _tuple(value: Any) -> tuple[int, ...] | None:
    return None if value is None else tuple(value)
