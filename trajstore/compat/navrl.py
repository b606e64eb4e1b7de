"""The names and files of NavRL's ``async_checkpoint`` and ``checkpoint_utils``.

``from trajstore.compat.navrl import AsyncCheckpointSaver, load_checkpoint, PerformanceMonitor, ...`` instead of the
two old modules; nothing else in a script changes, and every file stays readable by the old loader.

What differs: a file appears whole or not at all and is durable when it is counted; a full queue waits instead of
dropping; ``shutdown`` saves everything that was queued; a save that failed is raised at the next call; compressing
without lz4 is an error; of ``path`` and ``path + ".lz4"`` the newer one is loaded; ``device`` defaults to the CPU.
"""

from __future__ import annotations

import atexit
import copy
import io
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trajstore.checkpoint.tensors import Snapshots
from trajstore.errors import (
    CorruptionError,
    MissingDependencyError,
    NotFoundError,
    SchemaError,
    StateError,
    UnsupportedFormatError,
)
from trajstore.media.publish import ensure_folder, publish_file
from trajstore.media.storage import LocalStorage
from trajstore.monitor import PerformanceMonitor
from trajstore.operations.receipt import check_receipt, write_receipt

__all__ = [
    "AsyncCheckpointSaver",
    "PerformanceMonitor",
    "format_checkpoint_name",
    "get_model_size",
    "load_checkpoint",
    "print_model_info",
]

_SUFFIX = ".lz4"


class AsyncCheckpointSaver:
    """Saves ``torch.save`` files, plain or as an LZ4 frame, in a background thread.

    Parameters
    ----------
    max_queue_size : saves that may wait; a further one waits for room. Each holds a copy of its tensors.
    verbose : print a line for each save, and the totals at shutdown.
    compression_level : LZ4 level, 0 (fast) to 16; their ``save_compression_level``.
    """

    def __init__(self, max_queue_size: int = 3, verbose: bool = True, *, compression_level: int = 9) -> None:
        if not 0 <= compression_level <= 16:
            raise SchemaError(f"compression_level is {compression_level}", hint="LZ4 has the levels 0 to 16")
        self.verbose = verbose
        self.is_running = True
        self.save_count = 0
        self.total_saved_bytes = 0
        self.total_compressed_bytes = 0
        self._level = compression_level
        self._room = max(1, max_queue_size)
        self._queue: deque[tuple[Any, Any, str, bool]] = deque()
        self._working = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._snapshots = Snapshots()
        self._thread = threading.Thread(target=_work, args=(self,), daemon=True)
        self._thread.start()
        _savers.add(self)
        self._say("[NavRL] AsyncCheckpointSaver initialized")

    def save_async(
        self, checkpoint: Mapping[str, Any], path: str, compress: bool = True, metadata: dict[str, Any] | None = None
    ) -> None:
        """Copy ``checkpoint`` and queue it for ``path`` (``path + ".lz4"`` with ``compress``).

        Returns when the copy is made: tensors, also nested ones, may change afterwards. ``metadata`` is stored under
        the checkpoint's key of that name. Waits while the queue is full.

        Raises
        ------
        MissingDependencyError : ``compress`` without lz4.
        StateError : after ``shutdown``, or an earlier save failed (its error is the cause).
        """
        if compress:
            _lz4()
        self._raise_error()
        if not self.is_running:
            raise StateError("this saver was shut down", hint="make a new AsyncCheckpointSaver")
        path = os.fspath(path)
        with self._changed:
            self._changed.wait_for(lambda: len(self._queue) < self._room or self._error is not None)
        self._raise_error()
        content = dict(checkpoint)
        if metadata:
            content["metadata"] = metadata
        frozen, memory = self._freeze(content)
        with self._changed:
            self._queue.append((frozen, memory, path, compress))
            self._changed.notify_all()
        self._say(f"[NavRL] Checkpoint queued for async save: {path}")

    def shutdown(self, timeout: float = 30.0) -> None:
        """Wait until everything queued is saved, at most ``timeout`` seconds, and take no more.

        What is not saved by then is not lost: the thread goes on, and the interpreter waits for it at exit.

        Raises
        ------
        StateError : a save failed.
        """
        if not self.is_running:
            return
        pending = self._pending()
        if pending:
            self._say(f"[NavRL] Waiting for {pending} pending checkpoint(s) to save...")
        self.is_running = False
        with self._changed:
            finished = self._changed.wait_for(lambda: not self._busy(), timeout)
            self._changed.notify_all()
        if not finished:
            print(f"[Warning] {self._pending()} checkpoint(s) are not saved after {timeout:g} s; still saving")
            return
        self._raise_error()
        self._say("[NavRL] ✅ All checkpoints saved successfully!")
        self._say(f"        Total checkpoints: {self.save_count}")
        if self.total_saved_bytes:
            self._say(
                f"        Total data: {self.total_saved_bytes / 1e6:.2f} MB → "
                f"{self.total_compressed_bytes / 1e6:.2f} MB "
                f"(overall compression: {self.get_stats()['compression_ratio']:.2f}x)"
            )

    def get_stats(self) -> dict[str, Any]:
        """``{save_count, total_saved_bytes, total_compressed_bytes, compression_ratio, queue_size}``."""
        saved, compressed = self.total_saved_bytes, self.total_compressed_bytes
        return {
            "save_count": self.save_count,
            "total_saved_bytes": saved,
            "total_compressed_bytes": compressed,
            "compression_ratio": saved / compressed if compressed else 1.0,
            "queue_size": len(self._queue),
        }

    def _pending(self) -> int:
        return len(self._queue) + self._working

    def _busy(self) -> bool:
        return bool(self._queue) or self._working

    def _say(self, line: str) -> None:
        if self.verbose:
            print(line)

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise StateError(f"a checkpoint was not saved: {error}", hint=getattr(error, "hint", "")) from error

    def _freeze(self, content: Any) -> tuple[Any, Any]:
        """A copy that nobody else can change: tensors on the host, all else by ``copy.deepcopy``."""
        tensors: dict[int, torch.Tensor] = {}
        _collect(content, tensors, set())
        with self._changed:
            copies, memory = self._snapshots.take(list(tensors.values()))
        memo: dict[int, Any] = {}
        for (key, tensor), plain in zip(tensors.items(), copies):
            memo[key] = (
                torch.nn.Parameter(plain, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else plain
            )
        return copy.deepcopy(content, memo), memory

    def _save(self, frozen: Any, path: str, compress: bool) -> None:
        start = time.perf_counter()
        buffer = io.BytesIO()
        torch.save(frozen, buffer)
        plain = buffer.getbuffer()
        data: Any = plain
        if compress:
            data = _lz4().compress(plain, compression_level=self._level, content_checksum=True)
        target = path + _SUFFIX if compress else path
        folder, name = os.path.split(os.path.abspath(target))
        storage = LocalStorage(folder)
        ensure_folder(storage, "")
        publish_file(storage, name, [data])
        write_receipt(storage, name)
        if not compress:
            storage.remove(name + _SUFFIX)  # older than this file now, and the old loader would prefer it
        self.save_count += 1
        self.total_saved_bytes += len(plain)
        self.total_compressed_bytes += len(data)
        self._say(f"[NavRL] ✅ Checkpoint saved: {target}")
        size = f"        Size: {len(plain) / 1e6:.2f} MB"
        if compress:
            size += f" → {len(data) / 1e6:.2f} MB (compression: {len(plain) / len(data):.2f}x)"
        self._say(size)
        self._say(f"        Time: {time.perf_counter() - start:.2f}s")


def _collect(value: Any, tensors: dict[int, torch.Tensor], seen: set[int]) -> None:
    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided and type(value) in (torch.Tensor, torch.nn.Parameter):
            tensors[id(value)] = value
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            _collect(item, tensors, seen)


def _work(saver: AsyncCheckpointSaver) -> None:
    changed = saver._changed
    while True:
        with changed:
            changed.wait_for(lambda: saver._queue or not saver.is_running)
            if not saver._queue:
                return
            frozen, memory, path, compress = saver._queue.popleft()
            saver._working = True
            changed.notify_all()
        error: BaseException | None = None
        try:
            saver._save(frozen, path, compress)
        except BaseException as caught:  # raised at the caller's next call
            error = caught
            print(f"[Error] Failed to save checkpoint {path}: {caught}", file=sys.stderr)
        del frozen
        with changed:
            saver._snapshots.release(memory)
            saver._error = saver._error or error
            saver._working = False
            changed.notify_all()


_savers: weakref.WeakSet[AsyncCheckpointSaver] = weakref.WeakSet()


@atexit.register
def _drain() -> None:
    for saver in list(_savers):
        with saver._changed:
            saver._changed.wait_for(lambda saver=saver: not saver._busy())  # type: ignore[misc]


def load_checkpoint(path: str, device: Any = "cpu", *, weights_only: bool = True) -> dict[str, Any]:
    """Load ``path`` or ``path + ".lz4"``, whichever is newer.

    Parameters
    ----------
    path : with or without the ``.lz4``.
    device : where the tensors go; any ``map_location`` of ``torch.load``.
    weights_only : ``False`` lets the file run code of its own: only for files that you wrote.

    Raises
    ------
    NotFoundError : there is neither.
    CorruptionError : the file does not match its checksums.
    UnsupportedFormatError : it holds more than tensors and plain values.
    """
    file = _newer(Path(os.fspath(path)))
    compressed = file.name.endswith(_SUFFIX)
    print(f"[NavRL] Loading {'compressed ' if compressed else ''}checkpoint: {file}")
    start = time.perf_counter()
    check_receipt(LocalStorage(file.parent), file.name)
    data = file.read_bytes()
    if compressed:
        try:
            data = _lz4().decompress(data)
        except RuntimeError as error:
            raise CorruptionError(
                f"{file} is no whole LZ4 frame: {error}", hint="load an earlier checkpoint"
            ) from error
    checkpoint: dict[str, Any] = read_torch(data, str(file), device, weights_only)
    print(f"[NavRL] ✅ Checkpoint loaded in {time.perf_counter() - start:.2f}s")
    return checkpoint


def read_torch(data: bytes, place: str, device: Any = "cpu", weights_only: bool = True) -> Any:
    """What ``torch.load`` makes of ``data``; its errors name ``place``."""
    import pickle
    import zipfile

    if zipfile.is_zipfile(io.BytesIO(data)):
        # torch does not look at the checksums that its own files carry.
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CorruptionError(f"{place} is damaged: {damaged} does not match its checksum")
    try:
        return torch.load(io.BytesIO(data), map_location=device, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise UnsupportedFormatError(
            f"{place} holds more than tensors and plain values: {str(error).splitlines()[0]}",
            hint="if you wrote it, load it with weights_only=False",
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise CorruptionError(f"{place} is no whole torch file: {error}", hint="load an earlier checkpoint") from error


def _newer(path: Path) -> Path:
    plain, compressed = (
        (path.with_name(path.name[: -len(_SUFFIX)]), path)
        if path.name.endswith(_SUFFIX)
        else (
            path,
            path.with_name(path.name + _SUFFIX),
        )
    )
    if path == compressed and compressed.exists():
        return compressed  # asked for by its own name
    found = [file for file in (compressed, plain) if file.exists()]
    if not found:
        raise NotFoundError(f"there is no checkpoint {plain} or {compressed.name} beside it")
    return max(found, key=lambda file: file.stat().st_mtime_ns)


def _lz4() -> Any:
    try:
        import lz4.frame
    except ImportError as error:
        raise MissingDependencyError("LZ4 checkpoints need the package lz4", hint="pip install lz4") from error
    return lz4.frame


def format_checkpoint_name(
    base_path: str, iteration: int, metric_name: str | None = None, metric_value: float | None = None
) -> str:
    """``base_path/checkpoint_iter_1000_reward_123.45.pt``; without the metric ``checkpoint_iter_1000.pt``."""
    metric = f"_{metric_name}_{metric_value:.2f}" if metric_name and metric_value is not None else ""
    return os.path.join(base_path, f"checkpoint_iter_{iteration}{metric}.pt")


def get_model_size(model: torch.nn.Module) -> dict[str, float]:
    """``{total_params, trainable_params, size_mb}``; ``size_mb`` is what the parameters take, in MiB."""
    parameters = list(model.parameters())
    return {
        "total_params": sum(p.numel() for p in parameters),
        "trainable_params": sum(p.numel() for p in parameters if p.requires_grad),
        "size_mb": sum(p.numel() * p.element_size() for p in parameters) / 2**20,
    }


def print_model_info(model: torch.nn.Module, name: str = "Model") -> None:
    """Print the model's size."""
    size = get_model_size(model)
    print(f"\n=== {name} Info ===")
    print(f"Total parameters: {size['total_params']:,}")
    print(f"Trainable parameters: {size['trainable_params']:,}")
    print(f"Estimated size: {size['size_mb']:.2f} MB")
