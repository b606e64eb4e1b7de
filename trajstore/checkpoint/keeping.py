"""What becomes of older checkpoints once a new one is there: kept, cut down to a milestone, or removed."""

from __future__ import annotations

from trajstore.checkpoint.chunks import Pool
from trajstore.checkpoint.retention import Retention, select
from trajstore.checkpoint.saving import strip_checkpoint
from trajstore.checkpoint.shelf import Shelf


class Keeper:
    """The rules of a run at work on its shelf; only for whoever holds the folder's lock.

    Parameters
    ----------
    milestone : the sections that a checkpoint keeps if ``keep_every`` alone holds it; empty for all.
    """

    def __init__(self, shelf: Shelf, rules: Retention, milestone: frozenset[str], pool: Pool) -> None:
        self._shelf = shelf
        self._rules = rules
        self._milestone = milestone
        self._pool = pool

    def apply(self, newest: str) -> None:
        """Remove what no rule keeps; ``newest`` is the checkpoint just saved, which stays."""
        if self._rules.keeps_all:
            return
        candidates = self._shelf.candidates()
        kept = select(candidates, self._rules, newest_valid=newest)
        self._shelf.discard(*(c.name for c in candidates if c.name not in kept))
        for candidate in candidates:
            if kept.get(candidate.name) == ["every"] and self._milestone:
                self._strip(candidate.name)

    def drop_branch(self, after: int, before: int) -> None:
        """Remove what was saved between two serials and is not pinned: a run went on from the first of them."""
        found = self._shelf.checkpoints()
        self._shelf.discard(*(c.name for c in found if after < c.serial < before and not c.pinned))

    def _strip(self, name: str) -> None:
        """Drop all but the milestone's sections: the smaller one appears, then the whole one goes."""
        record = self._shelf.record(name)
        if record.stripped or not self._milestone & set(record.sections):
            return
        target = f"{name}.milestone"
        if target not in self._shelf.names():
            strip_checkpoint(self._shelf.storage, name, target, record, self._milestone, self._pool)
        mark = self._shelf.mark(name)
        if mark:
            self._shelf.set_mark(target, **mark)
        self._shelf.discard(name)
