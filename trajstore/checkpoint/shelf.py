"""A folder of checkpoints: which there are, what is said about each, and how one comes and goes."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from typing import Any

from trajstore.checkpoint.chunks import Pool
from trajstore.checkpoint.record import Record, from_bytes
from trajstore.checkpoint.retention import Candidate, ranked
from trajstore.errors import NotFoundError, TrajstoreError
from trajstore.format.layout import PRIVATE, ROOT
from trajstore.media.publish import ensure_folder, hide, publish_file
from trajstore.media.storage import Storage

LOCK = f"{PRIVATE}/lock"
HISTORY = "metrics.jsonl"
_MARKS = f"{PRIVATE}/marks"
_NAME = re.compile(r"step-(\d{12,})(?:-(\d+))?(\.\w+)?")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a folder, as a listing shows it.

    name : of its folder. time : seconds since the epoch. raw_bytes, stored_bytes : before and after compression
    (hard links to other checkpoints count in full). complete : whether no section was dropped.
    """

    name: str
    path: str
    step: int
    serial: int
    time: float
    metrics: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    final: bool = False
    interrupted: bool = False
    pinned: bool = False
    note: str = ""
    sections: tuple[str, ...] = ()
    raw_bytes: int = 0
    stored_bytes: int = 0
    complete: bool = True
    versions: dict[str, str] = field(default_factory=dict)


