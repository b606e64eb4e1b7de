"""What a writer's commits say beside its rows: progress, deletions, configuration and who it was."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trajstore.engine.commit import Session
from trajstore.engine.snapshot import Snapshot
from trajstore.errors import SchemaError
from trajstore.format.intervals import IntervalBuilder, IntervalSet
from trajstore.format.progress import Progress
from trajstore.format.schema import check_name
from trajstore.media.config import compare_config, describe_config, mismatch


@dataclass(frozen=True)
class Entry:
    """A ledger at one moment.

    version : equal to another entry's where nothing has changed between them.
    sets, extra : what the manifest takes. refused : what the caller's state holds and JSON cannot, if it does.
    """

    version: tuple[Any, ...]
    sets: Mapping[str, IntervalSet]
    extra: Mapping[str, Any]
    refused: SchemaError | None


class Ledger:
    """Made of the last commit and of what the caller asks for; changed, and read, under the writer's lock.

    Parameters
    ----------
    config : as ``describe_config`` gives it, or ``None`` to go by the stored one.
    force : go on under another configuration, and record that.
    target : number of trajectories wanted; ``None`` leaves it as it was.
    unique : name of the column that no two trajectories may share; ``None`` leaves it as it was.
    """

    def __init__(
        self,
        session: Session,
        *,
        config: dict[str, Any] | None,
        force: bool = False,
        target: int | None = None,
        unique: str | None = None,
    ) -> None:
        head = session.head
        now = time.time()
        self.unique = None if unique is None else check_name(unique, "column")
        self.deleted = IntervalBuilder()
        if head is None:
            self.progress = Progress(target, IntervalSet(), IntervalSet(), {})
            self._config: dict[str, Any] = {**(config or describe_config(None, None)), "forced": []}
            self._created, self._attributes = now, {}
            self._found = {"trajectories": 0, "steps": 0}
        else:
            snapshot = Snapshot(session.storage, head)
            stored_target, state = Progress.state_from_json(head.progress)
            self.progress = Progress(
                stored_target if target is None else target, snapshot.set("attempted"), snapshot.set("completed"), state
            )
            self.deleted.update(snapshot.set("deleted"))
            self.unique = self.unique or head.progress.get("unique")
            self._created, self._attributes = head.created, dict(head.attributes)
            self._config = _continued(dict(head.config), config, force, session.storage.describe())
            self._found = {name: head.counts[name] for name in ("trajectories", "steps")}
        self._session = {"started": now, **self._found, "pid": os.getpid()}
        self._state = self.progress.state.encoded()
        self._owed: tuple[Any, int] | None = None

    @property
    def found(self) -> dict[str, int]:
        """Trajectories and steps that were there when the session began."""
        return self._found

    def owe(self, seeds: Any, next_id: int) -> None:
        """Have seeds marked as completed with the trajectories that begin at ``next_id``, and not without them."""
        self.settle(next_id)
        self._owed = seeds, next_id

    def settle(self, next_id: int) -> None:
        """Mark what is owed if its trajectories are there; an interrupt that falls in between is made up for here."""
        if self._owed is not None:
            seeds, first = self._owed
            if next_id > first:
                self.progress.attempt(seeds, completed=True)
            self._owed = None

    def entry(self, next_id: int) -> Entry:
        """How it stands now. A state that JSON cannot hold stays out; the last one that could be stored is kept."""
        self.settle(next_id)
        progress, refused = self.progress, None
        try:
            self._state = progress.state.encoded()
        except SchemaError as error:
            refused = error
        return Entry(
            # Nothing ever leaves these sets.
            (
                next_id,
                progress.target,
                self._state,
                len(self.deleted),
                len(progress.attempted),
                len(progress.completed),
            ),
            {
                "deleted": self.deleted.freeze(),
                "attempted": progress.attempted.freeze(),
                "completed": progress.completed.freeze(),
            },
            {
                "created": self._created,
                "config": self._config,
                "session": self._session,
                "progress": {**Progress.to_json(progress.target, self._state), "unique": self.unique},
                "attributes": self._attributes,
            },
            refused,
        )


def _continued(stored: dict[str, Any], given: dict[str, Any] | None, force: bool, place: str) -> dict[str, Any]:
    """The configuration of a session that goes on. Raises ``ConfigMismatchError``."""
    differences = {} if given is None else compare_config(stored, given)
    if given is None or not differences:
        return stored
    if not force:
        raise mismatch(differences, place)
    record = {"time": time.time(), "differences": {key: list(pair) for key, pair in differences.items()}}
    return {**given, "forced": [*stored.get("forced", []), record]}
