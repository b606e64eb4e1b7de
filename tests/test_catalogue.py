"""The arrays of a store: numbers that never change, names that nothing has, folders that a commit makes durable."""

from __future__ import annotations

from typing import Any

import pytest

from tests.campaign.disk import Disk, MemoryStorage
from trajstore.engine.catalogue import Catalogue
from trajstore.errors import StorageError


class Watched(MemoryStorage):
    """Tells which folders were synced, and does something in the midst of it."""

    def __init__(self) -> None:
        super().__init__(Disk(), "store")
        self.make_root()
        self.synced: list[str] = []
        self.meanwhile: Any = None

    def sync_folder(self, folder: str) -> None:
        super().sync_folder(folder)
        self.synced.append(folder)
        if self.meanwhile is not None:
            act, self.meanwhile = self.meanwhile, None
            act()


def test_a_number_is_for_ever() -> None:
    catalogue = Catalogue(Watched(), ("integrity/seals", "steps/obs"))
    for name in ("steps/action", "steps/obs", "clocks/steps"):
        catalogue.enter(name)
    assert catalogue.names == ("integrity/seals", "steps/obs", "steps/action", "clocks/steps")


def test_a_free_name_is_neither_known_nor_on_the_disk() -> None:
    storage = Watched()
    storage.make_folder("steps/obs.1")
    storage.write("steps/obs.1/c.0", [b"left by a writer that died"])
    catalogue = Catalogue(storage, ("steps/Obs",))
    assert catalogue.free("steps/obs") == "steps/obs.2"
    assert catalogue.free("steps/action") == "steps/action"


def test_inner_folders_are_synced_first_and_once() -> None:
    storage = Watched()
    storage.make_folder("steps/obs")
    catalogue = Catalogue(storage, ())
    catalogue.enter("steps/obs")
    catalogue.sync()
    catalogue.sync()
    assert storage.synced == ["steps", ""]


def test_an_array_that_is_made_during_a_sync_is_for_the_next() -> None:
    storage = Watched()
    storage.make_folder("steps/obs")
    catalogue = Catalogue(storage, ())
    catalogue.enter("steps/obs")

    def meanwhile() -> None:
        storage.make_folder("steps/obs.1")
        catalogue.enter("steps/obs.1")

    storage.meanwhile = meanwhile
    catalogue.sync()
    storage.synced.clear()
    catalogue.sync()
    assert storage.synced == ["steps", ""]


def test_after_a_sync_that_failed_all_is_synced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Watched()
    storage.make_folder("steps/obs")
    catalogue = Catalogue(storage, ())
    catalogue.enter("steps/obs")

    def fails(folder: str) -> None:
        raise StorageError("no")

    with monkeypatch.context() as patched:
        patched.setattr(storage, "sync_folder", fails)
        with pytest.raises(StorageError):
            catalogue.sync()
    catalogue.sync()
    assert storage.synced == ["steps", ""]
