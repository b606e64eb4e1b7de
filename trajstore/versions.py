"""The versions of the libraries that a checkpoint was made with."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

_ALWAYS = ("numpy", "torch", "gymnasium")


def library_versions(*names: str) -> dict[str, str]:
    """``{name: version}`` of Python, of the usual libraries that this process uses, and of ``names``."""
    versions = {"python": platform.python_version()}
    for name in (*_ALWAYS, *names):
        if name in names or name in sys.modules:
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                module = sys.modules.get(name)
                if module is not None:
                    versions[name] = str(getattr(module, "__version__", "unknown"))
    return versions


def version_hint(saved: Mapping[str, str] | None, *names: str) -> str:
    """Which library versions a checkpoint was saved and is being restored with, for a message."""
    now = library_versions(*names)
    if not saved:
        return "it does not say which versions it was saved with; now: " + _write(now)
    changed = {name for name in {*saved, *now} if saved.get(name) != now.get(name)}
    if not changed:
        return "saved and restored with the same versions: " + _write(now)
    return f"saved with {_write(saved, changed)}; now {_write(now, changed)}"


def _write(versions: Mapping[str, str], only: set[str] | None = None) -> str:
    names = sorted(versions if only is None else only)
    return ", ".join(f"{name} {versions.get(name, 'absent')}" for name in names)
