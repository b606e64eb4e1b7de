"""Receipts: length and checksum of files in a foreign layout, kept beside it where no other program looks.

A receipt names a file's modification time too and speaks only of the file that still has it: rot leaves the time
alone, while a program that writes the file anew moves it, and the receipt with its old checksum then says nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trajstore.errors import CorruptionError
from trajstore.format.checksum import crc32c
from trajstore.format.layout import PRIVATE
from trajstore.media.publish import ensure_folder, publish_file
from trajstore.media.storage import LocalStorage, Storage

_RECEIPTS = f"{PRIVATE}/receipts"


def write_receipt(storage: LocalStorage, name: str, **facts: Any) -> None:
    """Write the receipt of a published file or folder ``name``; ``facts`` (JSON values) are kept with it."""
    path = Path(storage.describe(name))
    files = {}
    for file in _files(path):
        data = file.read_bytes()
        files[_below(file, path)] = [len(data), crc32c(data), file.stat().st_mtime_ns]
    ensure_folder(storage, _RECEIPTS)
    publish_file(storage, f"{_RECEIPTS}/{name}.json", [json.dumps({**facts, "files": files}).encode()])


def read_receipt(storage: Storage, name: str) -> dict[str, Any] | None:
    """The receipt of ``name``, or ``None`` if there is none that can be read."""
    key = f"{_RECEIPTS}/{name}.json"
    if storage.size(key) is None:
        return None
    try:
        receipt = json.loads(storage.read(key))
    except ValueError:
        return None
    return receipt if isinstance(receipt, dict) and isinstance(receipt.get("files"), dict) else None


def check_receipt(storage: LocalStorage, name: str) -> int:
    """Compare a file or folder with its receipt.

    Returns how many files were compared; 0 if no receipt speaks of them.

    Raises
    ------
    CorruptionError : a file is missing, or differs though nobody wrote it since.
    """
    receipt = read_receipt(storage, name)
    if receipt is None:
        return 0
    path = Path(storage.describe(name))
    compared = 0
    for below, (length, checksum, modified) in receipt["files"].items():
        file = path / below if below else path
        try:
            status = file.stat()
        except OSError as error:
            raise CorruptionError(f"{file} is missing: it was saved with {length} bytes") from error
        if status.st_mtime_ns != modified:
            continue
        data = file.read_bytes()
        if len(data) != length or crc32c(data) != checksum:
            raise CorruptionError(f"{file} is damaged: it does not match the checksum that it was saved with")
        compared += 1
    return compared


def forget_receipt(storage: Storage, name: str) -> None:
    storage.remove(f"{_RECEIPTS}/{name}.json")


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _below(file: Path, path: Path) -> str:
    return "" if file == path else file.relative_to(path).as_posix()
