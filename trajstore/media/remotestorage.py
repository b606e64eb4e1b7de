"""A store at a URL (s3://, gs://, https://, …), read through fsspec."""

from __future__ import annotations

import os
from typing import Any

from trajstore.errors import MissingDependencyError, NotFoundError, SchemaError, StateError, StorageError
from trajstore.media.readonly import ReadOnly


class RemoteStorage(ReadOnly):
    """The port's reading half, on any file system that fsspec knows.

    Parameters
    ----------
    url : of the store's folder.
    options : what fsspec's file system takes: credentials, an endpoint.

    Notes
    -----
    Picklable; safe after a fork, as a file system is opened anew in each process. Nothing is cached here: a store that
    grows is read as it is.
    """

    gap = 256 << 10
    streams = 32

    def __init__(self, url: str, options: dict[str, Any] | None = None) -> None:
        self.url = url.rstrip("/")
        self.options = options or {}
        self._opened: tuple[int, Any, str] | None = None

    def __reduce__(self) -> tuple[type[RemoteStorage], tuple[str, dict[str, Any]]]:
        return RemoteStorage, (self.url, self.options)

    def __repr__(self) -> str:
        return f"RemoteStorage({self.url!r})"

    def describe(self, key: str = "") -> str:
        return f"{self.url}/{key}" if key else self.url

    def child(self, key: str) -> RemoteStorage:
        return RemoteStorage(self.describe(key), self.options)

    def _at(self, key: str) -> tuple[Any, str]:
        """The file system, and what it calls a key."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), *_open(self.url, self.options))
        _, system, root = self._opened
        return system, f"{root}/{key}" if key else root

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is not None and stop <= start:
            return b""
        system, path = self._at(key)
        try:
            data: bytes = system.cat_file(path, start=start or None, end=stop)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise NotFoundError(f"there is no file {self.describe(key)}") from error
        except Exception as error:
            if start and (self.size(key) or 0) <= start:  # some servers refuse a range beyond the end
                return b""
            raise self._failed("read", key, error) from error
        wanted = None if stop is None else stop - start
        if len(data) == wanted or (not start and wanted is None):
            return data
        # A server that knows no ranges sends the whole.
        whole = (wanted is not None and len(data) > wanted) or (start > 0 and len(data) == self.size(key))
        return data[start:stop] if whole else data

    def size(self, key: str) -> int | None:
        system, path = self._at(key)
        try:
            found = system.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:
            raise self._failed("look at", key, error) from error
        size = found.get("size")
        return None if found.get("type") == "directory" or size is None else int(size)

    def list(self, folder: str) -> list[str]:
        system, path = self._at(folder)
        try:
            found = system.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except Exception as error:
            raise self._failed("list", folder, error) from error
        names = {str(name).rstrip("/").rpartition("/")[2] for name in found}
        return sorted(names - {"", path.rstrip("/").rpartition("/")[2]} if path in found else names - {""})

    def _failed(self, what: str, key: str, error: Exception) -> StorageError:
        # Each file system raises errors of its own kind.
        return StorageError(f"could not {what} {self.describe(key)}: {error or type(error).__name__}")

    def _refuse(self) -> StateError:
        return StateError(
            f"{self.url} is remote, and remote stores are only read",
            hint="write to a local folder, and copy it there whole once it is closed",
        )


def _open(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise MissingDependencyError(
            f"reading {url} needs fsspec", hint="pip install 'trajstore[remote]'", name="fsspec"
        ) from error
    try:
        system, root = url_to_fs(url, use_listings_cache=False, skip_instance_cache=True, **options)
    except ImportError as error:
        raise MissingDependencyError(f"reading {url} needs a package more: {error}", name=str(error.name)) from error
    except ValueError as error:
        raise SchemaError(f"{url} is no URL that fsspec can read: {error}") from error
    return system, str(root).rstrip("/")
