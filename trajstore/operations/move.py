"""Move: merge stores into a new one, verify it, and only then remove them. It can be killed and run again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trajstore.dataset import Dataset
from trajstore.dataset import open as open_dataset
from trajstore.engine.commit import Session, exists, read_manifest
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import AlreadyExistsError, ConflictError, CorruptionError, NotFoundError, SchemaError
from trajstore.format.layout import temporary
from trajstore.media.storage import LocalStorage
from trajstore.operations.assembly import Destination, Report, located, refuse_existing
from trajstore.operations.heritage import ORIGINS
from trajstore.operations.merge import Source, gather_sources, merge
from trajstore.operations.verify import verify


def move(
    sources: Source | Sequence[Source], destination: Destination, *, report: Report | None = None, **options: Any
) -> Dataset:
    """Merge whole stores into a new one and remove them when every byte of it has been verified.

    Parameters
    ----------
    sources, destination, report, options : as of ``merge.merge``; trajectories cannot be left out.

    Raises
    ------
    AlreadyExistsError
        There is something at the destination, and it is not what this very move made before it was killed.
    SchemaError
        Trajectories would be lost: some are left out, or are deleted and could still be undeleted.
    LockedError, ConflictError
        A writer has a source open, or has committed to it since; that source is left as it is.
    CorruptionError
        The new store does not verify; no source was touched.
    """
    for name in ("where", "dedupe"):
        if options.get(name) is not None:
            raise SchemaError(f"a move takes every trajectory, and {name!r} leaves some out", hint="merge, then remove")
    if options.get("provenance") is False:
        raise SchemaError("a move needs the origins in the new store, to be run again after a kill")
    parent, name = located(destination)
    try:
        refuse_existing(parent, name)
    except AlreadyExistsError:
        merged = open_dataset(parent.child(name))
        left = _left_of(merged, sources)
    else:
        chosen = gather_sources(sources)
        for snapshot in chosen.snapshots:
            _refuse_loss(snapshot)
        if len(chosen) != sum(len(snapshot.live) for snapshot in chosen.snapshots):
            raise SchemaError("a move takes every trajectory of its sources, not a selection")
        merged = merge(chosen, destination, report=report, **options)
        left = list(chosen.snapshots)
    checked = verify(parent.child(name))
    if not checked.ok:
        raise CorruptionError(
            f"{merged.snapshots[0].place} does not verify; no source was removed", hint="see `trajstore verify`"
        )
    for snapshot in left:
        remove_store(snapshot)
    return merged


def _refuse_loss(snapshot: Snapshot) -> None:
    if snapshot.set("deleted"):
        raise SchemaError(
            f"{snapshot.place} has deleted trajectories, which could be undeleted still", hint="compact it first"
        )
    if not isinstance(snapshot.storage, LocalStorage):
        raise SchemaError(f"{snapshot.place} is not on a local file system", hint="merge, then remove it yourself")


def _left_of(merged: Dataset, sources: Source | Sequence[Source]) -> list[Snapshot]:
    """The sources that a move before this one, which had made its destination, did not come to remove."""
    origins = merged.snapshots[0].manifest.attributes.get(ORIGINS, [])
    known = {(entry.get("place"), entry.get("commit")) for entry in origins if isinstance(entry, dict)}
    items = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    left: list[Snapshot] = []
    for item in items:
        try:
            left += gather_sources(item).snapshots
        except NotFoundError:
            continue  # removed already
    for snapshot in left:
        if (snapshot.place, snapshot.manifest.commit.uuid) not in known:
            raise AlreadyExistsError(
                f"{merged.snapshots[0].place} exists, and {snapshot.place} is not in it",
                hint="nothing was touched; choose another destination",
            )
        _refuse_loss(snapshot)
    return left


def remove_store(snapshot: Snapshot) -> None:
    """Remove a store that stands as this snapshot has it; its name goes in one step.

    Raises ``LockedError`` while a writer has it open, ``ConflictError`` if one has committed since.
    """
    storage = snapshot.storage
    session = Session(storage)
    try:
        if not exists(storage) or read_manifest(storage).commit.uuid != snapshot.manifest.commit.uuid:
            raise ConflictError(
                f"{snapshot.place} has been written to since; it was not removed", hint="merge it again"
            )
        parent, name = located(snapshot.place)
        gone = temporary("", f"{name}.removed")
        parent.remove(gone)
        parent.rename(name, gone)
        parent.sync_folder("")
    finally:
        session.close()
    parent.remove(gone)
