"""RLinf's ``TrajectoryReplayBuffer``: its names, arguments, shapes and draws, without what it loses.

Drawn with one seed, its batches are those of RLinf's own class, bit for bit, but for ``prev_values``, which stands at
its own step here, and for fields that RLinf would refuse or mix up.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch

from trajstore.dataset import open as open_dataset
from trajstore.errors import FormatError, NotFoundError, SchemaError, StateError, TrajstoreError
from trajstore.media.publish import publish_file
from trajstore.media.storage import LocalStorage
from trajstore.operations.merge import merge
from trajstore.rlinf.arena import Arena
from trajstore.rlinf.backing import Backing, entry_of
from trajstore.rlinf.batch import WEIGHTS, batch_of, nested
from trajstore.rlinf.files import save_batch
from trajstore.rlinf.flat import Ints, Tensors, assembled, copied, flatten, restore
from trajstore.rlinf.folder import METADATA, SUFFIXES, file_name, read_folder, write_index
from trajstore.rlinf.folderbacking import Files, FileWriter, link_or_copy, unlisted
from trajstore.rlinf.storebacking import Stored, StoreWriter

__all__ = ["TrajectoryReplayBuffer"]

STORE = "store"
_STORE = re.compile(r"store-\d+\.zarr\Z")  # beside the metadata of a checkpoint
_FORMATS = (*SUFFIXES, STORE)
_log = logging.getLogger(__name__)


class TrajectoryReplayBuffer:
    """Batches ``[T, B, …]`` in, transitions out.

    Parameters
    ----------
    seed : of the draws. enable_cache, cache_size : batches that are kept in memory.
    sample_window_size : draws are from the newest so many batches; 0 for all.
    auto_save, auto_save_path : save each batch there, in the background. Without it, the batches of the window are in
        memory only, whatever the cache is.
    trajectory_format : ``"pt"`` or ``"pkl"``, a file for each batch; or ``"store"``, a trajstore store.
    cache_bytes : bound of the memory for batches, beside their number.

    Notes
    -----
    A batch is any object with tensors as attributes, or a mapping: absent fields are ``None``. The memory grows with
    what is in it. What could not be saved raises in the next call, and at ``close``; the index on disk names only what
    is there. One thread draws; any may add.
    """

    def __init__(
        self,
        seed: int | None = 1234,
        enable_cache: bool = True,
        cache_size: int = 5,
        sample_window_size: int = 100,
        auto_save: bool = False,
        auto_save_path: str = "",
        trajectory_format: str = "pt",
        *,
        cache_bytes: int | None = None,
    ) -> None:
        if trajectory_format not in _FORMATS:
            raise SchemaError(f"{trajectory_format!r} is no format of batches", hint="one of " + ", ".join(_FORMATS))
        if auto_save and not auto_save_path:
            raise SchemaError("auto_save needs a place", hint="give auto_save_path")
        self.seed, self.trajectory_format = seed, trajectory_format
        self.enable_cache = enable_cache or not auto_save
        self.sample_window_size = max(0, int(sample_window_size))
        self.auto_save, self.auto_save_path = auto_save, auto_save_path if auto_save else None
        held: int | None = cache_size if self.enable_cache else 0
        if not auto_save:
            held = self.sample_window_size or None
        self._preload = held if enable_cache or not auto_save else 0
        self._arena = Arena(held, cache_bytes if auto_save else None)
        self._extra: dict[int, Tensors] = {}  # of batches that are in memory only
        self._plain: dict[int, dict[str, Any]] = {}
        self._entries: dict[int, dict[str, Any]] = {}
        self._backing: dict[int, Backing | None] = {}
        self._count = self._total = 0  # of all that came, also those that have left the window
        self._version = 0
        self._window: tuple[Any, ...] = (None,)
        self._guard = threading.RLock()
        self._own: FileWriter | StoreWriter | None = None
        if auto_save:
            self._own = (
                StoreWriter(auto_save_path)
                if trajectory_format == STORE
                else FileWriter(auto_save_path, trajectory_format)
            )
        self._counter = self._own.next_number if self._own is not None else 0
        self.random_generator = torch.Generator()
        self._sow()

    def _sow(self) -> None:
        if self.seed is None:
            self.random_generator.seed()
        else:
            self.random_generator.manual_seed(self.seed)

    # -- what there is ---------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of batches."""
        return self._count

    @property
    def size(self) -> int:
        return self._count

    @property
    def total_samples(self) -> int:
        """Transitions in all batches: the sum of their T * B."""
        return self._total

    def is_ready(self, min_size: int) -> bool:
        """Whether there are so many batches."""
        return len(self) >= min_size

    async def is_ready_async(self, min_size: int) -> bool:
        return self.is_ready(min_size)

    def get_stats(self) -> dict[str, float]:
        """``num_trajectories`` (batches), ``total_samples``, ``cache_size`` (batches in memory)."""
        return {"num_trajectories": len(self), "total_samples": self._total, "cache_size": len(self._arena)}

    # -- in --------------------------------------------------------------------------------------------------------

    def add_trajectories(self, trajectories: Sequence[Any]) -> None:
        """Add batches.

        Raises ``SchemaError`` for one whose tensors do not fit one another, before anything of it is kept, and what an
        earlier save in the background has raised.
        """
        for trajectory in trajectories:
            with self._guard:
                self._add(trajectory)

    def _add(self, trajectory: Any) -> None:
        number = self._counter
        value = {name: item for name, item in _items(trajectory) if item is not None}
        batch = batch_of(value, f"batch {number}")
        batch.tensors = {path: _on_host(tensor) for path, tensor in batch.tensors.items()}
        flat, extra = flatten(batch, f"batch {number}")
        entry = entry_of(number, batch)
        self._counter += 1
        own = self._own
        if isinstance(own, FileWriter):
            copy = {path: copied(tensor) for path, tensor in batch.tensors.items()}
            with self._saving(own):
                own.add(number, {**batch.plain, **nested(copy)}, entry, self._metadata(()))
        elif own is not None:
            own.add(number, batch, flat, entry)
        self._take(number, entry, own)
        if own is None:
            self._extra[number] = {path: rows.clone() for path, rows in extra.items()}
            self._plain[number] = batch.plain
        for gone in self._arena.put(number, flat):
            if own is None and gone != number and self._backing[gone] is None:
                self._forget(gone)

    @contextmanager
    def _saving(self, own: FileWriter) -> Iterator[None]:
        """Forget those batches that turn out not to be saved."""
        try:
            yield
        finally:
            while own.lost:
                number = own.lost.pop()
                if number not in self._arena:
                    self._forget(number)

    def _take(self, number: int, entry: dict[str, Any], backing: Backing | None) -> None:
        self._entries[number] = entry
        self._backing[number] = backing
        self._count += 1
        self._total += int(entry["num_samples"])
        self._version += 1

    def _forget(self, number: int) -> None:
        """A batch cannot be drawn any more: it was in memory only and has left the window, or could not be saved."""
        for held in (self._entries, self._backing, self._extra, self._plain):
            held.pop(number, None)
        self._version += 1

    # -- out -------------------------------------------------------------------------------------------------------

    def sample(self, num_chunks: int = 0) -> dict[str, Any]:
        """``num_chunks`` transitions, drawn uniformly with replacement from those of the window: ``[num_chunks, …]``.

        More than there are in the window are not drawn; a warning is logged. Fields with rows for the ends of epochs
        have one row a step. Raises ``StateError`` when the buffer is empty.
        """
        if num_chunks < 1:
            raise SchemaError(f"{num_chunks} transitions", hint="num_chunks is 1 or more")
        with self._guard:
            ids, ends, starts = self._windowed()
            total = int(ends[-1]) if len(ends) else 0
            if not total:
                raise StateError("Cannot sample from an empty buffer.")
            if num_chunks > total:
                _log.warning(
                    "%d transitions asked for, and only %d in the window: so many are drawn", num_chunks, total
                )
                num_chunks = total
            drawn = torch.randint(0, total, (num_chunks,), generator=self.random_generator).numpy()
            places = np.searchsorted(ends, drawn, side="right")
            rows = drawn - np.where(places > 0, ends[places - 1], 0)
            return nested(self._gather(ids, places, rows, starts[places]))

    sample_chunks = sample

    def _windowed(self) -> tuple[list[int], Ints, Ints]:
        """Ids of the window's batches, where each one's transitions end, and its first row in memory, or -1."""
        state = self._version, self._arena.version, self.sample_window_size
        if self._window[0] != state:
            ids = list(islice(reversed(self._entries), self.sample_window_size or None))[::-1]
            counts = np.array([self._entries[number]["num_samples"] for number in ids], np.int64)
            starts = np.array([self._arena.start(number) for number in ids], np.int64)
            self._window = state, ids, np.cumsum(counts), starts
        _, ids, ends, starts = self._window
        return ids, ends, starts

    def _gather(self, ids: list[int], places: Ints, rows: Ints, starts: Ints) -> Tensors:
        """Row ``rows[i]`` of the batch at the place ``places[i]`` of the window; in memory from ``starts[i]`` on."""
        held = starts >= 0
        parts: list[tuple[Ints, Tensors]] = []
        if held.any():
            paths = self._arena.paths(ids[place] for place in np.unique(places[held]).tolist())
            parts.append((np.flatnonzero(held), self._arena.gather((starts + rows)[held], paths)))
        if not held.all():
            numbers = np.array(ids, np.int64)[places]
            backings = {id(backing): backing for backing in map(self._backing.get, numbers[~held].tolist())}
            for backing in backings.values():
                mine = np.flatnonzero(~held)
                if len(backings) > 1:
                    mine = mine[[self._backing[number] is backing for number in numbers[mine].tolist()]]
                assert backing is not None
                parts.append((mine, backing.rows(numbers[mine], rows[mine])))
        return parts[0][1] if len(parts) == 1 else assembled(len(rows), parts)

    # -- to and from disk ------------------------------------------------------------------------------------------

    def save_checkpoint(self, save_path: str) -> None:
        """Save the window's batches, the index and the state of the draws into a folder that RLinf reads as well.

        With ``trajectory_format="store"``, it is one store, whose files are shared with the buffer's own.
        """
        os.makedirs(save_path, exist_ok=True)
        with self._guard:
            ids = self._windowed()[0]
            metadata = self._metadata(ids)
            if isinstance(self._own, StoreWriter):
                self._own.writer.commit()
                self._save_store(self._own, save_path, metadata)
                return
            if isinstance(self._own, FileWriter):
                with self._saving(self._own):
                    self._own.flush(self._metadata(()))
            kind = self.trajectory_format if self.trajectory_format in SUFFIXES else "pt"
            storage = LocalStorage(save_path)
            for number in ids:
                self._save(storage, save_path, number, kind)
            storage.sync_folder("")
            write_index(storage, self._entries, ids, {**metadata, "trajectory_format": kind})

    def _save_store(self, own: StoreWriter, path: str, metadata: Mapping[str, Any]) -> None:
        """A new store beside the one before, which goes when the metadata name the new one."""
        storage = LocalStorage(path)
        before = [name for name in storage.list("") if _STORE.match(name)]
        name = f"store-{own.writer.commit()}.zarr"
        if name not in before:
            merge(own.writer.path, os.path.join(path, name), provenance=False)
        publish_file(storage, METADATA, [json.dumps({**metadata, "trajectory_format": STORE, STORE: name}).encode()])
        for old in before:
            if old != name:
                storage.remove(old)

    def _save(self, storage: LocalStorage, folder: str, number: int, kind: str) -> None:
        backing, entry = self._backing[number], self._entries[number]
        name = file_name(number, str(entry[WEIGHTS]), kind)
        if isinstance(backing, Files) and backing.names[number].endswith(SUFFIXES[kind]):
            link_or_copy(os.path.join(backing.folder, backing.names[number]), os.path.join(folder, name))
            return
        if backing is None:
            steps, envs = entry["shape"][:2]
            tensors = restore(self._arena.batch(number), self._extra[number], steps, envs)
            value = {**self._plain[number], **nested({path: rows.clone() for path, rows in tensors.items()})}
        else:
            batch = backing.whole(number)
            value = {**batch.plain, **nested(batch.tensors)}
        storage.remove(name)
        save_batch(storage, name, value)

    def _metadata(self, ids: Sequence[int]) -> dict[str, Any]:
        return {
            "trajectory_format": self.trajectory_format,
            "size": len(ids),
            "total_samples": sum(int(self._entries[number]["num_samples"]) for number in ids),
            "trajectory_counter": self._counter,
            "seed": self.seed,
            "rng_state": self.random_generator.get_state().numpy().tobytes().hex(),
        }

    def load_checkpoint(
        self, load_path: str, is_distributed: bool = False, local_rank: int = 0, world_size: int = 1
    ) -> None:
        """Load a checkpoint folder, RLinf's or this class's, or a store; what was in memory is forgotten.

        Parameters
        ----------
        is_distributed, local_rank, world_size : load this rank's contiguous block of the batches; the first ranks take
            one more where they do not divide.

        Notes
        -----
        The draws go on where the checkpoint was taken, if this class wrote it and it is loaded whole; else they begin
        with its seed. Batches that an index names and no file holds are left out, with a warning.
        """
        if is_distributed and not 0 <= local_rank < world_size:
            raise SchemaError(f"rank {local_rank} of {world_size}")
        backing, ids, metadata = _opened(load_path)
        if is_distributed:
            small, larger = divmod(len(ids), world_size)
            first = local_rank * small + min(local_rank, larger)
            ids = ids[first : first + small + (local_rank < larger)]
        with self._guard:
            self._empty()
            if "seed" in metadata:
                self.seed = metadata["seed"]
                self._sow()
            if "rng_state" in metadata and not is_distributed:
                state = np.frombuffer(bytes.fromhex(metadata["rng_state"]), np.uint8).copy()
                self.random_generator.set_state(torch.from_numpy(state))
            for number in ids:
                self._take(number, backing.entries[number], backing)
            counter = 0 if is_distributed else int(metadata.get("trajectory_counter", 0))
            below = self._own.next_number if self._own is not None else 0
            self._counter = max([*ids, counter - 1, below - 1]) + 1
            self._warm(ids)

    def _warm(self, ids: Sequence[int]) -> None:
        """Bring the newest batches into memory, as many as the cache takes."""
        for number in ids[-self._preload :] if self._preload is not None and self._preload > 0 else ():
            backing, entry = self._backing[number], self._entries[number]
            assert backing is not None
            count = int(entry["num_samples"])
            flat = backing.rows(np.full(count, number), np.arange(count))
            self._arena.put(number, flat)

    # -- the end ---------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget everything that is in memory; files stay as they are."""
        with self._guard:
            self._empty()
            self._counter = self._own.next_number if self._own is not None else 0

    def _empty(self) -> None:
        for held in (self._entries, self._backing, self._extra, self._plain):
            held.clear()
        self._arena.clear()
        self._count = self._total = 0
        self._version += 1

    def clear_cache(self) -> None:
        """Forget the rows of those batches that can be read again."""
        with self._guard:
            for number in list(self._arena):
                if self._backing[number] is not None:
                    self._arena.drop(number)

    def close(self, wait: bool = True) -> None:
        """Finish saving. Raises what could not be saved."""
        with self._guard:
            if isinstance(self._own, FileWriter):
                with self._saving(self._own):
                    self._own.close(self._metadata(()))
            elif self._own is not None:
                self._own.writer.close()


