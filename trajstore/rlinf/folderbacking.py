"""Batches on disk in a buffer folder of their own, a file each; single rows are read by mapping the files."""

from __future__ import annotations

import atexit
import os
import shutil
import time
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from trajstore.errors import FormatError, NotFoundError, SchemaError
from trajstore.media.storage import LocalStorage
from trajstore.rlinf.backing import Entry, entry_of
from trajstore.rlinf.batch import Batch, batch_of
from trajstore.rlinf.files import load_batch, save_batch
from trajstore.rlinf.flat import Tensors, assembled, flatten, take
from trajstore.rlinf.folder import batch_files, file_name, read_folder, write_index
from trajstore.sampling.windows import Ints

_OPEN_FILES = 64
_SAVERS = 4  # threads; they wait for the disk
_INDEX_SHARE = 0.05  # the index on disk is written again when it lacks so large a part,
_INDEX_SECONDS = 5.0  # or when it is so old


class Files:
    """A buffer folder, ``trajectory_{id}_{…}.pt|pkl``; read by mapping files, of which a few stay open."""

    def __init__(self, folder: str | os.PathLike[str], entries: Mapping[int, Entry], names: Mapping[int, str]) -> None:
        self.folder, self.entries, self.names = os.fspath(folder), dict(entries), dict(names)
        self._open: OrderedDict[int, tuple[Batch, Tensors]] = OrderedDict()

    def rows(self, numbers: Ints, rows: Ints) -> Tensors:
        parts = []
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            flat = self._batch(number)[1]
            parts.append((places, {path: take(held, rows[places]) for path, held in flat.items()}))
        return assembled(len(rows), parts)

    def whole(self, number: int) -> Batch:
        return self._batch(number)[0]

    def _batch(self, number: int) -> tuple[Batch, Tensors]:
        known = self._open.get(number)
        if known is None:
            name = self.names[number]
            batch = batch_of(_mapped(self.folder, name), os.path.join(self.folder, name))
            known = self._open[number] = batch, flatten(batch, name)[0]
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return known


class FileWriter(Files):
    """A buffer folder that grows: files first, in threads, the index after them."""

    def __init__(self, folder: str | os.PathLike[str], kind: str) -> None:
        os.makedirs(folder, exist_ok=True)
        self._storage = LocalStorage(folder)
        self._before: dict[int, Entry] = {}
        try:
            known = read_folder(self._storage)
            self._before = {number: dict(known.entries[number]) for number in known.files}
        except NotFoundError:
            pass
        super().__init__(folder, {}, {})
        self.kind = kind
        self._threads = ThreadPoolExecutor(_SAVERS, thread_name_prefix="trajstore-rlinf")
        self._saving: OrderedDict[int, Future[None]] = OrderedDict()
        self.lost: list[int] = []  # could not be saved; whoever knows of them takes them out
        self._unlisted, self._listed_at = 0, time.monotonic()
        self._beyond = max([number for number, _ in batch_files(self._storage)], default=-1) + 1
        self._metadata: Mapping[str, Any] = {}
        self._at_exit = weakref.WeakMethod(self._finish)
        atexit.register(_call, self._at_exit)

    @property
    def next_number(self) -> int:
        """An id that no file has."""
        return max([*self.entries, self._beyond - 1]) + 1

    def add(self, number: int, value: Mapping[str, Any], entry: Entry, metadata: Mapping[str, Any]) -> None:
        """Save a batch in the background; ``value`` may not change any more. Raises what an earlier save has raised."""
        while len(self._saving) >= 4 * _SAVERS:
            self._saved(next(iter(self._saving)))
        name = file_name(number, str(entry["model_weights_id"]), self.kind)
        self.names[number], self.entries[number] = name, entry
        self._saving[number] = self._threads.submit(save_batch, self._storage, name, value)
        self._unlisted, self._metadata = self._unlisted + 1, metadata
        late = time.monotonic() - self._listed_at > _INDEX_SECONDS
        if late or self._unlisted > _INDEX_SHARE * len(self.entries):
            self._list(metadata)

    def _saved(self, number: int) -> None:
        """Wait until a batch is on disk; one that could not be written is forgotten, and its error raised."""
        future = self._saving.pop(number, None)
        if future is not None:
            try:
                future.result()
            except BaseException:
                del self.names[number], self.entries[number]
                self.lost.append(number)
                raise

    def _list(self, metadata: Mapping[str, Any]) -> None:
        """Write an index that names what is on disk by now."""
        for number in [number for number, future in self._saving.items() if future.done()]:
            self._saved(number)
        there = [number for number in self.entries if number not in self._saving]
        ids = [*(number for number in self._before if number not in self.entries), *there]
        entries = {**self._before, **self.entries}
        samples = sum(int(entries[number]["num_samples"]) for number in ids)
        write_index(self._storage, entries, ids, {**metadata, "size": len(ids), "total_samples": samples})
        self._unlisted, self._listed_at = len(self._saving), time.monotonic()

    def _finish(self) -> None:
        """At the end of a process that did not close its buffer."""
        if self._unlisted:
            self.flush(self._metadata)

    def flush(self, metadata: Mapping[str, Any]) -> None:
        """Have everything on disk and in the index. Raises what could not be saved."""
        for number in list(self._saving):
            self._saved(number)
        self._list(metadata)

    def close(self, metadata: Mapping[str, Any]) -> None:
        try:
            self.flush(metadata)
        finally:
            atexit.unregister(self._at_exit)
            self._threads.shutdown()

    def _batch(self, number: int) -> tuple[Batch, Tensors]:
        self._saved(number)
        return super()._batch(number)


def _call(method: weakref.WeakMethod[Any]) -> None:
    found = method()
    if found is not None:
        found()


def unlisted(folder: str, known: Mapping[int, Any], kind: str) -> tuple[dict[int, Entry], dict[int, str]]:
    """Whole batch files newer than all that an index names, which it lacks because its writer was killed."""
    entries: dict[int, Entry] = {}
    names: dict[int, str] = {}
    for number, name in sorted(batch_files(LocalStorage(folder))):
        if number > max(known, default=-1) and name.endswith(kind):
            try:
                batch = batch_of(_mapped(folder, name), name)
            except (FormatError, SchemaError):
                continue  # the one that it was writing
            entries[number], names[number] = entry_of(number, batch), name
    return entries, names


def _mapped(folder: str, name: str) -> dict[str, Any]:
    """A batch file's dict; of a ``.pt`` only those pages are read that are looked at."""
    if name.endswith(".pt"):
        try:
            value = torch.load(os.path.join(folder, name), map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # written by a torch of old, which cannot be mapped; or damaged
            value = None
        if isinstance(value, dict):
            return value
    return load_batch(LocalStorage(folder), name)


def link_or_copy(source: str, target: str) -> None:
    """Give a finished file a second name, or where that cannot be, a copy."""
    if os.path.exists(target):
        if os.path.samefile(source, target):
            return
        os.remove(target)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
