"""The arrays that a store has ever had: their numbers, names for new ones, and folders that are not durable yet."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from trajstore.media.storage import Storage


class Catalogue:
    """Names of arrays in the order in which they came: a seal names an array by its number here.

    Notes
    -----
    Encoders name arrays too, and must never wait for the writer's lock: this has one of its own.
    """

    def __init__(self, storage: Storage, names: Iterable[str]) -> None:
        self._storage = storage
        self._names = list(names)
        self._unsynced: set[str] = set()
        self._guard = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        with self._guard:
            return tuple(self._names)

    def enter(self, path: str) -> None:
        """An array's folder was made, or may have been made by a writer that crashed before it was durable."""
        parts = path.split("/")
        with self._guard:
            self._unsynced |= {"/".join(parts[:depth]) for depth in range(len(parts))}
            if path not in self._names:
                self._names.append(path)

    def free(self, wanted: str) -> str:
        """A path for a new array: ``wanted``, or the first of ``wanted.1``, ``wanted.2``, … that nothing has."""
        with self._guard:
            taken = {name.casefold() for name in self._names}
        found, number = wanted, 0
        while found.casefold() in taken or self._storage.list(found):
            number += 1
            found = f"{wanted}.{number}"
        return found

    def sync(self) -> None:
        """Make the folders durable, the inner ones first."""
        with self._guard:
            unsynced, self._unsynced = self._unsynced, set()
        try:
            for folder in sorted(unsynced, reverse=True):
                self._storage.sync_folder(folder)
        except BaseException:
            with self._guard:
                self._unsynced |= unsynced
            raise
