"""The public names: a change here is a change for users, and is made on purpose."""

from __future__ import annotations

import types

import trajstore

PUBLIC = {
    "Clock",
    "Codec",
    "Column",
    "Dataset",
    "Field",
    "Recorder",
    "Trajectory",
    "TrajstoreError",
    "Writer",
    "__version__",
    "create",
    "load_routes",
    "open",
    "run_dir",
}


def test_public_names_are_these() -> None:
    assert set(trajstore.__all__) == PUBLIC
    assert len(trajstore.__all__) == len(PUBLIC)


def test_every_public_name_is_there_and_said_to_be_there() -> None:
    for name in trajstore.__all__:
        assert getattr(trajstore, name) is not None
        assert name in dir(trajstore)


def test_nothing_else_looks_public() -> None:
    """Rooms that an import has loaded are attributes too; `annotations` is Python's own."""
    shown = {name for name, value in vars(trajstore).items() if not isinstance(value, types.ModuleType)}
    assert {name for name in shown if not name.startswith("_")} <= PUBLIC | {"annotations"}
