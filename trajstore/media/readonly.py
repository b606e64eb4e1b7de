"""The port's writing half, refused: for places that are only read."""

from __future__ import annotations

from collections.abc import Sequence

from trajstore.errors import StateError
from trajstore.media.storage import Lock, Piece, Storage


class ReadOnly:
    """Every writing operation raises ``StateError``. A subclass says why, and what to do instead."""

    def _refuse(self) -> StateError:
        raise NotImplementedError

    def make_root(self) -> bool:
        raise self._refuse()

    def make_folder(self, folder: str) -> None:
        raise self._refuse()

    def write(
        self, key: str, pieces: Sequence[Piece], *, base: tuple[str, int] | None = None, sync: bool = True
    ) -> None:
        raise self._refuse()

    def append(self, key: str, data: Piece, *, sync: bool = True) -> None:
        raise self._refuse()

    def rename(self, source: str, target: str) -> None:
        raise self._refuse()

    def link(self, source: str, target: str) -> None:
        raise self._refuse()

    def link_from(self, other: Storage, source: str, target: str) -> None:
        raise self._refuse()

    def copy_from(self, other: Storage, source: str, length: int, target: str) -> None:
        raise self._refuse()

    def remove(self, key: str) -> None:
        raise self._refuse()

    def sync_folder(self, folder: str) -> None:
        raise self._refuse()

    def lock(self, key: str) -> Lock:
        raise self._refuse()

    def holder(self, key: str) -> dict[str, object] | None:
        return None
