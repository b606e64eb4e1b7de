"""Every error that trajstore raises, sorted by what its reader will do next.

Each message says what is wrong, where, and the way out; the way out is also
kept as ``hint``, so that a command line can print it on a line of its own.
Each class inherits the built-in exception that a careful caller catches
already, so ``except FileExistsError`` works without knowing trajstore.
"""

from __future__ import annotations


class TrajstoreError(Exception):
    """The root of all errors raised on purpose.

    Parameters
    ----------
    message : what is wrong, naming the thing and the place.
    hint : what to do next, or ``""`` where the message says all.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class SchemaError(TrajstoreError, ValueError):
    """The data given does not fit what the store holds: mend the data or the declaration."""


class NotFoundError(TrajstoreError, KeyError, IndexError):
    """The store, field, column or trajectory named does not exist.

    Also a ``KeyError`` and an ``IndexError``: what looks like a mapping or a sequence must fail like one, so that
    ``in`` and ``get`` work.
    """


class AlreadyExistsError(TrajstoreError, FileExistsError):
    """Something stands where a new thing was to be made; nothing was touched."""


class ConflictError(TrajstoreError):
    """Another writer has committed since: what this session wrote after its last commit is lost to it."""


class LockedError(ConflictError):
    """Another living process holds the store: wait for it, or write to a store of your own."""


class ConfigMismatchError(TrajstoreError):
    """The store was collected under another configuration.

    ``differences`` maps each differing key to ``(stored, given)``.
    """

    def __init__(self, message: str, *, differences: dict[str, tuple[object, object]], hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.differences = differences


class StateError(TrajstoreError, RuntimeError):
    """The object cannot do this now: it is closed, poisoned, or was inherited by a forked process."""


class QueueFullError(StateError):
    """``on_full="error"``: the writer's queue has no room, and nothing of the trajectory was taken."""


class StorageError(TrajstoreError, OSError):
    """The operating system refused an operation; ``errno`` is kept."""

    def __init__(self, message: str, *, hint: str = "", errno: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.errno = errno


class FormatError(TrajstoreError):
    """What lies on disk is not what the format allows."""


class UnsupportedFormatError(FormatError):
    """The data is of a newer format, or asks for a feature that this version lacks: upgrade."""


class CorruptionError(FormatError):
    """A checksum, a length or a bound does not hold: restore from a copy, or ``trajstore repair``."""


class MissingDependencyError(TrajstoreError, ImportError):
    """An optional package, ``name``, is not installed; the hint is the command that installs it."""

    def __init__(self, message: str, *, hint: str = "", name: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.name = name
