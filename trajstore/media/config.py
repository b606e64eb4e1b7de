"""The configuration of a collection: kept with the data, compared key by key before anyone goes on with it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from trajstore.errors import ConfigMismatchError, NotFoundError, SchemaError
from trajstore.format import typedjson

_ABSENT = "(not set)"


def describe_config(config: Mapping[str, Any] | None, files: Iterable[str | os.PathLike[str]] | None) -> dict[str, Any]:
    """A configuration as the manifest holds it: ``values``, sha256 of each named file's content, and a fingerprint.

    Raises ``NotFoundError`` for a file that is not there, ``SchemaError`` for a value that JSON cannot hold.
    """
    if config is not None and not isinstance(config, Mapping):
        raise SchemaError(f"config is a dict, not {type(config).__name__}")
    if isinstance(files, (str, os.PathLike)):
        files = [files]  # one file, not its name's letters
    files = [] if files is None else list(files) if isinstance(files, Iterable) else [files]
    for path in files:
        if not isinstance(path, (str, os.PathLike)):
            raise SchemaError(f"files are given by their paths, not as {path!r:.60}")
    values = json.loads(typedjson.dumps(dict(config or {})))
    hashes = {os.fspath(path): _sha256(path) for path in files}
    return with_fingerprint(values, hashes)


def with_fingerprint(values: Mapping[str, Any], files: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of these values, and of the sha256 of each of these files."""
    body = json.dumps([values, files], sort_keys=True).encode()
    return {"values": values, "files": files, "fingerprint": hashlib.sha256(body).hexdigest()}


def _sha256(path: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise NotFoundError(
            f"the file {os.fspath(path)}, named in the configuration, cannot be read: {error}"
        ) from error
    return digest.hexdigest()


def compare_config(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each key whose value differs, with the stored and the given one; nested keys are joined by dots."""
    differences: dict[str, tuple[Any, Any]] = {}
    for section in ("values", "files"):
        before, after = _flat(stored.get(section, {})), _flat(given.get(section, {}))
        for key in sorted(before.keys() | after.keys()):
            if before.get(key, _ABSENT) != after.get(key, _ABSENT) or (key in before) != (key in after):
                name = key if section == "values" else f"content of {key}"
                differences[name] = before.get(key, _ABSENT), after.get(key, _ABSENT)
    return differences


def mismatch(differences: dict[str, tuple[Any, Any]], place: str) -> ConfigMismatchError:
    lines = "".join(f"\n  {key}: stored {old!r}, given {new!r}" for key, (old, new) in differences.items())
    return ConfigMismatchError(
        f"{place} was collected under another configuration:{lines}",
        differences=differences,
        hint="collect into a new store, or pass force=True to go on and have the change recorded",
    )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping) or not values:
        return {prefix[:-1]: values} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat
