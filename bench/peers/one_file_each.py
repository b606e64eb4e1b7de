"""The embodied-RL replay buffer's way: a ``.pt`` file for each batch, and a JSON index that is rewritten for each add.

What RLinf's class does at each step, in the order in which it does it, without its names and its options.
"""

from __future__ import annotations

import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_DONES = ("dones", "terminations", "truncations")


def flattened(batch: dict[str, Any]) -> dict[str, Any]:
    steps = batch["rewards"].shape[0]
    flat: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, dict):
            flat[name] = {key: tensor.reshape(-1, *tensor.shape[2:]) for key, tensor in value.items()}
        elif isinstance(value, torch.Tensor):
            extra = value.shape[0] - steps
            if name in _DONES and extra > 0:
                value = value.reshape(extra, steps // extra + 1, *value.shape[1:])[:, 1:]
                value = value.reshape(steps, *value.shape[2:])
            flat[name] = value.reshape(-1, *value.shape[2:])
    return flat


class OneFileEach:
    """Saves in 20 threads; keeps the newest ``cache_size`` batches in one preallocated tensor for each field."""

    def __init__(self, folder: Path, *, cache_size: int, window: int, seed: int = 1234) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.cache_size, self.window = cache_size, window
        self.index: dict[int, dict[str, Any]] = {}
        self.ids: list[int] = []
        self.counter = 0
        self.slots: dict[int, int] = {}
        self.slot_owner: dict[int, int] = {}
        self.next_slot = 0
        self.slot_rows = 0
        self.held: dict[str, Any] | None = None
        self.threads = ThreadPoolExecutor(20)
        self.generator = torch.Generator().manual_seed(seed)

    def path(self, number: int, folder: Path | None = None) -> Path:
        return (folder or self.folder) / f"trajectory_{number}_{self.index[number]['model_weights_id']}.pt"

    def add(self, batches: list[dict[str, Any]]) -> None:
        saves = []
        for batch in batches:
            number = self.counter
            shape = batch["rewards"].shape
            self.index[number] = {
                "num_samples": shape[0] * shape[1],
                "trajectory_id": number,
                "max_episode_length": batch["max_episode_length"],
                "shape": tuple(shape),
                "model_weights_id": batch["model_weights_id"],
            }
            saves.append(self.threads.submit(self._save, batch, self.path(number)))
            self.ids.append(number)
            self.counter += 1
            if self.cache_size:
                self._hold(number, flattened(batch))

        def finish() -> None:
            for save in saves:
                save.result()
            self._write_index(self.folder)

        self.threads.submit(finish)

    def _save(self, batch: dict[str, Any], path: Path) -> None:
        torch.save({name: _clone(value) for name, value in batch.items()}, path)

    def _write_index(self, folder: Path) -> None:
        size = len(self.ids)
        samples = sum(entry["num_samples"] for entry in self.index.values())
        metadata = {"trajectory_format": "pt", "size": size, "total_samples": samples, "trajectory_counter": size}
        (folder / "metadata.json").write_text(json.dumps({**metadata, "seed": 1234}))
        index = {"trajectory_index": copy.deepcopy(self.index), "trajectory_id_list": list(self.ids)}
        with open(folder / "trajectory_index.json", "w") as file:
            json.dump(index, file)

    def _hold(self, number: int, flat: dict[str, Any]) -> None:
        rows = len(flat["rewards"])
        if self.held is None:
            self.slot_rows = rows
            self.held = _like(flat, self.cache_size * rows)
        slot = self.next_slot
        if slot in self.slot_owner:
            self.slots.pop(self.slot_owner[slot], None)
        self.slot_owner[slot], self.slots[number] = number, slot
        self.next_slot = (slot + 1) % self.cache_size
        _insert(self.held, flat, slot * self.slot_rows)

    def finish(self) -> None:
        """Wait until all is on disk."""
        self.threads.shutdown(wait=True)
        self.threads = ThreadPoolExecutor(20)

    def sample(self, count: int) -> dict[str, Any]:
        ids = self.ids[-self.window :] if self.window else list(self.ids)
        ends = torch.tensor([self.index[number]["num_samples"] for number in ids]).cumsum(0)
        drawn = torch.randint(0, int(ends[-1]), (count,), generator=self.generator)
        place = torch.bucketize(drawn, ends, right=True)
        local = drawn - torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])[place]
        chosen = [ids[p] for p in place.tolist()]
        batch: dict[str, Any] | None = None
        held = torch.tensor([number in self.slots for number in chosen])
        if bool(held.any()) and self.held is not None:
            slots = torch.tensor([self.slots[number] for number in chosen if number in self.slots])
            batch = _like(self.held, count)
            _fill(batch, self.held, slots * self.slot_rows + local[held], torch.nonzero(held)[:, 0])
        if bool((~held).any()):
            missing = sorted({number for number in chosen if number not in self.slots})
            flats = [flattened(torch.load(self.path(number), map_location="cpu")) for number in missing]
            offsets, at = {}, 0
            for number, flat in zip(missing, flats):
                offsets[number] = at
                at += len(flat["rewards"])
            joined = _joined(flats)
            if batch is None:
                batch = _like(joined, count)
            rows = torch.tensor([offsets[number] for number in chosen if number in offsets]) + local[~held]
            _fill(batch, joined, rows, torch.nonzero(~held)[:, 0])
        assert batch is not None
        return batch

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        ids = self.ids[-self.window :] if self.window else list(self.ids)
        with ThreadPoolExecutor(20) as threads:
            copies = [threads.submit(shutil.copyfile, self.path(number), self.path(number, folder)) for number in ids]
            for done in copies:
                done.result()
        self._write_index(folder)

    @classmethod
    def load(cls, folder: Path, *, cache_size: int, window: int) -> OneFileEach:
        buffer = cls(folder, cache_size=cache_size, window=window)
        found = json.loads((folder / "trajectory_index.json").read_text())
        buffer.index = {int(number): entry for number, entry in found["trajectory_index"].items()}
        buffer.ids = found["trajectory_id_list"]
        buffer.counter = len(buffer.ids)
        for number in buffer.ids[-cache_size:] if cache_size else ():
            buffer._hold(number, flattened(torch.load(buffer.path(number), map_location="cpu")))
        return buffer


def _clone(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clone(inner) for key, inner in value.items()}
    return value.cpu().contiguous().clone() if isinstance(value, torch.Tensor) else value


def _like(flat: dict[str, Any], rows: int) -> dict[str, Any]:
    return {
        name: _like(value, rows)
        if isinstance(value, dict)
        else torch.empty((rows, *value.shape[1:]), dtype=value.dtype)
        for name, value in flat.items()
    }


def _insert(held: dict[str, Any], flat: dict[str, Any], start: int) -> None:
    for name, value in flat.items():
        if isinstance(value, dict):
            _insert(held[name], value, start)
        else:
            held[name][start : start + len(value)] = value


def _fill(batch: dict[str, Any], held: dict[str, Any], rows: torch.Tensor, places: torch.Tensor) -> None:
    for name, value in held.items():
        if isinstance(value, dict):
            _fill(batch[name], value, rows, places)
        else:
            batch[name][places] = value.index_select(0, rows)


def _joined(flats: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: _joined([flat[name] for flat in flats])
        if isinstance(value, dict)
        else torch.cat([f[name] for f in flats])
        for name, value in flats[0].items()
    }
