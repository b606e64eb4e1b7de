"""The opening of a store for writing: what may lie there, and who may go on with it."""

from __future__ import annotations

from trajstore.engine.commit import Session, is_root_of_parts, make_root_of_parts
from trajstore.errors import AlreadyExistsError
from trajstore.format.layout import PRIVATE, ROOT, SCRATCH, is_temporary
from trajstore.format.schema import check_name
from trajstore.media.storage import Storage


def open_part(root: Storage, name: str) -> Storage:
    """The place of a part; its root is made. Raises ``AlreadyExistsError`` if a store is there."""
    check_name(name, "part")
    make_root_of_parts(root)
    return root.child(name)


def open_session(storage: Storage, resume: bool) -> Session:
    """A session that holds the lock of a store, and knows its last commit.

    Raises ``AlreadyExistsError`` if there is a store and ``resume`` is false, or if there are other files;
    ``LockedError`` if another process has it; ``FormatError`` for a store that cannot be gone on with.
    """
    storage.make_root()
    # A temporary file alone is what a crash leaves of the very first commit.
    present = {name for name in storage.list("") if name != PRIVATE and not is_temporary(name)}
    rooted = storage.size(ROOT) is not None
    if rooted and is_root_of_parts(storage):
        raise AlreadyExistsError(
            f"{storage.describe()} holds parts, each a store of its own", hint="name this collector's: part='rank0'"
        )
    if present and rooted and not resume:
        raise _exists(storage)
    if present and not rooted and storage.list(PRIVATE) == []:
        raise AlreadyExistsError(f"{storage.describe()} holds other files", hint="choose a new or an empty folder")
    session = Session(storage)
    try:
        storage.remove(SCRATCH)  # of dead sessions: whoever holds the lock is alone
        session.find_head()
        if session.head is not None and not resume:
            raise _exists(storage)
    except BaseException:
        session.close()
        raise
    return session


def _exists(storage: Storage) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"{storage.describe()} exists", hint="pass resume=True to go on with it, or choose another path"
    )