def _items(trajectory: Any) -> list[tuple[str, Any]]:
    if isinstance(trajectory, Mapping):
        return list(trajectory.items())
    names = getattr(trajectory, "__dataclass_fields__", None) or vars(trajectory)
    return [(name, getattr(trajectory, name, None)) for name in names]


def _on_host(tensor: Any) -> torch.Tensor:
    return (tensor if isinstance(tensor, torch.Tensor) else torch.as_tensor(tensor)).detach().cpu()


def _opened(path: str) -> tuple[Files | Stored, list[int], dict[str, Any]]:
    """What a checkpoint holds: where its batches are, their ids in order, and its metadata."""
    storage = LocalStorage(path)
    metadata = json.loads(storage.read(METADATA)) if storage.size(METADATA) is not None else {}
    name = metadata.get(STORE, "")
    if name or storage.size("zarr.json") is not None:
        if name and not _STORE.match(str(name)):
            raise FormatError(f"{storage.describe(METADATA)} names the store {name!r:.80}")
        stored = Stored()
        stored.open(open_dataset(os.path.join(path, name)))
        return stored, list(stored.entries), metadata
    folder = read_folder(storage)
    if folder.missing:
        shown = ", ".join(map(str, folder.missing[:10]))
        warnings.warn(f"{folder.place} names batches that are not there: {shown}", stacklevel=3)
    ids = [number for number in folder.ids if number in folder.files]
    more, names = unlisted(path, folder.entries, SUFFIXES[folder.format])
    if more:
        warnings.warn(
            f"{folder.place} holds {len(more)} newer batches that its index lacks; they are loaded", stacklevel=3
        )
    if folder.ids and not ids:
        raise NotFoundError(f"no file that the index of {folder.place} names is there")
    entries = {number: dict(folder.entries[number]) for number in ids} | more
    return Files(path, entries, {**folder.files, **names}), [*ids, *more], dict(folder.metadata)


