"""Folders of RLinf's embodied replay buffer into a store: one rank, or all of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trajstore.errors import FormatError, NotFoundError, SchemaError
from trajstore.format.schema import Clock, Column, Field
from trajstore.media.storage import LocalStorage
from trajstore.operations.filling import Parts, fill_store
from trajstore.rlinf import Batch, Folder, batch_of, fields_of, find_ranks, load_batch, read_folder
from trajstore.rlinf.batch import BATCH, CLOCKS, ENTRY, ENV, MIDDLE, NUMBER, OTHER, RANK, WEIGHTS

__all__ = ["RlinfReport", "import_rlinf"]

_PLAIN = ("max_episode_length", WEIGHTS)


@dataclass
class RlinfReport:
    """What an import found; printable.

    missing : ids that an index names and whose files are not there, by folder. unreadable : file and reason of those
    left out (``unreadable="skip"``).
    """

    destination: str = ""
    batches: int = 0
    trajectories: int = 0
    samples: int = 0
    missing: dict[str, list[int]] = field(default_factory=dict)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.batches} batches, {self.trajectories} trajectories, {self.samples} steps -> {self.destination}"
        ]
        for place, ids in self.missing.items():
            lines.append(f"  named by the index of {place}, not there ({len(ids)}): {', '.join(map(str, ids))}")
        lines += [f"  unreadable, left out: {name}: {reason}" for name, reason in self.unreadable]
        return "\n".join(lines)


def import_rlinf(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    destination: str | os.PathLike[str],
    *,
    unreadable: str = "fatal",
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> RlinfReport:
    """Make a store of a buffer folder, of the ``rank_*`` folders in one, or of a list of these.

    Each environment of a batch becomes a trajectory; the columns ``batch`` (counted from 0 over all ranks), ``env``,
    ``rank`` and ``trajectory_id`` (the buffer's own) say where it stood. Ranks interleave, as RLinf merges them: the
    lowest id of every rank, then the next.

    Parameters
    ----------
    source : is read only. Files that an index names and that are not there are reported, not an error.
    destination : a new store; it appears whole or not at all.
    unreadable : ``"fatal"``, or ``"skip"`` to leave out files that cannot be read.
    progress : is called with trajectories stored and trajectories there are.
    options : of :func:`trajstore.create` (``profile``, ``threads``, …).

    Raises
    ------
    NotFoundError, AlreadyExistsError : nothing to read, or the destination exists.
    FormatError : a file is not what it should be, or asks for more than tensors and plain values.
    SchemaError : batches that do not fit one another.
    MissingDependencyError : PyTorch is not installed.

    Notes
    -----
    Files are read twice, once for what fields there are; memory is bounded by the largest file and the writer's queue.
    """
    if unreadable not in ("fatal", "skip"):
        raise SchemaError(f"unreadable={unreadable!r}", hint="unreadable is 'fatal' or 'skip'")
    places = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    ranks = [rank for place in places for rank in _ranks(os.fspath(place), len(places) > 1)]
    pieces = [
        _Piece(rank, folder, number)
        for number in sorted({number for _, folder in ranks for number in folder.files})
        for rank, folder in ranks
        if number in folder.files
    ]
    report = RlinfReport(os.fspath(destination))
    report.missing = {folder.place: list(folder.missing) for _, folder in ranks if folder.missing}
    fields, plain, pieces = _fields(pieces, unreadable, report)
    state = {"rlinf": {str(rank): dict(folder.metadata) for rank, folder in ranks}}
    columns = {name: Column("int64") for name in (BATCH, ENV, RANK, NUMBER)}
    columns["max_episode_length"] = Column("int64", -1)
    clocks = {**{str(spec.clock): Clock("none") for spec in fields.values()}, **CLOCKS}

    def trajectories() -> Iterator[Parts]:
        for number, piece in enumerate(pieces):
            yield from _trajectories(piece, number, fields, report)

    done = fill_store(
        destination,
        trajectories(),
        sum(piece.envs for piece in pieces),
        progress=progress,
        state=state,
        fields={**fields, **plain},
        clocks=clocks,
        columns=columns,
        **options,
    )
    report.trajectories, report.samples = done.trajectories, done.steps
    return report


@dataclass(frozen=True)
class _Piece:
    """One batch file: of which rank and folder, under which id, and of how many environments."""

    rank: int
    folder: Folder
    number: int
    envs: int = 0

    def batch(self) -> Batch:
        name = self.folder.files[self.number]
        return batch_of(load_batch(self.folder.storage, name), self.folder.storage.describe(name))


def _ranks(place: str, several: bool) -> list[tuple[int, Folder]]:
    storage = LocalStorage(place)
    names = find_ranks(storage)
    if names:
        return [(int(name.removeprefix("rank_")), read_folder(storage.child(name))) for name in names]
    if not os.path.isdir(place):
        raise NotFoundError(f"there is no folder {place}")
    name = os.path.basename(os.path.normpath(place))
    rank = int(name[5:]) if name.startswith("rank_") and name[5:].isdecimal() else 0
    return [(rank, read_folder(storage))]


def _fields(
    pieces: Sequence[_Piece], unreadable: str, report: RlinfReport
) -> tuple[dict[str, Field], dict[str, Field], list[_Piece]]:
    """What fields there are in any of the files, and the files that can be read."""
    found: dict[str, Field] = {}
    having: dict[str, int] = {}
    readable = []
    for piece in pieces:
        place = piece.folder.storage.describe(piece.folder.files[piece.number])
        try:
            batch = piece.batch()
            fields = fields_of(batch)
        except (FormatError, SchemaError) as error:
            if unreadable == "fatal":
                raise
            report.unreadable.append((place, error.message))
            continue
        for path, spec in fields.items():
            known = found.setdefault(path, spec)
            if (known.dtype, known.shape) != (spec.dtype, spec.shape):
                raise SchemaError(
                    f"{place}: field {path!r} is {spec.dtype} {spec.shape}, and {known.dtype} {known.shape} before it",
                    hint="import the ranks that fit together into stores of their own",
                )
            having[path] = having.get(path, 0) + 1
        readable.append(replace(piece, envs=batch.envs))
    for path, count in having.items():
        if count < len(readable):  # what is there or not goes by a clock of its own
            found[path] = replace(found[path], clock=path.replace("/", "."))
    plain = {WEIGHTS: Field("string"), MIDDLE: Field("string"), ENTRY: Field("json"), OTHER: Field("json")}
    return found, plain, readable


def _trajectories(
    piece: _Piece, batch_number: int, fields: Mapping[str, Field], report: RlinfReport
) -> Iterator[Parts]:
    batch = piece.batch()
    length = batch.plain.get("max_episode_length")
    weights = batch.plain.get(WEIGHTS)
    same = {
        WEIGHTS: None if weights is None else str(weights),
        MIDDLE: piece.folder.middle(piece.number),
        ENTRY: json.loads(json.dumps(dict(piece.folder.entries[piece.number]))),
        OTHER: {key: value for key, value in batch.plain.items() if key not in _PLAIN} or None,
    }
    columns = {BATCH: batch_number, RANK: piece.rank, NUMBER: piece.number}
    columns["max_episode_length"] = -1 if length is None else int(length)
    for env, rows in enumerate(batch.trajectories()):
        yield {**dict.fromkeys(fields), **rows, **same}, {**columns, ENV: env}
    report.batches += 1
