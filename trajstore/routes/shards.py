"""Files and ``ckpt_shards_v1`` folders of routes: what lies there, before any of it is read."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from typing import Any

from trajstore.errors import NotFoundError

__all__ = ["RoutesSource", "find_routes"]

_SHARD = re.compile(r"shard_(\d+)\.npz")


@dataclass
class RoutesSource:
    """One file or folder of routes: its files in order, what its manifest says, and what lies there besides.

    manifest : of a ``ckpt_shards_v1`` folder, ``{}`` if there is none or it cannot be read.
    """

    path: str
    files: list[str]
    manifest: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    temporaries: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def find_routes(path: str | os.PathLike[str]) -> RoutesSource:
    """Look at a file or folder without reading routes. Raises ``NotFoundError`` if there are none."""
    place = os.fspath(path)
    if not os.path.exists(place):
        raise NotFoundError(f"there is no {place}", hint="check the path")
    if not os.path.isdir(place):
        return RoutesSource(place, [place])
    shards = os.path.join(place, "shards")
    folder = shards if os.path.isdir(shards) else place
    numbers = {int(m[1]): name for name in os.listdir(folder) if (m := _SHARD.fullmatch(name))}
    source = RoutesSource(place, [os.path.join(folder, numbers[n]) for n in sorted(numbers)])
    source.temporaries = sorted(
        os.path.join(where, name)
        for where in {place, folder}
        for name in os.listdir(where)
        if name.endswith(".tmp") or (name.startswith(("tmp", ".")) and name.endswith(".npz"))
    )
    _read_manifest(source)
    counted = source.manifest.get("shards_written")
    if isinstance(counted, int):
        source.unlisted = [numbers[n] for n in sorted(numbers) if n >= counted]
        source.missing = [f"shard_{n:06d}.npz" for n in range(min(counted, 1_000_000)) if n not in numbers]
    if not source.files and not source.manifest:
        raise NotFoundError(
            f"{place} holds no shards and no manifest", hint="give a routes.npz or a ckpt_shards_v1 folder"
        )
    return source


def _read_manifest(source: RoutesSource) -> None:
    path = os.path.join(source.path, "manifest.json")
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
    except FileNotFoundError:
        source.notes.append("there is no manifest.json")
        return
    except (OSError, ValueError, RecursionError) as error:
        source.notes.append(f"manifest.json cannot be read ({error}); the shards were trusted")
        return
    if isinstance(manifest, dict):
        source.manifest = manifest
    else:
        source.notes.append("manifest.json holds no object; the shards were trusted")