def main(arguments: Sequence[str]) -> int:
    """Load a buffer, draw once, and print what came."""
    parser = argparse.ArgumentParser(
        prog="python -m trajstore.compat.rlinf", description="Load a replay buffer, sample once, print keys and shapes."
    )
    parser.add_argument("--load-path", required=True, help="a checkpoint: RLinf's folder, or a store")
    parser.add_argument("--num-chunks", type=int, default=4)
    parser.add_argument("--sample-window-size", type=int, default=10)
    parser.add_argument("--cache-size", type=int, default=5)
    parser.add_argument("--enable-cache", action="store_true")
    given = parser.parse_args(list(arguments))
    try:
        buffer = TrajectoryReplayBuffer(1234, given.enable_cache, given.cache_size, given.sample_window_size)
        buffer.load_checkpoint(given.load_path)
        batch = buffer.sample(given.num_chunks)
    except TrajstoreError as error:
        print(f"[sample] failed: {error.message}" + (f" ({error.hint})" if error.hint else ""))
        return 1
    print("[sample] keys:", list(batch))
    for name, value in batch.items():
        for inner, tensor in value.items() if isinstance(value, dict) else [("", value)]:
            path = f"{name}/{inner}" if inner else name
            print(f"  {path}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}")
    print("[stats]", buffer.get_stats())
    return 0
