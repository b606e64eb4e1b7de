"""One buffer folder: its metadata, its index under either name, and the files that are there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trajstore.engine.index import natural
from trajstore.errors import FormatError, NotFoundError
from trajstore.media.publish import publish_file
from trajstore.media.storage import Storage

METADATA = "metadata.json"
#: The second is the misspelt name that older versions wrote; both are written, so that all of them find one.
INDEXES = ("trajectory_index.json", "trajector_index.json")
SUFFIXES = {"pt": ".pt", "pkl": ".pkl"}

_RANK = re.compile(r"rank_(\d+)\Z")
_FILE = re.compile(r"trajectory_(\d+)_(.*)\.(pt|pkl)\Z")


@dataclass(frozen=True)
class Folder:
    """A buffer folder as it is.

    ids : in the order of the buffer. entries : what the index says of each. files : the name of each one's file,
        without those that are missing. metadata : as it stands there.
    """

    storage: Storage
    metadata: Mapping[str, Any]
    entries: Mapping[int, Mapping[str, Any]]
    ids: Sequence[int]
    files: Mapping[int, str]
    missing: Sequence[int] = field(default=())

    @property
    def place(self) -> str:
        return self.storage.describe()

    @property
    def format(self) -> str:
        """``"pt"`` or ``"pkl"``."""
        return str(self.metadata.get("trajectory_format", "pt"))

    def middle(self, number: int) -> str:
        """What stands between the id and the suffix in a file's name; opaque."""
        match = _FILE.match(self.files[number])
        return match[2] if match else ""


def find_ranks(storage: Storage) -> list[str]:
    """The names of the ``rank_*`` folders inside a folder, in the order of their numbers."""
    return sorted((name for name in storage.list("") if _RANK.match(name)), key=natural)


def read_folder(storage: Storage) -> Folder:
    """Read a folder's metadata and index, and look for the files.

    Raises ``NotFoundError`` if it is no buffer folder, ``FormatError`` if its JSON is not what it should be.
    """
    metadata = _json(storage, METADATA)
    name = next((name for name in INDEXES if storage.size(name) is not None), None)
    if name is None:
        raise NotFoundError(f"{storage.describe()} has no {INDEXES[0]}", hint="give a buffer's rank folder")
    index = _json(storage, name)
    try:
        entries = {int(number): dict(entry) for number, entry in index["trajectory_index"].items()}
        ids = [int(number) for number in index.get("trajectory_id_list", entries)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{storage.describe(name)} is no trajectory index") from error
    kind = metadata.get("trajectory_format", "pt")
    if kind not in SUFFIXES:
        raise FormatError(f"{storage.describe(METADATA)} names the format {kind!r:.80}", hint="pt or pkl")
    there: dict[int, list[str]] = {}
    for file in storage.list(""):
        match = _FILE.match(file)
        if match is not None and file.endswith(SUFFIXES[kind]):
            there.setdefault(int(match[1]), []).append(file)
    known = [number for number in ids if number in entries]
    files = {number: _file(number, entries[number], kind, there[number]) for number in known if number in there}
    missing = [number for number in ids if number not in files]
    return Folder(storage, metadata, entries, ids, files, missing)


def _file(number: int, entry: Mapping[str, Any], kind: str, names: list[str]) -> str:
    """The file that the entry's weights id makes, or else the only one there is; the middle of the name is opaque."""
    expected = file_name(number, str(entry.get("model_weights_id", "")), kind)
    return expected if expected in names else min(names)


def batch_files(storage: Storage) -> list[tuple[int, str]]:
    """Id and name of every batch file in a folder, whatever its index says."""
    return [(int(match[1]), name) for name in storage.list("") if (match := _FILE.match(name))]


def file_name(number: int, middle: str, kind: str) -> str:
    return f"trajectory_{number}_{middle}{SUFFIXES[kind]}"


def _json(storage: Storage, name: str) -> dict[str, Any]:
    try:
        value = json.loads(storage.read(name))
    except NotFoundError:
        raise NotFoundError(
            f"{storage.describe()} has no {name}", hint="give a buffer's rank folder, or the folder of several"
        ) from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{storage.describe(name)} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{storage.describe(name)} holds no JSON object")
    return value


def write_index(
    storage: Storage, entries: Mapping[int, Mapping[str, Any]], ids: Sequence[int], metadata: Mapping[str, Any]
) -> None:
    """Write a folder's index, under both names, and its metadata, each in one step: what they name must be there."""
    index = {"trajectory_index": {str(n): dict(entries[n]) for n in ids}, "trajectory_id_list": list(ids)}
    for name in INDEXES:
        publish_file(storage, name, [json.dumps(index).encode()])
    publish_file(storage, METADATA, [json.dumps(dict(metadata)).encode()])
