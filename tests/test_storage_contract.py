"""What every storage must do: one contract, kept by the local disk and by the campaigns' disk in memory."""

from __future__ import annotations

import errno
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

import trajstore
from tests.campaign.disk import Disk, Tapped
from trajstore.errors import AlreadyExistsError, LockedError, NotFoundError, SchemaError, StorageError
from trajstore.media.storage import LocalStorage, Storage


@pytest.fixture(params=["local", "memory", "tapped"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    made: Storage = LocalStorage(tmp_path / "store") if request.param != "memory" else Disk().storage()
    made.make_root()
    if request.param == "tapped":
        made = Tapped(made, lambda name, arguments, call: call())  # type: ignore[assignment]
    return made


def test_a_file_is_made_once_of_all_its_pieces(storage: Storage) -> None:
    storage.write("a", [b"one", bytearray(b"two"), memoryview(b"three"), b""])
    assert storage.read("a") == b"onetwothree"
    with pytest.raises(AlreadyExistsError):
        storage.write("a", [b"other"])
    assert storage.read("a") == b"onetwothree"


def test_half_open_reads_end_where_the_file_ends(storage: Storage) -> None:
    storage.write("a", [bytes(range(100))])
    assert storage.read("a", 10, 20) == bytes(range(10, 20))
    assert storage.read("a", 90, 200) == bytes(range(90, 100))
    assert storage.read("a", 100) == storage.read("a", 300, 400) == storage.read("a", 5, 5) == b""
    assert storage.size("a") == 100


@pytest.mark.parametrize("stop", [1 << 40, 1 << 62, 1 << 63, 1 << 70])
def test_a_read_far_beyond_the_end_costs_nothing(storage: Storage, stop: int) -> None:
    storage.write("a", [b"short"])
    assert storage.read("a", 0, stop) == b"short"
    assert storage.read("a", stop - 10, stop) == b""


def test_a_missing_file_is_not_found(storage: Storage) -> None:
    for read in (lambda: storage.read("a"), lambda: storage.read("no/such/folder/a", 0, 10)):
        with pytest.raises(NotFoundError):
            read()
    assert storage.size("a") is None and storage.size("no/a") is None
    assert storage.list("no") == []
    storage.remove("a")


def test_a_file_can_begin_with_another_ones_bytes(storage: Storage) -> None:
    storage.write("a", [b"0123456789"])
    storage.write("b", [b"xyz"], base=("a", 4))
    assert storage.read("b") == b"0123xyz"
    with pytest.raises(StorageError):
        storage.write("c", [b"x"], base=("a", 11))
    assert storage.size("c") is None, "after an error no file is left"


def test_a_reader_of_the_older_version_keeps_it(storage: Storage) -> None:
    storage.write("a", [b"0123"])
    assert storage.read("a", 0, 4) == b"0123"
    storage.write("tmp", [b"4567"], base=("a", 4))
    storage.rename("tmp", "a")
    assert storage.read("a", 0, 4) == b"0123"
    assert storage.read("a", 2, 8) == b"234567"
    assert storage.read("a") == b"01234567"


def test_folders(storage: Storage) -> None:
    storage.make_folder("x/y/z")
    storage.make_folder("x/w")
    assert sorted(storage.list("x")) == ["w", "y"]
    assert storage.list("") == ["x"]
    assert storage.size("x") is None
    with pytest.raises(AlreadyExistsError):
        storage.make_folder("x/y")
    storage.write("x/y/z/a", [b"1"])
    storage.sync_folder("x/y/z")
    storage.remove("x")
    assert storage.list("") == []
    with pytest.raises(StorageError):
        storage.sync_folder("x")


def test_make_root_says_whether_it_was_missing(tmp_path: Path) -> None:
    for made in (LocalStorage(tmp_path / "a/b/c"), Disk().storage()):
        assert made.make_root() is True
        assert made.make_root() is False


def test_a_rename_replaces_and_a_link_does_not(storage: Storage) -> None:
    storage.write("a", [b"a"])
    storage.write("b", [b"b"])
    with pytest.raises(AlreadyExistsError):
        storage.link("a", "b")
    storage.rename("a", "b")
    assert storage.list("") == ["b"] and storage.read("b") == b"a"
    storage.link("b", "c")
    assert storage.read("c") == b"a"
    for operation in (storage.rename, storage.link):
        with pytest.raises(StorageError) as caught:
            operation("gone", "d")
        assert caught.value.errno == errno.ENOENT


def test_of_many_that_link_one_name_one_wins(storage: Storage) -> None:
    won: list[int] = []

    def compete(number: int) -> None:
        storage.write(f"tmp{number}", [b"%d" % number])
        try:
            storage.link(f"tmp{number}", "prize")
        except AlreadyExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=compete, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and storage.read("prize") == b"%d" % won[0]


def test_files_move_between_storages(storage: Storage) -> None:
    storage.make_folder("one")
    storage.make_folder("two")
    one, two = storage.child("one"), storage.child("two")
    one.write("a", [b"0123456789"])
    inner = getattr(one, "inner", one)  # a storage of another make shares no disk with this one
    two.link_from(inner, "a", "linked")
    two.copy_from(inner, "a", 4, "copied")
    assert two.read("linked") == b"0123456789" and two.read("copied") == b"0123"
    with pytest.raises(AlreadyExistsError):
        two.link_from(inner, "a", "linked")
    with pytest.raises(AlreadyExistsError):
        two.copy_from(inner, "a", 4, "copied")
    with pytest.raises(NotFoundError):
        two.link_from(inner, "gone", "b")
    with pytest.raises(StorageError):
        two.copy_from(inner, "a", 11, "b")
    assert sorted(two.list("")) == ["copied", "linked"]


def test_a_file_appended_to_grows(storage: Storage) -> None:
    storage.append("log", b"one\n")
    storage.append("log", memoryview(b"two\n"), sync=False)
    assert storage.read("log") == b"one\ntwo\n"


def test_one_holds_the_lock(storage: Storage) -> None:
    assert storage.holder("lock") is None
    lock = storage.lock("lock")
    assert storage.holder("lock") is not None
    with pytest.raises(LockedError):
        storage.lock("lock")
    lock.release()
    lock.release()
    assert storage.holder("lock") is None
    storage.lock("lock").release()


def test_places_are_named(storage: Storage) -> None:
    assert storage.describe("x/y").endswith("store/x/y")
    assert storage.child("x").describe("y") == storage.describe("x/y")


# -- the local disk alone ----------------------------------------------------------------------------------------------


def test_local_storage_travels_without_its_descriptors(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("a", [b"1"])
    assert storage.read("a", 0, 1) == b"1"
    assert pickle.loads(pickle.dumps(storage)).read("a") == b"1"


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    """A pipe would make the reader wait for ever, a link could lead anywhere."""
    storage = LocalStorage(tmp_path)
    (tmp_path / "real").write_bytes(b"1")
    os.symlink(tmp_path / "real", tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    os.mkdir(tmp_path / "folder")
    for name in ("link", "pipe", "folder"):
        with pytest.raises(StorageError):
            storage.read(name)
        with pytest.raises(StorageError):
            storage.read(name, 0, 10)
        assert storage.size(name) is None


def test_no_operation_goes_through_a_symbolic_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a").write_bytes(b"1")
    storage = LocalStorage(tmp_path / "store")
    storage.make_root()
    storage.write("mine", [b"2"])
    os.symlink(outside, tmp_path / "store/link")
    other = LocalStorage(tmp_path / "other")
    other.make_root()
    for operation, arguments in [
        (storage.read, ("link/a",)),
        (storage.size, ("link/a",)),
        (storage.list, ("link",)),
        (storage.make_folder, ("link/new",)),
        (storage.make_folder, ("link/new/er",)),
        (storage.write, ("link/new", [b"3"])),
        (storage.append, ("link/a", b"3")),
        (storage.rename, ("mine", "link/new")),
        (storage.rename, ("link/a", "new")),
        (storage.link, ("mine", "link/new")),
        (storage.link, ("link/a", "new")),
        (other.link_from, (storage, "link/a", "new")),
        (other.copy_from, (storage, "link/a", 1, "new")),
        (storage.remove, ("link/a",)),
        (storage.sync_folder, ("link",)),
        (storage.lock, ("link/new",)),
        (storage.holder, ("link/a",)),
    ]:
        with pytest.raises(StorageError, match="store/link is a symbolic link"):
            operation(*arguments)  # type: ignore[operator]
    assert sorted(os.listdir(outside)) == ["a"] and (outside / "a").read_bytes() == b"1"
    assert sorted(storage.list("")) == ["link", "mine"] and other.list("") == []
    storage.remove("link")  # the link itself, and nothing behind it
    assert os.listdir(outside) == ["a"]


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    storage = LocalStorage(tmp_path)
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(StorageError, match="disk is full"):
        storage.write("a", [b"1"])
    assert storage.list("") == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.writev
    monkeypatch.setattr(
        os, "writev", lambda fd, views: os.write(fd, bytes(views[0][:3])) if views else whole(fd, views)
    )
    LocalStorage(tmp_path).write("a", [b"0123456789", b"abc", b"", b"defgh"])
    assert (tmp_path / "a").read_bytes() == b"0123456789abcdefgh"


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_bytes_are_copied_where_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    calls = iter([3])

    def once(source: int, target: int, count: int) -> int:
        for length in calls:
            return os.write(target, os.read(source, length))
        raise OSError(code, os.strerror(code))

    storage = LocalStorage(tmp_path)
    storage.write("a", [b"0123456789"])
    monkeypatch.setattr(os, "copy_file_range", once)
    storage.write("b", [b"x"], base=("a", 8))
    assert storage.read("b") == b"01234567x"


def test_a_root_that_was_there_is_made_durable_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever made the folder (a user, a writer that was killed) may not have synced the folder above it."""
    synced: list[str] = []
    monkeypatch.setattr(LocalStorage, "sync_folder", lambda self, folder: synced.append(self.describe(folder)))
    (tmp_path / "store").mkdir()
    LocalStorage(tmp_path / "store").make_root()
    assert str(tmp_path) in synced


def test_a_folder_whose_sync_failed_is_never_trusted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports a lost write once: a second sync that succeeds proves nothing."""

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    storage = LocalStorage(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(StorageError):
            storage.sync_folder("")
    with pytest.raises(StorageError, match="earlier sync"):
        storage.sync_folder("")
    LocalStorage(tmp_path).sync_folder("")


def test_a_folder_that_could_not_be_opened_may_be_synced_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    storage = LocalStorage(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(os, "open", fail)
        with pytest.raises(StorageError, match="ulimit"):
            storage.sync_folder("")
    storage.sync_folder("")


def test_a_full_disk_does_not_keep_the_lock_from_being_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who holds the lock is written for people only."""

    def fail(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    storage = LocalStorage(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", fail)
        lock = storage.lock("lock")
    with pytest.raises(LockedError):
        storage.lock("lock")
    lock.release()
    storage.lock("lock").release()


@pytest.mark.parametrize("path", [5, None, b"bytes", "null\0byte"])
def test_what_is_no_path_is_named(path: Any) -> None:
    for takes_a_path in (LocalStorage, trajstore.open, trajstore.create):
        with pytest.raises(SchemaError, match="is no path"):
            takes_a_path(path)
