"""A store made of trajectories that come from elsewhere, one after the other; it appears whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from trajstore.operations.assembly import Destination, Scaffold
from trajstore.operations.output import Exported, counted
from trajstore.writer import Writer, create

#: Fields and columns of one trajectory.
Parts = tuple[Mapping[str, Any], Mapping[str, Any]]

_COMMIT_BYTES = 512 << 20


@contextmanager
def new_store(destination: Destination, **options: Any) -> Iterator[Writer]:
    """The writer of a store that appears when the block ends, or after an error not at all.

    ``options`` : of :func:`trajstore.create`. Raises ``AlreadyExistsError``; ``LockedError`` if another is making it.
    """
    scaffold = Scaffold(destination)
    with scaffold as session:
        session.close()  # the writer takes the lock for itself
        settings = {"commit_every": None, "commit_bytes": _COMMIT_BYTES, "handle_signals": False, **options}
        writer = create(session.storage, resume=True, **settings)
        try:
            yield writer
            writer.close()
        finally:
            writer.abandon()
        scaffold.publish()


def fill_store(
    destination: Destination,
    trajectories: Iterable[Parts],
    count: int,
    *,
    progress: Callable[[int, int], None] | None = None,
    state: Mapping[str, Any] | None = None,
    warnings: Iterable[str] = (),
    **options: Any,
) -> Exported:
    """Append each trajectory, its fields and its columns, to a new store.

    Parameters
    ----------
    count : of trajectories there are, for ``progress``, which is called with those done and this.
    state : of the writer, see ``Writer.state``.
    warnings : for the report; asked for when all trajectories have come.
    options : of :func:`trajstore.create`.

    Raises ``AlreadyExistsError``, and what ``trajectories`` and the writer raise; nothing is left behind then.
    """
    with new_store(destination, **options) as writer:
        if state is not None:
            writer.state = dict(state)
        for fields, columns in counted(trajectories, progress, count):
            writer.append(fields, **columns)
        return Exported(len(writer), writer.steps, tuple(warnings))
