"""One more commit on an existing store that appends no trajectory: what is deleted, or a new array."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from trajstore.__about__ import __version__
from trajstore.dataset import Place, stores
from trajstore.engine.commit import Session, read_manifest
from trajstore.engine.seals import SealWriter
from trajstore.engine.sets import SetWriter
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import NotFoundError
from trajstore.format.intervals import IntervalSet
from trajstore.format.layout import SEALS, ArrayLayout
from trajstore.format.manifest import Commit, Manifest, Shard
from trajstore.format.schema import Schema


class Amendment:
    """A store that is locked for one commit. snapshot : as the last commit left it."""

    def __init__(self, session: Session, head: Manifest, disk: ThreadPoolExecutor) -> None:
        self.session, self.head, self.disk = session, head, disk
        self.storage = session.storage
        self.snapshot = Snapshot(session.storage, head)

    def commit(
        self,
        *,
        sets: Mapping[str, IntervalSet] | None = None,
        schema: Schema | None = None,
        arrays: Mapping[str, tuple[ArrayLayout, int]] | None = None,
        shards: Iterable[tuple[str, Shard]] = (),
    ) -> Manifest:
        """Publish the last commit with these changes. ``shards`` : of the new ``arrays``, durable, never to grow."""
        session, head = self.session, self.head
        changes: dict[str, Any] = {
            "sets": {**head.sets, **SetWriter(self.storage, session.uuid, self.disk).store(sets or {})}
        }
        if arrays:
            names = (*head.names, *(path for path in arrays if path not in head.names))
            if SEALS not in names:
                names = (*names, SEALS)
            place = {name: i for i, name in enumerate(names)}
            seals = SealWriter(self.storage, session.uuid, self.disk, head)
            seals.add((place[path], shard) for path, shard in shards)
            changes["arrays"] = {**head.arrays, **arrays, SEALS: (seals.layout, seals.rows)}
            changes["names"], changes["seals"], changes["schema"] = names, seals.shards, schema or head.schema
            for path in (*arrays, SEALS):
                parts = path.split("/")
                for depth in range(len(parts), -1, -1):
                    self.storage.sync_folder("/".join(parts[:depth]))
        commit = Commit(
            session.next_number(),
            uuid.uuid4().hex,
            head.commit.uuid,
            session.clock(),
            session.uuid,
            f"trajstore {__version__}",
        )
        manifest = replace(head, commit=commit, **changes)
        session.check()
        session.publish(manifest)
        session.write_children()
        return manifest


@contextmanager
def amending(place: Place) -> Iterator[Amendment]:
    """Lock one store. Raises ``LockedError`` while a writer has it open, ``NotFoundError`` if there is none."""
    found = stores(place)
    if len(found) != 1:
        raise NotFoundError(
            f"{place} holds {len(found)} stores", hint="give one of them, or merge them into one store first"
        )
    Snapshot.of(found[0])  # says what is missing, before a folder is made for the lock
    session = Session(found[0])
    try:
        head = session.find_head()
        if head is None:
            raise NotFoundError(f"there is no store at {found[0].describe()}")
        with ThreadPoolExecutor(8, thread_name_prefix="trajstore-disk") as disk:
            if read_manifest(found[0]).commit.uuid != head.commit.uuid:
                # Its writer died between claiming and showing it: show it, so that all see what is amended here.
                head = Amendment(session, head, disk).commit()
            yield Amendment(session, head, disk)
    finally:
        session.close()