class Shelf:
    """The checkpoints in a storage's root. Records are read once: a published checkpoint does not change.

    Reading needs no lock; what changes the shelf is for whoever holds it.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._records: dict[str, Record] = {}
        self._guard = threading.RLock()  # a signal may come in the middle of a look

    def names(self) -> list[str]:
        """The folders that have a checkpoint's name, in no order."""
        return [name for name in self.storage.list("") if _NAME.fullmatch(name)]

    def record(self, name: str) -> Record:
        """Raises ``CorruptionError`` if it is damaged, ``NotFoundError`` if there is none."""
        with self._guard:
            record = self._records.get(name)
        if record is None:
            # Through a storage of its own: a descriptor kept open would keep a removed checkpoint's bytes.
            folder = self.storage.child(name)
            record = from_bytes(folder.read(ROOT), folder.describe(ROOT))
            with self._guard:
                self._records[name] = record
        return record

    def records(self) -> dict[str, Record]:
        """All records that can be read, the oldest first."""
        found = {}
        for name in self.names():
            try:
                found[name] = self.record(name)
            except TrajstoreError:
                continue
        with self._guard:
            for name in self._records.keys() - found.keys():
                del self._records[name]
        return dict(sorted(found.items(), key=lambda item: item[1].serial))

    def newest_first(self) -> list[str]:
        """The names by age; one whose record is damaged stands where its step would."""
        readable = self.records()
        newest = list(reversed(readable))
        for name in sorted(set(self.names()) - readable.keys(), key=_age, reverse=True):
            newest.insert(next((i for i, other in enumerate(newest) if _age(other) < _age(name)), len(newest)), name)
        return newest

    def checkpoints(self) -> list[Checkpoint]:
        """All checkpoints whose record can be read, the oldest first."""
        marks = self.marks()
        return [self.describe(name, record, marks.get(name, {})) for name, record in self.records().items()]

    def candidates(self) -> list[Candidate]:
        """All checkpoints as retention sees them: no more than it needs, since every save asks."""
        pinned = {name for name, mark in self.marks().items() if mark.get("pinned")}
        return [
            Candidate(name, record.step, record.serial, record.metrics, name in pinned)
            for name, record in self.records().items()
        ]

    def describe(self, name: str, record: Record, mark: dict[str, Any]) -> Checkpoint:
        return Checkpoint(
            name=name,
            path=self.storage.describe(name),
            step=record.step,
            serial=record.serial,
            time=record.time,
            metrics=record.metrics,
            meta=record.meta,
            final=record.final,
            interrupted=record.interrupted or bool(mark.get("interrupted")),
            pinned=bool(mark.get("pinned")),
            note=str(mark.get("note", "")),
            sections=tuple(record.sections),
            raw_bytes=record.raw_bytes,
            stored_bytes=record.stored_bytes,
            complete=not record.stripped,
            versions=record.versions,
        )

    def find(self, which: int | str, best: tuple[str, str] | None = None) -> Checkpoint:
        """The checkpoint of a step (the newest of it), of a name, ``"latest"``, or ``"best"`` by a metric and mode.

        Raises ``NotFoundError`` saying what there is.
        """
        found = self.checkpoints()
        chosen: Checkpoint | None = None
        if which == "latest":
            chosen = found[-1] if found else None
        elif which == "best":
            if best is None:
                raise NotFoundError(
                    "no metric says which checkpoint is best", hint='keep_best=("reward_mean", "max", 1)'
                )
            order = ranked([candidate(checkpoint) for checkpoint in found], *best)
            chosen = next((c for c in found if order and c.name == order[0].name), None)
        else:
            for checkpoint in found:
                if which == checkpoint.name or str(checkpoint.step) == str(which):
                    chosen = checkpoint
        if chosen is None:
            steps = ", ".join(str(checkpoint.step) for checkpoint in found[-20:]) or "none"
            raise NotFoundError(
                f"there is no checkpoint {which} in {self.storage.describe()}", hint=f"the steps there are: {steps}"
            )
        return chosen

    def free_name(self, step: int) -> str:
        """A name for a checkpoint of a step; a step that is there already gets a number."""
        taken = {name.partition(".")[0] for name in self.names()}
        name, number = f"step-{step:012d}", 2
        while name in taken:
            name, number = f"step-{step:012d}-{number}", number + 1
        return name

    def discard(self, *names: str, pool: Pool | None = None) -> None:
        """Remove checkpoints and what was said of them; ``pool`` where they are many: a folder's end takes a while."""
        if not names:
            return
        trash = hide(self.storage, *names)
        marked = set(self.storage.list(_MARKS))
        trash += [f"{_MARKS}/{name}.json" for name in names if f"{name}.json" in marked]
        (pool or Pool(0)).map(self.storage.remove, [(key,) for key in trash])
        with self._guard:
            for name in names:
                self._records.pop(name, None)

    def marks(self) -> dict[str, dict[str, Any]]:
        """``{name: {"pinned", "note", "interrupted"}}`` of the checkpoints that something was said of."""
        marks = {}
        for file in self.storage.list(_MARKS):
            name, dot, _ = file.rpartition(".json")
            if dot:
                marks[name] = self.mark(name)
        return marks

    def mark(self, name: str) -> dict[str, Any]:
        key = f"{_MARKS}/{name}.json"
        if self.storage.size(key) is None:
            return {}
        try:
            value = json.loads(self.storage.read(key))
        except (ValueError, NotFoundError):
            return {}
        return value if isinstance(value, dict) else {}

    def set_mark(self, name: str, **facts: Any) -> None:
        """Say something of a checkpoint beside it, durably: ``pinned=True``, ``note="..."``. Needs no lock."""
        ensure_folder(self.storage, PRIVATE)
        ensure_folder(self.storage, _MARKS)
        publish_file(self.storage, f"{_MARKS}/{name}.json", [json.dumps({**self.mark(name), **facts}).encode()])


def candidate(checkpoint: Checkpoint) -> Candidate:
    return Candidate(checkpoint.name, checkpoint.step, checkpoint.serial, checkpoint.metrics, checkpoint.pinned)


def _age(name: str) -> tuple[int, int]:
    """What a name says of a checkpoint's age: its step, and the how-manieth save of that step it is."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2] or 1)) if match else (-1, 0)


def has_name(name: str) -> bool:
    """Whether a folder's name is one of a checkpoint."""
    return _NAME.fullmatch(name) is not None
