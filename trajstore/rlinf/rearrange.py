"""Merging and splitting buffer folders file by file: linked where possible, renumbered, and restartable."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trajstore.errors import AlreadyExistsError, FormatError, NotFoundError, SchemaError, StorageError
from trajstore.format.layout import PRIVATE, is_temporary
from trajstore.media.storage import LocalStorage, Storage
from trajstore.operations.assembly import Destination, Scaffold, located
from trajstore.operations.output import counted
from trajstore.rlinf.folder import INDEXES, METADATA, Folder, file_name, find_ranks, read_folder, write_index

#: What a move has still to remove; in the destination until it is done.
_JOURNAL = f"{PRIVATE}/moving.json"

Report = Callable[[int, int], None]


@dataclass
class Rearrangement:
    """What a merge or split did. missing : ids that an index names and whose files are not there, by folder."""

    destination: str
    trajectories: int
    samples: int
    moved: bool
    missing: dict[str, list[int]] = field(default_factory=dict)


def merge_folders(
    source: str | Storage, destination: Destination, *, copy: bool = False, report: Report | None = None
) -> Rearrangement:
    """Merge the ``rank_*`` folders of a buffer into one folder, renumbered from 0.

    For each id in ascending order, the trajectory of each rank that has it, in the order of the ranks' numbers: ranks
    interleave. Files that are missing are left out and reported.

    Parameters
    ----------
    copy : leave the ranks as they are. Otherwise their files are moved: each gets a second name, the destination
        appears whole, then the old names go. Killed in between, the same call goes on.

    Raises
    ------
    NotFoundError
        There are no ranks.
    AlreadyExistsError
        There is something at the destination, and it is not this very move.
    FormatError
        The ranks are of different formats.
    """
    storage = LocalStorage(source) if isinstance(source, str) else source
    call = {"source": storage.describe(), "count": None}
    if not copy and (done := _resumed(storage, destination, call)) is not None:
        return done
    ranks = [name for name in find_ranks(storage) if storage.size(f"{name}/{METADATA}") is not None]
    if not ranks:
        raise NotFoundError(f"there are no rank_* folders in {storage.describe()}", hint="give the folder above them")
    folders = {name: read_folder(storage.child(name)) for name in ranks}
    pieces = [
        (name, number)
        for number in sorted({number for folder in folders.values() for number in folder.files})
        for name, folder in folders.items()
        if number in folder.files
    ]
    return _rearrange(storage, folders, pieces, destination, call, copy, report)


def split_folder(
    source: str | Storage, destination: Destination, count: int, *, copy: bool = False, report: Report | None = None
) -> Rearrangement:
    """Take the first ``count`` trajectories of a buffer folder into a new one, renumbered from 0.

    Otherwise as :func:`merge_folders`; a source whose files are moved has an index of the others afterwards.
    Raises ``SchemaError`` if there are fewer.
    """
    storage = LocalStorage(source) if isinstance(source, str) else source
    call = {"source": storage.describe(), "count": count}
    if not copy and (done := _resumed(storage, destination, call)) is not None:
        return done
    folder = read_folder(storage)
    chosen = [number for number in folder.ids if number in folder.files][: max(count, 0)]
    if count < 1 or len(chosen) < count:
        raise SchemaError(f"{folder.place} has {len(folder.files)} trajectories, {count} cannot be split off")
    return _rearrange(storage, {"": folder}, [("", number) for number in chosen], destination, call, copy, report)


def _rearrange(
    source: Storage,
    folders: Mapping[str, Folder],
    pieces: Sequence[tuple[str, int]],
    destination: Destination,
    call: Mapping[str, Any],
    copy: bool,
    report: Report | None,
) -> Rearrangement:
    kinds = {folder.format for folder in folders.values()}
    if len(kinds) > 1:
        raise FormatError(f"the folders hold files of different formats: {', '.join(sorted(kinds))}")
    kind = kinds.pop()
    ids = list(range(len(pieces)))
    entries = {
        number: {**folders[name].entries[old], "trajectory_id": number} for number, (name, old) in zip(ids, pieces)
    }
    samples = sum(int(entry.get("num_samples", 0)) for entry in entries.values())
    metadata = {
        "trajectory_format": kind,
        "size": len(pieces),
        "total_samples": samples,
        "trajectory_counter": len(pieces),
    }
    seeds = [folder.metadata["seed"] for folder in folders.values() if "seed" in folder.metadata]
    if seeds:
        metadata["seed"] = seeds[0]
    parent, name = located(destination)
    missing = {folder.place: list(folder.missing) for folder in folders.values() if folder.missing}
    done = Rearrangement(parent.describe(name), len(pieces), samples, not copy, missing)
    scaffold = Scaffold(destination)
    with scaffold as session:
        for number, (origin, old) in enumerate(counted(pieces, report, len(pieces))):
            folder = folders[origin]
            target = file_name(number, folder.middle(old), kind)
            _bring(session.storage, folder.storage, folder.files[old], target, link=not copy)
        write_index(session.storage, entries, ids, metadata)
        if not copy:
            files: dict[str, dict[str, str]] = {}
            for origin, old in pieces:
                files.setdefault(origin, {})[str(old)] = folders[origin].files[old]
            journal = {"call": dict(call), "done": asdict(done), "files": files}
            session.storage.write(_JOURNAL, [json.dumps(journal).encode()])
        for inner in (PRIVATE, ""):
            session.storage.sync_folder(inner)
        scaffold.publish()
    if not copy:
        _remove_sources(source, parent.child(name))
    parent.remove(f"{name}/{PRIVATE}")  # the scaffold's lock; the folder is theirs
    return done


def _bring(storage: Storage, other: Storage, source: str, target: str, *, link: bool) -> None:
    if link:
        try:
            storage.link_from(other, source, target)
            return
        except StorageError:
            pass  # another disk: copy
    storage.copy_from(other, source, other.size(source) or 0, target)


# -- moves -------------------------------------------------------------------------------------------------------------


def _resumed(source: Storage, destination: Destination, call: Mapping[str, Any]) -> Rearrangement | None:
    """Finish this very move, if it was killed after its destination had appeared."""
    parent, name = located(destination)
    storage = parent.child(name)
    if storage.size(_JOURNAL) is None:
        return None
    journal = json.loads(storage.read(_JOURNAL))
    if journal["call"] != dict(call):
        raise AlreadyExistsError(
            f"{storage.describe()} is the destination of another move, from {journal['call']['source']}",
            hint="run that one again to finish it",
        )
    _remove_sources(source, storage)
    parent.remove(f"{name}/{PRIVATE}")
    return Rearrangement(**journal["done"])


def _remove_sources(source: Storage, destination: Storage) -> None:
    """Take moved trajectories out of their folders: out of each index first, so that none names a file that is gone."""
    journal = json.loads(destination.read(_JOURNAL))
    for name, files in journal["files"].items():
        storage = source.child(name) if name else source
        if storage.size(METADATA) is None:  # emptied before
            continue
        for file in storage.list(""):
            if is_temporary(file):  # of an index that was not finished
                storage.remove(file)
        left: list[int] = []
        if any(storage.size(index) is not None for index in INDEXES):
            folder = read_folder(storage)
            left = [number for number in folder.ids if str(number) not in files and number in folder.entries]
            samples = sum(int(folder.entries[number].get("num_samples", 0)) for number in left)
            write_index(storage, folder.entries, left, {**folder.metadata, "size": len(left), "total_samples": samples})
        for file in files.values():
            storage.remove(file)
        if not left:
            for file in (*INDEXES, METADATA):
                storage.remove(file)
            if not storage.list(""):
                storage.remove("")
